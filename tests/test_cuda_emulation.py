"""The CUDA kernels run on the CPU: csrc/*.cu compiled by the C++ compiler against tests/cuda_emulation.h.

This checks the arithmetic, the indices and the barriers without a GPU. What it cannot check is what only nvcc and the
device know: see test_cuda.py.
"""

import ctypes
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from test_ops import (
    COMPILER,
    DECAYS,
    check_golden,
    check_low_precision,
    check_rounding,
    compare,
    golden,
    in_double,
    mix_decays,
    same_bits,
    sample,
)

from visualrwkv.ops import wkv6_chunked, wkv6_reference

pytestmark = pytest.mark.skipif(not COMPILER or sys.platform != "linux", reason="needs Linux and a C++ compiler")

TYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}  # enum Type of csrc/wkv6_problem.h
INTEGERS = ("batch", "time", "heads", "size", "multiprocessors", "descending", "type", "kv_type", "w_type")
POINTERS = ("r", "k", "v", "w", "u", "state", "y", "final_state", "dy", "dfinal")
GRADIENTS = ("dr", "dk", "dv", "dw", "du", "dstate")


class Call(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in INTEGERS] + [
        (name, ctypes.c_void_p) for name in POINTERS + GRADIENTS
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulation") / "emulation.so"
    source = Path(__file__).with_name("cuda_emulation.cpp")
    command = [COMPILER, "-O1", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas", "-o", path, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    library = ctypes.CDLL(path)
    for function in (library.forward, library.backward):
        function.argtypes, function.restype = [ctypes.POINTER(Call)], ctypes.c_char_p
    library.segments.argtypes, library.segments.restype = [ctypes.POINTER(Call)], ctypes.c_int64
    return library


def emulate(library, inputs, gy=None, gs=None, multiprocessors=1, descending=False, backward=True):
    """What `gradients` gives of the CUDA kernels: y, the final state and the gradients of r, k, v, w, u, state."""
    r, k, v, w, u, *rest = (x.contiguous() for x in inputs)
    state = rest[0].float() if rest else None
    batch, time, heads, size = r.shape
    tensors = {"r": r, "k": k, "v": v, "w": w, "u": u.float(), "state": state, "dfinal": gs}
    tensors["dy"] = None if gy is None else gy.to(r.dtype)
    nan = {"y": r, "dr": r, "dk": k, "dv": v, "dw": w, "du": tensors["u"]}
    tensors |= {name: torch.full_like(x, torch.nan) for name, x in nan.items()}
    tensors |= {name: torch.full((batch, heads, size, size), torch.nan) for name in ("final_state", "dstate")}
    call = Call(
        *(batch, time, heads, size, multiprocessors, descending, TYPES[r.dtype], TYPES[k.dtype], TYPES[w.dtype]),
        *(None if tensors[name] is None else tensors[name].data_ptr() for name in POINTERS + GRADIENTS),
    )
    assert library.forward(call) is None
    results = [tensors["y"], tensors["final_state"]]
    if backward:
        assert library.backward(call) is None
        results += [tensors[name] for name in GRADIENTS]
    return results


def check(library, inputs, both_orders=False, **options):
    """Against float64; where asked for, both orders of the threads have to give the same bits."""
    gy, gs = torch.randn_like(inputs[0]), torch.randn_like(inputs[5], dtype=torch.float32)
    exact = in_double(wkv6_reference, inputs, gy, gs)
    results = emulate(library, inputs, gy, gs, **options)
    assert all(x.isfinite().all() for x in results)
    compare(results, exact, 1e-6, w=5e-6)  # of w: a difference of sums, times the logarithm of the decay
    if both_orders:
        assert same_bits(emulate(library, inputs, gy, gs, descending=True, **options), results)


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("time", [1, 9, 15])
def test_recurrent_kernel(library, size, time):
    inputs = sample(1, time, 2, size)
    exact = in_double(wkv6_reference, inputs, torch.zeros_like(inputs[0]), inputs[5])
    for multiprocessors in (1, 8):  # all columns of a state in one block, and spread over several
        compare(emulate(library, inputs, multiprocessors=multiprocessors, backward=False), exact[:2], 5e-7)


@pytest.mark.parametrize("name", ["wkv6_a", "wkv6_b", "wkv6_extreme", "wkv6_state", "wkv6_state_gs"])
def test_golden(library, name):
    data = golden(f"{name}.safetensors")
    suffix = "__s0" if "s0" in data else ""
    inputs = [data[key] for key in ("r", "k", "v", "w", "u", "s0") if key in data]
    results = emulate(library, inputs, data["gy"], data.get("gs_out"))
    check_golden(data, suffix, results if suffix else results[:-1], gw=5e-6)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_head_sizes(library, size):
    check(library, sample(1, 37, 1, size), both_orders=True)


@pytest.mark.parametrize("time", [1, 16, 17, 33])
def test_lengths(library, time):
    check(library, sample(2, time, 1, 32))


@pytest.mark.parametrize(("mean", "spread"), DECAYS)
def test_exact_at_every_decay(library, mean, spread):
    check(library, sample(1, 53, 2, 32, mean=mean, spread=spread))


def test_channels_of_every_decay_side_by_side(library):
    inputs = sample(1, 64, 1, 32)
    mix_decays(inputs[3])
    check(library, inputs, both_orders=True)


@pytest.mark.parametrize(("time", "multiprocessors", "size"), [(270, 8, 32), (150, 1, 32), (270, 8, 64)])
@pytest.mark.parametrize("mean", [-4.0, 0.5])
def test_segments(library, time, multiprocessors, size, mean):
    inputs = sample(1, time, 1, size, mean=mean)
    call = Call(batch=1, time=time, heads=1, size=size, multiprocessors=multiprocessors)
    assert library.segments(call) == (3 if multiprocessors == 8 else 1)
    check(library, inputs, both_orders=True, multiprocessors=multiprocessors)


def test_rounding_does_not_add_up_in_long_sequences(library):
    """Tensor cores round toward zero: a state kept in them would be off ten times as far, and more with every token."""
    inputs = sample(1, 2048, 1, 32, mean=-9.0, spread=0.3)
    with torch.no_grad():
        exact = wkv6_chunked(*(x.double() for x in inputs))
    compare(emulate(library, inputs, backward=False), exact, 5e-6)


def test_without_a_state_and_without_some_gradients(library):
    inputs = sample(1, 40, 1, 32)[:5]
    gy, gs = torch.randn_like(inputs[0]), torch.randn(1, 1, 32, 32)
    for of_y, of_state in ((gy, None), (None, gs)):
        exact = in_double(
            wkv6_reference, inputs, gy if of_y is not None else 0 * gy, gs if of_state is not None else 0 * gs
        )
        results = emulate(library, inputs, of_y, of_state)
        compare(results[:-1], exact, 1e-6, w=5e-6)


@pytest.mark.parametrize("time", [5, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_leaves_the_state_untouched(library, time, dtype):
    r, k, v, w, u, state = sample(1, time, 1, 32, dtype=dtype)
    inputs = [r, torch.zeros_like(k), v, torch.full_like(w, -torch.inf), u, state.float()]
    gs = torch.randn_like(inputs[5])
    results = emulate(library, inputs, None, gs)
    assert torch.equal(results[1], inputs[5])
    assert torch.equal(results[7], gs)
    results = emulate(library, inputs, torch.ones_like(r), gs)
    assert all(x.isfinite().all() for x in results)
    assert not results[5].any(), "the gradient of w at -inf is 0"


@pytest.mark.parametrize(
    ("dtype", "single", "time", "multiprocessors"),
    [
        (torch.bfloat16, "", 50, 1),
        (torch.float16, "", 50, 1),
        (torch.float16, "r", 50, 1),  # as the model asks in float16
        (torch.bfloat16, "w", 50, 1),  # as under autocast
        (torch.float16, "", 150, 1),  # several spans of a segment
        (torch.bfloat16, "", 270, 8),  # several segments
    ],
)
def test_low_precision_is_within_twice_the_naive_recurrence(library, dtype, single, time, multiprocessors):
    inputs = sample(1, time, 1, 32, mean=-3.0, dtype=dtype)
    inputs[:4] = [x.float() if name in single else x for name, x in zip("rkvw", inputs, strict=False)]
    inputs[4:] = [x.float() for x in inputs[4:]]
    run = partial(emulate, library, multiprocessors=multiprocessors)
    check_low_precision(run, inputs, 2e-6, **dict.fromkeys(single, 1e-5))


def test_half_precision_numbers_are_read_and_rounded_as_torch_does(library):
    check_rounding(lambda *inputs: emulate(library, inputs, backward=False), (64, 8, 4, 32))
