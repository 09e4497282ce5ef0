"""``nnssl_plan``: what it writes, what it says is next, what it refuses, and the list of variants."""

import json

import pytest

from nnssl.plan_command import main
from nnssl.plans import list_variants, load_plan
from nnssl.plans.unlabelled import prepared_folder
from nnssl.weights import write_variant


def test_command_writes_and_says_what_is_next(folder, capsys):
    arguments = "-d 4 -c 3d_fullres -p nnUNetPlans --name cpu --features 8,16,32 --patch 16,20,16 --iterations 50"
    assert main([*arguments.split(), "--epochs", "5", "--val-iterations", "7", "--batch-size", "3"]) == 0
    out = capsys.readouterr().out
    assert f"Wrote {folder / 'nnUNetPlans_cpu.json'}" in out
    assert out.endswith(
        "Next, the pretraining (or, on images without labels of another dataset N: -d N -t 4), and then the fine-tuning:\n"
        "  nnssl_pretrain -d 4 -c 3d_fullres -p nnUNetPlans_cpu -m mae\n"
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
        "Or from pretrained ones: nnssl_pretrain -d 4 -c 2d -p nnUNetPlans_few -m mae, and then "
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


def test_command_says_which_cases_are_not_learnt_from(folder, capsys, tmp_path):
    there, listed = prepared_folder(load_plan(4), "Dataset500_Scans"), tmp_path / "out.txt"
    there.mkdir(parents=True)
    for i in range(5):
        (there / f"scan{i}.b2nd").touch()
    listed.write_text("".join(f"scan{i}\n" for i in range(5)))
    assert main(["-d", "4", "--name", "few", "--unlabelled", "500", "--exclude", str(listed)]) == 0
    said = ", ".join(f"Dataset500_Scans/scan{i}" for i in range(3))
    assert f"  not learnt from without labels (5): {said} ...\n" in capsys.readouterr().out
    listed.write_text("scan9")
    assert main(["-d", "4", "--name", "other", "--unlabelled", "500", "--exclude", str(listed)]) == 1
    message = "1 name that no case of Dataset004_Hippocampus, Dataset500_Scans has: scan9 Did you mean 'scan"
    assert message in " ".join(capsys.readouterr().err.split())


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


def test_command_lists_variants(folder, capsys, tmp_path, save_pretrained):
    assert main(["-d", "4", "--list"]) == 0
    assert "has no plan variants" in capsys.readouterr().out
    plan = load_plan(4)
    write_variant(plan, "cpu", features=(4, 8, 16), patch=(4, 8, 8), epochs=5, iterations=50)
    write_variant(plan, "macl", checkpoint=save_pretrained(tmp_path / "w.pth", plan))
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
