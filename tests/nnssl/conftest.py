"""A planned dataset; made-up label-efficiency experiments: numbers with known gains, ellipsoids, and jobs that pretend."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl.experiments import executor, report, run
from nnssl.experiments.executor import LocalBackend
from nnssl.experiments.experiment import load_experiment
from nnssl.experiments.graph import build_graph
from nnssl.experiments.options import Options
from nnssl.experiments.records import Records
from nnssl.plans import Plan

LABELS = ("Anterior", "Posterior")
METHODS = {
    "scratch": 0.0,
    "mae": 0.02,
    "hdense": 0.035,
    "macl": 0.055,
}  # gain at the fewest labels, halved at each next count
SHAPE, SPACING = (12, 28, 22), (2.5, 1.0, 1.25)  # (z, y, x), mm: thick slices
CASE_COLUMNS = (
    "method", "labels", "setting", "seed", "fold", "case", "label", "dice", "surface_dice", "hd95", "reference_voxels",
    "prediction_voxels",
)  # fmt: skip
RUN_COLUMNS = (
    "setting", "method", "labels", "seed", "fold", "epoch", "step", "pseudo_dice", "train_loss", "val_loss", "minutes"
)  # fmt: skip


def write_csv(file: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    with file.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, columns)
        writer.writeheader()
        writer.writerows(rows)


def _ellipsoid(centre, radii) -> np.ndarray:
    z, y, x = np.indices(SHAPE)
    return sum(((a - c) / r) ** 2 for a, c, r in zip((z, y, x), centre, radii)) <= 1


def _label_map(generator: np.random.Generator, error: float) -> np.ndarray:
    out = np.zeros(SHAPE, dtype=np.uint8)
    for value, y in ((1, 9), (2, 18)):
        shift = generator.normal(0, 1, 3) * error * np.array([4, 12, 12])
        out[_ellipsoid(np.array([6, y, 11]) + shift, np.array([4, 5, 6]) * (1 + error * generator.normal()))] = value
    return out


def _write(array: np.ndarray, file: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(tuple(reversed(SPACING)))
    sitk.WriteImage(image, str(file))


def _images(folder: Path, cases: list[str], settings: tuple[str, ...], seeds: int) -> None:
    generator = np.random.default_rng(5)
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    found, predictions = {}, []
    for case in cases:
        truth = _label_map(np.random.default_rng(int(case[-3:])), 0.03)
        scan = 300 + 120 * (truth == 1) + 200 * (truth == 2) + generator.normal(0, 35, SHAPE)
        _write(scan.astype(np.float32), data / f"{case}_0000.nii.gz")
        _write(truth, data / f"{case}.nii.gz")
        found[case] = {"image": str(data / f"{case}_0000.nii.gz"), "reference": str(data / f"{case}.nii.gz")}
    for setting in settings:
        for method in METHODS:
            out = folder / "predictions" / f"{setting or 'x'}_{method}"
            out.mkdir(parents=True)
            for case in cases:
                error = 0.06 + (0.06 if method == "scratch" else 0.0) + 0.01 * cases.index(case) / len(cases)
                _write(_label_map(np.random.default_rng(int(case[-3:]) + 1), error), out / f"{case}.nii.gz")
            predictions += [
                {"method": method, "labels": 4, "setting": setting, "seed": s, "fold": "0", "folder": str(out)}
                for s in range(seeds)
            ]
    content = {"cases": found, "labels": {n: i + 1 for i, n in enumerate(LABELS)}, "predictions": predictions}
    (folder / "images.json").write_text(json.dumps(content))


def _case_rows(counts, cases, settings, seeds) -> list[dict]:
    generator = np.random.default_rng(1)
    rows = []
    for setting in settings:
        hard = {case: generator.normal(0, 0.035) for case in cases}
        for seed in range(seeds):
            drawn = generator.normal(0, 0.012)
            for step, n in enumerate(counts):
                for method, gain in METHODS.items():
                    own = 0.60 + 0.075 * step + gain / 2**step + drawn / (step + 1) + generator.normal(0, 0.004)
                    for case in cases:
                        for i, label in enumerate(LABELS):
                            dice = float(np.clip(own + hard[case] - 0.03 * i + generator.normal(0, 0.018), 0, 1))
                            rows.append({
                                "method": method, "labels": n, "setting": setting, "seed": seed, "fold": "0", "case": case,
                                "label": label, "dice": f"{dice:.6f}", "surface_dice": f"{min(1, dice + 0.1):.6f}",
                                "hd95": f"{8 - 7 * dice:.4f}", "reference_voxels": 500, "prediction_voxels": 480,
                            })  # fmt: skip
    return rows


def _run_rows(counts, settings, seeds, epochs) -> list[dict]:
    generator = np.random.default_rng(2)
    rows = []
    for setting in settings:
        for step, n in enumerate(counts):
            for method, gain in METHODS.items():
                for seed in range(seeds):
                    for epoch in range(epochs):
                        speed = 9.0 if method == "scratch" else 9.0 - 80 * gain
                        final = 0.63 + 0.075 * step + gain / 2**step
                        dice = final * (1 - np.exp(-(epoch + 1) / speed)) + generator.normal(0, 0.008)
                        rows.append({
                            "setting": setting, "method": method, "labels": n, "seed": seed, "fold": "0", "epoch": epoch,
                            "step": (epoch + 1) * 50, "pseudo_dice": f"{max(0, dice):.5f}", "train_loss": f"{-dice:.5f}",
                            "val_loss": f"{-dice:.5f}", "minutes": f"{0.1 * (epoch + 1):.2f}",
                        })  # fmt: skip
    return rows


@pytest.fixture
def plan_of(tiny_plans, tiny_dataset_json):
    """``plan_of(configuration="3d_fullres", **tiny_plans)``: a Plan."""

    def make(configuration="3d_fullres", **options):
        return Plan.from_dicts(tiny_plans(**options), configuration, tiny_dataset_json(options.get("channels", 1)))

    return make


@pytest.fixture(scope="session")
def synthetic_experiment(tmp_path_factory) -> Callable[..., Path]:
    """Write a result folder: numbers of labels, of seeds, of cases, and the rows of ``cases.csv`` to keep."""

    def make(counts=(4, 8, 16), seeds=3, cases=12, settings=("",), images=False, keep=None, epochs=40) -> Path:
        folder = tmp_path_factory.mktemp("experiment")
        names = [f"phantom_{i:03d}" for i in range(cases)]
        rows = [r for r in _case_rows(counts, names, settings, seeds) if keep is None or keep(r)]
        write_csv(folder / "cases.csv", CASE_COLUMNS, rows)
        write_csv(folder / "runs.csv", RUN_COLUMNS, _run_rows(counts, settings, seeds, epochs))
        asked = {"methods": list(METHODS), "labels": list(counts), "seeds": list(range(seeds))}
        about = {
            "name": "phantoms", "title": "Phantoms with few labels", "minutes": 134.0, "started": "2026-01-05 10:00",
            "finished": "2026-01-05 12:14", "settings": [{"name": s, **asked} for s in settings],
            "commands": ["nnssl_label_efficiency phantoms.yaml"], "hardware": {"cpu": "made up", "cores": 2},
            "versions": {"nnssl": "0.1.0", "nnunetv2": "2.8.1"}, "notes": ["Made-up numbers: they only show how a report looks."],
        }  # fmt: skip
        (folder / "experiment.json").write_text(json.dumps(about))
        if images:
            _images(folder, names, settings, seeds)
        return folder

    return make


FAKE = """
import json, os, sys, time
control = sys.argv[1]
table = json.load(open(os.path.join(control, "table.json")))
command = [a for a in sys.argv[2:] if a != "--c"]
job = table[json.dumps(command)]
for path in job["resume"][-1:]:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(path, "w").write("begun")
if os.path.exists(os.path.join(control, "fail-" + job["id"])):
    print("out of memory, lower the batch")
    sys.exit(3)
