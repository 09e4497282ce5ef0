"""The first convolution where checkpoint and network take other channels: an image's, and in a cascade a segmentation's too."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from nnssl.errors import NnsslError
from nnssl.plans import Plan
from nnssl.weights.adapt import Adaptation, adapt_channels
from nnssl.weights.compare import image_channels, second_stage
from nnssl.weights.layout import Layout, same_tensor
from nnssl.weights.load import Checkpoint
from nnssl.words import counted

_FIRST = "type nnssl_plan --checkpoint FILE --adapt channels=first --name NAME"


def fit_channels(
    source: dict[str, Tensor], target: Mapping[str, Tensor], checkpoint: Checkpoint, plan: Plan | None, how: Adaptation
) -> list[str]:
    """Fit the first convolution to or from the second stage of a cascade, in place.

    Returns:
        a line for the report where anything was done.

    Raises:
        NnsslError: the numbers of channels differ otherwise, and nobody has said what is to be done.
    """
    here, there = Layout.of(target), Layout.of(source)
    if here.channels is None or there.channels is None:
        return []
    segmentation = plan.segmentation_channels if plan is not None else 0
    if segmentation and there.channels == here.channels - segmentation:
        wide = here.channels
        _change_stem(source, there, lambda stem: adapt_channels(stem, wide, "first")[0])
        done = f"the image's {there.channels} input channels taken, the segmentation's {segmentation} begin at 0"
        return [f"second stage of a cascade: {done}"]
    images = image_channels(checkpoint)
    if how.channels == "first" and images and images < there.channels and second_stage(checkpoint):
        _change_stem(source, there, lambda stem: stem[:, :images])
        done = f"the image's {images} of {there.channels} input channels taken, the segmentation's left out"
        return [f"second stage of a cascade: {done}"]
    if here.channels != there.channels and here.kind == there.kind:
        _refuse(checkpoint, plan, how, here, there)
    return []


def _change_stem(source: dict[str, Tensor], layout: Layout, change: Callable[[Tensor], Tensor]) -> None:
    """Change the first convolution under all of its names."""
    stem = source[str(layout.stem)]
    for name, tensor in source.items():
        if same_tensor(tensor, stem):
            source[name] = change(tensor)


def _refuse(checkpoint: Checkpoint, plan: Plan | None, how: Adaptation, here: Layout, there: Layout) -> None:
    """Raise where channels of different meaning would be mixed, or where nothing may be adapted."""
    where, mixes = checkpoint.title, how.channels in (None, "repeat")
    if mixes and second_stage(checkpoint):
        n = image_channels(checkpoint)
        of = (
            f"{n} of its {there.channels} input channels are"
            if n
            else f"its {there.channels} input channels are partly"
        )
        raise NnsslError(
            f"{where} is the second stage of a cascade: {of} the image's, the others a segmentation's, which must not be mixed "
            f"with them. To take the image's weights {_FIRST}"
        )
    if mixes and plan is not None and plan.segmentation_channels and here.channels is not None:
        raise NnsslError(
            f"{where} was trained on {counted(there.channels or 0, 'input channel')}; {plan.configuration}, second stage of a "
            f"cascade, takes {here.channels - plan.segmentation_channels} of the image and {plan.segmentation_channels} of a "
            f"segmentation, which must not be mixed. To take channel by channel {_FIRST}"
        )
    if how.channels is None and here.stages == there.stages and here.blocks == there.blocks:
        raise NnsslError(
            f"{where} was trained on images with {counted(there.channels or 0, 'channel')}, this network takes {here.channels}. "
            "Weights are not adapted to another number of channels unasked: pretrain on images with the channels of the target "
            "dataset, or type nnssl_plan --checkpoint FILE --adapt channels=repeat --name NAME"
        )
