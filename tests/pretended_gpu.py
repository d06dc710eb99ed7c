"""Two GPUs that are not there: tensors that say they are on CUDA, and compute on the CPU.

A `Pretended` tensor holds one of the CPU, and Python finds it on "cuda:0" or "cuda:1". While `pretended_gpus` is active
every operation on one is checked as a GPU would: all tensors on one device, and a kernel for CUDA in PyTorch's own
registry. `Gpus.waits` counts where the host would wait for a GPU. Graphs are recorded for the device of their stream,
as tapes of operations that are played again on the same memory; nothing that waits, or copies from the host, can be
recorded. The operators of this project are those of the CPU.

What this cannot show is what only a GPU knows: kernels, streams that run side by side, memory, speed.
"""

import contextlib
import time
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
# the host asks for numbers, or for how many there are
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.bincount}
COPIES = {aten._to_copy, aten.copy_}
# attention is one of several kernels, which C++ chooses for the device that it sees
CHOSEN = {aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class Pretended(torch.Tensor):
    """PyTorch's C++ takes it for a tensor of the CPU, and asks no driver; Python reads `device`."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    device = property(lambda self: self._device)

    @staticmethod
    def __new__(cls, inner, device):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **layout)

    def __init__(self, inner, device):
        self.inner, self._device = inner, device

    def to(self, *args, **kwargs):
        copy = kwargs.pop("copy", False)
        if isinstance(args[0] if args else None, torch.Tensor):
            args = (args[0].device, args[0].dtype)
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype = device or self.device, dtype or self.dtype
        if (device, dtype) == (self.device, self.dtype) and not copy and layout is None:
            return self
        return aten._to_copy(self, device=device, dtype=dtype, memory_format=layout)

    def cpu(self):
        return self.to("cpu")

    def tolist(self):
        return self.cpu().tolist()

    def new_tensor(self, data, dtype=None):
        return torch.tensor(data, dtype=dtype or self.dtype).to(self.device)

    def __getitem__(self, index):
        return super().__getitem__(torch.tensor(index).to(self.device) if isinstance(index, list) else index)

    def data_ptr(self):
        return self.inner.data_ptr()

    def __repr__(self):
        return f"Pretended({self.inner}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} of a pretended GPU in a thread, or at a time, without `pretended_gpus`")


class Gpus(TorchDispatchMode):
    """Attributes:
    waits: operation -> how often the host would have waited for a GPU; copies to it are "upload".
    """

    def __init__(self):
        super().__init__()
        self.waits = Counter()
        self.recording = self.backward_on = None  # (tape, device); device

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=...) is seen
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    @contextlib.contextmanager
    def backward(self, device):
        """For autograd's C++, which makes new tensors where it sees the others, on the CPU."""
        self.backward_on = torch.device(device)
        try:
            yield
        finally:
            self.backward_on = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, Pretended)]
        wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        if self.backward_on and any(argument.name == "device" for argument in func._schema.arguments):
            wanted = self.backward_on
        if not ours and (wanted is None or wanted.type != "cuda"):
            return func(*args, **kwargs)
        target = wanted or ours[0].device
        if func.overloadpacket is aten.copy_:
            target = args[0].device
        elif target.type == "cuda" and target.index is None:
            target = torch.device("cuda", torch.cuda.current_device())
        if wanted is None and func.overloadpacket is not aten.copy_:
            self._check(func, tensors, ours, target)
        self._count(func, args, tensors, ours, target)

        kwargs = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        function = _wkv6_in_place if func.name() == "visualrwkv::wkv6_in_place" else func
        plain_args, plain_kwargs = tree_map(lambda x: x.inner if isinstance(x, Pretended) else x, (args, kwargs))
        out = function(*plain_args, **plain_kwargs)
        if self.recording is not None and self.recording[1] == target:
            self.recording[0].append((function, plain_args, plain_kwargs, out))
        if target.type == "cpu":
            return out
        given = {id(x.inner): x for x in ours}  # what was changed in place is returned as it came

        def pretend(x):
            if not isinstance(x, torch.Tensor):
                return x
            if id(x) in given:
                return given[id(x)]
            with torch.inference_mode(x.is_inference()):  # not so where it is a view of a tensor made outside
                return Pretended(x, target)

        return tree_map(pretend, out)

    def _check(self, func, tensors, ours, target):
        packet = func.overloadpacket
        devices = {x.device for x in ours} | {target}
        assert len(devices) == 1, f"{func} of tensors on {devices}"
        # numbers may come from the host, and indices, which are copied
        strangers = [tuple(x.shape) for x in tensors if not isinstance(x, Pretended) and x.dim()]
        assert not strangers or packet in INDEXED, f"{func} of tensors on {devices} and on the CPU: {strangers}"
        if torch.version.cuda and func.namespace != "visualrwkv" and packet not in CHOSEN:
            known = torch._C._dispatch_has_computed_kernel_for_dispatch_key(func.name(), "CUDA")
            assert known, f"{func} has no CUDA kernel"

    def _count(self, func, args, tensors, ours, target):
        packet, found = func.overloadpacket, None
        by_mask = packet in INDEXED and any(x.dtype == torch.bool for x in args[1] if x is not None)
        if packet in WAITING or by_mask or (packet in COPIES and target.type == "cpu" and tensors[-1].numel()):
            found = str(packet)
        elif packet in COPIES | INDEXED and any(x.dim() and not isinstance(x, Pretended) for x in tensors):
            found = "upload"
        if found:
            if self.recording:
                raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({func})")
            self.waits[found] += 1


