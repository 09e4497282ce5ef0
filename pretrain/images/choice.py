"""Which channels a dataset gets, and which of the images found are of that kind."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nnssl.errors import NnsslError
from nnssl.pretrain.images.items import Item, Rejected
from nnssl.pretrain.images.scan import dataset_channels
from nnssl.pretrain.prepare.channels import modality_of, same_name
from nnssl.pretrain.prepare.raw import describe
from nnssl.words import counted

log = logging.getLogger("nnssl")

NAMES = {"CT": "CT", "MR": "MR", "PT": "PET", "US": "US"}
"""DICOM's modality -> channel name."""


@dataclass
class Channels:
    """What is decided.

    Attributes:
        names: of the channels.
        items: images that are of that kind.
        patterns: channel name -> regular expression, in the order of the names; None where there is one channel.
        rejected: images of another kind.
    """

    names: tuple[str, ...]
    items: Sequence[Item]
    patterns: Mapping[str, str] | None = None
    rejected: list[Rejected] = field(default_factory=list)


def choose_channels(
    items: Sequence[Item],
    dataset: str,
    there: Sequence[str],
    *,
    target: int | str | None,
    modality: str | None,
    patterns: Mapping[str, str] | None,
) -> Channels:
    """Decide on channels.

    Args:
        items: all images found.
        dataset: that they are added to.
        there: its channels; none where it is new.
        target: dataset whose names are taken.
        modality: name of the only channel.
        patterns: of ``--channels``.

    Raises:
        NnsslError: the names contradict each other, or stand nowhere.
    """
    if patterns and modality:
        raise NnsslError("--channels names the channels; leave out --modality.")
    wanted, who = tuple(there), dataset
    if target is not None:
        wanted, who = _channels_of_target(target)
        if there and not _same(there, wanted):
            raise NnsslError(f"{dataset} has {_channels(there)}, not those of {who}: {', '.join(wanted)}.")
    if not patterns and not modality:
        patterns = _patterns_of_datasets(items)
    if patterns:
        return _several(items, dict(patterns), wanted, who)
    if len(wanted) > 1:
        raise NnsslError(
            f"{who} has {len(wanted)} channels: give a pattern for each, --channels "
            + " ".join(f"{n}=_{n.lower()}" if n.isidentifier() else f"'{n}=PATTERN'" for n in wanted)
        )
    if modality and wanted and not same_name(modality, wanted[0]):
        raise NnsslError(f"{who} has the channel {wanted[0]}, not {modality}.")
    return _one(items, wanted[0] if wanted else modality)


def _channels_of_target(target: int | str) -> tuple[tuple[str, ...], str]:
    from nnssl.plans import resolve_dataset

    name = resolve_dataset(target)
    description = describe(name)
    names = description.get("channel_names") or description.get("modality")
    if not isinstance(names, dict) or not names:
        raise NnsslError(f"dataset.json of {name} has no channel_names that could be taken.")
    return tuple(str(names[k]) for k in sorted(names, key=int)), name


def _same(one: Sequence[str], other: Sequence[str]) -> bool:
    return len(one) == len(other) and all(map(same_name, one, other))


def _patterns_of_datasets(items: Sequence[Item]) -> dict[str, str] | None:
    """Patterns for the files of nnU-Net datasets with several channels, where all images are of such."""
    folders = {str(Path(item.files[0]).parent) for item in items if not item.dicom}
    found = {dataset_channels(folder) for folder in folders}
    names = next(iter(found)) if len(found) == 1 and not any(item.dicom for item in items) else None
    if not names or len(names) < 2 or len(set(names)) != len(names):
        return None
    return {name: rf"_{c:04d}(?=\.)" for c, name in enumerate(names)}


def _several(items: Sequence[Item], patterns: dict[str, str], wanted: Sequence[str], who: str) -> Channels:
    if not wanted:
        return Channels(tuple(patterns), items, patterns)
    ordered = {}
    for name in wanted:
        given = next((g for g in patterns if g == name), None) or next(
            (g for g in patterns if same_name(g, name)), None
        )
        if given is not None:
            ordered[name] = patterns[given]
    if len(ordered) != len(wanted) or len(patterns) != len(wanted):
        raise NnsslError(f"{who} has {_channels(wanted)}, not {', '.join(patterns)}.")
    return Channels(tuple(ordered), items, ordered)


def _one(items: Sequence[Item], asked: str | None) -> Channels:
    """One channel: those images that are not known to be of another modality."""
    if asked is None:
        asked = _agreed_modality(items)
    wanted = modality_of(asked)
    kept, rejected = [], []
    for item in items:
        kind = modality_of(item.modality)
        if wanted and item.modality and kind != wanted:
            rejected.append(Rejected(item.files[0], "another modality", item.modality, len(item.files)))
        else:
            kept.append(item)
    return Channels((asked,), kept, None, rejected)


def _agreed_modality(items: Sequence[Item]) -> str:
    """The modality that the files tell, where they agree."""
    names = Counter(item.modality for item in items)
    counts = Counter(modality_of(item.modality) or item.modality for item in items)
    silent = counts.pop("", 0)
    if len(counts) > 1:
        shown = ", ".join(f"{n} {m}" for m, n in counts.most_common())
        raise NnsslError(
            f"The images are of several kinds ({shown} images): choose one with --modality; others are left out."
        )
    if not counts:
        if not items:
            return "MR"
        raise NnsslError(
            "The files do not tell what kind of images they are: say it, for example --modality CT or --modality MR, or name the "
            "dataset to be fine-tuned with -t."
        )
    names.pop("", None)
    kind = next(iter(counts))
    modality = next(iter(names)) if len(names) == 1 and kind not in names else NAMES.get(kind, kind)
    if silent:
        log.info(
            "Modality: %s, as %d of %d images say; the others do not tell theirs.",
            modality,
            len(items) - silent,
            len(items),
        )
    return modality


def _channels(names: Sequence[str]) -> str:
    """``1 channel (MR)``."""
    return f"{counted(len(names), 'channel')} ({', '.join(names)})"
