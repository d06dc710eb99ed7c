"""A training run from outside: its size, its output folder, complete checkpoints, where to resume, writes that fail."""

import contextlib
import errno
import json
import math
import os
import shutil
from pathlib import Path

from visualrwkv.errors import InputError


class WriteError(InputError):
    """A checkpoint could not be written."""


@contextlib.contextmanager
def writing(folder, output):
    """Turns a write that failed (a full disk, no permission) into one line, and removes the torn `folder`."""
    try:
        yield
    except Exception as error:
        reason = _write_failure(error)
        if reason is None:
            raise
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        last = newest_checkpoint(output)
        rest = (
            f"the last good checkpoint is {last}; the same command goes on from there" if last else "nothing was saved"
        )
        raise WriteError(f"{folder or output}: cannot be written ({reason}); free some space: {rest}") from error


def _write_failure(error):
    """Why writing failed, or None if the error is none of writing."""
    from safetensors import SafetensorError

    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EACCES,
        errno.EROFS,
        errno.EFBIG,
    ):
        return error.strerror
    text = str(error)
    if isinstance(error, SafetensorError) and ("os error" in text.lower() or "I/O" in text):
        return text
    if isinstance(error, RuntimeError) and any(
        word in text for word in ("PytorchStreamWriter", "unexpected pos", "No space")
    ):
        return "No space left on device" if "No space" in text else "the write was cut short, probably a full disk"
    return None


def newest_checkpoint(output):
    """The newest complete checkpoint folder in `output`, or None. The trainer's state is written last: a folder without
    a readable one was cut short."""
    found = []
    for folder in Path(output).glob("checkpoint-*"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            step = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
            if folder.name == f"checkpoint-{step}" and (folder / "optimizer.pt").is_file():
                found.append((step, folder))
    return max(found)[1] if found else None


def resume_from(recipe):
    """The checkpoint folder to continue from, or None for a fresh start.

    Raises:
        InputError: the named folder is no checkpoint, or a fresh start would mix with an earlier run's checkpoints.
    """
    newest = newest_checkpoint(recipe.output)
    if recipe.resume == "auto":
        return newest
    if recipe.resume == "none":
        if newest:
            raise InputError(
                f"{recipe.output}: holds {newest.name} of an earlier run; remove it, change output or use resume=auto"
            )
        return None
    folder = Path(recipe.resume)
    if not (folder / "trainer_state.json").is_file():
        raise InputError(f"{folder}: no checkpoint to resume from (it has no trainer_state.json)")
    return folder


def is_main_process():
    """Whether this process writes the files that all share."""
    return os.environ.get("RANK", "0") == "0"


def world_size():
    """Processes of this run, before torch.distributed is set up."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def count_samples(recipe, per_pass=None):
    """(steps, samples) of the run over all processes; `per_pass` is the size of a JSON file."""
    per_step = samples_per_step(recipe)
    steps = recipe.steps if recipe.steps is not None else max(1, math.ceil(recipe.epochs * per_pass / per_step))
    return steps, steps * per_step


def samples_per_step(recipe):
    """Samples in one optimizer step of all processes."""
    return recipe.batch_size * recipe.accumulate * world_size()


def require_accelerate():
    """The Trainer needs it; it is no dependency of answering questions."""
    from importlib.util import find_spec

    if find_spec("accelerate") is None:
        raise InputError("training needs the package accelerate: pip install accelerate")


def write_versions(folder):
    """versions.json: what the finished model was trained with."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import visualrwkv

    versions = {"visualrwkv": visualrwkv.__version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "open_clip_torch", "timm", "pillow", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    (Path(folder) / "versions.json").write_text(json.dumps(versions, indent=2) + "\n", encoding="utf-8")
