"""Primus: how plans name it, that it is nnU-Net's own, that dropped tokens are gone, and what of it is transferred."""

import importlib

import pytest
import torch

from nnssl import checkpoint
from nnssl.errors import NnsslError
from nnssl.heads.tokens import TokenDecoder
from nnssl.networks import PrimusEncoder, build_network, encoder_module, forward_features
from nnssl.plan_command import main
from nnssl.plans import Plan, load_plan
from nnssl.plans.primus import CLASSES, architecture, parse_network
from nnssl.plans.variants import derive, list_variants
from nnssl.transferability import RobustnessConfig, RobustnessEvaluator
from nnssl.transferability.crops import crop_size
from nnssl.weights import Adaptation, apply, check_loadable, resize_positions
from nnssl.weights.formats import convert
from nnssl.weights.info import describe


@pytest.fixture
def make(tiny_plans, tiny_dataset_json):
    """``make(kind, patch, token, channels, width, depth, heads) -> Plan`` of a tiny Primus."""

    def build(kind="Primus", patch=(8, 12, 16), token=(4, 4, 4), channels=1, width=24, depth=2, heads=2):
        plans = tiny_plans(3, "plain", channels, patch=patch)
        thin = {"ch_per_level": (4, 4, 8, 8)} if kind == "PrimusV3" else {}
        entry = architecture(kind, width, depth, heads, patch_embed_size=token, **thin)
        plans["configurations"]["3d_fullres"]["architecture"] = entry
        return Plan.from_dicts(plans, "3d_fullres", tiny_dataset_json(channels))

    return build


def payload_of(plan, network, **others):
    parts = {"encoder": True, "decoder_stages": []}
    common = {"method": "mae", "config": {}, "crop_size": plan.patch_size, "data": {}}
    return checkpoint.build_payload(network, plan, pretrained_parts=parts, **common, **others)


# ------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("kind", sorted(CLASSES))
@pytest.mark.parametrize("size", ["s", *(pytest.param(x, marks=pytest.mark.slow) for x in "bml")])
def test_the_plan_describes_the_network_of_nnunets_trainer(tiny_plans, tiny_dataset_json, kind, size):
    base = Plan.from_dicts(tiny_plans(patch=(16, 24, 16)), "3d_fullres", tiny_dataset_json())
    plan = derive(base, "p", network=f"{kind}-{size}")
    trainers = importlib.import_module("nnunetv2.training.nnUNetTrainer.primus.primus_trainers")
    stock = getattr(trainers, plan.stock_trainer)
    with torch.device("meta"):
        theirs = stock.build_network_architecture(plan.manager, plan.config, 1, 3, True)
        ours = build_network(plan)
    assert type(ours).__name__ == plan.network_class == CLASSES[kind]
    shapes = [{n: t.shape for n, t in net.state_dict().items()} for net in (theirs, ours)]
    assert shapes[0] == shapes[1]
    rates = [[getattr(b.drop_path1, "drop_prob", 0.0) for b in net.eva.blocks] for net in (theirs, ours)]
    assert rates[0] == rates[1] and theirs.eva.blocks[0].attn.scale == ours.eva.blocks[0].attn.scale
    assert plan.features != base.features and plan.data_hash == base.data_hash


def test_what_a_plan_says_of_a_primus(make):
    plan = make(patch=(8, 12, 16), token=(2, 4, 4))
    assert plan.is_primus and plan.n_stages == 1 and plan.features == (24,) and plan.heads == 2
    assert plan.total_stride == (2, 4, 4) and plan.cumulative_strides == ((2, 4, 4),)
    assert plan.stock_trainer is None and "4x3x4 tokens of 2x4x4" in plan.network_text
    assert make().architecture_hash != make(patch=(8, 16, 16)).architecture_hash != make(width=48).architecture_hash
    assert make().architecture_hash == make().architecture_hash
    assert crop_size(plan) == plan.patch_size