def _wkv6_in_place(r, k, v, w, u, state):
    y, final = torch.ops.visualrwkv.wkv6(r, k, v, w, u, state)
    state.copy_(final)
    return y


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls)


class CUDAGraph:
    def __init__(self):
        self.tape = []

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, out in self.tape:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def pretended_gpus():
    """Gives a `Gpus`; name devices with their number, "cuda:0" or "cuda:1"."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield from _pretend(monkeypatch)


def _pretend(monkeypatch):
    from visualrwkv.ops import build, kernel

    gpus, load, autocast = Gpus(), build.load, torch.autocast

    class Stream:
        def __init__(self, device=None):
            self.device = torch.device("cuda", current["device"] if device is None else device)

        def wait_stream(self, other):
            pass

    class Event:
        def __init__(self, enable_timing=False):
            self.time = None

        def record(self):
            self.time = time.perf_counter()

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1e3 * (end.time - self.time)

    current = {"device": 0} | {index: Stream(index) for index in range(2)}

    @contextlib.contextmanager
    def device(which):
        before, current["device"] = current["device"], torch.device(which).index
        try:
            yield
        finally:
            current["device"] = before

    class stream:
        def __init__(self, which):
            self.which, self.index = which, which.device.index

        def __enter__(self):
            self.before = current["device"], current[self.index]
            current["device"], current[self.index] = self.index, self.which

        def __exit__(self, *error):
            current["device"], current[self.index] = self.before

    class graph:  # as that of PyTorch: its own stream is made once, and stays where recording fails
        default_capture_stream = None

        def __init__(self, graph, pool=None, stream=None, capture_error_mode="global"):
            if stream is None and type(self).default_capture_stream is None:
                type(self).default_capture_stream = Stream()
            self.graph, self.stream = graph, stream or self.default_capture_stream

        def __enter__(self):
            self.context = stream(self.stream)
            self.context.__enter__()
            gpus.recording = (self.graph.tape, self.stream.device)

        def __exit__(self, kind, *error):
            gpus.recording = None
            if kind:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            self.context.__exit__(None, None, None)

    for name, value in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: current["device"],
        "device": device,
        "Stream": Stream,
        "Event": Event,
        "max_memory_allocated": lambda device=None: 0,
        "current_stream": lambda device=None: current[current["device"]],
        "stream": stream,
        "graph": graph,
        "CUDAGraph": CUDAGraph,
        "is_current_stream_capturing": lambda: gpus.recording is not None,
        "synchronize": lambda device=None: gpus.waits.update(["synchronize"]),
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "autocast", lambda device, *args, **kwargs: autocast("cpu", *args, **kwargs))
    monkeypatch.setattr(build, "load", lambda retry=False, device="cpu": load(retry))
    monkeypatch.setattr(kernel, "_on_cuda", False)
    schema = torch.library.Library("visualrwkv", "FRAGMENT")
    if load() == "" and not hasattr(torch.ops.visualrwkv, "wkv6_in_place"):  # that of csrc/wkv6_cuda.cpp
        schema.define("wkv6_in_place(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor(a!) state) -> Tensor")
    replaces = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with gpus, torch.autograd.set_multithreading_enabled(False):  # CUDA's own threads ask the driver
            yield gpus
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(replaces)
        schema._destroy()
