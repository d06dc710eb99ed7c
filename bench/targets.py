"""What each CPU case is to reach, and whether it did."""

# case -> number in its results -> the bound for a result, None where there is none
AT_LEAST = {
    "wkv_fwd": {
        "times loop": lambda r: (40 if r["H"] == 8 else 15) if r["T"] > 1 else None,
        "times chunked": lambda r: (8 if r["H"] == 8 else 10) if r["T"] > 1 else None,
    },
    "wkv_fwd_bwd": {"times chunked": lambda r: 12},
    "prefill": {
        "share of the matrix products": lambda r: 0.8,
        "times pip rwkv": lambda r: 2.4,
        "times llama.cpp": lambda r: 2.4,
    },
    "decode": {
        "share of the read bandwidth": lambda r: 0.8 if r["weights"] == "int8" else 0.9,
        "times pip rwkv": lambda r: 3,
        "times llama.cpp": lambda r: 2 if r["weights"] == "int8" else 1.35,
    },
    "decode_batched": {"times modules": lambda r: 2, "tokens/s": lambda r: 500 if r["B"] == 8 else None},
    "state_or_recompute": {"times recompute": lambda r: {641: 70, 2048: 200}.get(r["T"])},
    "long_context": {
        "times StaticCache": lambda r: 25 if r["context"] == 24576 else None,
        "reading times Llama": lambda r: 6 if r["context"] == 24576 else None,
    },
    "train_step": {"times chunked": lambda r: 3},
}
AT_MOST = {
    "wkv_fwd": {
        "us per token, head and thread": lambda r: 0.25 if r["T"] > 1 else None,
        "error": lambda r: 5e-7,
    },
    "wkv_fwd_bwd": {"over forward": lambda r: 4.5, "error": lambda r: 1e-5},
    "long_context": {"over the shortest context": lambda r: 1.05},
}


def judge(case: str, result: dict) -> dict[str, dict]:
    """Name of a number -> {"wanted", "met"} for what has a target in this result."""
    verdicts = {}
    for table, good in ((AT_LEAST, lambda a, b: a >= b), (AT_MOST, lambda a, b: a <= b)):
        for name, bound in table.get(case, {}).items():
            wanted = bound(result) if name in result else None
            if wanted is not None:
                verdicts[name] = {"wanted": wanted, "met": good(result[name], wanted)}
    return verdicts
