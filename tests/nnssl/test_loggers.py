"""TensorBoard, Weights & Biases and MLflow, each as it is, offline; a continued run is the same run there."""

import json
import logging
import sys
import time
from pathlib import Path

import pytest

from nnssl import loggers
from nnssl.errors import NnsslError
from nnssl.loggers import VARIABLE, check_loggers, logger_names, open_loggers


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in (VARIABLE, "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.delenv(name, raising=False)


def use(name, folder):
    """A run that is ended early and one that goes on with it."""
    for resume, steps in ((False, (10, 20, 0)), (True, (30,))):
        (logger,) = open_loggers([name], folder, "mae on hippocampus", resume=resume)
        logger.settings({"method": "mae", "option/mask_ratio": 0.75})
        for step in steps:
            logger.log({"epoch/held_out/total": step / 10, "odd name (%)": 1.0}, step)
        logger.summary({"learnt": 1.0, "verdict": "mae learnt: the error is lower."})
        logger.close(resume)
        logger.close(resume)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    use("tensorboard", tmp_path)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {e.step: e.value for e in found.Scalars("epoch/held_out/total")} == {10: 1.0, 20: 2.0, 0: 0.0, 30: 3.0}
    assert "settings/text_summary" in found.Tags()["tensors"] and not (tmp_path / "loggers.json").exists()


def test_mlflow(tmp_path):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    use("mlflow", tmp_path)
    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("nnssl").experiment_id])
    assert run.info.run_id == json.loads((tmp_path / "loggers.json").read_text())["mlflow"]
    assert run.info.status == "FINISHED" and run.info.run_name == "mae on hippocampus"
    assert run.data.params == {"method": "mae", "option/mask_ratio": "0.75"}
    history = client.get_metric_history(run.info.run_id, "epoch/held_out/total")
    assert {m.step: m.value for m in history} == {10: 1.0, 20: 2.0, 0: 0.0, 30: 3.0}
    assert run.data.metrics["learnt"] == 1 and run.data.tags["verdict"].startswith("mae learnt")
    assert run.data.metrics["odd name ___"] == 1


def records(file):
    """The records of a ``.wandb`` file, which is a log of LevelDB: blocks of 32 KiB, pieces of records with a head of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_wandb(tmp_path):
    pytest.importorskip("wandb")
    use("wandb", tmp_path)
    name = json.loads((tmp_path / "loggers.json").read_text())["wandb"]
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert files, "both parts have the run's name, so that wandb sync joins them"
    points, told = {}, ""
    end = time.monotonic() + 60  # wandb's own process writes the end a little later
    while 30 not in points and time.monotonic() < end:
        found = [r for file in files for r in records(file)]
        told = "".join(map(str, found))
        rows = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item} for r in found]
        points = {row["step"]: row["epoch/held_out/total"] for row in rows if "epoch/held_out/total" in row}
        time.sleep(0.2)
    assert points == {10: 1.0, 20: 2.0, 0: 0.0, 30: 3.0}
    assert "mask_ratio" in told and "mae learnt" in told
    assert str(Path(sys.argv[0]).resolve().parent) not in told, "no path of the machine"


def test_names_come_from_the_option_then_the_variable_then_the_default(monkeypatch):
    assert logger_names() == () and logger_names(default=("tensorboard",)) == ("tensorboard",)
    monkeypatch.setenv(VARIABLE, "mlflow, wandb")
    assert logger_names(default=("tensorboard",)) == ("mlflow", "wandb")
    assert logger_names(["WandB", "tensorboard,wandb"]) == ("wandb", "tensorboard")
    assert logger_names("none") == ()
    monkeypatch.setenv(VARIABLE, "none")
    assert logger_names(default=("tensorboard",)) == ()
    monkeypatch.setenv(VARIABLE, "neptune")
    with pytest.raises(
        NnsslError, match="nnssl_logger neptune: unknown. Known are tensorboard, wandb, mlflow and none"
    ):
        logger_names()
    with pytest.raises(NnsslError, match="none stands alone"):
        logger_names(["none", "wandb"])


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_names_the_extra(name, monkeypatch, tmp_path):
    monkeypatch.setattr(loggers, "find_spec", lambda package: None)
    with pytest.raises(
        NnsslError, match=rf"logger {name}: its package is not installed.*pip install 'nnssl\[{name}\]'"
    ):
        check_loggers([name])


def test_a_folder_called_like_the_package_is_no_package(monkeypatch, tmp_path):
    """wandb writes into wandb/, and Python takes a folder in the working directory for a namespace package."""
    (tmp_path / "notapackage").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(loggers.LOGGERS["wandb"], "package", "notapackage")
    assert not loggers.installed("wandb")


class Broken:
    name = "tensorboard"
    package = "json"
    identifier = None

    def __init__(self, folder, title, identifier):
        if title == "refuse":
            raise RuntimeError("\n no login \n more")

    def log(self, values, step):
        raise OSError("the server does not answer")


def test_what_fails_later_ends_no_run_and_is_told_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", Broken)
    (logger,) = open_loggers(["tensorboard"], tmp_path, "x")
    with caplog.at_level(logging.WARNING):
        logger.log({"a": 1.0}, 1)
        logger.log({"a": 1.0}, 2)
        logger.close(True)
    assert caplog.text.count("the server does not answer") == 1 and "the run goes on" in caplog.text
    with pytest.raises(NnsslError, match="logger tensorboard could not be opened: no login."):
        open_loggers(["tensorboard"], tmp_path, "refuse")
