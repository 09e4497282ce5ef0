"""What tests share: small methods, crops, views, gradients by name, small datasets, short runs, and exports of images."""

import locale
import os
import pickle
import sys
from dataclasses import replace

import blosc2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nnssl import checkpoint
from nnssl.config import make_config
from nnssl.networks import build_network
from nnssl.paths import results_folder
from nnssl.plans import Plan, load_plan
from nnssl.plans.variants import derive
from nnssl.pretrain import run
from nnssl.pretrain.augment.rng import StepRNG
from nnssl.pretrain.data import CaseRef
from nnssl.pretrain.engine import drawing
from nnssl.pretrain.engine.hooks import Hook
from nnssl.pretrain.engine.loop import Engine
from nnssl.pretrain.methods import Crops, SourceStats, get_method


@pytest.fixture(autouse=True)
def locale_kept():
    """GDCM leaves the C locale behind when it writes DICOM, in which the UTF-8 output of a child process cannot be read."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


def _crops(method, n=3, seed=0, start=0):
    g = torch.Generator().manual_seed(seed)
    window, channels = method.request.read_size, method.plan.n_channels
    coarse = torch.randn(n, channels, *[w // 4 + 2 for w in window], generator=g)
    data = F.interpolate(coarse, size=window, mode="trilinear" if len(window) == 3 else "bilinear")
    data = data + 0.1 * torch.randn(data.shape, generator=g)
    position = torch.rand(n, 3, generator=g).double()
    return Crops(
        data=data,
        body=data[:, :1] > -0.5,
        position=position,
        axis_position=position,
        intensity=torch.tensor([-2.0, 3.0]).expand(n, channels, 2).clone(),
        start=torch.full((n, 3), start),
        case=[f"c{i}" for i in range(n)],
    )


def _batch(method, n=3, seed=0, step=0):
    with torch.no_grad():
        return method.views(_crops(method, n, seed), StepRNG(0, step, n))


def _gradients(method, batch):
    method.zero_grad(set_to_none=True)
    terms = method(batch)
    terms["total"].backward()
    return terms, {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}


@pytest.fixture
def make_crops():
    """``make_crops(method, n=3, seed=0, start=0) -> Crops``: windows of a method's request, smooth with a little noise."""
    return _crops


@pytest.fixture
def make_batch():
    """``make_batch(method, n=3, seed=0, step=0)``: the method's views of such crops."""
    return _batch


@pytest.fixture
def gradients():
    """``gradients(method, batch) -> (terms, {name: gradient})`` of one backward pass from none."""
    return _gradients


@pytest.fixture
def target(tiny_preprocessed):
    """``target(n=5, **options) -> Plan``: Dataset901_Tiny, preprocessed by nnU-Net, and its plan."""

    def make(n=5, **options) -> Plan:
        small = {"shape": (12, 16, 12), "plan_options": {"patch": (8, 8, 8)}}
        tiny_preprocessed(901, "Tiny", n, **{**small, **options})
        return load_plan(901, options.pop("configuration", "3d_fullres"))

    return make


_watched: list[list[str]] = []
_hooked: list[bool] = []


def _hook(event, arguments):
    if _watched and event == "open" and isinstance(arguments[0], (str, bytes)):
        _watched[0].append(os.fsdecode(arguments[0]))


@pytest.fixture
def opened():
    """Names of the files that are opened."""
    if not _hooked:
        sys.addaudithook(_hook)  # cannot be removed; it does nothing unless a test watches
        _hooked.append(True)
    _watched.append([])
    yield _watched[0]
    _watched.clear()


@pytest.fixture
def place(nnunet_env, tmp_path, monkeypatch):
    """What :func:`exports.place_of` makes."""
    from exports import place_of

    monkeypatch.chdir(tmp_path)
    return place_of(nnunet_env, tmp_path)


@pytest.fixture
def primus_plan(tiny_plans, tiny_dataset_json):
    """``primus_plan(kind="Primus", patch=(8, 12, 16), token=(4, 4, 4), channels=1, width=24, depth=2, heads=2, **kwargs)``."""

    def make(kind="Primus", patch=(8, 12, 16), token=(4, 4, 4), channels=1, width=24, depth=2, heads=2, **kwargs):
        from nnssl.plans.primus import architecture

        plans = tiny_plans(3, "plain", channels, patch=patch)
        if kind == "PrimusV3":
            kwargs.setdefault("ch_per_level", (4, 4, 8, 8))
        entry = architecture(kind, width, depth, heads, patch_embed_size=token, drop_path_rate=0.0, **kwargs)
        plans["configurations"]["3d_fullres"]["architecture"] = entry
        return derive(Plan.from_dicts(plans, "3d_fullres", tiny_dataset_json(channels)), "primus")

    return make


