"""Operators of the language models. `wkv6` is the one name the models use; it picks the form that fits the call."""

import torch
from torch import Tensor

from visualrwkv.ops.chunked import wkv6_chunked
from visualrwkv.ops.kernel import run_kernel, usable, use_kernel, wkv6_kernel
from visualrwkv.ops.reference import wkv6_reference, wkv6_step

__all__ = ["use_kernel", "wkv6", "wkv6_chunked", "wkv6_kernel", "wkv6_reference", "wkv6_step"]


def wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The WKV operator of RWKV-6, in the fastest form available; RWKV-5 is the case of a constant expanded w.

    That is the compiled kernel where there is one for the device (`visualrwkv.ops.kernel`, built at first use). Else a
    single token without gradients (decoding) takes one step of the recurrence, all else the chunked form, whose
    backward pass keeps autocast out, too.

    Args:
        r, k, v: receptance, key, value (B, T, H, N), any floating dtype, T >= 1.
        w: raw decay (B, T, H, N); the state decays by exp(-exp(w)) after each token. A padded position is k = 0 and
            w = -inf: it leaves the state and all gradients untouched, bit by bit.
        u: bonus of the current token (H, N).
        state: (B, H, N, N), key index before value index; zeros if None.

    Returns:
        y (B, T, H, N) in r's dtype, and the state after the last token (B, H, N, N) in float32 (float64 if an
        argument is float64). All arithmetic is in the state's dtype, also under autocast.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other.
    """
    if usable(r, k, v, w, u, state):
        return run_kernel(r, k, v, w, u, state)
    if r.dim() == 4 and r.shape[1] == 1 and not torch.is_grad_enabled():
        with torch.autocast(r.device.type, enabled=False):
            return wkv6_step(r, k, v, w, u, state)
    return wkv6_chunked(r, k, v, w, u, state)
