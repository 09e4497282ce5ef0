"""Volume contrast: a crop's place in a volume, predicted by its similarity to the cells of a grid.

Wu et al. 2024, "Large-Scale 3D Medical Image Pre-training with Geometric Context Priors" (arXiv:2410.09890; CVPR form
arXiv:2402.17300); authors' code github.com/Luffy03/Large-Scale-Medical. A window of each volume is tiled by n base crops, and S
random crops lie in it; every crop becomes a vector. *intra*: ``s = ReLU(cos(student(random), teacher(base)))`` is to equal the
overlap. *inter*: with another volume's base crops, the student's similarities are to equal the teacher's. *reg*: base crops of a
volume are to be orthogonal.

The encoder is trained; projectors stay behind. What differs from the paper and its code, and why: docs/methods/voco.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnssl.config import option
from nnssl.distributed import gather_with_grad, rank
from nnssl.ema import EMA
from nnssl.errors import NnsslError
from nnssl.heads import pool
from nnssl.heads.batch_norm import ROW_NORMS, BatchNormMLP, standardise_rows
from nnssl.losses.diagnostics import off_diagonal_cosine
from nnssl.losses.overlap import base_crops
from nnssl.losses.position import (
    NEGATIVES,
    POOLS,
    REGULARISATIONS,
    WEIGHTINGS,
    PositionLoss,
    orthogonality,
    similarity,
)
from nnssl.networks import encoder_channels, forward_features
from nnssl.plans import Plan
from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.augment.box import in_box
from nnssl.pretrain.augment.intensity import unit_range
from nnssl.pretrain.augment.pairs import cut
from nnssl.pretrain.methods.base import Method, Size, encoder_only, numbers_of, require_weight, weighted_sum
from nnssl.pretrain.methods.panels import found_curve
from nnssl.pretrain.methods.registry import register
from nnssl.pretrain.methods.voco.cells import augment_intensity, draw_offsets, flip_and_turn, usable_cells
from nnssl.pretrain.methods.voco.grid import FEWEST_CELLS, choose_grid
from nnssl.pretrain.methods.voco.levels import chance_levels
from nnssl.pretrain.methods.voco.picture import overlap_picture
from nnssl.pretrain.types import Batch, CropRequest, Crops, Curve, Level, Picture, Progress, SourceStats
from nnssl.words import per_cent

CLEARLY = 0.9
"""Share of the best constant's loss below which position is learnt."""

FEW_ROWS = 20


@dataclass(frozen=True)
class VoCoConfig:
    """Options of volume contrast."""

    grid: tuple[int, ...] | None = option(None, "cells per axis, for example 1,3,3; auto: from the plan", low=1, high=8)
    random_crops: int = option(4, "S, random crops of a volume", low=1, high=256)
    window: str = option("window", "a window of the volume, or all of it resampled", choices=("window", "volume"))
    reorient: bool = option(True, "turn all images to the orientation that most have", was="align")
    intra_weight: float = option(1.0, "weight of the position prediction", low=0.0)
    inter_weight: float = option(1.0, "weight of the consistency between volumes", low=0.0)
    reg_weight: float = option(1.0, "weight of the orthogonality of base crops", low=0.0)
    relu: bool = option(True, "similarity ReLU(cos), or cos")
    weighting: str = option("overlap", "overlapping cells: by overlap, all alike, or all cells", choices=WEIGHTINGS)
    negatives: str = option("log", "cost of similarity to cells without overlap", choices=NEGATIVES)
    pool: str = option("volume", "mean of the volumes' losses, or sums over the batch", choices=POOLS)
    reg: str = option("square", "orthogonality of squared or plain similarities", choices=REGULARISATIONS)
    reg_detach: bool = option(False, "no gradient to the second base of a pair (the last base then learns nothing)")
    teacher: str = option("ema", "base crops through an averaged projector, or the student's", choices=("ema", "none"))
    momentum: float = option(0.9, "rho of the teacher's moving average", low=0.0, high=1.0)
    pairing: str = option("any", "which volume is compared with: any, or of its dataset", choices=("any", "dataset"))
    standardise: bool = option(True, "standardise pooled features over the batch; without, InstanceNorm hides all")
    feature_dropout: float = option(0.2, "dropout of the student's pooled features", low=0.0, high=0.9)
    drop_rows: bool = option(False, "drop whole crops in place of features, as the released code")
    proj_dim: int = option(1024, "width of the projector and of the embedding", low=2, high=8192)
    proj_norm: str = option("batch", "normalisation in the projector: over the batch or each row", choices=ROW_NORMS)
    gather: bool = option(True, "statistics and pairs over all GPUs; false: each GPU its own")
    mirror: float = option(0.2, "probability that a crop is flipped, per axis", low=0.0, high=1.0)
    rot90: float = option(0.2, "probability of quarter turns of a crop where axes allow", low=0.0, high=1.0)
    intensity: float = option(0.2, "probability of each: gamma, blur, low resolution, noise", low=0.0, high=1.0)
    lr: float = option(3e-4, "learning rate of AdamW, cosine to 0", low=0.0, high=10.0)
    weight_decay: float = option(1e-2, "weight decay", low=0.0, high=1.0)
    warmup: float = option(0.05, "share of the run in which the learning rate rises", low=0.0, high=0.5)


