"""``nnssl_pretrain`` as a user types it, right and wrong."""

import pytest

from nnssl.pretrain.cli import main

SMALL = ["--epochs", "1", "--iterations", "2", "-device", "cpu", "-o", "workers=0", "held_out_batches=1"]


def test_list_names_methods_and_options(capsys):
    assert main(["--list"]) == 0
    assert "macl" in capsys.readouterr().out
    assert main(["--list", "-m", "macl"]) == 0
    out = capsys.readouterr().out
    for word in ("temperature", "batch_size", "preset", "paper", "arXiv"):
        assert word in out


def test_missing_and_abbreviated_arguments_are_refused(capsys):
    with pytest.raises(SystemExit) as error:
        main(["-d", "1"])
    assert error.value.code == 2
    with pytest.raises(SystemExit):
        main(["-d", "1", "-m", "macl", "--epoch", "3"])
    assert "Did you mean '--epochs'?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        main(["-d", "901", "-m", "macl", "-device", "gpu"])
    assert error.value.code == 2
    assert "-device gpu: it can be cuda, cpu, mps." in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        main(["-d", "901", "-m", "macl", "--crop", "8,a,8"])
    assert error.value.code == 2
    assert "--crop: '8,a,8' is not a list of whole numbers such as 8,16,32" in capsys.readouterr().err


def test_help_works(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0
    assert "nnUNetTrainerPretrained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-d", "77", "-m", "macl"], "77"),
        (["-d", "901", "-m", "mcal"], "Did you mean 'macl'"),
        (["-d", "901", "-m", "macl", "-c", "3d_fulres"], "Did you mean '3d_fullres'"),
        (["-d", "901", "-m", "macl", "-p", "nnUNetPlan"], "nnUNetPlans"),
        (["-d", "901", "-m", "macl", "-o", "temperature=0"], r"'temperature' must be a number in \[0.01"),
        (["-d", "901", "-m", "macl", "-o", "temprature=1"], "Did you mean 'temperature'"),
        (["-d", "901", "-m", "macl", "-o", "preset=papr"], "Did you mean 'paper'"),
        (["-d", "901", "-m", "macl", "--crop", "9,8,8"], "multiple of"),
        (["-d", "901", "-m", "macl", "-num_gpus", "0"], "at least 1"),
        (["-d", "901", "-m", "macl", "--name", "a__b"], "__"),
        (["-d", "901", "902", "-m", "macl"], "-t"),
        (["-d", "902", "-m", "macl"], "nnUNetv2_plan_and_preprocess"),
        (["-d", "903", "-m", "macl", "-p", "mine"], "no labels.*-t"),
        (["-d", "903", "-m", "macl", "--planner", "resnec"], "resenc_m"),
        (["-d", "901", "-m", "macl", "--cases", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_misuse_gets_one_line_that_tells_the_fix(tiny_preprocessed, tiny_raw_dataset, capsys, arguments, words):
    import re

    tiny_preprocessed(901, "Tiny", 4)
    tiny_raw_dataset(902, "Unplanned", 1)
    tiny_raw_dataset(903, "Unlabelled", 1, labelled=False)
    assert main([*arguments, *SMALL[:6]]) == (2 if "-num_gpus" in arguments else 1)
    err = capsys.readouterr().err
    assert err.startswith("Error: ")
    assert "Traceback" not in err
    assert re.search(words, err), err


def test_cuda_is_the_default_and_its_error_names_the_way_out(tiny_preprocessed, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    tiny_preprocessed(901, "Tiny", 4)
    assert main(["-d", "901", "-m", "macl"]) == 1
    assert "-device cpu" in capsys.readouterr().err


def test_from_unlabelled_images_to_weights_for_another_dataset(tiny_preprocessed, tiny_raw_dataset, nnunet_env, capsys):
    tiny_preprocessed(901, "Tiny", 4)
    tiny_raw_dataset(900, "Unlabelled", 6, labelled=False, seed=1)
    assert main(["-d", "900", "-t", "901", "-m", "macl", *SMALL]) == 0
    out = capsys.readouterr().out
    folder = nnunet_env.results / "Dataset901_Tiny" / "nnsslMacl_d900__nnUNetPlans__3d_fullres"
    assert (folder / "checkpoint_final.pth").is_file()
    assert "nnUNetv2_train 901 3d_fullres 0 -tr nnUNetTrainerPretrained" in out
    assert main(["-d", "900", "-t", "901", "-m", "macl", *SMALL]) == 1
    assert "--name" in capsys.readouterr().err


def test_2d(tiny_preprocessed, nnunet_env, capsys):
    tiny_preprocessed(901, "Tiny", 4, dim=2)
    assert main(["-d", "901", "-m", "macl", "-c", "2d", *SMALL]) == 0, capsys.readouterr().err
