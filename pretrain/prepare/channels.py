"""Whether the channels of a source are those that the target's network was planned for."""

from __future__ import annotations

import logging
import re

from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

from nnssl.errors import NnsslError, raise_problems
from nnssl.plans import Plan
from nnssl.pretrain.prepare.raw import RawSource
from nnssl.words import counted

log = logging.getLogger("nnssl")

SPELLINGS = {
    "CT": "ct computedtomography cect ncct cta",
    "MR": "mr mri nmr magneticresonance magneticresonanceimaging",
    "PT": "pt pet positronemissiontomography fdgpet",
    "T1": "t1 t1w t1n t1weighted t1wi t1native mrt1 mrit1",
    "T1CE": "t1ce t1c t1gd t1cew t1wce t1post t1contrast t1contrastenhanced mrt1ce t1wgd",
    "T2": "t2 t2w t2weighted t2wi mrt2 mrit2",
    "FLAIR": "flair t2flair t2f flairw mrflair",
    "PD": "pd pdw protondensity",
    "DWI": "dwi diffusion diffusionweighted",
    "ADC": "adc adcmap",
    "US": "us ultrasound",
}
"""Name -> the usual spellings, in small letters and without signs between them."""

_NAMES = {spelling: name for name, spellings in SPELLINGS.items() for spelling in spellings.split()}
_MR = ("MR", "T1", "T1CE", "T2", "FLAIR", "PD", "DWI", "ADC")


def _name(text: str) -> str:
    """One spelling for each of a channel's usual names; others are left but for case and signs."""
    plain = re.sub(r"[\W_]+", "", text.casefold())
    return _NAMES.get(plain, plain or text.strip().casefold())


def same_name(one: str, other: str) -> bool:
    """Whether two channel names mean the same: ``MR`` and ``MRI``, ``T1w`` and ``t1``, ``T1ce`` and ``T1Gd``."""
    return _name(one) == _name(other)


def modality_of(text: str) -> str:
    """DICOM's code of the modality that a channel name means (``MRI`` and ``FLAIR``: ``"MR"``); empty where it is not known."""
    name = "MR" if _name(text) in _MR else _name(text)
    return name if name in SPELLINGS else ""


def match_channels(raw: RawSource, source: str, plan: Plan, *, allow_mismatch: bool) -> tuple[int, ...] | None:
    """Source channel for each target channel, or None where the files are to be taken as they are.

    With ``allow_mismatch`` other names are accepted: channels are then taken by name where all of the target's are there, else in
    order. Raises :class:`NnsslError` where names, order, count or modality differ without it, or nothing can be matched.
    """
    target, names = plan.channel_names, raw.channel_names
    clean = {c: _name(n) for c, n in names.items()}
    wanted = [_name(target[c]) for c in sorted(target)]
    if not names:
        shown = ", ".join(target.values())
        log.warning("%s has no dataset.json with channel names: its channels are taken for %s.", source, shown)
    problems = []
    if raw.n_channels != len(target):
        problems.append(f"{source} has {counted(raw.n_channels, 'channel')}, {plan.dataset_name} has {len(target)}")
    for c, name in names.items():
        if c < len(target) and clean[c] != wanted[c]:
            text = f"channel {c} is '{name}' in {source} and '{target[c]}' in {plan.dataset_name}"
            theirs, ours = get_normalization_scheme(name).__name__, plan.normalization_schemes[c]
            if (theirs == "CTNormalization") != (ours == "CTNormalization"):
                text += f" (another modality: {ours} of the target's plans is not meant for '{name}')"
            problems.append(text)
    if not problems:
        return None
    if not allow_mismatch:
        advice = "Give --allow-mismatch if the images are of the same kind all the same."
        raise_problems(problems, "Source and target differ in their channels", advice=advice)
    by_name = {n: c for c, n in clean.items()}
    if all(w in by_name for w in wanted) and len(set(wanted)) == len(wanted):
        log.warning("%s: channels are matched by name: %s.", source, ", ".join(names[by_name[w]] for w in wanted))
        return tuple(by_name[w] for w in wanted)
    if raw.n_channels != len(target):
        raise NnsslError(
            f"{problems[0]}, and they cannot be matched by name. A network reads a fixed number of channels."
        )
    log.warning("%s: %s. Going on, as asked by --allow-mismatch.", source, "; ".join(problems))
    return None
