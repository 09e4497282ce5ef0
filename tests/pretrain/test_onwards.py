"""What a run starts from, lengthening a finished one, the verdict that travels, and the line that tells what to type next."""

import json
import logging
from pathlib import Path

import pytest
import torch

from nnssl import checkpoint
from nnssl.errors import NnsslError
from nnssl.networks import build_network, canonical_state_dict
from nnssl.plan_command import main as plan_main
from nnssl.plans import load_plan
from nnssl.pretrain.api import run
from nnssl.pretrain.engine.folder import RunFolder
from nnssl.trainers import nnUNetTrainerPretrained
from nnssl.weights import write_variant
from nnssl.weights.cli import info_main

TINY = {"workers": 0, "picture_every": 0, "held_out_batches": 1}
pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture
def dataset(tiny_preprocessed):
    return tiny_preprocessed(901, "Tiny", 6, plan_options={"features": (4, 8, 8), "patch": (16, 16, 16)})


def go(**options):
    given = {"method": "mae", "device": "cpu", "epochs": 2, "iterations": 2, "options": {**TINY, "batch_size": 2}}
    return run(901, **{**given, **options})


def rows(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [r for r in lines if r["event"] == "epoch"]


def test_two_epochs_lengthened_to_four_go_on(dataset, caplog):
    caplog.set_level(logging.INFO, "nnssl")
    first = go()
    before = checkpoint.load(first.checkpoint)
    longer = go(epochs=4, continue_run=True)
    after = checkpoint.load(longer.checkpoint)
    assert longer.folder == first.folder and longer.finished
    assert [r["epoch"] for r in rows(first.folder)] == [1, 2, 3, 4]
    assert (before.nnssl["step"], after.nnssl["step"], after.nnssl["steps"]) == (4, 8, 8)
    kept = checkpoint.load(first.folder / "checkpoint_final_2epochs.pth")
    assert all(torch.equal(kept.weights[n], t) for n, t in before.weights.items())
    assert any(not torch.equal(after.weights[n], t) for n, t in before.weights.items())
    assert "lengthened from 2 to 4 epochs" in caplog.text and "learning rate rises again" in caplog.text
    assert go(epochs=4, continue_run=True).sentence == after.verdict[1], "finished: nothing is trained again"
    assert len(rows(first.folder)) == 4


def test_the_schedule_of_a_lengthened_run_is_that_of_the_new_length(dataset):
    short = go(name="a")
    go(name="a", epochs=4, continue_run=True)
    go(name="b", epochs=4)
    whole = rows(short.folder.with_name(short.folder.name.replace("_a__", "_b__")))
    assert [r["lr"] for r in rows(short.folder)][2:] == [r["lr"] for r in whole][2:]
    assert [r["lr"] for r in rows(short.folder)][:2] != [r["lr"] for r in whole][:2]


def test_a_lengthened_run_that_was_interrupted_goes_on(dataset):
    first = go()
    config = json.loads((first.folder / "config.json").read_text())
    config["identity"]["epochs"] = 3  # as a run that was lengthened and stopped before its next epoch ended
    (first.folder / "config.json").write_text(json.dumps(config))
    again = run(901, method="mae", device="cpu", continue_run=True)
    assert again.finished and [r["epoch"] for r in rows(first.folder)] == [1, 2, 3]


def test_a_run_is_never_shortened_and_nothing_else_changes_with_c(dataset):
    go()
    with pytest.raises(NnsslError, match="--epochs 1: this run has 2.*only ever lengthened"):
        go(epochs=1, continue_run=True)
    with pytest.raises(NnsslError, match="iterations: 2 .*3"):
        go(epochs=4, iterations=3, continue_run=True)
    with pytest.raises(NnsslError, match="epochs: 2 in the folder, 4 now"):
        go(epochs=4)


def test_stages_that_are_shares_of_the_length_are_not_stretched(tmp_path):
    saved = {"identity": {"epochs": 2, "omni": {"labelled": "x"}}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(NnsslError, match="--labelled cannot be lengthened"):
        RunFolder(tmp_path, lock=False).check_resume({"epochs": 4, "omni": {"labelled": "x"}}, continue_run=True)


# ---- --init ------------------------------------------------------------------------------------------------------


def foreign(dataset, tmp_path, change=lambda w: w, plans="nnUNetPlans"):
    torch.manual_seed(3)
    network = build_network(load_plan(901, plans_name=plans))
    file = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {f"model.{n}": t for n, t in change(dict(network.state_dict())).items()}}, file)
    return file, canonical_state_dict(network)


