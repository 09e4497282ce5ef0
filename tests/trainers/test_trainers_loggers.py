"""Fine-tuning's numbers in the loggers of ``nnssl_logger``, through nnU-Net's own list of loggers."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from nnunetv2.training.logging.nnunet_logger import MetaLogger

from nnssl.errors import NnsslError
from nnssl.loggers import VARIABLE
from nnssl.trainers import nnUNetTrainerPretrainedScratch
from nnssl.trainers.loggers import add_loggers


def trainer_in(folder, resume=False, rank=0):
    (folder / "trainer__plans__3d_fullres" / "fold_0").mkdir(parents=True, exist_ok=True)
    path = str(folder / "trainer__plans__3d_fullres" / "fold_0")
    return SimpleNamespace(output_folder=path, local_rank=rank, logger=MetaLogger(path, resume))


def runs(folder):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
    return client, client.search_runs([client.get_experiment_by_name("nnssl").experiment_id])


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in (VARIABLE, "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "nnUNet_wandb_enabled"):
        monkeypatch.delenv(name, raising=False)


def test_what_nnunet_logs_arrives_in_mlflow(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv(VARIABLE, "mlflow")
    saved = {}
    for resume, epochs in ((False, (0, 1)), (True, (2,))):
        trainer = trainer_in(tmp_path, resume)
        if resume:
            trainer.logger.load_checkpoint(saved)
        (added,) = add_loggers(trainer, {"trainer": "nnUNetTrainerPretrained", "fold": "0"})
        trainer.logger.update_config({"plans": {"cases": ["patient_7"]}, "hparas": {"lr": 0.1}, "epochs": 3})
        for epoch in epochs:
            trainer.logger.log("epoch_start_timestamps", 1e9, epoch)
            trainer.logger.log("train_losses", np.float64(0.5 - epoch), epoch)
            trainer.logger.log("mean_fg_dice", np.float32(0.25), epoch)
            trainer.logger.log("dice_per_class_or_region", [0.25, float("nan")], epoch)
        saved = trainer.logger.get_checkpoint()
        added.finished = resume
        trainer.logger.log_summary("final_val/foreground_dice", 0.75)
        added.close()
    client, (run,) = runs(Path(trainer.output_folder))
    history = client.get_metric_history(run.info.run_id, "finetuning/train_losses")
    assert {m.step: m.value for m in history} == {0: 0.5, 1: -0.5, 2: -1.5}
    metrics = run.data.metrics
    assert metrics["final_val/foreground_dice"] == 0.75 and metrics["finetuning/ema_fg_dice"] == pytest.approx(0.25)
    assert metrics["finetuning/dice_per_class_or_region/class_1"] == 0.25
    assert not any("class_2" in k or "timestamps" in k for k in metrics)
    assert run.info.status == "FINISHED" and run.info.run_name == "trainer__plans__3d_fullres fold_0"
    assert run.data.params == {"trainer": "nnUNetTrainerPretrained", "fold": "0", "epochs": "3"}
    told = "".join(
        f.read_text(errors="replace") for f in (Path(trainer.output_folder) / "mlruns").rglob("*") if f.is_file()
    )
    assert "patient_7" not in told


def test_nothing_is_added_unless_asked_for(tmp_path, monkeypatch):
    assert add_loggers(trainer_in(tmp_path), {}) == []
    monkeypatch.setenv(VARIABLE, "mlflow")
    assert add_loggers(trainer_in(tmp_path, rank=1), {}) == [], "one process of a training tells"
    monkeypatch.setenv(VARIABLE, "wandb")
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    other = SimpleNamespace(local_rank=0, output_folder=str(tmp_path), logger=None)
    assert add_loggers(other, {}) == [], "nnU-Net's own logger of Weights & Biases is in use"


def test_a_wrong_name_stops_before_any_data_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "neptune")
    with pytest.raises(NnsslError, match="nnssl_logger neptune"):
        add_loggers(trainer_in(tmp_path), {})


def test_our_trainers_tell_what_they_are(build, start, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv(VARIABLE, "mlflow")
    trainer = start(build(nnUNetTrainerPretrainedScratch))
    (added,) = trainer.logger.loggers
    added.close()
    _, (run,) = runs(Path(trainer.output_folder))
    params = run.data.params
    assert (
        params["trainer"] == "nnUNetTrainerPretrainedScratch"
        and params["fold"] == "0"
        and params["weights"] == "random"
    )
    assert params["epochs"] == "2" and params["dataset"] == "Dataset901_Tiny" and run.info.status == "KILLED"


@pytest.mark.slow
def test_a_whole_training(build, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv(VARIABLE, "mlflow")
    trainer = build(nnUNetTrainerPretrainedScratch)
    trainer.run_training()
    (added,) = trainer.logger.loggers
    added.close()
    client, (run,) = runs(Path(trainer.output_folder))
    assert run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "finetuning/val_losses")] == [0, 1]
