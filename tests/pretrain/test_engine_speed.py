"""Accumulation, activation checkpointing, memory format, optimisers, copies: the same result, faster or smaller."""

from __future__ import annotations

import contextlib
from copy import deepcopy

import pytest
import torch
from torch import nn

from nnssl.config import make_config
from nnssl.ema import EMA
from nnssl.errors import NnsslError
from nnssl.networks import build_network, forward_features
from nnssl.networks.sparse import sparse_encoder
from nnssl.networks.state import full_state_dict
from nnssl.plans import Plan
from nnssl.pretrain.engine.config import EngineConfig
from nnssl.pretrain.engine.speed import (
    Prefetcher,
    activation_checkpointing,
    apply_options,
    tensors_of,
    use_channels_last,
    use_implementation,
)
from nnssl.pretrain.engine.stepping import Stepper, views_in_parts
from nnssl.pretrain.methods import CropRequest, Crops, get_method
from nnssl.pretrain.resolve import batch_size
from nnssl.pretrain.types import SourceStats

CPU = torch.device("cpu")


@pytest.fixture
def plan(tiny_plans, tiny_dataset_json):
    def make(arch="plain", dim=3):
        return Plan.from_dicts(
            tiny_plans(dim, arch, patch=(8, 16, 8)[-dim:] if dim == 2 else (8, 16, 8)),
            "3d_fullres" if dim == 3 else "2d",
            tiny_dataset_json(),
        )

    return make


def crops(request, n, channels=1):
    torch.manual_seed(1)
    return Crops(
        data=torch.randn(n, channels, *request.read_size),
        body=torch.ones(n, 1, *request.read_size, dtype=torch.bool),
        position=torch.rand(n, 3, dtype=torch.float64),
        axis_position=torch.rand(n, 3, dtype=torch.float64),
        intensity=torch.tensor([-2.0, 2.0]).repeat(n, channels, 1),
        start=torch.zeros(n, 3, dtype=torch.int64),
        case=[f"case{i}" for i in range(n)],
    )


def method_of(name, plan, **options):
    cls = get_method(name)
    config = make_config(cls.Config, options)
    request = cls.crops(plan, SourceStats((20, 28, 20), 8), config)
    torch.manual_seed(0)
    return cls(build_network(plan), plan, request, config)


def gradients(method, batch, parts):
    stepper = Stepper(method, method, CPU, 10, 0, False)
    batches = views_in_parts(method, batch, parts, CPU, seed=3, step=5)
    numbers, _ = stepper.step(batches, 5, batch.case, False, parts)
    return {k: p.grad for k, p in method.named_parameters() if p.grad is not None}, numbers.read()


# ---- accumulation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_micro_batches_equal_the_batch_where_each_crop_has_a_loss_of_its_own(plan, parts):
    """mae on crops that are all body: as many hidden voxels in each."""
    options = {"region": "image", "augment_p": 0.0, "optimiser": "adamw", "masking": "dense"}
    whole, some = method_of("mae", plan(), **options), method_of("mae", plan(), **options)
    batch = crops(whole.request, 8)
    (a, x), (b, y) = gradients(whole, batch, 1), gradients(some, batch, parts)
    assert a.keys() == b.keys() and len(a) > 20
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=2e-6, rtol=1e-4)
    for key in x:
        assert y[key] == pytest.approx(x[key], rel=1e-4, abs=1e-5), key


def test_a_contrast_is_within_the_micro_batch(plan):
    """macl: the same views, but each crop meets only those of its micro-batch: another, easier loss."""
    from nnssl.pretrain.augment import StepRNG

    method = method_of("macl", plan())
    batch = crops(method.request, 8)
    whole = method.views(batch, StepRNG(3, 5, 8))
    parts = list(views_in_parts(method, batch, 2, CPU, seed=3, step=5))
    assert all(torch.equal(torch.cat([p[k] for p in parts]), v) for k, v in whole.items())
    _, x = gradients(method, batch, 1)
    _, y = gradients(method_of("macl", plan()), batch, 2)
    assert y["image_collapse"] < x["image_collapse"]
    assert y["n_negatives"] < x["n_negatives"]
    assert y["equivariance"] == pytest.approx(x["equivariance"], rel=1e-4)


