"""Patches of images without labels for a training: nnU-Net's loader and augmentation, cut where a teacher looks.

The teacher sees a patch as it has been turned, scaled and mirrored, the student the same patch after its intensities have changed
too. One image tensor carries both, one behind the other along the channels, through nnU-Net's own loader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform, SegOnlyTransform
from batchgeneratorsv2.transforms.intensity.brightness import (
    BrightnessAdditiveTransform,
    MultiplicativeBrightnessTransform,
)
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from torch import Tensor

from nnssl.errors import NnsslError
from nnssl.preprocessed import CaseRef, open_array
from nnssl.teacher import changes


class UnlabelledDataset:
    """Preprocessed images of any folders, as nnU-Net's loader reads them; labels beside them only tell where no image is."""

    def __init__(self, cases: Sequence[CaseRef]) -> None:
        self._cases = {case.key: case for case in cases}
        self.identifiers = list(self._cases)

    def load_case(self, key: str) -> tuple[Any, Any, None, dict[str, Any]]:
        """``(image (C, *size), segmentation (1, *size), None, properties)``; both are read where they are cut."""
        case = self._cases[key]
        try:
            data = open_array(case.image)
            seg: Any = np.broadcast_to(np.int16(0), (1, *data.shape[1:]))
            if case.labels.is_file():
                seg = open_array(case.labels)
        except (OSError, ValueError) as error:
            raise NnsslError(f"{case.image} cannot be read ({error!r}); preprocess {case.source} again.") from error
        return data, seg, None, {"class_locations": {}}


class TwoViews(BasicTransform):
    """One patch as the teacher sees it, after ``spatial`` and ``mask``, and as the student does, after ``intensity`` too."""

    def __init__(
        self, spatial: Sequence[BasicTransform], intensity: Sequence[BasicTransform], mask: Sequence[BasicTransform]
    ) -> None:
        super().__init__()
        self.spatial, self.intensity, self.mask = list(spatial), list(intensity), list(mask)

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        """Image ``(C, *size)`` and segmentation -> image ``(2 C, *size)``, the teacher's first, and -1 outside, 0 inside."""
        outside = torch.where(data_dict["segmentation"][:1] < 0, -1, 0).to(torch.int16)
        seen = {"image": data_dict["image"], "segmentation": outside}
        for transform in self.spatial:
            seen = transform(**seen)
        views = []
        for transforms in ((), self.intensity):
            view = {"image": seen["image"].clone(), "segmentation": seen["segmentation"]}
            for transform in (*transforms, *self.mask):
                view = transform(**view)
            views.append(view["image"])
        return {"image": torch.cat(views), "segmentation": seen["segmentation"]}


class _Shifted(SpatialTransform):
    """nnU-Net's spatial transform around a point that lies up to a share of the patch beside the middle."""

    shift: float

    def get_parameters(self, **data_dict: Any) -> dict[str, Any]:
        shape = data_dict["image"].shape[1:]
        self.random_crop = True
        self.patch_center_dist_from_border = [s / 2 - self.shift * p for s, p in zip(shape, self.patch_size)]
        return super().get_parameters(**data_dict)


def shifted(transforms: BasicTransform, shift: float) -> BasicTransform:
    """Move patches by up to ``shift`` of their size along each axis; nnU-Net moves a volume smaller than the patch nowhere.

    ``transforms`` from ``nnUNetTrainer.get_training_transforms`` are changed in place where there is a ``SpatialTransform``.
    """
    if shift > 0 and isinstance(transforms, ComposeTransforms):
        for i, transform in enumerate(transforms.transforms):
            if type(transform) is SpatialTransform:
                moving = _Shifted.__new__(_Shifted)
                moving.__dict__.update(transform.__dict__)
                moving.shift = shift
                transforms.transforms[i] = moving
    return transforms


def _inner(transform: BasicTransform) -> BasicTransform:
    return transform.transform if isinstance(transform, RandomTransform) else transform


def strong_changes(strength: float) -> list[BasicTransform]:
    """What a student must not mind: noise, contrast, brightness and gamma, each on its own with probability ``0.3 strength``.

    Stronger than nnU-Net's, without its blur and its low resolution; see :mod:`nnssl.teacher.changes`.
    """
    kinds = (
        GaussianNoiseTransform((0, changes.NOISE * strength), p_per_channel=1, synchronize_channels=False),
        MultiplicativeBrightnessTransform(changes.FACTOR, synchronize_channels=False, p_per_channel=1),
        BrightnessAdditiveTransform(0, changes.SHIFT, synchronize_channels=False, p_per_channel=1),
        GammaTransform(changes.GAMMA, p_invert_image=0, synchronize_channels=False, p_per_channel=1, p_retain_stats=1),
    )
    p = min(1.0, changes.PROBABILITY * strength)
    return [RandomTransform(kind, apply_probability=p) for kind in kinds]


