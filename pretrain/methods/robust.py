"""The robustness criterion as the objective: two altered views of a crop must be closer than any crop of another case.

After the transferability measure of Hidy, Bakos, Lukács 2024, arXiv:2410.18677, which uses it to *choose* checkpoints of
another pretraining. Training on it is our own step, not theirs: nobody has published what it gives.

Differs from the measure, and why (docs/methods/robust.md): several encoder levels instead of one; pooled in a grid and
standardised over the batch, since a global average behind InstanceNorm is the same for every image; a smooth maximum over
the negatives instead of the hinge, which falls silent once it is satisfied; views that InstanceNorm does not undo, and
small movements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nnssl.config import option
from nnssl.distributed import gather_with_grad
from nnssl.errors import NnsslError
from nnssl.heads import standardise
from nnssl.intensity import add_noise, bend, rescale_intensity, restore_intensity
from nnssl.networks import PADDINGS, forward_features, set_padding
from nnssl.plans import Plan
from nnssl.pretrain.augment import StepRNG, central_crop, random_jitter
from nnssl.pretrain.augment.intensity import with_grain
from nnssl.pretrain.augment.spatial import AffineRange
from nnssl.pretrain.geometry import choose_crop
from nnssl.pretrain.methods.base import Method, Size, encoder_only, numbers_of
from nnssl.pretrain.methods.panels import NOTE, as_column, found_curve, parted_curve, slice_at
from nnssl.pretrain.methods.registry import register
from nnssl.pretrain.types import Batch, CropRequest, Crops, Curve, Picture, SourceStats
from nnssl.transferability.distances import DISTANCES
from nnssl.transferability.objective import FORMS, separation_loss
from nnssl.transferability.pooling import POOLINGS, pool
from nnssl.transferability.robustness import Separation, robustness_loss, separate
from nnssl.words import per_cent


@dataclass(frozen=True)
class RobustConfig:
    """Options of robust."""

    form: str = option("lse", "of the hinge: see docs/methods/robust.md", choices=FORMS)
    margin: float = option(0.5, "by how much other cases must be farther than the other view", low=0.0, high=2.0)
    temperature: float = option(0.1, "smoothness of softplus and lse, in units of the distance", low=0.001, high=10.0)
    hardest: int = option(4, "negatives per crop that form=hardest counts", low=1, high=4096)
    distance: str = option("cosine", "between pooled features", choices=DISTANCES)
    levels: int = option(3, "deepest encoder stages that are compared, the bottleneck included", low=1, high=12)
    pooling: str = option("grid", "from map to vector; gap is nearly blind under InstanceNorm", choices=POOLINGS)
    grid: int = option(2, "cells per axis of pooling=grid", low=1, high=16)
    padding: str = option(
        "replicate", "of the convolutions; zeros tell a network the place in the crop", choices=PADDINGS
    )
    batch_standardise: bool = option(True, "standardise pooled features over the batch of all GPUs")
    gamma: float = option(0.3, "largest change of the logarithm of the intensities' exponent", low=0.0, high=2.0)
    noise: float = option(0.1, "largest SD of added noise, in normalised units", low=0.0, high=2.0)
    blur: float = option(1.0, "largest SD of the blur, in voxels; 0: none", low=0.0, high=5.0)
    jitter: float = option(0.1, "largest relative change of brightness and contrast", low=0.0, high=0.9)
    rotation: float = option(15.0, "largest rotation of a view, degrees about each axis", low=0.0, high=180.0)
    min_scale: float = option(0.9, "smallest magnification of a view", low=0.2, high=1.0)
    max_scale: float = option(1.1, "largest magnification of a view", low=1.0, high=5.0)
    shift: float = option(0.05, "largest shift of a view, share of the crop", low=0.0, high=0.5)
    lr: float = option(1e-3, "initial learning rate, cosine to 0", low=0.0, high=10.0)
    weight_decay: float = option(1e-2, "weight decay", low=0.0, high=1.0)
    warmup: float = option(0.05, "share of the run in which the learning rate rises", low=0.0, high=0.5)


@register("robust", config=RobustConfig)
class Robust(Method[RobustConfig]):
    """See the module. There is no projector: the encoder's own pooled features are compared."""

    title = "the robustness criterion as objective: views of a crop against other cases (encoder)"
    citation = ("Hidy, Bakos, Lukács, transferability by robustness, arXiv:2410.18677 (the criterion)",)
    presets = {"hinge": {"form": "hinge"}, "smooth": {"form": "softplus"}}
    view_families = ("gamma", "noise", "blur")
    """Changes that training uses; the robustness trace of the run leaves them out."""
    optimises_robustness = True

    def __init__(self, network: nn.Module, plan: Plan, request: CropRequest, config: RobustConfig) -> None:
        super().__init__(network, plan, request, config)
        if config.levels > plan.n_stages:
            raise NnsslError(f"-o levels={config.levels}: the encoder of this plan has {plan.n_stages} stages.")
        set_padding(network, config.padding)

    @classmethod
    def crops(cls, plan: Plan, stats: SourceStats, config: RobustConfig, size: Size | None = None) -> CropRequest:
        """Crops within the image, so that padding does not tell one case from another; one per case."""
        if stats.n_cases < 2:
            raise NnsslError(f"robust compares cases and needs at least 2 to learn from, there is {stats.n_cases}.")
        median = stats.median_shape[-plan.dim :]
        size, why = choose_crop(plan.patch_size, median, plan.total_stride, size=size, what="the total stride")
        read_size = _movement(plan, config, size).read_size()
        return CropRequest(size=size, read_size=read_size, batch_size=16, min_batch=4, explanation=why)

    def views(self, crops: Crops, rng: StepRNG) -> Batch:
        """Two views of each crop, moved a little and altered, ``(B, C, *size)`` each, and a number for each case ``(B,)``."""
        size = self.request.size
        movement = _movement(self.plan, self.config, size)
        views = [self._augment(movement.view(crops.data, rng), crops.intensity, rng) for _ in range(2)]
        still = central_crop(crops.data, size).contiguous()
        if self.config.padding != "zeros":
            *views, still = with_grain([*views, still], rng)
        return {"a": views[0], "b": views[1], "still": still, "case": numbers_of(crops.case, still.device)}

    def _augment(self, x: Tensor, intensity: Tensor, rng: StepRNG) -> Tensor:
        c, u = self.config, rescale_intensity(x, intensity)
        if c.gamma > 0:
            u = bend(u, rng.uniform(-c.gamma, c.gamma).exp(), low=1e-6)
        strength = (1.0 - c.jitter, 1.0 + c.jitter)
        sigma = (0.1, c.blur) if c.blur > 0.1 else None
        radius = max(1, round(3 * c.blur))
        u = random_jitter(u, None, rng, brightness=strength, contrast=strength, sigma=sigma, radius=radius)
        x = restore_intensity(u, intensity)
        if c.noise > 0:
            x = add_noise(x, rng.uniform(0.0, c.noise), rng.noise(*x.shape[1:]))
        return x

    def features(self, x: Tensor) -> list[Tensor]:
        """Pooled features of the compared encoder stages, shallow to deep: ``(B, D_l)`` float32 each."""
        skips = forward_features(self.network, x, 0).skips[-self.config.levels :]
        return [pool(s, self.config.pooling, grid=self.config.grid) for s in skips]

    def _compare(self, a: Tensor, b: Tensor, case: Tensor) -> list[Separation]:
        """Both views of one level as anchors: ``(B, D)`` of each, gathered over ranks."""
        if self.config.batch_standardise:
            a, b = standardise(torch.cat([a, b])).chunk(2)
        a, b = gather_with_grad(a), gather_with_grad(b)
        kind = self.config.distance
        return [separate(x, y, distance=kind, groups=case, check=False) for x, y in ((a, b), (b, a))]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Mean over levels and both directions of the chosen form of the hinge; crops of one case are never compared.

        Returns:
            ``total``; ``robustness``, the plain criterion on these views; ``active``, the share of pairs with a hinge above 0;
            ``distance_same`` and ``distance_other``; ``nearest``, the share of crops whose other view is nearer than every
            other case.
        """
        c, case = self.config, gather_with_grad(batch["case"])
        levels = [self._compare(a, b, case) for a, b in zip(self.features(batch["a"]), self.features(batch["b"]))]
        pairs = [s for both in levels for s in both]
        form = partial(separation_loss, margin=c.margin, form=c.form, temperature=c.temperature, hardest=c.hardest)
        total = torch.stack([form(s) for s in pairs]).mean()
        with torch.no_grad():
            terms = {
                "robustness": torch.stack([robustness_loss(s, c.margin) for s in pairs]).mean(),
                "active": torch.stack([_share(s.delta + c.margin > 0, s.mask) for s in pairs]).mean(),
                "distance_same": torch.stack([s.positive.mean() for s in pairs]).mean(),
                "distance_other": torch.stack([s.negative.mean() for s in pairs]).mean(),
                "nearest": torch.stack([((s.delta < 0) | ~s.mask).all(1).float().mean() for s in pairs]).mean(),
            }
        return {"total": total, **terms}

    def pretrained_parts(self) -> dict[str, Any]:
        """The encoder."""
        return encoder_only()

    def embed(self, batch: Batch) -> Tensor:
        """Pooled bottleneck of the unaltered crops, standardised like the views where that is on."""
        z = self.features(batch["still"])[-1]
        return standardise(z) if self.config.batch_standardise else z

    def pictures(self, batch: Batch) -> Picture:
        """Middle slices of the crop, its two views, and the case that the bottleneck takes for most alike."""
        a, b = self.features(batch["a"])[-1], self.features(batch["b"])[-1]
        if self.config.batch_standardise:
            a, b = standardise(torch.cat([a, b])).chunk(2)
        s = separate(a, b, distance=self.config.distance, groups=batch["case"], check=False)
        worst = s.delta.masked_fill(~s.mask, -torch.inf).argmax(1)
        rows = min(4, len(a))
        columns = {
            CROP: batch["still"][:rows],
            FIRST: batch["a"][:rows],
            SECOND: batch["b"][:rows],
            OTHER: batch["b"][worst[:rows]],
        }
        slices = {k: as_column(slice_at(v)) for k, v in columns.items()}
        near = s.positive[:rows].tolist()
        far = (s.positive - s.delta[range(len(worst)), worst])[:rows].tolist()
        tags = {
            SECOND: [f"distance to view 1: {d:.2f}" for d in near],
            OTHER: [f"distance to view 1: {d:.2f}{' (nearer!)' if d < n else ''}" for d, n in zip(far, near)],
        }
        if not s.mask.any():  # of one held-out case there is no other to show
            del slices[OTHER], tags[OTHER]
        title = "The same crop, moved and with other contrast, must stay itself"
        return Picture(slices, title, NOTE + VIEWS_NOTE, tags=tags)

    def curves(self) -> list[Curve]:
        """The criterion, how often the other view is found, and both distances."""
        apart, unit = "Is a crop told from other cases?", "crops whose other view is nearer\nthan every other case (%)"
        pairs = {"distance_same": "two views of one crop", "distance_other": "crops of different cases"}
        return [
            Curve(apart, "robustness loss (0: always)", {"robustness": ""}, hint="lower is better"),
            found_curve("Is the other view found?", unit, "nearest"),
            parted_curve("How far apart are crops?", "distance of the descriptions", pairs),
        ]

    def verdict(self, first: dict[str, float], last: dict[str, float]) -> tuple[bool, str]:
        """Learnt: the criterion fell, and more crops than before find their own other view first."""
        if first["distance_other"] == last["distance_other"] == 0:
            return False, (
                f"{self.name} cannot be judged: it compares cases, and only one is held out (one in twenty is; from 30 cases on "
                "there are two)."
            )
        fell, found = last["robustness"] < first["robustness"], last["nearest"] >= first["nearest"]
        return self.judged(
            fell and found and last["distance_same"] < last["distance_other"],
            f": on held-out crops the robustness loss is {last['robustness']:.3g} ({first['robustness']:.3g} before), the other "
            f"view is nearer than every other case for {per_cent(last['nearest'])} ({per_cent(first['nearest'])} before).",
        )


CROP, FIRST = "a held-out crop", "view 1: moved, contrast and noise changed"
SECOND, OTHER = "view 2: the same crop, changed differently", "the other case that view 1 resembles most"
VIEWS_NOTE = (
    "Distances are between the network's descriptions. Learnt: view 2 is nearer to view 1 than the other case is, so that "
    "anatomy counts, and contrast, noise and position do not."
)


def _movement(plan: Plan, config: RobustConfig, size: Sequence[int]) -> AffineRange:
    scale = (config.min_scale, config.max_scale)
    return AffineRange.of(plan, size, config.rotation, scale, shift=config.shift)


def _share(x: Tensor, mask: Tensor) -> Tensor:
    return (x & mask).sum() / mask.sum().clamp_min(1)
