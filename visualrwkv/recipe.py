"""Training recipes: a YAML file read into checked dataclasses.

Every field below is a key of the YAML file. Keys can be overridden on the command line as `key=value`, nested ones with
dots (`train.language=3e-4`, `data.scenes.curriculum.0.until=0.2`); the value is read as YAML. An unknown key is refused
and the known ones of its level are listed, so that a misspelt key never silently does nothing.
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from visualrwkv import yaml_fields
from visualrwkv.errors import InputError

STAGES = ("contrastive", "projector", "instruction")
PARTS = {
    "contrastive": ("vision", "text"),
    "projector": ("projector",),
    "instruction": ("projector", "language", "vision"),
}


@dataclass
class NewModel:
    """A model made from scratch with random weights."""

    # An open_clip tower as in the model's vision_config, or a folder of the contrastive stage.
    vision: dict | str | None = None
    # Sizes as in the model's text_config; the vocabulary sets vocab_size.
    language: dict = field(default_factory=dict)
    text: dict | None = None  # contrastive stage: open_clip's TextTransformer; the vocabulary sets vocab_size
    embed_dim: int = 256  # contrastive stage: width of the space that pictures and captions share
    projector: str = "linear"  # these four as in the model's config
    scan: str = "bi"
    prompt: str = "sandwich"
    grid_size: int = -1
    vocabulary: str = "world"  # "world", "scenes" (the tokens that drawn scenes need) or a folder with rwkv_vocab.txt
    vocabulary_size: int = 4096  # at most so many tokens with "scenes"
    image: dict = field(default_factory=dict)  # options of the image processor; the tower sets the size


@dataclass
class ModelRecipe:
    """Where the weights come from: exactly one of `from` and `new`."""

    from_: str | None = None  # folder, .pth file or Hub name of a model; a bare RWKV file gets the tower of `vision`
    vision: dict | str | None = None  # only with a bare RWKV file: the new tower, as in `new.vision`
    new: NewModel | None = None


@dataclass
class Stretch:
    """One stretch of a curriculum; what is not given is taken from the dataset's own fields."""

    until: float = 1.0  # where it ends: a fraction of all samples up to 1, otherwise a number of samples
    objects: tuple[int, int] | None = None
    kinds: dict[str, float] | None = None
    turns: tuple[int, int] | None = None
    sign_probability: float | None = None
    zoom: tuple[float, float] | None = None
    relations: list[str] | None = None
    bases: list[str] | None = None
    options: list[int] | None = None


@dataclass
class ScenesData:
    """Samples drawn on the fly; sample number i is the same in every run with the same seed."""

    seed: int = 0
    objects: tuple[int, int] = (1, 6)  # fewest and most objects in a picture
    kinds: dict[str, float] | None = None  # how often each kind of question comes; None is all kinds alike
    turns: tuple[int, int] = (1, 3)  # questions about one picture; a description is always alone
    sides: tuple[int, int] = (96, 512)  # shortest and longest side of a picture in px
    sign_probability: float = 0.35
    zoom: tuple[float, float] | None = None  # of a single object show a cut-out, so many times its box
    relations: list[str] = field(default_factory=lambda: ["left", "right", "above", "below"])  # that are asked about
    bases: list[str] | None = None  # kinds that a choice is made of, each as often as given; None is all of them
    options: list[int] | None = None  # how many options it may have, each as often as given; None is 2 to 5
    chinese: float = 0.25  # share of Chinese questions
    vary: float = 0.5  # share of questions in another wording than the usual one
    short_line: float = 0.5  # share of short English questions with the line that asks for a word or phrase
    letter_line: float = 1.0  # share of multiple-choice questions with the line that asks for the letter
    again: float = 0.0  # share of the later questions that show the picture once more
    text_only: bool = False  # leave the pictures out: the language of the world without its pictures
    curriculum: list[Stretch] = field(default_factory=list)


@dataclass
class DataRecipe:
    """What is learnt from: exactly one of `json` and `scenes`."""

    json: str | None = None  # LLaVA-format file: a JSON list, or one JSON object a line (.jsonl)
    images: str | None = None  # folder that the picture names of the file start from
    max_length: int = 2048  # longest sample in tokens, image features included
    # Share of conversations whose first picture stands below all of their questions, as in the released models (prompt
    # "sandwich"). In the others it stands below the first one alone, as in `chat`, where the next is not known yet.
    foresight: float = 1.0
    scenes: ScenesData | None = None


