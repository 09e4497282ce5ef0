"""What differs between a checkpoint and a plan is told, one line each, and a mismatch names the option that mends it."""

import pytest
import torch

from nnssl.errors import NnsslError
from nnssl.networks import build_network
from nnssl.plans import Plan
from nnssl.weights import Adaptation, apply, build_payload
from nnssl.weights.compare import differences
from nnssl.weights.load import read_content


@pytest.fixture
def make(tiny_plans, tiny_dataset_json):
    def plan(names=None, channels=1, **options):
        description = tiny_dataset_json(channels)
        if names:
            description["channel_names"] = {str(i): n for i, n in enumerate(names)}
        return Plan.from_dicts(tiny_plans(channels=channels, **options), "3d_fullres", description)

    return plan


def payload(plan):
    return build_payload(
        build_network(plan), plan, method="macl", config={}, crop_size=(8, 8, 8), data={},
        pretrained_parts={"encoder": True, "decoder_stages": [0, 1]},
    )  # fmt: skip


def nnunets(plan):
    init = {"plans": plan.plans, "configuration": plan.configuration, "dataset_json": plan.dataset_json}
    return {"network_weights": build_network(plan).state_dict(), "init_args": init}


def upstreams(plan):
    return {k: v for k, v in payload(plan).items() if k in ("network_weights", "nnssl_adaptation_plan")}


@pytest.mark.parametrize("kind", [payload, nnunets, upstreams])
def test_each_difference_is_one_line(kind, make):
    there = make(["CT"], modality="CT", spacing=(3.0, 1.0, 1.0), patch=(8, 24, 16))
    here = make(["MR"])
    notes = apply(build_network(here), kind(there), here).notes
    told = {n.split(":")[0].removeprefix("differs in "): n for n in notes if n.startswith("differs in")}
    wanted = {"modality", "normalisation", "spacing", "patch"} - ({"modality"} if kind is upstreams else set())
    assert set(told) == wanted
    assert told["spacing"].endswith("spacing: 3x1x1 mm in pretraining, 1x1x1 mm here")
    assert "CTNormalization in pretraining, ZScoreNormalization here" in told["normalisation"]
    crop = "8x8x8" if kind is upstreams else "8x24x16"
    assert told["patch"].endswith(f"patch: {crop} voxels in pretraining, 16x24x16 here")


def test_names_of_channels_and_their_order(make):
    there, here = make(["T1", "T2"], 2), make(["T2", "T1"], 2)
    notes = apply(build_network(here), payload(there), here).notes
    assert "differs in channels: T1, T2 in pretraining, T2, T1 here" in notes


def test_nothing_is_said_where_nothing_differs_or_nothing_is_told(make):
    from pathlib import Path

    plan = make()
    assert differences(read_content(payload(plan), Path("x")), plan) == []
    assert differences(read_content(nnunets(plan), Path("x")), plan) == []
    assert differences(read_content({"model": build_network(plan).state_dict()}, Path("x")), plan) == []


def test_another_depth_or_kernel_names_the_option(make):
    plan = make()
    deeper = make(strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (1, 2, 2)), features=(4, 8, 16, 16), patch=(16, 24, 32))
    with pytest.raises(NnsslError, match="--adapt depth=match --name"):
        apply(build_network(deeper), payload(plan), deeper)
    apply(build_network(deeper), payload(plan), deeper, adapt=Adaptation(depth="match", coverage=0.4))
    flat = make(kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)))
    with pytest.raises(NnsslError, match="--adapt kernels=centre"):
        apply(build_network(flat), payload(plan), flat)
    apply(build_network(flat), payload(plan), flat, adapt=Adaptation(kernels="centre"))


def test_weights_without_a_stem_say_so_and_skip_mends_it(make):
    plan = make()
    content = payload(plan)
    stem = "encoder.stages.0.0.convs.0."
    content["network_weights"] = {
        n: t for n, t in content["network_weights"].items() if not n.removeprefix("decoder.").startswith(stem)
    }
    with pytest.raises(NnsslError, match="--adapt channels=skip"):
        apply(build_network(plan), content, plan)
    report = apply(build_network(plan), content, plan, adapt=Adaptation(channels="skip"))
    assert "the file holds no first convolution (stem); the network's stays random" in report.notes
    assert report.part("encoder").random == 4 and torch.tensor(report.part("encoder").percent) > 90
