"""A run that an early version began and left after its first of three epochs: read, continued, fine-tuned, or refused with why.

tests/fixtures/version_1 was written by commit c22550c, before nnssl/weights was one package and before checkpoints held
``identity`` and ``transfer``; its cases are those of ``tiny_preprocessed(901, n=3, shape=(12, 16, 12))``.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from nnssl import checkpoint, transfer
from nnssl.convert import describe
from nnssl.errors import NnsslError
from nnssl.networks import build_network, canonical_state_dict
from nnssl.plans import load_plan
from nnssl.pretrain import run
from nnssl.weights import write_variant

KEPT = Path(__file__).parents[1] / "fixtures" / "version_1"


@pytest.fixture
def old_run(tiny_preprocessed, nnunet_env):
    """The folder of the run, beside the data that it was begun with."""
    plans = json.loads((KEPT / "nnUNetPlans.json").read_text())
    tiny_preprocessed(901, "Tiny", 3, plans=plans, shape=(12, 16, 12))
    folder = nnunet_env.results / "Dataset901_Tiny" / "nnsslMae__nnUNetPlans__3d_fullres"
    folder.mkdir(parents=True)
    for name in ("checkpoint_latest.pth", "config.json", "metrics.jsonl"):
        shutil.copy(KEPT / name, folder)
    return folder


def test_it_is_read(old_run):
    file = old_run / "checkpoint_latest.pth"
    told = checkpoint.load(file)
    assert told.nnssl["schema"] == 1 and told.method == "mae" and told.training["step"] == 2
    assert "identity" not in told.training and not told.transfer and told.verdict is None
    assert told.pretrained_parts == {"encoder": True, "decoder_stages": [0, 1]}
    assert describe(file)["kind"] == "pretraining of nnssl" and describe(file)["method"] == "mae"


def test_it_is_continued_from_where_it_was(old_run):
    before = checkpoint.load(old_run / "checkpoint_latest.pth")
    result = run(901, method="mae", device="cpu", continue_run=True)
    assert result.finished and result.folder == old_run
    rows = [json.loads(line) for line in (old_run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["event"] == "epoch"] == [2, 4, 6]
    after = checkpoint.load(result.checkpoint)
    assert after.nnssl["step"] == 6 and after.nnssl["config"] == before.nnssl["config"]
    changed = {n for n, t in after.weights.items() if not torch.equal(t, before.weights[n])}
    assert any(n.startswith("encoder.") for n in changed)
    history = checkpoint.load(old_run / "checkpoint_latest.pth").training["history"]
    assert len(history) == 3 and history[0]["train/total"] == pytest.approx(0.6822199)


def test_an_option_that_it_did_not_know_is_named(old_run):
    path = old_run / "config.json"
    content = json.loads(path.read_text())
    del content["identity"]["options"]["mirror"]
    path.write_text(json.dumps(content))
    with pytest.raises(NnsslError, match="options.mirror: not known in the folder, True now") as error:
        run(901, method="mae", device="cpu", continue_run=True)
    assert "an earlier version began it" in str(error.value) and "--init" in str(error.value)
    assert "Leave those options out" not in str(error.value)


def test_networks_take_its_weights(old_run):
    file, plan = old_run / "checkpoint_latest.pth", load_plan(901)
    network = build_network(plan)
    report = transfer.apply(network, checkpoint.load(file), plan)
    stored, now = checkpoint.load(file).weights, canonical_state_dict(network)
    taken = [n for n in now if ".seg_layers." not in n]
    assert taken and all(torch.equal(now[n], stored[n]) for n in taken)
    assert all(part.loaded for part in report.parts if "encoder" in part.part)


def test_it_is_fine_tuned_from(old_run):
    from nnssl.trainers import nnUNetTrainerPretrained

    path = write_variant(load_plan(901), "old", checkpoint=old_run / "checkpoint_latest.pth", epochs=1, iterations=1)
    plans = {**json.loads(path.read_text()), "continue_training": False}
    info = json.loads((path.parent / "dataset.json").read_text())
    trainer = nnUNetTrainerPretrained(plans, "3d_fullres", 0, info, torch.device("cpu"))
    trainer.get_dataloaders = lambda: (None, None)
    trainer.on_train_start()
    stored, now = checkpoint.load(KEPT / "checkpoint_latest.pth").weights, canonical_state_dict(trainer.network)
    assert all(torch.equal(t, stored[n]) for n, t in now.items() if n.startswith("encoder."))
