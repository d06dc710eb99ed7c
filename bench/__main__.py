"""The CPU benchmarks: `python -m bench [--quick] [--cases NAME ...]` prints a table and writes bench/results/cpu.json.

Every case first checks its output and then times its peers in turns; what counts are ratios within one run. `--quick`
takes small sizes, to try the scripts; its numbers mean nothing and are only saved where --out says so.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from bench.report import RESULTS, surroundings
from bench.targets import judge

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


def number(value) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cells(name, result) -> dict[str, str]:
    """Everything but the single times, with the target of each number that has one."""
    verdicts = judge(name, result)
    shown = {}
    for key, value in result.items():
        if isinstance(value, dict):
            continue
        shown[key] = number(value)
        if key in verdicts:
            shown[key] += f" ({'' if verdicts[key]['met'] else 'missed: '}{number(verdicts[key]['wanted'])})"
    return shown


def show(name, results) -> None:
    """A table in Markdown, targets in brackets."""
    rows = [cells(name, result) for result in results]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print(f"\n{name}\n\n| {' | '.join(columns)} |\n| {' | '.join('---' for _ in columns)} |")
    for row in rows:
        print(f"| {' | '.join(row.get(key, '') for key in columns)} |", flush=True)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the scripts")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument(
        "--out", help="JSON file, whose other cases stay as they are; bench/results/cpu.json, nothing with --quick"
    )
    options = parser.parse_args(argv)

    import importlib

    import torch

    from visualrwkv.ops import build

    reason = build.load()
    if reason:
        print(f"there is no compiled kernel to measure: {reason}", file=sys.stderr)
        return 2
    out = Path(options.out) if options.out else None if options.quick else RESULTS / "cpu.json"
    results = json.loads(out.read_text()) if out and out.is_file() else {}
    for name in options.cases:
        module, function = CASES[name]
        begin = time.perf_counter()
        rows = getattr(importlib.import_module(f"bench.{module}"), function)(options.quick)
        show(name, rows)
        print(f"\n{time.perf_counter() - begin:.0f} s", flush=True)
        head = surroundings() | {"threads": torch.get_num_threads(), "quick": options.quick}
        head["load"] = round(os.getloadavg()[0], 1)  # of the last minute; more than the threads: others were at work
        results[name] = head | {"targets": [judge(name, row) for row in rows], "results": rows}
        if out:  # after every case, so that an interrupted run keeps what it has
            out.write_text(json.dumps(results, indent=2) + "\n")
    if out:
        print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
