"""Decoding on a GPU: the step of one token, recorded once as a CUDA graph and replayed.

A step is hundreds of small kernels; started one by one from Python they would take several times as long as their
work. A graph starts them all at once, but it always reads and writes the same memory. So the state of the sequences at
hand lives in that memory from step to step: the `RWKVState` that was decoded last holds the very tensors
(`RWKVState.clone` keeps an earlier one, as everywhere), and gets copies of its own when another state takes its place.

A graph is for a power of two of sequences, and is used for fewer too: replies join and leave a batch at any token, and
recording takes as long as many tokens. What is computed for free places goes nowhere.

`RWKV.forward` comes here for single tokens without gradients; its modules stay the definition of what a step computes,
and compute it themselves where there are adapters or hooks among them.
"""

import operator
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from itertools import repeat

import torch
from torch import Tensor

from visualrwkv.ops.kernel import kernels_wanted, states_in_place
from visualrwkv.state import LayerState, RWKVState, whole

# Before 2.13, where recording fails, PyTorch's allocator goes on taking it for under way, and refuses the next one.
_RECORDS_AGAIN = torch.__version__ >= (2, 13)
_refused = ""  # why nothing is recorded any more
_KEPT = 8  # graphs of a model, one for each number of places; each has memory for so many states
# None: what could not be recorded
_steps: "weakref.WeakKeyDictionary[torch.nn.Module, OrderedDict[tuple, StaticStep | None]]" = (
    weakref.WeakKeyDictionary()
)
_parts: "weakref.WeakKeyDictionary[torch.nn.Module, _Parts]" = weakref.WeakKeyDictionary()


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
    with whole:  # threads that ask the same model share its graphs and their memory
        parts = _parts.get(rwkv)
        if parts is None or not parts.hold():
            parts = _parts[rwkv] = _Parts(rwkv)
        if not parts.plain():
            return None
        static = _find(rwkv, parts, embeds, state)
        return None if static is None else static(embeds, state)


def leave(rwkv: torch.nn.Module, state: RWKVState) -> None:
    """Give a state tensors of its own, before somebody else reads them while other threads decode."""
    if torch.compiler.is_compiling():
        return
    with whole:
        for static in _steps.get(rwkv, {}).values():
            if static is not None and static.owns(state):
                static.release()


