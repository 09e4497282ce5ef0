"""Plan variants: what changes and what stays, what is refused, and checkpoints that are named."""

import json
import os
import shutil

import pytest
import torch

from nnssl.errors import NnsslError
from nnssl.files import sha256_of
from nnssl.networks import build_network, canonical_state_dict
from nnssl.paths import decode_path
from nnssl.plans import Changes, check_name, derive, load_plan
from nnssl.weights import write_variant


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
        ({"patch": (4, 8, 16)}, None),  # two voxels at the bottleneck
        ({"patch": (16, 30, 20), "features": (4, 8, 16)}, r"axis y has 30 voxels.*total stride 4"),
        ({"patch": (2, 0, 24)}, r"axis z has 2 voxels.*axis y has 0 voxels"),
        ({"patch": (16, 32)}, r"--patch has 2 numbers; configuration 3d_fullres has 3 axes"),
        ({"patch": (4, 8, 8)}, r"leaves one voxel at the bottleneck"),
        ({"features": (4, 8, 16, 32, 64)}, r"--features names 5 stages; .* has 4. .* so 3 to 4 numbers"),
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


def test_a_variant_in_memory_chooses_its_cases_as_a_written_one(folder):
    data = folder / load_plan(4).data_identifier
    data.mkdir()
    for case in "abc":
        (data / f"{case}.b2nd").touch()
    variant = derive(load_plan(4), "x", labels=1, seed=3)
    assert variant.nnssl["seed"] == 3 and variant.nnssl["labels"] == "1"
    assert {fold: len(cases) for fold, cases in variant.nnssl["train_cases"].items()} == dict.fromkeys(
        ["0", "1", "2", "all"], 1
    )
    assert variant.nnssl == load_plan(4, plans_name=write_variant(load_plan(4), "x", labels=1, seed=3).stem).nnssl
    assert derive(load_plan(4), "x", labels=1).nnssl["seed"] == 0


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


def test_checkpoint_below_the_results_stays_there(folder, nnunet_env, save_pretrained):
    plan = load_plan(4)
    file = save_pretrained(
        nnunet_env.results / folder.name / "nnsslMACL__nnUNetPlans__3d_fullres" / "checkpoint_final.pth", plan
    )
    write_variant(plan, "macl", checkpoint=file)
    told = load_plan(4, plans_name="nnUNetPlans_macl").nnssl
    assert told["checkpoint"] == (
        "nnUNet_results:Dataset004_Hippocampus/nnsslMACL__nnUNetPlans__3d_fullres/checkpoint_final.pth"
    )
    assert told["sha256"] == sha256_of(file)
    assert not (nnunet_env.results / folder.name / "nnssl_imported").exists()


def test_checkpoint_from_elsewhere_is_copied_once_and_moves_with_the_results(
    folder, nnunet_env, tmp_path, monkeypatch, save_pretrained
):
    plan = load_plan(4)
    file = save_pretrained(tmp_path / "download" / "weights.pth", plan)
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


def test_checkpoint_that_does_not_fit_is_refused_with_the_reason_and_nothing_is_left(
    folder, nnunet_env, tmp_path, save_pretrained
):
    plan = load_plan(4)
    file = save_pretrained(tmp_path / "weights.pth", load_plan(4, plans_name="nnUNetResEncUNetMPlans"))
    with pytest.raises(NnsslError, match="(?s)does not fit plans 'nnUNetPlans_x'.*ResidualEncoderUNet.*PlainConvUNet"):
        write_variant(plan, "x", checkpoint=file)
    fits = save_pretrained(tmp_path / "fits.pth", plan)
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


def test_truncating_a_variant_that_names_a_checkpoint_is_refused(folder, tmp_path, save_pretrained):
    plan = load_plan(4)
    write_variant(plan, "a", checkpoint=save_pretrained(tmp_path / "w.pth", plan))
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


def test_changes_are_one_object_or_arguments_or_both(folder):
    plan = load_plan(4)
    asked = Changes(epochs=3, features=(4, 8, 16), schedule="sawtooth")
    one, other = derive(plan, "x", asked), derive(plan, "x", epochs=3, features=(4, 8, 16), schedule="sawtooth")
    assert one.plans == other.plans and one.nnssl["schedule"] == "sawtooth"
    assert derive(plan, "x", asked, epochs=5).nnssl["epochs"] == 5 and asked.epochs == 3
    with pytest.raises(TypeError, match="epoch"):
        derive(plan, "x", epoch=5)


def test_a_change_that_there_is_not_gets_the_nearest_name(tiny_preprocessed):
    tiny_preprocessed(901)
    with pytest.raises(TypeError, match=r"there is no argument 'epoch'. Did you mean 'epochs'\?"):
        write_variant(load_plan(901), "v", epoch=3)
