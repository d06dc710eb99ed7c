"""What int8 weights cost in accuracy: the loss of the embedded model on replies about unseen drawn scenes.

python -m bench.int8_loss [--pictures N]
"""

import argparse
import sys
from pathlib import Path

import torch

import visualrwkv
from bench.report import save
from visualrwkv.data import Collator, encode_sample, pixels
from visualrwkv.ops.int8 import quantize_linears
from visualrwkv.prompt import Turn
from visualrwkv.scenes.drawing import draw
from visualrwkv.scenes.questions import questions
from visualrwkv.scenes.world import sample_scene, scene_rng


def conversations(pictures: int):
    """(picture, turns) of every question about so many unseen scenes."""
    for index in range(pictures):
        rng = scene_rng(5, "test", index)
        scene = sample_scene(rng, split="test")
        picture = draw(scene)
        for question in questions(scene, rng):
            yield picture, [Turn("user", question.text, images=1), Turn("assistant", question.answer)]


def loss(vlm, samples) -> float:
    """Mean over the samples of each one's mean cross entropy."""
    losses = []
    with torch.no_grad():
        for start in range(0, len(samples), 8):
            items = []
            for picture, turns in samples[start : start + 8]:
                item = encode_sample(vlm.processor, turns, 1024)
                items.append(item | {"pixel_values": pixels(vlm.processor.image_processor, [picture])})
            batch = Collator()(items)
            batch.pop("skipped")
            losses.append(vlm.model(**batch).sample_losses.float())
    return torch.cat(losses).mean().item()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.int8_loss", description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", metavar="N", type=int, default=100)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON, usually bench/results/int8_loss.json")
    options = parser.parse_args()
    samples = list(conversations(options.pictures))
    results = {"replies": len(samples)}
    for name, dtype, quantize in (
        ("float32", "float32", None),
        ("bfloat16", "bfloat16", None),
        ("int8 layers, rest bfloat16", "bfloat16", "layers"),
        ("int8 layers and head, rest bfloat16", "bfloat16", "int8"),
    ):
        vlm = visualrwkv.load(dtype=dtype, quantize="int8" if quantize == "int8" else None)
        if quantize == "layers":
            quantize_linears(vlm.model.rwkv.blocks)
        results[name] = loss(vlm, samples)
        print(f"{name:40} {results[name]:.5f}", flush=True)
    if options.out:
        save(results, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
