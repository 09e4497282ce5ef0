"""Shared fixtures: tiny nnU-Net plans and structured phantom datasets, made in about a second without process pools.

Sizes, spacings and shapes are in nnU-Net's axis order (z, y, x), sizes in voxels, spacings in mm.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import signal
import time
import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace

# nnU-Net and torch read these once, when they are imported; no logger, since opening TensorBoard takes longer than these runs.
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "nnUNet_n_proc_DA": "0",
    "nnUNet_def_n_proc": "1",
    "nnUNet_compile": "f",
    "MPLBACKEND": "Agg",
    "nnssl_logger": "none",
}.items():
    os.environ.setdefault(_name, _value)

# Under nohup SIGHUP is ignored, and programs heed that; the tests of signals begin where nobody has ignored any.
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import SimpleITK as sitk  # noqa: E402

STRIDES = ((1, 1, 1), (2, 2, 2), (2, 2, 2))
RESAMPLING = "resample_data_or_seg_to_shape"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow-part", metavar="I/N", help="of the slow tests only every Nth, from the Ith on; with -m slow"
    )
    parser.addoption("--slow-seconds", type=float, help="start no further slow test after this time")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" in config.getoption("-m") or os.environ.get("RUN_SLOW") == "1":
        part = config.getoption("--slow-part")
        if part:
            first, step = map(int, part.split("/"))
            # By a hash of the name: a test that is added elsewhere does not move the others to another part.
            other = [i for i in items if zlib.crc32(i.nodeid.encode()) % step != first % step or "long" in i.keywords]
            config.hook.pytest_deselected(items=other)
            items[:] = [i for i in items if i not in set(other)]
        return
    skip = pytest.mark.skip(reason="slow; run with -m slow or RUN_SLOW=1")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.getoption("--slow-part") and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK  # a part may be empty


_STARTED = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--slow-seconds")
    if limit is not None and "slow" in item.keywords and time.monotonic() - _STARTED > limit:
        pytest.skip(f"the {limit:.0f} seconds for slow tests are over")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Captured text with file names that are no UTF-8: pytest-xdist can only hand over text that is."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode("utf-8")) for name, text in report.sections
    ]
    return report


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The same random numbers in each test, whatever ran before it."""
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Generator[None, None, None]:
    """A command configures the package's logger; other tests want it as it was."""
    logger = logging.getLogger("nnssl")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


def _dataset_json(
    channels: int = 1, n: int = 5, *, modality: str = "MR", labels: tuple[str, ...] = ("liver", "spleen")
) -> dict:
    return {
        "channel_names": {
            str(c): modality if c == 0 or modality == "CT" else f"{modality}{c}" for c in range(channels)
        },
        "labels": {"background": 0, **{name: i + 1 for i, name in enumerate(labels)}},
        "numTraining": n,
        "file_ending": ".nii.gz",
    }


