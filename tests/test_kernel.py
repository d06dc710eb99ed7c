"""The compiled operator: what test_ops.py does not ask of all forms, tracing, and its build."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_ops import COMPILER, check, check_rounding, error, gradients, needs_kernel, same_bits, sample

import visualrwkv
from visualrwkv.ops import build, use_kernel, wkv6, wkv6_chunked, wkv6_kernel


@pytest.fixture(scope="module", autouse=True)
def kernel():
    """With a compiler there has to be a kernel: a failed build fails these tests."""
    if COMPILER and sys.platform != "win32":
        assert build.load(retry=True) == ""


@needs_kernel
@pytest.mark.parametrize("size", [1, 8, 32, 40, 64, 100, 128])
@pytest.mark.parametrize("time", [1, 16, 35])
@pytest.mark.parametrize("mean", [-3.0, 1.0])
def test_head_sizes_and_lengths(size, time, mean):
    check(wkv6_kernel, sample(2, time, 3, size, mean=mean), 2e-6)


@needs_kernel
@pytest.mark.parametrize(("time", "mean"), [(1024, -4.0), (1025, -4.0), (2100, 0.0)])
def test_long_sequences_whose_states_are_recomputed_in_segments(time, mean):
    check(wkv6_kernel, sample(1, time, 1, 16, mean=mean), 2e-6, exact=wkv6_chunked)


@needs_kernel
def test_half_precision_numbers_are_read_and_rounded_as_torch_does():
    check_rounding(wkv6_kernel, (1, -1, 1, 64))


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
    assert same_bits(gradients(compiled, inputs, gy, gs), gradients(wkv6, inputs, gy, gs))


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
from test_ops import check, sample
from visualrwkv.ops import wkv6_kernel
for size in (40, 64):
    for mean in (-3.0, 0.0, 4.0):
        check(wkv6_kernel, sample(2, 35, 2, size, mean=mean), 1e-6)
r, k, v, w, u, state = sample(2, 35, 2)
_, final = wkv6_kernel(r, torch.zeros_like(k), v, torch.full_like(w, -torch.inf), u, state)
assert torch.equal(final, state)
print(torch.backends.cpu.get_cpu_capability())
"""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    code, out, err = python("-c", script, str(Path(__file__).parent), cache=cache, ATEN_CPU_CAPABILITY=capability)
    assert code == 0, err
    assert out.strip() in (capability.upper(), "DEFAULT", "NO AVX")
