"""Preprocessing without training, whole or in parts on many machines: what ``nnssl_pretrain --preprocess-only`` does."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunetv2.configuration import default_num_processes

from nnssl.config import make_config
from nnssl.plans import Plan
from nnssl.pretrain.data.weights import parse_sources
from nnssl.pretrain.methods import get_method
from nnssl.pretrain.options import Sources
from nnssl.pretrain.prepare import prepare_bodies, prepare_sources
from nnssl.pretrain.prepare.parts import Part
from nnssl.pretrain.prepare.planning import planned
from nnssl.pretrain.types import SourceStats

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


def preprocess(
    sources: Sources,
    *,
    target: int | str | None = None,
    configuration: str = "3d_fullres",
    plans: str = "nnUNetPlans",
    method: str | None = None,
    part: str | Part | None = None,
    cases: str | Path | None = None,
    exclude: str | Path | None = None,
    skip_bad: bool = False,
    allow_mismatch: bool = False,
    processes: int | None = None,
    planner: str | None = None,
    gpu_memory_target: float | None = None,
) -> Prepared:
    """Preprocess pretraining images; a later :func:`nnssl.pretrain.run` finds them done.

    Every raw file's size and time are compared with what was preprocessed, so this is also the way to find images that were
    overwritten in place. An interrupted call is continued by the next. Several machines may work at a time: with ``part`` each
    takes its own cases; without, or on the same part, they go through the cases in different orders and pass over what another
    has finished.

    Args:
        sources, target, configuration, plans, cases, exclude, skip_bad, allow_mismatch: see :func:`nnssl.pretrain.run`.
        method: objective that will be trained; also prepares what it needs beside the images (body masks).
        part: ``"3/8"``: only the third of eight parts of the cases.
        processes: nnU-Net's default unless given.
        planner, gpu_memory_target: see :func:`nnssl.pretrain.run`. Where there are no plans, let one machine finish this call
            before others start.

    Raises:
        NnsslError: unknown names, images that cannot be used (all others are done by then), no space; see
            :func:`nnssl.pretrain.prepare.prepare_sources`.
    """
    names = list(parse_sources(sources)[0])
    share = Part.parse(part) if isinstance(part, str) else part
    n_processes = processes or default_num_processes
    planning: dict[str, Any] = {"planner": planner, "gpu_memory_target": gpu_memory_target, "n_processes": n_processes}
    plan = planned(names, target, configuration, plans, **planning)
    case_set = prepare_sources(
        plan,
        names,
        cases=Path(cases) if cases else None,
        exclude=Path(exclude) if exclude else None,
        skip_bad=skip_bad,
        n_processes=n_processes,
        held_out=0.0,
        allow_mismatch=allow_mismatch,
        thorough=True,
        part=share,
    )
    if method is not None and case_set.cases and _needs_bodies(plan, method, case_set.stats()):
        prepare_bodies(plan, case_set, n_processes=n_processes, thorough=True)
    folders = sorted({case.folder for case in case_set.cases})
    what = "" if share is None else f" of part {share.index} of {share.of}"
    log.info("%d cases%s are preprocessed: %s", len(case_set.cases), what, ", ".join(map(str, folders)) or "none")
    return Prepared(len(case_set.cases), [str(b) for b in case_set.bad], list(case_set.reports), folders)


def _needs_bodies(plan: Plan, method: str, stats: SourceStats) -> bool:
    """Whether an objective, with its default options, looks at body masks."""
    cls = get_method(method)
    return cls.crops(plan, stats, make_config(cls.Config, {})).body
