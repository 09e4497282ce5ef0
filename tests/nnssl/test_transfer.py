import json
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
import torch.distributed as dist
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from nnssl.errors import NnsslError
from nnssl.networks import build_network, canonical_state_dict, forward_features
from nnssl.plans import Plan
from nnssl.weights import apply, build_payload, check_loadable, load, part_names, part_of, save

PROMISE = {"encoder": True, "decoder_stages": [0]}


@pytest.fixture
def make_plan(tiny_plans, tiny_dataset_json):
    def make(dim=3, arch="plain", channels=1, labels=("liver", "spleen"), **options):
        plans = tiny_plans(dim, arch, channels, **options)
        return Plan.from_dicts(plans, "2d" if dim == 2 else "3d_fullres", tiny_dataset_json(channels, labels=labels))

    return make


@pytest.fixture(params=[("plain", 3), ("resenc", 3), ("plain", 2), ("resenc", 2)], ids=lambda p: f"{p[0]}{p[1]}d")
def plan(request, make_plan):
    arch, dim = request.param
    return make_plan(dim, arch, strides=((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 1)), features=(4, 6, 8, 8))


def _payload(plan, network, parts=PROMISE):
    return build_payload(
        network, plan, method="macl", config={}, crop_size=(8,) * plan.dim, pretrained_parts=parts, data={}
    )


def _snapshot(network):
    return {name: tensor.clone() for name, tensor in canonical_state_dict(network).items()}


def test_pretrained_parts_are_loaded_and_the_others_stay_as_initialised(plan):
    source, target = build_network(plan), build_network(plan, n_classes=6)
    before, given = _snapshot(target), canonical_state_dict(source)
    report = apply(target, _payload(plan, source), plan)
    for name, tensor in canonical_state_dict(target).items():
        pretrained = part_of(name) in ("encoder", "decoder stage 0")
        assert torch.equal(tensor, given[name] if pretrained else before[name]), name
    x = torch.randn(1, 1, *(8, 16, 24)[-plan.dim :])
    for a, b in zip(forward_features(source, x, 1).levels, forward_features(target, x, 1).levels, strict=True):
        assert torch.equal(a, b)
    assert [p.part for p in report.parts] == [
        *("encoder", "decoder stage 0", "decoder stage 1", "decoder stage 2", "seg_layers")
    ]
    assert [p.random for p in report.parts[:2]] == [0, 0]
    assert all(p.loaded == 0 and p.random == p.tensors for p in report.parts[2:])


def test_report_counts_tensors_once_and_parameters_in_percent(plan):
    network = build_network(plan)
    report = apply(network, _payload(plan, build_network(plan)), plan)
    assert report.total.tensors == len(list(network.parameters()))
    assert report.total.parameters == sum(p.numel() for p in network.parameters())
    encoder = sum(p.numel() for p in network.encoder.parameters())
    stage = sum(p.numel() for m in (network.decoder.stages[0], network.decoder.transpconvs[0]) for p in m.parameters())
    assert report.total.parameters_loaded == encoder + stage
    assert report.part("encoder").percent == 100.0
    table = str(report)
    assert "seg_layers: 6 left random: new heads for this dataset's classes" in table
    assert "decoder stage 1" in table
    assert "not pretrained" in table
    saved = json.loads(json.dumps(report.to_dict()))
    assert saved["parts"]["whole network"]["percent"] == pytest.approx(report.total.percent, abs=0.01)
    assert saved["parts"]["decoder stage 2"]["reasons"] == {"not pretrained": report.part("decoder stage 2").random}
    with pytest.raises(KeyError):
        report.part("decoder stage 9")


def test_file_payload_and_checkpoint_are_the_same_source(plan, tmp_path):
    payload = _payload(plan, build_network(plan))
    save(tmp_path / "c.pth", payload)
    results = []
    for source in (payload, tmp_path / "c.pth", str(tmp_path / "c.pth"), load(tmp_path / "c.pth")):
        target = build_network(plan)
        apply(target, source)
        results.append(target.encoder.state_dict())
    for other in results[1:]:
        assert all(torch.equal(results[0][k], other[k]) for k in other)


