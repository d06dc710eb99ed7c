"""The CUDA kernels: their build wherever nvcc is, their results on a GPU (test_cuda_emulation.py needs neither)."""

import os
import sys
from functools import partial

import pytest
import torch
from test_kernel import python
from test_ops import (
    COMPILER,
    DECAYS,
    check,
    check_golden,
    check_low_precision,
    compare,
    error,
    golden,
    gradients,
    needs_kernel,
    same_bits,
    sample,
)

from visualrwkv.ops import build, use_kernel, wkv6, wkv6_chunked, wkv6_kernel, wkv6_reference


def toolkit() -> str:
    """Why the CUDA library cannot be built here; empty if it can."""
    if not COMPILER or sys.platform == "win32":
        return "needs a C++ compiler"
    try:
        build._cuda_home()
        return ""
    except build.BuildError as error:
        return str(error)


MISSING = toolkit()
needs_nvcc = pytest.mark.skipif(bool(MISSING), reason=MISSING)
needs_gpu = [
    needs_nvcc,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda")


def on_gpu(inputs):
    return [x.to(GPU) for x in inputs]


def by_gpu(form):
    """The form for tensors of the CPU, computed on the GPU; gradients flow through."""
    return lambda *inputs: [x.cpu() for x in form(*on_gpu(inputs))]


# ---- Without a GPU.


@needs_nvcc
def test_compiles_and_loads():
    """For all architectures, in the user's cache: minutes the first time, nothing afterwards."""
    assert build.load(retry=True, device="cuda") == ""
    for name in ("wkv6", "wkv6_backward", "wkv6_in_place"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"visualrwkv::{name}", "CUDA")
    assert "PTX" in build.describe("cuda") or "TORCH_CUDA_ARCH_LIST" in os.environ


USE = """
import warnings
from visualrwkv.ops import build
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        build.load(device="cuda")
print(len(caught), build.outcome("cpu"), "|", build.outcome("cuda"))
"""


@needs_kernel
def test_without_nvcc_there_is_one_warning_and_a_reason(tmp_path):
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # for architectures that nobody has built for: a library that is there already needs no nvcc
    code, out, err = python("-c", USE, cache=cache, CUDA_HOME=str(tmp_path), TORCH_CUDA_ARCH_LIST="8.0;8.7+PTX")
    assert code == 0, err
    reason = str(tmp_path) if torch.version.cuda else "PyTorch is built without CUDA"
    assert out.startswith("1  | ") and reason in out
    code, out, err = python("-m", "visualrwkv.ops.build", cache=cache, CUDA_HOME=str(tmp_path))
    assert code == 0, err
    ready, none = out.splitlines()
    assert ready.startswith("the kernels are ready") and none.startswith("no CUDA kernels: ") and reason in none


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a PyTorch with CUDA")
def test_another_version_of_nvcc_is_named(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 9.1, V9.1.85\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(build.BuildError, match=rf"CUDA 9\.1, PyTorch of CUDA {torch.version.cuda}"):
        build._cuda_home()


def test_architectures_are_those_that_the_kernels_run_on(monkeypatch):
    for given, wanted in (
        ("5.2 6.0 6.1 7.0 7.5 8.0 8.6 9.0+PTX", "8.0;8.6;9.0+PTX"),  # as containers set it
        ("Volta;7.5+PTX", build.CUDA_ARCHITECTURES),
        ("Turing;Ampere;9.0a", "Ampere;9.0a"),
        ("", build.CUDA_ARCHITECTURES),
    ):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
        assert build.cuda_architectures() == wanted


def test_a_gpu_that_the_library_holds_nothing_for_is_named(monkeypatch):
    """Launching a kernel would fail, where PyTorch's form works."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Test GPU")
    for given, gpu, reason in (
        ("", (8, 0), None),
        ("", (8, 9), None),
        ("", (12, 1), None),
        ("", (7, 5), "Test GPU is older than compute capability 8.0"),
        ("8.6", (8, 6), None),
        ("8.6", (8, 9), None),
        ("8.6", (8, 0), "'8.6' names nothing that runs on Test GPU, of compute capability 8.0"),
        ("8.0 8.6", (9, 0), "'8.0 8.6' names nothing that runs on Test GPU, of compute capability 9.0"),
        ("8.0+PTX", (9, 0), None),
        ("9.0a+PTX", (10, 0), "names nothing"),
        ("9.0a", (9, 0), None),
    ):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, gpu=gpu: gpu)
        if reason:
            with pytest.raises(build.BuildError, match=reason):
                build._check_gpus()
            assert reason in build.describe("cuda")
        else:
            build._check_gpus()


def test_a_call_on_the_cpu_never_asks_for_cuda(tmp_path):
    script = """
import torch
from visualrwkv.ops import build, wkv6
build._cuda_home = build._build = None
x = torch.randn(1, 20, 2, 64)
wkv6(x, x, x, x, x[0, 0])
print(build.outcome("cuda"))
"""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    code, out, err = python("-c", script, cache=cache)
    assert code == 0 and out == "None\n", err


def test_libraries_depend_on_their_own_sources(tmp_path, monkeypatch):
    for name in ("wkv6.cpp", "wkv6_cpu.h", "wkv6_cuda.cu", "wkv6_check.h"):
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(build, "source_folder", lambda: tmp_path)
    assert [path.name for path in build.sources("cpu")] == ["wkv6.cpp"]
    assert [path.name for path in build.sources("cuda")] == ["wkv6_cuda.cu"]
    cpu, cuda = build.cache_folder("cpu"), build.cache_folder("cuda")
    (tmp_path / "wkv6_cuda.cu").write_text("2")
    assert build.cache_folder("cpu") == cpu and build.cache_folder("cuda") != cuda
    cuda = build.cache_folder("cuda")
    (tmp_path / "wkv6_cpu.h").write_text("2")
    assert build.cache_folder("cpu") != cpu and build.cache_folder("cuda") == cuda
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    assert build.cache_folder("cuda") != cuda


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_benchmark_says_that_it_needs_a_gpu():
    pytest.importorskip("bench.gpu")
    code, out, err = python("-m", "bench.gpu", cache=os.environ.get("HOME", "/"))
    assert code == 2 and not out and len(err.splitlines()) == 1 and "needs a CUDA device" in err


# ---- With a GPU.


class TestOnAGPU:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("name", ["wkv6_a", "wkv6_b", "wkv6_extreme"])
    def test_golden(self, name):
        data = golden(f"{name}.safetensors")
        check_golden(data, "", gradients(by_gpu(wkv6), [data[key] for key in "rkvwu"], data["gy"]), gw=1e-5)

    @pytest.mark.parametrize("name", ["wkv6_state", "wkv6_state_gs"])
    def test_golden_from_a_state(self, name):
        data = golden(f"{name}.safetensors")
        inputs = [data[key] for key in ("r", "k", "v", "w", "u", "s0")]
        check_golden(data, "__s0", gradients(by_gpu(wkv6), inputs, data["gy"], data.get("gs_out")), gw=1e-5)

    @pytest.mark.parametrize("size", [32, 64, 128])
    @pytest.mark.parametrize("time", [1, 5, 15, 16, 17, 100, 641])
    def test_head_sizes_and_lengths(self, size, time):
        check(by_gpu(wkv6_kernel), sample(2, time, 3, size), 3e-6, exact=wkv6_chunked, w=1e-5)

    @pytest.mark.parametrize("batch", [1, 64])
    @pytest.mark.parametrize(("mean", "spread"), DECAYS)
    def test_every_decay(self, mean, spread, batch):
        """A few sequences in segments, and many in one."""
        inputs = sample(batch, 300, 4, mean=mean, spread=spread)
        check(by_gpu(wkv6_kernel), inputs, 3e-6, exact=wkv6_chunked, w=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("time", [7, 300])
    def test_low_precision_is_within_twice_the_naive_recurrence(self, dtype, time):
        inputs = sample(2, time, 2, mean=-3.0, dtype=dtype)
        inputs[5] = inputs[5].float()
        check_low_precision(partial(gradients, by_gpu(wkv6_kernel)), inputs, 3e-6)

    def test_float64_and_other_head_sizes_are_left_to_pytorch(self):
        inputs = [x.requires_grad_() for x in on_gpu(sample(1, 9, 2, 3, mean=-1.0, dtype=torch.float64))]
        assert torch.autograd.gradcheck(wkv6, inputs, fast_mode=True)
        inputs = sample(1, 20, 2, 40)
        assert error(wkv6(*on_gpu(inputs))[0].cpu(), wkv6_reference(*inputs)[0]) < 1e-5

    def test_gradients_against_differences(self):
        inputs = [x.requires_grad_() for x in on_gpu(sample(1, 20, 1, 32, mean=-1.0))]
        assert torch.autograd.gradcheck(wkv6_kernel, inputs, eps=1e-2, atol=2e-2, rtol=2e-2, fast_mode=True)

    @pytest.mark.parametrize("time", [3, 50])
    def test_opcheck(self, time):
        inputs = on_gpu(sample(1, time, 2))
        for state in (inputs[5], None):
            arguments = [x.clone().requires_grad_() for x in inputs[:5]]
            torch.library.opcheck(torch.ops.visualrwkv.wkv6.default, (*arguments, state))

    def test_repeats_bit_by_bit(self):
        inputs = sample(2, 500, 4, dtype=torch.bfloat16)
        inputs[5] = inputs[5].float()
        gy, gs = torch.randn_like(inputs[0]), torch.randn_like(inputs[5])
        first = gradients(by_gpu(wkv6_kernel), inputs, gy, gs)
        for _ in range(3):
            assert same_bits(gradients(by_gpu(wkv6_kernel), inputs, gy, gs), first)

    def test_padding_leaves_the_state_untouched(self):
        for time in (5, 40):
            r, k, v, w, u, state = on_gpu(sample(2, time, 2))
            state.requires_grad_()
            _, final = wkv6_kernel(r, torch.zeros_like(k), v, torch.full_like(w, -torch.inf), u, state)
            assert torch.equal(final, state)
            gs = torch.randn_like(state)
            (through,) = torch.autograd.grad((final * gs).sum(), state)
            assert torch.equal(through, gs)

    def test_other_streams_and_graphs(self):
        inputs = on_gpu(sample(1, 100, 2))
        wanted = wkv6_kernel(*inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results = wkv6_kernel(*inputs)
        stream.synchronize()
        assert same_bits(results, wanted)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = wkv6_kernel(*inputs)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(results, wanted)

    def test_in_place(self):
        for time in (1, 15, 300):
            inputs = on_gpu(sample(1, time, 2))
            y, final = wkv6_kernel(*inputs)
            assert torch.equal(torch.ops.visualrwkv.wkv6_in_place(*inputs), y)
            assert torch.equal(inputs[5], final)

    def test_strided_arguments(self):
        r, k, v, w, u, state = on_gpu(sample(2, 40, 2))
        joint = torch.stack([r, k, v], 2).transpose(0, 1)
        views = [joint[:, :, i].transpose(0, 1) for i in range(3)]
        results = wkv6_kernel(*views, w[:, :1].expand_as(w), u, state)
        wanted = wkv6_kernel(r, k, v, w[:, :1].repeat(1, 40, 1, 1), u, state)
        assert same_bits(results, wanted)

    def test_the_pytorch_form_can_be_chosen(self):
        inputs = on_gpu(sample(1, 20, 2))
        with use_kernel(False):
            plain = wkv6(*inputs)
        compare(plain, wkv6(*inputs), 1e-5)
