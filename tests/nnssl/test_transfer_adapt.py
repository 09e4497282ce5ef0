"""Weights meet another network: every adaptation by hand-made tensors, and what it does to whole networks."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from nnssl.errors import NnsslError
from nnssl.networks import build_network, canonical_state_dict, forward_features
from nnssl.plans import Plan
from nnssl.weights import Adaptation, apply, build_payload, resize_positions, save
from nnssl.weights.adapt import adapt_channels, adapt_kernel, adapt_tensor, adapt_upsampling
from nnssl.weights.layout import Layout, shift_stages

FOUR = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (1, 2, 2))
FIVE = (*FOUR, (2, 2, 2))


@pytest.fixture
def make(tiny_plans, tiny_dataset_json):
    """``make(dim, arch, channels, **tiny_plans) -> (plan, network, payload)``."""

    def build(dim=3, arch="plain", channels=1, parts=None, told=None, **options):
        plans = tiny_plans(dim, arch, channels, **options)
        if told:
            plans["nnssl"] = told
        plan = Plan.from_dicts(plans, "2d" if dim == 2 else "3d_fullres", tiny_dataset_json(channels))
        network = build_network(plan)
        with torch.no_grad():
            for p in network.parameters():  # biases and norms differ too, so that each tensor shows where it came from
                p.add_(0.1 * torch.randn_like(p))
        n = plan.n_stages
        payload = build_payload(
            network, plan, method="macl", config={}, crop_size=(8,) * dim, data={},
            pretrained_parts=parts or {"encoder": True, "decoder_stages": list(range(n - 1))},
        )  # fmt: skip
        return plan, network, payload

    return build


# ---------------------------------------------------------------------------------------------------- by hand


def test_channels_by_hand():
    one = torch.tensor([[[[[6.0]]]], [[[[9.0]]]]])  # two filters, one channel
    out, text = adapt_channels(one, 3, "repeat")
    assert out[:, :, 0, 0, 0].tolist() == [[2, 2, 2], [3, 3, 3]]
    assert text == "input channels 1 -> 3, repeated and divided by 3"
    out, text = adapt_channels(one, 3, "first")
    assert out[:, :, 0, 0, 0].tolist() == [[6, 0, 0], [9, 0, 0]] and "the others 0" in text
    three = torch.tensor([[1.0, 2.0, 6.0]]).reshape(1, 3, 1, 1)
    assert adapt_channels(three, 1, "repeat")[0].flatten().tolist() == [9]
    assert adapt_channels(three, 1, "first")[0].flatten().tolist() == [1]
    assert adapt_channels(three, 2, "repeat")[0].flatten().tolist() == [4.5, 4.5]
    assert adapt_channels(three, 2, "first")[0].flatten().tolist() == [1, 2]


@pytest.mark.parametrize(("given", "wanted"), [(1, 4), (4, 1), (2, 3)])
def test_equal_channels_give_what_the_one_gave(given, wanted):
    weight, x = torch.randn(5, given, 3, 3, 3), torch.randn(1, 1, 6, 7, 8)
    want = functional.conv3d(x.expand(-1, given, -1, -1, -1), weight)
    out = adapt_channels(weight, wanted, "repeat")[0]
    assert torch.allclose(functional.conv3d(x.expand(-1, wanted, -1, -1, -1), out), want, atol=1e-4)


def test_kernels_by_hand():
    line = torch.tensor([1.0, 2.0, 6.0]).reshape(1, 1, 1, 3)
    assert adapt_kernel(line, (3, 3), "centre")[0][0, 0].tolist() == [[0, 0, 0], [1, 2, 6], [0, 0, 0]]
    out, text = adapt_kernel(line, (3, 3), "average")
    assert torch.allclose(out[0, 0], torch.tensor([1.0, 2.0, 6.0]).expand(3, 3) / 3)
    assert text == "kernel 1x3 -> 3x3, averaged"
    assert adapt_kernel(line, (1, 1), "centre")[0].item() == 2
    assert adapt_kernel(line, (1, 1), "average")[0].item() == 9
    column = line.reshape(1, 1, 3, 1)
    assert adapt_kernel(column, (1, 3), "centre")[0][0, 0].tolist() == [[0, 2, 0]]
    five = torch.arange(5.0).reshape(1, 1, 5)
    assert adapt_kernel(five, (3,), "centre")[0].flatten().tolist() == [1, 2, 3]
    assert adapt_kernel(five, (2,), "centre") is None


def test_centre_embedding_computes_the_same():
    weight, x = torch.randn(2, 3, 1, 3, 3), torch.randn(1, 3, 5, 6, 7)
    wide = adapt_kernel(weight, (3, 3, 3), "centre")[0]
    want = functional.conv3d(x, weight, padding=(0, 1, 1))
    assert torch.allclose(functional.conv3d(x, wide, padding=1), want, atol=1e-5)
    assert torch.equal(adapt_kernel(wide, (1, 3, 3), "centre")[0], weight)


@pytest.mark.parametrize(("old", "new"), [((1, 3, 3), (3, 3, 3)), ((3, 3, 3), (1, 3, 3)), ((3, 3, 1), (3, 1, 3))])
def test_averaging_computes_the_same_on_what_is_constant_along_the_axis(old, new):
    weight = torch.randn(2, 3, *old)
    x = torch.randn(1, 3, 7, 8, 9)
    for axis, (a, b) in enumerate(zip(old, new), start=2):
        if a != b:
            x = x.narrow(axis, 0, 1).expand(*[-1] * axis, 7, *[-1] * (4 - axis)).contiguous()
    out = adapt_kernel(weight, new, "average")[0]
    middle = (slice(None), slice(None), *[slice(3, 4)] * 3)
    results = [functional.conv3d(x, w, padding=[k // 2 for k in w.shape[2:]]) for w in (weight, out)]
    assert torch.allclose(results[0][middle], results[1][middle], atol=1e-5)


def test_upsampling_by_hand():
    one = torch.tensor([4.0]).reshape(1, 1, 1, 1)
    assert adapt_upsampling(one, (1, 2))[0].flatten().tolist() == [4, 4]
    two = torch.tensor([2.0, 6.0]).reshape(1, 1, 1, 2)
    assert adapt_upsampling(two, (1, 1))[0].item() == 4
    out, text = adapt_upsampling(two, (2, 2))
    assert out[0, 0].tolist() == [[2, 6], [2, 6]] and text == "upsampling 1x2 -> 2x2, repeated or averaged"


def test_positions_are_interpolated_along_each_axis():
    ramp = torch.arange(2.0).reshape(2, 1, 1).expand(2, 3, 4)
    embedding = torch.stack([ramp, 5 + 0 * ramp], -1).reshape(1, 24, 2)
    out = resize_positions(embedding, (2, 3, 4), (4, 3, 2)).reshape(4, 3, 2, 2)
    assert out[:, 0, 0, 0].tolist() == [0, 0.25, 0.75, 1]
    assert (out[..., 1] == 5).all() and out[2].unique().numel() == 2
    assert torch.equal(resize_positions(embedding, (2, 3, 4), (2, 3, 4)), embedding)
    with pytest.raises(ValueError, match="24 tokens do not fill a grid of 2x3x5"):
        resize_positions(embedding, (2, 3, 5), (2, 3, 4))


def test_what_is_not_asked_for_is_not_done():
    weight = torch.randn(4, 1, 3, 3, 3)
    nothing, kinds = Adaptation(), {"stem": True, "upsampling": False}
    assert adapt_tensor(weight, (4, 2, 3, 3, 3), nothing, **kinds).startswith("shape (4, 1,")
    assert "shape" in adapt_tensor(weight, (4, 2, 3, 3, 3), Adaptation(channels="repeat"), stem=False, upsampling=False)
    assert "skipped as asked" in adapt_tensor(weight, (4, 2, 3, 3, 3), Adaptation(channels="skip"), **kinds)
    assert "shape" in adapt_tensor(weight, (4, 1, 1, 3, 3), Adaptation(channels="repeat"), **kinds)
    assert "shape" in adapt_tensor(weight, (4, 1, 3, 3), Adaptation("repeat", "centre", "match"), **kinds)
    assert "no common centre" in adapt_tensor(weight, (4, 1, 2, 3, 3), Adaptation(kernels="centre"), **kinds)
    both, text = adapt_tensor(weight, (4, 2, 1, 3, 3), Adaptation("repeat", "centre"), **kinds)
    assert both.shape == (4, 2, 1, 3, 3) and text.count(";") == 1
    assert torch.equal(both[:, 1], weight[:, 0, 1:2] / 2)


@pytest.mark.parametrize(
    ("told", "text"),
    [
        ({"adapt": {"channels": "twice"}}, "channels can be repeat or first or skip"),
        ({"adapt": {"kernel": "centre"}}, "no such kind. Did you mean 'kernels'"),
        ({"adapt": {"kernels": "center"}}, "Did you mean 'centre'"),
        ({"coverage": 0}, "--coverage 0: a share"),
        ({"coverage": True}, "a share"),
    ],
)
def test_unknown_adaptations(told, text):
    with pytest.raises(NnsslError, match=text):
        Adaptation.from_metadata(told)


def test_adaptations_from_plans():
    assert not Adaptation.from_metadata({}).active
    told = {"adapt": {"channels": "first", "depth": "match"}, "coverage": 0.3}
    assert Adaptation.from_metadata(told) == Adaptation("first", None, "match", 0.3)


# ------------------------------------------------------------------------------------------------ whole networks


@pytest.mark.parametrize("arch", ["plain", "resenc"])
@pytest.mark.parametrize("dim", [2, 3])
def test_more_channels_compute_the_same_on_equal_channels(arch, dim, make):
    _, source, payload = make(dim, arch)
    plan, target, _ = make(dim, arch, 3)
    report = apply(target, payload, plan, adapt=Adaptation(channels="repeat"))
    x = torch.randn(1, 1, *(8, 12, 16)[-dim:])
    got, want = forward_features(target, x.expand(-1, 3, *x.shape[2:])), forward_features(source, x)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(got.levels, want.levels))
    assert report.part("encoder").adapted == 1 and report.part("encoder").random == 0
    line = next(line for line in str(report).splitlines() if line.startswith("  adapted:"))
    assert line.endswith("input channels 1 -> 3, repeated and divided by 3 (1 tensor)")
    assert json.loads(json.dumps(report.to_dict()))["adaptations"] == report.adaptations


def test_first_channel_and_back(make):
    _, source, payload = make(channels=1)
    plan, target, _ = make(channels=2)
    apply(target, payload, plan, adapt=Adaptation(channels="first"))
    x = torch.randn(1, 2, 8, 12, 16)
    assert torch.allclose(
        forward_features(target, x, 0).skips[-1], forward_features(source, x[:, :1], 0).skips[-1], atol=1e-4
    )
    _, two, payload = make(channels=2)
    plan, one, _ = make(channels=1)
    apply(one, payload, plan, adapt=Adaptation(channels="repeat"))
    y = x[:, :1]
    assert torch.allclose(
        forward_features(one, y, 0).skips[-1],
        forward_features(two, y.expand(-1, 2, -1, -1, -1), 0).skips[-1],
        atol=1e-3,
    )


def test_a_skipped_stem_stays_random_and_is_said(make):
    _, _, payload = make(arch="resenc")
    plan, target, _ = make(arch="resenc", channels=4)
    before = target.encoder.stem.convs[0].conv.weight.clone()
    report = apply(target, payload, plan, adapt=Adaptation(channels="skip"))
    assert torch.equal(target.encoder.stem.convs[0].conv.weight, before)
    assert "1 left random: 1 input channels in the checkpoint, 4 here; skipped as asked" in str(report)


@pytest.mark.parametrize("arch", ["plain", "resenc"])
def test_kernels_and_strides_that_differ_by_axis(arch, make):
    flat = {"strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)), "kernels": ((1, 3, 3), (1, 3, 3), (3, 3, 3))}
    _, source, payload = make(arch=arch, **flat)
    plan, target, _ = make(arch=arch)
    with pytest.raises(NnsslError, match="promises more than fits"):
        apply(target, payload, plan)
    report = apply(target, payload, plan, adapt=Adaptation(kernels="centre"))
    assert report.total.percent > 95 and report.part("encoder").random == 0
    text = str(report)
    assert "encoder stage 0: kernel 1x3x3 -> 3x3x3, embedded at or cut from the centre" in text
    assert "decoder stage 1: upsampling 1x2x2 -> 2x2x2, repeated or averaged (1 tensor)" in text
    assert "note: encoder stage 1: stride 1x2x2 in pretraining, 2x2x2 here; weights as they are" in text
    given, got = canonical_state_dict(source), canonical_state_dict(target)
    name = next(n for n in got if n.startswith("encoder") and got[n].ndim == 5)
    assert torch.equal(got[name][:, :, 1:2], given[name]) and (got[name][:, :, 0] == 0).all()
    x = torch.randn(1, 1, 8, 12, 16)
    assert torch.allclose(forward_features(target, x, 0).skips[0], forward_features(source, x, 0).skips[0], atol=1e-4)


@pytest.mark.parametrize("arch", ["plain", "resenc"])
def test_a_deeper_network_takes_the_stages_of_equal_resolution(arch, make):
    # six features, the last two alike as nnU-Net caps them
    _, source, payload = make(arch=arch, strides=FOUR, features=(4, 6, 8, 8))
    plan, target, _ = make(arch=arch, strides=FIVE, features=(4, 6, 8, 8, 8), patch=(16, 32, 32))
    before = {n: t.clone() for n, t in canonical_state_dict(target).items()}
    with pytest.raises(NnsslError, match="4 encoder stages, the network 5; to pair them add --adapt depth=match"):
        apply(target, payload, plan, adapt=Adaptation(channels="repeat"))
    assert all(torch.equal(t, before[n]) for n, t in canonical_state_dict(target).items())
    report = apply(target, payload, plan, adapt=Adaptation(depth="match"))
    given, got = canonical_state_dict(source), canonical_state_dict(target)
    for name, tensor in got.items():
        if name.startswith("encoder.stages.4.") or name.startswith(("decoder.stages.0.", "decoder.transpconvs.0.")):
            assert torch.equal(tensor, before[name]), name
        elif name.startswith("encoder."):
            assert torch.equal(tensor, given[name]), name
        elif "seg_layers" not in name:
            kind, module, index, rest = name.split(".", 3)
            assert torch.equal(tensor, given[f"{kind}.{module}.{int(index) - 1}.{rest}"]), name
    x = torch.randn(1, 1, 16, 32, 32)
    for a, b in zip(forward_features(source, x, 0).skips, forward_features(target, x, 0).skips):
        assert torch.equal(a, b)
    assert report.adaptations[0] == "depth: 4 -> 5 encoder stages, those of equal resolution paired"
    assert report.part("decoder stage 0").random and not report.part("decoder stage 1").random


@pytest.mark.parametrize("of_others", [False, True])
def test_a_shallower_network(of_others, make):
    _, source, payload = make(strides=FIVE, features=(4, 6, 8, 8, 8), patch=(16, 32, 32))
    if of_others:
        payload = dict(source.state_dict())
    plan, target, _ = make(strides=FOUR, features=(4, 6, 8, 8), patch=(16, 32, 32))
    report = apply(target, payload, plan, adapt=Adaptation(depth="match"))
    assert [p.percent for p in report.parts] == [100, 100, 100, 100, 0]
    given, got = canonical_state_dict(source), canonical_state_dict(target)
    assert torch.equal(got["decoder.transpconvs.0.weight"], given["decoder.transpconvs.1.weight"])


def test_fewer_and_more_residual_blocks(make, tiny_plans, tiny_dataset_json):
    plans = tiny_plans(arch="resenc")
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["n_blocks_per_stage"] = [1, 3, 2]
    plan = Plan.from_dicts(plans, "3d_fullres", tiny_dataset_json())
    _, _, payload = make(arch="resenc")
    report = apply(build_network(plan), payload, plan, adapt=Adaptation(depth="match"))
    assert report.part("encoder").reasons == {"not in the checkpoint": 8}, "the third block of one stage"


def test_a_projection_that_is_numbered_otherwise(make):
    """A residual block that does not pool calls its projection skip.0, one that does skip.1."""
    _, source, payload = make(arch="resenc", strides=((1, 1, 1), (1, 1, 1), (2, 2, 2)))
    plan, target, _ = make(arch="resenc")
    assert any(".skip.0." in n for n in canonical_state_dict(source))
    report = apply(target, payload, plan, adapt=Adaptation(kernels="average"))
    assert report.part("encoder").percent == 100


def test_another_width_or_kind_is_refused_with_the_reason(make):
    everything = Adaptation("repeat", "centre", "match", coverage=0.01)
    _, _, payload = make(arch="resenc", features=(4, 8, 16))
    plan, target, _ = make(arch="resenc", features=(4, 8, 12))
    with pytest.raises(NnsslError, match="4, 8, 16 in the checkpoint and 4, 8, 12 here; widths are not adapted, since"):
        apply(target, payload, plan, adapt=everything)
    plan, target, _ = make(arch="plain")
    with pytest.raises(
        NnsslError, match="holds a ResidualEncoderUNet with 3 stages, the plan asks for a PlainConvUNet"
    ):
        apply(target, payload, plan, adapt=everything)
    plan, target, _ = make(2, "resenc")
    with pytest.raises(NnsslError, match="the weights are 3d, the network is 2d"):
        apply(target, payload, plan, adapt=everything)


def test_coverage_comes_from_the_plan(make):
    _, _, payload = make(features=(4, 8, 8))
    deep = {"strides": FIVE, "features": (4, 8, 8, 8, 8), "patch": (16, 32, 32)}
    told = {"adapt": {"depth": "match"}, "coverage": 0.9}
    plan, target, _ = make(told=told, **deep)
    before = canonical_state_dict(target)["encoder.stages.1.0.convs.0.conv.weight"].clone()
    with pytest.raises(
        NnsslError, match=r"fills \d\d\.\d % of the parameters of the encoder, less than the coverage of 90 %"
    ):
        apply(target, payload, plan)
    assert torch.equal(canonical_state_dict(target)["encoder.stages.1.0.convs.0.conv.weight"], before)
    plan, target, _ = make(told={**told, "coverage": 0.4}, **deep)
    assert 40 < apply(target, payload, plan).part("encoder").percent < 90


def test_refused_unless_asked_for_and_the_message_says_how(make):
    _, _, payload = make()
    plan, target, _ = make(channels=2)
    with pytest.raises(NnsslError, match="--adapt channels=repeat"):
        apply(target, payload, plan)


def test_through_the_plan_variant(nnunet_env, make, tiny_dataset_json, tmp_path, capsys):
    from nnssl.plan_command import main
    from nnssl.plans import load_plan

    plan, _, _ = make(channels=2)
    folder = nnunet_env.preprocessed / plan.dataset_name
    folder.mkdir()
    (folder / "nnUNetPlans.json").write_text(json.dumps(plan.plans))
    (folder / "dataset.json").write_text(json.dumps(tiny_dataset_json(2)))
    save(tmp_path / "w.pth", make()[2])
    arguments = ["-d", "901", "--checkpoint", str(tmp_path / "w.pth"), "--name", "x"]
    assert main(arguments) == 1
    assert "--adapt channels=repeat" in capsys.readouterr().err
    assert main([*arguments, "--coverage", "0.9"]) == 2
    assert "--coverage counts where --adapt" in capsys.readouterr().err
    assert main([*arguments, "--adapt", "channels=repeat", "--coverage", "0.9"]) == 0
    assert "adapted: encoder stage 0: input channels 1 -> 2, repeated and divided by 2" in capsys.readouterr().out
    told = load_plan(901, plans_name="nnUNetPlans_x").nnssl
    assert told["adapt"] == {"channels": "repeat"} and told["coverage"] == 0.9
    variant = load_plan(901, plans_name="nnUNetPlans_x")
    assert apply(build_network(variant), tmp_path / "w.pth", variant).part("encoder").adapted == 1


# ----------------------------------------------------------------------------------- transformers and other files


class Tokens(nn.Module):
    """The names that matter of a Primus."""

    def __init__(self, side):
        super().__init__()
        self.down_projection = nn.Conv3d(1, 6, 4, 4)
        self.eva = nn.Module()
        self.eva.pos_embed = nn.Parameter(torch.randn(1, side**3, 6))
        self.eva.norm = nn.LayerNorm(6)


def test_position_embeddings_of_another_patch():
    source, target = Tokens(2), Tokens(3)
    plan = {"key_to_encoder": "net.eva", "key_to_stem": "net.down_projection"}
    weights = {f"net.{n}": t for n, t in source.state_dict().items()}
    report = apply(target, {"network_weights": weights, "nnssl_adaptation_plan": plan})
    want = resize_positions(source.eva.pos_embed, (2, 2, 2), (3, 3, 3))
    assert torch.equal(target.eva.pos_embed, want) and torch.equal(
        target.down_projection.weight, source.down_projection.weight
    )
    assert report.adaptations == ["eva.pos_embed: positions of 2x2x2 tokens -> 3x3x3, interpolated (1 tensor)"]
    odd = Tokens(2)
    odd.eva.pos_embed = nn.Parameter(torch.randn(1, 12, 6))
    report = apply(odd, {"network_weights": weights, "nnssl_adaptation_plan": plan})
    assert "only cubic token grids" in str(report)


def test_prefixes_of_upstreams_files_are_dropped(make):
    plan, network, payload = make(arch="resenc")
    weights = {f"student.{n}": t for n, t in payload["network_weights"].items() if n.startswith("encoder.")}
    adaptation = {**payload["nnssl_adaptation_plan"], "key_to_encoder": "student.encoder.stages"}
    report = apply(build_network(plan), {"network_weights": weights, "nnssl_adaptation_plan": adaptation}, plan)
    assert report.part("encoder").percent == 100


def test_layout_of_a_state_dict(make):
    _, network, _ = make(arch="resenc", strides=FOUR, features=(4, 6, 8, 10))
    state = canonical_state_dict(network)
    layout = Layout.of(state)
    assert (str(layout), layout.stages, layout.widths) == ("ResidualEncoderUNet with 4 stages", 4, (4, 6, 8, 10))
    shifted = shift_stages(state, -1)
    assert torch.equal(shifted["decoder.transpconvs.0.weight"], state["decoder.transpconvs.1.weight"])
    assert "decoder.transpconvs.2.weight" not in shifted and len(shift_stages(state, 1)) == len(state)