def test_stale_aliases_do_not_win_and_are_reported(plan):
    payload = _payload(plan, build_network(plan))
    weights = {name: tensor.clone() for name, tensor in payload["network_weights"].items()}
    old = weights["encoder.stages.1.0.convs.0.conv.weight" if plan.network_class == "PlainConvUNet" else
                  "encoder.stages.1.blocks.0.conv1.conv.weight"].clone()  # fmt: skip
    canonical = canonical_state_dict(build_network(plan))
    for name in canonical:  # new weights under the canonical names only, as an encoder-only export would write them
        if name.startswith("encoder."):
            weights[name] = weights[name] + 1
    target = build_network(plan)
    report = apply(target, {**payload, "network_weights": weights})
    got = canonical_state_dict(target)
    assert all(torch.equal(got[n], weights[n]) for n in canonical if n.startswith("encoder."))
    assert any("several names" in note and str(report.part("encoder").tensors) in note for note in report.notes)
    assert not any(torch.equal(t, old) for t in got.values())


def test_only_an_alias_in_the_file_is_enough(plan):
    payload = _payload(plan, build_network(plan))
    weights = {k: v for k, v in payload["network_weights"].items() if not k.startswith("encoder.")}
    assert any(k.startswith("decoder.encoder.") for k in weights)
    target = build_network(plan)
    report = apply(target, {**payload, "network_weights": weights})
    assert report.part("encoder").percent == 100


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_dropped(prefix, plan):
    payload = _payload(plan, build_network(plan))
    payload["network_weights"] = {prefix + k: v for k, v in payload["network_weights"].items()}
    assert apply(build_network(plan), payload).part("encoder").percent == 100


def _unchanged(network, before):
    return all(torch.equal(t, before[n]) for n, t in canonical_state_dict(network).items())


def test_nothing_fits_is_an_error_and_changes_nothing(make_plan):
    plain, residual = make_plan(arch="plain"), make_plan(arch="resenc")
    target = build_network(plain)
    before = _snapshot(target)
    with pytest.raises(NnsslError, match="(?s)ResidualEncoderUNet with 3 stages.*PlainConvUNet with 3 stages"):
        apply(target, _payload(residual, build_network(residual)))
    with pytest.raises(NnsslError, match="another network .*: 0 of 1 names"):
        payload = _payload(plain, build_network(plain))
        apply(target, {**payload, "network_weights": {"other.weight": torch.ones(3)}})
    assert _unchanged(target, before)


@pytest.mark.parametrize(
    ("wide", "deeper"), [((6, 8, 8), ""), ((6, 8), ""), ((6, 8, 8, 8), r" --adapt depth=match")], ids=str
)
def test_other_widths_are_named_with_the_plan_that_has_them(wide, deeper, make_plan, tmp_path):
    strides = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (1, 1, 1))
    given = make_plan(features=wide, strides=strides[: len(wide)])
    torch.save(dict(build_network(given).state_dict()), tmp_path / "w.pth")
    plan = make_plan(features=(4, 7, 9))
    listed, cut = ", ".join(map(str, wide)), ",".join(map(str, wide[:3]))
    with pytest.raises(
        NnsslError,
        match=f"{listed} in the checkpoint and 4, 7, 9 here.*nnssl_plan --features {cut} --checkpoint FILE{deeper} --name",
    ):
        apply(build_network(plan), tmp_path / "w.pth", plan)


def test_where_nothing_fits_every_name_is_counted(make_plan, tmp_path):
    torch.save(dict(build_network(make_plan(features=(5, 7, 9))).state_dict()), tmp_path / "w.pth")
    network = build_network(make_plan(features=(4, 8, 16)))
    names = len(network.state_dict())  # of which only the heads' biases have the same shape
    with pytest.raises(NnsslError, match=f"{names} of {names} names and 2 of {names} shapes agree"):
        apply(network, tmp_path / "w.pth")


