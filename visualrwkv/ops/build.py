"""Builds the kernels of csrc: at first use, once for each machine, never on import.

There are two libraries, each built when tensors of its device first come to an operator: that of the CPU, with the
operators' schema, and that of CUDA. Each lies in the user's cache directory, in a folder named after everything it
depends on (sources, flags, torch, python, platform), so that nothing is ever out of date. Several processes may ask
for it at once: the first one builds, the others wait at a file lock. Where it cannot be built the reason is remembered,
told in one warning, and the PyTorch forms of the operators do the work, with the same results.

    python -m visualrwkv.ops.build            build now, and print the outcome; CUDA too where PyTorch is built for it
    python -m visualrwkv.ops.build cpu        only the one (or only `cuda`)

The exit code is 1 where a build did not work; a machine that has no nvcc need not have the CUDA kernels.
Needed: a C++ compiler (`c++`, or the variable CXX) of the GCC or Clang family, and ninja. For CUDA also nvcc, of the
CUDA version of PyTorch (in the folder CUDA_HOME, on the PATH, or in /usr/local/cuda), but no GPU: the library holds
code for sm_80 and sm_90 and, for newer ones, PTX; the variable TORCH_CUDA_ARCH_LIST asks for others, from 8.0 on.
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

from visualrwkv.errors import one_line

logger = logging.getLogger(__name__)

DEVICES = ("cpu", "cuda")
NAMES = {"cpu": "visualrwkv_kernels", "cuda": "visualrwkv_cuda_kernels"}
TITLES = {"cpu": "compiled kernels", "cuda": "CUDA kernels"}
COMMAND = "python -m visualrwkv.ops.build"
# Plain -O3: no instruction set beyond the platform's own is assumed, the kernels choose theirs at run time.
FLAGS = ["-O3", "-fno-math-errno", "-Wall"]
if sys.platform == "linux":
    FLAGS += [
        "-fopenmp",  # what at::parallel_for is made of there
        "-fno-predictive-commoning",  # GCC: it keeps copies of whole register tiles
        "-fno-tree-loop-distribute-patterns",  # GCC: it calls memmove for a row of a head
    ]
CUDA_FLAGS = ["-O3", "--threads=2"]  # threads: one for each architecture
CUDA_ARCHITECTURES = "8.0;9.0+PTX"
OLDEST_GPU = (8, 0)  # of which the kernels use the tensor cores
_ARCHITECTURE = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")
_OLDER_NAMES = ("Kepler", "Maxwell", "Pascal", "Volta", "Turing")  # which PyTorch takes for numbers too

_lock = threading.Lock()
_outcomes: dict[str, str] = {}  # of a device: "" once its library is loaded, else the reason why it is not


class BuildError(RuntimeError):
    """Why there is no library, in one line."""


def source_folder() -> Path:
    """The folder of the C++ sources: inside the package if installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "wkv6.cpp").is_file():
            return folder
    raise BuildError(f"the C++ sources are in neither {package / 'csrc'} nor {package.parent / 'csrc'}")


def sources(device: str = "cpu") -> list[Path]:
    """What the library of a device is compiled from."""
    files = sorted(path for path in source_folder().iterdir() if path.suffix in (".cpp", ".cu"))
    return [path for path in files if ("cuda" in path.name) == (device == "cuda")]


def cache_folder(device: str = "cpu") -> Path:
    """Where the library of a device belongs, for this version of everything."""
    other = {"cpu": "cuda", "cuda": "cpu"}[device]
    digest = hashlib.sha256()
    for path in sorted(source_folder().iterdir()):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh") and other not in path.name:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    flags = FLAGS if device == "cpu" else [FLAGS, CUDA_FLAGS, cuda_architectures()]
    digest.update(repr((flags, torch.__version__, sys.implementation.cache_tag, sysconfig.get_platform())).encode())
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = "kernels" if device == "cpu" else "cuda-kernels"
    return base / "visualrwkv" / f"{name}-{digest.hexdigest()[:16]}"


def cuda_architectures() -> str:
    """For which GPUs the CUDA library is compiled, as TORCH_CUDA_ARCH_LIST says it.

    Those that are too old are left out: containers set the variable to all that PyTorch itself is built for.
    """
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").split(";")
    return ";".join(name for name in given if name and not _is_too_old(name)) or CUDA_ARCHITECTURES


