"""Legal pretraining crops: divisible as the network needs, with more than one bottleneck voxel, and small enough to differ.

nnU-Net's patch often exceeds the median volume. Two crops of that size show the same place, and nothing is left to contrast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nnssl.errors import NnsslError
from nnssl.words import size_text

if TYPE_CHECKING:
    from nnssl.plans import Plan

ABOUT_TWO_THIRDS = 0.7  # 64 of 95 voxels are legal where 63.3 are two thirds


def choose_crop(
    patch: Sequence[int],
    median: Sequence[int],
    multiple: Sequence[int],
    *,
    compare: bool = True,
    min_voxels: int = 2,
    size: Sequence[int] | None = None,
    what: str = "the network",
) -> tuple[tuple[int, ...], str]:
    """Choose the pretraining crop, or check the user's.

    Per axis the largest multiple within the patch and, where crops are compared, about two thirds of the median volume;
    never less than one multiple. Where that leaves fewer than ``min_voxels`` at the bottleneck, the axis that has most
    room grows.

    Args:
        patch: the plan's patch.
        median: median case shape on the same axes (the last two of three for 2d plans).
        multiple: what each axis must be a multiple of: the total stride, times whatever a branch shrinks its input by. A
            crop's bottleneck has ``size / multiple`` voxels.
        compare: whether the method compares crops or positions of one volume.
        min_voxels: fewest voxels of the bottleneck; InstanceNorm needs 2.
        size: the user's crop, checked instead of chosen.
        what: who needs the multiple, for messages.

    Returns:
        The size, and a sentence that says why it is what it is.

    Raises:
        NnsslError: where no legal crop exists, or ``size`` is none; names the axis and the numbers.
    """
    rules = _Rules(tuple(patch), tuple(median), tuple(multiple), min_voxels, what)
    if size is not None:
        rules.check(tuple(size))
        return tuple(size), (
            f"The crop is {size_text(size)} voxels, as asked for (median image {size_text(median)}); its smallest feature map "
            f"has {size_text(cells(size, multiple))} voxels."
        )
    chosen = rules.choose(compare)
    near = f"about two thirds of the median image {size_text(median)} where possible, and within " if compare else ""
    return chosen, (
        f"The crop is {size_text(chosen)} voxels: multiples of {size_text(multiple)} for {what}, within {near}the patch "
        f"{size_text(patch)}; its smallest feature map has {size_text(cells(chosen, multiple))} voxels."
    )


@dataclass(frozen=True)
class _Rules:
    """What makes a crop legal; the fields are arguments of :func:`choose_crop`."""

    patch: tuple[int, ...]
    median: tuple[int, ...]
    multiple: tuple[int, ...]
    min_voxels: int
    what: str

    def choose(self, compare: bool) -> tuple[int, ...]:
        limit = [min(p, ABOUT_TWO_THIRDS * m) if compare else p for p, m in zip(self.patch, self.median)]
        most = [max(p, m) for p, m in zip(self.patch, self.median)]
        for axis, (m, room) in enumerate(zip(self.multiple, most)):
            if m > room:
                raise NnsslError(
                    f"no legal pretraining crop: {self.what} needs a multiple of {m} voxels on axis {axis}, where the patch has "
                    f"{self.patch[axis]} and the median image {self.median[axis]}. Crops of {size_text(self.multiple)} or more "
                    "(--crop) would be mostly padding there."
                )
        chosen = [max(int(n // m), 1) * m for n, m in zip(limit, self.multiple)]
        while math.prod(cells(chosen, self.multiple)) < self.min_voxels:
            larger = [n + m for n, m in zip(chosen, self.multiple)]
            axes = [a for a in range(len(chosen)) if larger[a] <= most[a]]
            if not axes:
                raise self._too_small(chosen, most)
            axis = min(axes, key=lambda a: larger[a] / most[a])
            chosen[axis] = larger[axis]
        return tuple(chosen)

    def _too_small(self, chosen: Sequence[int], most: Sequence[int]) -> NnsslError:
        wide = max(range(len(chosen)), key=lambda a: most[a] / self.multiple[a])
        return NnsslError(
            f"no legal pretraining crop: {self.what} needs multiples of {size_text(self.multiple)} voxels and at least "
            f"{self.min_voxels} voxels at the bottleneck. The largest crop, {size_text(chosen)}, has "
            f"{size_text(cells(chosen, self.multiple))} there: axis {wide} would need {chosen[wide] + self.multiple[wide]} "
            f"voxels, and the patch has {self.patch[wide]}, the median image {self.median[wide]}."
        )

    def check(self, size: tuple[int, ...]) -> None:
        if len(size) != len(self.patch):
            raise NnsslError(f"--crop {size_text(size)} has {len(size)} axes, the plan's patch has {len(self.patch)}.")
        for axis, (n, m) in enumerate(zip(size, self.multiple)):
            if n < m or n % m:
                near = max(m, round(n / m) * m)
                raise NnsslError(
                    f"--crop {size_text(size)}: {self.what} needs a multiple of {m} voxels on axis {axis}, {n} is none. "
                    f"The nearest is {near}."
                )
        bottleneck = cells(size, self.multiple)
        if math.prod(bottleneck) < self.min_voxels:
            raise NnsslError(
                f"--crop {size_text(size)}: the smallest feature map would have {size_text(bottleneck)} voxels, and at least "
                f"{self.min_voxels} are needed (InstanceNorm cannot normalise one). Sizes are multiples of "
                f"{size_text(self.multiple)}; double one axis."
            )


def whole_patch(plan: Plan, size: Sequence[int] | None = None) -> tuple[tuple[int, ...], str]:
    """The crop of a Primus: the plan's patch, since its positions are those of the patch; and a sentence that says so.

    Raises:
        NnsslError: the user's ``size`` is another.
    """
    patch = plan.patch_size
    if size is not None and tuple(size) != patch:
        raise NnsslError(
            f"--crop {size_text(size)}: a {plan.network_class} has a learned code for each place of its patch of "
            f"{size_text(patch)} voxels, so that it is pretrained with this patch. For another one write a plan: "
            "nnssl_plan --patch"
        )
    grid = size_text(cells(patch, plan.total_stride))
    return patch, (
        f"The crop is the patch, {size_text(patch)} voxels, as {grid} tokens of {size_text(plan.total_stride)}: positions are "
        "learned for it."
    )


def cells(size: Sequence[int], multiple: Sequence[int]) -> list[int]:
    """Voxels of a feature map: ``size // multiple`` per axis."""
    return [n // m for n, m in zip(size, multiple)]


def largest_spread(size: Sequence[int], median: Sequence[int]) -> float:
    """How far apart, as a share of the image, two crops' centres can lie on the axis that leaves most room; 0 where none does."""
    return max(max(0.0, 1.0 - n / m) for n, m in zip(size, median))


def rotation_degrees(spacing: Sequence[float], degrees: float, threshold: float = 3.0) -> tuple[float, ...]:
    """Largest angle about each axis: all three in 3d, but where slices are thick (spacing ratio above ``threshold``, as
    nnU-Net has it) only about the axis through the slices. 2d has one angle.
    """
    if len(spacing) == 2:
        return (degrees,)
    thick = max(range(3), key=lambda a: spacing[a])
    if max(spacing) / min(spacing) > threshold:
        return tuple(degrees if a == thick else 0.0 for a in range(3))
    return (degrees,) * 3


def read_size_for(
    size: Sequence[int],
    spacing: Sequence[float],
    *,
    rotation: Sequence[float] = (0.0,),
    min_scale: float = 1.0,
    shift: float = 0.0,
    median: Sequence[int] | None = None,
    most: float = 2.0,
) -> tuple[int, ...]:
    """Voxels to read around a crop so that turned, shrunk and shifted views seldom show what was not read.

    As in nnU-Net, the corner of the crop is turned about one axis at a time; several turns at once may show a little
    padding, which views mark in their body mask. Windows are drawn inside the image, so a wide one keeps the crops in its
    middle: with ``median`` the margin is at most a third of the room between crop and image, which leaves crops two thirds
    of the places.

    Args:
        size: voxels of the crop.
        spacing: mm per voxel and axis.
        rotation: largest angles as in :func:`rotation_degrees`.
        min_scale: smallest magnification.
        shift: largest shift as a share of ``size``.
        median: median case shape on the same axes, where crops must differ in position.
        most: largest read size as a multiple of ``size``.

    Returns:
        At least ``size``; the margin is even, so that the crop lies in the middle.
    """
    half = [n * s / 2 for n, s in zip(size, spacing)]
    reach = list(half)
    planes = [(0, 1)] if len(size) == 2 else [(1, 2), (0, 2), (0, 1)]
    for degrees, (a, b) in zip(rotation, planes):
        turn = math.radians(abs(degrees))
        for here, there in ((a, b), (b, a)):
            best = min(turn, math.atan2(half[there], half[here]))  # the angle at which the corner reaches farthest
            reach[here] = max(reach[here], half[here] * math.cos(best) + half[there] * math.sin(best))
    read_size = []
    for axis, (n, s, r) in enumerate(zip(size, spacing, reach)):
        margin = min(2 * r / s / min(min_scale, 1.0) + 2 * shift * n, most * n) - n
        read_size.append(n + 2 * math.ceil(margin / 2 - 1e-9))
        if median is not None:
            read_size[-1] = min(read_size[-1], n + 2 * (max(0, median[axis] - n) // 6))
    return tuple(read_size)


window_for = read_size_for  # its name before


@dataclass(frozen=True)
class Asymmetry:
    """How a dominant branch (shrunk image, ``blocks`` decoder stages) and an auxiliary one (full image, encoder) line up.

    Attributes:
        blocks: decoder stages of the dominant branch, from the bottom.
        shrink: U, factor per axis by which the dominant branch's image is shrunk.
        aux_stage: encoder stage whose map is as large as the dominant branch's decoder map.
        dense_stride: voxels of the full image per site of those maps.
        multiple: what the crop must be a multiple of, per axis.
    """

    blocks: int
    shrink: tuple[int, ...]
    aux_stage: int
    dense_stride: tuple[int, ...]
    multiple: tuple[int, ...]


def asymmetry(plan: Plan, blocks: int, down: int) -> Asymmetry:
    """Line up two branches of MACL on a plan.

    With ``S_j`` the cumulative stride of stage ``j`` of ``n``, the decoder's map after K = ``blocks`` stages has stride
    ``S_{n-1-K}`` of the shrunken image. Shrinking by the strides of ``down`` stages from ``n-K`` on,
    ``U = r_{n-K} ... r_{n-K+down-1}``, makes that the stride of stage ``n-1-K+down`` of the full image. ``down = K`` is
    the paper's alignment with the bottleneck; ``down < K`` needs smaller crops and aligns with an earlier stage.

    Raises:
        NnsslError: where the network has too few stages, or ``down`` does not fit ``blocks``.
    """
    n, strides = plan.n_stages, plan.cumulative_strides
    if not 0 <= blocks <= n - 1:
        raise NnsslError(f"decoder_blocks={blocks}: the network of this plan has {n - 1} decoder stages.")
    if not min(1, blocks) <= down <= blocks:
        raise NnsslError(
            f"down={down} does not fit decoder_blocks={blocks}: it must be from {min(1, blocks)} to {blocks} "
            f"(as many as decoder_blocks aligns with the bottleneck, fewer with an earlier encoder stage)."
        )
    first, aux = n - 1 - blocks, n - 1 - blocks + down
    shrink = tuple(a // b for a, b in zip(strides[aux], strides[first]))
    return Asymmetry(blocks, shrink, aux, strides[aux], tuple(s * u for s, u in zip(plan.total_stride, shrink)))