# ---- methods, each with a small network and the crops that its tests are about ---------------------------------------------

ISO = ((1, 1, 1), (2, 2, 2), (2, 2, 2))
ANISO = ((1, 1, 1), (1, 2, 2), (2, 2, 2))
STRIDED = ((1, 2, 2), (2, 2, 2), (1, 2, 2))


def _method(name, plans, description, values, *, stats, crop=None, seeded=True, change=None, **network_options):
    """The method over a network of the plans' one configuration; ``change`` of the network before."""
    plan = Plan.from_dicts(plans, next(iter(plans["configurations"])), description)
    cls = get_method(name)
    config = make_config(cls.Config, values)
    request = cls.crops(plan, stats, config, crop)
    if seeded:
        torch.manual_seed(0)
    network = build_network(plan, **network_options)
    if change:
        network = change(network) or network
    return cls(network, plan, request, config)


def _perturb_norms(network):
    """The last norm of a residual branch starts at 0."""
    for m in network.modules():
        if isinstance(m, torch.nn.modules.instancenorm._InstanceNorm):
            torch.nn.init.uniform_(m.weight, 0.5, 1.5)


@pytest.fixture
def make_macl(tiny_plans, tiny_dataset_json):
    """``make_macl(dim, arch, strides, size=None, median=..., patch=..., perturb=False, channels=1, **options)``."""

    def make(
        dim=3, arch="plain", strides=ISO, *, size=None, median=(28, 36, 26), patch=(16, 32, 16), perturb=False,
        channels=1, **options,
    ):  # fmt: skip
        features = tuple(4 + 2 * i for i in range(len(strides)))
        plans = tiny_plans(dim, arch, channels, strides=strides, features=features, patch=patch, median_shape=median)
        change, stats = _perturb_norms if perturb else None, SourceStats(median, 9)
        description = tiny_dataset_json(channels)
        return _method("macl", plans, description, options, stats=stats, crop=size, seeded=False, change=change)

    return make


@pytest.fixture
def macl_crops():
    """``macl_crops(method, b=4, channels=1, data=None)``: crops whose positions rise along an axis."""

    def make(method, b=4, channels=1, data=None):
        window = method.request.read_size
        data = torch.randn(b, channels, *window) if data is None else data
        along = torch.linspace(0.1, 0.9, b, dtype=torch.float64)
        position = torch.stack([along.flip(0), torch.full_like(along, 0.5), along], 1)
        body = torch.ones(b, 1, *window, dtype=torch.bool)
        intensity, start = torch.tensor([-2.0, 2.0]).expand(b, channels, 2), torch.zeros(b, 3, dtype=torch.long)
        return Crops(data, body, position, position, intensity, start, [f"case{i}" for i in range(b)])

    return make


@pytest.fixture
def macl_batch(macl_crops):
    """``macl_batch(method, **crops)``: the method's views of :func:`macl_crops`."""

    def make(method, **kwargs):
        crops = macl_crops(method, **kwargs)
        with torch.no_grad():
            return method.views(crops, StepRNG(0, 0, len(crops)))

    return make


@pytest.fixture
def make_mae(tiny_plans, tiny_dataset_json):
    """``make_mae(geometry="iso" | "aniso" | "strided", arch, dim, channels, features, **options)``."""
    geometries = {"iso": (ISO, (8, 12, 16)), "aniso": (ANISO, (4, 16, 12)), "strided": (STRIDED, (4, 16, 8))}

    def make(geometry="iso", arch="plain", dim=3, channels=1, features=(4, 6, 8), **options):
        strides, size = geometries[geometry]
        plans = tiny_plans(dim, arch, channels, strides=strides, patch=size, features=features)
        return _method("mae", plans, tiny_dataset_json(channels), options, stats=SourceStats((30, 40, 35), 5))

    return make


@pytest.fixture
def make_glmae(tiny_plans, tiny_dataset_json):
    """``make_glmae(geometry="iso" | "aniso", arch, dim, channels, features, median, crop, batch_size, **options)``."""
    geometries = {"iso": (ISO, (8, 12, 16)), "aniso": (ANISO, (4, 16, 12))}

    def make(
        geometry="iso", arch="plain", dim=3, channels=1, features=(4, 6, 8), median=(20, 40, 35), crop=None,
        batch_size=2, **options,
    ):  # fmt: skip
        strides, size = geometries[geometry]
        shape = {"strides": strides, "patch": size, "features": features, "batch_size": batch_size}
        plans, small = tiny_plans(dim, arch, channels, **shape), {"prototypes": 32, "hidden": 16, "bottleneck": 8}
        stats = SourceStats(median, 5)
        return _method("glmae", plans, tiny_dataset_json(channels), {**small, **options}, stats=stats, crop=crop)

    return make


