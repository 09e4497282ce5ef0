"""From the results of transferability.yaml to the table that `nnssl_transferability --dice` reads: one line per fine-tuning.

Usage: python checkpoint_dice.py EXPERIMENT.yaml OUT/cases.csv --setting ACDC > dice.csv
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from nnssl.experiments.experiment import SCRATCH, load_experiment
from nnssl.experiments.scores import read_scores
from nnssl.experiments.statistics import seed_means


def rows(experiment: Path, cases: Path, setting: str | None = None) -> list[tuple[str, str, str, str]]:
    """Checkpoint (or scratch), Dice in percent, setup and seed of each fine-tuning that has been evaluated."""
    arms = {arm.name: arm for s in load_experiment(experiment).settings for arm in s.arms if setting in (None, s.name)}
    scores, out = read_scores(cases.parent, {}), []
    for key, cell in scores.cells.items():
        if key.method not in arms or setting not in (None, key.setting):
            continue
        checkpoint = SCRATCH if key.method == SCRATCH else str(arms[key.method].checkpoint)
        for seed, dice in seed_means(cell["dice"]).dropna().items():
            out.append((checkpoint, f"{100 * dice:.4f}", f"{key.setting}, {key.labels} labels", str(seed)))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--setting")
    args = parser.parse_args()
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerows([("checkpoint", "dice", "setup", "seed"), *rows(args.experiment, args.cases, args.setting)])


if __name__ == "__main__":
    main()