def test_less_than_promised_is_an_error_that_names_part_and_shapes(make_plan):
    small, large = make_plan(features=(4, 8, 16)), make_plan(features=(4, 8, 20))
    target = build_network(large)
    before = _snapshot(target)
    payload = _payload(small, build_network(small))
    with pytest.raises(NnsslError, match=r"encoder: 16 of 24 tensors fit .*shape \(16,.*in the checkpoint, \(20,"):
        apply(target, payload)
    assert _unchanged(target, before)
    report = apply(target, payload, minimum={})  # the caller may ask for less
    assert report.part("encoder").random == 8
    assert report.part("encoder").loaded == 16
    assert not _unchanged(target, before)


def test_a_promised_part_missing_in_file_or_network(make_plan):
    plan = make_plan()
    payload = _payload(plan, build_network(plan), {"encoder": True, "decoder_stages": [0, 1]})
    cut = {k: v for k, v in payload["network_weights"].items() if "decoder.stages.1" not in k}
    with pytest.raises(NnsslError, match=r"decoder stage 1: 2 of 10 tensors fit \(8 x not in the checkpoint\)"):
        apply(build_network(plan), {**payload, "network_weights": cut})
    shallow = make_plan(strides=((1, 1, 1), (2, 2, 2)), features=(4, 8))
    with pytest.raises(NnsslError, match="(?s)decoder stage 1: the network has no such part.*3 stages.*2 stages"):
        apply(build_network(shallow), payload)


def test_a_deeper_checkpoint_does_not_slip_into_a_shallower_encoder(make_plan):
    deep, shallow = make_plan(features=(4, 8, 16)), make_plan(strides=((1, 1, 1), (2, 2, 2)), features=(4, 8))
    with pytest.raises(NnsslError, match="no place in the network.*with 3 stages.*with 2 stages"):
        apply(build_network(shallow), _payload(deep, build_network(deep), {"encoder": True, "decoder_stages": []}))


def test_another_number_of_channels_is_refused(plan, make_plan):
    options = {"strides": plan.strides if plan.dim == 3 else [(1, *s) for s in plan.strides], "features": plan.features}
    arch = "plain" if plan.network_class == "PlainConvUNet" else "resenc"
    two = make_plan(plan.dim, arch, 2, **options)
    with pytest.raises(NnsslError, match="trained on images with 1 channel, this network takes 2"):
        apply(build_network(two), _payload(plan, build_network(plan)))
    with pytest.raises(NnsslError, match="trained on images with 2 channels, this network takes 1"):
        apply(build_network(plan), _payload(two, build_network(two)))


def test_weights_that_are_not_finite_are_refused(plan):
    source = build_network(plan)
    with torch.no_grad():
        source.decoder.transpconvs[0].weight[0, 0] = float("nan")
    with pytest.raises(NnsslError, match="not finite numbers, first in 'decoder.transpconvs.0.weight'"):
        apply(build_network(plan), _payload(plan, source))


def test_weights_of_another_plan_with_equal_shapes_get_a_note(make_plan):
    plan = make_plan()
    other = make_plan(patch=(16, 24, 8))
    notes = apply(build_network(other), _payload(plan, build_network(plan)), other).notes
    assert notes == ["differs in patch: 16x24x16 voxels in pretraining, 16x24x8 here"]
    strided = make_plan(strides=((1, 1, 1), (2, 2, 2), (1, 2, 2)), kernels=((3, 3, 3),) * 3)
    payload = _payload(plan, build_network(plan), {"encoder": True, "decoder_stages": []})
    report = apply(build_network(strided), payload, strided)
    assert "made for another network (Dataset901_Tiny, nnUNetPlans, 3d_fullres)" in report.notes[0]


