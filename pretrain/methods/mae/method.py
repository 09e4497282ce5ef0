"""Masked autoencoding on nnU-Net's own networks: hide blocks of the image, reconstruct them.

He et al. 2022 (arXiv:2111.06377) for the idea; Wald et al. 2024 (arXiv:2410.23132) and 2025 (OpenMind, arXiv:2412.17041) on
nnU-Net's CNNs, where a dense encoder that sees 0 in place of hidden voxels did best. Encoder, decoder and skips are all
trained; only the 1x1x1 head that makes the image stays behind. ``L = sum_{u in M & V} (y_u - v_u)^2 / |M & V|``: M the hidden
voxels, V those that lie in the image. On a Primus hidden blocks are whole tokens that the encoder never gets, and a small
transformer, thrown away afterwards, makes the image.

What differs from the public code, and why, is in docs/methods/mae.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnssl import masking
from nnssl.config import option
from nnssl.heads.dino import pool_stages
from nnssl.heads.restoration import restoration_head
from nnssl.heads.tokens import TokenDecoder
from nnssl.losses.masked import block_statistics, masked_error
from nnssl.masking.picture import ERROR, MaskedPanel, masked_panel
from nnssl.networks import PrimusEncoder, encoder_channels, encoder_module, forward_features, partial_decode
from nnssl.networks.sparse import Densify, check_sparse, sparse_encoder
from nnssl.plans import Plan
from nnssl.pretrain import geometry
from nnssl.pretrain.augment.box import image_box
from nnssl.pretrain.augment.rng import StepRNG
from nnssl.pretrain.augment.spatial import Affine, AffineRange, apply_affine, cut_out
from nnssl.pretrain.methods.base import Method
from nnssl.pretrain.methods.mae.masked import PRIMUS_CLIP, check_options, make_optimiser, uses_adamw
from nnssl.pretrain.methods.registry import register
from nnssl.pretrain.types import Batch, CropRequest, Crops, Curve, Level, Picture, SourceStats
from nnssl.words import per_cent

_LINEAR = {2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True)
class MaskedConfig:
    """Options of masked reconstruction that mae and glmae share."""

    mask_ratio: float = option(0.75, "share of the blocks that is hidden", low=0.01, high=0.99)
    mask_spread: float = option(0.0, "each crop's share is drawn within mask_ratio +- this", low=0.0, high=0.5)
    block: tuple[int, ...] | None = option(
        None, "voxels per axis of a block, z,y,x; auto: from the plan's strides", low=1
    )
    masking: str = option("dense", "hidden voxels are filled, or never computed on", choices=("dense", "sparse"))
    fill: str = option("zero", "what dense masking puts there: 0, or a learned value", choices=("zero", "learned"))
    per_channel: bool = option(False, "a mask for each channel, so that channels help each other")
    target: str = option("intensity", "what is reconstructed", choices=("intensity", "block_norm"))
    error: str = option("mse", "of the reconstruction", choices=("mse", "l1"))
    region: str = option("image", "where the error counts", choices=("image", "body"))
    mirror: bool = option(True, "mirror crops on every axis")
    optimiser: str = option(
        "auto",
        "sgd: nesterov, polynomial decay; adamw: warm-up, cosine; auto: sgd, for Primus adamw",
        choices=("auto", "sgd", "adamw"),
    )
    lr: float | None = option(
        None, "initial learning rate; auto: 0.01 (sgd), 0.0005 (adamw), 0.0003 (Primus)", low=0.0, high=10.0
    )
    weight_decay: float | None = option(None, "auto: 3e-5 (sgd), 0.05 (adamw; not on norms, biases)", low=0.0, high=1.0)
    momentum: float = option(0.99, "momentum of sgd", low=0.0, high=1.0)
    warmup: float = option(0.05, "share of the run in which adamw's learning rate rises", low=0.0, high=0.5)


@dataclass(frozen=True)
class MAEConfig(MaskedConfig):
    """Options of mae."""

    augment_p: float = option(0.2, "probability that a crop is turned and scaled", low=0.0, high=1.0)
    rotation: float = option(30.0, "largest rotation, degrees", low=0.0, high=180.0)
    min_scale: float = option(0.8, "smallest magnification", low=0.2, high=1.0)
    max_scale: float = option(1.25, "largest magnification", low=1.0, high=5.0)


def movement(plan: Plan, config: MAEConfig, size: Sequence[int]) -> AffineRange:
    """What the crops' turns, scalings and flips are drawn from."""
    return AffineRange(
        tuple(size),
        plan.spacing,
        geometry.rotation_degrees(plan.spacing, config.rotation),
        (config.min_scale, config.max_scale),
        tuple(range(len(size))) if config.mirror else (),
        config.augment_p,
    )


