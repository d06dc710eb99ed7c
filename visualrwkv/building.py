"""From a recipe's `model` section to a model and its processor."""

import itertools
from dataclasses import fields
from pathlib import Path

from visualrwkv.errors import InputError, one_line

_VOCAB_FILE = "rwkv_vocab.txt"
_IMAGE_FILE = "preprocessor_config.json"
_EMBED_DIM = 512  # open_clip wants a width for the projection that we then leave out


def build_model(recipe):
    """The model that a projector or instruction recipe starts from, in float32, with its processor."""
    new = recipe.model.new
    model, processor = _load(recipe.model) if new is None else _start(recipe)
    model.config.l2_wrap = recipe.l2_wrap
    return model, processor


def _load(recipe):
    """`model.from`: anything that `visualrwkv.load` reads, or a bare RWKV file joined with a new tower."""
    from visualrwkv.loading import load

    if recipe.vision is None:
        vlm = load(recipe.from_, device="cpu", dtype="float32")
        return vlm.model, vlm.processor
    from visualrwkv.checkpoints import load_checkpoint
    from visualrwkv.image_processing import VisualRWKVImageProcessor
    from visualrwkv.loading import find

    model, processor = load_checkpoint(find(recipe.from_), dtype="float32", vision=vision_config_for(recipe.vision))
    fill_tower(model, recipe.vision)
    if isinstance(recipe.vision, str) and (Path(recipe.vision) / _IMAGE_FILE).is_file():
        processor.image_processor = VisualRWKVImageProcessor.from_pretrained(recipe.vision)
    return model, processor


def _start(recipe):
    from visualrwkv.configuration import VisualRWKVConfig, VisualRWKVTextConfig
    from visualrwkv.modeling import VisualRWKVForConditionalGeneration
    from visualrwkv.processing import VisualRWKVProcessor
    from visualrwkv.streaming import turn_end_ids

    new = recipe.model.new
    unknown = sorted(set(new.language) - {field.name for field in fields(VisualRWKVTextConfig)})
    if unknown:
        raise InputError(f"model.new.language: unknown keys {', '.join(map(str, unknown))}; see VisualRWKVTextConfig")
    tokenizer = tokenizer_for(new, recipe.output)
    vision = vision_config_for(new.vision)
    try:
        config = VisualRWKVConfig(
            text_config={**new.language, "vocab_size": tokenizer.image_token_id + 1},
            vision_config=vision,
            projector=new.projector,
            scan=new.scan,
            prompt=new.prompt,
            grid_size=new.grid_size,
            image_token_id=tokenizer.image_token_id,
        )
        model = VisualRWKVForConditionalGeneration.from_scratch(config)
    except InputError:
        raise
    except Exception as error:  # sizes that make no model fail in many ways
        raise InputError(f"model.new: no model can be made of these sizes: {one_line(error, 200)}") from error
    model.generation_config.eos_token_id = turn_end_ids(tokenizer)
    fill_tower(model, new.vision)
    processor = VisualRWKVProcessor(
        image_processor_for(new, vision), tokenizer, num_image_tokens=config.num_image_tokens, prompt=config.prompt
    )
    return model, processor


def vision_config_for(vision):
    """The tower's config: an open_clip vision_cfg, a folder of the contrastive stage, or an open_clip model as
    `NAME:WEIGHTS` (a tag of open_clip's registry or a local file) or `NAME` alone (random weights)."""
    from visualrwkv.configuration import VisualRWKVVisionConfig
    from visualrwkv.vision import describe_tower, tower_config

    if isinstance(vision, dict):
        return describe_tower(vision, _EMBED_DIM)
    if Path(vision).is_dir():
        if not (Path(vision) / "config.json").is_file():
            raise InputError(f"{vision}: no finished vision tower there (no config.json); finish the contrastive stage")
        return VisualRWKVVisionConfig.from_pretrained(vision)
    name, _, weights = vision.partition(":")
    if "/" in name or name.startswith("."):
        raise InputError(f"{vision}: no such folder; name one of the contrastive stage, or an open_clip model")
    return tower_config(name, weights or None)


def fill_tower(model, vision):
    """Fills the model's tower from a folder or from open_clip weights; a tower given by its sizes stays random."""
    from visualrwkv.vision import load_tower

    if isinstance(vision, str) and Path(vision).is_dir():
        from safetensors.torch import load_file

        source = Path(vision) / "model.safetensors"
        if not source.is_file():
            raise InputError(f"{source}: missing; finish the contrastive stage of this folder")
        weights = load_file(source)
    elif isinstance(vision, str) and ":" in vision:
        source, weights = vision, load_tower(*vision.split(":", 1)).state_dict()
    else:
        return
    try:
        model.vit.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{source}: does not fit the tower: {one_line(error)}") from error


def image_processor_for(new, config):
    """As the tower saw its pictures: the folder's own file, or a new one of the tower's size with the options given."""
    from visualrwkv.image_processing import VisualRWKVImageProcessor

    try:
        if isinstance(new.vision, str) and (Path(new.vision) / _IMAGE_FILE).is_file():
            return VisualRWKVImageProcessor.from_pretrained(new.vision, **new.image)
        return VisualRWKVImageProcessor(size=config.image_size, **new.image)
    except TypeError as error:  # an unknown name, or the size, which the tower has
        raise InputError(f"model.new.image: {one_line(error, 200)}") from None


def tokenizer_for(new, output):
    """The tokenizer of a new model: the World vocabulary, one saved in a folder, or one chosen for drawn scenes.

    The chosen one is written into the output folder and read from there when the run is resumed.
    """
    from visualrwkv.runs import newest_checkpoint
    from visualrwkv.tokenization import RWKVWorldTokenizer

    if new.vocabulary == "world":
        return RWKVWorldTokenizer()
    if new.vocabulary != "scenes":
        return RWKVWorldTokenizer(Path(new.vocabulary) / _VOCAB_FILE)
    file = Path(output) / _VOCAB_FILE
    if not (newest_checkpoint(output) and file.is_file()):
        write_scene_vocabulary(file, new.vocabulary_size)
    return RWKVWorldTokenizer(file)


def write_scene_vocabulary(file, size):
    """Writes the part of the World vocabulary that prompts and replies about drawn scenes use."""
    from visualrwkv.scenes.descriptions import all_texts
    from visualrwkv.tokenization import subset_vocabulary, write_vocabulary

    # a text is tokenised together with what its turn puts around it
    texts = itertools.chain(["User: ", "Assistant: "], (f": {text}\n\n" for text in all_texts()))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_vocabulary(subset_vocabulary(texts, size), file)
