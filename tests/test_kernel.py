"""The compiled operator: golden numbers, gradients, every decay and precision, tracing, and its build."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_ops import DECAYS, check_golden, error, golden, gradients, sample

import visualrwkv
from visualrwkv.ops import build, use_kernel, wkv6, wkv6_chunked, wkv6_kernel, wkv6_reference

NAMES = ["y", "state", "r", "k", "v", "w", "u", "s0"]
COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0])
needs_kernel = pytest.mark.skipif(not COMPILER or sys.platform == "win32", reason="needs a C++ compiler")


@pytest.fixture(scope="module", autouse=True)
def kernel():
    """With a compiler there has to be a kernel: a failed build fails these tests."""
    if COMPILER and sys.platform != "win32":
        assert build.load(retry=True) == ""


def in_double(form, inputs, gy, gs):
    return gradients(form, [x.double() for x in inputs], gy.double(), gs.double())


@needs_kernel
@pytest.mark.parametrize("name", ["wkv6_a", "wkv6_b", "wkv6_extreme"])
def test_golden_rwkv6(name):
    data = golden(f"{name}.safetensors")
    check_golden(data, "", gradients(wkv6_kernel, [data[key] for key in "rkvwu"], data["gy"]))


@needs_kernel
@pytest.mark.parametrize("name", ["wkv6_state", "wkv6_state_gs"])
def test_golden_rwkv6_from_a_state(name):
    data = golden(f"{name}.safetensors")
    inputs = [data[key] for key in ("r", "k", "v", "w", "u", "s0")]
    check_golden(data, "__s0", gradients(wkv6_kernel, inputs, data["gy"], data.get("gs_out")))


@needs_kernel
@pytest.mark.parametrize("suffix", ["", "__s0"])
def test_golden_rwkv5(suffix):
    data = golden("wkv5.safetensors")
    inputs = [data[key] for key in "rkvwu"] + ([data["s0"]] if suffix else [])

    def constant_decay(r, k, v, w, u, state=None):
        return wkv6_kernel(r, k, v, w.expand_as(r), u, state)

    check_golden(data, suffix, gradients(constant_decay, inputs, data["gy"]))


@needs_kernel
@pytest.mark.parametrize(("time", "mean"), [(1, -1.0), (5, -1.0), (17, 0.0), (17, 3.0), (33, -1.0)])
def test_gradcheck(time, mean):
    inputs = [x.requires_grad_() for x in sample(1, time, 2, 3, mean=mean, dtype=torch.float64)]
    assert torch.autograd.gradcheck(wkv6_kernel, inputs, fast_mode=time > 5)


@needs_kernel
@pytest.mark.parametrize(("mean", "spread"), DECAYS)
def test_exact_at_every_decay(mean, spread):
    inputs = sample(2, 75, 2, mean=mean, spread=spread)
    gy, gs = torch.randn_like(inputs[0]), torch.randn_like(inputs[5])
    exact = in_double(wkv6_reference, inputs, gy, gs)
    double = in_double(wkv6_kernel, inputs, gy, gs)
    single = gradients(wkv6_kernel, inputs, gy, gs)
    for name, a, b, c in zip(NAMES, single, double, exact, strict=True):
        assert error(b, c) < 1e-14, name
        assert error(a, c) < (5e-7 if name in ("y", "state") else 1e-6), name


@needs_kernel
@pytest.mark.parametrize("size", [1, 8, 32, 40, 64, 100, 128])
@pytest.mark.parametrize("time", [1, 16, 35])
@pytest.mark.parametrize("mean", [-3.0, 1.0])
def test_head_sizes_and_lengths(size, time, mean):
    inputs = sample(2, time, 3, size, mean=mean)
    gy, gs = torch.randn_like(inputs[0]), torch.randn_like(inputs[5])
    exact = in_double(wkv6_reference, inputs, gy, gs)
    for name, value, wanted in zip(NAMES, gradients(wkv6_kernel, inputs, gy, gs), exact, strict=True):
        assert error(value, wanted) < 2e-6, name


@needs_kernel
@pytest.mark.parametrize(("time", "mean"), [(1024, -4.0), (1025, -4.0), (2100, 0.0)])
def test_long_sequences_whose_states_are_recomputed_in_segments(time, mean):
    inputs = sample(1, time, 1, 16, mean=mean)
    gy, gs = torch.randn_like(inputs[0]), torch.randn_like(inputs[5])
    exact = in_double(wkv6_chunked, inputs, gy, gs)
    for name, value, wanted in zip(NAMES, gradients(wkv6_kernel, inputs, gy, gs), exact, strict=True):
        assert error(value, wanted) < 2e-6, name


@needs_kernel
def test_channels_of_every_decay_side_by_side():
    inputs = sample(1, 64, 2)
    w = inputs[3]
    w[..., ::4] = 3.0
    w[..., 1::4] = -12.0
    w[:, ::3, :, 2::4] = 200.0
    w[:, 1::3, :, 2::4] = -torch.inf
    gy, gs = torch.randn_like(w), torch.randn_like(inputs[5])
    exact = in_double(wkv6_reference, inputs, gy, gs)
    for name, value, wanted in zip(NAMES, gradients(wkv6_kernel, inputs, gy, gs), exact, strict=True):
        assert error(value, wanted) < 1e-6, name


@needs_kernel
@pytest.mark.parametrize("mean", [-2.0, 2.0])
def test_split_sequence_equals_the_whole(mean):
    r, k, v, w, u, state = sample(2, 53, 2, mean=mean)
    whole, final = wkv6_kernel(r, k, v, w, u, state)
    cuts, pieces = (0, 1, 2, 7, 16, 33, 50, 53), []
    for start, end in itertools.pairwise(cuts):
        y, state = wkv6_kernel(*(x[:, start:end] for x in (r, k, v, w)), u, state)
        pieces.append(y)
    assert error(torch.cat(pieces, 1), whole) < 1e-6
    assert error(state, final) < 1e-6


@needs_kernel
@pytest.mark.parametrize("time", [1, 16, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_padding_leaves_the_state_untouched(time, dtype):
    r, k, v, w, u, state = sample(2, time, 2, dtype=dtype)
    state = state if dtype == torch.float64 else state.float()
    inputs = [x.requires_grad_() for x in (r, torch.zeros_like(k), v, torch.full_like(w, -torch.inf), u, state)]
    y, final = wkv6_kernel(*inputs)
    assert torch.equal(final, state)
    gs = torch.randn_like(state)
    (through,) = torch.autograd.grad((final * gs).sum(), state, retain_graph=True)
    assert torch.equal(through, gs)
    results = torch.autograd.grad((final * gs).sum() + y.sum(), inputs)
    assert all(x.isfinite().all() for x in results)
    assert not results[3].any(), "the gradient of w at -inf is 0"


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_within_twice_the_naive_recurrence(dtype):
    inputs = sample(2, 50, 2, mean=-3.0, dtype=dtype)
    inputs[5] = inputs[5].float()
    gy, gs = torch.randn_like(inputs[0]), torch.randn_like(inputs[5])
    exact = in_double(wkv6_reference, inputs, gy, gs)
    naive = gradients(wkv6_reference, inputs, gy, gs)
    results = gradients(wkv6_kernel, inputs, gy, gs)
    for name, value, rough, wanted in zip(NAMES, results, naive, exact, strict=True):
        assert value.dtype == rough.dtype, name
        assert error(value, wanted) <= max(2 * error(rough, wanted), 1e-6), name


@needs_kernel
def test_half_precision_numbers_are_read_and_rounded_as_torch_does():
    """With one channel of ones and a state that forgets everything, y is this token's v plus the last one's."""
    for dtype in (torch.float16, torch.bfloat16):
        v = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
        v = torch.where(v.isfinite(), v, 0).view(1, -1, 1, 64)
        one = torch.zeros_like(v)
        one[..., 0] = 1
        u = torch.zeros(1, 64, dtype=dtype)
        u[0, 0] = 1
        complete = torch.full_like(v, torch.inf)
        y, _ = wkv6_kernel(one, one, v, complete, u)
        exact = v.float()
        exact[:, 1:] += v.float()[:, :-1]
        assert torch.equal(y, exact.to(dtype))


@needs_kernel
def test_strided_and_mixed_arguments():
    r, k, v, w, u, state = sample(2, 40, 2)
    joint = torch.stack([r, k, v], 2).transpose(0, 1)  # (T, B, 3, H, N)
    views = [joint[:, :, i].transpose(0, 1) for i in range(3)]
    odd = torch.stack([state, state], -1)[..., 0]
    assert not views[0].is_contiguous() and not odd.is_contiguous()
    wanted = wkv6_kernel(r, k, v, w[:, :1].repeat(1, 40, 1, 1), u, state)
    for a, b in zip(wkv6_kernel(*views, w[:, :1].expand_as(w), u, odd), wanted, strict=True):
        assert torch.equal(a, b)
    last = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (r, k, v, w)]
    for a, b in zip(wkv6_kernel(*last, u, state), wkv6_kernel(r, k, v, w, u, state), strict=True):
        assert torch.equal(a, b)
    mixed = [r.bfloat16(), k.half(), v, w, u.bfloat16(), state]
    exact = wkv6_reference(*(x.double() for x in mixed))
    y, final = wkv6_kernel(*mixed)
    assert y.dtype == torch.bfloat16 and error(y, exact[0]) < 5e-3 and error(final, exact[1]) < 1e-6


@needs_kernel
def test_only_some_gradients_wanted():
    r, k, v, w, u, state = sample(1, 20, 2)
    k.requires_grad_()
    y, final = wkv6_kernel(r, k, v, w, u)
    (from_y,) = torch.autograd.grad(y.sum(), k, retain_graph=True)
    (from_state,) = torch.autograd.grad(final.sum(), k, retain_graph=True)
    (both,) = torch.autograd.grad(y.sum() + final.sum(), k)
    assert error(from_y + from_state, both) < 1e-6
    with torch.no_grad():
        assert not wkv6_kernel(r, k, v, w, u, state)[0].requires_grad


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype):
    inputs = sample(1, 18, 2, 40, dtype=dtype)
    inputs[5] = inputs[5] if dtype == torch.float64 else inputs[5].float()
    for state in (inputs[5], None):
        arguments = [x.clone().requires_grad_() for x in inputs[:5]]
        state = state if state is None else state.clone().requires_grad_()
        torch.library.opcheck(torch.ops.visualrwkv.wkv6.default, (*arguments, state))
    y, final = torch.ops.visualrwkv.wkv6(*inputs)
    for gradient in ((y, final), (None, final), (y, None)):
        torch.library.opcheck(torch.ops.visualrwkv.wkv6_backward.default, (*inputs, *gradient))


@needs_kernel
def test_compiles_without_a_break():
    inputs = sample(1, 20, 2)
    gy, gs = torch.randn_like(inputs[0]), torch.randn_like(inputs[5])
    compiled = torch.compile(wkv6, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(compiled, inputs, gy, gs), gradients(wkv6, inputs, gy, gs), strict=True):
        assert torch.equal(a, b)


@needs_kernel
def test_either_form_can_be_chosen():
    inputs = sample(1, 20, 2)
    with use_kernel(False):
        plain = wkv6(*inputs)
        with pytest.raises(RuntimeError, match="switched off"):
            wkv6_kernel(*inputs)
    for a, b, c in zip(plain, wkv6_chunked(*inputs), wkv6(*inputs), strict=True):
        assert torch.equal(a, b) and error(a, c) < 1e-6


@needs_kernel
def test_the_operator_itself_names_what_is_wrong():
    r, k, v, w, u, state = sample(2, 3, 2)
    operator = torch.ops.visualrwkv.wkv6
    for arguments in (
        (r[0], k, v, w, u, state),
        (r, k[:, :2], v, w, u, state),
        (r, k, v, w.long(), u, state),
        (r, k, v, w, u[:1], state),
        (r, k, v, w, u, state[:1]),
        (r[:, :0], k[:, :0], v[:, :0], w[:, :0], u, state),
    ):
        with pytest.raises(ValueError, match="shape|dtype|time step"):
            operator(*arguments)
    for gradient in ((r[:, :1], None), (None, state[:1])):
        with pytest.raises(ValueError, match="shape"):
            torch.ops.visualrwkv.wkv6_backward(r, k, v, w, u, state, *gradient)


# ---- The build, each in a process and a cache of its own.

USE = """
import sys, warnings
import torch
from visualrwkv.ops import build, wkv6, wkv6_reference
torch.manual_seed(0)
inputs = [torch.randn(1, 20, 2, 64) for _ in range(4)] + [torch.randn(2, 64)]
wanted = wkv6_reference(*inputs)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        for a, b in zip(wkv6(*inputs), wanted):
            assert (a - b).abs().max() < 1e-4
    wkv6(*(x[:, :1] for x in inputs[:4]), inputs[4])