def frozen(**options):
    """A run that changes nothing: what it started from is what it ends with."""
    return go(epochs=1, iterations=1, options={**TINY, "batch_size": 2, "lr": 1e-30}, **options)


def test_a_run_starts_from_a_foreign_file_and_says_so(dataset, tmp_path, caplog):
    caplog.set_level(logging.INFO, "nnssl")
    file, weights = foreign(dataset, tmp_path)
    result = frozen(init=file)
    content = checkpoint.load(result.checkpoint)
    close = [torch.allclose(content.weights[n], t, atol=1e-6) for n, t in weights.items() if "seg_layers" not in n]
    assert all(close) and len(close) > 40
    report = json.loads((result.folder / "transfer_report.json").read_text())
    assert report["report"]["parts"]["encoder"]["percent"] == 100
    assert "'model.' stripped" in (result.folder / "transfer_report.txt").read_text()
    assert "The run starts from these weights.\nTransfer report: " in caplog.text
    assert content.nnssl["started_from"] == {"sha256": report["sha256"], "method": "unknown", "origin": "others"}
    with pytest.raises(NnsslError, match=r"(?s)another configuration.*init"):
        frozen()  # random weights are another run


def test_init_takes_part_once_and_a_continued_run_needs_no_file(dataset, tmp_path):
    file, _ = foreign(dataset, tmp_path)
    first = go(init=file)
    file.unlink()
    longer = go(epochs=3, continue_run=True)
    assert longer.finished and checkpoint.load(longer.checkpoint).nnssl["started_from"]["origin"] == "others"
    assert first.folder == longer.folder


def test_init_again_where_the_run_ended_before_its_first_checkpoint(dataset, tmp_path, monkeypatch, caplog):
    """It begins with the same weights by itself; with another file, or without one, it does not begin."""
    from nnssl.pretrain.engine.loop import Engine

    caplog.set_level(logging.INFO, "nnssl")
    file, _ = foreign(dataset, tmp_path)
    straight = go(init=file, name="straight")

    def end(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "_fit", end)
        go(init=file, name="ended")
    kept = tmp_path / "kept.pth"
    file.rename(kept)
    with pytest.raises(NnsslError, match="this run starts from the weights of .*Add --init FILE"):
        go(name="ended", continue_run=True)
    content = torch.load(kept, weights_only=True)
    state = content.get("state_dict", content)
    next(t for t in state.values() if torch.is_tensor(t)).add_(1)
    torch.save(content, file)
    with pytest.raises(NnsslError, match=r"(?s)another configuration.*init.sha256"):
        go(name="ended", continue_run=True)
    kept.replace(file)
    again = go(name="ended", continue_run=True)
    assert "before its first checkpoint: it starts from the beginning" in caplog.text
    a, b = (checkpoint.load(r.checkpoint) for r in (straight, again))
    assert all(torch.equal(b.weights[n], t) for n, t in a.weights.items())
    assert b.nnssl["started_from"] == a.nnssl["started_from"]


def test_init_adapts_as_the_trainers_do_and_names_the_option(dataset, tmp_path):
    def two_channels(weights):
        stem = "encoder.stages.0.0.convs.0."
        return {
            n: t.repeat(1, 2, 1, 1, 1) if stem in n and t.ndim == 5 and t.shape[1] == 1 else t
            for n, t in weights.items()
        }

    file, weights = foreign(dataset, tmp_path, two_channels)
    with pytest.raises(NnsslError, match="--init: .*2 channels, this network takes 1.*add --adapt channels=repeat"):
        frozen(init=file)
    result = frozen(init=file, adapt={"channels": "repeat"})
    name = "encoder.stages.0.0.convs.0.conv.weight"
    content = checkpoint.load(result.checkpoint)
    torch.testing.assert_close(content.weights[name], 2 * weights[name], atol=1e-6, rtol=1e-5)
    with pytest.raises(NnsslError, match="--adapt: only with --init"):
        go(adapt={"channels": "repeat"})


