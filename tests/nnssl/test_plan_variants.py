import json
import os
import shutil

import pytest
import torch

from nnssl.errors import NnsslError
from nnssl.files import sha256_of
from nnssl.networks import build_network, canonical_state_dict
from nnssl.paths import decode_path
from nnssl.plan_command import main
from nnssl.plans import Changes, Plan, check_name, derive, list_variants, load_plan
from nnssl.plans.unlabelled import prepared_folder
from nnssl.weights import build_payload, save, write_variant

STRIDES = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2))
KERNELS = ((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))


@pytest.fixture
def folder(nnunet_env, tiny_plans, tiny_dataset_json):
    """A planned dataset with a 2d and a 3d configuration, two plans files and no cases."""
    folder = nnunet_env.preprocessed / "Dataset004_Hippocampus"
    folder.mkdir()
    options = {"strides": STRIDES, "kernels": KERNELS, "patch": (16, 32, 24), "both": True, "dataset_name": folder.name}
    for arch, name in (("plain", "nnUNetPlans"), ("resenc", "nnUNetResEncUNetMPlans")):
        plans = tiny_plans(3, arch, plans_name=name, **options)
        kwargs = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        kwargs["n_conv_per_stage_decoder"] = [3, 2, 1]  # from the bottleneck up
        (folder / f"{name}.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(tiny_dataset_json()))
    return folder


def _save(path, plan, parts=None):
    parts = parts or {"encoder": True, "decoder_stages": []}
    payload = build_payload(
        build_network(plan), plan, method="macl", config={}, crop_size=plan.patch_size, pretrained_parts=parts, data={}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, payload)
    return path


@pytest.mark.parametrize("plans_name", ["nnUNetPlans", "nnUNetResEncUNetMPlans"])
def test_truncated_network(plans_name, folder):
    base = load_plan(4, plans_name=plans_name)
    path = write_variant(base, "cpu", features=(3, 5, 7), patch=(8, 20, 12), batch_size=3, epochs=5, iterations=50)
    assert path == folder / f"{plans_name}_cpu.json"
    plan = load_plan(4, plans_name=f"{plans_name}_cpu")
    assert (plan.features, plan.n_stages, plan.patch_size, plan.batch_size) == ((3, 5, 7), 3, (8, 20, 12), 3)
    assert plan.strides == base.strides[:3]
    assert plan.kernel_sizes == base.kernel_sizes[:3]
    kwargs = plan.config.network_arch_init_kwargs
    assert kwargs["n_conv_per_stage_decoder"] == [2, 1], "the stages above the removed bottleneck stay"
    blocks = "n_conv_per_stage" if plans_name == "nnUNetPlans" else "n_blocks_per_stage"
    assert kwargs[blocks] == base.config.network_arch_init_kwargs[blocks][:3]
    assert plan.data_identifier == base.data_identifier
    assert plan.data_hash == base.data_hash
    assert plan.base_plans == plans_name
    out = build_network(plan)(torch.zeros(1, 1, 8, 20, 12))
    assert out.shape == (1, 3, 8, 20, 12)


def test_only_the_chosen_configuration_and_two_keys_change(folder):
    before = (folder / "nnUNetPlans.json").read_bytes()
    base = load_plan(4)
    path = write_variant(base, "cpu", features=(4, 6, 8), epochs=5)
    plans = json.loads(path.read_text())
    original = json.loads(before)
    assert plans["configurations"]["2d"] == original["configurations"]["2d"]
    changed = {key for key in {*plans, *original} if plans.get(key) != original.get(key)}
    assert changed == {"plans_name", "nnssl", "configurations"}
    config, old = plans["configurations"]["3d_fullres"], original["configurations"]["3d_fullres"]
    assert {key for key in {*config, *old} if config.get(key) != old.get(key)} == {"architecture"}
    assert plans["nnssl"] == {
        "schema": 1,
        "base_plans": "nnUNetPlans",
        "configuration": "3d_fullres",
        "epochs": 5,
    }
    assert (folder / "nnUNetPlans.json").read_bytes() == before
    assert base.features == (4, 8, 16, 32), "the plan in memory is not changed either"


def test_configurations_that_inherit_from_the_changed_one_stay_as_they_were(folder):
    path = folder / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["3d_bs9"] = {"inherits_from": "3d_fullres", "batch_size": 9}
    plans["configurations"]["3d_bs9_more"] = {"inherits_from": "3d_bs9", "batch_dice": True}
    plans["configurations"]["2d_bs3"] = {"inherits_from": "2d", "batch_size": 3}
    path.write_text(json.dumps(plans))
    write_variant(load_plan(4), "cpu", features=(4, 8, 8), patch=(4, 8, 4), batch_size=1)
    for name in ("3d_bs9", "3d_bs9_more"):
        old, new = load_plan(4, name), load_plan(4, name, "nnUNetPlans_cpu")
        assert (new.patch_size, new.batch_size, new.features) == (old.patch_size, 9, old.features)
        assert new.architecture_hash == old.architecture_hash
    assert load_plan(4, "3d_bs9_more", "nnUNetPlans_cpu").config.batch_dice is True
    raw = json.loads((folder / "nnUNetPlans_cpu.json").read_text())
    assert raw["configurations"]["2d_bs3"] == {"inherits_from": "2d", "batch_size": 3}
    variant = write_variant(load_plan(4, "3d_bs9"), "b", patch=(8, 16, 8))  # the chosen one inherits itself
    assert load_plan(4, "3d_bs9", variant.stem).patch_size == (8, 16, 8)
    assert load_plan(4, "3d_fullres", variant.stem).patch_size == (16, 32, 24)


def test_variant_of_a_variant_keeps_the_first_base_and_what_it_was_told(folder):
    write_variant(load_plan(4), "cpu", features=(4, 8, 8), epochs=5, iterations=50)
    write_variant(load_plan(4, plans_name="nnUNetPlans_cpu"), "long", epochs=9)
    plan = load_plan(4, plans_name="nnUNetPlans_cpu_long")
    assert plan.base_plans == "nnUNetPlans"
    assert (plan.nnssl["epochs"], plan.nnssl["iterations"]) == (9, 50)
    assert plan.architecture_hash == load_plan(4, plans_name="nnUNetPlans_cpu").architecture_hash


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"patch": (16, 30, 24)},
            r"axis y has 30 voxels, which the network's total stride 8 does not divide .*24 or 32",
        ),
        ({"patch": (16, 32, 20), "features": (4, 8, 16)}, None),
        ({"patch": (16, 30, 20), "features": (4, 8, 16)}, r"axis y has 30 voxels.*total stride 4"),
        ({"patch": (2, 0, 24)}, r"axis z has 2 voxels.*axis y has 0 voxels"),
        ({"patch": (16, 32)}, r"--patch has 2 numbers; configuration 3d_fullres has 3 axes"),
        ({"patch": (4, 8, 8)}, r"leaves one voxel at the bottleneck"),
        ({"features": (4, 8, 16, 32, 64)}, r"--features names 5 stages; .* has 4, so 3 to 4 numbers"),
        ({"features": (4, 8)}, r"--features names 2 stages; .* so 3 to 4 numbers"),
        ({"features": (4, 0, 8)}, r"--features 4,0,8: each at least 1"),
        ({"epochs": -1}, r"--epochs -1: at least 0"),
        ({"val_iterations": -1}, r"--val-iterations -1: at least 1"),
        ({"batch_size": 0}, r"--batch-size 0"),
    ],
)
def test_illegal_changes(changes, message, folder):
    plan = load_plan(4)
    if message is None:
        assert derive(plan, "x", **changes).patch_size == changes["patch"]
        return
    with pytest.raises(NnsslError, match=message):
        write_variant(plan, "x", **changes)
    assert sorted(os.listdir(folder)) == ["dataset.json", "nnUNetPlans.json", "nnUNetResEncUNetMPlans.json"]


