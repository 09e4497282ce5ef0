"""Damage to what a run has saved."""

# ruff: noqa: D101, D102, D103
from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fault_kinds.lab import DAMAGES, LAB, continues, expect, folder, go

import torch  # isort: skip


@contextlib.contextmanager
def stopped(name: str) -> Iterator[Path]:
    """The folder of a run with two checkpoints, ended by itself after the second epoch."""
    from nnssl.pretrain.engine.loop import Engine

    save = Engine.save

    def end(self: Engine, **options: Any) -> None:
        save(self, **options)
        if self.step == 12:
            raise KeyboardInterrupt

    with patch.object(Engine, "save", end):
        expect(go(name), 130, "Stopped")
    yield folder(name)


for kind, damage in DAMAGES.items():

    def latest(kind: str = kind, damage: Callable[[Path], object] = damage) -> None:
        with stopped(f"latest-{kind}") as where:
            damage(where / "checkpoint_latest.pth")
            continues(f"latest-{kind}", words="Going on from the checkpoint before it.*Continuing after step")

    LAB.add(f"checkpoint_latest.pth: {kind}")(latest)


@LAB.add("checkpoint_latest.pth and the one before it damaged")
def _both() -> None:
    with stopped("both") as where:
        for file in ("latest", "previous"):
            DAMAGES["garbage"](where / f"checkpoint_{file}.pth")
        expect(go("both", "--c"), 1, "Error: .*checkpoint_latest.pth.*No other checkpoint of this run is left")


@LAB.add("the checkpoint of a run with another seed")
def _other_seed() -> None:
    expect(go("seed5", "--seed", "5"), 0, "Weights:")
    with stopped("seed0") as where:
        shutil.copyfile(folder("seed5") / "checkpoint_latest.pth", where / "checkpoint_latest.pth")
        expect(go("seed0", "--c"), 1, "belongs to a run with another configuration.*seed: 5 in the checkpoint, 0 now")


for part in ("nnssl_training", "stepper", "rng", "history", "shapes", "step"):

    def without(part: str = part) -> None:
        with stopped(f"part-{part}") as where:
            file = where / "checkpoint_latest.pth"
            content = torch.load(file, weights_only=True)
            if part == "nnssl_training":
                del content[part]
            elif part == "shapes":
                content["network_weights"] = {k: v[:1] for k, v in content["network_weights"].items()}
            elif part == "step":
                content["nnssl_training"]["step"] = "many"
            else:
                del content["nnssl_training"][part]
            torch.save(content, file)
            words = {"shapes": "network_weights", "step": "step"}.get(part, part)
            expect(go(f"part-{part}", "--c"), 1, f"Error: .*checkpoint_latest.pth.*{words}")

    LAB.add(f"a checkpoint with another or no part: {part}")(without)

for place, value in {
    ("identity", "epochs"): "many",
    ("identity", "options"): 3,
    ("identity", "crop"): {"size": "big"},
    ("identity", "seed"): -1.5,
    ("identity",): [],
    ("identity", "weights"): 7,
}.items():

    def record(place: tuple[str, ...] = place, value: Any = value) -> None:
        name = "record-" + "-".join(place)
        with stopped(name) as where:
            file = where / "config.json"
            content = json.loads(file.read_text())
            at = content
            for k in place[:-1]:
                at = at[k]
            at[place[-1]] = value
            file.write_text(json.dumps(content))
            expect(go(name, "--c"), 1, rf"Error: .*config.json.*'{'.'.join(place)}[^']*' must be")

    LAB.add(f"config.json with {'.'.join(place)} = {value!r}")(record)


@LAB.add("config.json that is no JSON")
def _no_json() -> None:
    with stopped("nojson") as where:
        (where / "config.json").write_text('{"schema": 1,')
        expect(go("nojson", "--c"), 1, "Error: .*config.json cannot be read")


def _directory(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir()


IMAGES = "images.json cannot be read.*Remove it, and the images are not compared|Is a directory: .*images.json"
for name, told in {
    "images.json": IMAGES,
    "config.json": "config.json.*--name",
    "metrics.jsonl": "Is a directory",
}.items():
    for kind, damage in {**DAMAGES, "a folder": _directory}.items():
        if name == "metrics.jsonl" and kind != "a folder":
            continue  # is only ever appended to

        def beside(name: str = name, told: str = told, damage: Callable[[Path], object] = damage) -> None:
            run = f"beside{len(list(folder('x').parent.glob('*')))}"
            with stopped(run) as where:
                content = (where / name).read_bytes()
                if damage is DAMAGES["cut"]:
                    (where / name).write_bytes(content[:-20])
                else:
                    damage(where / name)
                expect(go(run, "--c"), 1, f"Error: .*({told})")
                if (where / name).is_dir():
                    (where / name).rmdir()
                if name != "images.json":
                    (where / name).write_bytes(content)
                else:
                    (where / name).unlink(missing_ok=True)
                continues(run)

        LAB.add(f"{name} of a run: {kind}")(beside)


@LAB.add("checkpoint_latest.pth that is a folder")
def _latest_folder() -> None:
    with stopped("latestfolder") as where:
        _directory(where / "checkpoint_latest.pth")
        continues("latestfolder", words="Going on from the checkpoint before it.*Continuing after step")


@LAB.add("plans whose network has changed since the start")
def _changed_plans() -> None:
    file = Path(os.environ["nnUNet_preprocessed"]) / "Dataset901_Phantom" / "nnUNetPlans.json"
    text = file.read_text()
    with stopped("changedplans"):
        try:
            content = json.loads(text)
            content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"][0] += 2
            file.write_text(json.dumps(content))
            expect(go("changedplans", "--c"), 1, "Error: .*another configuration.*architecture_hash")
        finally:
            file.write_text(text)
        continues("changedplans")