print(repr(build.outcome()))
print(len(caught), *(w.message for w in caught))
"""


def environment(cache, **variables):
    path = str(Path(visualrwkv.__file__).parents[1])
    return {**os.environ, "XDG_CACHE_HOME": str(cache), "HOME": str(cache), "PYTHONPATH": path, **variables}


def python(*arguments, **variables):
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=600, env=environment(**variables)
    )
    return done.returncode, done.stdout, done.stderr


def test_without_a_compiler_pytorch_does_the_work(tmp_path):
    code, out, err = python("-c", USE, cache=tmp_path, PATH="")
    assert code == 0, err
    assert "no C++ compiler" in out.splitlines()[0]
    assert out.splitlines()[1].startswith("1 the compiled kernels are not available")
    code, out, _ = python("-m", "visualrwkv.ops.build", cache=tmp_path, PATH="", CXX="c++")
    assert code == 1 and out.startswith("not built: there is no C++ compiler 'c++' on the PATH")
    code, out, err = python("-m", "visualrwkv.ops.build", "gpu", cache=tmp_path, PATH="")
    assert code == 2 and not out and "gpu" in err and "cpu and cuda" in err


def test_switched_off_by_the_environment(tmp_path):
    code, out, err = python("-c", USE, cache=tmp_path, PATH="", VISUALRWKV_KERNEL="0")
    assert code == 0, err
    assert out.splitlines() == ["None", "0"] and not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.touch()
    code, out, err = python("-c", USE, cache=file)
    assert code == 0, err
    assert out.splitlines()[1].startswith("1 the compiled kernels are not available" if COMPILER else "1 ")
    if COMPILER and sys.platform != "darwin":
        assert "XDG_CACHE_HOME" in out


@needs_kernel
def test_a_failed_build_is_remembered(tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "wkv6.cpp").write_text('#error "broken on purpose"\n')
    script = f"from visualrwkv.ops import build; from pathlib import Path\n{USE}".replace(
        "torch.manual_seed(0)", f"build.source_folder = lambda: Path({str(tmp_path / 'csrc')!r})"
    )
    for attempt in range(2):
        code, out, err = python("-c", script, cache=tmp_path)
        assert code == 0, err
        assert "broken on purpose" in out.splitlines()[0]
        assert out.splitlines()[1].startswith("1 ")
        logs = list(tmp_path.glob("visualrwkv/*/log"))
        assert len(logs) == 1
        if attempt == 0:
            logs[0].write_text("untouched")
    assert logs[0].read_text() == "untouched", "only a request by the user builds again"


@needs_kernel
def test_two_processes_build_at_once(tmp_path):
    unoptimised = tmp_path / "c++"  # takes half the time, and it is the waiting that is looked at
    unoptimised.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    unoptimised.chmod(0o755)
    command = [sys.executable, "-m", "visualrwkv.ops.build", "cpu"]
    variables = environment(tmp_path, CXX=str(unoptimised))
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": variables}
    for process in [subprocess.Popen(command, **options) for _ in range(2)]:
        out, err = process.communicate(timeout=900)
        assert process.returncode == 0, err
        assert out.startswith("the kernels are ready") and err == ""
    assert len(list(tmp_path.glob("visualrwkv/*/done"))) == 1


@needs_kernel
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability, tmp_path):
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from test_ops import error, gradients, sample
from visualrwkv.ops import wkv6_kernel, wkv6_reference
for size in (40, 64):
    for mean in (-3.0, 0.0, 4.0):
        inputs = sample(2, 35, 2, size, mean=mean)
        gy, gs = torch.randn_like(inputs[0]), torch.randn_like(inputs[5])
        exact = gradients(wkv6_reference, [x.double() for x in inputs], gy.double(), gs.double())
        for value, wanted in zip(gradients(wkv6_kernel, inputs, gy, gs), exact):
            assert error(value, wanted) < 1e-6
r, k, v, w, u, state = sample(2, 35, 2)
_, final = wkv6_kernel(r, torch.zeros_like(k), v, torch.full_like(w, -torch.inf), u, state)
assert torch.equal(final, state)
print(torch.backends.cpu.get_cpu_capability())
"""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    code, out, err = python("-c", script, str(Path(__file__).parent), cache=cache, ATEN_CPU_CAPABILITY=capability)
    assert code == 0, err
    assert out.strip() in (capability.upper(), "DEFAULT", "NO AVX")


@needs_kernel
@pytest.mark.parametrize("form", [wkv6_kernel, wkv6_chunked])
def test_a_second_derivative_is_refused(form):
    """It would be missing without a word."""
    inputs = [x.requires_grad_() for x in sample(1, 20, 2)]
    y, _ = form(*inputs)
    first = torch.autograd.grad(y.square().sum(), inputs[:5], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        sum(x.square().sum() for x in first).backward()