def _is_too_old(architecture: str) -> bool:
    number = _ARCHITECTURE.fullmatch(architecture)
    return architecture.startswith(_OLDER_NAMES) if number is None else (int(number[1]), int(number[2])) < OLDEST_GPU


def _has_code(architecture: str, gpu: tuple[int, int]) -> bool:
    """Whether what is compiled for an architecture runs on a GPU of some compute capability."""
    number = _ARCHITECTURE.fullmatch(architecture)
    if number is None:  # a name for several
        return True
    version = int(number[1]), int(number[2])
    if number[3] == "a":
        return version == gpu
    return version <= gpu if number[4] else version[0] == gpu[0] and version <= gpu


def _check_gpus() -> None:
    """BuildError if a GPU of this machine cannot run the library."""
    for index in range(torch.cuda.device_count()):
        gpu, name = torch.cuda.get_device_capability(index), torch.cuda.get_device_name(index)
        if gpu < OLDEST_GPU:
            needed = ".".join(map(str, OLDEST_GPU))
            raise BuildError(f"{name} is older than compute capability {needed} (CUDA_VISIBLE_DEVICES can hide it)")
        if not any(_has_code(architecture, gpu) for architecture in cuda_architectures().split(";")):
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST={os.environ['TORCH_CUDA_ARCH_LIST']!r} names nothing that runs on {name}, "
                f"of compute capability {gpu[0]}.{gpu[1]}; unset it"
            )


def load(retry: bool = False, device: str = "cpu") -> str:
    """Load a library into this process, building it if need be; the work is done once for each process.

    Args:
        retry: try again where an earlier attempt, of whatever process, has failed.
        device: "cpu", or "cuda": then that of the CPU too, which has the operators' schema.

    Returns:
        "" if the operators `torch.ops.visualrwkv.*` are there for the device, else the reason why not, in one line.
    """
    with _lock:
        for name in DEVICES[: DEVICES.index(device) + 1]:
            if name not in _outcomes or (retry and _outcomes[name]):
                try:
                    _load(retry, name)
                    _outcomes[name] = ""
                except (BuildError, OSError, RuntimeError) as error:
                    _outcomes[name] = one_line(error)
                    warnings.warn(
                        f"the {TITLES[name]} are not available, the PyTorch form is used: {_outcomes[name]} "
                        f"(after a change, `{COMMAND}` tries again)",
                        RuntimeWarning,
                        stacklevel=2,
                    )
            if _outcomes[name]:
                return _outcomes[name]
        return ""


def outcome(device: str = "cpu") -> str | None:
    """What `load` returned in this process, None if it was not called yet. Builds nothing."""
    return _outcomes.get(device)


def describe(device: str = "cpu") -> str:
    """The form of the operator on a device in a few words, for `visualrwkv info`. Builds nothing."""
    if os.environ.get("VISUALRWKV_KERNEL", "1") == "0":
        return "PyTorch (VISUALRWKV_KERNEL=0)"
    try:
        if device == "cuda":
            _check_gpus()
        folder = cache_folder(device)
        if (folder / "done").is_file():
            chosen = torch.backends.cpu.get_cpu_capability() if device == "cpu" else cuda_architectures()
            return f"compiled kernel ({chosen})"
        _tools(device)
        reason = (folder / "failed").read_text(encoding="utf-8") if (folder / "failed").is_file() else ""
    except (BuildError, OSError, RuntimeError) as error:
        reason = str(error)
    return f"PyTorch: {reason}" if reason else f"PyTorch; compiled kernel not built yet (at first use, or `{COMMAND}`)"


def _load(retry: bool, device: str) -> None:
    from filelock import FileLock  # a dependency of torch

    if device == "cuda":
        _check_gpus()
    folder = cache_folder(device)
    library, done, failed = folder / f"{NAMES[device]}.so", folder / "done", folder / "failed"
    if not done.is_file():
        tools = _tools(device)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            place = "" if sys.platform == "darwin" else "; the variable XDG_CACHE_HOME names another place for them"
            raise BuildError(f"{error.filename}: {error.strerror}{place}") from None
        with FileLock(folder / "build.lock"):  # torch has a "lock" of its own there
            if not done.is_file():
                if failed.is_file() and not retry:
                    raise BuildError(failed.read_text(encoding="utf-8"))
                logger.info("building the %s with %s, once; it takes a minute (in %s)", TITLES[device], tools, folder)
                _build(folder, failed, device)
                failed.unlink(missing_ok=True)
                done.touch()
    torch.ops.load_library(library)


