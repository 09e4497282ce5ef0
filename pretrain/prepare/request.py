"""What preparing can be asked for, stated once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from nnunetv2.configuration import default_num_processes

from nnssl.config import option
from nnssl.plans import Plan
from nnssl.pretrain.options import Sources, as_in_run
from nnssl.pretrain.prepare.parts import Part


@dataclass(frozen=True)
class PrepareOptions:
    """What :func:`nnssl.pretrain.preprocess` takes, and ``nnssl_pretrain --preprocess-only`` with it."""

    sources: Sources = as_in_run("sources")
    _: KW_ONLY
    target: int | str | None = as_in_run("target")
    configuration: str = as_in_run("configuration")
    plans: str = as_in_run("plans")
    method: str | None = as_in_run("method", default=None)
    part: str | Part | None = option(None, '``"3/8"``: only the third of eight parts of the cases')
    cases: str | Path | None = as_in_run("cases")
    exclude: str | Path | None = as_in_run("exclude")
    skip_bad: bool = as_in_run("skip_bad")
    allow_mismatch: bool = as_in_run("allow_mismatch")
    processes: int | None = as_in_run("processes")
    planner: str | None = as_in_run("planner")
    gpu_memory_target: float | None = as_in_run("gpu_memory_target")


@dataclass(frozen=True)
class SourceRequest:
    """What :func:`nnssl.pretrain.prepare.prepare_sources` takes: which cases of which datasets, and how they are prepared."""

    plan: Plan = field(metadata={"help": "of the target"})
    sources: Sequence[str] = field(metadata={"help": "dataset names"})
    _: KW_ONLY
    cases: Path | None = option(None, "file of ``--cases``: only these")
    exclude: Path | None = option(None, "file of ``--exclude``: not these")
    skip_bad: bool = option(False, "go on without images that cannot be used")
    n_processes: int | None = option(
        None, "for preprocessing; 0 and 1 work in this process. nnU-Net's default where None"
    )
    held_out: float = option(0.05, "share of the cases that only the held-out loss sees")
    allow_mismatch: bool = option(False, "accept other channel names, order or modality than the target's")
    preprocess: bool = option(
        True, "False writes nothing; cases that are not preprocessed are in the set, counted in ``CaseSet.pending``"
    )
    thorough: bool = option(
        False,
        "look at every raw and preprocessed file, also where an earlier start did and folders have not changed since",
    )
    part: Part | None = option(
        None,
        "take only this part of the cases, for preprocessing by many machines; test images and duplicates are not looked for",
    )

    @property
    def processes(self) -> int:
        """With nnU-Net's default filled in."""
        return default_num_processes if self.n_processes is None else self.n_processes

    @property
    def whole(self) -> bool:
        """Whether all of the cases are being preprocessed."""
        return self.preprocess and self.part is None
