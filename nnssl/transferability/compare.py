"""Measures checkpoints of any number of runs on one dataset's images; what ``nnssl_transferability`` does, as a function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path

from nnssl.case_lists import read_case_list
from nnssl.config import option
from nnssl.errors import NnsslError, raise_problems
from nnssl.networks import build_network
from nnssl.options import as_function, check_seed, given
from nnssl.paths import preprocessed_folder
from nnssl.plans import Plan, load_plan, resolve_dataset
from nnssl.preprocessed import list_cases
from nnssl.transferability.checkpoints import Run, group_runs, measure_checkpoints
from nnssl.transferability.crops import choose_cases, crop_size, read_crops
from nnssl.transferability.downstream import TISRow, read_dice, tis_rows
from nnssl.transferability.evaluator import HOW, RobustnessConfig, RobustnessEvaluator
from nnssl.transferability.monitor import random_baseline
from nnssl.transferability.report import plot_runs, write_robustness_csv, write_tis_csv
from nnssl.transferability.schedule import RANDOM_INITS
from nnssl.transferability.verdict import Baseline
from nnssl.transferability.views import choose_families

WHICH = "which cases"


@dataclass(frozen=True)
class CompareOptions(RobustnessConfig):
    """What :func:`compare` takes, and ``nnssl_transferability`` with it."""

    dataset: int | str = given(..., WHICH, required=True, help="number or name of the target dataset")
    checkpoints: Sequence[str | Path] = given(
        ..., None, nargs="+", metavar="CKPT", help="checkpoints of any number of runs"
    )
    _: KW_ONLY
    configuration: str = given("3d_fullres", WHICH)
    plans: str = given("nnUNetPlans", WHICH)
    cases: str | Path | Sequence[str] | None = given(
        None, WHICH, help="text file of the cases to measure on, one a line"
    )
    crops: int = given(
        64, WHICH, "--crops", type=int, metavar="N", help="cases to measure on, one crop of each (default: 64)"
    )
    dice: str | Path | None = given(
        None,
        WHICH,
        "--dice",
        metavar="CSV",
        help="columns checkpoint, dice[, setup]: shows how well robustness ranks the checkpoints, beside simple guesses",
    )
    device: str = given("cpu", HOW, default="cuda")
    random_inits: int = given(
        RANDOM_INITS, HOW, default=RANDOM_INITS, help=f"random networks to compare with (default: {RANDOM_INITS})"
    )
    output: str | Path | None = given(
        None, HOW, help="folder for CSV and PNG (default: transferability_<Dataset> here; in Python none is written)"
    )
    families: tuple[str, ...] = option((), "kinds of change of the views; none: those for the images' modality")


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found; without Dice there are no TIS rows."""

    runs: list[Run]
    baseline: Baseline
    tis: list[TISRow]
    files: list[Path]


def modality(plan: Plan) -> str:
    """``"ct"`` where all channels are normalised as CT, else ``"other"``."""
    return "ct" if all(s == "CTNormalization" for s in plan.normalization_schemes) else "other"


def make_evaluator(
    plan: Plan, *, cases: Sequence[str] | None = None, crops: int = 64, config: RobustnessConfig | None = None
) -> RobustnessEvaluator:
    """Read one fixed crop of each of the dataset's preprocessed cases; labels are not touched.

    Args:
        plan: of the dataset.
        cases: names; all preprocessed cases of the dataset by default.
        crops: at most so many, chosen by a hash of their names.
        config: how to measure; by default with the changes for the images' modality.

    Raises:
        NnsslError: the dataset is not preprocessed, or a case is missing.
    """
    config = config or RobustnessConfig(families=choose_families(modality(plan)))
    folder = preprocessed_folder() / plan.dataset_name / plan.data_identifier
    names = list_cases(folder)
    if not names:
        number = int(plan.dataset_name[7:10])
        raise NnsslError(
            f"{plan.dataset_name} has no preprocessed cases in {folder}. "
            f"Type: nnUNetv2_preprocess -d {number} -plans_name {plan.plans_name} -c {plan.configuration}"
        )
    if cases is not None:
        known = set(names)
        raise_problems([f"case '{c}' is not in {folder}" for c in cases if c not in known], "--cases")
        names = list(dict.fromkeys(cases))
    chosen = choose_cases(names, crops, config.seed)
    if len(chosen) < 2:
        raise NnsslError(f"robustness compares cases: at least 2 are needed, {plan.dataset_name} offers {len(names)}.")
    found = read_crops([(folder, c) for c in chosen], plan, crop_size(plan), seed=config.seed)
    return RobustnessEvaluator(found, config, spacing=plan.spacing)


def _compare(asked: CompareOptions) -> Comparison:
    """Measure checkpoints on a dataset's images, without labels; choose cases (or name them) that no run was pretrained on.

    Returns:
        Runs, random initialisations, TIS, and the files written: none without ``output``.

    Raises:
        NnsslError: for everything that the user can mend.
    """
    if not asked.checkpoints:
        raise NnsslError("no checkpoint to measure: name at least one.")
    if asked.random_inits < 2:
        raise NnsslError(f"--random-inits must be at least 2 for a band, got {asked.random_inits}.")
    check_seed(asked.seed)
    results = read_dice(Path(asked.dice)) if asked.dice is not None else []
    plan = load_plan(resolve_dataset(asked.dataset), asked.configuration, asked.plans)
    how = {f.name: getattr(asked, f.name) for f in fields(RobustnessConfig)}
    config = RobustnessConfig(**{**how, "families": asked.families or choose_families(modality(plan))})
    cases = read_case_list(Path(asked.cases), "--cases") if isinstance(asked.cases, (str, Path)) else asked.cases
    evaluator = make_evaluator(plan, cases=cases, crops=asked.crops, config=config)
    runs = group_runs(measure_checkpoints(evaluator, plan, asked.checkpoints, asked.device))
    baseline = random_baseline(
        evaluator, lambda: build_network(plan), k=asked.random_inits, seed=config.seed, device=asked.device
    )
    rows = tis_rows(runs, results) if results else []
    files = _write(Path(asked.output), runs, baseline, rows) if asked.output is not None else []
    return Comparison(runs, baseline, rows, files)


compare = as_function("compare", CompareOptions, _compare)


def _write(folder: Path, runs: list[Run], baseline: Baseline, rows: list[TISRow]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "robustness.csv", folder / "robustness.png"]
    write_robustness_csv(files[0], runs, baseline)
    plot_runs(files[1], runs, baseline)
    if rows:
        files.append(folder / "tis.csv")
        write_tis_csv(files[-1], rows)
    return files
