"""Two gloo processes with half of a batch each: the same teacher on both, and that of one process with the whole batch."""

import json
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nnssl.networks import canonical_state_dict
from nnssl.plans import load_plan
from nnssl.trainers import nnUNetTrainerMeanTeacher
from nnssl.trainers.pool import split_transforms
from nnssl.weights import write_variant

STEPS = 3


def build(folder):
    plans = json.loads((folder / "nnUNetPlans_few.json").read_text())
    plans["continue_training"] = False
    info = json.loads((folder / "dataset.json").read_text())
    torch.manual_seed(0)
    trainer = nnUNetTrainerMeanTeacher(plans, "3d_fullres", 0, info, torch.device("cpu"))
    trainer.initialize()
    trainer.figures = trainer.figures.with_labels(1)
    rotation, dummy, _, mirror = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    scales, patch = trainer._get_deep_supervision_scales(), trainer.configuration_manager.patch_size
    _, trainer._targets = split_transforms(
        trainer.get_training_transforms(patch, rotation, scales, mirror, dummy, use_mask_for_norm=[False]),
        1.0,
        "nnunet",
    )
    return trainer


def batch_of(trainer, step, rows):
    """``rows`` of four labelled patches and of four without labels."""
    g, patch = torch.Generator().manual_seed(step), trainer.configuration_manager.patch_size
    label = torch.randint(0, 3, (4, 1, *patch), generator=g).to(torch.int16)
    data, views = torch.randn(4, 1, *patch, generator=g), torch.randn(4, 2, *patch, generator=g)
    outside = torch.zeros(4, 1, *patch, dtype=torch.int16)
    return {
        "data": data[rows],
        "target": trainer.targets_of(label[rows]),
        "views": views[rows],
        "outside": outside[rows],
    }


def train(trainer, rows):
    trainer.current_epoch = 1
    trainer._make_teacher()
    for step in range(STEPS):
        trainer.train_step(batch_of(trainer, step, rows))
    return {k: v.clone() for k, v in canonical_state_dict(trainer.teacher.module).items()}


def worker(rank, port, folder, out):
    torch.set_num_threads(1)
    trainer = build(folder)  # before there are ranks: nnU-Net's DDP needs CUDA, so the wrapping is done here
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    trainer.network = torch.nn.parallel.DistributedDataParallel(trainer.network, find_unused_parameters=True)
    trainer.is_ddp = True
    torch.save(train(trainer, slice(2 * rank, 2 * rank + 2)), out / f"{rank}.pth")
    dist.destroy_process_group()


def test_ranks_have_one_teacher_and_it_is_that_of_one_process(dataset, tmp_path):
    write_variant(load_plan(901), "few", labels=1, schedule="mean-teacher", epochs=2, iterations=STEPS)
    whole = train(build(dataset), slice(0, 4))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port, dataset, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    assert first.keys() == second.keys() == whole.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    # a gradient clipped by its norm and Adam's first steps magnify rounding where a gradient is all but zero
    moved = [(first[k] - whole[k]).abs().max().item() for k in first]
    assert max(moved) < 1e-3 and sorted(moved)[len(moved) // 2] < 1e-5
