"""The RWKV-6 recurrence written as the papers write it: one step per token.

`wkv6_reference` is the specification that every faster form is tested against, `wkv6_step` the single step of decoding.
"""

import torch
from torch import Tensor


def check_arguments(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None) -> None:
    """Raise ValueError, naming both shapes, where the arguments of a WKV operator do not fit each other."""
    if r.dim() != 4:
        raise ValueError(f"r must have shape (batch, time, heads, head_size), got {tuple(r.shape)}")
    for name, x in (("k", k), ("v", v), ("w", w)):
        if x.shape != r.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)} but r has shape {tuple(r.shape)}; they must be equal")
    batch, time, heads, size = r.shape
    if time < 1:
        raise ValueError(f"r has shape {tuple(r.shape)}: at least one time step is needed")
    if u.shape != (heads, size):
        raise ValueError(f"u has shape {tuple(u.shape)} but r of shape {tuple(r.shape)} needs {(heads, size)}")
    if state is not None and state.shape != (batch, heads, size, size):
        needed = (batch, heads, size, size)
        raise ValueError(f"state has shape {tuple(state.shape)} but r of shape {tuple(r.shape)} needs {needed}")
    for name, x in (("r", r), ("k", k), ("v", v), ("w", w), ("u", u), ("state", state)):
        if x is None:
            continue
        if not x.is_floating_point():
            raise ValueError(f"{name} has dtype {x.dtype}; a floating point dtype is needed")
        if x.device != r.device:
            raise ValueError(f"{name} is on {x.device} but r is on {r.device}; move them to one device")


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64, else float32: the dtype of the state and of all arithmetic."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def wkv6_reference(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The WKV operator of RWKV-6, one time step after the other; differentiable by autograd.

    With i the key channel, j the value channel and d = exp(-exp(w)):

        y_t[j]    = sum_i r_t[i] (S_t[i, j] + u[i] k_t[i] v_t[j])
        S_t+1[i, j] = d_t[i] S_t[i, j] + k_t[i] v_t[j]

    Args:
        r, k, v: receptance, key, value (B, T, H, N), any floating dtype, T >= 1.
        w: raw decay (B, T, H, N). -inf means no decay at all; with k = 0 such a position leaves the state untouched.
        u: bonus of the current token (H, N).
        state: S at the start (B, H, N, N), key index before value index; zeros if None.

    Returns:
        y (B, T, H, N) in r's dtype, and the state after the last step (B, H, N, N) in float32
        (float64 if an argument is float64). The arithmetic is in the state's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other.

    Source: Eagle and Finch (arXiv 2404.05892), section 4.2.
    """
    check_arguments(r, k, v, w, u, state)
    out_dtype = r.dtype
    dtype = compute_dtype(r, k, v, w, u, state)
    r, k, v, w, u = (x.to(dtype) for x in (r, k, v, w, u))
    # Beyond w = 10 the decay and its derivative are exactly 0 in float64 too: the bound keeps inf * 0 out of autograd.
    decay = torch.exp(-torch.exp(w.clamp(max=10.0)))
    if state is None:
        state = r.new_zeros(r.shape[0], r.shape[2], r.shape[3], r.shape[3])
    state = state.to(dtype)
    ys = []
    for t in range(r.shape[1]):
        kv = k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)  # (B, H, N, N)
        ys.append((r[:, t].unsqueeze(-1) * (state + u.unsqueeze(-1) * kv)).sum(-2))  # (B, H, N)
        state = decay[:, t].unsqueeze(-1) * state + kv
    return torch.stack(ys, dim=1).to(out_dtype), state


def wkv6_step(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`wkv6_reference` for exactly one token, in few operations: the bonus costs no N x N work."""
    check_arguments(r, k, v, w, u, state)
    if r.shape[1] != 1:
        raise ValueError(f"r has shape {tuple(r.shape)}: a step takes one token, not {r.shape[1]}")
    out_dtype = r.dtype
    dtype = compute_dtype(r, k, v, w, u, state)
    r, k, v, w = (x[:, 0].to(dtype) for x in (r, k, v, w))  # (B, H, N)
    y = (r * k * u.to(dtype)).sum(-1, keepdim=True) * v
    kv = k.unsqueeze(-1) * v.unsqueeze(-2)
    if state is None:
        return y.unsqueeze(1).to(out_dtype), kv
    state = state.to(dtype)
    y = y + torch.matmul(r.unsqueeze(-2), state).squeeze(-2)
    decay = torch.exp(-torch.exp(w.clamp(max=10.0)))  # the bound as in wkv6_reference
    return y.unsqueeze(1).to(out_dtype), kv.addcmul_(state, decay.unsqueeze(-1))