_PUBLISHED: dict[str, Any] = {"standardise": False, "gather": False, "intensity": 0.0, "random_crops": 2, "lr": 1e-4}
_NO_TEACHER: dict[str, Any] = {"teacher": "none", "inter_weight": 0.0, "feature_dropout": 0.0, "proj_dim": 2048}


class Embeddings(NamedTuple):
    """Of K crops of each volume.

    Attributes:
        student, teacher: vectors ``(B, K, proj_dim)``.
        pooled: features ``(B, K, features)`` before the projector.
        batch: what belongs to these volumes.
    """

    student: Tensor
    teacher: Tensor
    pooled: Tensor
    batch: Batch


@register("voco", config=VoCoConfig)
class VoCo(Method[VoCoConfig]):
    """See the module. Of K = n + S crops of a volume the n base crops come first."""

    title = "volume contrast: the place of a crop among the cells of a volume (encoder)"
    citation = (
        "Wu et al., Large-Scale 3D Medical Image Pre-training with Geometric Context Priors, arXiv:2410.09890",
        "Wu et al., VoCo: A Simple-yet-Effective Volume Contrastive Learning Framework, CVPR 2024, arXiv:2402.17300",
    )
    view_families = ("gamma", "blur", "lowres", "noise")
    grad_clip = 1.0
    presets = {
        "tpami": {},
        "paper": {**_PUBLISHED, "relu": False, "weighting": "all", "reg": "linear"},
        "released": {**_PUBLISHED, "reg_detach": True, "drop_rows": True},
        "nnssl": {
            **_PUBLISHED, **_NO_TEACHER, "negatives": "square", "pool": "batch", "reg": "linear", "proj_norm": "row",
            "intensity": 0.2, "random_crops": 4,
        },
        "voco_v1": {**_PUBLISHED, **_NO_TEACHER, "weighting": "binary", "negatives": "square"},
    }  # fmt: skip

    def __init__(self, network: nn.Module, plan: Plan, request: CropRequest, config: VoCoConfig) -> None:
        super().__init__(network, plan, request, config)
        c, self.size = config, tuple(request.size)
        self.grid = tuple(w // s for w, s in zip(request.read_size, request.size))
        switches = {"weighting": c.weighting, "negatives": c.negatives}
        self.position_loss = PositionLoss(**switches, pool=c.pool)
        self.levels = chance_levels(self.size, self.grid, crops=c.random_crops, **switches)
        self.width = sum(encoder_channels(plan))
        self.projector = BatchNormMLP(self.width, c.proj_dim, c.proj_dim, norm=c.proj_norm)
        if c.teacher == "ema":
            self.teacher = EMA(self.projector)

    @classmethod
    def crops(cls, plan: Plan, stats: SourceStats, config: VoCoConfig, size: Size | None = None) -> CropRequest:
        """Cells of a window that fits into the median image, or into which each image is resampled."""
        require_weight(config, "intra_weight", "inter_weight", "reg_weight")
        if config.teacher == "none" and config.inter_weight > 0:
            raise NnsslError("-o teacher=none: the comparison between volumes needs a teacher; add inter_weight=0.")
        fit, median = config.window == "window", stats.median_shape[-plan.dim :]
        chosen = choose_grid(
            plan.patch_size, median, plan.total_stride, plan.spacing, size=size, grid=config.grid, fit=fit
        )
        return CropRequest(
            size=chosen.size,
            read_size=chosen.window,
            batch_size=4,
            min_batch=1,
            explanation=f"{chosen.explanation} The batch counts volumes: {chosen.cells} cells and {config.random_crops} "
            "random crops each.",
            sampling="inside" if fit else "whole",
            reorient=config.reorient,
        )

    # ---- views ---------------------------------------------------------------------------------------------------

    def views(self, crops: Crops, rng: StepRNG) -> Batch:
        """Cut windows into cells, place random crops, augment each crop (not in held-out batches); see :meth:`loss`."""
        c = self.config
        bounds = unit_range(self.plan, crops.intensity)
        windows, inside, finite = self.windows(crops, bounds[..., 0])
        usable = usable_cells(windows, inside, crops.body, self.grid)
        usable = usable & ((usable.sum(1) >= FEWEST_CELLS) & finite)[:, None]
        offset, overlap, found = draw_offsets(rng, self.size, self.grid, c.random_crops, usable)
        random = torch.stack([cut(windows, o, self.size) for o in offset.unbind(1)], 1)
        x = torch.cat([base_crops(windows, self.grid), random], 1)  # a copy, which may be changed
        batch = {
            "overlap": overlap,
            "base": usable,
            "random": found,
            "offset": offset,
            "window": windows[:, :1],
            "dataset": numbers_of(crops.source or [""] * len(crops), x.device),
        }
        if not self.training:
            return {"crops": x, **batch}
        if c.feature_dropout > 0:
            shape = (x.shape[1], 1 if c.drop_rows else self.width)
            kept = [torch.rand(shape, generator=g, device=g.device) >= c.feature_dropout for g in rng.generators()]
            batch["kept"] = torch.stack(kept)
        x = flip_and_turn(x, rng, self.plan.spacing, mirror=c.mirror, rot90=c.rot90, own=True)
        if c.intensity > 0:
            x = augment_intensity(x, bounds, rng, self.plan.spacing, p=c.intensity)
        return {"crops": x, **batch}

    def windows(self, crops: Crops, lowest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Windows with ``lowest`` ``(B, C)`` outside of the image, which voxels are inside, and which volumes are finite."""
        data, window, first = crops.data, crops.data.shape[2:], 3 - self.plan.dim
        low = -crops.start[:, first:]
        if crops.shape is None:  # made by hand: the image ends with the window
            high = torch.tensor(window, device=low.device).expand_as(low)
        else:
            high = crops.shape[:, first:] + low
        inside = in_box(low, high, window)
        if all(self.plan.config.use_mask_for_norm):  # there nnU-Net itself puts 0 around the patient
            lowest = torch.zeros_like(lowest)
        finite = torch.isfinite(data.flatten(1).sum(1))
        if data.device.type != "cpu" or not finite.all():  # a sum may overflow
            finite = torch.isfinite(data).flatten(1).all(1)
            data = data.nan_to_num(0.0, 0.0, 0.0)
        lowest = lowest.to(data.dtype).view(*lowest.shape, *[1] * self.plan.dim)
        return torch.where(inside, data, lowest), inside, finite

    # ---- loss ----------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Intra, inter and regularisation of the whole batch, and what a person should watch.

        Args:
            batch: ``crops`` ``(B, K, C, *size)``; ``overlap`` ``(B, S, n)``; ``base`` ``(B, n)`` and ``random`` ``(B, S)``
                bool, crops that count; ``dataset`` ``(B,)`` int64; in training ``kept`` ``(B, K, features or 1)`` bool.
        """
        c = self.config
        z, t, pooled, batch = self.embeddings(batch, everyone=c.gather)
        (q, r), (q_teacher, r_teacher) = self._split(z), self._split(t)
        base, random, overlap = batch["base"], batch["random"], batch["overlap"]
        valid = random[:, :, None] & base[:, None]
        cosine = similarity(r, q_teacher, relu=False)
        s = cosine.relu() if c.relu else cosine
        terms = {"intra": self.position_loss(overlap, s, valid)}
        partner, paired = self.partners(base.any(1), batch["dataset"])
        if c.inter_weight > 0 and len(base) > 1:
            compared = (random & paired[:, None])[:, :, None] & base[partner][:, None]
            target = similarity(r_teacher, q_teacher[partner], relu=c.relu)
            terms["inter"] = self.position_loss(target, similarity(r, q[partner], relu=c.relu), compared)
        else:
            terms["inter"] = z.sum() * 0
        terms["reg"] = orthogonality(q, kind=c.reg, detach=c.reg_detach, relu=c.relu, valid=base)
        weights = {"intra": c.intra_weight, "inter": c.inter_weight, "reg": c.reg_weight}
        total = weighted_sum(terms, weights) + z.sum() * 0  # connected also where no volume counts
        with torch.no_grad():
            watched = self._watched(terms["intra"], cosine, overlap, valid, q, base)
            watched["feature_std"] = pooled.flatten(0, 1).std(0).mean()
        return {"total": total, **terms, **watched}

    def embeddings(self, batch: Batch, *, everyone: bool) -> Embeddings:
        """What student and teacher make of the crops.

        With ``everyone`` the batch is that of all ranks: pooled features are gathered before anything that looks at more than
        one crop, so that any number of ranks gives the same loss.
        """
        b, k = batch["crops"].shape[:2]
        pooled = self.pooled(batch["crops"].flatten(0, 1)).view(b, k, -1)
        batch = {key: batch[key] for key in ("overlap", "base", "random", "dataset", "kept") if key in batch}
        if everyone:
            pooled, batch = gather_with_grad(pooled), {key: gather_with_grad(x) for key, x in batch.items()}
        rows = torch.cat([batch["base"], batch["random"]], 1).flatten()
        self._warn_of_few(rows)
        x = pooled.flatten(0, 1)
        x = standardise_rows(x, rows) if self.config.standardise else x
        seen = x
        if "kept" in batch:
            seen = x * batch["kept"].expand(*pooled.shape[:2], -1).flatten(0, 1) / (1 - self.config.feature_dropout)
        z = self.projector(seen, rows)
        t = self.teacher(x, rows) if self.config.teacher == "ema" else z.detach()
        return Embeddings(z.view(*pooled.shape[:2], -1), t.view(*pooled.shape[:2], -1), pooled, batch)

    def pooled(self, x: Tensor) -> Tensor:
        """Mean of every encoder stage's map, concatenated: ``(N, C, *size)`` -> ``(N, sum of the stages' channels)`` float32."""
        return torch.cat([pool(skip.float(), "gap") for skip in forward_features(self.network, x, 0).skips], 1)

    def partners(self, counts: Tensor, dataset: Tensor) -> tuple[Tensor, Tensor]:
        """The next volume that counts, round the batch (of the same dataset with ``pairing=dataset``), and whether there is one:
        ``(B,)`` int64 and ``(B,)`` bool."""
        b, index = len(counts), torch.arange(len(counts), device=counts.device)
        distance = (index[None] - index[:, None] - 1) % b  # to the next 0, to itself b - 1
        legal = counts[None] & (index[None] != index[:, None])
        if self.config.pairing == "dataset":
            legal = legal & (dataset[None] == dataset[:, None])
        distance = distance + torch.where(legal, 0, b)
        return distance.argmin(1), legal.any(1) & counts

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        n = z.shape[1] - self.config.random_crops
        return z[:, :n], z[:, n:]

    def _watched(
        self, intra: Tensor, cosine: Tensor, overlap: Tensor, valid: Tensor, q: Tensor, base: Tensor
    ) -> dict[str, Tensor]:
        """Numbers for the log; ``cosine``, ``overlap``, ``valid`` ``(B, S, n)``, ``q`` ``(B, n, D)``, ``base`` ``(B, n)``."""
        crops, cells = valid.any(2), base.sum(1).clamp_min(1)
        guess = cosine.masked_fill(~valid, -torch.inf).argmax(2, keepdim=True)
        hit = overlap.gather(2, guess)[..., 0] >= overlap.amax(2) - 1e-6
        n, positive = crops.sum().clamp_min(1), valid & (overlap > 0)
        learnt = torch.where(crops.any(), 1 - intra / self.levels.constant, 0.0)
        return {
            "position_learnt": learnt,
            "top1": (hit & crops).sum() / n,
            "top1_chance": (crops / cells[:, None]).sum() / n,
            "mae": torch.where(valid, (cosine.relu() - overlap).abs(), 0.0).sum() / valid.sum().clamp_min(1),
            "base_cosine": torch.stack([off_diagonal_cosine(z, v) for z, v in zip(q, base)]).mean(),
            "dead": (positive & (cosine <= 0)).sum() / positive.sum().clamp_min(1),
            "constant": intra.new_tensor(self.levels.constant),
            "skipped": 1 - base.any(1).float().mean(),
        }

    def _warn_of_few(self, rows: Tensor) -> None:
        volumes = len(rows) // (self.config.random_crops + math.prod(self.grid))
        if volumes < 2 and self.config.inter_weight > 0:
            text = "One volume a step: nothing to compare it with, the inter-volume term is off. Raise batch_size."
            self.warn_once("inter", text)
        if len(rows) < FEW_ROWS:
            text = "The batch statistics rest on %d crops only; %d are better."
            self.warn_once("rows", text, len(rows), FEW_ROWS)

    # ---- training ------------------------------------------------------------------------------------------------

    def after_step(self, progress: Progress) -> None:
        """``teacher <- rho teacher + (1 - rho) student``, once per optimiser step."""
        if self.config.teacher == "ema":
            self.teacher.update(self.projector, self.config.momentum)

    def pretrained_parts(self) -> dict[str, Any]:
        """The encoder."""
        return encoder_only()

    # ---- what a person sees --------------------------------------------------------------------------------------

    def embed(self, batch: Batch) -> Tensor:
        """Student's vectors of this rank's crops, ``(B K, proj_dim)``."""
        b = len(batch["crops"])
        z = self.embeddings(batch, everyone=self.config.gather).student
        first = rank() * b if len(z) > b else 0
        return z[first : first + b].flatten(0, 1)

    def pictures(self, batch: Batch) -> Picture:
        """A slice of each window with its cells, and one random crop's true and predicted overlaps."""
        z, t, _, _ = self.embeddings(batch, everyone=False)
        s = similarity(self._split(z)[1], self._split(t)[0])
        return overlap_picture(batch, s, self.size, self.grid)

    def curves(self) -> list[Curve]:
        """The loss of positions beside the best constant, how often the right cell is found, and the two other terms."""
        marks = (Level("constant", "best guess without looking"), Level("constant", "a tenth below it", CLEARLY))
        learnt = "learnt: a tenth below the best guess and a tenth below the start"
        place = Curve("Is the place of a crop known?", "loss of the positions", {"intra": ""}, marks, learnt)
        unit = "crops whose most similar cell\nis the right one (%)"
        found = found_curve("Is the right cell found?", unit, "top1", "top1_chance")
        spread = {"base_cosine": "neighbouring cells of one image"}
        unit, well = "cosine (1: all alike, 0: unrelated)", "should stay well below 1"
        apart = Curve("Are cells told apart?", unit, spread, hint=well)
        between = Curve("Do different images agree?", "loss between images", {"inter": ""}, hint="lower is better")
        return [place, found, apart, *([between] if self.config.inter_weight > 0 else [])]

    def note(self, terms: dict[str, float]) -> str:
        """How much of the loss that the best constant similarity leaves is gone: 0 % knows nothing, 100 % every overlap."""
        return f"position learnt: {per_cent(terms['position_learnt'])}"

    def verdict(self, first: dict[str, float], last: dict[str, float]) -> tuple[bool, str]:
        """Learnt: the intra loss clearly below the best constant similarity's and the untrained network's, and more cells found.

        Crops that overlap share content, so that random features, too, can be below the best constant.
        """
        value, level, before = last["intra"], last["constant"], first["intra"]
        below, fell = value < CLEARLY * level, value < CLEARLY * before
        found = last["top1"] > first["top1"] or last["top1"] == 1
        shares = [per_cent(x) for x in (last["position_learnt"], last["top1"], first["top1"], last["top1_chance"])]
        return self.judged(
            below and fell and found,
            f" positions (position learnt: {shares[0]}): on held-out volumes the intra loss is {value:.3g}, "
            f"{'' if below else 'not '}clearly below the {level:.3g} of the best constant and {'' if fell else 'not '}clearly "
            f"below the {before:.3g} before training; the most similar cell is right for {shares[1]} of the crops ({shares[2]} "
            f"before, {shares[3]} by chance).",
        )