def test_names_of_networks():
    assert parse_network("primus-M")["arch_kwargs"]["embed_dim"] == 864
    assert parse_network("primus:48,3,4")["arch_kwargs"]["eva_depth"] == 3
    for text, match in (("primus-x", "Did you mean 'primus-"), ("unet", "no such network"), ("primus:50,2,4", "of 24")):
        with pytest.raises(NnsslError, match=match):
            parse_network(text)
    with pytest.raises(NnsslError, match="at least 1"):
        parse_network("primus:48,0,2")


def test_what_a_primus_cannot_be(tiny_plans, tiny_dataset_json, make):
    def plan(dim=3, **options):
        return Plan.from_dicts(tiny_plans(dim, **options), "2d" if dim == 2 else "3d_fullres", tiny_dataset_json())

    with pytest.raises(NnsslError, match="Primus is 3D only.*-c 3d_fullres"):
        derive(plan(2), "p", network="primus-s")
    with pytest.raises(NnsslError, match="8x8x8.*--patch 16,32,16"):
        derive(plan(patch=(20, 28, 16)), "p", network="primus-s")
    assert derive(plan(patch=(20, 28, 16)), "p", network="primus-s", patch=(24, 24, 16)).patch_size == (24, 24, 16)
    with pytest.raises(NnsslError, match="single token"):
        derive(plan(patch=(8, 8, 8)), "p", network="primus-s")
    for values in ({"network": "primus-s"}, {}):
        with pytest.raises(NnsslError, match="stages of a U-Net"):
            derive(make() if not values else plan(), "p", features=(4, 4, 4), **values)
    with pytest.raises(NnsslError, match="linear_probe' is for U-Nets only"):
        derive(plan(), "p", network="primus-s", schedule="linear-probe")
    broken = make().plans
    broken["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["num_register_tokens"] = 4
    with pytest.raises(NnsslError, match="register tokens"):
        Plan.from_dicts(broken, "3d_fullres", tiny_dataset_json())
    broken["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] = {"embed_dim": 24}
    with pytest.raises(NnsslError, match="eva_depth, eva_numheads, patch_embed_size"):
        Plan.from_dicts(broken, "3d_fullres", tiny_dataset_json())


def test_the_command_writes_a_plan_with_a_primus(tiny_preprocessed, capsys):
    tiny_preprocessed()
    base = load_plan(901)
    assert main(["-d", "901", "--network", "primus-s", "--name", "primusS"]) == 0
    told = capsys.readouterr().out
    assert "Primus, width 396, 12 blocks of 6 heads" in told and "-tr nnUNetTrainerPretrainedPrimus" in told
    plan = load_plan(901, plans_name="nnUNetPlans_primusS")
    assert plan.stock_trainer == "nnUNet_Primus_S_Trainer" and plan.data_identifier == base.data_identifier
    assert [v.plans_name for v in list_variants(901)] == ["nnUNetPlans_primusS"]
    assert main(["-d", "901", "--network", "primus-q", "--name", "other"]) == 1


# ------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("kind", ["Primus", "PrimusV2", "PrimusV3"])
def test_with_all_tokens_it_is_the_network_itself(make, kind):
    token = (4, 4, 4) if kind == "Primus" else (8, 8, 8)
    plan = make(kind, patch=(8, 16, 24), token=token)
    network = build_network(plan).eval()
    encoder, x = PrimusEncoder(network), torch.randn(2, 1, 8, 16, 24)
    with torch.no_grad():
        tokens = encoder(x)[0]
        assert torch.equal(network.up_projection(tokens), network(x))
        everything = torch.ones(2, 1, *tokens.shape[2:], dtype=torch.bool)
        assert torch.allclose(encoder(x, everything)[0], tokens, atol=1e-6)
        assert torch.equal(forward_features(network, x, 0).skips[-1], tokens)
    assert {n.split(".")[0] for n, _ in encoder.named_parameters()} == {"down_projection", "eva"}
    assert encoder_module(network).eva is network.eva


def test_dropped_tokens_are_gone(make):
    """Each token is at its own place, hidden ones hold nothing, and samples with different numbers do not mix."""
    plan = make(patch=(8, 12, 16), token=(4, 4, 4), channels=2)
    network = build_network(plan).eval()
    encoder, x = PrimusEncoder(network), torch.randn(3, 2, 8, 12, 16)
    visible = torch.rand(3, 24).argsort(1).view(3, 1, 2, 3, 4) < torch.tensor([7, 11, 24]).view(3, 1, 1, 1, 1)
    with torch.no_grad():
        out = encoder(x, visible)[0]
        assert (out[~visible.expand_as(out)] == 0).all() and (out[visible.expand_as(out)] != 0).all()
        for i in range(3):  # alone, so that nothing is filled up
            alone = encoder(x[i : i + 1], visible[i : i + 1])[0]
            torch.testing.assert_close(out[i : i + 1], alone, atol=1e-5, rtol=1e-4)
        # by hand: the kept tokens in raster order, their positions, and nothing else
        i = 1
        kept = visible[i].flatten().nonzero()[:, 0]
        t = network.down_projection(x[i : i + 1]).flatten(2).transpose(1, 2) + network.eva.pos_embed
        t, rope = t[:, kept], network.eva.rope.get_embed()[kept]
        for block in network.eva.blocks:
            t = block(t, rope=rope)
        found = out[i].flatten(1).T[kept]
        torch.testing.assert_close(found, network.eva.norm(t)[0], atol=1e-5, rtol=1e-4)


def test_voxels_of_a_token(make):
    """One changed box of voxels changes the embedding of exactly its token: nothing is transposed."""
    plan = make(patch=(8, 12, 16), token=(2, 4, 8), depth=1)
    network = build_network(plan).eval()
    for block in network.eva.blocks:  # no attention, no mixing
        block.gamma_1.data.zero_(), block.gamma_2.data.zero_()
    x, visible = torch.randn(1, 1, 8, 12, 16), torch.ones(1, 1, 4, 3, 2, dtype=torch.bool)
    visible[0, 0, 1, 1, 1] = False
    with torch.no_grad():
        before = PrimusEncoder(network)(x, visible)[0]
        for place in ((3, 0, 1), (0, 2, 0), (2, 1, 1)):
            other = x.clone()
            box = tuple(slice(p * t, (p + 1) * t) for p, t in zip(place, (2, 4, 8)))
            other[(0, 0, *box)] += 1
            changed = (PrimusEncoder(network)(other, visible)[0] != before).any(1)[0]
            assert [tuple(p) for p in changed.nonzero().tolist()] == [place]


def test_nothing_visible_and_wrong_patches(make):
    network = build_network(make()).eval()
    nothing = torch.zeros(2, 1, 2, 3, 4, dtype=torch.bool)
    nothing[1, 0, 0, 0, 0] = True
    out = PrimusEncoder(network)(torch.zeros(2, 1, 8, 12, 16), nothing)[0]
    assert (out[0] == 0).all() and torch.isfinite(out).all()
    with pytest.raises(ValueError, match=r"\(3, 2, 4\) tokens, the network was built for \(2, 3, 4\)"):
        forward_features(network, torch.zeros(1, 1, 12, 8, 16))


class _Same(torch.nn.Module):
    def forward(self, x):
        return (x,)


def test_the_decoder_draws_different_things_at_hidden_places(monkeypatch):
    torch.manual_seed(0)
    decoder = TokenDecoder(36, 2, (4, 4, 8), (2, 3, 4), heads=2).eval()
    tokens, visible = torch.randn(2, 36, 2, 3, 4), torch.rand(2, 1, 2, 3, 4) < 0.4
    with torch.no_grad():
        image = decoder(tokens, visible)
        assert image.shape == (2, 2, 8, 12, 32)
        blocks = image.unfold(2, 4, 4).unfold(3, 4, 4).unfold(4, 8, 8).flatten(5).movedim(1, 4).flatten(4)
        hidden = blocks[0][~visible[0, 0]]
        assert (torch.cdist(hidden, hidden) + torch.eye(len(hidden)) > 1e-3).all()
        garbage = torch.where(visible, tokens, torch.nan)
        assert torch.equal(decoder(garbage, visible), image)
        monkeypatch.setattr(decoder, "eva", _Same())  # without the blocks each token stays at its place
        expected = decoder.image(torch.where(visible, tokens, decoder.mask_token))
        assert torch.equal(decoder(tokens, visible), expected)


def test_first_weights_of_the_decoder():
    """What stands for hidden tokens as in the masked autoencoder; convolutions as nnU-Net's, by He's rule, without bias."""
    decoder = TokenDecoder(240, 2, (4, 4, 8), (2, 3, 4), heads=2)
    assert len(decoder.eva.blocks) == 2 and decoder.mask_token.shape == (1, 240, 1, 1, 1)
    assert float(decoder.mask_token.detach().std()) == pytest.approx(0.02, rel=0.15)
    layers = [m for m in decoder.image.modules() if isinstance(m, torch.nn.ConvTranspose3d)]
    for layer in layers:
        expected = torch.nn.init.kaiming_normal_(torch.empty_like(layer.weight), a=1e-2)
        assert float(layer.weight.detach().std() / expected.std()) == pytest.approx(1, abs=0.15)
        assert not layer.bias.any()
    assert len(layers) == 3


# ------------------------------------------------------------------------------------------------- transfer


def test_all_but_the_up_projection_is_transferred(make):
    plan = make()
    source, target = build_network(plan), build_network(plan, n_classes=14)
    report = apply(target, payload_of(plan, source), plan)
    assert report.part("encoder").percent == 100 and report.part("up_projection").loaded == 0
    assert "its widths depend on the number of classes" in str(report)
    own, given = target.state_dict(), source.state_dict()
    taken = {n for n in own if own[n].shape == given[n].shape and torch.equal(own[n], given[n])}
    assert {n for n in own if n.startswith(("eva.", "down_projection."))} <= taken
    assert check_loadable(payload_of(plan, source), plan).part("encoder").percent == 100


def nnunets(plan, network):
    init = {"plans": plan.plans, "configuration": plan.configuration, "dataset_json": plan.dataset_json}
    return {"network_weights": network.state_dict(), "init_args": init}


@pytest.mark.parametrize("file", [payload_of, nnunets])
@pytest.mark.parametrize("patch", [(8, 12, 24), (12, 8, 16), (16, 16, 16)])
def test_positions_of_another_patch_are_interpolated(make, patch, file):
    """Also where the number of tokens is the same, and only their arrangement differs."""
    here, there = make(patch=(8, 12, 16)), make(patch=patch)
    source, target = build_network(here), build_network(there)
    report = apply(target, file(here, source), there)
    grid = tuple(n // 4 for n in patch)
    assert torch.equal(target.eva.pos_embed, resize_positions(source.eva.pos_embed, (2, 3, 4), grid))
    wanted = f"eva.pos_embed: positions of 2x3x4 tokens -> {'x'.join(map(str, grid))}, interpolated (1 tensor)"
    assert report.adaptations == [wanted] and report.part("encoder").percent == 100
    if grid == (3, 2, 4):  # the axes keep their meaning
        ramp = torch.arange(2.0).view(2, 1, 1).expand(2, 3, 4).reshape(1, 24, 1)
        moved = resize_positions(ramp, (2, 3, 4), grid).view(grid)
        assert torch.allclose(moved[:, 0, 0], torch.tensor([0.0, 0.5, 1.0])) and (moved.diff(dim=1) == 0).all()


def test_what_does_not_fit_a_primus(make, tiny_plans, tiny_dataset_json):
    plan = make()
    payload = payload_of(plan, build_network(plan))
    unet = Plan.from_dicts(tiny_plans(), "3d_fullres", tiny_dataset_json())
    with pytest.raises(NnsslError, match="holds a Primus with 2 blocks, the plan asks for a PlainConvUNet"):
        apply(build_network(unet), payload)
    how = Adaptation(channels="repeat")
    for other, match in (
        (make(depth=3), "2 transformer blocks, the network 3"),
        (make(width=48), "24 in the.* and 48"),
    ):
        with pytest.raises(NnsslError, match=match):
            apply(build_network(other), payload, adapt=how)
        with pytest.raises(NnsslError, match="promises more than fits|Nothing of"):
            apply(build_network(other), payload)
    more = make(channels=2)
    with pytest.raises(NnsslError, match="1 channel, this network takes 2"):
        apply(build_network(more), payload)
    target = build_network(more)
    report = apply(target, payload, adapt=how)
    assert "input channels 1 -> 2, repeated and divided by 2" in str(report)
    x = torch.randn(1, 1, 8, 12, 16)
    alone = build_network(plan)
    apply(alone, payload)
    with torch.no_grad():  # two equal channels give what one gave
        a, b = alone.down_projection(x), target.down_projection(x.expand(-1, 2, -1, -1, -1))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_files_for_upstream_and_back(make, tmp_path):
    plan = make("PrimusV2", patch=(8, 16, 16), token=(8, 8, 8))
    payload = payload_of(plan, build_network(plan))
    told = payload["nnssl_adaptation_plan"]
    assert (told["key_to_encoder"], told["key_to_stem"], told["key_to_lpe"]) == (
        "eva",
        "down_projection",
        "eva.pos_embed",
    )
    assert all(f"{key}.weight" in payload["network_weights"] for key in told["keys_to_in_proj"])
    checkpoint.save(tmp_path / "w.pth", payload)
    convert(tmp_path / "w.pth", tmp_path / "nnunet.pth", "nnunet")
    assert list(checkpoint.load(tmp_path / "nnunet.pth").weights) == list(payload["network_weights"])
    convert(tmp_path / "w.pth", tmp_path / "w.safetensors", "safetensors")
    assert apply(build_network(plan), tmp_path / "w.safetensors", plan).part("encoder").percent == 100
    convert(tmp_path / "w.pth", tmp_path / "upstream.pth", "upstream")
    report = apply(build_network(plan), tmp_path / "upstream.pth", plan)
    assert report.part("encoder").percent == 100 and "before 0.4.3" in str(report)
    assert describe(tmp_path / "w.pth")["network"]["kind"] == "PrimusV2 with 2 blocks"
    weights = {n: t for n, t in payload["network_weights"].items() if not n.startswith("up_projection.")}
    checkpoint.save(tmp_path / "part.pth", {**payload, "network_weights": weights})
    with pytest.raises(NnsslError, match="no up_projection"):
        convert(tmp_path / "part.pth", tmp_path / "x.pth", "nnunet")


def test_names_of_sizes_in_the_adaptation_plan(tiny_plans, tiny_dataset_json, make):
    base = Plan.from_dicts(tiny_plans(patch=(16, 24, 16)), "3d_fullres", tiny_dataset_json())
    names = {}
    for network in ("primus-m", "primusv2-s"):
        plan = derive(base, "p", network=network)
        names[network] = checkpoint.adaptation_plan(plan, plan.patch_size)["architecture_plans"]["arch_class_name"]
    assert names == {"primus-m": "PrimusM", "primusv2-s": "PrimusV2S"}
    own = checkpoint.adaptation_plan(make(), (8, 12, 16))
    assert own["architecture_plans"]["arch_class_name"] == "Primus" and own["pretrain_patch_size"] == [8, 12, 16]


def test_robustness_is_measured_on_tokens(make):
    plan = make()
    network = build_network(plan).train()
    evaluator = RobustnessEvaluator(torch.randn(4, 1, 8, 12, 16), RobustnessConfig(level=-1))
    result = evaluator.evaluate(network)
    assert result.shape == (24, 2, 3, 4) and network.training and result.loss == evaluator.evaluate(network).loss
