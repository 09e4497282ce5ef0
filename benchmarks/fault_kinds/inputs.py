"""Preprocessed cases, plans and experiment files that hold something else."""

# ruff: noqa: D101, D102, D103
from __future__ import annotations

import copy
import json
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fault_kinds.lab import DAMAGES, LAB, OPTIONS, RUN, Failed, expect, here

PREPARE = ["-d", "902", "-t", "901", "--preprocess-only", "-np", "1"]


def prepared() -> Path:
    expect(here(*PREPARE), 0, "cases are preprocessed")
    (made,) = [
        p for p in (Path(os.environ["nnUNet_preprocessed"]) / "Dataset902_Phantom").glob("nnssl_*") if p.is_dir()
    ]
    return made


for ending in (".pkl", ".b2nd", "_seg.b2nd"):
    for kind, damage in {**DAMAGES, "gone": os.unlink}.items():

        def case(ending: str = ending, damage: Callable[[Path], object] = damage) -> None:
            from nnssl.properties import read_properties

            made = prepared()
            file = made / f"case_000001{ending}"
            before = read_properties(made / "case_000001.pkl"), (made / "case_000001.b2nd").stat().st_size
            if ending == "_seg.b2nd" and damage is DAMAGES["cut"]:
                file.write_bytes(file.read_bytes()[:-10])
            elif damage is DAMAGES["cut"]:
                file.write_bytes(file.read_bytes()[:-20])
            else:
                damage(file)
            after = prepared()
            found = read_properties(after / "case_000001.pkl"), (after / "case_000001.b2nd").stat().st_size
            if found != before:
                raise Failed("lost", f"{file} is another")

        LAB.add(f"a preprocessed case whose {ending} is {kind}")(case)


class _Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path(tempfile.gettempdir()) / "nnssl_bomb"),)


@LAB.add("a .pkl that wants to run something")
def _bomb() -> None:
    (prepared() / "case_000001.pkl").write_bytes(pickle.dumps(_Bomb()))
    prepared()
    if (Path(tempfile.gettempdir()) / "nnssl_bomb").exists():
        raise Failed("lost", "it has run")


@LAB.add("memory runs out for one image")
def _memory() -> None:
    from nnssl.pretrain.prepare.worker import CaseWorker

    (prepared() / "case_000001.pkl").unlink()
    with patch.object(CaseWorker, "_run", side_effect=MemoryError):
        expect(here(*PREPARE), 1, "case_000001.*does not fit into this machine's memory.*--skip-bad")
        expect(here(*PREPARE, "--skip-bad"), 0, "5 cases are preprocessed")
    prepared()


HOME = ("configurations", "3d_fullres")
for place, value in {
    (*HOME, "patch_size"): "big",
    (*HOME, "spacing"): [1, "a", 1],
    (*HOME, "batch_size"): None,
    (*HOME, "data_identifier"): "../../../evil",
    (*HOME, "normalization_schemes"): "ZScoreNormalization",
    (*HOME, "use_mask_for_norm"): [1],
    (*HOME, "architecture"): [],
    (*HOME, "architecture", "arch_kwargs", "n_stages"): "three",
    (*HOME, "architecture", "arch_kwargs", "strides"): [[1, 1], [2, 2, 2], [2, 2, 2]],
    (*HOME, "architecture", "arch_kwargs", "norm_op"): 5,
    (*HOME, "median_image_size_in_voxels"): {},
    (*HOME, "inherits_from"): 9,
    ("transpose_forward",): [0, 0, 1],
    ("plans_name",): "../evil",
    ("dataset_name",): 4,
    ("configurations",): [],
}.items():

    def plan(place: tuple[str, ...] = place, value: Any = value) -> None:
        file = Path(os.environ["nnUNet_preprocessed"]) / "Dataset901_Phantom" / "nnUNetPlans.json"
        text = file.read_text()
        try:
            content = copy.deepcopy(json.loads(text))
            at = content
            for k in place[:-1]:
                at = at[k]
            at[place[-1]] = value
            file.write_text(json.dumps(content))
            told = here(*RUN, "--dry-run", *OPTIONS)
        finally:
            file.write_text(text)
        words = "architecture" if place[-1] == "norm_op" else place[-1]
        expect(told, 1, f"^Error: [^\n]*{words}[^\n]*\n$|Error: [^\n]*{words}")

    LAB.add(f"plans with {place[-1]} = {value!r}")(plan)

for option, value in (("-p", "../../../evil"), ("--name", "../evil"), ("--name", "a/b")):

    def outside(option: str = option, value: str = value) -> None:
        expect(here(*RUN, option, value, "--dry-run", *OPTIONS), 1, f"Error: .*{option}.*cannot be used")

    LAB.add(f"{option} {value}")(outside)

HEAD = "dataset: 901\nmethods: [scratch, mae]\nlabels: [2]\n"
for name, text in {
    "a key that is a list": "? [a, b]\n: 1\n",
    "infinite seeds": "seeds: .inf\n",
    "5000 digits": f"training: {{epochs: {'9' * 5000}}}\n",
    "a day that does not exist": "name: 2024-02-31\n",
    "3000 brackets": "a: " + "[" * 3000 + "]" * 3000 + "\n",
    "a reference to itself": "training: &a {figures: *a}\n",
    "a Python object": "methods: !!python/object/apply:os.system [true]\n",
    "a key given twice": "dataset: 5\n",
    "dates for seeds": "seeds: 2024-01-01\n",
}.items():

    def experiment(text: str = text) -> None:
        file = Path(os.environ["nnUNet_results"]) / "experiment.yaml"
        file.write_text(HEAD + text)
        expect(
            here(str(file), "--dry-run", "-device", "cpu", command="experiment"),
            1,
            "^Error: [^\n]*experiment.yaml[^\n]*\n$",
        )

    LAB.add(f"an experiment file with {name}")(experiment)
