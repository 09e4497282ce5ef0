"""nnUNetTrainerPretrained on a tiny dataset: which weights it starts from, and what it refuses."""

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from trained import equal_weights, is_constant, log_of

from nnssl import checkpoint
from nnssl.errors import NnsslError
from nnssl.networks import canonical_state_dict
from nnssl.plans import load_plan
from nnssl.trainers import nnUNetTrainerPretrained, nnUNetTrainerPretrainedScratch
from nnssl.weights import write_variant


def test_signature_is_nnunets():
    ours = inspect.signature(nnUNetTrainerPretrained.__init__).parameters
    theirs = inspect.signature(nnUNetTrainer.__init__).parameters
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


def test_pretrained_weights_on_the_command_line_win(pretraining, tmp_path, build, start):
    from nnunetv2.run.run_training import maybe_load_checkpoint

    pretraining()
    given = pretraining(name="other", seed=8)
    trainer = build()
    maybe_load_checkpoint(trainer, False, False, str(given))
    start(trainer)
    weights = {n for n in canonical_state_dict(trainer.network) if not is_constant(n) and ".seg_layers." not in n}
    assert weights <= equal_weights(trainer.network, given)
    log = log_of(trainer)
    assert re.search(
        rf"-pretrained_weights has set {len(weights)} of \d+ tensors, 9\d.*; no pretraining is searched\.", log
    )
    assert (
        json.loads(Path(trainer.output_folder, "transfer_report.json").read_text())["source"] == "-pretrained_weights"
    )
    assert trainer.provenance["weights"] == "-pretrained_weights"


def test_given_weights_of_every_tensor_need_no_training_and_the_plans_own_file_is_not_used(build):
    trainer = build()
    trainer.initialize()
    names = list(canonical_state_dict(trainer.network))
    trainer.provenance, trainer.num_epochs = {}, 0
    trainer._report_given(names, "own.pth")
    text = f"has set {len(names)} of {len(names)} tensors, 100.0 % of all parameters; the plan's own file own.pth is not used."
    assert text in log_of(trainer)


def test_the_file_that_the_plan_names(dataset, pretraining, build, start):
    pretraining()
    chosen = pretraining(name="other", seed=8, decoder_stages=(0,))
    write_variant(load_plan(901), "chosen", checkpoint=chosen)
    trainer = start(build(plans="nnUNetPlans_chosen"))
    weights = {n for n in canonical_state_dict(trainer.network) if not is_constant(n)}
    kept = weights & equal_weights(trainer.network, chosen)
    assert kept == {n for n in weights if n.startswith(("encoder.", "decoder.stages.0.", "decoder.transpconvs.0."))}
    assert "named by plans 'nnUNetPlans_chosen'" in log_of(trainer)
    assert trainer.num_epochs == 2

    chosen.write_bytes(chosen.read_bytes() + b" ")
    with pytest.raises(NnsslError, match="content has changed since.*nnssl_plan -d 901 .*--checkpoint"):
        start(build(plans="nnUNetPlans_chosen"))
    chosen.unlink()
    with pytest.raises(NnsslError, match="not on this machine"):
        start(build(plans="nnUNetPlans_chosen"))
    path = dataset / "nnUNetPlans_chosen.json"
    content = json.loads(path.read_text())
    content["nnssl"]["configuration"] = "2d"
    path.write_text(json.dumps(content))
    with pytest.raises(NnsslError, match="for configuration 2d, not 3d_fullres"):
        start(build(plans="nnUNetPlans_chosen"))


def test_several_pretrainings_are_listed_with_the_command(pretraining, build, start):
    files = [pretraining(), pretraining(name="other")]
    trainer = build()
    with pytest.raises(NnsslError, match="2 finished pretrainings fit") as error:
        start(trainer)
    assert all(str(f.parent) in str(error.value) for f in files)
    command = f"nnssl_plan -d 901 -c 3d_fullres -p nnUNetPlans --checkpoint {files[0]} --name NAME"
    assert command in str(error.value) and command in log_of(trainer)
    assert trainer.dataloader_train is None


def test_a_fold_of_fewer_than_five_cases_is_refused_before_anything_is_loaded(tiny_preprocessed, build, start):
    folder = tiny_preprocessed(902, "Few", 4)
    own_folds = (folder / "splits_final.json").rename(folder / "elsewhere")
    trainer = build(folder=folder)
    with pytest.raises(
        NnsslError, match=r"Dataset902_Few has 4 labelled cases, too few .*Type all in place of the fold 0\."
    ):
        start(trainer)
    assert "Type all in place" in log_of(trainer)
    trainer.fold = "all"
    with pytest.raises(NnsslError, match="No finished pretraining"):
        start(trainer)
    trainer.fold = 0
    own_folds.rename(folder / "splits_final.json")
    with pytest.raises(NnsslError, match="No finished pretraining"):
        start(trainer)


def test_without_a_pretraining_a_mean_teacher_is_told_its_own_images_and_trainer(
    dataset, tiny_preprocessed, build, start
):
    from nnssl.trainers import nnUNetTrainerPretrainedMeanTeacher

    tiny_preprocessed(id=902, name="Other")
    path = write_variant(load_plan(901), "few", unlabelled=[902])
    with pytest.raises(NnsslError) as error:
        start(build(nnUNetTrainerPretrainedMeanTeacher, plans=path.stem))
    assert "Type: nnssl_pretrain -d 902 -t 901 -c 3d_fullres -p nnUNetPlans_few -m mae " in str(error.value)
    assert "To train without pretraining: -tr nnUNetTrainerMeanTeacher" in str(error.value)


