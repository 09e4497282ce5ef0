"""On volumes whose content depends on the position, MACL learns where a crop is (spec T22)."""

import pytest
import torch

from nnssl.networks import build_network
from nnssl.plans import Plan
from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.methods import Crops, SourceStats
from nnssl.pretrain.methods.macl import MACL, MACLConfig

STEPS, B = 200, 8


def volume(generator, shape):
    """Texture whose grain and level change from bottom to top, with noise of its own."""
    z, y, x = torch.meshgrid(*[torch.linspace(0, 1, n) for n in shape], indexing="ij")
    phase = torch.rand(3, generator=generator) * 6.28
    grain = torch.sin(40 * z * z + phase[0]) + torch.sin((6 + 30 * z) * y + phase[1]) + torch.sin(20 * x + phase[2])
    return grain + 3 * (z - 0.5) + 0.3 * torch.randn(*shape, generator=generator)


def sample(volumes, window, size, generator):
    data, position = [], []
    for _ in range(B):
        v = volumes[int(torch.randint(len(volumes), (1,), generator=generator))]
        start = [int(torch.randint(n - w + 1, (1,), generator=generator)) for n, w in zip(v.shape, window)]
        data.append(v[tuple(slice(s, s + w) for s, w in zip(start, window))])
        position.append([(s + w / 2) / n for s, w, n in zip(reversed(start), reversed(window), reversed(v.shape))])
    data, position = torch.stack(data)[:, None], torch.tensor(position, dtype=torch.float64)
    body = torch.ones_like(data, dtype=torch.bool)
    return Crops(data, body, position, position.flip(1), torch.zeros(B, 1, 2), torch.zeros(B, 3).long(), ["case"] * B)


@pytest.mark.slow
def test_learns_positions(tiny_plans, tiny_dataset_json):
    median = (48, 30, 28)
    plan = Plan.from_dicts(tiny_plans(median_shape=median), "3d_fullres", tiny_dataset_json())
    config = MACLConfig(padding="zeros", offset=1, sites="both")  # under InstanceNorm the border alone tells the level
    request = MACL.crops(plan, SourceStats(median, 8), config)
    method = MACL(build_network(plan), plan, request, config)
    generator = torch.Generator().manual_seed(3)
    volumes = [volume(generator, median) for _ in range(8)]
    held_out = [
        method.views(sample(volumes[6:], request.read_size, request.size, generator), StepRNG(1, i, B))
        for i in range(4)
    ]

    def evaluate():
        with torch.no_grad():
            terms = [method(batch) for batch in held_out]
        return {k: float(sum(torch.as_tensor(t[k]) for t in terms) / len(terms)) for k in terms[0]}

    first, optimiser = evaluate(), method.optimiser()
    assert first["off_diagonal_cos"] < 0.9
    rates = [g["lr"] for g in optimiser.param_groups]
    for step in range(STEPS):
        batch = method.views(sample(volumes[:6], request.read_size, request.size, generator), StepRNG(0, step, B))
        for group, lr in zip(optimiser.param_groups, rates):
            group["lr"] = lr * method.lr_factor(step, STEPS)
        optimiser.zero_grad()
        method(batch)["total"].backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), method.grad_clip)
        optimiser.step()
    last = evaluate()
    learnt, sentence = method.verdict(first, last)
    assert learnt, sentence
    assert last["image"] < 0.92 * last["image_collapse"] and last["dense"] < last["dense_collapse"]
    assert last["image_pos_cos"] > last["image_neg_cos"] + 0.05
    assert last["bottleneck_std"] > 0.1
