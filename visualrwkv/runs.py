"""A training run from outside: its size, its output folder, complete checkpoints, where to resume, writes that fail."""

import contextlib
import errno
import json
import math
import os
import shutil
from operator import attrgetter
from pathlib import Path

from visualrwkv.errors import InputError, short
from visualrwkv.info import versions
from visualrwkv.recipe import load_recipe

# What makes it another run: who changes one of these in the same folder would be given the former run's result.
_RUN = {
    "stage": "stage",
    "model.from": "model.from_",
    "model.vision": "model.vision",
    "model.new": "model.new",
    "data.json": "data.json",
    "seed": "seed",
}
_STEP_SIZE = "samples_per_step.json"
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


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
        rest = f"resume={last} goes on from the last good checkpoint" if last else "nothing was saved"
        remedy = "choose another output" if getattr(error, "errno", None) in _FORBIDDEN else "free some space"
        raise WriteError(f"{folder or output}: cannot be written ({reason}); {remedy}: {rest}") from error


def _write_failure(error):
    """Why writing failed, or None if the error is none of writing."""
    from safetensors import SafetensorError

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, *_FORBIDDEN):
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


@contextlib.contextmanager
def alone(output):
    """The output folder, made and held for one run: two would write the same checkpoints.

    Raises:
        InputError: another run is writing there.
    """
    if not is_main_process():
        yield
        return
    path = Path(output) / ".lock"
    with writing(None, output):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
    with file:
        with contextlib.suppress(ImportError):  # there is no fcntl on Windows
            import fcntl

            try:
                # not flock, whose lock the workers would inherit and hold for seconds after a run was killed
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise InputError(
                    f"{output}: another run is writing there; wait for its end, or choose another output"
                ) from None
            except OSError:  # a file system without locks, as some of clusters are
                pass
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes no open file
                path.unlink()


def resume_from(recipe):
    """The checkpoint folder to continue from, or None for a fresh start.

    Raises:
        InputError: the named folder is no checkpoint, a fresh start would mix with an earlier run's checkpoints, or
            the checkpoint cannot be gone on with by this recipe.
    """
    folder = newest_checkpoint(recipe.output)
    if recipe.resume == "none" and folder:
        raise InputError(
            f"{recipe.output}: holds {folder.name} of an earlier run; remove it, change output or use resume=auto"
        )
    if recipe.resume not in ("auto", "none"):
        folder = Path(recipe.resume)
        if not (folder / "trainer_state.json").is_file():
            raise InputError(f"{folder}: no checkpoint to resume from (it has no trainer_state.json)")
    if folder:
        _check_run(recipe, folder)
        _check_step_size(recipe, folder)
    return folder


def _check_run(recipe, folder):
    """Refuses a checkpoint of another run, unless it was named, and one whose moments are of other layers."""
    try:
        former = load_recipe(folder.parent / "recipe.yaml")
    except InputError:  # none there, or of a version with other keys
        return
    for name, place in _RUN.items():
        before, now = (attrgetter(place)(one) for one in (former, recipe))
        if before != now and recipe.resume == "auto":
            raise InputError(
                f"{folder}: is of a run with {name} {short(before)}, this one has {short(now)}; choose another output, "
                f"or resume={folder} to go on with it all the same"
            )
    if former.freeze_layers != recipe.freeze_layers:
        raise InputError(
            f"{folder}: is of a run with freeze_layers {former.freeze_layers}; keep that, or choose another output, "
            f"and model.from={folder} to begin with what was learned"
        )


def note_step_size(recipe, folder):
    """Writes how many samples a step has into the folder of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _STEP_SIZE).write_text(json.dumps(samples_per_step(recipe)), encoding="utf-8")


def _check_step_size(recipe, folder):
    """Refuses a checkpoint whose steps are of another size: samples would be left out, or seen twice."""
    if not (folder / _STEP_SIZE).is_file():
        return
    before, now = json.loads((folder / _STEP_SIZE).read_text(encoding="utf-8")), samples_per_step(recipe)
    if before != now:
        raise InputError(
            f"{folder}: its steps have {before} samples (batch_size x accumulate x processes), those of this run "
            f"{now}; keep the product, or choose another output, and model.from={folder} to begin with what was learned"
        )


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
        raise InputError("training needs the package accelerate: pip install 'visualrwkv[train]'")


def write_versions(folder):
    """versions.json: what the finished model was trained with."""
    (Path(folder) / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n", encoding="utf-8")
