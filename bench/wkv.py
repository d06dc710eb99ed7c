"""The WKV operator on the CPU: the kernel against the Python loop and the chunked PyTorch form."""

import torch

from bench.measure import check, in_turns, relative_error
from visualrwkv.ops import wkv6_chunked, wkv6_kernel, wkv6_reference

DECAYS = {"mild": -3.0, "strong": 0.0, "extreme": 3.0}  # mean of the raw decay


def sample(time, heads, mean):
    torch.manual_seed(0)
    rows = [torch.randn(1, time, heads, 64) for _ in range(3)]
    return [*rows, mean + torch.randn(1, time, heads, 64), torch.randn(heads, 64), torch.randn(1, heads, 64, 64)]


def forward(quick: bool) -> list[dict]:
    """Milliseconds and error of y at every decay."""
    results = []
    for heads in (8, 32):
        for time in (128, 1024) if quick else (1, 128, 1024, 8192):
            for decay, mean in DECAYS.items():
                inputs = sample(time, heads, mean)
                judge = wkv6_reference if time <= 1024 else wkv6_chunked
                exact = judge(*(x.double() for x in inputs))[0]
                error = check("wkv_fwd", relative_error(wkv6_kernel(*inputs)[0], exact), 5e-7)
                peers = {"kernel": lambda i=inputs: wkv6_kernel(*i), "chunked": lambda i=inputs: wkv6_chunked(*i)}
                if decay == "mild":
                    peers["loop"] = lambda i=inputs: wkv6_reference(*i)
                times = in_turns(peers, 3 if time > 1024 else 7)
                kernel = times["kernel"]["median"]
                result = {"H": heads, "T": time, "decay": decay, "error": error, "ms": times}
                result["us per token, head and thread"] = 1e3 * kernel * torch.get_num_threads() / (time * heads)
                for peer in set(peers) - {"kernel"}:
                    result[f"times {peer}"] = times[peer]["median"] / kernel
                results.append(result)
    return results


def forward_backward(quick: bool) -> list[dict]:
    """Milliseconds of forward and backward, and the largest error of a gradient."""
    results = []
    for heads, time in ((8, 577),) if quick else ((8, 577), (12, 1024), (32, 1024), (32, 2048)):
        inputs = sample(time, heads, -2.0)

        def both(form, inputs=inputs, dtype=torch.float32):
            leaves = [x.to(dtype).requires_grad_() for x in inputs]
            y, state = form(*leaves)
            return torch.autograd.grad(y.square().sum() + state.square().sum(), leaves)

        exact = both(wkv6_chunked, dtype=torch.float64)
        error = max(relative_error(a, b) for a, b in zip(both(wkv6_kernel), exact, strict=True))
        check("wkv_fwd_bwd", error, 1e-5)
        times = in_turns({"kernel": lambda b=both: b(wkv6_kernel), "chunked": lambda b=both: b(wkv6_chunked)}, 5)
        alone = in_turns({"forward": lambda i=inputs: wkv6_kernel(*i)}, 5)["forward"]["median"]
        kernel = times["kernel"]["median"]
        ratio = times["chunked"]["median"] / kernel
        results.append(
            {"H": heads, "T": time, "error": error, "ms": times, "times chunked": ratio, "over forward": kernel / alone}
        )
    return results