@pytest.mark.parametrize("name", ["a__b", "_a", "a_", "", "a/b", "..", "a\\b", "a.b", "a b", "a:b", "ü", "-a"])
def test_illegal_names(name, folder):
    with pytest.raises(NnsslError, match="cannot be used"):
        write_variant(load_plan(4), name, epochs=1)


@pytest.mark.parametrize("name", ["cpu", "a_b", "a-b", "1", "A9-"])
def test_legal_names(name):
    assert check_name(name) == name


def test_existing_variant_is_not_overwritten(folder):
    path = write_variant(load_plan(4), "cpu", epochs=1)
    before = path.read_bytes()
    with pytest.raises(NnsslError, match="nnUNetPlans_cpu.json exists already and is left as it is. Choose another"):
        write_variant(load_plan(4), "cpu", epochs=2)
    assert path.read_bytes() == before


def test_interrupted_write_leaves_nothing(folder, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = sorted(os.listdir(folder))
    with pytest.raises(OSError, match="No space"):
        write_variant(load_plan(4), "cpu", epochs=1)
    assert sorted(os.listdir(folder)) == before


def test_checkpoint_below_the_results_stays_there(folder, nnunet_env):
    plan = load_plan(4)
    file = _save(nnunet_env.results / folder.name / "nnsslMACL__nnUNetPlans__3d_fullres" / "checkpoint_final.pth", plan)
    write_variant(plan, "macl", checkpoint=file)
    told = load_plan(4, plans_name="nnUNetPlans_macl").nnssl
    assert told["checkpoint"] == (
        "nnUNet_results:Dataset004_Hippocampus/nnsslMACL__nnUNetPlans__3d_fullres/checkpoint_final.pth"
    )
    assert told["sha256"] == sha256_of(file)
    assert not (nnunet_env.results / folder.name / "nnssl_imported").exists()


def test_checkpoint_from_elsewhere_is_copied_once_and_moves_with_the_results(folder, nnunet_env, tmp_path, monkeypatch):
    plan = load_plan(4)
    file = _save(tmp_path / "download" / "weights.pth", plan)
    write_variant(plan, "a", checkpoint=file)
    write_variant(plan, "b", checkpoint=str(file))
    digest = sha256_of(file)
    copies = list((nnunet_env.results / folder.name / "nnssl_imported").iterdir())
    assert [c.name for c in copies] == [f"{digest[:12]}_a.pth"]
    shutil.rmtree(file.parent)
    moved = tmp_path / "moved"
    nnunet_env.results.rename(moved)
    monkeypatch.setenv("nnUNet_results", str(moved))
    for name in ("a", "b"):
        told = load_plan(4, plans_name=f"nnUNetPlans_{name}").nnssl
        assert sha256_of(decode_path(told["checkpoint"])) == digest == told["sha256"]


def test_checkpoint_that_does_not_fit_is_refused_with_the_reason_and_nothing_is_left(folder, nnunet_env, tmp_path):
    plan = load_plan(4)
    file = _save(tmp_path / "weights.pth", load_plan(4, plans_name="nnUNetResEncUNetMPlans"))
    with pytest.raises(NnsslError, match="(?s)does not fit plans 'nnUNetPlans_x'.*ResidualEncoderUNet.*PlainConvUNet"):
        write_variant(plan, "x", checkpoint=file)
    fits = _save(tmp_path / "fits.pth", plan)
    with pytest.raises(NnsslError, match="does not fit plans"):
        write_variant(plan, "x", checkpoint=fits, features=(4, 8, 16))
    (tmp_path / "text.pth").write_text("no")
    with pytest.raises(NnsslError, match="text.pth is not a checkpoint"):
        write_variant(plan, "x", checkpoint=tmp_path / "text.pth")
    assert not (folder / "nnUNetPlans_x.json").exists()
    assert not (nnunet_env.results / folder.name).exists()


def test_a_stock_checkpoint_of_a_supervised_training_can_be_named(folder, tmp_path):
    plan = load_plan(4)
    network = build_network(plan)
    torch.save({"network_weights": network.state_dict(), "trainer_name": "nnUNetTrainer"}, tmp_path / "stock.pth")
    write_variant(plan, "stock", checkpoint=tmp_path / "stock.pth")
    assert "nnssl_imported" in load_plan(4, plans_name="nnUNetPlans_stock").nnssl["checkpoint"]


def test_truncating_a_variant_that_names_a_checkpoint_is_refused(folder, tmp_path):
    plan = load_plan(4)
    write_variant(plan, "a", checkpoint=_save(tmp_path / "w.pth", plan))
    with pytest.raises(NnsslError, match=r"Derive from nnUNetPlans instead \(-p nnUNetPlans\)"):
        write_variant(load_plan(4, plans_name="nnUNetPlans_a"), "b", features=(4, 8, 16))
    write_variant(load_plan(4, plans_name="nnUNetPlans_a"), "b", epochs=3)
    assert (
        load_plan(4, plans_name="nnUNetPlans_a_b").nnssl["checkpoint"]
        == (load_plan(4, plans_name="nnUNetPlans_a").nnssl["checkpoint"])
    )


@pytest.mark.filterwarnings("ignore:Detected old nnU-Net plans format")
def test_plans_of_the_old_format_can_be_truncated(folder):
    path = folder / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    config = plans["configurations"]["3d_fullres"]
    kwargs = config.pop("architecture")["arch_kwargs"]
    config.update(
        UNet_class_name="PlainConvUNet",
        UNet_base_num_features=4,
        unet_max_num_features=320,
        n_conv_per_stage_encoder=kwargs["n_conv_per_stage"],
        n_conv_per_stage_decoder=kwargs["n_conv_per_stage_decoder"],
        num_pool_per_axis=[2, 3, 3],
        pool_op_kernel_sizes=kwargs["strides"],
        conv_kernel_sizes=kwargs["kernel_sizes"],
    )
    path.write_text(json.dumps(plans))
    write_variant(load_plan(4), "cpu", features=(4, 6, 7))
    plan = load_plan(4, plans_name="nnUNetPlans_cpu")
    assert (plan.features, plan.total_stride) == ((4, 6, 7), (2, 4, 4))
    assert "UNet_class_name" not in plan.config.configuration


def test_stock_trainer_builds_the_variants_network(tiny_preprocessed):
    """nnU-Net itself reads the file: data shared, network truncated, its own folder for results."""
    from batchgenerators.utilities.file_and_folder_operations import load_json
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    strides = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (1, 2, 2))
    folder = tiny_preprocessed(plan_options={"strides": strides})
    path = write_variant(load_plan(901), "cpu", features=(3, 5, 7), patch=(8, 12, 8), epochs=1)
    plans = {**load_json(str(path)), "continue_training": False}
    trainer = nnUNetTrainer(plans, "3d_fullres", 0, load_json(str(folder / "dataset.json")), torch.device("cpu"))
    trainer.initialize()
    expected = build_network(load_plan(901, plans_name="nnUNetPlans_cpu"))
    got, want = canonical_state_dict(trainer.network), canonical_state_dict(expected)
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}
    x = torch.randn(2, 1, 8, 12, 8)
    target = [torch.zeros(2, 1, *(n // f for n in (8, 12, 8))) for f in (1, 2)]
    assert torch.isfinite(trainer.loss(trainer.network(x), target))
    assert "nnUNetTrainer__nnUNetPlans_cpu__3d_fullres" in trainer.output_folder
    assert str(trainer.preprocessed_dataset_folder) == str(folder / "nnUNetPlans_3d_fullres")


# ------------------------------------------------------------------------------------------------ the command


def test_command_writes_and_says_what_is_next(folder, capsys):
    arguments = "-d 4 -c 3d_fullres -p nnUNetPlans --name cpu --features 8,16,32 --patch 16,20,16 --iterations 50"
    assert main([*arguments.split(), "--epochs", "5", "--val-iterations", "7", "--batch-size", "3"]) == 0
    out = capsys.readouterr().out
    assert f"Wrote {folder / 'nnUNetPlans_cpu.json'}" in out
    assert out.endswith(
        "Next, the pretraining (or, on images without labels of another dataset N: -d N -t 4), and then the fine-tuning:\n"
        "  nnssl_pretrain -d 4 -m mae -p nnUNetPlans_cpu\n"
        "  nnUNetv2_train 4 3d_fullres 0 -p nnUNetPlans_cpu -tr nnUNetTrainerPretrained\n"
    )
    plan = load_plan(4, plans_name="nnUNetPlans_cpu")
    assert (plan.features, plan.patch_size, plan.batch_size) == ((8, 16, 32), (16, 20, 16), 3)
    told = [plan.nnssl[k] for k in ("iterations", "epochs", "val_iterations", "schema")]
    assert told == [50, 5, 7, 1] and "schedule" not in plan.nnssl


def test_command_says_the_training_alone_where_it_finds_weights(folder, monkeypatch, capsys):
    from types import SimpleNamespace

    from nnssl import plan_command

    monkeypatch.setattr(plan_command, "find_pretrainings", lambda plan: [SimpleNamespace(finished=True)])
    assert main(["-d", "4", "--name", "a", "--epochs", "5"]) == 0
    line = "Next: nnUNetv2_train 4 3d_fullres 0 -p nnUNetPlans_a -tr nnUNetTrainerPretrained\n"
    assert capsys.readouterr().out.endswith(line)


def test_command_says_what_a_mean_teacher_can_start_from(folder, capsys):
    assert main(["-d", "4", "-c", "2d", "--name", "few", "--schedule", "mean-teacher"]) == 0
    assert capsys.readouterr().out.endswith(
        "Next, from random weights: nnUNetv2_train 4 2d 0 -p nnUNetPlans_few -tr nnUNetTrainerMeanTeacher\n"
        "Or from pretrained ones: nnssl_pretrain -d 4 -m mae -p nnUNetPlans_few -c 2d, and then "
        "-tr nnUNetTrainerPretrainedMeanTeacher\n"
    )


def test_command_says_what_comes_before_a_pool_that_is_not_preprocessed(folder, capsys):
    (folder.with_name("Dataset500_Scans")).mkdir()
    first = (
        "First, for the images without labels: "
        "nnssl_pretrain -d 500 -t 4 -c 3d_fullres -p nnUNetPlans_few -m mae --preprocess-only\nNext, from random weights: "
    )
    assert main(["-d", "4", "--name", "few", "--unlabelled", "500"]) == 0
    assert first in capsys.readouterr().out
    plan = load_plan(4, plans_name="nnUNetPlans_few")
    there = prepared_folder(plan, "Dataset500_Scans")
    there.mkdir()
    (there / "scan.b2nd").touch()
    (there / "scan.pkl").touch()
    assert main(["-d", "4", "--name", "few2", "--unlabelled", "500"]) == 0
    assert "First" not in capsys.readouterr().out


def test_command_2d(folder):
    assert main(["-d", "4", "-c", "2d", "--name", "cpu", "--features", "8,16,16", "--patch", "20,12"]) == 0
    assert load_plan(4, "2d", "nnUNetPlans_cpu").patch_size == (20, 12)
    assert load_plan(4, "3d_fullres", "nnUNetPlans_cpu").patch_size == (16, 32, 24)


def test_command_refuses_without_traceback(folder, capsys):
    assert main(["-d", "4", "--name", "cpu", "--epochs", "5"]) == 0
    capsys.readouterr()
    for arguments, message in [
        ("-d 4 --name cpu --epochs 6", "exists already"),
        ("-d 9 --name cpu --epochs 6", "Nearest: Dataset004_Hippocampus"),
        ("-d 4 -p other --name cpu --epochs 6", "has no plans 'other'"),
        ("-d 4 -c 3d_lowres --name x --epochs 6", "They have: 2d, 3d_fullres"),
        ("-d 4 --name a__b --epochs 6", "'a__b' cannot be used"),
        ("-d 4 --name x --patch 16,31,24", "axis y has 31 voxels"),
        ("-d 4 --name x --checkpoint absent.pth", "Error: --checkpoint: There is no checkpoint absent.pth."),
        ("-d 4 --name x", "Nothing to change"),
        ("-d 4 --epochs 5", "--name is missing"),
    ]:
        usage = message in ("Nothing to change", "--name is missing")
        assert main(arguments.split()) == (2 if usage else 1), arguments
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.startswith("Error: ")
        assert "Traceback" not in captured.err


def test_command_takes_no_abbreviations_and_no_text_for_numbers(folder, capsys):
    for arguments in ("-d 4 --name x --feat 4,8", "-d 4 --name x --features 4;8", "--name x"):
        with pytest.raises(SystemExit) as caught:
            main(arguments.split())
        assert caught.value.code == 2
    assert "not a list of whole numbers such as 8,16,32" in capsys.readouterr().err


def test_command_lists_variants(folder, capsys, tmp_path):
    assert main(["-d", "4", "--list"]) == 0
    assert "has no plan variants" in capsys.readouterr().out
    plan = load_plan(4)
    write_variant(plan, "cpu", features=(4, 8, 16), patch=(4, 8, 8), epochs=5, iterations=50)
    write_variant(plan, "macl", checkpoint=_save(tmp_path / "w.pth", plan))
    (folder / "broken.json").write_text("{")
    (folder / "nnUNetPlans_odd.json").write_text(json.dumps({"configurations": {}, "nnssl": {}}))
    assert main(["-d", "4", "--list"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line.startswith("nnUNet")] == [
        "nnUNetPlans_cpu",
        "nnUNetPlans_macl",
    ]
    assert "4x8x8" in out and "nnssl_imported" in out
    assert "nnUNetPlans_odd.json is left out" in out
    assert [v.plans_name for v in list_variants(4)] == ["nnUNetPlans_cpu", "nnUNetPlans_macl"]


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "--checkpoint FILE" in capsys.readouterr().out


def test_defects_keep_their_traceback_and_interrupts_end_quietly(capsys):
    from nnssl.command import run_command

    def defect():
        raise KeyError("bug")

    def interrupt():
        raise KeyboardInterrupt

    def full():
        raise OSError(28, "No space left on device", "x.pth")

    with pytest.raises(KeyError):
        run_command(defect)
    assert run_command(interrupt) == 130
    assert run_command(full) == 1
    assert run_command(lambda: None) == 0
    assert run_command(lambda: 3) == 3
    err = capsys.readouterr().err
    assert "No space left on device" in err and "x.pth" in err


def test_plan_is_only_a_plan_with_the_right_type(folder):
    assert isinstance(derive(load_plan(4), "x", epochs=2), Plan)


def test_changes_are_one_object_or_arguments_or_both(folder):
    plan = load_plan(4)
    asked = Changes(epochs=3, features=(4, 8, 16), schedule="sawtooth")
    one, other = derive(plan, "x", asked), derive(plan, "x", epochs=3, features=(4, 8, 16), schedule="sawtooth")
    assert one.plans == other.plans and one.nnssl["schedule"] == "sawtooth"
    assert derive(plan, "x", asked, epochs=5).nnssl["epochs"] == 5 and asked.epochs == 3
    with pytest.raises(TypeError, match="epoch"):
        derive(plan, "x", epoch=5)
