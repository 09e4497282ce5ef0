"""Frozen features of all resolutions of a network, at single voxels, and linear layers on them over whole cases."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nnssl.networks import forward_features, is_primus
from nnssl.plans import Plan
from nnssl.preprocessed import read_box
from nnssl.probe.cases import Case, Classes
from nnssl.probe.linear import Linear, Samples
from nnssl.probe.windows import Window, tile

ENCODER = "encoder"


@dataclass(frozen=True)
class Stages:
    """Which feature maps a linear layer sees.

    Attributes:
        text: for a person.
        n_decoder: decoder stages, from the bottleneck up, beside all encoder stages.
        columns: how many of the columns of :meth:`Extractor.sample` these are; the first ones.
    """

    text: str
    n_decoder: int
    columns: int


def stages_of(plan: Plan, n_decoder: int) -> Stages:
    """All encoder stages and the first ``n_decoder`` decoder stages of a plan's network; of a Primus its tokens."""
    total = plan.n_stages - 1
    wide = sum(plan.features) + sum(plan.features[::-1][1 : 1 + n_decoder])
    if n_decoder == 0:
        return Stages(ENCODER, 0, wide)
    some = "decoder" if n_decoder == total else f"{n_decoder} decoder stage{'s' * (n_decoder > 1)}"
    return Stages(f"{ENCODER} + {some}", n_decoder, wide)


class Extractor:
    """Runs a frozen network over cases, piece by piece.

    A feature map of lower resolution is brought to the image's by linear interpolation between voxel centres. A linear layer
    commutes with it: over whole cases each map is multiplied first and its few outputs are interpolated.

    Args:
        network: in evaluation mode, on ``device``, without gradients.
        plan: the network's.
        n_decoder: decoder stages that are run.
        device: where it runs; on CUDA in float16.
        step: distance of the pieces as a share of their size.
    """

    def __init__(
        self, network: nn.Module, plan: Plan, n_decoder: int, device: torch.device, step: float = 0.75
    ) -> None:
        self.network = network.to(device).eval().requires_grad_(False)
        self.plan, self.n_decoder, self.device, self.step = plan, n_decoder, device, step

    @torch.no_grad()
    def maps(self, piece: np.ndarray) -> list[Tensor]:
        """Feature maps ``(C_l, *size_l)`` of a piece ``(C, *size)``: encoder stages, then decoder stages from the bottom up.

        Three axes each; those of a 2d network are stacks of slices.
        """
        x = torch.from_numpy(piece).to(self.device)
        flat = self.plan.dim == 2
        x = x.transpose(0, 1) if flat else x[None]
        with torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda"):
            found = forward_features(self.network, x, self.n_decoder)
        levels = found.skips if is_primus(self.network) else [*found.skips, *found.levels[1:]]
        return [(f.transpose(0, 1) if flat else f[0]).float() for f in levels]

    def windows(self, case: Case) -> list[Window]:
        """The pieces of a case."""
        return tile(self.plan, case.labels.shape, self.step)

    @torch.no_grad()
    def sample(self, case: Case, voxels: np.ndarray) -> Tensor:
        """Features ``(N, columns)`` at voxels ``(N, 3)`` of a case, on the CPU."""
        out = torch.zeros(len(voxels), stages_of(self.plan, self.n_decoder).columns)
        for window in self.windows(case):
            low, high = np.array(window.own).T
            mine = np.flatnonzero(((voxels >= low) & (voxels < high)).all(1))
            if not len(mine):
                continue
            points = torch.from_numpy(voxels[mine] - np.array(window.start)).to(self.device)
            maps = self.maps(read_box(case.image, window.start, window.size))
            out[torch.from_numpy(mine)] = torch.cat([_at(m, points, window.size) for m in maps], dim=1).cpu()
        return out

    @torch.no_grad()
    def predict(self, case: Case, layers: Sequence[Linear], classes: Classes) -> list[np.ndarray]:
        """What each linear layer makes of a case: ``(classes, *shape)`` bool each."""
        shape = case.labels.shape
        out = [np.zeros((len(classes.names), *shape), bool) for _ in layers]
        bias = torch.cat([layer.bias for layer in layers]).to(self.device)
        edges = [0, *itertools.accumulate(len(layer.bias) for layer in layers)]
        for window in self.windows(case):
            maps = self.maps(read_box(case.image, window.start, window.size))
            logits = bias[:, None, None, None].expand(-1, *window.size).clone()
            at = 0
            for found in maps:
                weight = torch.cat([layer.block(at, at + len(found)) for layer in layers]).to(self.device)
                here = torch.einsum("kc,czyx->kzyx", weight, found)
                logits += functional.interpolate(here[None], size=window.size, mode="trilinear")[0]
                at += len(found)
            inner, box = (slice(None), *window.inner), (slice(None), *window.box)
            own = logits[inner]
            for result, a, b in zip(out, edges, edges[1:]):
                result[box] = decide(own[a:b], classes).cpu().numpy()
        return out


def decide(logits: Tensor, classes: Classes) -> Tensor:
    """``(classes, ...)`` bool of logits ``(outputs, ...)``: the largest label, or every region above 0."""
    if classes.regions:
        return logits > 0
    winner = logits.argmax(0)
    return torch.stack([winner == i + 1 for i in range(len(classes.names))])


def _at(found: Tensor, points: Tensor, size: Sequence[int]) -> Tensor:
    """Values ``(N, C)`` of a map ``(C, *size_l)`` of a piece of ``size`` voxels at its voxels ``(N, 3)``."""
    whole = torch.tensor(size, device=points.device)
    place = (2 * points + 1) / whole - 1  # -1 and 1 are the outer edges of the piece
    grid = place.flip(1)[None, :, None, None].to(found.dtype)
    values = functional.grid_sample(found[None], grid, mode="bilinear", padding_mode="border", align_corners=False)
    return values[0, :, :, 0, 0].T


def draw_voxels(case: Case, most: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Voxels ``(N, 3)`` of each label value of a case, at most ``most`` of each; for how many each stands ``(N,)``."""
    rng, flat = case.rng(seed), case.labels.ravel()
    drawn, stands = [np.zeros(0, np.int64)], [np.zeros(0)]
    for value in np.unique(flat[flat >= 0]):
        all_of_it = np.flatnonzero(flat == value)
        some = all_of_it if len(all_of_it) <= most else rng.choice(all_of_it, most, replace=False, shuffle=False)
        drawn.append(np.sort(some))
        stands.append(np.full(len(some), len(all_of_it) / len(some)))
    voxels = np.stack(np.unravel_index(np.concatenate(drawn), case.labels.shape), axis=1)
    return voxels, np.concatenate(stands)


def collect(
    extractor: Extractor, cases: Mapping[str, Case], names: Sequence[str], most: int, seed: int
) -> dict[str, Samples]:
    """Features and labels at drawn voxels of each case."""
    found = {}
    for name in names:
        case = cases[name]
        voxels, stands = draw_voxels(case, most, seed)
        if len(voxels):
            values = case.labels[tuple(voxels.T)]
            found[name] = Samples(extractor.sample(case, voxels), values, torch.from_numpy(stands).float())
    return found