begin = time.monotonic()
while os.path.exists(os.path.join(control, "hang-" + job["phase"])) and time.monotonic() < begin + 600:
    with open(os.path.join(control, "hanging.tmp"), "w") as file:
        file.write(job["id"])
    os.replace(os.path.join(control, "hanging.tmp"), os.path.join(control, "hanging"))
    time.sleep(0.01)
for path in job["outputs"]:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(path, "w").write("written by " + job["id"])
if job["phase"] == "evaluate":
    spec = json.load(open(command[1]))
    rows = [{"case": c["case"], "label": "liver", "dice": 0.5, "surface_dice": 0.5, "hd95": float("nan"),
             "reference_voxels": 9, "prediction_voxels": 8} for c in spec["cases"]]
    curve = [{"epoch": 0, "step": 3, "pseudo_dice": 0.1, "train_loss": 1.0, "val_loss": 2.0, "minutes": 0.5}]
    json.dump({"cases": rows, "curve": curve, "labels": {"liver": 1}}, open(spec["result"], "w"))
if job["id"] + "-incomplete" in os.listdir(control):
    os.unlink(job["outputs"][0])
"""


class Lab:
    """A tiny experiment with fake commands: a small program writes the files that each would write, hangs or fails."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.control = folder, folder / "out", folder / "control"
        self.control.mkdir()
        (self.control / "fake.py").write_text(FAKE)
        self.file = folder / "exp.yaml"
        self.write()

    def write(self, **changes: str) -> None:
        lines = {"dataset": 901, "methods": "[scratch, mae]", "labels": "[1]", "seeds": 1, "training": "{epochs: 2}"}
        lines["network"] = "{features: [4, 8, 12]}"
        self.file.write_text("".join(f"{k}: {v}\n" for k, v in {**lines, **changes}.items()))
        graph = self.graph()
        table = {
            json.dumps(list(j.command)): {"id": j.id, "phase": j.phase, "outputs": [str(p) for p in j.outputs],
                                          "resume": [str(p) for p in j.resume]}
            for j in graph.jobs.values()
        }  # fmt: skip
        (self.control / "table.json").write_text(json.dumps(table))

    def graph(self):
        return build_graph(load_experiment(self.file), self.out, "cpu")

    @property
    def launcher(self) -> list[str]:
        """What a job's command is appended to."""
        return [sys.executable, "-S", str(self.control / "fake.py"), str(self.control)]

    def run(self, backend=None, **options):
        backend = backend or LocalBackend(Records(self.out), {}, launcher=self.launcher)
        return run.run_experiment(Options(self.file, **{"device": "cpu", "output": self.out, **options}), backend)

    def starts(self, job_id: str) -> list[str]:
        file = self.out / "logs" / f"{job_id}.log"
        return [line for line in file.read_text().splitlines() if line.startswith("$ ")] if file.is_file() else []

    def rows(self, name: str) -> list[dict]:
        with (self.out / name).open(newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def lab(tiny_preprocessed, tmp_path, monkeypatch):
    tiny_preprocessed(901, "Tiny", 5, n_test=2)
    monkeypatch.setattr(executor, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(run, "need_surface_library", lambda: None)
    monkeypatch.setattr(report, "write", lambda folder, published=None: None)
    return Lab(tmp_path)


STRIDES = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2))
KERNELS = ((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))


