"""The CPU benchmarks: `python -m bench [--quick] [--cases NAME ...]` prints a table and writes bench/results/cpu.json.

Every case first checks its output and then times its peers in turns; what counts are ratios within one run. `--quick`
takes small sizes, to try the scripts; its numbers mean nothing and are only saved where --out says so.
"""

import argparse
import json
import sys

from bench.real_size import RESULTS, surroundings

CASES = {
    "wkv_fwd": ("wkv", "forward"),
    "wkv_fwd_bwd": ("wkv", "forward_backward"),
    "prefill": ("language", "prefill"),
    "decode": ("language", "decode"),
    "decode_batched": ("language", "decode_batched"),
    "state_or_recompute": ("language", "state_or_recompute"),
    "long_context": ("context", "long_context"),
    "train_step": ("language", "train_step"),
}


def show(name, results):
    """One line per result: everything but the single times."""
    print(f"\n{name}")
    for result in results:
        shown = {key: value for key, value in result.items() if not isinstance(value, dict)}
        print("  " + ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the scripts")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--out", help="JSON file; bench/results/cpu.json, nothing with --quick")
    options = parser.parse_args(argv)

    import importlib

    import torch

    from visualrwkv.ops import build

    reason = build.load()
    if reason:
        print(f"there is no compiled kernel to measure: {reason}", file=sys.stderr)
        return 2
    results = {}
    for name in options.cases:
        module, function = CASES[name]
        results[name] = getattr(importlib.import_module(f"bench.{module}"), function)(options.quick)
        show(name, results[name])
    out = options.out or (None if options.quick else RESULTS / "cpu.json")
    if out:
        with open(out, "w", encoding="utf-8") as file:
            head = surroundings() | {"threads": torch.get_num_threads(), "quick": options.quick}
            json.dump(head | {"results": results}, file, indent=2)
            file.write("\n")
        print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
