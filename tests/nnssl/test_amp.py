"""Which type forward passes run in: by device, processor and environment variable."""

from contextlib import nullcontext

import pytest
import torch

from nnssl import amp
from nnssl.errors import NnsslError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(amp.VARIABLE, raising=False)


@pytest.mark.parametrize(("told", "narrow"), [("0", False), ("1", True), ("", False)])
def test_the_variable_decides(monkeypatch, told, narrow):
    monkeypatch.setenv(amp.VARIABLE, told)
    assert amp.cpu_bfloat16() is narrow and (amp.amp_dtype(CPU) is torch.bfloat16) is narrow


def test_another_value_is_refused(monkeypatch):
    monkeypatch.setenv(amp.VARIABLE, "yes")
    with pytest.raises(NnsslError, match="nnssl_cpu_bf16 is 'yes': 0 or 1"):
        amp.amp_dtype(CPU)


def test_the_context_computes_in_bfloat16_where_it_is_wanted(monkeypatch):
    layer, x = torch.nn.Conv3d(1, 2, 1), torch.randn(1, 1, 2, 3, 4)
    monkeypatch.setenv(amp.VARIABLE, "1")
    with amp.autocast_for(CPU):
        assert layer(x).dtype is torch.bfloat16
    with amp.autocast_for(CPU, amp=False):
        assert layer(x).dtype is torch.float32
    monkeypatch.setenv(amp.VARIABLE, "0")
    with amp.autocast_for(CPU):
        assert layer(x).dtype is torch.float32


def test_other_devices(monkeypatch):
    assert isinstance(amp.autocast_for(torch.device("mps")), nullcontext)
    assert amp.amp_dtype(torch.device("mps")) is None
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert amp.amp_dtype(torch.device("cuda")) is torch.float16


def test_outputs_for_the_loss():
    one = torch.ones(2)
    assert amp.float_outputs(one) is one
    several = amp.float_outputs([one, one.bfloat16()])
    assert isinstance(several, list)
    assert [t.dtype for t in several] == [torch.float32] * 2


# ---- convolutions that are wrong in bfloat16 ------------------------------------------------------------------------------


class Spoilt(torch.autograd.Function):
    """The weights' gradient as torch 2.14 makes it of maps that are two voxels deep."""

    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone().fill_(ctx.value), None


def break_depth_two(monkeypatch, value=1e28):
    def forward(self, x):
        weight = self.weight
        if torch.is_autocast_enabled("cpu") and x.shape[2] == 2:
            weight = Spoilt.apply(weight, value)
        return self._conv_forward(x, weight, self.bias)

    monkeypatch.setattr(torch.nn.Conv3d, "forward", forward)


def network():
    return torch.nn.Sequential(
        torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.Conv3d(4, 6, 3, stride=2, padding=1), torch.nn.InstanceNorm3d(6),
        torch.nn.Conv3d(6, 6, 3, padding=1), torch.nn.ConvTranspose3d(6, 4, 2, stride=2),
    )  # fmt: skip


@pytest.mark.parametrize("value", [1e28, float("nan"), 0.0])
@pytest.mark.parametrize(("size", "wrong"), [((4, 6, 8), 1), ((6, 4, 8), 0), ((2, 6, 8), 2)])
def test_each_convolution_is_tried_at_its_own_shape(monkeypatch, size, wrong, value):
    break_depth_two(monkeypatch, value)
    module = network()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state = torch.random.get_rng_state()
    found = amp.wrong_in_bfloat16(module, lambda m: m(torch.zeros(2, 1, *size)))
    assert len(found) == wrong, found
    assert all(" on 2x" in name for name in found)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert not any(m._forward_pre_hooks for m in module.modules()) and all(p.grad is None for p in module.parameters())


def test_an_output_that_is_wrong_is_found_too(monkeypatch):
    def forward(self, x):
        y = self._conv_forward(x, self.weight, self.bias)
        return y * 1.2 if y.dtype is torch.bfloat16 and self.in_channels == 4 else y

    monkeypatch.setattr(torch.nn.Conv3d, "forward", forward)
    assert ["4 to 6" in name for name in amp.wrong_in_bfloat16(network(), lambda m: m(torch.ones(1, 1, 4, 6, 8)))] == [
        True
    ]
