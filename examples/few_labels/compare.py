"""Which schedule, and does pretraining help with few labels? One checkpoint, several arms, several draws of the labelled cases.

For each seed the same cases and the same length of training, from plan variants that this script writes:

  default           nnUNetTrainerPretrained, warm-up and poly (below 25,000 steps Adam with 2e-3)
  freeze-unfreeze   nnUNetTrainerPretrainedFreezeUnfreeze
  scratch           the control of each of the two: the same schedule from random weights
  nnunet            nnU-Net's own recipe (SGD, 1e-2, poly, no warm-up) from random weights, on the same cases
  low-rate          the default by SGD with 1e-3, and its control

Arms that have a result are not trained again. The Dice is that of the validation cases, which no arm has trained on, or with
--test-images and --test-labels of those. Differences are paired by seed.

Usage: python examples/few_labels/compare.py -d 4 --checkpoint FILE --labels 4 --seeds 0 1 2 --epochs 20 -device cpu
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from nnssl.errors import NnsslError
from nnssl.paths import results_folder
from nnssl.plans import load_plan, resolve_dataset
from nnssl.plans.figures import trainer_for
from nnssl.weights import write_variant

SCRATCH = "nnUNetTrainerPretrainedScratch"
# kind of plan -> (schedule, its figures)
PLANS = {
    "warmuppoly": ("warmup_poly", {}),
    "freezeunfreeze": ("freeze_unfreeze", {}),
    "nnunet": ("warmup_poly", {"peak_lr": 0.01, "warmup": 0.0}),
    "low": ("warmup_poly", {"peak_lr": 0.001}),
}
# arm -> (kind of plan, whether it starts from the checkpoint)
ARMS = {
    "default": ("warmuppoly", True),
    "default-scratch": ("warmuppoly", False),
    "freeze-unfreeze": ("freezeunfreeze", True),
    "freeze-unfreeze-scratch": ("freezeunfreeze", False),
    "nnunet": ("nnunet", False),
    "low-rate": ("low", True),
    "low-rate-scratch": ("low", False),
}


def variant_of(args: argparse.Namespace, arm: str, seed: int) -> str:
    """The plans of an arm, written where they are not there yet. An arm and its control share a plan."""
    kind = ARMS[arm][0]
    schedule, figures = PLANS[kind]
    name = f"{args.name}-{kind}-n{Path(str(args.labels)).stem.rstrip('%')}-s{seed}"
    base = load_plan(args.d, args.c, args.p)
    asked = {
        "schedule": schedule,
        "figures": figures,
        "labels": args.labels,
        "seed": seed,
        "checkpoint": args.checkpoint,
    }
    lengths = {key: getattr(args, key) for key in ("epochs", "iterations", "val_iterations") if getattr(args, key)}
    plans = f"{args.p}_{name}"
    try:
        load_plan(args.d, args.c, plans)
    except NnsslError:
        write_variant(base, name, **asked, **lengths)
    return plans


def commands(args: argparse.Namespace, arm: str, plans: str) -> tuple[list[list[str]], Path]:
    """What is run for one arm, and the file that then holds its Dice."""
    kind, pretrained = ARMS[arm]
    trainer = trainer_for(PLANS[kind][0]) if pretrained else SCRATCH
    folder = results_folder() / resolve_dataset(args.d) / f"{trainer}__{plans}__{args.c}"
    train = ["nnUNetv2_train", str(args.d), args.c, args.fold, "-p", plans, "-tr", trainer, "-device", args.device]
    if not args.test_images:
        return [train], folder / f"fold_{args.fold}" / "validation" / "summary.json"
    out = folder / f"fold_{args.fold}" / "test"
    predict = [
        "nnUNetv2_predict",
        "-i",
        args.test_images,
        "-o",
        str(out),
        "-d",
        str(args.d),
        "-c",
        args.c,
        "-f",
        args.fold,
    ]
    predict += ["-p", plans, "-tr", trainer, "-device", args.device, *shlex.split(args.predict_options)]
    described = [str(folder / "dataset.json"), "-pfile", str(folder / "plans.json")]
    evaluate = ["nnUNetv2_evaluate_folder", args.test_labels, str(out), "-djfile", *described]
    return [train, predict, evaluate], out / "summary.json"


def dice_of(summary: Path) -> float:
    """Mean foreground Dice of nnU-Net's summary."""
    return float(json.loads(summary.read_text())["foreground_mean"]["Dice"])


def table(dice: dict[str, dict[int, float]]) -> str:
    """Mean, SD over seeds, and the paired difference to ``nnunet`` with its SD."""
    lines = [f"{'arm':<26}{'n':>4}{'Dice':>9}{'SD':>8}{'- nnunet':>11}{'SD':>8}"]
    for arm, values in dice.items():
        seeds = sorted(set(values) & set(dice.get("nnunet", {})))
        differences = [values[s] - dice["nnunet"][s] for s in seeds]
        cells = [_mean_sd(list(values.values())), _mean_sd(differences)]
        lines.append(f"{arm:<26}{len(values):>4}{cells[0][0]:>9}{cells[0][1]:>8}{cells[1][0]:>11}{cells[1][1]:>8}")
    return "\n".join(lines)


def _mean_sd(values: list[float]) -> tuple[str, str]:
    mean = f"{statistics.mean(values):.4f}" if values else "-"
    return mean, f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="labelled dataset")
    parser.add_argument("-c", default="3d_fullres")
    parser.add_argument("-p", default="nnUNetPlans", help="plans that the checkpoint was made for")
    parser.add_argument("-device", default="cuda")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument(
        "--labels", default="4", help="as nnssl_plan --labels; {seed} in it is replaced, for files of cases"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fold", default="0")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS)[:5])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--val-iterations", type=int)
    parser.add_argument("--test-images")
    parser.add_argument("--test-labels")
    parser.add_argument(
        "--predict-options", default="", help='for nnUNetv2_predict, for example "--disable_tta -step_size 0.75"'
    )
    parser.add_argument("--name", default="few", help="begins the names of the plan variants")
    parser.add_argument("--csv", type=Path, default=Path("few_labels.csv"))
    parser.add_argument("--dry-run", action="store_true", help="only show the commands")
    args = parser.parse_args(argv)
    if bool(args.test_images) != bool(args.test_labels):
        parser.error("--test-images and --test-labels belong together")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    dice: dict[str, dict[int, float]] = {arm: {} for arm in args.arms}
    asked = str(args.labels)
    for seed in args.seeds:
        args.labels = asked.replace("{seed}", str(seed))
        for arm in args.arms:
            todo, summary = commands(args, arm, variant_of(args, arm, seed))
            for command in [] if summary.is_file() else todo:
                print("$", " ".join(command), flush=True)
                if not args.dry_run:
                    subprocess.run(command, check=True)
            if summary.is_file():
                dice[arm][seed] = dice_of(summary)
    if args.dry_run:
        return 0
    with open(args.csv, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "labels", "seed", "dice"])
        writer.writerows([arm, asked, seed, value] for arm, values in dice.items() for seed, value in values.items())
    print(table(dice))
    return 0


if __name__ == "__main__":
    sys.exit(main())
