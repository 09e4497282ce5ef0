"""The fixtures make what nnU-Net itself accepts: its networks, its loaders and its trainer."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch


@pytest.mark.parametrize("arch", ["plain", "resenc"])
@pytest.mark.parametrize("dim", [2, 3])
def test_plans_build_a_network(tiny_plans, tiny_dataset_json, arch, dim):
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = tiny_plans(dim, arch, channels=2)
    config = PlansManager(plans).get_configuration("3d_fullres" if dim == 3 else "2d")
    kwargs, to_import = config.network_arch_init_kwargs, config.network_arch_init_kwargs_req_import
    network = get_network_from_plans(config.network_arch_class_name, kwargs, to_import, 2, 3)
    out = network(torch.zeros(1, 2, *config.patch_size))
    out = out[0] if isinstance(out, list) else out
    assert out.shape == (1, 3, *config.patch_size)
    assert len(tiny_dataset_json(2)["channel_names"]) == 2


def test_raw_dataset_has_structure(tiny_raw_dataset):
    import SimpleITK as sitk

    folder = tiny_raw_dataset(900, "Un", 2, labelled=False, spacing=(3, 1, 1))
    assert not (folder / "labelsTr").exists()
    image = sitk.ReadImage(str(folder / "imagesTr" / "case_000_0000.nii.gz"))
    assert image.GetSpacing() == (1, 1, 3)
    assert image.GetSize() == (20, 28, 20)
    array = sitk.GetArrayFromImage(image)
    assert 0.3 < (array == 0).mean() < 0.8
    assert array[array > 0].std() > 50


def test_unlabelled_cases_preprocess(tiny_preprocessed):
    folder = tiny_preprocessed(900, "Un", 2, labelled=False, both=True, channels=2)
    assert {p.name for p in (folder / "nnUNetPlans_2d").glob("*_seg.b2nd")} == {
        "case_000_seg.b2nd",
        "case_001_seg.b2nd",
    }
    assert not (folder / "gt_segmentations").exists()


def test_stock_trainer_runs(tiny_preprocessed, nnunet_env, capsys):
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    folder = tiny_preprocessed(n=3)
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    dataset_json = json.loads((folder / "dataset.json").read_text())
    plans["continue_training"] = False
    trainer = nnUNetTrainer(plans, "3d_fullres", 0, dataset_json, torch.device("cpu"))
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 2, 1
    trainer.run_training()
    out = nnunet_env.results / folder.name / "nnUNetTrainer__nnUNetPlans__3d_fullres" / "fold_0"
    assert (out / "checkpoint_final.pth").is_file()
    assert np.isfinite(trainer.logger.get_value("train_losses", step=-1))