def _architecture(arch: str, dim: int, strides: list, features: tuple, kernels: list) -> dict:
    n = len(strides)
    norm = f"torch.nn.modules.instancenorm.InstanceNorm{dim}d"
    blocks = {"n_conv_per_stage": [2] * n} if arch == "plain" else {"n_blocks_per_stage": [1] + [2] * (n - 1)}
    name = {"plain": "PlainConvUNet", "resenc": "ResidualEncoderUNet"}[arch]
    kwargs = {
        "n_stages": n,
        "features_per_stage": list(features),
        "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
        "kernel_sizes": kernels,
        "strides": strides,
        **blocks,
        "n_conv_per_stage_decoder": [2 if arch == "plain" else 1] * (n - 1),
        "conv_bias": True,
        "norm_op": norm,
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
        "arch_kwargs": kwargs,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def _plans(
    dim: int = 3,
    arch: str = "plain",
    channels: int = 1,
    *,
    strides: tuple = STRIDES,
    features: tuple[int, ...] | None = None,
    patch: tuple[int, ...] = (16, 24, 16),
    kernels: tuple | None = None,
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
    median_shape: tuple[int, ...] = (20, 28, 20),
    transpose_forward: tuple[int, ...] = (0, 1, 2),
    batch_size: int = 2,
    modality: str = "MR",
    both: bool = False,
    dataset_name: str = "Dataset901_Tiny",
    plans_name: str = "nnUNetPlans",
) -> dict:
    features = tuple(features or [4 * 2**i for i in range(len(strides))])
    scheme = "CTNormalization" if modality == "CT" else "ZScoreNormalization"
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}

    def configuration(d: int) -> dict:
        # Three-axis arguments of a 2d configuration lose their first axis.
        step = [list(s[-d:]) for s in strides]
        kernel = [list(k[-d:]) for k in kernels] if kernels else [[3] * d for _ in strides]
        return {
            "data_identifier": f"nnUNetPlans_{'3d_fullres' if d == 3 else '2d'}",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": batch_size,
            "patch_size": list(patch[-d:]),
            "median_image_size_in_voxels": [float(i) for i in median_shape[-d:]],
            "spacing": [float(i) for i in spacing[-d:]],
            "normalization_schemes": [scheme] * channels,
            "use_mask_for_norm": [False] * channels,
            "resampling_fn_data": RESAMPLING,
            "resampling_fn_seg": RESAMPLING,
            "resampling_fn_data_kwargs": resampling,
            "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
            "resampling_fn_probabilities": RESAMPLING,
            "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
            "architecture": _architecture(arch, d, step, features, kernel),
            "batch_dice": d == 2,
        }

    statistics = {
        "max": 1500.0, "mean": 600.0, "median": 590.0, "min": 10.0,
        "percentile_00_5": 100.0, "percentile_99_5": 1200.0, "std": 180.0,
    }  # fmt: skip
    plans = {
        "dataset_name": dataset_name,
        "plans_name": plans_name,
        "original_median_spacing_after_transp": [float(i) for i in spacing[-3:]],
        "original_median_shape_after_transp": [int(i) for i in median_shape[-3:]],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": list(transpose_forward),
        "transpose_backward": [int(i) for i in np.argsort(transpose_forward)],
        "configurations": {("3d_fullres" if d == 3 else "2d"): configuration(d) for d in ((2, 3) if both else (dim,))},
        "experiment_planner_used": "ExperimentPlanner" if arch == "plain" else "nnUNetPlannerResEncM",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(c): statistics for c in range(channels)},
    }
    return json.loads(json.dumps(plans))


