"""Which channels a dataset gets, and which of the images found are of that kind."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nnssl.errors import NnsslError
from nnssl.plans import resolve_dataset
from nnssl.pretrain.images.dataset import Dataset
from nnssl.pretrain.images.items import Item, Rejected
from nnssl.pretrain.images.options import AddOptions
from nnssl.pretrain.images.scan import dataset_channels
from nnssl.pretrain.prepare.channels import modality_of, same_name
from nnssl.pretrain.prepare.raw import channel_names, describe
from nnssl.words import counted

log = logging.getLogger("nnssl")

NAMES = {"CT": "CT", "MR": "MR", "PT": "PET", "US": "US"}  # DICOM's modality -> channel name


@dataclass
class Channels:
    """Names of the channels, images that are of that kind, and patterns by name, None where there is one channel."""

    names: tuple[str, ...]
    items: Sequence[Item]
    patterns: Mapping[str, str] | None = None
    rejected: list[Rejected] = field(default_factory=list)


def choose_channels(items: Sequence[Item], dataset: Dataset, asked: AddOptions) -> Channels:
    """Decide on the channels of a dataset; raises :class:`NnsslError` where names contradict each other, or stand nowhere."""
    patterns, modality = asked.channels, asked.modality
    if patterns and modality:
        raise NnsslError("--channels names the channels; leave out --modality.")
    there = dataset.channels
    wanted, who = there, dataset.name
    if asked.target is not None:
        who = resolve_dataset(asked.target)
        wanted = tuple(channel_names(describe(who)).values())
        if not wanted:
            raise NnsslError(f"dataset.json of {who} has no channel_names that could be taken.")
        if there and not (len(there) == len(wanted) and all(map(same_name, there, wanted))):
            raise NnsslError(f"{dataset.name} has {_channels(there)}, not those of {who}: {', '.join(wanted)}.")
    if not patterns and not modality:
        patterns = _patterns_of_datasets(items)
    if patterns:
        patterns = _ordered(patterns, wanted, who)
        return Channels(tuple(patterns), items, patterns)
    if len(wanted) > 1:
        raise NnsslError(
            f"{who} has {len(wanted)} channels: give a pattern for each, --channels "
            + " ".join(f"{n}=_{n.lower()}" if n.isidentifier() else f"'{n}=PATTERN'" for n in wanted)
        )
    if modality and wanted and not same_name(modality, wanted[0]):
        raise NnsslError(f"{who} has the channel {wanted[0]}, not {modality}.")
    return _one(items, wanted[0] if wanted else modality or _agreed_modality(items))


def _patterns_of_datasets(items: Sequence[Item]) -> dict[str, str] | None:
    """Patterns for the files of nnU-Net datasets with several channels, where all images are of such."""
    if any(item.dicom for item in items):
        return None
    found = {dataset_channels(folder) for folder in {str(Path(item.files[0]).parent) for item in items}}
    names = next(iter(found)) if len(found) == 1 else None
    if not names or len(names) < 2 or len(set(names)) != len(names):
        return None
    return {name: rf"_{c:04d}(?=\.)" for c, name in enumerate(names)}


def _ordered(patterns: Mapping[str, str], wanted: Sequence[str], who: str) -> Mapping[str, str]:
    """The patterns under the names that are wanted, in their order."""
    if not wanted:
        return patterns
    ordered = {}
    for name in wanted:
        alike = [given for given in patterns if given == name] or [g for g in patterns if same_name(g, name)]
        if alike:
            ordered[name] = patterns[alike[0]]
    if len(ordered) != len(wanted) or len(patterns) != len(wanted):
        raise NnsslError(f"{who} has {_channels(wanted)}, not {', '.join(patterns)}.")
    return ordered


def _one(items: Sequence[Item], name: str) -> Channels:
    """One channel: those images that are not known to be of another modality."""
    wanted = modality_of(name)
    kept: list[Item] = []
    chosen = Channels((name,), kept)
    for item in items:
        if wanted and item.modality and modality_of(item.modality) != wanted:
            chosen.rejected.append(item.rejected("another modality", item.modality))
        else:
            kept.append(item)
    return chosen


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
    if not items:
        return "MR"
    if not counts:
        raise NnsslError(
            "The files do not tell what kind of images they are: say it, for example --modality CT or --modality MR, or name the "
            "dataset to be fine-tuned with -t."
        )
    names.pop("", None)
    kind = next(iter(counts))
    modality = next(iter(names)) if len(names) == 1 and kind not in names else NAMES.get(kind, kind)
    if silent:
        told = len(items) - silent
        log.info("Modality: %s, as %d of %d images say; the others do not tell theirs.", modality, told, len(items))
    return modality


def _channels(names: Sequence[str]) -> str:
    """``1 channel (MR)``."""
    return f"{counted(len(names), 'channel')} ({', '.join(names)})"
