"""Whether the channels of a source are those that the target's network was planned for."""

from __future__ import annotations

import logging

from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

from nnssl.errors import NnsslError, raise_problems
from nnssl.plans import Plan
from nnssl.pretrain.prepare.raw import RawSource

__all__ = ["match_channels"]

log = logging.getLogger("nnssl")


def match_channels(raw: RawSource, source: str, plan: Plan, *, allow_mismatch: bool) -> tuple[int, ...] | None:
    """Decide which channel of the source feeds which input channel of the target.

    Args:
        raw: the source's images.
        source: its name.
        plan: of the target.
        allow_mismatch: accept other names: channels are then taken by name where all of the target's are there, else in order.

    Returns:
        Source channel for each target channel, or None where the files are to be taken as they are.

    Raises:
        NnsslError: names, order, count or modality differ and ``allow_mismatch`` is False, or nothing can be matched.
    """
    target, names = plan.channel_names, raw.channel_names
    clean = {c: n.strip().casefold() for c, n in names.items()}
    wanted = [target[c].strip().casefold() for c in sorted(target)]
    if not names:
        log.warning(
            "%s has no dataset.json with channel names: its channels are taken for %s.",
            source,
            ", ".join(target.values()),
        )
    problems = []
    if raw.n_channels != len(target):
        problems.append(f"{source} has {raw.n_channels} channel(s), {plan.dataset_name} has {len(target)}")
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
        problems.append("give --allow-mismatch if the images are of the same kind all the same")
        raise_problems(problems, "Source and target differ in their channels")
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
