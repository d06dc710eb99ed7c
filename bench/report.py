"""Memory of a process, numbers printed, numbers written with machine, date, versions and commit.

Without torch, whose import bench.real_size times.
"""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def surroundings() -> dict:
    """Machine, date, versions, commit."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, cwd=RESULTS.parent
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "memory GiB": round(memory / 2**30, 1)},
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "open_clip_torch")}
        | {"python": platform.python_version()},
        "commit": commit.stdout.strip(),
    }


def resident(which: str) -> int:
    """Bytes of this process in memory (Linux): now with "VmRSS", at most so far with "VmHWM"."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{which}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status names no {which}")


def show(numbers: dict, width: int, parts=()) -> None:
    """Print a number a line, behind names of so many columns; what is in `parts` is a dict with numbers of its own."""
    for name, value in numbers.items():
        if name in parts:
            print(name)
            for part, number in value.items():
                print(f"  {part:{width - 2}} {number}")
        else:
            print(f"{name:{width}} {value}")


def save(numbers, path: Path) -> None:
    path.write_text(json.dumps(surroundings() | {"results": numbers}, indent=2) + "\n")
