"""A checkpoint of released size, loaded and asked on the CPU: peak memory, prefill time, time per token.

    python -m bench.real_size            # 1.6B: writes 3.8 GB, loads them in a fresh process, deletes them
    python -m bench.real_size --tiny     # the same in a second, to try the script

The weights are random, in the official v6.0 layout (24 layers, width 2048, vocabulary 65,536, ViT-L/14 at 336 px), so
the answer means nothing; sizes and times are those of the released model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.report import RESULTS, resident, save, show

QUESTION = "What is in the picture?"
LIMIT = 1.35  # peak memory over weights
TINY = {
    "text_config": {"vocab_size": 65536, "hidden_size": 128, "num_hidden_layers": 3},
    "vision": {"image_size": 56, "layers": 2, "width": 128, "head_width": 32, "patch_size": 14},
}


def write_checkpoint(path: Path, tiny: bool) -> int:
    """Write random bfloat16 weights under the official names; returns their bytes."""
    import torch

    from visualrwkv.checkpoint_layout import to_official
    from visualrwkv.configuration import VisualRWKVConfig
    from visualrwkv.modeling import VisualRWKVForConditionalGeneration
    from visualrwkv.vision import describe_tower

    config = VisualRWKVConfig()
    if tiny:
        vision = describe_tower(TINY["vision"], 128, quick_gelu=True)
        config = VisualRWKVConfig(text_config=TINY["text_config"], vision_config=vision)
    with torch.device("meta"):
        shapes = to_official(VisualRWKVForConditionalGeneration(config).state_dict(), config.vision_config)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.empty(shape.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        if name.endswith("time_decay"):
            tensor.sub_(4)
        elif tensor.ndim == 1 and name.endswith("weight"):  # norms
            tensor.add_(1)
        tensors[name] = tensor
    torch.save(tensors, path)
    return sum(tensor.nbytes for tensor in tensors.values())


def photograph():
    """A 640 x 427 picture with the smooth shades, edges and noise of a photograph."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize(
        (640, 427), Image.Resampling.BICUBIC
    )
    grain = rng.normal(0, 8, (427, 640, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))


def measure(path: Path, tokens: int) -> dict:
    """Load the checkpoint and ask it, in this process."""
    clock = time.perf_counter
    start = clock()
    import torch

    import visualrwkv
    from visualrwkv.prompt import Turn

    imported, imports_peak = clock(), resident("VmHWM")
    vlm = visualrwkv.load(path, device="cpu", dtype="bfloat16")
    loaded, load_peak = clock(), resident("VmHWM")
    model = vlm.model
    picture = photograph()
    inputs = vlm.processor.prepare(images=[[picture]], turns=[[Turn("user", QUESTION, images=1)]], open_reply=True)
    with torch.inference_mode():
        begin = clock()
        features = model.get_image_features(inputs["pixel_values"])
        encoded = clock()
        out = model(inputs["input_ids"], image_features=features, logits_to_keep=1)
        prefilled = clock()
        for _ in range(tokens):
            token = out.logits[:, -1].argmax(-1, keepdim=True).clamp(max=65529)
            out = model(token, cache=out.cache)
        decoded = clock()
    answer = vlm.ask(picture, QUESTION, max_new_tokens=4)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image tokens": model.config.num_image_tokens,
        "prompt tokens": inputs["input_ids"].shape[1],
        "import s": imported - start,
        "load s": loaded - imported,
        "picture encoding s": encoded - begin,
        "prefill s": prefilled - encoded,
        "per token s": (decoded - prefilled) / tokens,
        "state bytes": out.cache.nbytes,
        "peak after import bytes": imports_peak,
        "peak after load bytes": load_peak,
        "peak bytes": resident("VmHWM"),
        "answer characters": len(answer),
        "threads": torch.get_num_threads(),
    }


def run(tiny: bool, folder: Path, tokens: int, keep: bool) -> dict:
    """Write, load and ask, each in a process of its own; returns all numbers."""
    path = folder / ("tiny.pth" if tiny else "VisualRWKV-v060-1B6-random.pth")
    fresh = [sys.executable, "-m", "bench.real_size", "--tokens", str(tokens)] + ["--tiny"] * tiny
    try:
        written = subprocess.run([*fresh, "--write", str(path)], check=True, capture_output=True, text=True)
        weights = int(written.stdout)
        measured = subprocess.run([*fresh, "--measure", str(path)], check=True, stdout=subprocess.PIPE, text=True)
    finally:
        if not keep:
            path.unlink(missing_ok=True)
    numbers = json.loads(measured.stdout)
    ratio = numbers["peak bytes"] / weights
    return {"weights bytes": weights, "peak / weights": ratio, "within limit": ratio < LIMIT or tiny} | numbers


def readable(numbers: dict) -> dict:
    """Bytes as MiB, fractions with three digits."""
    shown = {}
    for name, value in numbers.items():
        if name.endswith(" bytes"):
            shown[name.removesuffix("bytes") + "MiB"] = f"{value / 2**20:,.1f}"
        else:
            shown[name] = f"{value:,.3f}" if isinstance(value, float) else value
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, nothing saved unless --out is given")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to time")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written (4 GB free); a temporary folder")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint in --folder")
    parser.add_argument("--out", type=Path, help="JSON file; bench/results/real_size.json")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        print(write_checkpoint(options.write, options.tiny))
        return 0
    if options.measure:
        print(json.dumps(measure(options.measure, options.tokens)))
        return 0
    if options.keep and options.folder is None:
        parser.error("--keep needs --folder")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        numbers = run(options.tiny, folder, options.tokens, options.keep)
    show(readable(numbers), 28)
    out = options.out or (None if options.tiny else RESULTS / "real_size.json")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        save(numbers, out)
        print(f"written: {out}")
    return 0 if numbers["within limit"] else 1


if __name__ == "__main__":
    sys.exit(main())