@pytest.fixture
def folder(nnunet_env, tiny_plans, tiny_dataset_json) -> Path:
    """A planned dataset with a 2d and a 3d configuration, two plans files and no cases."""
    folder = nnunet_env.preprocessed / "Dataset004_Hippocampus"
    folder.mkdir()
    options = {"strides": STRIDES, "kernels": KERNELS, "patch": (16, 32, 24), "both": True, "dataset_name": folder.name}
    for arch, name in (("plain", "nnUNetPlans"), ("resenc", "nnUNetResEncUNetMPlans")):
        plans = tiny_plans(3, arch, plans_name=name, **options)
        kwargs = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        kwargs["n_conv_per_stage_decoder"] = [3, 2, 1]  # from the bottleneck up
        (folder / f"{name}.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(tiny_dataset_json()))
    return folder


@pytest.fixture
def save_pretrained() -> Callable[..., Path]:
    """``save_pretrained(path, plan)``: a checkpoint of random weights whose encoder counts as pretrained; returns its path."""

    from nnssl.networks import build_network
    from nnssl.weights import build_payload, save

    def make(path: Path, plan) -> Path:
        payload = build_payload(
            build_network(plan), plan, method="macl", config={}, crop_size=plan.patch_size, data={},
            pretrained_parts={"encoder": True, "decoder_stages": []},
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, payload)
        return path

    return make
