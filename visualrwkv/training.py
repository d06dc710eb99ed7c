"""`visualrwkv train CONFIG.yaml [key=value ...]`: the entry to all stages, and the projector and instruction stages.

The projector stage teaches a projector to speak a frozen language model's embeddings; the instruction stage trains the
parts that `train` names, from LLaVA-format files or drawn scenes. The contrastive stage is in `contrastive`.
"""

import sys

import torch

from visualrwkv.building import build_model
from visualrwkv.data import Collator, JsonDataset, ScenesDataset
from visualrwkv.errors import InputError
from visualrwkv.loading import quiet_transformers
from visualrwkv.ops.build import BuildError, compiler
from visualrwkv.ops.kernel import ready, ready_on_cuda
from visualrwkv.recipe import load_recipe
from visualrwkv.runs import alone, count_samples, is_main_process, require_accelerate, write_versions, writing

_PREFIXES = {"projector": "proj.", "language": "rwkv.", "vision": "vit."}


def run(config_path, overrides=()):
    """Runs the stage that a recipe describes, from its beginning or its newest checkpoint.

    Args:
        config_path: YAML file, or the name of one that is installed with the package.
        overrides: `key=value` strings.

    Returns:
        The process's exit code: 0, or 128 + the number of the signal that interrupted it.

    Raises:
        InputError: the recipe, the data or the model cannot be used.
    """
    recipe = load_recipe(config_path, overrides)
    require_accelerate()
    if recipe.stage == "contrastive":
        from visualrwkv.contrastive import run_contrastive

        return run_contrastive(recipe)
    return run_language(recipe)


def run_language(recipe):
    """A projector or instruction stage; writes model, processor, recipe.yaml and versions.json to the output folder."""
    from transformers import set_seed

    from visualrwkv.trainer import parameter_groups, train

    set_seed(recipe.seed)
    model, processor = build_model(recipe)
    if recipe.gradient_checkpointing:
        # older transformers know it by its older name alone
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    if recipe.compile:
        compile_layers(model)
    groups = parameter_groups(model.named_parameters(), part_of(recipe, model), recipe.train, recipe.weight_decay)
    dataset, steps = build_dataset(recipe, processor)
    describe_run(recipe, model, groups, steps)
    evaluate = _evaluation(recipe, model, processor)
    with alone(recipe.output):
        code = train(recipe, model, dataset, Collator(), groups, steps, processor=processor, evaluate=evaluate)
        if code == 0 and is_main_process():
            with writing(None, recipe.output), quiet_transformers():
                model.eval().save_pretrained(recipe.output)
                processor.save_pretrained(recipe.output)
                write_versions(recipe.output)
    return code


def compile_layers(model):
    """torch.compile for each layer of the language model; where there is no C++ compiler they stay as they are."""
    try:
        compiler()
    except BuildError as error:
        if is_main_process():
            print(f"compile: {error}; the layers are not compiled, each step takes longer", file=sys.stderr)
        return
    ready()  # loads the kernels of the operator, which nothing does while it is traced
    if torch.cuda.is_available():
        ready_on_cuda()
    for block in model.rwkv.blocks:
        block.compile(dynamic=True)  # in place: names of parameters and saved files stay as they are


def part_of(recipe, model):
    """The function from a parameter's name to its part; None for layers that `freeze_layers` holds still.

    Raises:
        InputError: a layer that the model does not have.
    """
    layers = model.config.text_config.num_hidden_layers
    for layer in recipe.freeze_layers:
        if not 0 <= layer < layers:
            raise InputError(f"freeze_layers: {layer} is no layer of this model, it has 0 to {layers - 1}")
    still = tuple(f"rwkv.blocks.{layer}." for layer in recipe.freeze_layers)

    def part(name):
        if name.startswith(still):
            return None
        return next((part for part, prefix in _PREFIXES.items() if name.startswith(prefix)), None)

    return part


def build_dataset(recipe, processor):
    """The dataset of the whole run and the number of optimizer steps."""
    data = recipe.data
    if data.scenes is not None:
        steps, length = count_samples(recipe)
        samples = ScenesDataset(data.scenes, processor, data.max_length, length, recipe.batch_size, data.foresight)
        for start in (0, *samples.curriculum.ends):  # what no scene allows is told now, not when its stretch begins
            if start < length:
                samples.conversation(int(start))
        return samples, steps
    dataset = JsonDataset(data.json, data.images, processor, data.max_length, recipe.seed, foresight=data.foresight)
    steps, dataset.length = count_samples(recipe, len(dataset.samples))
    if is_main_process():
        for count, what in (
            (dataset.unshown, "name a picture but have no <image>; it is not shown"),
            (dataset.unnamed, "have <image> but name no picture; it is read as text"),
        ):
            if count:
                print(f"{data.json}: {count} of {len(dataset.samples)} samples {what}", file=sys.stderr)
    return dataset, steps


def describe_run(recipe, model, groups, steps):
    """What learns, and for how long, on stderr."""
    if not is_main_process():
        return
    learning = {}
    for group in groups:
        learning[group["part"]] = learning.get(group["part"], 0) + sum(p.numel() for p in group["params"])
    total = sum(p.numel() for p in model.parameters())
    parts = ", ".join(f"{part} {count:,} at {recipe.train[part]:g}" for part, count in learning.items())
    print(f"{recipe.stage}: {steps} steps; of {total:,} parameters learn: {parts}", file=sys.stderr)
    if recipe.warmup >= steps:
        print(
            f"warmup: {recipe.warmup} of {steps} steps, so these rates are never reached; lower warmup or the samples "
            "of a step (batch_size, accumulate), or raise epochs",
            file=sys.stderr,
        )


def _evaluation(recipe, model, processor):
    """A function that asks questions about held-out scenes, or None."""
    if not recipe.eval.every:
        return None
    from visualrwkv.scenes.accuracy import evaluate_scenes, shares

    settings = recipe.eval

    def evaluate():
        was_training = model.training
        model.eval()
        try:
            with torch.compiler.set_stance("force_eager"):  # decoding has other shapes, not worth compiling for
                counts = evaluate_scenes(
                    model,
                    processor,
                    settings.pictures,
                    settings.seed,
                    batch_size=settings.batch_size,
                    objects=settings.objects,
                    split="val",
                )
        finally:
            model.train(was_training)
        return shares(counts)

    return evaluate
