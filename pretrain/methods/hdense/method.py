"""Hierarchically balanced dense contrast and restoration over nnU-Net's own decoder.

Kats et al. 2024, "Self-supervised Learning of Dense Hierarchical Representations for Medical Image Segmentation"
(arXiv:2401.06473); authors' code at github.com/multimodallearning/hierarchical-dense-ssl, 30f7f69. Two overlapping
crops of a volume are corrupted independently; the same voxel in both is a positive pair, all other voxels are
negatives. A voxel's representation holds one narrow projection of each pyramid level at ``voxel // stride``. A 1x1x1
convolution on the finest level restores the clean crop. ``L = L_c + 10 L_r``.

The pyramid is the network's decoder, so encoder and decoder are pretrained and transferred; projections, projector
and restoration stay behind. What differs from the paper and from its released code, and why, is in
docs/methods/hdense.md. :mod:`.vox2vec` is the baseline, made of the same pieces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nnssl.config import option
from nnssl.distributed import gather_with_grad
from nnssl.heads.balanced import ScaleProjections, gather_pyramid, voxel_projector
from nnssl.heads.restoration import enlarge, restoration_head
from nnssl.intensity import rescale_intensity, restore_intensity
from nnssl.losses.info_nce import InfoNCE, chance_level, nearest_share, similarities
from nnssl.networks import forward_features
from nnssl.plans import Plan
from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.augment.box import image_bounds
from nnssl.pretrain.augment.intensity import unit_range
from nnssl.pretrain.augment.pairs import cut, draw_pairs
from nnssl.pretrain.geometry import choose_crop, largest_spread
from nnssl.pretrain.methods.base import Method, Size, require_weight, weighted_sum, whole_network
from nnssl.pretrain.methods.hdense.local import genesis_transforms
from nnssl.pretrain.methods.hdense.window import window_corruption
from nnssl.pretrain.methods.panels import NOTE, as_column, found_curve, matching_columns, parted_curve, slice_at
from nnssl.pretrain.methods.registry import register
from nnssl.pretrain.types import Batch, CropRequest, Crops, Curve, Level, Picture, SourceStats
from nnssl.words import per_cent

PAIRS = 10  # a step
CPU = {"n_voxels": 128, "crop_voxels": 128 * 128}
"""Preset for a processor: the contrast compares all voxels of a step, so that its cost falls with the square of ``n_voxels``."""


@dataclass(frozen=True)
class HDenseConfig:
    """Options of hdense; vox2vec has the same with other defaults."""

    levels: int = option(5, "finest pyramid levels in a voxel's representation; 0: all", low=0, high=12)
    level_dim: int = option(32, "width that each level is mapped to; 0: raw features (vox2vec)", low=0, high=1024)
    train_scale_proj: bool = option(True, "train those maps (the released code left them random)")
    proj_dim: int = option(128, "width of the voxel embedding", low=2, high=4096)
    proj_layers: int = option(3, "linear layers of the projector", low=1, high=6)
    temperature: float = option(0.1, "tau of the contrast", low=0.01, high=10.0)
    contrast_weight: float = option(1.0, "weight of the voxel contrast L_c; 0: restoration only", low=0.0)
    restoration_weight: float = option(10.0, "weight of the restoration L_r (in [0, 1]); 0: contrast only", low=0.0)
    recon_head: str = option("single", "one 1x1x1 convolution, or two layers (paper)", choices=("single", "double"))
    n_voxels: int = option(1024, "most voxel pairs of a pair of crops", low=1, high=65536)
    pairs_per_volume: int = option(PAIRS, "crop pairs of a volume; fewer make others negatives too", low=1, high=1024)
    min_overlap: float = option(0.0, "least overlap of a pair per axis, as a share of the crop", low=0.0, high=1.0)
    negatives: str = option("batch", "voxels of all pairs, or of the own pair (paper)", choices=("batch", "pair"))
    gather: bool = option(True, "compare with the voxels of all GPUs; false: each GPU its own")
    corruption: str = option("local", "of both crops: hdense's, vox2vec's, none", choices=("local", "window", "none"))
    shuffle_p: float = option(0.8, "probability that a crop's voxels are shuffled locally", low=0.0, high=1.0)
    shuffle_blocks: int = option(0, "shuffled blocks; 0: the share of 5000 in 128x128x32", low=0, high=10**6)
    independent_permutations: bool = option(True, "a permutation for each shuffled block (released code: one for all)")
    nonlinear_p: float = option(0.9, "probability of a random intensity curve", low=0.0, high=1.0)
    inpaint_max: int = option(30, "most blocks painted with noise", low=1, high=1000)
    inpaint_p: float = option(0.95, "probability of each further painted block; 0: none", low=0.0, high=1.0)
    crop_voxels: int = option(128 * 128 * 32, "largest crop that is chosen by itself, voxels", low=64)
    lr: float = option(3e-4, "learning rate of Adam", low=0.0, high=10.0)  # and no weight decay, as published
    schedule: str = option("constant", "learning rate over the run", choices=("constant", "cosine"))


@register("hdense", config=HDenseConfig)
class HDense(Method[HDenseConfig]):
    """See the module. View 0 is A, view 1 is B; levels run from fine to coarse."""

    title = "hierarchically balanced voxel contrast and restoration (encoder + decoder)"
    citation = (
        "Kats et al., Self-supervised Learning of Dense Hierarchical Representations for Medical Image Segmentation, "
        "arXiv:2401.06473",
    )
    grad_clip = 1.0
    presets = {
        "paper": {"negatives": "pair", "recon_head": "double", "gather": False},
        "released": {
            "train_scale_proj": False,
            "independent_permutations": False,
            "shuffle_blocks": 5000,
            "gather": False,
        },
        "no_restoration": {"level_dim": 0, "levels": 0, "restoration_weight": 0.0},  # ablation: vox2vec + corruption
        "no_balance": {"level_dim": 0, "levels": 0},  # ablation: vox2vec + corruption + restoration
        "restoration_only": {"contrast_weight": 0.0},  # ablation
        "frozen_projections": {"train_scale_proj": False},  # ablation
        "cpu": CPU,
    }

    def __init__(self, network: nn.Module, plan: Plan, request: CropRequest, config: HDenseConfig) -> None:
        super().__init__(network, plan, request, config)
        n = min(config.levels or plan.n_stages, plan.n_stages)
        self.strides, channels = plan.cumulative_strides[:n], plan.features[:n]
        if config.contrast_weight > 0:
            width = config.level_dim * n or sum(channels)
            if config.level_dim:
                self.scale_proj = ScaleProjections(
                    channels=channels, dim=config.level_dim, trainable=config.train_scale_proj
                )
            self.projector = voxel_projector(width, config.proj_dim, config.proj_layers)
            self.info_nce = InfoNCE(temperature=config.temperature)
        if config.restoration_weight > 0:
            layers = {"single": 1, "double": 2}[config.recon_head]
            self.restore = restoration_head(plan.features[0], plan.n_channels, dim=plan.dim, layers=layers)
        self.norm_sees_batch = any(isinstance(m, _BatchNorm) for m in network.modules())

    @classmethod
    def crops(cls, plan: Plan, stats: SourceStats, config: HDenseConfig, size: Size | None = None) -> CropRequest:
        """Crops of at most two thirds of the image, so that two of them differ, in windows that hold every pair around a
        voxel."""
        require_weight(config, "contrast_weight", "restoration_weight")
        median, multiple = stats.median_shape[-plan.dim :], plan.total_stride
        chosen, why = choose_crop(plan.patch_size, median, multiple, size=size, what=f"{cls.name}'s network")
        limit = list(chosen)
        while size is None and math.prod(limit) > config.crop_voxels and any(a > m for a, m in zip(limit, multiple)):
            axis = max((a for a in range(plan.dim) if limit[a] > multiple[a]), key=lambda a: limit[a])
            limit[axis] -= multiple[axis]
        if limit != list(chosen):
            chosen, why = choose_crop(limit, median, multiple, what=f"{cls.name}'s network")
            why += f" It was made smaller to hold at most crop_voxels={config.crop_voxels} voxels."
        if largest_spread(chosen, median) == 0:
            why += " On the median image both crops of a pair would be the same: a smaller --crop would give more to learn."
        batch = math.ceil(PAIRS / config.pairs_per_volume) * config.pairs_per_volume
        return CropRequest(
            size=chosen,
            read_size=tuple(2 * s - 1 for s in chosen),
            crops_per_case=config.pairs_per_volume,
            batch_size=batch,
            min_batch=1,
            body=True,
            trim=True,
            explanation=f"{why} The batch counts pairs of such crops, {config.pairs_per_volume} of each case (pairs_per_volume).",
        )

    def views(self, crops: Crops, rng: StepRNG) -> Batch:
        """Cut a pair of overlapping crops out of each window and corrupt them; see :meth:`loss` for shapes."""
        c, size = self.config, self.request.size
        low, high = image_bounds(crops.data, crops.start, crops.shape, crops.extent)
        pairs = draw_pairs(crops.body, size, rng, n=c.n_voxels, min_overlap=c.min_overlap, low=low, high=high)
        bounds = unit_range(self.plan, crops.intensity)
        clean = [rescale_intensity(cut(crops.data, s, size), bounds).clamp(0, 1) for s in pairs.start]
        seen = torch.cat([self.corrupt(u, rng) for u in clean])
        bounds = bounds.repeat(2, 1, 1)
        return {
            "input": restore_intensity(seen, bounds),
            "target": torch.cat(clean),
            "bounds": bounds,
            "voxels": pairs.voxels,
            "valid": pairs.valid,
            "anchor": pairs.anchor - pairs.start,
        }

    def corrupt(self, u: Tensor, rng: StepRNG) -> Tensor:
        """Corrupt crops ``(B, C, *size)`` in [0, 1] by the configured means; a new tensor, or ``u`` where there are none."""
        if self.config.corruption == "none":
            return u
        return (
            window_corruption(u, rng) if self.config.corruption == "window" else genesis_transforms(u, rng, self.config)
        )

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Voxel contrast and restoration.

        Args:
            batch: ``input`` ``(2B, C, *size)`` (all A, then all B) in the network's units; ``target`` ``(2B, C,
                *size)`` clean, in [0, 1]; ``voxels`` ``(2, B, n, dim)`` int64; ``valid`` ``(B, n)`` bool.
        """
        c, levels = self.config, self.pyramid(batch["input"])
        terms: dict[str, Tensor] = {}
        if c.contrast_weight > 0:
            terms |= self._contrast(levels, batch)
        if c.restoration_weight > 0:
            restored = self.restored(levels[0], batch["target"].shape[2:])
            terms["restoration"] = F.mse_loss(restored, batch["target"])
        weights = {"contrast": c.contrast_weight, "restoration": c.restoration_weight}
        return {"total": weighted_sum(terms, weights), **terms}

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Decoder outputs from fine to coarse, then the bottleneck: the first of ``n_stages`` levels, ``(2B, C_i, *size_i)``."""
        # Statistics over the batch are taken per view, as published; InstanceNorm does not care.
        parts = x.chunk(2) if self.norm_sees_batch else [x]
        walked = [forward_features(self.network, p).levels[::-1][: len(self.strides)] for p in parts]
        return [torch.cat(level) if len(level) > 1 else level[0] for level in zip(*walked)]

    def representation(self, levels: Sequence[Tensor], voxels: Tensor) -> Tensor:
        """Balanced (or raw) features of voxels ``(B, n, dim)``: ``(B, n, width)`` float32."""
        with torch.autocast(voxels.device.type, enabled=False):
            features = [f.float() for f in gather_pyramid(levels, voxels, self.strides)]
            return self.scale_proj(features) if self.config.level_dim else torch.cat(features, -1)

    def project(self, h: Tensor) -> Tensor:
        """Projector and unit length: ``(N, width) -> (N, proj_dim)`` float32."""
        with torch.autocast(h.device.type, enabled=False):
            return F.normalize(self.projector(h), dim=1)

    def restored(self, finest: Tensor, size: Sequence[int]) -> Tensor:
        """Clean crops as the network imagines them, ``(2B, C, *size)`` float32 in units of [0, 1]."""
        return enlarge(self.restore(finest).float(), size)

    def _contrast(self, levels: Sequence[Tensor], batch: Batch) -> dict[str, Tensor]:
        valid, n_pairs = batch["valid"], len(batch["valid"])
        h = self.representation(levels, batch["voxels"].flatten(0, 1))
        h = h.view(2, n_pairs, *h.shape[1:]).transpose(0, 1)  # (B, 2, n, width)
        if self.config.gather:  # before the projector, so that its batch statistics are those of one process
            h, valid = gather_with_grad(h), gather_with_grad(valid)
        group = torch.arange(len(valid), device=valid.device)[:, None].expand_as(valid)[valid]
        n = len(group)
        if n < 2:  # nothing to compare with: a zero that keeps every parameter in the graph
            contrast = h.sum() * 0 + sum(p.sum() * 0 for p in self.projector.parameters())
            chance = positive = other = nearest = h.new_zeros(())
        else:
            a, b = (self.project(h[:, k][valid]) for k in (0, 1))
            own_pair = self.config.negatives == "pair"
            contrast = self.info_nce(a, b, group if own_pair else None)
            scopes = valid.sum(1).tolist() if own_pair else [n]
            chance = h.new_tensor(sum(k * chance_level(k) for k in scopes) / n)
            positive, other = similarities(a, b)
            nearest = h.new_zeros(()) if self.training else nearest_share(a, b)
        terms = {"contrast": contrast, "chance": chance, "positive_cos": positive, "other_cos": other}
        return terms if self.training else {**terms, "nearest": nearest, "nearest_chance": h.new_tensor(1 / max(n, 1))}

    def pretrained_parts(self) -> dict[str, Any]:
        """Everything but the segmentation heads."""
        return whole_network(self.plan)

    def lr_factor(self, step: int, steps: int) -> float:
        """1, or half a cosine."""
        return 1.0 if self.config.schedule == "constant" else super().lr_factor(step, steps)

    def embed(self, batch: Batch) -> Tensor | None:
        """Mean voxel embedding of each crop, ``(2B, proj_dim)``."""
        if self.config.contrast_weight == 0:
            return None
        h = self.representation(self.pyramid(batch["input"]), batch["voxels"].flatten(0, 1))
        z = self.project(h.flatten(0, 1)).view(*h.shape[:2], -1)
        weight = batch["valid"].repeat(2, 1)[..., None].float()
        return (z * weight).sum(1) / weight.sum(1).clamp_min(1)

    def pictures(self, batch: Batch) -> Picture:
        """Slices through the anchors: clean, corrupted, restored, and where the other crop resembles the anchor."""
        rows = min(4, len(batch["valid"]))
        pick = [*range(rows), *range(len(batch["valid"]), len(batch["valid"]) + rows)]
        x, anchor = batch["input"][pick], batch["anchor"][:, :rows].flatten(0, 1)
        levels = self.pyramid(x)
        images = {REAL: batch["target"][pick], SEEN: rescale_intensity(x, batch["bounds"][pick])}
        if self.config.restoration_weight > 0:
            images[RESTORED] = self.restored(levels[0], x.shape[2:])
        shown = {k: as_column(slice_at(v, anchor).clamp(0, 1)) for k, v in images.items()}
        columns = {k: v[:rows] for k, v in shown.items()}
        note = NOTE + (RESTORED_NOTE if RESTORED in columns else "")
        if self.config.contrast_weight == 0:
            return Picture(columns, "A crop is spoilt; the network restores it", note)
        z = self.embedded_slice(levels, anchor, x.shape[2:])
        at = anchor[:, -2:]
        columns[OTHER] = shown[REAL][rows:]
        columns |= matching_columns(z[:rows], z[rows:], at[:rows], (ALIKE, COLOURS, OTHER_COLOURS))
        here, there = at[:rows].cpu().numpy(), at[rows:].cpu().numpy()
        points = {c: there if c in (OTHER, ALIKE, OTHER_COLOURS) else here for c in columns}
        scales = {ALIKE: "similarity (cosine)"}
        title = "The same place, seen in two overlapping crops"
        return Picture(columns, title, note + CROSS_NOTE, scales, points=points)

    def curves(self) -> list[Curve]:
        """The contrast beside its chance level, how often the right voxel is the most similar one, and the restoration."""
        marks = (Level("chance", "all voxels look the same"), Level("chance", "half of it: counts as learnt", 0.5))
        question = "Is a place told from others?"
        separation = Curve(question, "voxel contrast (nats)", {"contrast": ""}, marks, "lower is better")
        unit = "voxels whose most similar one in\nthe other crops is the right one (%)"
        found = found_curve("Is the same voxel found again?", unit, "nearest", "nearest_chance")
        pairs = {"positive_cos": "same voxel in both crops", "other_cos": "different voxels"}
        parted = parted_curve("How alike are descriptions?", "cosine (1: equal, 0: unrelated)", pairs)
        unit = "mean squared error\n(1 = square of the image's range)"
        restored = Curve("How well is a spoilt crop restored?", unit, {"restoration": ""}, hint="lower is better")
        shown = [separation, found, parted] if self.config.contrast_weight > 0 else []
        return shown + ([restored] if self.config.restoration_weight > 0 else [])

    def embedded_slice(self, levels: Sequence[Tensor], anchor: Tensor, size: Sequence[int]) -> Tensor:
        """Voxel embeddings of the slice through each anchor: ``(B, proj_dim, H, W)``."""
        h, w = size[-2:]
        plane = torch.cartesian_prod(torch.arange(h), torch.arange(w)).to(anchor.device)
        voxels = plane.expand(len(anchor), -1, -1)
        if len(size) == 3:
            voxels = torch.cat([anchor[:, None, :1].expand(-1, h * w, 1), voxels], 2)
        z = self.project(self.representation(levels, voxels).flatten(0, 1))
        return z.view(len(anchor), h, w, -1).movedim(-1, 1)

    def verdict(self, first: dict[str, float], last: dict[str, float]) -> tuple[bool, str]:
        """Learnt: the contrast below half of its chance level; without one, the restoration error halved."""
        if "contrast" not in last:
            learnt = last["restoration"] < 0.5 * first["restoration"]
            was = f"{first['restoration']:.3g} before, {last['restoration']:.3g} now"
            return self.judged(learnt, f": the held-out restoration error was {was}; half of it counts.")
        value, chance = last["contrast"], last["chance"]
        learnt = value < 0.5 * chance
        what = (
            f": the held-out voxel contrast is {value:.3g}, {'below' if learnt else 'not below'} half of {chance:.3g} (all "
            "voxels look the same)"
        )
        if "nearest" in last:
            found, guessed = (per_cent(last[k], 1) for k in ("nearest", "nearest_chance"))
            what += "; the most similar voxel of the other crops is the right one for "
            what += f"{found} of the voxels ({guessed} by chance)"
        return self.judged(learnt, f"{what}.")


REAL, SEEN, RESTORED = "crop 1: real", "crop 1 as the network sees it: spoilt", "crop 1: restored by the network"
OTHER, ALIKE = "crop 2: overlaps crop 1", "crop 2: bright where it resembles the cross of crop 1"
COLOURS, OTHER_COLOURS = "crop 1: descriptions as colours", "crop 2: descriptions as colours"
RESTORED_NOTE = "Restored: learnt once it looks like the real crop and not like the spoilt one. "
CROSS_NOTE = (
    "The cross is one and the same place in both crops. Learnt: the bright spot sits on the cross and is small, and both "
    "crops colour the same tissue alike (equal colours: equal descriptions by the network)."
)
