"""What a pretraining can be asked for, stated once: parser, docs, record and the signature of :func:`nnssl.pretrain.run`.

Imports nothing heavy, so that ``nnssl_pretrain --help`` is there at once.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nnssl.config import parse_assignments
from nnssl.grammar import SHARED, whole_numbers
from nnssl.options import asked, command_fields, given

if TYPE_CHECKING:
    from nnssl.pretrain.engine.hooks import Hook

Sources = int | str | Sequence[int | str] | Mapping[int | str, float]
"""A dataset, several, or several with weights; text may carry a weight, ``"500:8"``."""

WHAT, LENGTH, START = "what is learnt from what", "how long, and under which name", "weights to start from"
PLANNING = "datasets that nnU-Net cannot plan, since they have no labels"
MACHINE = "machine"
LABELLED = "labels as well"


@dataclass(frozen=True)
class RunOptions:
    """What :func:`nnssl.pretrain.run` takes, and ``nnssl_pretrain`` with it."""

    sources: Sources = given(
        ...,
        WHAT,
        "-d",
        metavar="DATASET",
        nargs="+",
        help="datasets to learn from, numbers or names; their labels are never used. 500:8 501:1 draws each case of 500 eight "
        "times as often as each of 501",
    )
    _: KW_ONLY
    method: str = given(
        "macl", WHAT, "-m", metavar="METHOD", help="objective; --list names them. Or a file of your own: ./simclr.py"
    )
    target: int | str | None = given(
        None,
        WHAT,
        "-t",
        metavar="TARGET",
        help="dataset that will be fine-tuned: its plans are used (default: that of -d)",
    )
    configuration: str = given("3d_fullres", WHAT)
    plans: str = given("nnUNetPlans", WHAT, help="plans of the target (default: nnUNetPlans)")
    options: Mapping[str, Any] | None = given(
        None,
        WHAT,
        "-o",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        read=parse_assignments,
        help="options of the objective and of the loop, and preset=NAME; --list -m METHOD shows them",
    )
    crop: Sequence[int] | None = given(
        None,
        WHAT,
        "--crop",
        metavar="Z,Y,X",
        type=whole_numbers,
        help="pretraining crop in voxels (default: the method's choice)",
    )
    cases: str | Path | None = given(None, WHAT, help="text file of the cases to learn from, one a line")
    exclude: str | Path | None = given(
        None, WHAT, "--exclude", metavar="FILE", help="text file of cases to leave out, one a line"
    )
    skip_bad: bool = given(
        False,
        WHAT,
        "--skip-bad",
        action="store_true",
        help="go on without images that cannot be used; a report names them",
    )
    allow_mismatch: bool = given(
        False,
        WHAT,
        "--allow-mismatch",
        action="store_true",
        help="accept that channels or modality of the images and of the target differ",
    )
    epochs: int | None = given(
        None, LENGTH, help="epochs (default: 200); more of them lengthen a finished run with --c"
    )
    iterations: int | None = given(None, LENGTH, help="optimiser steps of an epoch (default: 250)")
    seed: int | None = given(
        None, LENGTH, default=None, help="random seed of initialisation, sampling and views (default: 0)"
    )
    name: str | None = given(None, LENGTH, help="part of the folder's name: distinguishes runs that would share one")
    continue_run: bool | Literal["auto"] = field(
        default=False,
        metadata={
            "help": "resume the run in the output folder with its saved configuration; with more epochs than it had, lengthen "
            "it. ``'auto'``: resume this very run where it has a checkpoint, else start it"
        },
    )
    dry_run: bool = given(False, LENGTH, help="print crop, batch, memory and time, and end")
    robustness_every: int | None = given(
        None,
        LENGTH,
        "--robustness-every",
        metavar="K",
        type=int,
        help="epochs between two measurements of robustness (whether two altered copies of a case are closer to each other than "
        "to other cases), 0: none (default: so many that they take 3 % of the time)",
    )
    stop: str | None = given(
        None,
        LENGTH,
        "--stop",
        choices=("robustness",),
        help="end once robustness has not improved for five measurements",
    )
    device: str = given("cuda", MACHINE, help="cuda (default), cpu or mps")
    processes: int | None = given(None, MACHINE, help="processes for preprocessing (default: nnU-Net's)")
    logger: str | Sequence[str] | None = given(
        None,
        MACHINE,
        "--logger",
        metavar="NAME",
        nargs="+",
        help="show the run's numbers in tensorboard, wandb or mlflow too; none: in no program (default: those of the variable "
        "nnssl_logger, else tensorboard where it is installed)",
    )
    init: str | Path | None = given(
        None,
        START,
        "--init",
        metavar="FILE",
        help="start from these weights: of a pretraining, of MIC-DKFZ's nnssl, of nnU-Net, or of its network in files of others",
    )
    adapt: Mapping[str, Any] | None = given(None, START, read=dict)
    coverage: float | None = given(None, START)
    key: str | None = given(None, START)
    prefix: str | None = given(None, START)
    labelled: int | str | None = given(
        None,
        LABELLED,
        "--labelled",
        metavar="DATASET",
        help="learn from the labels of this dataset too, and later from pseudo-labels of the images; it is the target. Options: "
        "-o omni.KEY=VALUE",
    )
    labelled_cases: str | Path | None = given(
        None,
        LABELLED,
        "--labelled-cases",
        metavar="FILE",
        help="text file of the cases whose labels are learnt from, one a line; 'case: class, class' where only these classes are "
        "annotated",
    )
    planner: str | None = given(
        None,
        PLANNING,
        "--planner",
        metavar="NAME",
        help="which of nnU-Net's planners makes the plans from the images alone: default, resenc_m, resenc_l, resenc_xl",
    )
    gpu_memory_target: float | None = given(
        None,
        PLANNING,
        "-gpu_memory_target",
        metavar="GB",
        type=float,
        help="GPU memory that this planner fills (its default)",
    )
    hooks: Sequence[Hook] = field(
        default=(), metadata={"help": "more watchers of the run (:class:`nnssl.pretrain.engine.hooks.Hook`)"}
    )

    def asked(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON-ready values: for the run's record."""
        return asked(self, without=("hooks", "continue_run", "dry_run"))


def as_in_run(name: str, **changes: Any) -> Any:
    """A field that :class:`RunOptions` has too, with another default where one is given."""
    known = next(f for f in fields(RunOptions) if f.name == name)
    return field(**{"default": known.default, "metadata": known.metadata, **changes})


def command_of(options: RunOptions) -> str:
    """The command line that asks for the same, with every option that differs from its default."""
    words = ["nnssl_pretrain"]
    for f in command_fields(options):
        value = getattr(options, f.name)
        if f.name != "method" and (value is None or value is False or value == f.default) or f.name == "dry_run":
            continue
        names = f.metadata["names"] or (SHARED[f.name].name,)
        words.append(names[-1])
        words += [] if value is True else _words(f.name, value)
    return shlex.join(words)


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, Mapping):
        sign = ":" if name == "sources" else "="
        return [f"{k}{sign}{_text(v)}" for k, v in value.items()]
    if name == "crop":
        return [",".join(map(str, value))]
    if name in ("cases", "exclude", "labelled_cases", "init") or (name == "method" and value.endswith(".py")):
        return [os.path.abspath(os.path.expanduser(value))]  # typed in another folder it names the same file
    return [_text(v) for v in value] if isinstance(value, (list, tuple)) else [_text(value)]


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(_text, value))
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
