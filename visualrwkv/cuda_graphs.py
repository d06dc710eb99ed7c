"""Decoding on a GPU: the step of one token, recorded once as a CUDA graph and replayed.

A step is hundreds of small kernels; started one by one from Python they would take several times as long as their
work. A graph starts them all at once, but it always reads and writes the same memory. So the state of the sequences at
hand lives in that memory from step to step: the `RWKVState` that was decoded last holds the very tensors
(`RWKVState.clone` keeps an earlier one, as everywhere), and gets copies of its own when another state takes its place.

`RWKV.forward` comes here for single tokens without gradients; its modules stay the definition of what a step computes.
"""

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from visualrwkv.ops.kernel import kernels_wanted, states_in_place
from visualrwkv.state import LayerState, RWKVState

_KEPT = 4  # graphs of a model, one for each number of sequences; each has memory for their states
_steps: "weakref.WeakKeyDictionary[torch.nn.Module, OrderedDict[tuple, StaticStep]]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()  # threads that ask the same model share its graphs and their memory
_failed: "weakref.WeakSet[torch.nn.Module]" = weakref.WeakSet()


def step(rwkv: torch.nn.Module, embeds: Tensor, state: RWKVState) -> Tensor | None:
    """Read one token on a GPU.

    Args:
        rwkv: the language model.
        embeds: (B, 1, D), embeddings before ln0.
        state: moved past the token, apart from `seen`.
    Returns:
        hidden (B, 1, D) after `ln_out`; None where a graph does not apply, with nothing changed.
    """
    if not _applies(rwkv, embeds, state):
        return None
    with _lock:
        static = _find(rwkv, embeds, state)
        return None if static is None else static(embeds, state)


def _find(rwkv: torch.nn.Module, embeds: Tensor, state: RWKVState) -> "StaticStep | None":
    """The recorded step for this call; records it if there is none."""
    steps = _steps.setdefault(rwkv, OrderedDict())
    key = (embeds.shape[0], embeds.dtype, embeds.device, *_weights(rwkv))
    static = steps.get(key)
    if static is None:
        for old in [other for other in steps if other[1:] != key[1:]]:  # the weights were moved or replaced
            steps.pop(old).release()
        while len(steps) >= _KEPT:
            steps.popitem(last=False)[1].release()
        try:
            with torch.cuda.device(embeds.device):
                static = StaticStep(rwkv, embeds, state, record)
        except RuntimeError as error:
            _failed.add(rwkv)
            warnings.warn(f"decoding goes on without a CUDA graph: {error}", RuntimeWarning, stacklevel=2)
            return None
        steps[key] = static
    steps.move_to_end(key)
    return static


def record(function: Callable[[], None]) -> Callable[[], None]:
    """The work of `function` on the GPU as a graph; what it does elsewhere is done only now."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # libraries set themselves up, kernels get built: nothing of that may be recorded
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may go on as they like
        function()
    return graph.replay


class StaticStep:
    """The step of one token for a fixed number of sequences, from and to memory that stays where it is.

    Args:
        rwkv, embeds, state: a call of `step`; only shapes, dtypes and the device are taken from the last two.
        recorder: makes of a function without arguments one that does the same work again, see `record`.
    """

    def __init__(self, rwkv, embeds: Tensor, state: RWKVState, recorder: Callable):
        self._rwkv = weakref.ref(rwkv)  # the graph needs the weights only as long as the model is there to be asked
        self._owner: Callable[[], RWKVState | None] = lambda: None  # whose state is in the memory
        # Ordinary tensors, also if made in inference mode: later calls may come without.
        with torch.inference_mode(False), torch.no_grad():
            self._embeds, self._hidden = (
                torch.zeros(embeds.shape, dtype=embeds.dtype, device=embeds.device) for _ in range(2)
            )
            self.layers = [
                LayerState(*(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in layer))
                for layer in state.layers
            ]
            self._replay = recorder(self._step)

    def _step(self) -> None:
        rwkv = self._rwkv()
        with states_in_place():
            x = rwkv.blocks[0].ln0(self._embeds)
            for block, layer in zip(rwkv.blocks, self.layers, strict=True):
                x, new = block(x, layer, None)
                for place, value in zip(layer, new, strict=True):
                    if value is not place:
                        place.copy_(value)
            self._hidden.copy_(rwkv.ln_out(x))

    @torch.no_grad()
    def __call__(self, embeds: Tensor, state: RWKVState) -> Tensor:
        """As `step`."""
        if self._owner() is not state:
            self.release()
        if not self._holds(state):
            for layer, given in zip(self.layers, state.layers, strict=True):
                for place, value in zip(layer, given, strict=True):
                    place.copy_(value)
        self._embeds.copy_(embeds)
        self._replay()
        state.layers = list(self.layers)
        self._owner = weakref.ref(state)
        return self._hidden.clone()

    def release(self) -> None:
        """Give the state whose tensors the memory is copies of its own."""
        owner = self._owner()
        if owner is not None and self._holds(owner):
            owner.layers = owner.clone().layers
        self._owner = lambda: None

    def _holds(self, state: RWKVState) -> bool:
        return all(
            a is b for mine, its in zip(self.layers, state.layers, strict=True) for a, b in zip(mine, its, strict=True)
        )


def _weights(rwkv) -> tuple:
    """Changes when the weights are moved, cast or replaced, or wrapped by adapters (a graph would not notice)."""
    first, last = rwkv.blocks[0].att.key, rwkv.blocks[-1].ffn.value
    return type(first), first.weight.data_ptr(), type(last), last.weight.data_ptr()


def _applies(rwkv, embeds: Tensor, state: RWKVState) -> bool:
    if embeds.device.type != "cuda" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if rwkv.training or rwkv in _failed or not kernels_wanted() or torch.is_autocast_enabled("cuda"):
        return False
    if torch.cuda.is_current_stream_capturing():
        return False
    # Adapters can be switched on and off in Python, which a graph would not notice.
    if any(type(part).__module__.startswith("peft") for part in (rwkv.blocks[0].att.key, rwkv.blocks[0].ffn.value)):
        return False
    layer = state.layers[-1]  # all in one place, or hooks move things around between the layers
    return layer.wkv.device == rwkv.blocks[-1].ffn.value.weight.device == embeds.device and (
        layer.att_shift.dtype == layer.ffn_shift.dtype == embeds.dtype
    )