def test_init_from_an_upstream_style_residual_encoder(tiny_preprocessed, tmp_path):
    tiny_preprocessed(901, "Tiny", 6, arch="resenc", plan_options={"features": (4, 8, 8), "patch": (16, 16, 16)})
    plan = load_plan(901)
    torch.manual_seed(3)
    network = build_network(plan)
    payload = checkpoint.build_payload(
        network, plan, method="mae", config={}, crop_size=(16, 16, 16), pretrained_parts={"encoder": True}, data={}
    )
    file = tmp_path / "upstream.pth"
    weights = {n: t for n, t in payload["network_weights"].items() if n.startswith("encoder.")}
    torch.save(
        {"network_weights": weights, "nnssl_adaptation_plan": payload["nnssl_adaptation_plan"], "citations": []}, file
    )
    result = frozen(init=file)
    content, wanted = checkpoint.load(result.checkpoint), canonical_state_dict(network)
    assert all(torch.allclose(content.weights[n], t, atol=1e-6) for n, t in wanted.items() if n.startswith("encoder."))
    assert content.nnssl["started_from"]["origin"] == "nnssl-mic"


# ---- the verdict -------------------------------------------------------------------------------------------------


def test_the_verdict_is_stored_shown_and_warned_of(dataset, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO, "nnssl")
    result = frozen()
    loaded = checkpoint.load(result.checkpoint)
    assert not result.learnt and loaded.verdict[0] is False and result.sentence.startswith(loaded.verdict[1])
    assert info_main([str(result.checkpoint)]) == 0
    out = capsys.readouterr().out
    assert "did not learn" in out and "1 of 1 steps" in out and "Dataset901_Tiny" in out
    longer = caplog.text.partition("Before these are used, train longer, for example:\n  ")[2].splitlines()[0]
    assert longer.endswith(" --c --epochs 2") and longer in out, "the run and nnssl_info say the same"
    caplog.clear()
    assert plan_main(["-d", "901", "--checkpoint", str(result.checkpoint), "--epochs", "1", "--name", "bad"]) == 0
    assert "WARNING, the pretraining's own verdict: " in caplog.text
    plans = json.loads((dataset / "nnUNetPlans_bad.json").read_text()) | {"continue_training": False}
    info = json.loads((dataset / "dataset.json").read_text())
    trainer = nnUNetTrainerPretrained(plans, "3d_fullres", 0, info, torch.device("cpu"))
    trainer.get_dataloaders = lambda: (None, None)
    trainer.on_train_start()
    log = Path(trainer.log_file).read_text()
    assert log.index("says of itself: ") < log.index("Transfer report")


def test_a_run_that_learnt_says_so_in_its_file(dataset):
    result = go(name="x")
    learnt, sentence = checkpoint.load(result.checkpoint).verdict
    assert learnt == result.learnt and result.sentence.startswith(sentence)
    assert checkpoint.load(result.folder / "checkpoint_latest.pth").verdict == (learnt, sentence)


# ---- what to type next -------------------------------------------------------------------------------------------


def test_the_next_line_names_a_fold_that_so_few_cases_have(tiny_preprocessed, caplog):
    caplog.set_level(logging.INFO, "nnssl")
    folder = tiny_preprocessed(901, "Tiny", 4, plan_options={"features": (4, 8, 8), "patch": (16, 16, 16)})
    (folder / "splits_final.json").unlink()
    go(epochs=1, iterations=1)
    assert "Next: nnUNetv2_train 901 3d_fullres all -tr nnUNetTrainerPretrained -device cpu\n" in caplog.text
    assert plan_main(["-d", "901", "--name", "a", "--epochs", "5"]) == 0
    assert "Next: nnUNetv2_train 901 3d_fullres all -p nnUNetPlans_a -tr nnUNetTrainerPretrained" in caplog.text
    assert plan_main(["-d", "901", "-p", "nnUNetPlans_a", "--lengthen", "6"]) == 0
    assert "Next: nnUNetv2_train 901 3d_fullres all -p nnUNetPlans_a -tr nnUNetTrainerPretrained --c" in caplog.text


