"""What a probe can be asked for, stated once: parser, docs, record and the arguments of :func:`nnssl.probe.probe`.

Imports nothing heavy, so that ``nnssl_probe --help`` is there at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from nnssl.errors import NnsslError
from nnssl.options import given

CASES, HOW = "which cases", "how"


@dataclass(frozen=True)
class ProbeOptions:
    """What :func:`nnssl.probe.probe` takes, and ``nnssl_probe`` with it.

    Raises:
        NnsslError: a number out of its range.
    """

    dataset: int | str = given(..., CASES, required=True, help="number or name of the labelled dataset")
    checkpoints: Sequence[str | Path] = given(
        (),
        None,
        nargs="*",
        metavar="CKPT",
        help="file, folder of a run, or NAME=FILE (default: the one that the plan names and all finished pretrainings for it)",
    )
    _: KW_ONLY
    configuration: str = given("3d_fullres", CASES)
    plans: str = given("nnUNetPlans", CASES)
    fold: int | str = given("all", CASES, help="fold that the labelled cases come from (default: all)")
    labels: int | str | None = given(
        None,
        CASES,
        help="labelled cases: a number, a share, or a file (default: those of the plan variant, else all, at most 16)",
    )
    evaluate: str = given(
        "loo",
        CASES,
        "--evaluate",
        metavar="loo|val|FILE",
        help="leave each labelled case out once (loo, default); or fit on all and score the validation cases (val; of fold all: "
        "those that are not labelled), or the cases that a file names",
    )
    device: str = given("cpu", HOW, help="cuda, cpu or mps (default: cuda; in Python cpu)")
    random_inits: int = given(3, HOW)
    seed: int = given(0, HOW, help="random seed of labelled cases, voxels and random weights (default: 0)")
    step: float = given(
        0.75,
        HOW,
        "--step",
        type=float,
        metavar="SHARE",
        help="distance of sliding windows, as a share of the patch (default: 0.75)",
    )
    adapt: Mapping[str, str] | None = given(None, HOW, read=dict)
    coverage: float | None = given(None, HOW)
    output: str | Path | None = given(
        None,
        HOW,
        help="folder for probe.json, probe.csv and probe.png (default: probe_<Dataset> here; in Python none is written)",
    )

    def __post_init__(self) -> None:
        if self.random_inits < 1:
            raise NnsslError(f"--random-inits must be at least 1, got {self.random_inits}.")
        if not 0 < self.step <= 1:
            raise NnsslError(f"--step must lie in (0, 1], got {self.step}.")
