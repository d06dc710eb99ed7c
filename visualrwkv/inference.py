"""The language model without gradients on the CPU, in calls of the compiled kernels (csrc/prefill.cpp, csrc/step.cpp).

The modules of `rwkv.py` are the specification and do the work wherever the kernels do not apply: another device,
gradients, RWKV-5, other precisions, a hook or an adapter on some module, no compiler. The kernels read the weights
where the parameters keep them. Nothing is copied, so nothing can be out of date: every call collects the tensors anew,
and only which modules there are is remembered between calls.
"""

import weakref

import torch
from torch import Tensor, nn

from visualrwkv.ops.int8 import Int8Linear
from visualrwkv.ops.kernel import ready
from visualrwkv.ops.linear import is_plain_linear
from visualrwkv.scan import Order
from visualrwkv.state import LayerState, RWKVState

MAX_BATCH = 32  # sequences; beyond, PyTorch's matrix products read the weights as seldom and compute faster
_MAX_PROJECTED = 16  # rows of one matrix, for which a library has less to prepare than for those of all layers

_NORM = ("weight", "bias")
_TIME_MIX = [f"time_maa_{name}" for name in ("x", "w", "k", "v", "r", "g", "w1", "w2")]
_TIME_MIX += ["time_decay", "time_decay_w1", "time_decay_w2", "time_faaaa"]
_plans: "weakref.WeakKeyDictionary[nn.Module, _Plan | None]" = weakref.WeakKeyDictionary()


def read(
    model: nn.Module,
    embeds: Tensor,
    state: RWKVState,
    real: Tensor | None = None,
    orders: list[Order | None] | None = None,
    keep: int = 0,
) -> Tensor | None:
    """What `rwkv.RWKV.forward` does, where the kernels apply.

    Args:
        model: an `rwkv.RWKV`.
        embeds: (B, T, D) before ln0.
        state: where to continue from; its layers are replaced.
        real: (B, T) bool, False at padded positions; None when there are none.
        orders: per layer the order in which image spans are read.
        keep: of how many positions at the end the result is wanted; 0: of all.

    Returns:
        hidden (B, keep or T, D) after `ln_out`, or None where the kernels do not apply; the state is then untouched.
    """
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or embeds.numel() == 0
        or not ready(embeds)
    ):
        return None
    plan = _plans.get(model)
    if plan is None or not plan.holds():
        plan = _plans[model] = _Plan(model)
        weights = plan.weights()
        if weights is not None:
            torch.ops.visualrwkv.use_huge_pages([*weights, *model.head.parameters(), *model.head.buffers()])
    weights = plan.weights()
    if weights is None:
        return None
    single = embeds.shape[1] == 1 and embeds.shape[0] <= MAX_BATCH and real is None and not orders
    memory = [tensor.contiguous() for layer in state.layers for tensor in layer]
    sizes = (plan.heads, plan.norm_eps, plan.head_eps)
    if single:
        done = torch.ops.visualrwkv.rwkv6_step(embeds[:, 0].contiguous(), weights, plan.scales(), memory, *sizes)
    else:
        sources = _sources(orders, len(state.layers))
        done = torch.ops.visualrwkv.rwkv6_prefill(
            embeds.contiguous(), weights, plan.scales(), memory, real, sources, keep, *sizes
        )
    if not done:
        return None
    if single:
        hidden, wkv, shifts = done
        hidden = hidden[:, None]
        state.layers = [
            LayerState(att_shift, matrix, ffn_shift)
            for (att_shift, ffn_shift), matrix in zip(_pairs(shifts), wkv.unbind(0), strict=True)
        ]
    else:
        hidden, *tensors = done
        state.layers = [LayerState(*tensors[i : i + 3]) for i in range(0, len(tensors), 3)]
    return hidden


