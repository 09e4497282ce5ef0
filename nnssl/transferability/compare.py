"""Measures checkpoints of any number of runs on one dataset's images; what ``nnssl_transferability`` does, as a function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nnssl.errors import NnsslError, raise_problems
from nnssl.networks import build_network
from nnssl.paths import preprocessed_folder
from nnssl.plans import Plan, load_plan, resolve_dataset
from nnssl.preprocessed import list_cases
from nnssl.transferability.checkpoints import Run, group_runs, measure_checkpoints
from nnssl.transferability.crops import choose_cases, crop_size, read_crops
from nnssl.transferability.downstream import TISRow, read_dice, tis_rows
from nnssl.transferability.evaluator import RobustnessConfig, RobustnessEvaluator
from nnssl.transferability.monitor import random_baseline
from nnssl.transferability.report import plot_runs, write_robustness_csv, write_tis_csv
from nnssl.transferability.schedule import RANDOM_INITS
from nnssl.transferability.verdict import Baseline
from nnssl.transferability.views import choose_families


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        runs: checkpoints by run.
        baseline: random initialisations of the same network on the same crops.
        tis: TIS rows; empty without Dice.
        files: what was written.
    """

    runs: list[Run]
    baseline: Baseline
    tis: list[TISRow] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


def modality(plan: Plan) -> str:
    """``"ct"`` where all channels are normalised as CT, else ``"other"``."""
    return "ct" if all(s == "CTNormalization" for s in plan.normalization_schemes) else "other"


def make_evaluator(
    plan: Plan,
    *,
    cases: Sequence[str] | None = None,
    crops: int = 64,
    config: RobustnessConfig | None = None,
    size: Sequence[int] | None = None,
) -> RobustnessEvaluator:
    """Read one fixed crop of each of the dataset's preprocessed cases; labels are not touched.

    Args:
        plan: of the dataset.
        cases: names; all preprocessed cases of the dataset by default.
        crops: at most so many, chosen by a hash of their names.
        config: how to measure; for CT the views' families are replaced by those for CT.
        size: voxels per axis.

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
    found = read_crops([(folder, c) for c in chosen], plan, tuple(size or crop_size(plan)), seed=config.seed)
    return RobustnessEvaluator(found, config, spacing=plan.spacing)


def compare(
    dataset: int | str,
    checkpoints: Sequence[str | Path],
    *,
    configuration: str = "3d_fullres",
    plans: str = "nnUNetPlans",
    cases: Sequence[str] | None = None,
    crops: int = 64,
    random_inits: int = RANDOM_INITS,
    dice: str | Path | None = None,
    output: str | Path | None = None,
    device: str = "cpu",
    **measure: object,
) -> Comparison:
    """Measure checkpoints on a dataset's images, without labels.

    Args:
        dataset: number or name; its plan's network takes the weights as fine-tuning would.
        checkpoints: files of any number of runs.
        configuration, plans: of the dataset.
        cases: which of its cases; choose ones that no run was pretrained on.
        crops: at most so many cases, one crop each.
        random_inits: how many random initialisations to compare with.
        dice: CSV of downstream results, see :func:`~nnssl.transferability.downstream.read_dice`.
        output: folder for ``robustness.csv``, ``robustness.png`` and ``tis.csv``; nothing is written without it.
        device: ``"cpu"``, ``"cuda"`` or ``"mps"``.
        measure: fields of :class:`RobustnessConfig`.

    Raises:
        NnsslError: for everything that the user can mend.
    """
    if not checkpoints:
        raise NnsslError("no checkpoint to measure: name at least one.")
    if random_inits < 2:
        raise NnsslError(f"--random-inits must be at least 2 for a band, got {random_inits}.")
    results = read_dice(Path(dice)) if dice is not None else []
    plan = load_plan(resolve_dataset(dataset), configuration, plans)
    config = RobustnessConfig(**{"families": choose_families(modality(plan)), **measure})  # type: ignore[arg-type]
    evaluator = make_evaluator(plan, cases=cases, crops=crops, config=config)
    where = torch.device(device)
    measured, methods = measure_checkpoints(evaluator, plan, [Path(c) for c in checkpoints], where)
    runs = group_runs(measured, methods)
    baseline = random_baseline(evaluator, lambda: build_network(plan), k=random_inits, seed=config.seed, device=where)
    rows = tis_rows(runs, results) if results else []
    files = _write(Path(output), runs, baseline, rows) if output is not None else []
    return Comparison(runs, baseline, rows, files)


def _write(folder: Path, runs: list[Run], baseline: Baseline, rows: list[TISRow]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "robustness.csv", folder / "robustness.png"]
    write_robustness_csv(files[0], runs, baseline)
    plot_runs(files[1], runs, baseline)
    if rows:
        files.append(folder / "tis.csv")
        write_tis_csv(files[-1], rows)
    return files
