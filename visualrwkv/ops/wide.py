"""bfloat16 on CPUs that have no instructions for it, such as those with AVX2 alone.

PyTorch multiplies bfloat16 there one number at a time, several times slower than float32. Here the operands are widened
to float32 for each product and its result is rounded to bfloat16: the same numbers, sums at least as exact. Weights are
widened piece by piece, so a model in bfloat16 keeps its half of the memory, and decoding its speed.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_AT_ONCE = 1 << 18  # weights that are widened together: a MiB, which stays in a cache
_aten = torch.ops.aten
_PRODUCTS = {_aten.linear, _aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.conv2d, _aten.convolution}
_PRODUCTS |= {_aten._native_multi_head_attention, _aten._transformer_encoder_layer_fwd}


@cache
def slow_in_bfloat16() -> bool:
    """Whether the CPU multiplies float32 several times as fast as bfloat16 (`csrc/prefill_walk.h` asks the same)."""
    supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return not supported or torch.backends.cpu.get_cpu_capability() == "AVX2"


def wide_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (rows, n) weight^T (m, n) [+ bias (m)], all bfloat16 -> (rows, m) bfloat16, computed in float32."""
    wide, y, step = x.float(), x.new_empty(len(x), len(weight)), max(1, _AT_ONCE // weight.shape[1])
    for begin in range(0, len(weight), step):
        piece = slice(begin, begin + step)
        y[:, piece] = F.linear(wide, weight[piece].float(), None if bias is None else bias[piece].float())
    return y


class WideProducts(TorchDispatchMode):
    """Within it every matrix product, convolution and attention of bfloat16 tensors is computed in float32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket not in _PRODUCTS:
            return func(*args, **kwargs)
        narrow = False

        def widen(x):
            nonlocal narrow
            narrow |= x.dtype == torch.bfloat16
            return x.float() if x.dtype == torch.bfloat16 else x

        result = func(*tree_map_only(Tensor, widen, args), **tree_map_only(Tensor, widen, kwargs))
        return tree_map_only(Tensor, lambda y: y.bfloat16(), result) if narrow else result
