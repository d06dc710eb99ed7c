"""Numbers recorded from the public VisualRWKV code. VISUALRWKV_GOLDEN may point to another set of the same files."""

import json
import lzma
import os
import tempfile
from functools import lru_cache
from pathlib import Path

from safetensors.torch import load_file

GOLDEN = Path(os.environ.get("VISUALRWKV_GOLDEN", Path(__file__).parent / "golden"))
PLACEHOLDER = -200  # where the recorded ids have an image
_unpacked = tempfile.TemporaryDirectory()


@lru_cache
def golden_file(name):
    """Path of a recorded file; the large ones are kept packed."""
    path = GOLDEN / name
    if path.exists():
        return path
    target = Path(_unpacked.name) / name
    target.write_bytes(lzma.decompress((GOLDEN / f"{name}.xz").read_bytes()))
    return target


def tensors(name):
    return load_file(GOLDEN / f"{name}.safetensors")


def meta():
    return json.loads((GOLDEN / "visualrwkv6_meta.json").read_text())


def error(ours, golden):
    """Largest absolute difference."""
    assert ours.shape == golden.shape, (ours.shape, golden.shape)
    return (ours.detach() - golden).abs().max().item()
