"""Linear maps on a CPU, where PyTorch's own way is a slow one.

float32 goes to oneDNN where PyTorch would take MKL: MKL keeps to AVX2 on processors that are not Intel's, oneDNN uses
the AVX-512 of any. On an AMD EPYC with AVX-512 that is twice as fast, forward and backward, and as exact, being plain
float32. bfloat16 is computed in float32 on processors without instructions for it (`wide.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visualrwkv.ops.wide import slow_in_bfloat16, wide_product

_MANY = 1 << 16  # multiplications from which oneDNN's way of being called does not count


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, in another way where that is faster; once differentiable.

    Args:
        x: (..., in_features); weight: (out_features, in_features), of any strides; bias: (out_features).
    Returns:
        (..., out_features)
    """
    if not _otherwise(x, weight):
        return F.linear(x, weight, bias)
    rows, given = x.flatten(0, -2), [tensor for tensor in (x, weight, bias) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        y = _Linear.apply(rows, weight, bias)
    else:
        y = _product(rows, weight, bias)
    return y.unflatten(0, x.shape[:-1])


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module is a linear map without bias and nothing more, so that its weight says all of it."""
    return type(module) in (nn.Linear, Linear) and module.bias is None


def _otherwise(x: Tensor, weight: Tensor) -> bool:
    """Whether `_product` is faster than PyTorch's own way."""
    return (
        x.dtype == weight.dtype
        and x.dim() > 1
        and x.is_cpu
        and weight.is_cpu
        and x.numel() * weight.shape[0] >= _MANY
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and (_by_onednn() if x.dtype == torch.float32 else x.dtype == torch.bfloat16 and slow_in_bfloat16())
    )


def _by_onednn() -> bool:
    mkldnn = torch.backends.mkldnn
    return mkldnn.enabled and mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.dtype == torch.bfloat16:
        return wide_product(x, weight, bias)
    bias = None if bias is None else bias.contiguous()  # taken by its address alone
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = _product(dy, weight.t()) if needs_x else None
        dweight = _product(dy.t(), x.t()) if needs_weight else None
        return dx, dweight, dy.sum(0) if needs_bias else None