def test_the_next_line_works_where_several_fit(dataset, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "nnssl")
    go()
    assert "Next: nnUNetv2_train 901 3d_fullres 0 -tr nnUNetTrainerPretrained -device cpu\n" in caplog.text
    assert "With few labels take -tr nnUNetTrainerPretrainedMeanTeacher" in caplog.text
    caplog.clear()
    second = go(name="two")
    lines = caplog.messages[-3:-1]
    assert lines[0].split()[0] == "nnssl_plan" and str(second.checkpoint) in lines[0]
    assert plan_main(lines[0].split()[1:]) == 0
    plans = lines[1].split("-p ")[1].removesuffix(" -device cpu")
    assert load_plan(901, plans_name=plans).nnssl["checkpoint"].endswith("checkpoint_final.pth")
    caplog.clear()
    go(name="two", epochs=3, continue_run=True)
    assert f"--name {plans.removeprefix('nnUNetPlans_')}-2" in caplog.messages[-3], "a name that is free"


def test_a_plan_that_named_the_shorter_run_still_finds_its_weights(dataset):
    from nnssl.trainers.weights import find_weights

    first = go()
    path = write_variant(load_plan(901), "short", checkpoint=first.checkpoint, epochs=1)
    go(epochs=3, continue_run=True)
    source = find_weights(load_plan(901, plans_name=path.stem))
    assert source.path.name == "checkpoint_final_2epochs.pth" and "lengthened" in source.why


def test_without_labels_no_training_is_advised(tiny_preprocessed, caplog):
    caplog.set_level(logging.INFO, "nnssl")
    tiny_preprocessed(901, "Tiny", 6, False, plan_options={"features": (4, 8, 8), "patch": (16, 16, 16)})
    go()
    assert "no labels to fine-tune on" in caplog.text and "nnUNetv2_train" not in caplog.text


def test_the_record_holds_the_command_that_repeats_the_run(dataset, monkeypatch, caplog):
    """Made from what was asked, whether from Python or typed; a continued run keeps it and adds its own."""
    import shlex

    from nnssl.options import from_args
    from nnssl.pretrain.cli import parser
    from nnssl.pretrain.options import RunOptions, command_of

    monkeypatch.setenv("nnssl_malloc", "0")
    caplog.set_level(logging.INFO, logger="nnssl")
    how = {"method": "mae", "device": "cpu", "epochs": 1, "iterations": 1, "robustness_every": 0}
    options = {"workers": 0, "picture_every": 0, "held_out_batches": 1}
    result = run(901, **how, options=options, name="told")
    saved = json.loads((result.folder / "config.json").read_text())
    assert saved["environment"]["nnssl_malloc"] == "0" and saved["asked"]["options"] == options
    again = from_args(RunOptions, parser().parse_args(shlex.split(saved["command"])[1:]), continue_run=False)
    assert {**vars(again), "options": None, "sources": None} == {
        **vars(RunOptions(901, **how, name="told")),
        "options": None,
        "sources": None,
    }
    assert again.options == {k: str(v) for k, v in options.items()} and again.sources == ["901"]
    run(901, **{**how, "epochs": 2}, options=options, name="told", continue_run=True)
    later = json.loads((result.folder / "config.json").read_text())
    assert later["command"] == saved["command"] and "--epochs 2" in later["continued"][0]
    log = min(result.folder.glob("training_log*.txt")).read_text()
    assert "Cases: " in log and "Batch: " in log and log.index("Batch: ") < log.index("epoch 1/1")
    assert command_of(RunOptions({500: 8, 501: 1}, method="mae", crop=(8, 16, 8), skip_bad=True)) == (
        "nnssl_pretrain -d 500:8 501:1 -m mae --crop 8,16,8 --skip-bad"
    )
