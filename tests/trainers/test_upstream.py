"""nnU-Net's own fine-tuning from self-supervised checkpoints takes ours. Runs where the installed nnunetv2 has its commands."""

import json
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch

from nnssl import checkpoint
from nnssl.networks import build_network, canonical_state_dict
from nnssl.plans import load_plan
from nnssl.weights import convert

TRAIN = """
import json, sys, torch
from nnunetv2.run.run_training_from_pretrained import get_trainer_from_args
trainer = get_trainer_from_args("901", "3d_fullres", 0, "DynamicPretrainedTrainer", sys.argv[1], torch.device("cpu"))
trainer.initialize()
torch.save(trainer.network.state_dict(), sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["plain", "resenc"])
@pytest.mark.parametrize("form", ["nnssl", "upstream"])
def test_nnunets_own_fine_tuning_takes_our_checkpoints(arch, form, tiny_preprocessed, tmp_path):
    if find_spec("nnunetv2.experiment_planning.like_nnssl") is None:
        pytest.skip(
            f"nnunetv2 {version('nnunetv2')} has neither nnUNetv2_plan_like_dynamic nor nnUNetv2_train_pretrained"
        )
    folder = tiny_preprocessed(901, "Tiny", 5, arch=arch, plan_options={"features": (4, 8, 8), "patch": (16, 16, 16)})
    plan = load_plan(901)
    torch.manual_seed(3)
    network = build_network(plan)
    payload = checkpoint.build_payload(
        network, plan, method="mae", config={}, crop_size=(8, 8, 8), data={}, citations=["Someone (2024)."],
        pretrained_parts={"encoder": True, "decoder_stages": []},
    )  # fmt: skip
    file = tmp_path / "ours.pth"
    checkpoint.save(file, payload)
    if form == "upstream":
        convert(file, tmp_path / "upstream.pth", "upstream")
        file = tmp_path / "upstream.pth"
    code = "from nnunetv2.experiment_planning.like_nnssl import plan_like_dynamic_entrypoint as e; e()"
    for command in (
        ["-c", code, "-d", "901", "-n", "ours", "-pc", str(file), "-pl", "nnUNetPlans"],
        ["-c", TRAIN, "ptPlans_dynamic__ours", str(tmp_path / "state.pth")],
    ):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads((folder / "ptPlans_dynamic__ours.json").read_text())["pretrain_info"]["checkpoint_path"] == str(
        file
    )
    theirs = torch.load(tmp_path / "state.pth")
    encoder = {n: t for n, t in canonical_state_dict(network).items() if n.startswith("encoder.")}
    assert len(encoder) > 20 and [n for n, t in encoder.items() if not torch.equal(theirs[n], t)] == []