def test_batches_that_cannot_be_cut(plan):
    request = CropRequest(size=(8, 8, 8), read_size=(8, 8, 8), crops_per_case=2, batch_size=16, min_batch=4)
    assert batch_size(EngineConfig(accumulate=4), request, 2) == 16
    with pytest.raises(NnsslError, match=r"at least 4 crops in each micro-batch. Give -o batch_size=32 or more"):
        batch_size(EngineConfig(accumulate=8), request, 1)
    with pytest.raises(
        NnsslError, match="by 2 processes in 3 micro-batches with 2 crops of each case takes a multiple of 12"
    ):
        batch_size(EngineConfig(accumulate=3), request, 2)
    assert EngineConfig().accumulate is None


class Wrapped(nn.parallel.DistributedDataParallel):
    """Counts how often ranks would exchange gradients."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.inner, self.exchanged, self.quiet = module, 0, False

    @contextlib.contextmanager
    def no_sync(self):
        self.quiet = True
        yield
        self.quiet = False

    def forward(self, batch):
        self.exchanged += not self.quiet
        return self.inner(batch)


def test_ranks_exchange_gradients_once_a_step(plan):
    method = method_of("mae", plan())
    wrapped = Wrapped(method)
    stepper = Stepper(method, wrapped, CPU, 10, 0, False)
    batch = crops(method.request, 4)
    parts = views_in_parts(method, batch, 4, CPU, seed=0, step=0)
    stepper.step(parts, 0, batch.case, False, 4)
    assert wrapped.exchanged == 1


# ---- activation checkpointing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["plain", "resenc"])
@pytest.mark.parametrize("dim", [2, 3])
def test_recomputed_stages_give_the_same(plan, arch, dim):
    torch.manual_seed(0)
    a = build_network(plan(arch, dim))
    b = deepcopy(a)
    n = activation_checkpointing(b)
    assert n == (3 + 2) + (arch == "resenc")
    assert a.state_dict().keys() == b.state_dict().keys()
    x = torch.randn(2, 1, *(8, 16, 8)[-dim:])
    runs = {"stage": 0}
    handle = None
    first = b.encoder.stages[0].forward.args[0].__self__
    assert first is b.encoder.stages[0]
    kept = [sum(1 for _ in saved(m, x)) for m in (a, b)]
    assert kept[1] < kept[0]
    for net in (a, b):
        forward_features(net, x).levels[-1].square().mean().backward()
    assert handle is None and runs == {"stage": 0}
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert torch.equal(p.grad, q.grad), name


def saved(network, x):
    """Tensors that the forward pass keeps for the backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        forward_features(network, x).levels[-1].sum()
    return kept


def test_a_copy_recomputes_its_own_stages(plan):
    """A teacher copied from a student with checkpointing runs its own weights."""
    student = build_network(plan())
    activation_checkpointing(student)
    teacher = EMA(student)
    x = torch.randn(1, 1, 8, 16, 8)
    before = teacher(x)
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(0.5)
    after = teacher(x)
    for old, new in zip(*([v] if isinstance(v, torch.Tensor) else v for v in (before, after))):
        assert torch.equal(old, new)


def test_stages_with_hooks_of_one_forward_are_not_recomputed(plan):
    """Sparse masking's hooks are gone in the backward pass: its gradients must stay what they are."""
    torch.manual_seed(0)
    a = build_network(plan())
    b = deepcopy(a)
    activation_checkpointing(b)
    x, visible = torch.randn(2, 1, 8, 16, 8), torch.rand(2, 1, 8, 16, 8) > 0.5
    for net in (a, b):
        with sparse_encoder(net.encoder, visible):
            skips = net.encoder(torch.where(visible, x, 0.0))
        skips[-1].square().mean().backward()
    for p, q in zip(a.encoder.parameters(), b.encoder.parameters()):
        assert torch.equal(p.grad, q.grad)


def test_networks_without_stages_are_refused():
    with pytest.raises(NnsslError, match="checkpointing=true: a Linear has no stages"):
        activation_checkpointing(nn.Linear(2, 2))


