"""A conversation at one point, and the one file it is saved in.

The file is safetensors: the tensors of the state (`RWKVState.tensors`), `image_features` where pictures were shown, and
in the metadata the format, the fingerprint of the model, the prompt position (files of older versions hold none), and
the turns, unread ids and position count as JSON. Whoever loads one has perhaps been sent it, so everything in it is
checked before it is used.
"""

import contextlib
import json
import os
import secrets
import stat
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from visualrwkv.errors import InputError, one_line, short
from visualrwkv.paths import as_path
from visualrwkv.prompt import POSITIONS, Turn
from visualrwkv.state import RWKVState

CHAT_FORMAT = "visualrwkv-chat-1"
FEATURES = "image_features"


@dataclass(frozen=True)
class Moment:
    """All that a conversation is between two turns. Never changed: a turn makes a new one.

    Args:
        turns: what was said.
        state: behind what it has read; None before the first turn. `clone` it to move it.
        unread: ids that the next turn has to read first: the last token of the reply, and its turn end.
        features: (n, num_image_tokens, D) of the pictures passed in the latest turn that passed any.
        prompt: where pictures stand in a turn; None before the first one.
    """

    turns: tuple[Turn, ...] = ()
    state: RWKVState | None = None
    unread: tuple[int, ...] = ()
    features: Tensor | None = None
    prompt: str | None = None

    def to(self, device) -> "Moment":
        state = self.state.to(device) if self.state else None
        features = None if self.features is None else self.features.to(device)
        return replace(self, state=state, features=features)


def write_chat(path: str | os.PathLike, moment: Moment, fingerprint: str) -> None:
    """Write a moment to one file; an older file stays as it is until the new one is complete.

    Raises:
        InputError: the file cannot be written.
    """
    path = Path(os.path.realpath(as_path(path, "the name of a file to write")))  # what a link leads to
    tensors = moment.state.tensors() if moment.state else {}
    if moment.features is not None:
        tensors[FEATURES] = moment.features.detach().cpu().contiguous()
    meta = {
        "format": CHAT_FORMAT,
        "model": fingerprint,
        "transcript": json.dumps([asdict(turn) for turn in moment.turns], ensure_ascii=False),
        "unread": json.dumps(moment.unread),
        "seen": json.dumps(moment.state.seen if moment.state else 0),
    }
    if moment.prompt:
        meta["prompt"] = moment.prompt
    partial = path.parent / f".{secrets.token_hex(8)}.part"  # a name made of the file's could be too long
    try:
        if path.exists() and not path.is_file():
            raise InputError(
                f"{path}: is {'a folder' if path.is_dir() else 'no file'}; pass the name of a file to write"
            )
        if not path.parent.is_dir():
            raise InputError(f"{path}: the conversation cannot be written: there is no folder {path.parent}")
        if path.exists() and not os.access(path, os.W_OK):
            raise InputError(f"{path}: is write-protected; pass another name")
        partial.touch()
        mode = (path if path.exists() else partial).stat().st_mode
        save_file(tensors, partial, metadata=meta)
        partial.chmod(stat.S_IMODE(mode))  # safetensors lets nobody else read its files
        os.replace(partial, path)
    except InputError:
        raise
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: a name with a zero byte
        reason = getattr(error, "strerror", None) or one_line(error).replace(partial.name, path.name)
        raise InputError(f"{path}: the conversation cannot be written: {reason}") from None
    finally:
        with contextlib.suppress(OSError, ValueError):
            partial.unlink(missing_ok=True)


