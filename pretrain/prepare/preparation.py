"""Preprocessing without training, whole or in parts on many machines: what ``nnssl_pretrain --preprocess-only`` does."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from nnunetv2.configuration import default_num_processes

from nnssl.config import make_config
from nnssl.options import as_function
from nnssl.pretrain.data.weights import parse_sources
from nnssl.pretrain.methods import get_method
from nnssl.pretrain.prepare import prepare_bodies, prepare_sources
from nnssl.pretrain.prepare.parts import Part
from nnssl.pretrain.prepare.planning import planned
from nnssl.pretrain.prepare.request import PrepareOptions

log = logging.getLogger("nnssl")


@dataclass(frozen=True)
class Prepared:
    """What is preprocessed.

    Attributes:
        cases: good cases of the sources (of the part, where only one was asked for).
        bad: images that cannot be used, as ``"<case> (<file>): <reason>"``.
        reports: files that list them.
        folders: of the preprocessed cases.
    """

    cases: int
    bad: list[str] = field(default_factory=list)
    reports: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)


def prepare(asked: PrepareOptions) -> Prepared:
    """Preprocess pretraining images, and what the method needs beside them; a later :func:`nnssl.pretrain.run` finds them done.

    Every raw file's size and time are compared with what was preprocessed, so this is also the way to find images that were
    overwritten in place. An interrupted call is continued by the next. Several machines may work at a time: with ``part`` each
    takes its own cases; without, or on the same part, they go through the cases in different orders and pass over what another
    has finished. Where there are no plans, let one machine finish this call before others start.

    Returns:
        What is preprocessed.

    Raises:
        NnsslError: unknown names, images that cannot be used (all others are done by then), no space.
    """
    names = list(parse_sources(asked.sources)[0])
    part = Part.parse(asked.part) if isinstance(asked.part, str) else asked.part
    n_processes = asked.processes or default_num_processes
    plan = planned(names, asked)
    case_set = prepare_sources(
        plan,
        names,
        cases=Path(asked.cases) if asked.cases else None,
        exclude=Path(asked.exclude) if asked.exclude else None,
        skip_bad=asked.skip_bad,
        n_processes=n_processes,
        held_out=0.0,
        allow_mismatch=asked.allow_mismatch,
        thorough=True,
        part=part,
    )
    if asked.method is not None and case_set.cases:
        cls = get_method(asked.method)
        if cls.crops(plan, case_set.stats(), make_config(cls.Config, {})).body:
            prepare_bodies(plan, case_set, n_processes=n_processes, thorough=True)
    folders = sorted({case.folder for case in case_set.cases})
    what = "" if part is None else f" of part {part.index} of {part.of}"
    log.info("%d cases%s are preprocessed: %s", len(case_set.cases), what, ", ".join(map(str, folders)) or "none")
    return Prepared(len(case_set.cases), [str(b) for b in case_set.bad], list(case_set.reports), folders)


preprocess = as_function("preprocess", PrepareOptions, prepare)