@pytest.fixture
def make_hdense(tiny_plans, tiny_dataset_json):
    """``make_hdense(name="hdense" | "vox2vec", geometry=as of mae, arch, channels, modality, dim, **options)``."""
    geometries = {"iso": (ISO, (8, 12, 16)), "aniso": (ANISO, (4, 16, 8)), "strided": (STRIDED, (4, 8, 16))}

    def make(name="hdense", geometry="iso", arch="plain", channels=1, modality="MR", dim=3, **options):
        strides, size = geometries[geometry]
        plans = tiny_plans(dim, arch, channels, strides=strides, patch=tuple(2 * s for s in size), modality=modality)
        small = {"n_voxels": 24, "proj_dim": 8, "level_dim": 4 if name == "hdense" else 0, "pairs_per_volume": 1}
        about = {"stats": SourceStats((30, 40, 35), 5), "crop": size[-dim:], "seeded": False, "deep_supervision": False}
        return _method(name, plans, tiny_dataset_json(channels, modality=modality), {**small, **options}, **about)

    return make


@pytest.fixture
def hdense_crops():
    """``hdense_crops(method, n=2, seed=0, low=-2.0, high=3.0)``: windows in which nearly all is body."""

    def make(method, n=2, seed=0, low=-2.0, high=3.0):
        g = torch.Generator().manual_seed(seed)
        window, channels = method.request.read_size, method.plan.n_channels
        coarse = torch.randn(n, channels, *[w // 4 + 1 for w in window], generator=g)
        data = F.interpolate(coarse, size=window, mode="trilinear" if len(window) == 3 else "bilinear")
        data = data + 0.2 * torch.randn(data.shape, generator=g)
        position, start = torch.rand(n, 3, generator=g).double(), torch.zeros(n, 3, dtype=torch.int64)
        intensity = torch.tensor([low, high]).expand(n, channels, 2).clone()
        return Crops(data, data[:, :1] > -1, position, position, intensity, start, ["c"] * n)

    return make


@pytest.fixture
def hdense_batch(hdense_crops):
    """``hdense_batch(method, n=2, seed=0, step=0)``: the method's views of :func:`hdense_crops`."""

    def make(method, n=2, seed=0, step=0):
        with torch.no_grad():
            return method.views(hdense_crops(method, n, seed), StepRNG(0, step, n))

    return make


@pytest.fixture
def make_voco(tiny_plans, tiny_dataset_json):
    """``make_voco(arch, channels, plan={...}, stats=..., crop=..., dim=3, **options)``: windows of 4x24x16 voxels have 1x3x2
    cells."""

    def make(arch="plain", channels=1, plan=None, *, stats=(6, 26, 18), crop=(4, 8, 8), dim=3, **options):
        torch.manual_seed(0)
        about = {
            "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
            "patch": (8, 24, 16),
            "features": (4, 6, 8),
            **(plan or {}),
        }
        values, stats = {"proj_dim": 24, "random_crops": 3, **options}, SourceStats(stats, 5)
        plans = tiny_plans(dim, arch, channels, **about)
        return _method("voco", plans, tiny_dataset_json(channels), values, stats=stats, crop=crop, seeded=False)

    return make


@pytest.fixture
def voco_crops():
    """``voco_crops(method, n=3, seed=0, channels=1, shape=None, start=None, **changes)``: smooth windows without air, as from an
    image that they fill."""

    def make(method, n=3, seed=0, channels=1, shape=None, start=None, **changes):
        generator = torch.Generator().manual_seed(seed)
        window = method.request.read_size
        coarse = torch.randn(n, channels, *[max(2, w // 3) for w in window], generator=generator)
        data = F.interpolate(coarse, size=window, mode="trilinear" if len(window) == 3 else "bilinear")
        data = data + 0.1 * torch.randn(data.shape, generator=generator)
        place, body = torch.full((n, 3), 0.5, dtype=torch.float64), torch.ones(n, 1, *window, dtype=torch.bool)
        extent = torch.tensor([1] * (3 - len(window)) + list(window)).expand(n, 3).clone()
        intensity = torch.tensor([-2.0, 2.0]).expand(n, channels, 2).clone()
        start = torch.zeros(n, 3, dtype=torch.long) if start is None else start
        names, source = [f"case{i}" for i in range(n)], ["Dataset901_Tiny"] * n
        crops = Crops(data, body, place, place, intensity, start, names, extent if shape is None else shape, source)
        return replace(crops, **changes)

    return make


@pytest.fixture
def voco_batch(voco_crops):
    """``voco_batch(method, n=3, seed=0, step=0, **crops)``: the method's views of :func:`voco_crops`."""

    def make(method, n=3, seed=0, step=0, **options):
        with torch.no_grad():
            return method.views(voco_crops(method, n, seed, **options), StepRNG(0, step, n))

    return make


@pytest.fixture
def make_robust(tiny_plans, tiny_dataset_json):
    """``make_robust(dim=3, arch="plain", channels=1, **options)``."""

    def make(dim=3, arch="plain", channels=1, **options):
        plans, stats = tiny_plans(dim, arch, channels), SourceStats((28, 36, 28), 12)
        return _method("robust", plans, tiny_dataset_json(channels), options, stats=stats)

    return make


# ---- preprocessed cases, and short runs ---------------------------------------------------------------------------------


@pytest.fixture
def save_case():
    """``save_case(folder, name, data) -> CaseRef``: a preprocessed case, cut by 1 voxel in front and 2 behind, z downwards."""

    def save(folder, name, data):
        folder.mkdir(exist_ok=True)
        blosc2.asarray(np.ascontiguousarray(data, dtype=np.float32), urlpath=str(folder / f"{name}.b2nd"), mode="w")
        shape = data.shape[1:]
        properties = {
            "bbox_used_for_cropping": [[1, n + 1] for n in shape],
            "shape_before_cropping": tuple(n + 3 for n in shape),
            "shape_after_cropping_and_before_resampling": shape,
            "spacing": (1.0, 1.0, 1.0),
            "sitk_stuff": {"direction": (1.0, 0, 0, 0, 1.0, 0, 0, 0, -1.0)},
        }
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(properties))
        return CaseRef(name, folder, "Dataset001_X")

    return save


@pytest.fixture
def refs(save_case, tmp_path):
    """Six cases of different shapes, every voxel another."""
    rng = np.random.default_rng(0)
    shapes = [(20, 24, 18), (16, 30, 22), (25, 20, 20), (18, 22, 26), (21, 23, 19), (30, 16, 17)]
    return [save_case(tmp_path / "a", f"case_{i}", rng.normal(size=(1, *s))) for i, s in enumerate(shapes)]


@pytest.fixture
def no_drawing(monkeypatch):
    """``progress.png`` takes longer than all else of these runs."""
    monkeypatch.setattr(drawing, "plot_progress", lambda *args, **kwargs: None)
    monkeypatch.setattr(drawing, "plot_details", lambda *args: None)
    monkeypatch.setenv("nnssl_logger", "none")


@pytest.fixture
def small_target(tiny_preprocessed):
    """Dataset901_Tiny, so small that ``go`` takes well under a second."""
    tiny_preprocessed(901, "Tiny", 5, shape=(12, 16, 12), plan_options={"patch": (8, 8, 8)})


@pytest.fixture
def free(small_target, tiny_raw_dataset):
    """imagesTr of an unlabelled dataset beside the target."""
    return tiny_raw_dataset(902, "Free", 6, labelled=False, seed=1, shape=(12, 16, 12)) / "imagesTr"


@pytest.fixture
def go():
    """``go(source=901, **options)``: a run of mae of three epochs of two steps on ``small_target``."""

    def make(source=901, **options):
        common = {"method": "mae", "device": "cpu", "epochs": 3, "iterations": 2, "processes": 1, "robustness_every": 0}
        common["options"] = {"workers": 0, "held_out_batches": 1, "picture_every": 0}
        return run(source, **{**common, "target": 901, **options})

    return make


@pytest.fixture
def same_weights():
    """``same_weights(a, b)``: whether two runs in folders of their own ended at the same weights."""

    def same(a, b):
        x, y = (checkpoint.load(r.checkpoint).weights for r in (a, b))
        return a.folder != b.folder and all(torch.equal(x[k], y[k]) for k in x)

    return same


@pytest.fixture
def latest():
    """``latest()``: ``checkpoint_latest.pth`` of the only run."""

    def find():
        (file,) = results_folder().glob("*/*/checkpoint_latest.pth")
        return file

    return find


@pytest.fixture
def after_two():
    """``after_two(what)``: a hook that calls ``what(engine)`` after the second epoch, before its checkpoint."""

    class After(Hook):
        def __init__(self, what):
            self.what = what

        def after_epoch(self, engine, row):
            if row["epoch"] == 2:
                self.what(engine)

    return After


@pytest.fixture
def stopped(small_target, go, latest):
    """The folder of the run "broken" of ``go``, which ended in its second epoch, with two checkpoints."""
    save = Engine.save

    def save_and_end(self, **options):
        save(self, **options)
        if self.step == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "save", save_and_end)
        go(name="broken")
    return latest().parent