def _tools(device: str) -> str:
    """The compilers of a device's library."""
    return compiler() if device == "cpu" else f"{compiler()} and {_cuda_home() / 'bin' / 'nvcc'}"


def _cuda_home() -> Path:
    """The folder of the CUDA toolkit, whose version has to be PyTorch's."""
    if torch.version.cuda is None:
        raise BuildError("PyTorch is built without CUDA")
    given, nvcc = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"), shutil.which("nvcc")
    folders = [Path(given)] if given else [Path(nvcc).resolve().parents[1]] if nvcc else []
    if not given:  # the nvcc of the PATH may be a script that stands elsewhere
        folders.append(Path("/usr/local/cuda"))
    for home in folders:
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file():
            break
    else:
        raise BuildError(
            f"there is no CUDA toolkit in {' or '.join(map(str, folders))} (the kernels need nvcc of CUDA "
            f"{torch.version.cuda}; CUDA_HOME names the folder of its installation)"
        )
    told = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release (\d+)\.(\d+)", told)
    if version is None or version[1] != torch.version.cuda.split(".")[0]:
        found = f"CUDA {version[1]}.{version[2]}" if version else "an unknown version"
        raise BuildError(f"{home / 'bin' / 'nvcc'} is of {found}, PyTorch of CUDA {torch.version.cuda}")
    return home


def compiler() -> str:
    """The command that compiles C++ here.

    Raises:
        BuildError: there is none.
    """
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


def _build(folder: Path, failed: Path, device: str) -> None:
    """Compile and link in a process of its own: its warnings, its PATH and a crash stay there."""
    path = os.pathsep.join(filter(None, (_ninja_folder(), os.environ.get("PATH"))))
    environment = {**os.environ, "PATH": path}
    if device == "cuda":
        environment |= {"CUDA_HOME": str(_cuda_home()), "TORCH_CUDA_ARCH_LIST": cuda_architectures()}
    script = (
        "import sys; from torch.utils.cpp_extension import load; name, folder, cuda, flags, cuda_flags, *sources = "
        "sys.argv[1:]; load(name, sources, extra_cflags=flags.split(), extra_cuda_cflags=cuda_flags.split(), "
        "build_directory=folder, is_python_module=False, with_cuda=cuda == 'cuda')"
    )
    command = [sys.executable, "-c", script, NAMES[device], str(folder), device, " ".join(FLAGS), " ".join(CUDA_FLAGS)]
    done = subprocess.run(
        command + [str(path) for path in sources(device)], capture_output=True, text=True, env=environment
    )
    (folder / "log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
        # what the compiler or the linker said, rather than the traceback around it
        told = [line for line in lines if re.search(r"\berror\b.*: |undefined reference|cannot find -l", line)]
        reason = f"the compiler failed: {(told or lines[-1:])[0].strip()} (see {folder / 'log'})"
        failed.write_text(reason, encoding="utf-8")
        raise BuildError(reason)


def main(arguments: list[str]) -> int:
    """Build and load, print the outcome, return the exit code."""
    unknown = set(arguments) - set(DEVICES)
    if unknown:
        print(f"unknown device {', '.join(sorted(unknown))}; there are {' and '.join(DEVICES)}", file=sys.stderr)
        return 2
    code = 0
    for device in arguments or DEVICES:
        if device == "cuda" and not arguments:
            try:
                _cuda_home()
            except BuildError as error:  # nothing is wrong with a machine without CUDA
                print(f"no {TITLES[device]}: {error}")
                continue
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            reason = load(retry=True, device=device)
        if reason:
            print(f"not built: {reason}")
            code = 1
            continue
        took = time.perf_counter() - start
        chosen = torch.backends.cpu.get_cpu_capability() if device == "cpu" else cuda_architectures()
        ready = "kernels" if device == "cpu" else TITLES[device]
        print(f"the {ready} are ready ({took:.0f} s, {platform.machine()}, {chosen}): {cache_folder(device)}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