def _stronger(transform: BasicTransform, factor: float) -> BasicTransform:
    """A copy that is applied ``factor`` times as often; noise is also that much stronger."""
    copy = deepcopy(transform)
    if isinstance(copy, RandomTransform):
        copy.apply_probability = min(1.0, copy.apply_probability * factor)
    inner = _inner(copy)
    if isinstance(inner, GaussianNoiseTransform) and isinstance(inner.noise_variance, (tuple, list)):
        inner.noise_variance = tuple(v * factor for v in inner.noise_variance)
    return copy


def _what_it_changes(transform: BasicTransform) -> str:
    """``"outside"`` (sets it to 0), ``"targets"``, ``"intensity"`` or ``"space"``."""
    kind = _inner(transform)
    if isinstance(kind, MaskImageTransform):
        return "outside"
    if isinstance(kind, SegOnlyTransform):
        return "targets"
    return "intensity" if isinstance(kind, ImageOnlyTransform) else "space"


def with_strong_changes(transforms: BasicTransform) -> BasicTransform:
    """Put :func:`strong_changes` where nnU-Net's augmentation changes intensities; in place where it is a sequence."""
    if isinstance(transforms, ComposeTransforms):
        old = [_what_it_changes(t) == "intensity" for t in transforms.transforms]
        kept = [t for t, changes_them in zip(transforms.transforms, old) if not changes_them]
        at = old.index(True) if any(old) else 0  # before mirroring, and before what lies outside becomes zero
        transforms.transforms = [*kept[:at], *strong_changes(1.0), *kept[at:]]
    return transforms


def split_transforms(
    transforms: BasicTransform, strength: float, intensities: str
) -> tuple[TwoViews, ComposeTransforms]:
    """Cut nnU-Net's training augmentation where the teacher looks.

    What changes images only is the student's; what changes segmentations only makes targets of label maps; the rest moves voxels.
    Mirroring comes before the intensities here, behind them in nnU-Net: it commutes with each of them.

    Args:
        transforms: from ``nnUNetTrainer.get_training_transforms``.
        strength: factor on the probability of the student's intensity changes (at most 1) and on the amount of noise.
        intensities: the student's changes: ``"nnunet"``, those of ``transforms``, or ``"strong"``, :func:`strong_changes`.

    Returns:
        what makes the two views of an image, and what makes targets of a label map ``(1, *size)``: regions, deep supervision.
    """
    if not isinstance(transforms, ComposeTransforms):
        raise NnsslError(
            f"The trainer's augmentation is a {type(transforms).__name__}; a sequence of transforms is wanted."
        )
    found: dict[str, list[BasicTransform]] = {"space": [], "intensity": [], "outside": [], "targets": []}
    for transform in transforms.transforms:
        found[_what_it_changes(transform)].append(transform)
    intensity = [_stronger(t, strength) for t in found["intensity"]]
    if intensities == "strong":
        intensity = strong_changes(strength)
    return TwoViews(found["space"], intensity, found["outside"]), ComposeTransforms(found["targets"])


class Halves:
    """Batches of the second stage: half of them labelled, half not.

    A batch of nnU-Net's labelled loader is used up over several steps, so that nothing is augmented in vain, and each of its
    places (random, around a class) takes its turn. ``share`` is the number of labelled patches of a batch; the others are made
    by :class:`TwoViews`.
    """

    def __init__(self, labelled: Iterator[dict[str, Any]], unlabelled: Iterator[dict[str, Any]], share: int) -> None:
        self.labelled, self.unlabelled, self.share = labelled, unlabelled, share
        self._left: list[tuple[Tensor, Any, Any]] = []

    def __iter__(self) -> Halves:
        return self

    def __next__(self) -> dict[str, Any]:
        """``data``, ``target`` and ``keys`` of the labelled patches; ``views`` and ``outside`` of the others."""
        while len(self._left) < self.share:
            batch = next(self.labelled)
            target = batch["target"]
            each = [list(one) for one in zip(*target)] if isinstance(target, (list, tuple)) else target
            self._left += zip(batch["data"], each, batch["keys"])
        taken, self._left = self._left[: self.share], self._left[self.share :]
        data, targets, keys = zip(*taken)
        several = isinstance(targets[0], list)
        target = [torch.stack(level) for level in zip(*targets)] if several else torch.stack(targets)
        other = next(self.unlabelled)
        return {
            "data": torch.stack(data),
            "target": target,
            "keys": list(keys),
            "views": other["data"],
            "outside": other["target"],
        }
