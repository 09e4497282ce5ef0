"""Multi-level asymmetric contrast: encoder and lower decoder, image-level, dense and equivariant.

Zeng et al., "Multi-level Asymmetric Contrastive Learning for Medical Image Segmentation Pre-training", arXiv:2309.11876
(JBHI 2026); authors' code at github.com/stevezs315/MACL, 89e01cb. Two views of each crop meet: the auxiliary branch sees
the crop and runs the encoder; the dominant branch sees it shrunk by U and runs the encoder and K decoder stages, whose map
is as large as the auxiliary map. ``total = w_g L_g + w_d L_d + w_er L_ER``; no momentum encoder, no stop-gradient.

What differs from the paper, and why: docs/methods/macl.md. Presets ``paper`` and ``code`` come as close as nnU-Net allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnssl import losses
from nnssl.config import option
from nnssl.distributed import gather_with_grad
from nnssl.errors import NnsslError
from nnssl.heads import POOLINGS, ImageHead, norm_of, pixel_projector
from nnssl.networks import PADDINGS, decoder_channels, encoder_channels, forward_features, set_padding
from nnssl.plans import Plan
from nnssl.pretrain import geometry
from nnssl.pretrain.augment import StepRNG, central_crop, random_jitter
from nnssl.pretrain.augment.intensity import with_grain
from nnssl.pretrain.augment.offsets import OffsetGrid
from nnssl.pretrain.augment.pairs import cut
from nnssl.pretrain.augment.spatial import AffineRange
from nnssl.pretrain.methods.base import Method, Size, require_weight, weighted_sum
from nnssl.pretrain.methods.macl.picture import pair_picture
from nnssl.pretrain.methods.panels import parted_curve
from nnssl.pretrain.methods.registry import register
from nnssl.pretrain.types import Batch, CropRequest, Crops, Curve, Level, Picture, SourceStats

_AXES = ("right-left", "anterior-posterior", "inferior-superior")  # of Crops.position
_SITES = ("crops", "places", "both")
_DENSE = ("position_all_axes", "position_axial", "self")


@dataclass(frozen=True)
class MACLConfig:
    """Options of MACL."""

    decoder_blocks: int = option(1, "K, decoder stages that are pretrained, from the bottom", low=0, high=8)
    down: int | None = option(None, "stages whose strides shrink the dominant branch's image; auto: K", low=0, high=8)
    threshold: float = option(0.1, "crops nearer than this share of the image are positives", low=0.0, high=1.0)
    position_axis: str = option("inferior-superior", "patient axis of the image-level positions", choices=_AXES)
    dense_positives: str = option("position_all_axes", "which other crops are positives at a site", choices=_DENSE)
    padding: str = option(
        "replicate", "of the convolutions; zeros tell a network the place in the crop", choices=PADDINGS
    )
    offset: int = option(0, "bottleneck cells by which the still crops are shifted at most; 0: one crop", low=0, high=8)
    sites: str = option(
        "crops", "L_d compares a site with other crops' there, with other sites, or both", choices=_SITES
    )
    contrast: str = option("all", "compare all vectors, or only across the branches", choices=("all", "cross"))
    negatives: str = option("global", "contrast over all GPUs, or on each alone", choices=("global", "local"))
    temperature: float = option(0.1, "tau of the contrast", low=0.01, high=10.0)
    base_temperature: float = option(0.07, "tau_base; the contrast is scaled by tau / tau_base", low=0.001, high=10.0)
    image_weight: float = option(1.0, "weight of the image-level contrast L_g", low=0.0)
    dense_weight: float = option(0.5, "weight of the dense contrast L_d", low=0.0)
    equivariance_weight: float = option(1.0, "weight of the equivariance L_ER", low=0.0)
    image_source: str = option("decoder", "dominant map of L_g (Eq. 7: encoder)", choices=("decoder", "encoder"))
    pooling: str = option("grid", "from map to image vector; gap is nearly blind under InstanceNorm", choices=POOLINGS)
    batch_standardise: bool = option(True, "standardise pooled features over the batch before the projector")
    proj_dim: int = option(128, "width of the projections", low=2, high=4096)
    align_corners: bool = option(False, "shrink as the authors' code does (cells shift towards the border)")
    jitter: bool = option(False, "brightness, contrast and blur of each view (the authors' code; paper: none)")
    rotation: float = option(30.0, "largest rotation of the variance views, degrees", low=0.0, high=180.0)
    min_scale: float = option(0.8, "smallest magnification of the variance views", low=0.2, high=1.0)
    max_scale: float = option(1.25, "largest magnification of the variance views", low=1.0, high=5.0)
    shift: float = option(0.05, "largest shift of the variance views, share of the crop", low=0.0, high=0.5)
    mirror: bool = option(False, "mirror the variance views on every axis (left and right become alike)")
    optimiser: str = option("sgd", "sgd with momentum 0.9, or adamw", choices=("sgd", "adamw"))
    lr: float = option(1e-2, "initial learning rate, cosine to 0", low=0.0, high=10.0)
    weight_decay: float = option(1e-5, "weight decay", low=0.0, high=1.0)
    warmup: float = option(0.05, "share of the run in which the learning rate rises", low=0.0, high=0.5)


_PUBLISHED: dict[str, Any] = {
    "padding": "zeros", "offset": 0, "sites": "crops",
    "decoder_blocks": 2, "pooling": "gap", "batch_standardise": False, "align_corners": True, "negatives": "local",
    "dense_positives": "position_axial", "rotation": 180.0, "min_scale": 0.7, "max_scale": 1.3, "mirror": True,
    "optimiser": "sgd", "lr": 0.01, "weight_decay": 1e-5, "warmup": 0.0,
}  # fmt: skip


class DenseMaps(NamedTuple):
    """What both branches make of the invariance pair.

    Attributes:
        maps: ``(B, C, *sites)`` each, auxiliary and dominant; None without L_d.
        bottlenecks: dominant and auxiliary.
    """

    maps: tuple[Tensor, Tensor] | None
    bottlenecks: tuple[Tensor, Tensor]


@register("macl", config=MACLConfig)
class MACL(Method[MACLConfig]):
    """See the module. Projectors stay behind after pretraining."""

    title = "multi-level asymmetric contrast: image-level, dense, equivariant (encoder + lower decoder)"
    citation = ("Zeng et al., Multi-level Asymmetric Contrastive Learning, arXiv:2309.11876, JBHI 2026",)
    optimises_robustness = True
    presets = {"paper": {**_PUBLISHED, "lr": 0.1, "shift": 0.1}, "code": {**_PUBLISHED, "jitter": True}}

    def __init__(self, network: nn.Module, plan: Plan, request: CropRequest, config: MACLConfig) -> None:
        super().__init__(network, plan, request, config)
        c, branches = config, _branches(plan, config)
        encoder, k = encoder_channels(plan), branches.blocks
        decoded = [encoder[-1], *decoder_channels(plan)][k]
        if c.image_weight > 0:
            head = partial(ImageHead, out=c.proj_dim, pooling=c.pooling, batch_standardise=c.batch_standardise)
            sources = {"decoder": (decoded, branches.dense_stride), "encoder": (encoder[-1], branches.multiple)}
            width, stride = sources[c.image_source]
            self.image_aux = head(encoder[-1], geometry.cells(request.size, plan.total_stride))
            self.image_dominant = head(width, geometry.cells(request.size, stride))
        if c.dense_weight > 0:
            norm = norm_of(network, plan.dim)
            self.pixel_aux = pixel_projector(encoder[branches.aux_stage], decoded, dim=plan.dim, norm=norm)
        most = _most_offset(plan, config, request.size, request.read_size)
        self.offsets = OffsetGrid(most, plan.total_stride, branches.shrink, tuple(request.size))
        set_padding(network, c.padding)
        self.branches = branches

    @classmethod
    def crops(cls, plan: Plan, stats: SourceStats, config: MACLConfig, size: Size | None = None) -> CropRequest:
        """Crops of about two thirds of the image in 3d, slices as large as the patch in 2d, where the slices differ."""
        require_weight(config, "image_weight", "dense_weight", "equivariance_weight")
        if config.align_corners and config.offset > 0:
            raise NnsslError("align_corners=true compares the cells of one crop: add offset=0, as preset=code has it.")
        branches, volume = _branches(plan, config), plan.dim == 3
        strides = geometry.size_text(plan.total_stride), geometry.size_text(branches.shrink)
        need = "MACL (total stride {} times its shrink {})".format(*strides)
        median, multiple = stats.median_shape[-plan.dim :], branches.multiple
        size, why = geometry.choose_crop(plan.patch_size, median, multiple, compare=volume, size=size, what=need)
        if geometry.largest_spread(size if volume else (1, *size), stats.median_shape) < config.threshold:
            why += " Crops cannot differ in position: only a crop's own views are positives."
        read_size = _movement(plan, config, size).read_size(median if volume else None)
        if config.dense_weight + config.equivariance_weight > 0 and config.offset > 0:
            most = _most_offset(plan, config, size, median)
            read_size = tuple(
                max(w, n + 2 * -(-m * s // 2)) for w, n, m, s in zip(read_size, size, most, plan.total_stride)
            )
            why += (
                f" The branches' still crops are shifted against each other by up to {geometry.size_text(most)} cells."
            )
        return CropRequest(size=size, read_size=read_size, batch_size=8, min_batch=8, explanation=why)

    def views(self, crops: Crops, rng: StepRNG) -> Batch:
        """Invariance pair (no geometric change) and variance pair, each full and shrunk; see :meth:`loss` for shapes."""
        c, size, data = self.config, self.request.size, [crops.data, crops.data]
        if c.jitter:  # factors near 0 leave no image: not the authors' U(0, 1)
            jitter = partial(random_jitter, brightness=(0.2, 1.0), contrast=(0.8, 1.2), sigma=(1.0, 3.0))
            data = [jitter(d, crops.intensity, rng) for d in data]
        grid, still = self.offsets, [central_crop(d, self.offsets.voxels) for d in data]
        first = grid.draw(rng) if grid.active else None
        if first is not None:
            still = [cut(d, f * torch.tensor(grid.stride, device=f.device), size) for d, f in zip(still, first[::-1])]
        moved = [_movement(self.plan, c, size).view(d, rng) for d in data]
        if c.padding != "zeros":
            seen = with_grain([*still, *moved], rng)
            still, moved = seen[:2], seen[2:]
        body = grid.fill_up(central_crop(crops.body, grid.voxels).to(crops.data.dtype))
        return {
            **({} if first is None else {"aux_cell": first[0], "dominant_cell": first[1]}),
            "i_aux": still[1].contiguous(),
            "i_dominant": losses.shrink(still[0], self.branches.shrink, c.align_corners).contiguous(),
            "v_aux": moved[1],
            "v_dominant": losses.shrink(moved[0], self.branches.shrink, c.align_corners),
            "sites": losses.shrink(body, self.branches.dense_stride)[:, 0] > 0,
            "valid": central_crop(crops.body, size).flatten(1).any(1),
            "position": crops.position,
        }

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """L_g of the variance pair, L_d and L_ER of the invariance pair.

        Args:
            batch: ``i_aux``, ``v_aux`` ``(B, C, *size)``; ``i_dominant``, ``v_dominant`` ``(B, C, *(size / U))``; ``sites``
                ``(B, *(size / dense stride))`` bool, False where the image is empty; ``valid`` ``(B,)`` bool; ``position``
                ``(B, 3)``.
        """
        c = self.config
        terms: dict[str, Tensor] = {}
        position = self._everyone(batch["position"])
        axial = position[:, _AXES.index(c.position_axis)]
        kernel: dict[str, Any] = {
            "temperature": c.temperature,
            "base_temperature": c.base_temperature,
            "contrast": c.contrast,
        }
        if c.image_weight > 0:
            positives, valid = self._positives(axial), self._everyone(batch["valid"])
            aux, dominant = (self._everyone(z) for z in self.image_vectors(batch["v_aux"], batch["v_dominant"]))
            terms["image"] = losses.supcon(aux, dominant, positives, valid=valid, **kernel)
            terms["image_collapse"] = losses.collapse_value(valid.sum().clamp(min=1), **kernel)
            terms["image_pos_cos"], terms["image_neg_cos"] = losses.pair_similarity(aux, dominant, positives, valid)
            off_diagonal = [losses.off_diagonal_cosine(z, valid) for z in (aux, dominant)]
            terms["off_diagonal_cos"] = torch.stack(off_diagonal).mean()
            terms["n_positives"] = 2.0 * positives.float().sum(1).mean() - 1
            terms["n_negatives"] = 2.0 * (~positives).float().sum(1).mean()
            terms["shortest_norm"] = torch.cat([aux, dominant]).detach().float().norm(dim=1).min()
        if c.dense_weight > 0 or c.equivariance_weight > 0:
            maps, bottlenecks = self.dense_maps(batch["i_aux"], batch["i_dominant"])
            terms["bottleneck_std"] = losses.channel_std(bottlenecks[1])
            if maps is not None:
                near = {"position_all_axes": position, "position_axial": axial}.get(c.dense_positives)
                own = torch.eye(len(position), dtype=torch.bool, device=position.device)
                terms |= self._dense(maps, batch, own if near is None else self._positives(near), kernel)
            if c.equivariance_weight > 0:
                terms["equivariance"] = self._equivariance(bottlenecks, batch)
        weights = {"image": c.image_weight, "dense": c.dense_weight, "equivariance": c.equivariance_weight}
        return {"total": weighted_sum(terms, weights), **terms}

    def _dense(
        self, maps: tuple[Tensor, Tensor], batch: Batch, positives: Tensor, kernel: dict[str, Any]
    ) -> dict[str, Tensor]:
        """L_d: each site against the same site of other crops, against the other sites of its crop, or the mean of both."""
        (aux, dominant), sites = maps, batch["sites"]
        if self.offsets.active:
            stride = self.branches.dense_stride
            aux, seen = self.offsets.map(aux, batch["aux_cell"], stride)
            dominant, both = self.offsets.map(dominant, batch["dominant_cell"], stride)
            sites = sites & seen & both
        aux, dominant, sites = (self._everyone(x) for x in (aux, dominant, sites))
        found = []
        if self.config.sites != "places":
            found.append(losses.dense_supcon(aux, dominant, positives, valid=sites, **kernel))
        if self.config.sites != "crops":
            scale = {k: kernel[k] for k in ("temperature", "base_temperature")}
            found.append(losses.site_contrast(aux, dominant, valid=sites, **scale))
        loss, collapse = (sum(part) / len(found) for part in zip(*found))
        return {"dense": loss, "dense_collapse": collapse}

    def _equivariance(self, bottlenecks: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        """L_ER, where both branches saw the image."""
        (dominant, aux), shrink, align = bottlenecks, self.branches.shrink, self.config.align_corners
        if not self.offsets.active:
            return losses.equivariance_loss(dominant, aux, shrink, align)
        aux, seen = self.offsets.map(aux, batch["aux_cell"], self.plan.total_stride)
        dominant, both = self.offsets.map(dominant, batch["dominant_cell"], self.branches.multiple)
        return losses.equivariance_loss(dominant, aux, shrink, align, seen, both)

    def image_vectors(self, aux: Tensor, dominant: Tensor) -> tuple[Tensor, Tensor]:
        """Projected vectors ``(B, proj_dim)`` of the variance pair: auxiliary, dominant."""
        blocks = self.branches.blocks if self.config.image_source == "decoder" else 0
        z_aux = self.image_aux(forward_features(self.network, aux, 0).skips[-1])
        return z_aux, self.image_dominant(forward_features(self.network, dominant, blocks).levels[-1])

    def dense_maps(self, aux: Tensor, dominant: Tensor) -> DenseMaps:
        """Aligned maps and bottlenecks of the invariance pair."""
        skips = forward_features(self.network, aux, 0).skips
        dense = self.config.dense_weight > 0
        pyramid = forward_features(self.network, dominant, self.branches.blocks if dense else 0)
        maps = (self.pixel_aux(skips[self.branches.aux_stage]), pyramid.levels[-1]) if dense else None
        return DenseMaps(maps, (pyramid.skips[-1], skips[-1]))

    def _everyone(self, x: Tensor) -> Tensor:
        return gather_with_grad(x) if self.config.negatives == "global" else x

    def _positives(self, position: Tensor) -> Tensor:
        """``(B, B)``; where all crops lie at one place there are no negatives, and only own views are positives."""
        near = losses.position_positives(position, self.config.threshold)
        return torch.where(near.all(), torch.eye(len(near), dtype=torch.bool, device=near.device), near)

    def pretrained_parts(self) -> dict[str, Any]:
        """Encoder and the bottom K decoder stages, where any term runs through them."""
        c = self.config
        through = c.dense_weight > 0 or (c.image_weight > 0 and c.image_source == "decoder")
        return {"encoder": True, "decoder_stages": list(range(c.decoder_blocks)) if through else []}

    def optimiser(self) -> torch.optim.Optimizer:
        """SGD as published, or AdamW."""
        if self.config.optimiser == "adamw":
            return super().optimiser()
        c = self.config
        return torch.optim.SGD(self.trained_parameters(), lr=c.lr, momentum=0.9, weight_decay=c.weight_decay)

    def embed(self, batch: Batch) -> Tensor | None:
        """Auxiliary image vectors of the unchanged crops."""
        if self.config.image_weight == 0:
            return None
        return self.image_aux(forward_features(self.network, batch["i_aux"], 0).skips[-1])

    def pictures(self, batch: Batch) -> Picture:
        """One place in both branches' crops, where the second resembles it, and the turned pair."""
        rows, size = slice(0, 4), batch["i_aux"].shape[2:]
        same = torch.zeros(len(batch["valid"]), len(size))
        cells = [batch.get(k, same)[rows].cpu() for k in ("aux_cell", "dominant_cell")]
        views = [batch[k][rows] for k in ("i_aux", "i_dominant")]
        moved = [batch[k][rows] for k in ("v_aux", "v_dominant")]
        start = [c * torch.tensor(self.plan.total_stride) for c in cells]
        return pair_picture(views, start, self.dense_maps(*views).maps, moved, spacing=self.plan.spacing)

    def curves(self) -> list[Curve]:
        """Both contrasts beside what equal vectors give, the likeness of crops, and the equivariance."""
        c, alike = self.config, "all images look the same"
        learnt = "learnt once the held-out line is below the grey one"
        contrast = Curve(
            "Are crops of one place recognised?",
            "image-level contrast (nats)",
            {"image": ""},
            (Level("image_collapse", alike),),
            learnt,
        )
        likeness = {"image_pos_cos": "crops from near places", "image_neg_cos": "crops from distant places"}
        image = [contrast, parted_curve("How alike are crops?", "cosine (1: equal, 0: unrelated)", likeness)]
        level = (Level("dense_collapse", alike),)
        dense = Curve("Are places told from others?", "dense contrast (nats)", {"dense": ""}, level, "lower is better")
        unit, question = "mean difference of features (0: the same)", "Does the coarse view agree with the fine one?"
        same = Curve(question, unit, {"equivariance": ""}, hint="lower is better")
        parts = [(c.image_weight, image), (c.dense_weight, [dense]), (c.equivariance_weight, [same])]
        return [curve for weight, curves in parts if weight > 0 for curve in curves]

    def verdict(self, first: dict[str, float], last: dict[str, float]) -> tuple[bool, str]:
        """Learnt: L_g below its collapse value by 1 %, and crops at one height more alike than others by 0.01."""
        if "image" not in last:
            return super().verdict(first, last)
        pos, neg = last["image_pos_cos"], last["image_neg_cos"]
        below, alike = last["image"] < 0.99 * last["image_collapse"], pos > neg + 0.01
        return self.judged(
            below and alike,
            f": on held-out crops the image-level loss is {last['image']:.3g}, {'' if below else 'not '}clearly below the "
            f"{last['image_collapse']:.3g} of equal vectors, and crops at one position are {'' if alike else 'not '}more alike "
            f"(cosine {pos:.2f}) than others ({neg:.2f}).",
        )


def _movement(plan: Plan, config: MACLConfig, size: Sequence[int]) -> AffineRange:
    """What the variance views are drawn from."""
    scale = (config.min_scale, config.max_scale)
    return AffineRange.of(plan, size, config.rotation, scale, shift=config.shift, mirror=config.mirror)


def _most_offset(plan: Plan, config: MACLConfig, size: Sequence[int], room: Sequence[int]) -> tuple[int, ...]:
    """Largest offset per axis, in cells of the bottleneck: within ``room`` voxels, and so that crops share a cell."""
    if config.offset == 0 or config.dense_weight + config.equivariance_weight == 0:
        return (0,) * plan.dim
    return tuple(min(config.offset, n // s - 1, max(0, r - n) // s) for n, s, r in zip(size, plan.total_stride, room))


def _branches(plan: Plan, config: MACLConfig) -> geometry.Asymmetry:
    down = config.decoder_blocks if config.down is None else config.down
    return geometry.asymmetry(plan, config.decoder_blocks, down)