def read_chat(path: str | os.PathLike, config, tokenizer, fingerprint) -> Moment:
    """Read what `write_chat` wrote.

    Args:
        path: the file.
        config: VisualRWKVConfig of the model that is to go on.
        tokenizer: its tokenizer.
        fingerprint: returns the fingerprint of the model.

    Raises:
        InputError: unreadable, of another format or model, or damaged; the message says which.
    """
    path = as_path(path, "a file that chat.save wrote")
    if os.path.isdir(path):
        raise InputError(f"{path}: is a folder; pass a file that chat.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            _check_meta(path, meta, fingerprint)
            _check_tensors(path, file, config)
            # copies: the file is mapped into memory, and whoever writes it later would write into the state
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise InputError(f"{path}: not a saved conversation ({reason}); pass a file that chat.save wrote") from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise _damaged(path, f"{name} holds values that are not finite")
    turns, unread, seen = _words(path, meta, tokenizer)
    features = tensors.pop(FEATURES, None)
    state = RWKVState.from_tensors(tensors, seen) if tensors else None
    if (state is None) != (not turns) or (features is not None and not any(turn.images for turn in turns)):
        raise _damaged(path, "its transcript and its tensors do not belong together")
    return Moment(turns, state, unread, features, meta.get("prompt"))


def _damaged(path, what):
    return InputError(f"{path}: a damaged conversation: {what}; save it again")


def _check_meta(path, meta, fingerprint):
    if meta.get("format") != CHAT_FORMAT:
        raise InputError(f"{path}: not a conversation of format {CHAT_FORMAT}; pass a file that chat.save wrote")
    missing = {"model", "transcript", "unread", "seen"} - set(meta)
    if missing:
        raise _damaged(path, f"{', '.join(sorted(missing))} missing")
    if meta.get("prompt", POSITIONS[0]) not in POSITIONS:
        raise _damaged(path, f"prompt {short(meta['prompt'])} is unknown")
    if meta["model"] != fingerprint():
        raise InputError(f"{path}: the conversation was held with another model; load the model it was saved with")


def _check_tensors(path, file, config):
    """Names, shapes and number types, before any tensor is read."""
    with torch.device("meta"):
        empty = RWKVState.zeros(config.text_config, 1)
    shapes = {
        f"layers.{index}.{name}": tuple(tensor.shape)
        for index, layer in enumerate(empty.layers)
        for name, tensor in layer._asdict().items()
    }
    names = set(file.keys())
    has_state = names - {FEATURES}
    if has_state and has_state != set(shapes):
        wrong = sorted(has_state ^ set(shapes))
        raise _damaged(path, f"{len(wrong)} tensors of the state are missing or unknown ({short(wrong[0])})")
    for name in names:
        part = file.get_slice(name)
        shape, dtype = tuple(part.get_shape()), part.get_dtype()
        expected = (config.num_image_tokens, config.text_config.hidden_size) if name == FEATURES else shapes[name]
        found = shape
        if name == FEATURES:
            found = shape[1:] if len(shape) == 3 and shape[0] else None  # of each picture
        precise = name.endswith("wkv")
        if found != expected or dtype not in (("F64", "F32") if precise else ("F64", "F32", "F16", "BF16")):
            raise _damaged(path, f"{name} is {dtype} {shape}, which does not fit the model")


def _words(path, meta, tokenizer):
    """Turns, unread ids and position count."""
    try:
        turns, unread, seen = (json.loads(meta[name]) for name in ("transcript", "unread", "seen"))
        turns = tuple(Turn(**turn) for turn in turns)
        _ = [turn.text.encode() for turn in turns]
    except (ValueError, TypeError, RecursionError):  # InputError is a ValueError
        raise _damaged(path, "its transcript cannot be read") from None
    if any(turn.role != ("user", "assistant")[index % 2] for index, turn in enumerate(turns)) or len(turns) % 2:
        raise _damaged(path, "its speakers do not take turns")
    if not all(_is_count(turn.images) for turn in turns) or not _is_count(seen):
        raise _damaged(path, "a number in it is not a count")
    known = tokenizer.vocabulary.tokens
    if not isinstance(unread, list) or len(unread) > 2**20 or not all(_is_count(i) and i in known for i in unread):
        raise _damaged(path, "its unread tokens are not in the vocabulary")
    return turns, tuple(unread), seen


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
