"""Everything about a GPU in one call of at most 10 minutes: build, correctness, speed.

    python -m bench.gpu                  # all of it, ends by itself after 9 minutes
    python -m bench.gpu --only wkv decode --minutes 3

Each part runs in a process of its own, so that a crash costs that part alone; results are written as they come, to
bench/results/gpu_<name of the GPU>.json. Times are medians over replays of a CUDA graph where a call can be recorded,
between events on the stream, after a warm-up; the same run measures the copy bandwidth and the matrix products they
are compared with. Models have the released sizes and random bfloat16 weights. flash-linear-attention is compared with
where it is installed (pip install flash-linear-attention).

The parts (bench/gpu_parts.py): build, check (against float64), opcheck, wkv, decode, prefill, train.
"""

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from bench.gpu_parts import MARK, PARTS
from bench.report import RESULTS, surroundings


def line(result: dict) -> str:
    """A row of the table."""
    case = result["case"]
    if "failed" in result:
        return f"{case:48} FAILED: {result['failed']}"
    shown = []
    for name, value in result.items():
        if name in ("case", "ms quartiles", "runs", "timed", "folder"):
            continue
        if isinstance(value, dict):
            value = " ".join(f"{key} {number:.1e}" for key, number in value.items())
        shown.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return f"{case:48} {', '.join(shown)}"


def run_part(part: str, end: float, keep) -> None:
    """Run a part in a process of its own until it ends or time is up; `keep` gets each result."""
    command = [sys.executable, "-m", "bench.gpu", "--part", part]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    alarm = threading.Timer(max(0.0, end - time.monotonic()), process.kill)
    alarm.start()
    last = ""
    for text in process.stdout:
        if text.startswith(MARK):
            keep(json.loads(text.removeprefix(MARK)))
        elif text.strip():
            last = text.strip()
    code = process.wait()
    alarm.cancel()
    if code:
        reason = "the time was up" if time.monotonic() >= end else f"exit code {code}: {last[:200]}"
        keep({"case": f"part {part}", "failed": reason})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="end after this time")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=" ".join(PARTS))
    parser.add_argument("--out", type=Path, help="JSON file; bench/results/gpu_<name>.json")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        built = f"this PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "PyTorch has no CUDA"
        print(f"bench.gpu needs a CUDA device, and there is none ({built})", file=sys.stderr)
        return 2
    if options.part:
        PARTS[options.part]()
        return 0
    end = time.monotonic() + 60 * options.minutes
    name = torch.cuda.get_device_name()
    out = options.out or RESULTS / f"gpu_{re.sub('[^a-z0-9]+', '_', name.lower()).strip('_')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    found = surroundings()
    found["machine"] |= {"gpu": name, "cuda": torch.version.cuda}
    results = []

    def keep(result: dict) -> None:
        results.append(result)
        print(line(result), flush=True)
        out.write_text(json.dumps(found | {"results": results}, indent=2) + "\n")

    for part in options.only:
        if time.monotonic() < end:
            run_part(part, end, keep)
        else:
            keep({"case": f"part {part}", "failed": "the time was up"})
    failed = sum("failed" in result for result in results)
    print(f"{len(results) - failed} cases, {failed} failed; written: {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
