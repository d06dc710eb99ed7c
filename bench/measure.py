"""What all cases share: peers timed in turns, the limits of the machine in the same run, models with random weights."""

import statistics
import time

import numpy
import torch

from visualrwkv.ops import use_kernel
from visualrwkv.ops.linear import linear

PAIR = {"vocab_size": 65536, "hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 2688}  # 0.2B


BUDGET = 20.0  # seconds after which no further round begins


def in_turns(peers: dict, rounds: int, warm_up: int = 1, budget: float = BUDGET) -> dict:
    """Time functions in turns, so that a slow moment of the machine meets all of them.

    Args:
        peers: name -> function without arguments.
        rounds: calls of each that count, fewer (at least one) where they take longer than `budget` seconds in all.
    Returns:
        name -> {"min", "median", "max"} in milliseconds, and "rounds".
    """
    times = {name: [] for name in peers}
    begin = time.perf_counter()
    for turn in range(warm_up + rounds):
        if turn > warm_up and time.perf_counter() - begin > budget:
            break
        for name, function in peers.items():
            start = time.perf_counter()
            function()
            if turn >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: {
            "min": min(values),
            "median": statistics.median(values),
            "max": max(values),
            "rounds": len(values),
        }
        for name, values in times.items()
    }


def bandwidth_probe(bytes_read: int = 256 << 20):
    """A function that reads so many bytes of float32 once, by torch's own sum on all threads; from huge pages."""
    return torch.from_numpy(numpy.ones(bytes_read // 4, numpy.float32)).sum  # numpy asks the system for huge pages


def gemm_probe(rows: int, hidden: int, inner: int, dtype):
    """A function that multiplies (rows, hidden) with (hidden, inner)."""
    a, b = torch.randn(rows, hidden, dtype=dtype), torch.randn(inner, hidden, dtype=dtype)
    return lambda: linear(a, b)


def products_of_prompts(model, rows: int) -> float:
    """Seconds of the language model's bare matrix products for so many positions at once, of all layers but the last,
    which does less. No batch saves them."""
    weights = [weight for weight in model.rwkv.blocks[:-1].parameters() if weight.dim() == 2]
    inputs = {size: torch.randn(rows, size).to(weights[0].dtype) for size in {weight.shape[1] for weight in weights}}

    def multiply():
        for weight in weights:
            linear(inputs[weight.shape[1]], weight)

    with torch.inference_mode():
        return in_turns({"products": multiply}, rounds=4)["products"]["min"] / 1e3


def by_modules(function):
    """The function, computed by the PyTorch modules alone."""
    return use_kernel(False)(function)


def random_language_model(dtype=torch.float32, seed=0, **sizes):
    """An `rwkv.RWKV` with random weights and decays of ordinary strength."""
    from visualrwkv.configuration import VisualRWKVTextConfig
    from visualrwkv.rwkv import RWKV

    torch.manual_seed(seed)
    model = RWKV(VisualRWKVTextConfig(**sizes))
    model.init_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith(("faaaa", "time_decay")) and parameter.numel() > 1 << 12:
                parameter.normal_(0, 0.5 * parameter.shape[-1] ** -0.5)
    return model.to(dtype).eval().requires_grad_(False)


def relative_error(value, wanted) -> float:
    """Root mean square of the difference over that of `wanted`."""
    wanted = wanted.double()
    return float((value.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def check(name: str, value: float, limit: float) -> float:
    """A wrong result is not timed."""
    if not value <= limit:
        raise SystemExit(f"{name}: the error is {value:.2e}, more than {limit:.0e}; nothing was timed")
    return value


def check_against_modules(name: str, function, limit: float) -> float:
    """The error of what a function returns, against the modules."""
    return check(name, relative_error(function(), by_modules(function)()), limit)