@register("mae", config=MAEConfig)
class MAE(Method):
    """See the module. The finest decoder output goes through a 1x1(x1) convolution to as many channels as the image has."""

    takes_primus = True
    default_transfer = "encoder"
    transfer_reason = "a decoder trained to paint hidden blocks starts segmentation worse than a random one"
    title = "masked autoencoder: reconstruct hidden blocks (encoder + decoder)"
    citation = (
        "Wald et al., Revisiting MAE pre-training for 3D medical image segmentation, arXiv:2410.23132",
        "He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377",
    )
    presets = {
        "sparse": {"masking": "sparse"},
        "s3d": {"masking": "sparse", "mask_spread": 0.15},
        "learned_fill": {"fill": "learned"},
        "adamw": {"optimiser": "adamw"},
    }

    def __init__(self, network: nn.Module, plan: Plan, request: CropRequest, config: Any) -> None:
        super().__init__(network, plan, request, config)
        self.block = masking.choose_block(request.size, plan.cumulative_strides, block=config.block)
        if plan.is_primus:
            grid = geometry.cells(request.size, plan.total_stride)
            self.head: nn.Module = TokenDecoder(
                plan.features[0], plan.n_channels, plan.total_stride, grid, heads=plan.heads
            )
            self.grad_clip = PRIMUS_CLIP
            return
        self.head = restoration_head(plan.features[0], plan.n_channels, dim=plan.dim)
        if config.fill == "learned":
            self.fill = nn.Parameter(torch.zeros(1, plan.n_channels, *[1] * plan.dim))
        if config.masking == "sparse":
            check_sparse(encoder_module(network))
            self.densify = Densify(encoder_channels(plan))

    # ---- views ---------------------------------------------------------------------------------------------------

    @classmethod
    def crops(cls, plan: Plan, stats: SourceStats, config: Any, size: tuple[int, ...] | None = None) -> CropRequest:
        """Crops of the plan's patch, as many a step as its batch.

        Raises:
            NnsslError: options that contradict each other, a block that does not fit, or no legal crop.
        """
        check_options(config, plan)
        if plan.is_primus:
            size, why = geometry.whole_patch(plan, size)
        else:
            median = stats.median_shape[-plan.dim :]
            size, why = geometry.choose_crop(
                plan.patch_size, median, plan.total_stride, compare=False, size=size, what="the network"
            )
        block = masking.choose_block(size, plan.cumulative_strides, block=config.block)
        window, move = size, None
        if config.augment_p > 0:
            move = movement(plan, config, size)
            wanted = geometry.read_size_for(size, plan.spacing, rotation=move.rotation, min_scale=config.min_scale)
            room = [
                max(0, m - n) for m, n in zip(stats.median_shape[-plan.dim :], size)
            ]  # beyond it lies mostly padding
            window = tuple(min(w, n + r + r % 2) for w, n, r in zip(wanted, size, room))
        why += f" {per_cent(config.mask_ratio)} of its blocks of {geometry.size_text(block)} voxels are hidden."
        return CropRequest(
            size=size,
            read_size=window,
            batch_size=max(2, plan.batch_size),
            min_batch=1,
            explanation=why,
            body=config.region == "body",
            move=move,
        )

    def views(self, crops: Crops, rng: StepRNG) -> Batch:
        """One crop of each window, turned, scaled and mirrored, and its mask; see :meth:`loss` for shapes."""
        c, size = self.config, self.request.size
        source = {"body": crops.body if c.region == "body" else None, "box": image_box(crops)}
        if c.augment_p > 0 or c.mirror:
            affine = movement(self.plan, c, size).draw(rng)
            if crops.affine is not None:  # the same, and what was read
                affine = Affine.from_rows(crops.affine)
            view = apply_affine(crops.data, affine, size, **source)
        else:
            view = cut_out(crops.data, size, **source)
        valid = view.inside if view.body is None else view.body
        return {"input": view.data, "target": view.data, "valid": valid, "mask": self.draw_mask(valid, rng)}

    def draw_mask(self, valid: Tensor, rng: StepRNG) -> Tensor:
        """Hidden voxels ``(B, 1 or C, *size)`` bool of crops whose valid voxels are ``(B, 1, *size)`` bool."""
        c, channels = self.config, self.plan.n_channels if self.config.per_channel else 1
        eligible = masking.mostly(valid, self.block).repeat_interleave(channels, 1)
        scores = rng.uniform(0, 1, *eligible.shape[1:])
        ratio = rng.uniform(c.mask_ratio - c.mask_spread, c.mask_ratio + c.mask_spread).clamp(0.01, 0.99)
        share = ratio.repeat_interleave(channels) if c.mask_spread > 0 else c.mask_ratio
        blocks = masking.mask_blocks(scores.flatten(0, 1), share, eligible.flatten(0, 1))
        return masking.to_voxels(blocks.view_as(eligible), self.block)

    # ---- loss ----------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Reconstruction error of hidden, valid voxels; where nothing is learnt from (eval), also of guesses.

        Args:
            batch: ``input``, ``target`` ``(B, C, *size)``; ``mask`` ``(B, 1 or C, *size)`` bool, hidden; ``valid``
                ``(B, 1, *size)`` bool.
        """
        prediction = self.reconstruct(batch["input"], batch["mask"])[1]
        terms = self.errors(prediction, batch["target"], batch["mask"], batch["valid"])
        return {"total": terms["reconstruction"], **terms}

    def encode(self, image: Tensor, mask: Tensor) -> tuple[list[Tensor], list[Tensor] | None]:
        """Skips of the image without what ``mask`` hides; in sparse mode, and of Primus, also the places ``(B, 1, *size_s)`` of
        each that were computed. The one skip of a Primus is its map of tokens."""
        if self.plan.is_primus:
            first = (slice(None), slice(0, 1), *(slice(None, None, n) for n in self.plan.total_stride))
            visible = ~mask[first]
            return PrimusEncoder(self.network)(torch.where(mask, 0.0, image), visible), [visible]
        if self.config.masking == "sparse":
            return self._encode_sparse(image, mask)
        fill = self.fill.to(image.dtype) if self.config.fill == "learned" else 0.0
        return forward_features(self.network, torch.where(mask, fill, image), 0).skips, None

    @torch.compiler.disable
    def _encode_sparse(self, image: Tensor, mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        with sparse_encoder(encoder_module(self.network), ~mask) as active:
            skips = forward_features(self.network, torch.where(mask, 0.0, image), 0).skips
        places = [active.at(s.shape[2:]) for s in skips]
        return self.densify(skips, active), places

    def reconstruct(self, image: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor, list[Tensor] | None]:
        """Skips, the whole predicted image ``(B, C, *size)``, and active places as in :meth:`encode`."""
        skips, active = self.encode(image, mask)
        if self.plan.is_primus and active is not None:
            return skips, self.head(skips[0], active[0]), active
        out = self.head(partial_decode(self.network, skips)[-1])
        if out.shape[2:] != image.shape[2:]:
            out = F.interpolate(out, size=image.shape[2:], mode=_LINEAR[self.plan.dim])
        return skips, out, active

    def summarise(self, skips: list[Tensor], active: list[Tensor] | None = None, stages: int = 1) -> Tensor:
        """One vector ``(B, D)`` for each image from its last skips: mean and maximum, of a Primus the mean over its tokens."""
        places = None if active is None else active[-stages:]
        return pool_stages(skips[-stages:], places, maximum=not self.plan.is_primus)

    def errors(self, prediction: Tensor, target: Tensor, mask: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """``reconstruction``; ``skipped``, the crops in which nothing is hidden; in eval also the errors of guesses.

        ``surround``: mean of the surrounding visible voxels; ``inpainting``: linear interpolation from them; ``oracle``: each
        block's true mean, in units of the target.
        """
        c, region, kind = self.config, mask & valid, self.config.error
        mean: Tensor | float = 0.0
        sd: Tensor | float = 1.0
        if c.target == "block_norm":
            mean, sd = block_statistics(target, valid, self.block)
        goal = (target - mean) / sd
        terms = {"reconstruction": masked_error(prediction, goal, region, kind=kind)}
        terms["skipped"] = (~region.flatten(1).any(1)).sum().float()
        if not self.training:
            visible = valid & ~mask
            guesses = {
                "surround": masking.surrounding_means(target, visible, self.block),
                "inpainting": masking.inpaint(target, visible),
                "oracle": masking.block_means(target, region, self.block),
            }
            terms |= {k: masked_error((v - mean) / sd, goal, region, kind=kind) for k, v in guesses.items()}
        return terms

    def pretrained_parts(self) -> dict[str, Any]:
        """Everything but the segmentation heads; of a Primus embedding and transformer."""
        if self.plan.is_primus:
            return {"encoder": True, "decoder_stages": []}
        return {"encoder": True, "decoder_stages": list(range(self.plan.n_stages - 1))}

    # ---- optimisation --------------------------------------------------------------------------------------------

    def optimiser(self) -> torch.optim.Optimizer:
        """SGD as nnU-Net's, or AdamW; see :func:`nnssl.pretrain.methods.mae.masked.make_optimiser`."""
        return make_optimiser(self.config, self, self.plan)

    def lr_factor(self, step: int, steps: int) -> float:
        """``(1 - t/T)^0.9`` for SGD; warm-up, then for U-Nets a cosine and for Primus that polynomial, for AdamW."""
        adamw = uses_adamw(self.config, self.plan)
        warm = round(self.config.warmup * steps) if adamw else 0
        if step < warm or (adamw and not self.plan.is_primus):
            return super().lr_factor(step, steps)
        return max(0.0, 1.0 - (step - warm) / max(1, steps - warm)) ** 0.9

    # ---- what a person sees --------------------------------------------------------------------------------------

    def embed(self, batch: Batch) -> Tensor:
        """Mean and maximum of the bottleneck of the whole crop, ``(B, 2 C)``; of a Primus the mean over tokens, ``(B, C)``."""
        return self.summarise(forward_features(self.network, batch["input"], 0).skips)

    def pictures(self, batch: Batch) -> Picture:
        """Middle slices: mask, reconstruction of what is hidden, the image, linear interpolation, and the error."""
        panel = self.panel(*(batch[k][:4] for k in ("input", "target", "mask", "valid")))
        scales = {ERROR: "error as a share of the image's range"}
        return Picture(
            panel.columns,
            "Most of the image is hidden; the network paints it anew",
            PICTURE_NOTE,
            scales,
            tags=panel.tags,
        )

    def curves(self) -> list[Curve]:
        """The reconstruction error beside its guesses."""
        return [reconstruction_curve(self.config, "", "How well is what was hidden painted?")]

    def panel(self, image: Tensor, target: Tensor, mask: Tensor, valid: Tensor) -> MaskedPanel:
        """The columns of a picture for crops ``(B, C, *size)``."""
        prediction = self.reconstruct(image, mask)[1].float()
        if self.config.target == "block_norm":
            mean, sd = block_statistics(target, valid, self.block)
            prediction = prediction * sd + mean
        return masked_panel(target, prediction, mask, valid)

    def verdict(self, first: dict[str, float], last: dict[str, float]) -> tuple[bool, str]:
        """Learnt: hidden voxels are predicted better than by interpolation, and than by the mean of what is around them."""
        if "inpainting" not in last:
            return super().verdict(first, last)
        return compare(self.name, "hidden voxels", last, "")


