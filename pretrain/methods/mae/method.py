"""Masked autoencoding on nnU-Net's own networks: hide blocks of the image, reconstruct them.

He et al. 2022 (arXiv:2111.06377) for the idea; Wald et al. 2024 (arXiv:2410.23132) and 2025 (OpenMind, arXiv:2412.17041) on
nnU-Net's CNNs, where a dense encoder that sees 0 in place of hidden voxels did best. Encoder, decoder and skips are all
trained; only the 1x1x1 head that makes the image stays behind. ``L = sum_{u in M & V} (y_u - v_u)^2 / |M & V|``: M the hidden
voxels, V those that lie in the image. On a Primus hidden blocks are whole tokens that the encoder never gets, and a small
transformer, thrown away afterwards, makes the image.

What differs from the public code, and why, is in docs/methods/mae.md. What glmae shares is in :mod:`.masked`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nnssl import masking
from nnssl.config import option
from nnssl.masking.picture import ERROR
from nnssl.networks import forward_features
from nnssl.plans import Plan
from nnssl.pretrain import geometry
from nnssl.pretrain.augment import StepRNG
from nnssl.pretrain.augment.box import image_box
from nnssl.pretrain.augment.spatial import Affine, AffineRange, apply_affine, cut_out
from nnssl.pretrain.methods.base import Size
from nnssl.pretrain.methods.mae.masked import PICTURE_NOTE, MaskedConfig, MaskedReconstruction, check_options
from nnssl.pretrain.methods.registry import register
from nnssl.pretrain.types import Batch, CropRequest, Crops, Curve, Picture, SourceStats
from nnssl.words import per_cent


@dataclass(frozen=True)
class MAEConfig(MaskedConfig):
    """Options of mae."""

    augment_p: float = option(0.2, "probability that a crop is turned and scaled", low=0.0, high=1.0)
    rotation: float = option(30.0, "largest rotation, degrees", low=0.0, high=180.0)
    min_scale: float = option(0.8, "smallest magnification", low=0.2, high=1.0)
    max_scale: float = option(1.25, "largest magnification", low=1.0, high=5.0)


def movement(plan: Plan, config: MAEConfig, size: Sequence[int]) -> AffineRange:
    """What the crops' turns, scalings and flips are drawn from."""
    scale = (config.min_scale, config.max_scale)
    return AffineRange.of(plan, size, config.rotation, scale, mirror=config.mirror, p=config.augment_p)


@register("mae", config=MAEConfig)
class MAE(MaskedReconstruction[MAEConfig]):
    """See the module."""

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

    @classmethod
    def crops(cls, plan: Plan, stats: SourceStats, config: MAEConfig, size: Size | None = None) -> CropRequest:
        """Crops of the plan's patch, as many a step as its batch."""
        check_options(config, plan)
        median = stats.median_shape[-plan.dim :]
        if plan.is_primus:
            size, why = geometry.whole_patch(plan, size)
        else:
            size, why = geometry.choose_crop(plan.patch_size, median, plan.total_stride, compare=False, size=size)
        block = masking.choose_block(size, plan.cumulative_strides, block=config.block)
        window, move = size, None
        if config.augment_p > 0:
            move = movement(plan, config, size)
            room = [max(0, m - n) for m, n in zip(median, size)]  # beyond it lies mostly padding
            window = tuple(min(w, n + r + r % 2) for w, n, r in zip(move.read_size(), size, room))
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
        body, box = crops.body if c.region == "body" else None, image_box(crops)
        if c.augment_p > 0 or c.mirror:
            affine = movement(self.plan, c, size).draw(rng)
            if crops.affine is not None:  # the same, and what was read
                affine = Affine.from_rows(crops.affine)
            view = apply_affine(crops.data, affine, size, body=body, box=box)
        else:
            view = cut_out(crops.data, size, body=body, box=box)
        valid = view.shown
        return {"input": view.data, "target": view.data, "valid": valid, "mask": self.draw_mask(valid, rng)}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Reconstruction error of hidden, valid voxels; where nothing is learnt from (eval), also of guesses.

        Args:
            batch: ``input``, ``target`` ``(B, C, *size)``; ``mask`` ``(B, 1 or C, *size)`` bool, hidden; ``valid``
                ``(B, 1, *size)`` bool.
        """
        prediction = self.reconstruct(batch["input"], batch["mask"])[1]
        terms = self.errors(prediction, batch["target"], batch["mask"], batch["valid"])
        return {"total": terms["reconstruction"], **terms}

    def embed(self, batch: Batch) -> Tensor:
        """Mean and maximum of the bottleneck of the whole crop, ``(B, 2 C)``; of a Primus the mean over tokens, ``(B, C)``."""
        return self.summarise(forward_features(self.network, batch["input"], 0).skips)

    def pictures(self, batch: Batch) -> Picture:
        """Middle slices: mask, reconstruction of what is hidden, the image, linear interpolation, and the error."""
        panel = self.panel(*(batch[k][:4] for k in ("input", "target", "mask", "valid")))
        scales = {ERROR: "error as a share of the image's range"}
        title = "Most of the image is hidden; the network paints it anew"
        return Picture(panel.columns, title, PICTURE_NOTE, scales, tags=panel.tags)

    def curves(self) -> list[Curve]:
        """The reconstruction error beside its guesses."""
        return [self.reconstruction_curve("", "How well is what was hidden painted?")]

    def verdict(self, first: dict[str, float], last: dict[str, float]) -> tuple[bool, str]:
        """Learnt: hidden voxels are predicted better than by interpolation, and than by the mean of what is around them."""
        if "inpainting" not in last:
            return super().verdict(first, last)
        return self.compare("hidden voxels", last)