def _phantom(shape: tuple[int, ...], rng: np.random.Generator, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """One case: ``(C, Z, Y, X)`` float32 image and ``(Z, Y, X)`` uint8 labels.

    Air is exactly 0 (so that cropping to non-zero crops), the body is an ellipsoid with a bias field, and two labelled
    and two unlabelled organs of varied size, place and contrast lie in it.
    """
    grid = np.stack(np.meshgrid(*[(np.arange(s) + 0.5) / s for s in shape], indexing="ij"))

    def ellipsoid(centre: np.ndarray, radius: np.ndarray) -> np.ndarray:
        return (((grid - centre.reshape(3, 1, 1, 1)) / radius.reshape(3, 1, 1, 1)) ** 2).sum(0)

    body = ellipsoid(np.full(3, 0.5), rng.uniform(0.42, 0.47, 3)) < 1
    image = np.stack([np.full(shape, rng.uniform(450, 550)) for _ in range(channels)])
    labels = np.zeros(shape, np.uint8)
    organs = [((0.45, 0.55, 0.35), 0.16, 250, 1), ((0.55, 0.45, 0.68), 0.12, -200, 2)]
    organs += [((0.3, 0.4, 0.5), 0.08, 500, 0), ((0.7, 0.65, 0.5), 0.09, 350, 0)]
    for centre, radius, contrast, label in organs:
        r2 = ellipsoid(np.array(centre) + rng.uniform(-0.05, 0.05, 3), radius * rng.uniform(0.8, 1.25, 3))
        inside = (r2 < 1) & body
        for c in range(channels):
            # Later channels show the organs with another contrast.
            image[c] += contrast * rng.uniform(0.7, 1.2) * (1.0 if c % 2 == 0 else -0.5) * inside
        if label:
            labels[inside] = label
    bias = 1 + sum(rng.uniform(-0.15, 0.15) * (g - 0.5) for g in grid)
    image = image * bias + rng.normal(0, rng.uniform(15, 40), image.shape)
    return (np.maximum(image, 1) * body).astype(np.float32), labels


def _write(array: np.ndarray, path: Path, spacing: tuple, origin: tuple, direction: tuple | None) -> None:
    volume = sitk.GetImageFromArray(array)
    volume.SetSpacing([float(s) for s in reversed(spacing)])
    volume.SetOrigin([float(o) for o in origin])
    if direction is not None:
        volume.SetDirection([float(d) for d in direction])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(volume, str(path))


@pytest.fixture
def tiny_plans() -> Callable[..., dict]:
    """``tiny_plans(dim=3, arch="plain"|"resenc", channels=1, *, strides, features, patch, kernels, spacing,
    median_shape, transpose_forward, batch_size, modality="MR"|"CT", both=False, dataset_name, plans_name) -> dict``.

    A complete nnU-Net plans dict as json.load would return it. ``dim`` 2 has the configuration ``2d``, 3 has
    ``3d_fullres``, ``both=True`` has both; three-axis arguments lose their first axis in ``2d``.
    """
    return _plans


@pytest.fixture
def tiny_dataset_json() -> Callable[..., dict]:
    """``tiny_dataset_json(channels=1, n=5, *, modality="MR", labels=("liver", "spleen")) -> dict``."""
    return _dataset_json


@pytest.fixture
def tiny_phantom() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """``tiny_phantom(shape, rng, channels=1) -> (image (C, Z, Y, X) float32, labels (Z, Y, X) uint8)``."""
    return _phantom


@pytest.fixture
def nnunet_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Empty nnU-Net folders below ``tmp_path``: ``.raw``, ``.preprocessed``, ``.results`` (Paths)."""
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    folders = {}
    for kind in ("raw", "preprocessed", "results"):
        folders[kind] = tmp_path / f"nnUNet_{kind}"
        folders[kind].mkdir()
        monkeypatch.setenv(f"nnUNet_{kind}", str(folders[kind]))
    return SimpleNamespace(**folders)


@pytest.fixture
def tiny_raw_dataset(nnunet_env: SimpleNamespace) -> Callable[..., Path]:
    """``tiny_raw_dataset(id=901, name="Tiny", n=5, labelled=True, *, shape=(20, 28, 20), spacing=(1, 1, 1), seed=0,
    channels=1, modality="MR", n_test=0, origin=(0, 0, 0), direction=None, prefix="case") -> Path``.

    Writes ``nnUNet_raw/Dataset<id>_<name>`` with cases ``<prefix>_000...`` and dataset.json; without labels there is no
    labelsTr and the only label is the background. Shape and spacing are (z, y, x); origin and direction are ITK's.
    """

    def make(
        id: int = 901,
        name: str = "Tiny",
        n: int = 5,
        labelled: bool = True,
        *,
        shape: tuple[int, ...] = (20, 28, 20),
        spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
        seed: int = 0,
        channels: int = 1,
        modality: str = "MR",
        n_test: int = 0,
        origin: tuple[float, ...] = (0.0, 0.0, 0.0),
        direction: tuple[float, ...] | None = None,
        prefix: str = "case",
    ) -> Path:
        folder = nnunet_env.raw / f"Dataset{id:03d}_{name}"
        rng = np.random.default_rng([seed, id])
        for i in range(n + n_test):
            image, labels = _phantom(shape, rng, channels)
            part = "Tr" if i < n else "Ts"
            if modality == "CT":
                image -= 1000 * (image == 0)
            for c in range(channels):
                file = folder / f"images{part}" / f"{prefix}_{i:03d}_{c:04d}.nii.gz"
                _write(image[c], file, spacing, origin, direction)
            if labelled:
                _write(labels, folder / f"labels{part}" / f"{prefix}_{i:03d}.nii.gz", spacing, origin, direction)
        info = _dataset_json(channels, n, modality=modality, **({} if labelled else {"labels": ()}))
        (folder / "dataset.json").write_text(json.dumps(info))
        return folder

    return make


@pytest.fixture
def tiny_preprocessed(nnunet_env: SimpleNamespace, tiny_raw_dataset: Callable[..., Path]) -> Callable[..., Path]:
    """``tiny_preprocessed(id=901, name="Tiny", n=5, labelled=True, *, plans=None, dim=3, arch="plain", channels=1,
    modality="MR", both=False, plan_options=None, **raw) -> Path``: a dataset on which nnU-Net's trainers run.

    Makes the raw dataset (``raw`` goes to ``tiny_raw_dataset``) and, with nnU-Net's own preprocessor in this process,
    ``nnUNet_preprocessed/Dataset<id>_<name>`` with plans, dataset.json, fingerprint, splits_final.json and
    gt_segmentations. ``plans`` are used as they are (but for ``dataset_name``) and else made by ``tiny_plans`` from
    ``plan_options``; spacing and median shape follow the raw data.
    """

    def make(
        id: int = 901,
        name: str = "Tiny",
        n: int = 5,
        labelled: bool = True,
        *,
        plans: dict | None = None,
        dim: int = 3,
        arch: str = "plain",
        channels: int = 1,
        modality: str = "MR",
        both: bool = False,
        plan_options: dict | None = None,
        **raw: object,
    ) -> Path:
        from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        source = tiny_raw_dataset(id, name, n, labelled, channels=channels, modality=modality, **raw)
        target = nnunet_env.preprocessed / source.name
        shape, spacing = raw.get("shape", (20, 28, 20)), raw.get("spacing", (1.0, 1.0, 1.0))
        if plans is None:
            options = {"spacing": spacing, "median_shape": shape, **(plan_options or {})}
            plans = _plans(dim, arch, channels, modality=modality, both=both, **options)
        plans = {**plans, "dataset_name": source.name}
        dataset_json = json.loads((source / "dataset.json").read_text())
        manager = PlansManager(plans)
        preprocessor = DefaultPreprocessor(verbose=False)
        cases = sorted({p.name[: -len("_0000.nii.gz")] for p in (source / "imagesTr").iterdir()})
        for configuration in plans["configurations"]:
            config = manager.get_configuration(configuration)
            folder = target / config.data_identifier
            folder.mkdir(parents=True, exist_ok=True)
            for case in cases:
                images = [str(source / "imagesTr" / f"{case}_{c:04d}.nii.gz") for c in range(channels)]
                label = str(source / "labelsTr" / f"{case}.nii.gz") if labelled else None
                preprocessor.run_case_save(str(folder / case), images, label, manager, config, dataset_json)
        if labelled:
            (target / "gt_segmentations").mkdir()
            for case in cases:
                (target / "gt_segmentations" / f"{case}.nii.gz").symlink_to(source / "labelsTr" / f"{case}.nii.gz")
        properties = [pickle.loads((folder / f"{case}.pkl").read_bytes()) for case in cases]
        fingerprint = {
            "spacings": [[float(s) for s in spacing]] * n,
            "shapes_after_crop": [
                [int(s) for s in p["shape_after_cropping_and_before_resampling"]] for p in properties
            ],
            "foreground_intensity_properties_per_channel": plans["foreground_intensity_properties_per_channel"],
            "median_relative_size_after_cropping": 1.0,
        }
        folds = min(5, n)
        splits = [
            {"train": [c for c in cases if c not in cases[k::folds]], "val": cases[k::folds]} for k in range(folds)
        ]
        if n == 1:
            splits = [{"train": cases, "val": cases}]
        for file, content in {
            "dataset.json": dataset_json,
            "dataset_fingerprint.json": fingerprint,
            "splits_final.json": splits,
            f"{plans['plans_name']}.json": plans,
        }.items():
            (target / file).write_text(json.dumps(content, indent=2))
        return target

    return make
