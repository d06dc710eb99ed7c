"""Linear maps with weights of eight bits: a quarter of float32's bytes, half of bfloat16's, and so of a token's time.

Weight-only: each row (output) of a matrix has one scale in float32, activations stay as they are. With rows w and
s = max |w| / 127, the weights are round(w / s), so that no weight is off by more than s / 2.
"""

import torch
from torch import Tensor, nn

from visualrwkv.ops.kernel import ready
from visualrwkv.ops.linear import is_plain_linear, linear

_SMALL = 16  # rows of x up to which the kernel reads the bytes directly
_AT_ONCE = 1 << 22  # weights turned back into x's precision at once


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (rows, columns) -> int8 of that shape and the scales (rows) in float32."""
    weight = weight.detach().float()
    scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def quantize_linears(module: nn.Module) -> None:
    """Replace every `nn.Linear` without bias inside the module, one after the other, by an `Int8Linear`."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if is_plain_linear(child):
                setattr(parent, name, Int8Linear.of(child))


class Int8Linear(nn.Module):
    """`nn.Linear` without bias on weights of eight bits, for inference.

    Args:
        weight: (out_features, in_features) int8; scale: (out_features) float32.
    """

    def __init__(self, weight: Tensor, scale: Tensor):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("scale", scale.contiguous())

    @classmethod
    def of(cls, module: nn.Linear) -> "Int8Linear":
        return cls(*quantize_rows(module.weight))

    def _apply(self, fn, recurse=True):
        """A change of the model's precision leaves weights and scales in theirs."""
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.weight.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) of any floating precision -> (..., out_features) of the same."""
        rows = x.numel() // self.in_features
        small = rows <= _SMALL and x.dtype != torch.float64 and not torch.is_grad_enabled()
        if small and not torch.compiler.is_compiling() and ready(x, self.weight):
            y = torch.ops.visualrwkv.small_linear(x.reshape(-1, self.in_features), self.weight, self.scale)
            return y.view(*x.shape[:-1], self.out_features)
        # Many rows: the weights go back to x's precision, piece by piece, for PyTorch's matrix product.
        step = max(1, _AT_ONCE // self.in_features)
        # sums of integers without their scale leave the range of float16
        dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
        pieces = [linear(x.to(dtype), piece.to(dtype)) for piece in self.weight.split(step)]
        y = pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
        return (y * self.scale).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits=8"