# ---- memory format, kernels, copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3])
def test_channels_last_computes_the_same_and_files_stay_plain(plan, dim):
    torch.manual_seed(0)
    a = build_network(plan(dim=dim))
    b = deepcopy(a)
    use_channels_last(b)
    form = {2: torch.channels_last, 3: torch.channels_last_3d}[dim]
    assert b.encoder.stages[1][0].convs[0].conv.weight.is_contiguous(memory_format=form)
    x = torch.randn(2, 1, *(8, 16, 8)[-dim:])
    torch.testing.assert_close(
        forward_features(a, x).levels[-1], forward_features(b, x).levels[-1], atol=1e-5, rtol=1e-4
    )
    assert all(v.is_contiguous() for v in full_state_dict(b).values())


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("kind", ["loop", "foreach", "fused"])
def test_kernels_of_the_optimiser_agree(cls, kind):
    options = {"lr": 0.1, "weight_decay": 0.1} | ({"momentum": 0.9, "nesterov": True} if cls is torch.optim.SGD else {})

    def train(kernels, steps=6, change=None):
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        optimiser = cls(layers.parameters(), **options)
        use_implementation(optimiser, kernels)
        for step in range(steps):
            if step == 3 and change:
                state = optimiser.state_dict()
                optimiser = cls(layers.parameters(), **options)
                optimiser.load_state_dict(state)
                use_implementation(optimiser, change)
                assert all(g["fused"] == (change == "fused") for g in optimiser.param_groups)
            optimiser.zero_grad()
            layers(torch.randn(4, 5)).square().sum().backward()
            optimiser.step()
        return [p.detach() for p in layers.parameters()]

    plain = train("auto")
    for other in (train(kind), train("auto", change=kind), train(kind, change="loop")):
        for p, q in zip(plain, other):
            torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_an_optimiser_of_one_kind_is_refused():
    class Own(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

    optimiser = Own(nn.Linear(2, 2).parameters())
    use_implementation(optimiser, "auto")
    with pytest.raises(NnsslError, match="optimizer_implementation=fused: Own has one way only"):
        use_implementation(optimiser, "fused")


def test_all_tensors_of_a_batch_are_found():
    request = CropRequest(size=(4, 4, 4), read_size=(4, 4, 4))
    batch = crops(request, 2)
    assert len(list(tensors_of(batch))) == 6
    assert len(list(tensors_of({"a": [batch, (torch.zeros(1),)], "b": "text", "c": None}))) == 7
    assert Prefetcher(CPU)(batch).data is batch.data


def test_copies_run_beside_the_computation_on_cuda(monkeypatch):
    """The order of calls, with CUDA's streams replaced: copy in the side stream, then the main stream waits for it."""
    calls = []

    class Stream:
        def __init__(self, device=None):
            self.name = "side"

        def wait_stream(self, other):
            calls.append(("wait", other.name))

    main = Stream()
    main.name = "main"

    @contextlib.contextmanager
    def stream(given):
        calls.append(("enter", given.name))
        yield
        calls.append(("leave", given.name))

    class Batch:
        def to(self, device):
            calls.append(("copy", device.type))
            return self

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    Prefetcher(torch.device("cuda", 0))(Batch())
    assert calls == [("enter", "side"), ("copy", "cuda"), ("leave", "side"), ("wait", "side")]


@pytest.mark.parametrize(("features", "last"), [((4, 8, 8), True), ((24, 32, 32), True), ((16, 32, 32), False)])
def test_channels_last_is_chosen_by_size(features, last, tiny_plans, tiny_dataset_json):
    plan = Plan.from_dicts(
        tiny_plans(3, "plain", patch=(8, 16, 8), features=features), "3d_fullres", tiny_dataset_json()
    )
    for told, want in ((None, last), (True, True), (False, False)):
        method = holder_of(plan)
        apply_options(method, EngineConfig(channels_last=told))
        wide = next(m for m in method.network.modules() if isinstance(m, nn.Conv3d) and min(m.weight.shape[:2]) > 1)
        assert wide.weight.is_contiguous(memory_format=torch.channels_last_3d) is want


def holder_of(plan):
    method = nn.Module()
    method.network = build_network(plan)
    return method
