"""The engine's measure of what the place in the crop explains: values, maps that are looked at, and where it is logged."""

import json

import pytest
import torch
from torch import nn

from nnssl.networks import build_network
from nnssl.plans import Plan
from nnssl.pretrain import run
from nnssl.pretrain.engine.place import place_sentence, place_shares
from nnssl.pretrain.methods import SourceStats, get_method


class Fake(nn.Module):
    """Features that are the image, the place, or half of each."""

    def __init__(self, place, image):
        super().__init__()
        self.weights, self.calls = (place, image), []

    def dense_features(self, x):
        self.calls.append(x)
        place = torch.linspace(-1.7, 1.7, x[0, 0].numel()).view(1, 1, *x.shape[2:])
        return {"a": self.weights[0] * place + self.weights[1] * x, "one site": x.mean((2, 3, 4), keepdim=True)}


@pytest.mark.parametrize(("place", "image", "expected"), [(1, 0, 1.0), (0, 1, 0.0), (1, 1, 0.5)])
def test_shares_of_features_whose_make_up_is_known(place, image, expected):
    method, images = Fake(place, image), torch.randn(12, 1, 12, 14, 16)
    shares = place_shares(method, images, seed=3)
    assert set(shares) == {"place_noise", "place_crops"}
    assert all(v == pytest.approx(expected, abs=0.04) for v in shares.values()), shares
    assert len(method.calls) == 24 and torch.equal(method.calls[12], images[:1])
    again = Fake(place, image)
    assert place_shares(again, images, seed=3) == shares
    assert torch.equal(again.calls[0], method.calls[0]) and not torch.equal(method.calls[0], method.calls[1])
    assert place_shares(method, images[:1]) == {}


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("macl", {"bottleneck": 2, "decoder stage 0": 1}),
        ("mae", {"bottleneck": 2, "decoder stage 1": 0}),
        ("voco", {"bottleneck": 2}),
    ],
)
def test_maps_that_are_looked_at(name, levels, tiny_plans, tiny_dataset_json):
    plans = tiny_plans(median_shape=(40, 44, 36), patch=(32, 32, 24))
    plan, cls = Plan.from_dicts(plans, "3d_fullres", tiny_dataset_json()), get_method(name)
    request = cls.crops(plan, SourceStats((40, 44, 36), 9), cls.Config())
    method = cls(build_network(plan), plan, request, cls.Config()).eval()
    with torch.no_grad():
        found = method.dense_features(torch.randn(2, 1, *request.size))
    for level, stage in levels.items():
        stride = plan.cumulative_strides[stage]
        assert found[level].shape[1:] == (plan.features[stage], *[n // s for n, s in zip(request.size, stride)])
    assert set(found) == set(levels)


def test_sentence():
    first = {"place_noise": 0.17, "place_crops": 0.2}
    text, risen = place_sentence(first, {"place_noise": 0.2, "place_crops": 0.9})
    assert (
        "20 % of the variance" in text and "(17 % before training)" in text and "90 % on held-out crops (20 %)" in text
    )
    assert not risen, "features of anatomy at fixed places are no shortcut"
    text, risen = place_sentence(first, {"place_noise": 0.6, "place_crops": 0.5})
    assert risen and "without looking at the image" in text
    assert place_sentence(first, {"total": 1.0}) == ("", False)


@pytest.mark.parametrize("crops", [3, 0])
def test_every_epoch_logs_it(crops, tiny_preprocessed):
    tiny_preprocessed(901, "Tiny", 6)
    options = {"workers": 0, "place_crops": crops, "augment_p": 0.0}
    result = run(901, method="mae", device="cpu", epochs=2, iterations=1, options=options)
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    told = [row for row in rows if row["event"] in ("untrained", "epoch")]
    assert len(told) == 3
    for row in told:
        assert ("held_out/place_noise" in row) == bool(crops)
        if crops:
            assert all(0 <= row[f"held_out/place_{kind}"] <= 1 for kind in ("noise", "crops"))
