"""Linear maps by oneDNN against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from visualrwkv.ops import linear as module
from visualrwkv.ops.linear import Linear, linear


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Small maps go by oneDNN too, on every processor that PyTorch has it for."""
    monkeypatch.setattr(module, "_MANY", 0)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(module, "slow_in_bfloat16", lambda: False)
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch is built without oneDNN")


@pytest.fixture
def products(monkeypatch):
    """What went by oneDNN."""
    calls, product = [], module._product
    monkeypatch.setattr(module, "_product", lambda *given: calls.append(given[0].shape) or product(*given))
    return calls


X = {
    "dense": lambda: torch.randn(6, 5, 33),
    "one row": lambda: torch.randn(1, 33),
    "a piece of a sequence": lambda: torch.randn(2, 9, 33)[:, 2:7],
    "transposed": lambda: torch.randn(33, 7).t(),
    "repeated": lambda: torch.randn(1, 33).expand(4, 33),
}


@pytest.mark.parametrize("kind", X)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_float64(kind, transposed, bias, products):
    torch.manual_seed(0)
    x, weight = X[kind](), torch.randn(33, 12).t() if transposed else torch.randn(12, 33)
    given = [x, weight, torch.randn(24)[::2]] if bias else [x, weight]
    exact = [tensor.double().requires_grad_() for tensor in given]
    ours = [tensor.detach().requires_grad_() for tensor in given]
    wanted, y = F.linear(*exact), linear(*ours)
    assert len(products) == 1
    assert y.shape == wanted.shape and torch.allclose(y.double(), wanted, atol=1e-5)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, ours, dy)
    assert len(products) == 3
    for a, b in zip(got, torch.autograd.grad(wanted, exact, dy.double()), strict=True):
        assert a.shape == b.shape and torch.allclose(a.double(), b, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(linear(*given), y)


def test_only_what_learns_costs_a_product(products):
    frozen = Linear(33, 12).requires_grad_(False)
    x = torch.randn(3, 33, requires_grad=True)
    frozen(x).sum().backward()
    assert len(products) == 2 and x.grad is not None and frozen.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_left_to_pytorch(dtype, products):
    ours, x = Linear(33, 12).to(dtype), torch.randn(3, 33, dtype=dtype)
    assert torch.equal(ours(x), F.linear(x, ours.weight, ours.bias)) and not products


def test_autocast_keeps_its_meaning(products):
    with torch.autocast("cpu", torch.bfloat16):
        assert Linear(33, 12)(torch.randn(3, 33)).dtype == torch.bfloat16
    assert not products


def test_vectors_and_nothing_are_left_to_pytorch(monkeypatch, products):
    monkeypatch.setattr(module, "_MANY", 1)
    assert Linear(33, 12)(torch.randn(0, 33)).shape == (0, 12)
    assert Linear(33, 12)(torch.randn(33)).shape == (12,)
    assert not products


def test_what_a_weight_says_alone():
    assert module.is_plain_linear(Linear(3, 2, bias=False)) and module.is_plain_linear(nn.Linear(3, 2, bias=False))
    assert not module.is_plain_linear(Linear(3, 2)) and not module.is_plain_linear(nn.LazyLinear(2, bias=False))
