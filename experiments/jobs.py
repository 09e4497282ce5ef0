"""The jobs of an experiment: what is run, in which order, what each needs, and what shows that it is finished.

Names of plan variants, pretrainings and jobs end in a hash of everything that decides their result. So a file that is there is
the right one: nothing finished is repeated, and a changed experiment file never mixes with what an older one left.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnssl.experiments.cases import LabelSubset, Resolved
from nnssl.experiments.experiment import Arm
from nnssl.experiments.launch import typed

PHASES = ("network", "pretrain", "plan", "train", "predict", "evaluate")


@dataclass(frozen=True)
class Job:
    """One command in a process of its own.

    Attributes:
        id: also the stem of its record and log.
        needs: ids of jobs that come before.
        outputs: the job is finished once all are there.
        recorded: it is finished only where its record says so too (what it writes is not written atomically).
        resume: where one of these is there, the command gets ``--c``.
        about: method, labels, setting, seed, fold; of what it belongs to.
        amount: steps or cases, for the estimate of the time.
    """

    id: str
    phase: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    outputs: tuple[Path, ...] = ()
    recorded: bool = False
    resume: tuple[Path, ...] = ()
    gpu: bool = False
    about: dict[str, Any] = field(default_factory=dict)
    amount: float = 1.0

    @property
    def shown(self) -> str:
        """The command line as it can be typed."""
        return shlex.join(typed(self.command))


@dataclass(frozen=True)
class Run:
    """One fine-tuning and its evaluation: a method, a draw of labelled cases.

    ``name`` is the plan variant's, ``model`` and ``predictions`` are folders, ``result`` is what the evaluation writes, ``jobs``
    are the ids of all that it consists of, in order.
    """

    arm: Arm
    subset: LabelSubset
    resolved: Resolved
    name: str
    plans: str
    trainer: str
    model: Path
    predictions: Path
    result: Path = Path()
    jobs: tuple[str, ...] = ()

    @property
    def about(self) -> dict[str, Any]:
        """The columns that tell runs apart in tables."""
        d = self.subset
        return {
            "method": self.arm.name, "labels": d.count, "setting": self.resolved.name, "seed": d.seed, "fold": d.fold,
        }  # fmt: skip

    @property
    def fold(self) -> Path:
        """Folder of the trained fold."""
        return self.model / f"fold_{self.subset.fold}"

    @property
    def group(self) -> tuple[Any, ...]:
        """Runs that are compared with each other."""
        return (self.resolved.name, self.subset.count, self.subset.seed, self.subset.fold)


@dataclass
class Graph:
    """Everything that an experiment consists of.

    Attributes:
        jobs: by id, in the order in which they are started.
        texts: small files that jobs read: path -> content.
        inputs: folders of links to test images: folder -> (link name -> file).
    """

    jobs: dict[str, Job] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    texts: dict[Path, str] = field(default_factory=dict)
    inputs: dict[Path, dict[str, str]] = field(default_factory=dict)
    settings: list[Resolved] = field(default_factory=list)

    def add(self, job: Job) -> str:
        """Add a job unless it is there; returns its id."""
        self.jobs.setdefault(job.id, job)
        return job.id
