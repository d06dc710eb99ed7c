"""Turns a finished training run into the embedded model: half-precision weights, and a card with measured accuracy.

`python -m visualrwkv.scenes.card RUN OUT --pictures N` loads the folder RUN of the last stage, writes the model to OUT
in float16, loads it from there again as a user would, and measures what is written on the card, with the picture and
with a gray one in its place, and by follow-up questions.
"""

import argparse
import json
import platform
import sys
from datetime import date
from pathlib import Path

from visualrwkv.errors import InputError, error_line
from visualrwkv.scenes.accuracy import evaluate_follow_ups, evaluate_scenes, shares

_CARD = """---
license: apache-2.0
library_name: visualrwkv
pipeline_tag: image-text-to-text
---

# The embedded model

Answers questions about drawn scenes (coloured shapes and signs, in English and Chinese) and knows nothing else. It was
trained from scratch by the stages of this project, on pictures drawn by `visualrwkv.scenes`; no outside data or weights
went into it.

| | |
| --- | --- |
| language model | RWKV-{version}, {layers} layers, width {width}, {vocabulary:,} token ids; {language:,} parameters |
| vision tower | `{tower}`, {size} px, {tokens} patches; {vision:,} parameters |
| weights | float16, {megabytes:.1f} MB |
| recipe | `configs/tiny/`, run by `make model`; what each stage was run with is in `recipes.yaml` |
| trained | {trained} |

## Accuracy

One question at a time about {pictures} unseen pictures of 1 to 6 objects (split `test`, seed {seed}), exact match;
"blind" is the same with a gray picture. "Second" and "look again" are questions asked second in a conversation, from
the state alone and with the picture shown once more. Measured on {day} by

```
python -m visualrwkv.scenes.accuracy --pictures {pictures} --seed {seed}
```

and the same with `--blind`, `--follow-up`, and `--follow-up --look-again`.

| kind | right | blind | second | look again | questions |
| --- | --- | --- | --- | --- | --- |
{rows}
"""


def write_model(run, out):
    """The model of folder `run` in float16 as folder `out`, without what only training needs."""
    import torch

    from visualrwkv.loading import load

    vlm = load(run)
    vlm.model.to(torch.float16).save_pretrained(out)
    vlm.processor.save_pretrained(out)


def write_card(out, pictures, seed, trained):
    """Measures the model in folder `out` and writes README.md and accuracy.json beside it; returns the shares."""
    from visualrwkv.loading import load

    vlm = load(out, dtype="float32")
    model, config = vlm.model, vlm.model.config
    seen, blind = (
        evaluate_scenes(model, vlm.processor, pictures, seed, blind=blind, progress=True) for blind in (False, True)
    )
    second, again = (
        evaluate_follow_ups(model, vlm.processor, pictures, seed, look_again=look_again, progress=True)
        for look_again in (False, True)
    )
    rows, others = [], [shares(counts) for counts in (blind, second, again)]
    for kind, share in shares(seen).items():
        asked = seen[kind][1] if kind in seen else sum(seen[k][1] for k in seen if k != "describe")
        name = "all short-answer questions" if kind == "short" else kind
        told = [f"{other[kind]:.1%}" if kind in other else "" for other in others]
        rows.append(f"| {name} | {share:.1%} | {' | '.join(told)} | {asked} |")
    text, vision = config.text_config, config.vision_config
    card = _CARD.format(
        version=text.version,
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        vocabulary=text.vocab_size,
        language=sum(p.numel() for p in model.rwkv.parameters()),
        tower=vision.tower.get("timm_model_name") or vision.name,
        size=vision.image_size,
        tokens=config.num_image_tokens,
        vision=sum(p.numel() for p in model.vit.parameters()),
        megabytes=(Path(out) / "model.safetensors").stat().st_size / 1e6,
        trained=trained,
        pictures=pictures,
        seed=seed,
        day=date.today().isoformat(),
        rows="\n".join(rows),
    )
    Path(out, "README.md").write_text(card, encoding="utf-8")
    measured = {
        "seed": seed,
        "pictures": pictures,
        "counts": seen,
        "blind": blind,
        "second": second,
        "look again": again,
    }
    Path(out, "accuracy.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return shares(seen)


def main(argv=None):
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m visualrwkv.scenes.card", description=__doc__.split("\n")[0])
    parser.add_argument("run", metavar="RUN", help="output folder of the last stage")
    parser.add_argument("out", metavar="OUT", help="folder of the embedded model")
    parser.add_argument("--recipes", metavar="DIR", nargs="*", default=[], help="output folders of all stages")
    parser.add_argument("--pictures", metavar="N", type=int, default=500)
    parser.add_argument("--seed", metavar="S", type=int, default=0)
    parser.add_argument("--trained", metavar="TEXT", default=f"on {platform.machine()}", help="hardware, time, date")
    arguments = parser.parse_args(argv)
    try:
        recipes = [Path(folder, "recipe.yaml").read_text(encoding="utf-8") for folder in arguments.recipes]
        write_model(arguments.run, arguments.out)
        if recipes:
            Path(arguments.out, "recipes.yaml").write_text("---\n".join(recipes), encoding="utf-8")
        result = write_card(arguments.out, arguments.pictures, arguments.seed, arguments.trained)
    except (InputError, OSError) as error:
        print(error_line(error), file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
