"""What the teacher's update and the voxel contrast cost, against the number of parameters and of voxels.

python benchmarks/ema_infonce.py
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from common import arguments, cpu_seconds, report
from torch import nn


def network(features: tuple[int, ...]) -> nn.Module:
    """A PlainConvUNet as nnU-Net plans it."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    n = len(features)
    strides = [[1, 1, 1]] + [[2, 2, 2]] * (n - 1)
    norm = {"norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"eps": 1e-5, "affine": True}}
    norm |= {"nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True}}
    return PlainConvUNet(1, n, list(features), nn.Conv3d, [[3, 3, 3]] * n, strides, 2, 3, 2, True, **norm)


def loop(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """The update tensor by tensor, for comparison."""
    with torch.no_grad():
        for mine, theirs in zip(teacher.parameters(), student.parameters()):
            mine.mul_(momentum).add_(theirs, alpha=1 - momentum)


def main() -> None:
    """Print the tables."""
    args = arguments(__doc__, repeats=(5, "calls of which the fastest counts"))
    torch.set_num_threads(1)
    from nnssl.ema import EMA
    from nnssl.losses.info_nce import info_nce

    rows: list[dict[str, Any]] = []
    sizes = [(4, 8, 16)] if args.quick else [(16, 32, 64, 128), (32, 64, 128, 256), (32, 64, 128, 256, 320, 320)]
    for features in sizes:
        student = network(features)
        ema, plain = EMA(student), copy.deepcopy(student)
        n = sum(p.numel() for p in student.parameters())
        ours = cpu_seconds(lambda e=ema, s=student: e.update(s, 0.99), args.repeats)
        single = cpu_seconds(lambda p=plain, s=student: loop(p, s, 0.99), args.repeats)
        rows.append(
            {"what": "EMA update", "N": n, "cpu_ms": 1e3 * ours, "ns_per_N": 1e9 * ours / n, "loop_ms": 1e3 * single}
        )
    for n in (64, 128) if args.quick else (256, 1024, 4096, 8192):
        a, b = (nn.functional.normalize(torch.randn(n, 128), dim=1).requires_grad_() for _ in range(2))
        seconds = cpu_seconds(lambda x=a, y=b: info_nce(x, y, 0.1).backward(), 2)
        row = {"what": "InfoNCE, D=128", "N": n, "cpu_ms": 1e3 * seconds, "ns_per_N": 1e9 * seconds / n}
        rows.append(row | {"loop_ms": None})
    report("EMA and InfoNCE", rows, args.out)


if __name__ == "__main__":
    main()