def test_stock_checkpoint_brings_all_but_heads_and_upstreams_the_encoder(plan):
    source = build_network(plan)
    stock = {"network_weights": source.state_dict(), "trainer_name": "nnUNetTrainer"}
    report = apply(build_network(plan), stock)
    assert [p.percent for p in report.parts] == [100, 100, 100, 100, 0]
    upstream = {**stock, "nnssl_adaptation_plan": {}, "trainer_name": "BaseMAETrainer"}
    report = apply(build_network(plan), upstream)
    assert [p.percent for p in report.parts] == [100, 0, 0, 0, 0]


def test_stock_nnunet_takes_the_saved_file_as_it_is(plan, tmp_path):
    source = build_network(plan)
    save(tmp_path / "c.pth", _payload(plan, source))
    target = build_network(plan, n_classes=9, deep_supervision=True)
    heads = [layer.weight.clone() for layer in target.decoder.seg_layers]
    with redirect_stdout(StringIO()):
        load_pretrained_weights(target, str(tmp_path / "c.pth"))
    x = torch.randn(1, 1, *(8, 16, 24)[-plan.dim :])
    for a, b in zip(forward_features(source, x).levels, forward_features(target, x).levels, strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(layer.weight, old) for layer, old in zip(target.decoder.seg_layers, heads))


def test_prove_loadable_accepts_and_leaves_no_trace(plan):
    payload = _payload(plan, build_network(plan))
    before = {k: v.clone() for k, v in payload["network_weights"].items()}
    state = torch.get_rng_state()
    report = check_loadable(payload, plan)
    assert torch.equal(torch.get_rng_state(), state)
    assert report.part("encoder").percent == 100
    assert all(torch.equal(payload["network_weights"][k], v) for k, v in before.items())


def test_prove_loadable_finds_what_would_fail_later(plan, make_plan):
    payload = _payload(plan, build_network(plan))
    weights = payload["network_weights"]
    no_alias = {k: v for k, v in weights.items() if not k.startswith("decoder.encoder.")}
    with pytest.raises(NnsslError, match="would not load this run's checkpoint.*decoder.encoder"):
        check_loadable({**payload, "network_weights": no_alias}, plan)
    stale = dict(weights)
    name = next(k for k in weights if k.startswith("decoder.encoder.") and k.endswith("all_modules.0.weight"))
    stale[name] = stale[name] + 1
    with pytest.raises(NnsslError, match="would load other weights than were trained"):
        check_loadable({**payload, "network_weights": stale}, plan)
    other = make_plan(plan.dim, features=(4, 8, 24))
    with pytest.raises(NnsslError, match="would not load"):
        check_loadable(payload, other)


def test_prove_loadable_under_a_process_group_on_a_cpu(make_plan, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    plan = make_plan()
    payload = _payload(plan, build_network(plan))
    cut = {k: v for k, v in payload["network_weights"].items() if not k.startswith("decoder.encoder.")}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert check_loadable(payload, plan).part("encoder").percent == 100
        with pytest.raises(NnsslError, match="would not load.*decoder.encoder"):
            check_loadable({**payload, "network_weights": cut}, plan)
    finally:
        dist.destroy_process_group()


def test_parts_by_name():
    assert part_of("encoder.stem.convs.0.conv.weight") == "encoder"
    assert part_of("decoder.encoder.stages.0.0.convs.0.conv.weight") == "encoder"
    assert part_of("decoder.transpconvs.12.weight") == "decoder stage 12"
    assert part_of("decoder.stages.2.convs.0.conv.weight") == "decoder stage 2"
    assert part_of("decoder.seg_layers.0.bias") == "seg_layers"
    assert part_of("eva.pos_embed") == part_of("down_projection.proj.weight") == "encoder"
    assert part_of("up_projection.decode.0.0.weight") == "up_projection" and part_of("something") == "other"
    names = [f"decoder.stages.{i}.convs.0.conv.weight" for i in (10, 2)]
    assert part_names(["decoder.seg_layers.0.bias", *names, "encoder.x"]) == [
        *("encoder", "decoder stage 2", "decoder stage 10", "seg_layers")
    ]
