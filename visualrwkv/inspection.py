"""What `visualrwkv inspect` prints: what a training set holds, and which of its samples training would skip or cut.

Every sample is read as training reads it, pictures included, so nothing here can disagree with a run.
"""

import itertools
import statistics
import sys
from pathlib import Path

from visualrwkv.data import JsonDataset, sample_name
from visualrwkv.errors import InputError
from visualrwkv.prompt import IGNORE

NAMED = 20  # unusable samples that the table names


def inspect(path, images, processor, max_length) -> dict:
    """Read a whole LLaVA-format file.

    Args:
        path, images, max_length: as `data.json`, `data.images` and `data.max_length` of a recipe.
        processor: `VisualRWKVProcessor`; tokens are those of its model.

    Returns:
        Numbers by name; `unusable` is a list of {"sample", "reason"}, `first` the first usable sample as pieces
        {"learned": bool, "text"}.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    from tqdm import tqdm

    dataset = JsonDataset(path, images, processor, max_length)
    turns, tokens, learned, pictures, unusable, cut, first = [], [], [], 0, [], 0, None
    for number, sample in enumerate(tqdm(dataset.samples, desc="inspect", unit="sample", file=sys.stderr)):
        try:
            item = dataset.encode(sample)
        except InputError as error:
            unusable.append({"sample": sample_name(sample, number), "reason": str(error)})
            continue
        turns.append(item["turns"])
        tokens.append(len(item["input_ids"]))
        learned.append(sum(label != IGNORE for label in item["labels"]))
        pictures += item["images"]
        cut += item["turns"] < len(sample["conversations"])
        first = first or _pieces(processor, item)
    return {
        "file": str(path),
        "samples": len(dataset.samples),
        "usable": len(tokens),
        "pictures shown": pictures,
        "with a picture that no <image> shows": dataset.unshown,
        "with an <image> that names no picture": dataset.unnamed,
        f"cut to {max_length} tokens": cut,
        "turns": _spread(turns),
        "tokens": _spread(tokens),
        "tokens learned": _spread(learned),
        "share of tokens learned": sum(learned) / max(1, sum(tokens)),
        "first": first,
        "unusable": unusable,
    }


def pictures_elsewhere(path, images) -> str:
    """A word for a message, where the pictures seem to be in another folder than the one that was looked in."""
    folder = Path(path).parent / "images"
    return f"; if its pictures are in {folder}, pass --images {folder}" if images is None and folder.is_dir() else ""


def table(result: dict) -> str:
    """The result for people."""
    lines = []
    for name, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(f"{part} {number:g}" for part, number in value.items()) or "none"
        if name not in ("first", "unusable"):
            lines.append(f"{name:38} {value:.3f}" if isinstance(value, float) else f"{name:38} {value}")
    if result["first"]:
        marked = ("[[" + piece["text"] + "]]" if piece["learned"] else piece["text"] for piece in result["first"])
        lines += ["", "the first usable sample, what is learned in [[ ]]:", "".join(marked)]
    if result["unusable"]:
        lines += ["", f"{len(result['unusable'])} samples cannot be used:"]
        lines += [f"  {entry['sample']}: {entry['reason']}" for entry in result["unusable"][:NAMED]]
        if len(result["unusable"]) > NAMED:
            lines.append(f"  and {len(result['unusable']) - NAMED} more (--json lists them)")
    return "\n".join(lines)


def _spread(values):
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "smallest": ordered[0],
        "median": statistics.median(ordered),
        "95 %": ordered[int(0.95 * (len(ordered) - 1))],
        "largest": ordered[-1],
        "sum": sum(ordered),
    }


def _pieces(processor, item):
    """The text of a sample, a picture as <image>, in stretches that are learned or not."""
    image, pieces = processor.image_token_id, []
    for learned, places in itertools.groupby(
        zip(item["input_ids"], item["labels"], strict=True), key=lambda place: place[1] != IGNORE
    ):
        text = ""
        for is_image, ids in itertools.groupby((index for index, _ in places), key=lambda index: index == image):
            ids = list(ids)
            words = processor.tokenizer.decode_bytes(ids).decode(errors="replace") if not is_image else ""
            text += words or "<image>" * (len(ids) // processor.num_image_tokens)
        pieces.append({"learned": learned, "text": text})
    return pieces
