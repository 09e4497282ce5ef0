"""What the benchmarks share: a phantom dataset in a folder of its own, clocks, and the table and JSON that come out.

Times are CPU seconds of one thread unless a name says ``wall``: they do not depend on what else the machine does, but for caches
and memory bandwidth.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["nnUNet_n_proc_DA"] = "0"

import numpy as np
import torch

SPACING = (1.0, 1.0, 1.0)


@contextmanager
def workspace() -> Iterator[Path]:
    """nnU-Net's three folders, empty, below a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="nnssl_benchmark_") as name:
        for kind in ("raw", "preprocessed", "results"):
            folder = Path(name) / kind
            folder.mkdir()
            os.environ[f"nnUNet_{kind}"] = str(folder)
        yield Path(name)


def dataset_json(n: int) -> dict[str, Any]:
    """Of an MR dataset with one channel and one label."""
    return {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "organ": 1},
        "numTraining": n,
        "file_ending": ".nii.gz",
    }


def plans(
    patch: tuple[int, ...], features: tuple[int, ...], name: str, median: tuple[int, ...], arch: str = "plain"
) -> dict[str, Any]:
    """nnU-Net plans of a PlainConvUNet (or, with ``arch="resenc"``, ResidualEncoderUNet) with stages of stride 2."""
    n = len(features)
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    architecture: dict[str, Any] = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": n,
            "features_per_stage": list(features),
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * n,
            "strides": [[1, 1, 1]] + [[2, 2, 2]] * (n - 1),
            "n_conv_per_stage": [2] * n,
            "n_conv_per_stage_decoder": [2] * (n - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    if arch == "resenc":
        kwargs = architecture["arch_kwargs"]
        del kwargs["n_conv_per_stage"]
        kwargs["n_blocks_per_stage"] = [1, 3, 4, 6, 6, 6][:n]
        kwargs["n_conv_per_stage_decoder"] = [1] * (n - 1)
        architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    statistic = dict.fromkeys(("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std"), 1.0)
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch),
        "median_image_size_in_voxels": [float(m) for m in median],
        "spacing": list(SPACING),
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
        "architecture": architecture,
        "batch_dice": False,
    }
    return {
        "dataset_name": name,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": list(SPACING),
        "original_median_shape_after_transp": list(median),
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": statistic},
    }