PICTURE_NOTE = (
    "How to read it: each row is a slice of another crop of the held-out images. Nothing learnt: the painted blocks are no "
    "better than the smooth filling-in from the visible ones. Learnt: edges and shapes continue through the blocks, and the mean "
    "error is lower."
)


def reconstruction_curve(config: MaskedConfig, prefix: str, title: str) -> Curve:
    """The panel of one reconstruction error, whose terms start with ``prefix``, beside what can be guessed without learning."""
    kind = {"mse": "mean squared error", "l1": "mean absolute error"}[config.error]
    unit = "SD of the image" if config.target == "intensity" else "SD of each block"
    return Curve(
        title,
        f"{kind} of the hidden voxels\n(1 = {'square of the ' if config.error == 'mse' else ''}{unit})",
        {f"{prefix}reconstruction": "error"},
        levels=(
            Level(f"{prefix}inpainting", "smooth filling-in, nothing learnt"),
            Level(f"{prefix}surround", "mean of what is visible around"),
            Level(f"{prefix}oracle", "true mean of each block (hard to reach)"),
        ),
        hint="learnt once the held-out line is below the upper two grey lines",
    )


def compare(name: str, what: str, last: dict[str, float], prefix: str) -> tuple[bool, str]:
    """Verdict on one reconstruction error against its guesses, whose terms start with ``prefix``."""
    value, interpolated, around = (last[f"{prefix}{k}"] for k in ("reconstruction", "inpainting", "surround"))
    learnt = value < min(interpolated, around)
    return learnt, (
        f"{name} {'learnt' if learnt else 'did not learn'}: on held-out crops the error of {what} is {value:.3g}, "
        f"{'below' if learnt else 'not below both'} linear interpolation from the visible ones ({interpolated:.3g}) and the mean "
        f"around ({around:.3g}); one number per block could reach {last[f'{prefix}oracle']:.3g}."
    )
