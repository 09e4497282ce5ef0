"""``nnssl_pretrain --labelled`` as a user types it: what it leaves, resume across the switch, refusals."""

import json

import pytest
import SimpleITK as sitk
import torch

from nnssl import checkpoint
from nnssl.networks import build_network
from nnssl.plans import load_plan
from nnssl.pretrain import run
from nnssl.pretrain.cli import main
from nnssl.pretrain.engine.hooks import Hook
from nnssl.pretrain.omni.config import resolve_omni
from nnssl.pretrain.omni.pseudo_metrics import PseudoMetricsHook
from nnssl.trainers.weights import find_weights
from nnssl.weights import apply

QUICK = {"workers": 0, "held_out_batches": 1, "batch_size": 4, "picture_every": 0, "log_every": 1}
SMALL = {**QUICK, "omni.batch": 1, "omni.compared": 2, "omni.volumes": 0, "omni.patch": "8,12,8"}


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Drawing progress.png takes longer than these runs."""
    monkeypatch.setattr("nnssl.pretrain.engine.drawing.plot_progress", lambda *args, **options: None)
    monkeypatch.setattr("nnssl.pretrain.engine.drawing.plot_details", lambda *args: None)


@pytest.fixture
def data(tiny_preprocessed, tiny_raw_dataset):
    target = tiny_preprocessed(501, "Target", 5, plan_options={"features": (4, 4, 8)})
    tiny_raw_dataset(500, "Unlabelled", 5, labelled=False)
    return target


def go(**how):
    options = {**SMALL, **how.pop("options", {})}
    fixed = {"device": "cpu", "processes": 1, "robustness_every": 0, "labelled": 501, "method": "robust"}
    return run(how.pop("sources", 500), **{**fixed, "epochs": 4, "iterations": 1, "options": options, **how})


def test_a_run_leaves_what_the_contract_says(data, nnunet_env, tmp_path, capsys):
    cases = tmp_path / "few.txt"
    cases.write_text("case_000\ncase_001: liver\n")
    result = go(
        labelled_cases=cases, options={"omni.volumes": 2, "omni.volumes_every": 3, "omni.patch": "", "omni.switch": 0.5}
    )
    assert result.folder.name == "nnsslRobustOmni_d500__nnUNetPlans__3d_fullres"
    assert result.folder.parent.name == "Dataset501_Target"
    config = json.loads((result.folder / "config.json").read_text())
    omni = config["identity"]["omni"]
    assert omni["labelled"]["cases"] == 2
    assert omni["options"]["switch"] == 0.5
    assert omni["patch"] == [16, 24, 16]
    assert "volumes" not in omni["options"]
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    epochs = [r for r in rows if r["event"] == "epoch"]
    assert [r["train/stage"] for r in epochs] == [1, 1, 2, 2]
    assert [r["train/semi"] == 0 for r in epochs] == [True, True, False, False]
    for row in epochs:
        for key in ("pseudo/dice", "pseudo/student_dice", "pseudo/dice_liver", "pseudo/confident", "held_out/seg"):
            assert 0 <= row[key] <= 10
    assert next(r for r in rows if r["event"] == "pseudo")["epoch"] == 0
    assert "Pseudo-labels agree with held-out labels by Dice" in result.sentence
    for epoch in (3, 4):
        files = sorted((result.folder / "pseudo_labels" / f"epoch_{epoch:04d}").iterdir())
        assert [f.name.split("_case")[0] for f in files] == ["Dataset500_Unlabelled", "Dataset501_Target"]
        for file in files:
            source, case = file.name.removesuffix(".nii.gz").split("_case_")
            raw = sitk.ReadImage(str(nnunet_env.raw / source / "imagesTr" / f"case_{case}_0000.nii.gz"))
            made = sitk.ReadImage(str(file))
            assert made.GetSize() == raw.GetSize()
            assert made.GetSpacing() == pytest.approx(raw.GetSpacing())
            assert set(sitk.GetArrayFromImage(made).ravel().tolist()) <= {0, 1, 2}
    volumes = [r for r in rows if r["event"] == "volume"]
    assert len(volumes) == 4
    assert sum("dice" in r for r in volumes) == 2
    content = torch.load(result.checkpoint, weights_only=True)
    assert content["nnssl"]["pretrained_parts"] == {"encoder": True, "decoder_stages": [0, 1]}
    assert content["nnssl"]["omni"]["labelled"] == "Dataset501_Target"
    assert "case_00" not in str({k: v for k, v in content.items() if k != "network_weights"})
    loaded = checkpoint.load(result.checkpoint)
    assert checkpoint.labels_seen(loaded.nnssl, "Dataset501_Target", ["case_001", "case_002"]) == ["case_001"]
    assert checkpoint.labels_seen(loaded.nnssl, "Dataset502_Other", ["case_001"]) == []
    plan = load_plan(501)
    assert find_weights(plan).path == result.checkpoint
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    hook = PseudoMetricsHook(resolve_omni({}), None)
    hook.load_state_dict(checkpoint.load(result.folder / "checkpoint_latest.pth").training["hooks"]["omni"])
    hook._draw(axis)
    drawn = {line.get_label(): list(line.get_ydata()) for line in axis.get_lines()}
    assert {"averaged network, mean", "network itself, mean", "liver", "spleen"} <= set(drawn)
    assert len(drawn["averaged network, mean"]) == 5
    network = build_network(plan)
    report = apply(network, loaded, plan)
    assert all(p.percent == 100 for p in report.parts), "the heads have learnt this very label set"
    assert "heads kept: the checkpoint has learnt this very label set" in report.notes


@pytest.mark.parametrize(("teacher", "at"), [("ema", 1), ("ema", 2), ("ema", 3), ("snapshot", 2)])
def test_resume_across_the_switch_is_exact(data, teacher, at):
    """Test 34: stopped in the first stage, before the first step of the second one, and in it; bit for bit on a CPU."""
    options = {"omni.teacher": teacher, "omni.switch": 0.5}
    straight = go(name="straight", options=options)

    class Stop(Exception):
        pass

    class Break(Hook):
        def after_epoch(self, engine, row):
            if row["epoch"] == at + 1:
                raise Stop

    with pytest.raises(Stop):
        go(name="broken", options=options, hooks=[Break()])
    resumed = go(name="broken", continue_run=True)
    a, b = (
        checkpoint.load(straight.folder / "checkpoint_latest.pth"),
        checkpoint.load(resumed.folder / "checkpoint_latest.pth"),
    )
    assert all(torch.equal(a.weights[k], b.weights[k]) for k in a.weights)
    mine, theirs = a.training["method"], b.training["method"]
    assert set(mine) == set(theirs)
    assert any(k.startswith("omni_teacher") for k in mine)
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert a.training["hooks"]["omni"] == b.training["hooks"]["omni"]
    for first, second in zip(a.training["history"], b.training["history"]):
        timed = {"step_s", "data_wait"}
        assert {k: v for k, v in first.items() if k not in timed} == {k: v for k, v in second.items() if k not in timed}
    assert torch.equal(mine["_extra_state"], torch.tensor([1, 2 if teacher == "ema" else 0]))
    if at == 2:  # the second stage does change what is learnt
        other = go(name="other", options={"omni.teacher": teacher, "omni.switch": 1.0})
        c = checkpoint.load(other.checkpoint)
        assert not all(torch.equal(a.weights[k], c.weights[k]) for k in a.weights)


def test_its_own_dataset_without_other_images_and_on_2d_slices(tiny_preprocessed):
    """A few labels of a dataset, the rest of it unlabelled; with the patch of the plan."""
    tiny_preprocessed(501, "Target", 5, dim=2, plan_options={"features": (4, 4, 8)})
    result = go(
        sources=501,
        configuration="2d",
        epochs=2,
        options={"omni.patch": "", "omni.preset": "code", "omni.volumes": 1},
    )
    assert result.finished
    assert result.folder.name == "nnsslRobustOmni__nnUNetPlans__2d"
    assert len(list((result.folder / "pseudo_labels" / "epoch_0002").iterdir())) == 1
    content = torch.load(result.checkpoint, weights_only=True)
    assert content["nnssl"]["omni"]["options"]["teacher"] == "snapshot"


def test_command_with_voco(data, capsys):
    """The command of the documentation."""
    words = [
        "-d",
        "500",
        "-m",
        "voco",
        "--labelled",
        "501",
        "-device",
        "cpu",
        "--epochs",
        "2",
        "--iterations",
        "1",
        "-np",
        "1",
    ]
    options = [f"{k}={v}" for k, v in SMALL.items() if k != "batch_size"]
    assert main([*words, "--robustness-every", "0", "--dry-run", "-o", *options]) == 0
    out = capsys.readouterr().out
    assert "Labels: 4 cases of Dataset501_Target (training cases of fold 0), 1 labelled cases held out" in out
    assert "Pseudo-labels: from step 1 of 2" in out
    assert "the optimiser starts anew at step 1" in out and "Largest component kept of:" in out
    assert "Estimate:" in out
    assert "only fold 0 of 501" in out
    assert main([*words, "--robustness-every", "0", "-o", *options]) == 0
    assert "pseudo-labels: Dice" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--labelled", "502"], "no labels"),
        (["--labelled", "501", "-t", "502"], "Leave out -t"),
        (["-t", "501", "-o", "omni.switch=0.1"], "-o omni.switch: only with --labelled"),
        (["-t", "501", "--labelled-cases", "x"], "--labelled-cases: only with --labelled"),
        (["--labelled", "501", "--labelled-cases", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--labelled", "501", "-o", "omni.swich=0.1"], "Did you mean 'switch'"),
        (["--labelled", "501", "-o", "omni.fold=all", "omni.annotated=lung"], "'lung' is no class"),
    ],
)
def test_mistakes_are_told(data, tiny_preprocessed, capsys, arguments, words):
    if "502" in arguments:
        tiny_preprocessed(502, "Bare", 4, labelled=False)
    assert main(["-d", "500", "-m", "robust", "-device", "cpu", *arguments]) == (2 if "only with" in words else 1)
    assert words in capsys.readouterr().err


def test_another_choice_of_labels_is_another_run(data, tmp_path):
    go(epochs=1)
    cases = tmp_path / "one.txt"
    cases.write_text("case_002\n")
    with pytest.raises(RuntimeError, match="omni.labelled.cases: 4 in the folder, 1 now"):
        go(epochs=1, labelled_cases=cases)


def test_list_shows_the_options(capsys):
    assert main(["--list", "-m", "macl"]) == 0
    out = capsys.readouterr().out
    for word in ("omni.switch", "omni.semi_through_encoder", "--labelled", "omni.preset=paper"):
        assert word in out