def phantom(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A smooth image ``(1, Z, Y, X)`` float32 with a dark border, and labels of the same shape."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*[np.linspace(-1, 1, s, dtype=np.float32) for s in shape], indexing="ij")
    inside = sum(g**2 for g in grid) < 0.9
    waves = sum(np.sin(rng.uniform(3, 12) * g + rng.uniform(0, 6)) for g in grid)
    image = np.where(inside, 100 + 30 * waves + rng.normal(0, 5, shape), 0).astype(np.float32)
    return image[None], (inside & (waves > 1))[None].astype(np.int16)


def make_dataset(
    n: int,
    *,
    id: int = 901,
    shape: tuple[int, ...] = (96, 112, 96),
    patch: tuple[int, ...] = (64, 64, 64),
    features: tuple[int, ...] = (16, 32, 64, 128),
    preprocessed: bool = True,
    different: int = 1,
    arch: str = "plain",
    spacing: float = 1.0,
) -> Any:
    """Write a dataset of ``n`` cases, the first ``different`` of them made and the others links to these; returns its plan.

    The raw images are there too, with voxels of ``spacing`` mm; the plan has 1 mm. With ``preprocessed`` they are preprocessed by
    nnU-Net, so that they are used as they are.
    A benchmark that reads needs many different ones: a few stay in the processor's caches, as real data sets do not.
    """
    import SimpleITK as sitk
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    from nnssl.plans import load_plan

    name = f"Dataset{id:03d}_Phantom"
    raw, target = Path(os.environ["nnUNet_raw"]) / name, Path(os.environ["nnUNet_preprocessed"]) / name
    for folder in (raw / "imagesTr", raw / "labelsTr", target):
        folder.mkdir(parents=True)
    made = [f"case_{i:06d}" for i in range(min(n, different))]
    for i, case in enumerate(made):
        image, label = phantom(shape, id + 1000 * i)
        for voxels, file in ((image, f"imagesTr/{case}_0000"), (label, f"labelsTr/{case}")):
            written = sitk.GetImageFromArray(voxels[0])
            written.SetSpacing((spacing,) * 3)
            sitk.WriteImage(written, str(raw / f"{file}.nii.gz"))
    content = plans(patch, features, name, shape, arch)
    for folder in (raw, target):
        (folder / "dataset.json").write_text(json.dumps(dataset_json(n)))
    (target / "nnUNetPlans.json").write_text(json.dumps(content))
    plan = load_plan(id)
    links = [raw / "imagesTr"]
    if preprocessed:
        folder = target / plan.data_identifier
        folder.mkdir()
        config = plan.manager.get_configuration("3d_fullres")
        preprocessor = DefaultPreprocessor(verbose=False)
        for case in made:
            files = [str(raw / "imagesTr" / f"{case}_0000.nii.gz")], str(raw / "labelsTr" / f"{case}.nii.gz")
            preprocessor.run_case_save(str(folder / case), *files, plan.manager, config, dataset_json(n))
        links.append(folder)
    for folder in links:
        files_of = {case: sorted(folder.glob(f"{case}*")) for case in made}
        for i in range(len(made), n):
            case = made[i % len(made)]
            for first in files_of[case]:
                os.link(first, folder / first.name.replace(case, f"case_{i:06d}"))
    return plan


def as_source(plan: Any, id: int = 902) -> str:
    """Another dataset of the same raw images, which is preprocessed into a folder of our own; returns its name."""
    name = f"Dataset{id:03d}_Source"
    raw = Path(os.environ["nnUNet_raw"])
    (raw / name / "imagesTr").mkdir(parents=True)
    for file in (raw / plan.dataset_name / "imagesTr").iterdir():
        os.link(file, raw / name / "imagesTr" / file.name)
    (raw / name / "dataset.json").write_text((raw / plan.dataset_name / "dataset.json").read_text())
    return name


def request_of(method: Any, plan: Any, stats: Any, config: Any, size: tuple[int, ...] | None = None) -> Any:
    """What a method asks from disk: crops of ``size`` where they are legal, else of its own choice; None where none is."""
    from nnssl.errors import NnsslError

    for wanted in dict.fromkeys((size, None)):
        try:
            return method.crops(plan, stats, config, wanted)
        except NnsslError as error:
            sys.stderr.write(f"{method.name}: {error}\n")
    return None


def used() -> float:
    """CPU seconds of this process and of its children that have ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, kinds))


def ratios(sides: dict[str, Callable[[], float]], rounds: int, base: str) -> dict[str, dict[str, float]]:
    """Costs of several sides, measured in turn (A, B, A, B ...), so that what slows the machine down slows all of them.

    Args:
        sides: name -> what measures it once and gives its cost.
        rounds: how often each.
        base: what the others are compared with.

    Returns:
        Of each side ``cost``, its mean; ``ratio``, to the base's mean; ``low`` and ``high``, the least and the largest ratio of a
        round.
    """
    costs: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            costs[name].append(side())
    means = {name: statistics.fmean(values) for name, values in costs.items()}
    found = {}
    for name, values in costs.items():
        each = [a / b for a, b in zip(values, costs[base])]
        found[name] = {"cost": means[name], "ratio": means[name] / means[base], "low": min(each), "high": max(each)}
    return found


def cpu_seconds(body: Callable[[], Any], repeats: int = 3) -> float:
    """Least CPU time of several calls."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        body()
        times.append(time.process_time() - begin)
    return min(times)


def machine() -> dict[str, Any]:
    """What the numbers were measured on, without anything that names the machine."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "gpu": gpu,
        "load": load,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table."""
    keys = list(dict.fromkeys(k for row in rows for k in row))
    text = [[str(k) for k in keys]] + [[_show(row.get(k, "")) for k in keys] for row in rows]
    widths = [max(len(line[i]) for line in text) for i in range(len(keys))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in text]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _show(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def parser(description: str | None) -> argparse.ArgumentParser:
    """``--quick`` and ``--out FILE``, which every benchmark has."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="smaller and shorter: to see that it runs")
    p.add_argument("--out", type=Path, help="JSON file of the results")
    return p


def arguments(description: str | None, **extra: Any) -> argparse.Namespace:
    """``--quick``, ``--out FILE``, and a script's own options ``name=(default, help)``."""
    p = parser(description)
    for name, (default, text) in extra.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{text} ({default})")
    return p.parse_args()


def report(name: str, rows: list[dict[str, Any]], out: Path | None) -> None:
    """Print the table; write the JSON where asked for."""
    sys.stdout.write(f"\n## {name}\n\n{table(rows)}\n")
    sys.stdout.flush()
    if out is not None:
        out.write_text(json.dumps({"benchmark": name, "machine": machine(), "rows": rows}, indent=2) + "\n")
