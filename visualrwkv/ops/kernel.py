"""The compiled form of the operator: `torch.ops.visualrwkv.wkv6` of csrc, made known to autograd and torch.compile.

There is one library for the CPU and one for CUDA, each built at first use (`visualrwkv.ops.build`). The environment
variable VISUALRWKV_KERNEL=0 keeps to the PyTorch form, which gives the same results; `use_kernel` does so for a piece
of code.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from visualrwkv.ops.reference import check_arguments, compute_dtype

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CUDA_HEAD_SIZES = (32, 64, 128)
_registered = False
_in_place: int | None = None  # the thread within `states_in_place`
_on_cuda = False  # whether the library of CUDA is loaded
_wanted = os.environ.get("VISUALRWKV_KERNEL", "1") != "0"


@contextmanager
def use_kernel(wanted: bool) -> Iterator[None]:
    """Within the block `visualrwkv.ops.wkv6` takes the compiled form (where there is one), or never does."""
    global _wanted
    before, _wanted = _wanted, wanted
    try:
        yield
    finally:
        _wanted = before


def kernels_wanted() -> bool:
    """Whether compiled forms may be used at all: False with VISUALRWKV_KERNEL=0 and within `use_kernel(False)`."""
    return _wanted


@contextmanager
def states_in_place() -> Iterator[None]:
    """Within the block the compiled form on a GPU writes the new state over the given one and returns that tensor.

    In this thread alone, and in one at a time. For decoding from memory that stays where it is
    (`visualrwkv.cuda_graphs`); gradients do not flow.
    """
    global _in_place
    before, _in_place = _in_place, get_ident()
    try:
        yield
    finally:
        _in_place = before


def usable(*tensors: Tensor | None) -> bool:
    """Whether the compiled form can take these arguments; loads the library when asked for the first time."""
    if tensors[0].device.type == "cuda":
        return _usable_on_cuda(*tensors)
    if any(x is not None and x.dtype not in _DTYPES for x in tensors):
        return False
    return ready(*tensors)


def ready(*tensors: Tensor | None) -> bool:
    """Whether the tensors lie where there are kernels, and these are wanted and built; loads the library."""
    if not _wanted or any(x is not None and x.device.type != "cpu" for x in tensors):
        return False
    if not _registered and not torch.compiler.is_compiling():
        from visualrwkv.ops import build  # here, so that `python -m` of it imports it once

        if build.load() == "":
            _register()
    return _registered


def _usable_on_cuda(*tensors: Tensor | None) -> bool:
    """`usable` for tensors on a GPU; float64 and heads of other sizes are left to PyTorch."""
    if tensors[0].shape[-1] not in _CUDA_HEAD_SIZES:
        return False
    if any(x is not None and (x.device.type != "cuda" or x.dtype not in _CUDA_DTYPES) for x in tensors):
        return False
    return ready_on_cuda()


def ready_on_cuda() -> bool:
    """Whether the kernels of GPUs are wanted and built; loads the library."""
    global _on_cuda
    if not _wanted:
        return False
    if not _on_cuda and not torch.compiler.is_compiling():
        from visualrwkv.ops import build

        if build.load(device="cuda") == "":
            _register()
            _on_cuda = True
    return _on_cuda


def wkv6_kernel(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compiled WKV operator of RWKV-6; arguments, results and errors as `wkv6_reference`.

    Gradients flow to r, k, v, w, u and the initial state, from both y and the final state; not twice differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other.
        RuntimeError: there is no library, see `usable`.
    """
    if not usable(r, k, v, w, u, state):
        raise RuntimeError("the compiled kernel was not built, is switched off, or is not made for this device")
    return run_kernel(r, k, v, w, u, state)


def run_kernel(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`wkv6_kernel` where `usable` is known to hold."""
    check_arguments(r, k, v, w, u, state)
    if _in_place is not None and _in_place == get_ident() and r.device.type == "cuda" and state is not None:
        return torch.ops.visualrwkv.wkv6_in_place(r, k, v, w, u, state), state
    return torch.ops.visualrwkv.wkv6(r, k, v, w, u, state)


def _register() -> None:
    global _registered
    if _registered:
        return
    torch.library.register_fake("visualrwkv::wkv6", _fake)
    torch.library.register_fake("visualrwkv::wkv6_backward", _fake_backward)
    torch.library.register_autograd("visualrwkv::wkv6", _backward, setup_context=_setup_context)
    _registered = True


def _fake(r, k, v, w, u, state):
    batch, _, heads, size = r.shape
    final = r.new_empty(batch, heads, size, size, dtype=compute_dtype(r, k, v, w, u, state))
    return torch.empty_like(r, memory_format=torch.contiguous_format), final


def _fake_backward(r, k, v, w, u, state, dy, dfinal):
    rows = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (r, k, v, w)]
    batch, _, heads, size = r.shape
    dstate = r.new_empty(batch, heads, size, size, dtype=compute_dtype(r, k, v, w, u, state))
    return *rows, torch.empty_like(u, memory_format=torch.contiguous_format), dstate


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


@once_differentiable
def _backward(ctx, dy, dfinal):
    if dy is None and dfinal is None:
        return None, None, None, None, None, None
    inputs = ctx.saved_tensors  # read once: under activation checkpointing a second read is refused
    *rows, du, dstate = torch.ops.visualrwkv.wkv6_backward(*inputs, dy, dfinal)
    state = inputs[5]
    return *rows, du, None if state is None else dstate.to(state.dtype)
