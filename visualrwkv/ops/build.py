"""Builds the C++ kernels of csrc: at first use, once for each machine, never on import.

The library lies in the user's cache directory, in a folder named after everything it depends on (sources, flags, torch,
python, platform), so that nothing is ever out of date. Several processes may ask for it at once: the first one builds,
the others wait at a file lock. Where it cannot be built the reason is remembered, told in one warning, and the PyTorch
forms of the operators do the work, with the same results.

    python -m visualrwkv.ops.build      build now, and print the outcome; the exit code is 1 where it did not work

Needed: a C++ compiler (`c++`, or the variable CXX) of the GCC or Clang family, and ninja.
"""

import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
import warnings
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

NAME = "visualrwkv_kernels"
COMMAND = "python -m visualrwkv.ops.build"
# Plain -O3: no instruction set beyond the platform's own is assumed, the kernels choose theirs at run time.
FLAGS = ["-O3", "-fno-math-errno", "-Wall"]
if sys.platform == "linux":
    FLAGS += [
        "-fopenmp",  # what at::parallel_for is made of there
        "-fno-predictive-commoning",  # GCC: it keeps copies of whole register tiles
    ]

_lock = threading.Lock()
_outcome: str | None = None  # "" once the library is loaded, else the reason why it is not; None: not tried yet


class BuildError(RuntimeError):
    """Why there is no library, in one line."""


def source_folder() -> Path:
    """The folder of the C++ sources: inside the package if installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "wkv6.cpp").is_file():
            return folder
    raise BuildError(f"the C++ sources are in neither {package / 'csrc'} nor {package.parent / 'csrc'}")


def cache_folder() -> Path:
    """Where the library for this version of everything belongs."""
    digest = hashlib.sha256()
    for path in sorted(source_folder().iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(repr((FLAGS, torch.__version__, sys.implementation.cache_tag, sysconfig.get_platform())).encode())
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "visualrwkv" / f"kernels-{digest.hexdigest()[:16]}"


def load(retry: bool = False) -> str:
    """Load the library into this process, building it if need be; the work is done once for each process.

    Args:
        retry: try again where an earlier attempt, of whatever process, has failed.

    Returns:
        "" if the operators `torch.ops.visualrwkv.*` are there, else the reason why not, in one line.
    """
    global _outcome
    with _lock:
        if _outcome is None or (retry and _outcome):
            try:
                _load(retry)
                _outcome = ""
            except (BuildError, OSError, RuntimeError) as error:
                _outcome = " ".join(str(error).split()) or type(error).__name__
                warnings.warn(
                    f"the compiled kernels are not available, the PyTorch form is used: {_outcome} "
                    f"(after a change, `{COMMAND}` tries again)",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return _outcome


def outcome() -> str | None:
    """What `load` returned in this process, None if it was not called yet. Builds nothing."""
    return _outcome


def describe() -> str:
    """The form of the operator on this machine in a few words, for `visualrwkv info`. Builds nothing."""
    if os.environ.get("VISUALRWKV_KERNEL", "1") == "0":
        return "PyTorch (VISUALRWKV_KERNEL=0)"
    try:
        folder = cache_folder()
        if (folder / "done").is_file():
            return f"compiled kernel on the CPU ({torch.backends.cpu.get_cpu_capability()}), PyTorch elsewhere"
        _compiler()
        reason = (folder / "failed").read_text(encoding="utf-8") if (folder / "failed").is_file() else ""
    except (BuildError, OSError, RuntimeError) as error:
        reason = str(error)
    return f"PyTorch: {reason}" if reason else f"PyTorch; compiled kernel not built yet (at first use, or `{COMMAND}`)"


def _load(retry: bool) -> None:
    from filelock import FileLock  # a dependency of torch

    folder = cache_folder()
    library, done, failed = folder / f"{NAME}.so", folder / "done", folder / "failed"
    if not done.is_file():
        compiler = _compiler()
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "build.lock"):  # torch has a "lock" of its own there
            if not done.is_file():
                if failed.is_file() and not retry:
                    raise BuildError(failed.read_text(encoding="utf-8"))
                logger.info("building the kernels with %s in %s; this is done once", compiler, folder)
                _build(folder, failed)
                failed.unlink(missing_ok=True)
                done.touch()
    torch.ops.load_library(library)


def _compiler() -> str:
    if sys.platform == "win32":
        raise BuildError("the kernels need GCC or Clang, which PyTorch does not use on Windows")
    command = os.environ.get("CXX", "c++")
    if not command.split() or shutil.which(command.split()[0]) is None:
        raise BuildError(f"there is no C++ compiler {command!r} on the PATH")
    return command


def _ninja_folder() -> str | None:
    """The folder to add to the PATH, where ninja is installed as a package of an environment that is not activated."""
    if shutil.which("ninja"):
        return None
    try:
        import ninja
    except ImportError:
        raise BuildError("ninja is not installed (pip install ninja)") from None
    return ninja.BIN_DIR


def _build(folder: Path, failed: Path) -> None:
    """Compile and link in a process of its own: its warnings, its PATH and a crash stay there."""
    path = os.pathsep.join(filter(None, (_ninja_folder(), os.environ.get("PATH"))))
    sources = [str(path) for path in sorted(source_folder().glob("*.cpp"))]
    script = (
        "import sys; from torch.utils.cpp_extension import load; name, folder, flags, *sources = sys.argv[1:]; "
        "load(name, sources, extra_cflags=flags.split(), build_directory=folder, is_python_module=False, "
        "with_cuda=False)"
    )
    command = [sys.executable, "-c", script, NAME, str(folder), " ".join(FLAGS), *sources]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    (folder / "log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
        # what the compiler or the linker said, rather than the traceback around it
        told = [line for line in lines if re.search(r"\berror: |undefined reference|cannot find -l", line)]
        reason = f"the compiler failed: {(told or lines[-1:])[0].strip()} (see {folder / 'log'})"
        failed.write_text(reason, encoding="utf-8")
        raise BuildError(reason)


def main() -> int:
    """Build and load, print the outcome, return the exit code."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        reason = load(retry=True)
    if reason:
        print(f"not built: {reason}")
        return 1
    took, machine = time.perf_counter() - start, platform.machine()
    print(
        f"the kernels are ready ({took:.0f} s, {machine}, {torch.backends.cpu.get_cpu_capability()}): {cache_folder()}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
