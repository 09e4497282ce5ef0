"""What tests share: smooth random crops, batches of views of them, gradients by name, small datasets, and exports of images."""

import locale
import os
import sys

import pytest
import torch
import torch.nn.functional as F

from nnssl.plans import Plan, load_plan
from nnssl.plans.variants import derive
from nnssl.pretrain.augment.rng import StepRNG
from nnssl.pretrain.methods import Crops


@pytest.fixture(autouse=True)
def locale_kept():
    """GDCM leaves the C locale behind when it writes DICOM, in which the UTF-8 output of a child process cannot be read."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture
def no_drawing(monkeypatch):
    """``progress.png`` takes longer than all else of these runs."""
    from nnssl.pretrain.engine import logs

    monkeypatch.setattr(logs.RunLog, "draw", lambda *args, **kwargs: None)
    monkeypatch.setattr(logs.RunLog, "draw_details", lambda self: None)
    monkeypatch.setenv("nnssl_logger", "none")


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