@dataclass
class EvalRecipe:
    """Questions about held-out drawn scenes, asked while training."""

    every: int = 0  # optimizer steps between two evaluations; 0 asks nothing
    pictures: int = 64
    seed: int = 1
    batch_size: int = 32
    objects: tuple[int, int] = (1, 6)


@dataclass
class Recipe:
    """One training run.

    A step is an optimizer step, which all processes take together and after which the rates change; `batch_size`,
    `accumulate` and `workers` are those of each process.
    """

    stage: str
    output: str  # folder for checkpoints, log.jsonl and the finished model
    model: ModelRecipe
    data: DataRecipe
    train: dict[str, float]  # highest learning rate of each part; a part that is left out or 0 is frozen
    steps: int | None = None  # optimizer steps; or
    epochs: float | None = None  # passes over a JSON file
    batch_size: int = 8  # samples in one forward pass
    accumulate: int = 1  # forward passes in one optimizer step
    warmup: int = 0  # steps in which the rates rise from 0
    final_rate: float = 0.1  # the cosine ends at this share of the highest rates
    weight_decay: float = 0.0  # matrices only
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0  # largest norm of all gradients together; 0 does not clip
    freeze_layers: list[int] = field(default_factory=list)  # language layers that do not learn, counted from 0
    precision: str = "fp32"  # "fp32" or "bf16" (autocast over float32 weights, where the processor has units for it)
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile the language layers: half a minute of waiting, then faster steps
    l2_wrap: bool = False  # pull the largest logit towards 0 as the public training code does
    seed: int = 0
    resume: str = "auto"  # "auto" (newest complete checkpoint in the output folder), "none" or a checkpoint folder
    save_every: int = 500  # steps between two checkpoints; the last step is always saved
    keep: int = 2  # checkpoints kept
    log_every: int = 20
    workers: int = 1  # processes that draw or decode pictures
    eval: EvalRecipe = field(default_factory=EvalRecipe)


def load_recipe(path, overrides=()):
    """Reads a YAML file, applies `key=value` overrides and checks the whole.

    Returns:
        `Recipe`.

    Raises:
        InputError: naming the file, the key, the value and what is allowed.
    """
    path = find_recipe(path)
    raw = yaml_fields.read(path, "a YAML recipe such as configs/train/projector.yaml")
    for text in overrides:
        yaml_fields.override(raw, text)
    recipe = yaml_fields.fill(Recipe, raw, str(path))
    _expand_home(recipe)
    _validate(recipe, path)
    return recipe


def _expand_home(recipe):
    """The home folder for a leading `~`, which no shell expands in a file or behind `key=`."""
    model, data = recipe.model, recipe.data
    names = [(recipe, "output"), (recipe, "resume"), (data, "json"), (data, "images"), (model, "from_")]
    names += [(part, name) for part in (model, model.new) if part for name in ("vision", "vocabulary")]
    for part, name in names:
        if isinstance(value := getattr(part, name, None), str):
            setattr(part, name, os.path.expanduser(value))


def find_recipe(path):
    """The file itself, or the one of that name among the recipes that are installed with the package."""
    path = Path(path)
    if path.is_file():
        return path
    package = Path(__file__).resolve().parent
    tail = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    if not path.is_absolute():
        for folder in (package / "configs", package.parent / "configs"):
            if (folder / tail).is_file():
                return folder / tail
    raise InputError(f"{path}: no such recipe; pass a YAML file such as configs/train/projector.yaml")


def save_recipe(recipe, path):
    """Writes the resolved recipe, every default filled in; `load_recipe` reads it back equal."""
    Path(path).write_text(yaml_fields.dump(recipe), encoding="utf-8")