def test_without_a_pretraining_it_says_what_to_type(dataset, pretraining, tiny_preprocessed, build, start):
    with pytest.raises(NnsslError, match="Type: nnssl_pretrain -d 901 -c 3d_fullres -p nnUNetPlans "):
        start(build())
    file = pretraining(finished=False)
    with pytest.raises(NnsslError, match=f"Not finished; .*--c:\n  - macl, from Dataset901_Tiny: {file.parent}"):
        start(build())
    write_variant(load_plan(901), "small", features=(4, 6, 8))
    pretraining(plans="nnUNetPlans_small")
    with pytest.raises(NnsslError, match="another network of this dataset:\n.*__nnUNetPlans_small__"):
        start(build())
    other = tiny_preprocessed(id=902, name="Other")
    with pytest.raises(NnsslError, match="-d 901 -t 902 -c 3d_fullres -p nnUNetPlans -m mae\n") as error:
        start(build(folder=other))
    assert "other datasets" in str(error.value) and "nnUNetTrainerPretrainedScratch" in str(error.value)


def test_weights_that_do_not_fit_are_refused(pretraining, build, start):
    file = pretraining()
    payload = dict(checkpoint.load(file).content)
    payload["network_weights"] = {k: v for k, v in payload["network_weights"].items() if "stages.1" not in k}
    checkpoint.save(file, payload)
    trainer = build()
    with pytest.raises(NnsslError, match="promises more than fits"):
        start(trainer)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(NnsslError, match="damaged or was cut off"):
        start(build())


def test_scratch_has_the_same_schedule_and_random_weights(pretraining, tmp_path, build, start):
    from nnunetv2.run.run_training import maybe_load_checkpoint

    file = pretraining()
    scratch = start(build(nnUNetTrainerPretrainedScratch))
    weights = {n for n in canonical_state_dict(scratch.network) if not is_constant(n)}
    assert not weights & equal_weights(scratch.network, file)
    assert scratch.provenance["weights"] == "random"
    pretrained = start(build())
    assert (scratch.num_epochs, scratch.num_iterations_per_epoch, scratch.num_val_iterations_per_epoch) == (2, 2, 1)
    for epoch in (0, 1):
        for trainer in (scratch, pretrained):
            trainer.lr_scheduler.step(epoch)
        groups = zip(scratch.optimizer.param_groups, pretrained.optimizer.param_groups, strict=True)
        for a, b in groups:
            assert {k: a[k] for k in a if k != "params"} == {k: b[k] for k in b if k != "params"}
    assert all(type(trainer.optimizer) is torch.optim.Adam for trainer in (scratch, pretrained))

    given = build(nnUNetTrainerPretrainedScratch)
    maybe_load_checkpoint(given, False, False, str(file))
    with pytest.raises(NnsslError, match="takes no -pretrained_weights"):
        start(given)


def test_another_schedule_or_bad_figures_end_before_anything_is_written(dataset, nnunet_env, build):
    path = dataset / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    for figures, text in (({"schedule": "sawtooth"}, "sawtooth"), ({"epochs": -1}, "'epochs' must be .*not -1")):
        path.write_text(json.dumps({**plans, "nnssl": figures}))
        with pytest.raises(NnsslError, match=text):
            build()
    assert not list(nnunet_env.results.iterdir())


def _defaulting(file, parts, why="its decoder harms"):
    content = torch.load(file, weights_only=True)
    content["nnssl"]["transfer"] = {"parts": parts, "why": why}
    checkpoint.save(file, content)


def test_the_method_s_default_parts_are_taken_and_the_plan_overrules_them(dataset, pretraining, build, start):
    file = pretraining()
    _defaulting(file, "encoder")
    trainer = build()
    start(trainer)
    weights = {n for n in canonical_state_dict(trainer.network) if not is_constant(n)}
    assert equal_weights(trainer.network, file) & weights == {n for n in weights if n.startswith("encoder.")}
    report = Path(trainer.output_folder, "transfer_report.txt").read_text()
    assert "left out on purpose: decoder stage 0, decoder stage 1 (macl's default: its decoder harms)" in report
    assert trainer.provenance["parts"] == "default"

    path = write_variant(load_plan(901), "whole", checkpoint=file, parts="all")
    trainer = build(plans=path.stem)
    start(trainer)
    assert weights - equal_weights(trainer.network, file) == {n for n in weights if ".seg_layers." in n}
    assert trainer.provenance["parts"] == "all"


def test_a_shared_safetensors_file_is_named_and_trained_from(dataset, pretraining, build, start, tmp_path):
    from nnssl.plan_command import main
    from nnssl.weights import convert

    file = pretraining()
    share = tmp_path / "share.safetensors"
    convert(file, share, "safetensors")
    assert main(["-d", "901", "--checkpoint", str(share), "--name", "shared"]) == 0
    named = load_plan(901, plans_name="nnUNetPlans_shared").nnssl["checkpoint"]
    assert named.endswith("_shared.safetensors")
    trainer = start(build(plans="nnUNetPlans_shared"))
    weights = {n for n in canonical_state_dict(trainer.network) if not is_constant(n)}
    assert weights - equal_weights(trainer.network, file) == {n for n in weights if ".seg_layers." in n}


def test_a_training_on_a_cpu_keeps_to_the_threads_asked_for(build, monkeypatch):
    """``nnUNetv2_train -device cpu`` has taken all cores just before it builds the trainer."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 2)
        monkeypatch.setenv("OMP_NUM_THREADS", str(before + 1))
        build()
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
