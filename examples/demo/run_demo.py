"""The main job from end to end on phantoms and a CPU, with one labelled scan and 32 without labels: pretrain, train, compare.

Each step is a command that can be typed; it is shown, timed and logged. Everything is written below one folder (``demo``),
which each run makes anew. ``--quick`` only shows that the commands work: its networks learn nothing.

Usage: python examples/demo/run_demo.py [--folder demo] [--quick]
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from phantoms import LABELLED  # noqa: E402
from report import dice_of, summary, write_pictures  # noqa: E402
from runner import Runner, Step, StepFailed, clock, groups  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MARKER = ".nnssl-demo"
MADE = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "predictions", "pictures", "logs", "report.txt")
TRAINERS = {"pretrained": "nnUNetTrainerPretrainedMeanTeacher", "scratch": "nnUNetTrainerPretrainedScratch"}
CONFIGURATION, PLANS, FOLD = "3d_fullres", "nnUNetPlans_cpu", "0"

# For machines with few cores, and only after planning: nnU-Net's planner does not accept 0. Threads that wait shall sleep:
# where something else uses a core, spinning ones make each step ten times as long.
FEW_PROCESSES = {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "OMP_WAIT_POLICY": "PASSIVE"}

# Cases: labelled, unlabelled, test. Lengths: epochs x iterations.
FULL = {"cases": (5, 32, 8), "pretrain": (8, 50), "finetune": (18, 100), "val": 2}
QUICK = {"cases": (5, 6, 2), "pretrain": (1, 2), "finetune": (2, 2), "val": 1}


def steps(folder: str, size: dict, phantoms: str = "examples/demo/phantoms.py", seed: int = 0) -> list[Step]:
    """The commands in order. ``folder`` and ``phantoms`` are as seen from the working directory."""
    labelled, unlabelled, test = map(str, size["cases"])
    raw, results = f"{folder}/nnUNet_raw", f"nnUNet_results/{LABELLED}"
    pretrain_epochs, pretrain_iterations = map(str, size["pretrain"])
    epochs, iterations = map(str, size["finetune"])
    out = [
        Step(
            "phantoms",
            f"Make {labelled} labelled, {unlabelled} unlabelled and {test} test volumes",
            ["python", phantoms, raw, "--labelled", labelled, "--unlabelled", unlabelled, "--test", test]
            + (["--seed", str(seed)] if seed else []),
            result="nnUNet_raw",
        ),
        Step(
            "plan",
            "nnU-Net plans and preprocesses the labelled dataset",
            ["nnUNetv2_plan_and_preprocess", "-d", "901", "-c", CONFIGURATION, "--verify_dataset_integrity"]
            + ["-npfp", "2", "-np", "2"],
            result=f"nnUNet_preprocessed/{LABELLED}",
        ),
        Step(
            "small_plan",
            "Derive a plan: one labelled case, a small network and a short training, so that a CPU can do it",
            ["nnssl_plan", "-d", "901", "-c", CONFIGURATION, "-p", "nnUNetPlans", "--name", "cpu"]
            + ["--features", "8,16,32", "--patch", "24,32,32", "--labels", "1", "--schedule", "mean-teacher"]
            + ["--epochs", epochs, "--iterations", iterations, "--val-iterations", str(size["val"])],
            result=f"nnUNet_preprocessed/{LABELLED}/{PLANS}.json",
        ),
        Step(
            "pretrain",
            "Pretrain this plan's network on the unlabelled dataset",
            ["nnssl_pretrain", "-d", "900", "-t", "901", "-m", "mae", "-c", CONFIGURATION, "-p", PLANS]
            + ["-device", "cpu", "--epochs", pretrain_epochs, "--iterations", pretrain_iterations]
            + ["-o", "preset=adamw", "lr=2e-3", "batch_size=4", "block=4,4,4"],
            FEW_PROCESSES,
            f"{results}/nnssl*",
        ),
    ]
    for name, trainer in TRAINERS.items():
        how = "from the pretrained weights, and goes on learning from the scans without labels"
        if name == "scratch":
            how = "from random weights on the labels only, as many steps"
        out.append(
            Step(
                f"train_{name}",
                f"nnU-Net trains {how}",
                ["nnUNetv2_train", "901", CONFIGURATION, FOLD, "-tr", trainer, "-p", PLANS, "-device", "cpu"],
                {} if name == "scratch" else {"OMP_NUM_THREADS": str(max(1, cores() // 2))},
                f"{results}/{trainer}__{PLANS}__{CONFIGURATION}",
                beside=name == "scratch",
            )
        )
    for name, trainer in TRAINERS.items():
        out.append(
            Step(
                f"predict_{name}",
                f"nnU-Net predicts the test volumes ({name})",
                ["nnUNetv2_predict", "-d", "901", "-c", CONFIGURATION, "-f", FOLD, "-tr", trainer, "-p", PLANS]
                + ["-i", f"{raw}/{LABELLED}/imagesTs", "-o", f"{folder}/predictions/{name}", "-device", "cpu"]
                + ["-npp", "1", "-nps", "1"],
                result=f"predictions/{name}",
            )
        )
    for name in TRAINERS:
        out.append(
            Step(
                f"evaluate_{name}",
                f"nnU-Net evaluates the predictions ({name})",
                ["nnUNetv2_evaluate_folder", f"{raw}/{LABELLED}/labelsTs", f"{folder}/predictions/{name}"]
                + ["-djfile", f"{raw}/{LABELLED}/dataset.json", "-np", "1"]
                + ["-pfile", f"{folder}/nnUNet_preprocessed/{LABELLED}/{PLANS}.json"],
                result=f"predictions/{name}/summary.json",
            )
        )
    return out


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare(folder: Path) -> None:
    """Empty the demo's folder, but only one that an earlier demo has made."""
    present = [name for name in MADE if (folder / name).exists()]
    if present and not (folder / MARKER).is_file():
        sys.exit(f"{folder} holds {', '.join(present)} but was not made by the demo: choose another --folder.")
    for name in present:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("Made by examples/demo/run_demo.py, which empties this folder at its start.\n")
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (folder / name).mkdir()