def _validate(recipe, source):
    """Checks that single types cannot express; all complaints are raised as one InputError."""
    complaints = []

    def need(condition, message):
        if not condition:
            complaints.append(message)

    need(recipe.stage in STAGES, f"stage is {recipe.stage!r}, expected one of {', '.join(STAGES)}")
    parts = PARTS.get(recipe.stage, ())
    for part, rate in recipe.train.items():
        need(part in parts or not parts, f"train.{part}: the {recipe.stage} stage trains {', '.join(parts)}")
        need(0 <= rate < math.inf, f"train.{part} is {rate}, a learning rate is 0 (frozen) or positive")
    need(
        any(rate > 0 for rate in recipe.train.values()),
        "train: no part has a learning rate above 0, nothing would learn",
    )
    for place, names, values in (
        ("model: ", "'from' and 'new'", (recipe.model.from_, recipe.model.new)),
        ("data: ", "'json' and 'scenes'", (recipe.data.json, recipe.data.scenes)),
        ("", "'steps' and 'epochs'", (recipe.steps, recipe.epochs)),
    ):
        need(values.count(None) == 1, f"{place}give exactly one of {names} (key=null takes one away)")
    need(recipe.epochs is None or recipe.data.json is not None, "epochs: drawn scenes have no end, give 'steps'")
    need(recipe.precision in ("fp32", "bf16"), f"precision is {recipe.precision!r}, expected fp32 or bf16")
    for name in ("steps", "epochs", "batch_size", "accumulate", "save_every", "keep", "log_every"):
        value = getattr(recipe, name)
        need(value is None or 0 < value < math.inf, f"{name} is {value}, expected a number above 0")
    for name in ("warmup", "final_rate", "weight_decay", "clip", "workers", "seed"):
        value = getattr(recipe, name)
        need(0 <= value < math.inf, f"{name} is {value}, expected 0 or more")
    need(all(0 <= beta < 1 for beta in recipe.betas), f"betas are {recipe.betas}, expected numbers from 0 to below 1")
    need(recipe.eval.every >= 0, f"eval.every is {recipe.eval.every}, expected 0 (never) or more")
    low, high = recipe.eval.objects
    need(1 <= low <= high <= 6, f"eval.objects is {recipe.eval.objects}, expected [fewest, most] from 1 to 6")
    for name in ("pictures", "batch_size"):
        need(getattr(recipe.eval, name) > 0, f"eval.{name} is {getattr(recipe.eval, name)}, expected a number above 0")
    if recipe.stage == "contrastive":
        need(recipe.data.scenes is not None, "data: the contrastive stage learns from drawn scenes, give 'scenes'")
        need(
            recipe.model.new is not None and recipe.model.new.text is not None,
            "model.new.text is needed: the caption tower",
        )
        need(
            recipe.model.new is None or recipe.model.new.image.get("mode") == "squash",
            "model.new.image.mode: the contrastive stage needs 'squash', to know which patch shows what",
        )
    if recipe.model.new is not None:
        need(recipe.model.new.vision is not None, "model.new.vision is needed: an open_clip vision_cfg or a folder")
    need(0 <= recipe.data.foresight <= 1, f"data.foresight is {recipe.data.foresight}, expected a share from 0 to 1")
    if recipe.data.scenes is not None:
        _validate_scenes(recipe.data.scenes, need)
    if complaints:
        raise InputError(f"{source}: {'; '.join(complaints)}")


def _validate_scenes(scenes, need):
    """Ranges rise, weights are positive, the stretches of a curriculum follow each other."""
    for name in ("chinese", "vary", "short_line", "letter_line", "again"):
        share = getattr(scenes, name)
        need(0 <= share <= 1, f"data.scenes.{name} is {share}, expected a share from 0 to 1")
    for where, part in [
        ("data.scenes", scenes),
        *((f"data.scenes.curriculum.{i}", s) for i, s in enumerate(scenes.curriculum)),
    ]:
        for name in ("objects", "turns"):
            low_high = getattr(part, name)
            need(
                low_high is None or 1 <= low_high[0] <= low_high[1],
                f"{where}.{name} is {low_high}, expected [fewest, most]",
            )
        need(
            part.options is None or (part.options and all(2 <= n <= 5 for n in part.options)),
            f"{where}.options is {part.options}, expected numbers from 2 to 5",
        )
        zoom = part.zoom
        need(zoom is None or 0 < zoom[0] <= zoom[1], f"{where}.zoom is {zoom}, expected [least, most] above 0")
        weights = part.kinds
        good = weights is None or (any(weights.values()) and all(weight >= 0 for weight in weights.values()))
        need(good, f"{where}.kinds: weights are 0 or more, and one is above 0")
    ends = [stretch.until for stretch in scenes.curriculum]
    need(all(end > 0 for end in ends), "data.scenes.curriculum: every 'until' is above 0")
    need(
        all(a < b for a, b in zip(ends, ends[1:], strict=False)) or len({e > 1 for e in ends}) > 1,
        "data.scenes.curriculum: every 'until' lies behind the one before it",
    )
