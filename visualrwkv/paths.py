"""Paths and names of models as users write them."""

import os
from pathlib import Path
from typing import Any

from visualrwkv.errors import InputError, short


def as_path(given: Any, wanted: str) -> Path:
    """A path as a user names it: `~` is the home folder; a `~name` that nobody has stays as it is.

    Args:
        wanted: what to pass instead of something that is no path, for the message.
    """
    name = os.fspath(given) if isinstance(given, (str, os.PathLike)) else None
    if not isinstance(name, str) or not name or "\0" in name:
        raise InputError(f"{short(given)} is no path; pass {wanted}")
    return Path(os.path.expanduser(name))


def without_folders(name: str) -> str:
    """How others see a model: a path without the folders of this machine in front of it, a Hub name as it is."""
    path = os.path.expanduser(name)
    return os.path.basename(os.path.realpath(path)) if os.path.exists(path) or os.path.isabs(path) else name