def environment(folder: Path, shown: str) -> dict[str, str]:
    """The environment of the commands; what has to be exported is printed as it would be typed."""
    from nnssl.trainers.cli import export_line
    from nnssl.trainers.discovery import activate, is_active, shim_folder

    if not is_active(shim_folder()):
        print(export_line())
        activate()
    env = dict(os.environ)
    env["PATH"] = str(Path(sys.executable).parent) + os.pathsep + env.get("PATH", "")
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        env[name] = str(folder / name)
        print(f"export {name}=$PWD/{shown}/{name}")
    for name in FEW_PROCESSES:
        env.pop(name, None)
    env["PYTHONUNBUFFERED"] = "1"
    return env


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "demo", help="where everything is written (default: demo)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which phantoms (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two steps of everything: only shows that it works")
    args = parser.parse_args()
    folder, size = args.folder.resolve(), QUICK if args.quick else FULL
    shown, phantoms = folder.name, Path(__file__).resolve().with_name("phantoms.py")
    prepare(folder)
    todo = steps(shown, size, str(phantoms.relative_to(ROOT) if folder.parent == ROOT else phantoms), args.seed)
    runner = Runner(folder.parent, folder / "logs", environment(folder, shown), len(todo))
    start = time.monotonic()
    try:
        for together in groups(todo):
            runner.run(*together)
    except StepFailed as error:
        print(f"\nThe demo stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    dice = {name: dice_of(folder / "predictions" / name / "summary.json") for name in TRAINERS}
    pictures = write_pictures(folder, dice)
    total = time.monotonic() - start
    rows = []
    for step in todo:
        found = sorted(folder.glob(step.result))
        where = runner.relative(found[0]) if found else f"{shown}/{step.result} is missing"
        rows.append((step.title, clock(runner.seconds[step.name]), where))
    rows.append(("Everything", clock(total), runner.relative(folder)))
    text = summary(rows, dice, [runner.relative(p) for p in pictures])
    print("\n" + text)
    (folder / "report.txt").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