def project(linear: nn.Module, hidden: Tensor) -> Tensor:
    """`linear(hidden)` for hidden (B, T, D); by the kernel, without a copy of the weights, where that is faster."""
    rows = hidden.shape[0] * hidden.shape[1]
    if (
        rows > _MAX_PROJECTED
        or not is_plain_linear(linear)
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or linear.weight.dtype != hidden.dtype
        or hidden.dtype not in (torch.float32, torch.bfloat16)
        or not ready(hidden, linear.weight)
        or not _plain(linear)
        or not linear.weight.is_contiguous()
    ):
        return linear(hidden)
    return torch.ops.visualrwkv.small_linear(hidden.flatten(0, 1), linear.weight, None).unflatten(0, hidden.shape[:2])


def _sources(orders: list[Order | None] | None, layers: int) -> list[Tensor | None]:
    """For each layer, and for the output, where each position stands in the order before; None: where it is."""
    if not orders:
        return [None] * (layers + 1)
    sources, before = [], None
    for order in [*orders, None]:
        if order is before:
            sources.append(None)
        elif before is None:
            sources.append(order.read)
        else:
            sources.append(before.restore if order is None else before.restore.gather(1, order.read))
        before = order
    return sources


def _pairs(shifts: Tensor) -> list[tuple[Tensor, Tensor]]:
    flat = shifts.flatten(0, 1).unbind(0)
    return list(zip(flat[::2], flat[1::2], strict=True))


def _plain(module: nn.Module) -> bool:
    """Whether calling the module does what its class says: no hook, no replaced forward."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


class _Plan:
    """Where a model keeps its weights, in the order of csrc/weights.h, and what has to stay as it is."""

    def __init__(self, model):
        self._links = []  # (the _modules of a parent, name, child)
        self._places = []  # (the _parameters or _buffers of a module, name)
        self._scales = []
        self._usable = model.config.version == 6
        config = model.config
        self.heads, self.norm_eps = config.num_heads, config.layer_norm_eps
        self.head_eps = 1e-5 * config.head_size_divisor**2
        if self._usable:
            blocks = self._child(model, "blocks")
            self._norm(self._child(blocks[0], "ln0"))
            self._norm(self._child(model, "ln_out"))
            for name in blocks._modules:
                self._layer(self._child(blocks, name))
        self._modules = [child for _, _, child in self._links]
        self._hooks = [hooks for m in self._modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._dicts = [module.__dict__ for module in self._modules]

    def holds(self) -> bool:
        """Whether the model still consists of the same modules."""
        return all(parent.get(name) is child for parent, name, child in self._links)

    def weights(self) -> list[Tensor] | None:
        if not self._usable or any(self._hooks) or any("forward" in names for names in self._dicts):
            return None
        try:
            return [place[name] for place, name in self._places]
        except KeyError:  # a parametrisation has taken a parameter's place
            return None

    def scales(self) -> list[Tensor]:
        return [place[name] for place, name in self._scales]

    def _child(self, parent, name):
        child = parent._modules.get(name)
        if child is None:
            self._usable = False
        else:
            self._links.append((parent._modules, name, child))
        return child

    def _parameters(self, module, *names):
        self._places += [(module._parameters, name) for name in names]

    def _norm(self, module):
        if type(module) not in (nn.LayerNorm, nn.GroupNorm):
            self._usable = False
            return
        self._parameters(module, *_NORM)

    def _linear(self, parent, name):
        module = self._child(parent, name)
        if type(module) is Int8Linear:
            self._places.append((module._buffers, "weight"))
            self._scales.append((module._buffers, "scale"))
        elif is_plain_linear(module):
            self._parameters(module, "weight")
        else:
            self._usable = False

    def _layer(self, block):
        self._norm(self._child(block, "ln1"))
        self._norm(self._child(block, "ln2"))
        att, ffn = self._child(block, "att"), self._child(block, "ffn")
        self._parameters(att, *_TIME_MIX)
        for name in ("receptance", "key", "value", "gate", "output"):
            self._linear(att, name)
        self._norm(self._child(att, "ln_x"))
        self._parameters(ffn, "time_maa_k", "time_maa_r")
        for name in ("key", "receptance", "value"):
            self._linear(ffn, name)
