"""The experiment files of the source papers: the loader takes them, and the published figures fit them."""

from __future__ import annotations

import csv
import importlib.util
import math
from pathlib import Path

import pytest

from nnssl.experiments.experiment import load_experiment
from nnssl.experiments.published import left_over, of_setting, read_published
from nnssl.transferability.downstream import read_dice

FOLDER = Path(__file__).parents[2] / "examples" / "label_efficiency"
PAPERS = ("macl", "hdense", "glmae", "voco", "transferability")
OTHER_TEST_SETS = {"glmae", "voco"}  # their published figures include means over test sets that no user has


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))


@pytest.mark.parametrize("paper", PAPERS)
def test_the_loader_takes_it(paper):
    experiment = load_experiment(FOLDER / f"{paper}.yaml")
    assert experiment.published == FOLDER / "published" / f"{paper}.csv"
    head = (FOLDER / f"{paper}.yaml").read_text(encoding="utf-8").split("\ntitle:")[0]
    assert all(text.startswith("#") for text in head.splitlines())
    assert "arXiv:" in head and "Not comparable" in head and f"nnssl_label_efficiency {paper}.yaml" in head


@pytest.mark.parametrize("paper", PAPERS)
def test_it_tells_where_each_dataset_comes_from(paper):
    experiment = load_experiment(FOLDER / f"{paper}.yaml")
    used = {s.dataset for s in experiment.settings}
    used |= {d for s in experiment.settings for arm in s.arms if arm.method for d in arm.pretraining.datasets}
    assert used == set(experiment.datasets)


@pytest.mark.parametrize("paper", PAPERS)
def test_published_figures_fit(paper):
    """Every setting of the file has figures, for labels and methods that the experiment runs; no figure is lost."""
    experiment = load_experiment(FOLDER / f"{paper}.yaml")
    figures = read_published(experiment.published)
    settings = [s.name for s in experiment.settings]
    without = {s for s in settings if of_setting(figures, s, settings).empty}
    assert without == ({"Spleen", "AMOS-CT"} if paper == "voco" else set())
    assert (not left_over(figures, settings).empty) == (paper in OTHER_TEST_SETS)
    for setting in experiment.settings:
        own = of_setting(figures, setting.name, settings)
        ours = {arm.name for arm in setting.arms}
        assert own.empty or ours & set(own["method"]), setting.name
        few = {n for n in setting.labels if n != "all"}
        assert few <= set(own["labels"].map(str)) or paper in ("glmae", "voco"), setting.name


def test_macl_figures_agree_with_each_other():
    """One-class sets: Jaccard = Dice / (2 - Dice). What the ablations share with Table I is the same; one cell is a misprint."""
    figures = read_published(FOLDER / "published" / "macl.csv")
    wrong = []
    for p in figures.itertuples():
        dice, jaccard = p.dice / 100, p.jaccard / 100
        assert 0 < jaccard < dice < 1 and p.asd < p.hd95
        if p.setting in ("Spleen", "Heart") and abs(dice / (2 - dice) - jaccard) > 2e-4:
            wrong.append((p.setting, p.method, p.labels))
    assert wrong == [("Heart", "BYOL", 2)]
    value = {(p.setting, p.method, p.labels): p.dice for p in figures.itertuples()}
    assert value["ACDC components", "macl", 20] == value["ACDC", "macl", 20] == pytest.approx(89.64)
    assert value["MMWHS decoder blocks", "k2", 2] == value["MMWHS", "macl", 2]
    assert value["MMWHS components", "pcl", 4] == value["MMWHS", "pcl", 4]


def test_hdense_gains_are_those_of_the_paper():
    figures = read_published(FOLDER / "published" / "hdense.csv")
    value = {(p.setting, p.method, str(p.labels)): p.dice for p in figures.itertuples() if p.label == "mean"}
    gains = [value["AMOS-MRI", "hdense", n] - value["AMOS-MRI", "scratch", n] for n in ("42", "8", "4")]
    assert gains == pytest.approx([1.7, 6.0, 9.3])


def test_transferability_figures_are_the_fixture():
    with (Path(__file__).parents[1] / "fixtures" / "tis_fixture.csv").open() as file:
        known = {
            (r["dataset"], r["freeze_encoder"], int(r["epoch"])): float(r["dice_mean"])
            for r in csv.DictReader(file)
            if r["encoder"] == "u-net_encoder" and r["scheme"] == "simple"
        }
    figures = read_published(FOLDER / "published" / "transferability.csv")
    assert len(figures) == len(known) == 60
    for p in figures.itertuples():
        epoch = 0 if p.method == "scratch" else int(p.method.removeprefix("epoch"))
        dataset, _, frozen = p.setting.partition(" ")
        assert math.isclose(p.dice / 100, known[dataset, str(int(frozen == "frozen")), epoch], abs_tol=5.1e-5)


def test_dice_of_checkpoints(tmp_path):
    spec = importlib.util.spec_from_file_location("checkpoint_dice", FOLDER / "checkpoint_dice.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "cases.csv").write_text(
        "method,labels,setting,seed,fold,case,label,dice\n"
        "scratch,80,ACDC,0,all,x,a,0.8\nscratch,80,ACDC,0,all,y,a,0.9\nepoch005,80,ACDC,1,all,x,a,0.9\n"
        "epoch005,80,IDRiD,1,all,x,a,0.1\n"
    )
    found = module.rows(FOLDER / "transferability.yaml", tmp_path / "cases.csv", "ACDC")
    assert [(row[0].rsplit("/", 1)[-1], *row[1:]) for row in found] == [
        ("scratch", "85.0000", "ACDC, 80 labels", "0"),
        ("checkpoint_0005.pth", "90.0000", "ACDC, 80 labels", "1"),
    ]
    file = tmp_path / "dice.csv"
    file.write_text("checkpoint,dice,setup,seed\n" + "".join(f'{a},{b},"{c}",{d}\n' for a, b, c, d in found))
    assert [(setup, dice) for _, setup, dice in read_dice(file)] == [
        ("ACDC, 80 labels", 85.0),
        ("ACDC, 80 labels", 90.0),
    ]
