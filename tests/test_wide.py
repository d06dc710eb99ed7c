"""Products of bfloat16 on processors without units for them, whatever this processor has."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from visualrwkv import trainer, vision
from visualrwkv.ops import linear as maps
from visualrwkv.ops import wide
from visualrwkv.ops.linear import Linear
from visualrwkv.ops.wide import WideProducts


class Seen(TorchDispatchMode):
    """Notes in what numbers products are computed."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in wide._PRODUCTS:
            self.dtypes |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.fixture
def slow(monkeypatch):
    for module in (maps, vision, trainer):
        monkeypatch.setattr(module, "slow_in_bfloat16", lambda: True)
    monkeypatch.setattr(maps, "_MANY", 0)


def rounding(exact):
    """bfloat16 keeps eight bits."""
    return exact.abs() * 2**-8 + 1e-6


@pytest.mark.parametrize("at_once", [1, 100, 1 << 18])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_map_is_rounded_once(slow, monkeypatch, at_once, transposed, bias):
    monkeypatch.setattr(wide, "_AT_ONCE", at_once)
    torch.manual_seed(0)
    x, weight = torch.randn(2, 7, 33), torch.randn(33, 12).t() if transposed else torch.randn(12, 33)
    given = [tensor.bfloat16() for tensor in ([x, weight, torch.randn(12)] if bias else [x, weight])]
    exact = [tensor.double().requires_grad_() for tensor in given]
    ours = [tensor.detach().requires_grad_() for tensor in given]
    wanted = F.linear(*exact)
    with Seen() as seen:
        y = maps.linear(*ours)
        dy = torch.randn_like(y)
        got = torch.autograd.grad(y, ours, dy)
    assert seen.dtypes == {torch.float32}
    assert y.dtype == torch.bfloat16 and ((y.double() - wanted).abs() <= rounding(wanted)).all()
    for a, b in zip(got[:2], torch.autograd.grad(wanted, exact, dy.double()), strict=False):
        assert a.dtype == torch.bfloat16 and a.shape == b.shape and ((a.double() - b).abs() <= rounding(b)).all()


def test_what_is_not_in_bfloat16_is_left_to_pytorch(slow):
    half = Linear(33, 12).half()
    x = torch.randn(3, 33).half()
    assert torch.equal(half(x), F.linear(x, half.weight, half.bias))
    with WideProducts():
        assert torch.equal(half(x), F.linear(x, half.weight, half.bias))
        assert F.linear(x.double(), half.weight.double()).dtype == torch.float64


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(8, 4),
        nn.Conv2d(8, 4, 3, padding=1),
        nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU()),
        nn.MultiheadAttention(8, 2, batch_first=True),
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_compute_in_float32(guard, module):
    module = module.eval().bfloat16()
    conv = isinstance(module, nn.Conv2d | nn.Sequential)
    x = torch.randn(2, 8, 6, 6) if conv else torch.randn(2, 5, 8)
    given = [x.bfloat16()] * (3 if isinstance(module, nn.MultiheadAttention) else 1)
    with guard():
        with Seen() as seen, WideProducts():
            y = module(*given)
        wanted = module.float()(*(x.float() for x in given))
    if isinstance(y, tuple):
        (y, weights), (wanted, _) = y, wanted
        assert weights.dtype == torch.bfloat16
    assert seen.dtypes == {torch.float32}
    assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), wanted, atol=0.05, rtol=0.02)


def test_the_tower_computes_in_float32(slow, vlm):
    size, tower = vlm.model.config.vision_config.tower["image_size"], copy.deepcopy(vlm.model.vit)
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad(), Seen() as seen:
        exact = tower(pixels)
        features = tower.bfloat16()(pixels.bfloat16())
    assert {tensor.dtype for tensor in tower.parameters()} == {torch.bfloat16}
    assert seen.dtypes == {torch.float32}
    assert features.dtype == torch.bfloat16
    assert (features.float() - exact).abs().max() <= 0.05 * exact.abs().max()


@pytest.mark.parametrize("units", [False, True])
def test_training_computes_in_what_is_fast(recipe, monkeypatch, capsys, units):
    from visualrwkv import rwkv, training

    monkeypatch.setattr(trainer, "slow_in_bfloat16", lambda: not units)
    enabled, forward = [], rwkv.RWKV.forward

    def noting(*given, **named):
        enabled.append(torch.is_autocast_enabled("cpu"))
        return forward(*given, **named)

    monkeypatch.setattr(rwkv.RWKV, "forward", noting)
    training.run(recipe(), ["steps=1", "precision=bf16"])
    assert set(enabled) == {units}
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("precision: ")]
    assert len(told) == (0 if units else 1)


@pytest.mark.parametrize("capability", ["avx2", None])
def test_who_multiplies_bfloat16_slowly(capability):
    """Asked of PyTorch in a process of its own; AVX2 alone has nothing for bfloat16."""
    call = "import torch; from visualrwkv.ops.wide import slow_in_bfloat16; print(slow_in_bfloat16(), "
    call += "torch.backends.cpu.get_cpu_capability(), torch.ops.mkldnn._is_mkldnn_bf16_supported())"
    environment = {**os.environ} if capability is None else {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, timeout=120, env=environment)
    slow, capability, supported = done.stdout.split()
    assert slow == str(capability == "AVX2" or supported == "False"), done.stderr