def _find(rwkv: torch.nn.Module, parts: "_Parts", embeds: Tensor, state: RWKVState) -> "StaticStep | None":
    """The recorded step for this call; records it if there is none."""
    steps = _steps.setdefault(rwkv, OrderedDict())
    places = 1 << (embeds.shape[0] - 1).bit_length()
    # all but the first change when the weights are moved, cast or replaced, which a graph would not notice
    key = (places, embeds.dtype, embeds.device, parts)
    if key not in steps:
        for old in [other for other in steps if other[1:] != key[1:]]:
            _release(steps.pop(old))
        while len(steps) >= _KEPT:
            _release(steps.popitem(last=False)[1])
        try:
            with torch.cuda.device(embeds.device):
                steps[key] = StaticStep(rwkv, embeds, state, record, places)
        except RuntimeError as error:  # such as too little memory for so many sequences
            steps[key] = None
            warnings.warn(
                f"decoding of up to {places} sequences goes on without a CUDA graph: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
    steps.move_to_end(key)
    return steps[key]


def _release(static: "StaticStep | None") -> None:
    if static is not None:
        static.release()


def record(function: Callable[[], None]) -> Callable[[], None]:
    """The work of `function` on the current GPU as a graph; what it does elsewhere is done only now.

    Raises:
        RuntimeError: it cannot be recorded.
    """
    global _refused
    if _refused:
        raise RuntimeError(_refused)
    stream = _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # also brings back the stream of before where recording fails
        for _ in range(2):  # libraries set themselves up, kernels get built: nothing of that may be recorded
            function()
        graph = torch.cuda.CUDAGraph()
        # Without a stream PyTorch takes one that belongs to the GPU of the first graph of the process.
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # other threads may go on
                function()
        except RuntimeError:
            if not _RECORDS_AGAIN:
                _refused = f"PyTorch {torch.__version__} records nothing more in a process where it has failed to"
            raise
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


@cache
def _side_stream(device: int) -> "torch.cuda.Stream":
    """One for all graphs of a GPU, since libraries keep memory for each stream that they have worked on."""
    return torch.cuda.Stream(device)


class StaticStep:
    """The step of one token for up to a fixed number of sequences, from and to memory that stays where it is.

    Args:
        rwkv, embeds, state: a call of `step`; only shapes, dtypes and the device are taken from the last two.
        recorder: makes of a function without arguments one that does the same work again, see `record`.
        places: for so many sequences.
    """

    def __init__(self, rwkv, embeds: Tensor, state: RWKVState, recorder: Callable, places: int):
        self._rwkv = weakref.ref(rwkv)  # the graph needs the weights only as long as the model is there to be asked
        self._owner: Callable[[], RWKVState | None] = lambda: None  # whose state is in the memory
        # Ordinary tensors, also if made in inference mode: later calls may come without.
        with torch.inference_mode(False), torch.no_grad():
            self._embeds, self._hidden = (embeds.new_zeros(places, *embeds.shape[1:]) for _ in range(2))
            self.layers = [LayerState(*(x.new_zeros(places, *x.shape[1:]) for x in layer)) for layer in state.layers]
            self._first = {places: self.layers}  # count -> the same memory, of the first so many sequences
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
        if not self.owns(state):
            self.release()
        count = embeds.shape[0]
        if not self._holds(state):
            for layer, given in zip(self._memory(count), state.layers, strict=True):
                for place, value in zip(layer, given, strict=True):
                    place.copy_(value)
        self._embeds[:count].copy_(embeds)
        self._replay()
        state.layers = list(self._memory(count))
        self._owner = weakref.ref(state)
        return self._hidden[:count].clone()

    def owns(self, state: RWKVState) -> bool:
        """Whether the memory is that of this state."""
        return self._owner() is state

    def _memory(self, count: int) -> list[LayerState]:
        """Where the states of `count` sequences are."""
        if count not in self._first:
            with torch.inference_mode(False), torch.no_grad():
                self._first[count] = [LayerState(*(x[:count] for x in layer)) for layer in self.layers]
        return self._first[count]

    def release(self) -> None:
        """Give the state whose tensors the memory is copies of its own."""
        owner = self._owner()
        if owner is not None and self._holds(owner):
            owner.layers = owner.clone().layers
        self._owner = lambda: None

    def _holds(self, state: RWKVState) -> bool:
        mine = self._first.get(state.batch_size, self.layers)
        return all(a is b for one, its in zip(mine, state.layers, strict=True) for a, b in zip(one, its, strict=True))


class _Parts:
    """The modules, parameters and buffers of a model, and where these lay, when a graph was recorded."""

    def __init__(self, rwkv: torch.nn.Module):
        modules = list(rwkv.modules())
        kinds = [kind for each in modules for kind in (each._modules, each._parameters, each._buffers)]
        self._parents = [kind for kind in kinds for _ in kind]
        self._names = [name for kind in kinds for name in kind]
        self._children = [child for kind in kinds for child in kind.values()]
        # bound once: looking the method up takes longer than the call, and there are hundreds before each token
        self._ask = [child.data_ptr for child in self._children if isinstance(child, Tensor)]
        self._addresses = self._find_addresses()
        self._hooks = [hooks for each in modules for hooks in (each._forward_hooks, each._forward_pre_hooks)]
        self._dicts = [each.__dict__ for each in modules]
        # adapters can be switched on and off in Python, which a graph would not notice
        self._adapted = any(type(each).__module__.startswith("peft") for each in modules)

    def hold(self) -> bool:
        """Whether the model still consists of the same ones, in the same memory: casts and moves keep the objects."""
        same = all(map(operator.is_, map(dict.get, self._parents, self._names), self._children))
        return same and self._find_addresses() == self._addresses

    def _find_addresses(self) -> list[int]:
        return list(map(operator.call, self._ask))

    def plain(self) -> bool:
        """Whether a step does what the classes of the modules say: no adapter, no hook, no replaced forward."""
        return not (self._adapted or any(self._hooks) or any(map(operator.contains, self._dicts, repeat("forward"))))


def _applies(rwkv, embeds: Tensor, state: RWKVState) -> bool:
    if embeds.device.type != "cuda" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if rwkv.training or not kernels_wanted() or torch.is_autocast_enabled("cuda"):
        return False
    if torch.cuda.is_current_stream_capturing():
        return False
    layer = state.layers[-1]  # all in one place, or hooks move things around between the layers
    return layer.wkv.device == rwkv.blocks[-1].ffn.value.weight.device == embeds.device and (
        layer.att_shift.dtype == layer.ffn_shift.dtype == embeds.dtype
    )
