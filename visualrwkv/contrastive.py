"""The contrastive stage: a tower learns which caption belongs to which patch of a drawn scene.

The loss is open_clip's own (`ClipLoss`; CLIP, arXiv 2103.00020), between patches and captions rather than between whole
pictures and captions: the language model reads patches, so it is patches that must tell what they show. The patch under
an object's centre is matched with the object's name, another patch of it with "part of ...", an empty patch with the
background. The result is the vision tower alone, in a folder that later stages name as `model.new.vision`.
"""

import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from visualrwkv.data import Curriculum, pixels, sample
from visualrwkv.errors import InputError
from visualrwkv.runs import alone, count_samples, is_main_process, write_versions, writing
from visualrwkv.scenes.descriptions import names_thing, patch_captions
from visualrwkv.scenes.drawing import draw
from visualrwkv.scenes.world import scene_rng
from visualrwkv.vision import VisionTower, describe_tower


class ContrastiveModel(nn.Module):
    """A vision tower, a caption tower of open_clip, and the loss between them, as the Trainer wants it.

    Args:
        embed_dim: width of the space that patches and captions share.
        vision: `VisualRWKVVisionConfig`.
        text: options of open_clip's TextTransformer, with vocab_size and context_length.
    """

    accepts_loss_kwargs = False  # contrasts within one forward pass: accumulated steps average by themselves

    def __init__(self, embed_dim, vision, text):
        super().__init__()
        from open_clip.loss import ClipLoss
        from open_clip.transformer import TextTransformer

        self.tower = VisionTower(vision)
        # the norm stands here, since the tower gives features before its own final norm
        self.shared = nn.Sequential(
            nn.LayerNorm(vision.hidden_size), nn.Linear(vision.hidden_size, embed_dim, bias=False)
        )
        try:
            self.text = TextTransformer(output_dim=embed_dim, **text)
        except (AssertionError, TypeError, RuntimeError) as error:
            raise InputError(f"model.new.text: open_clip cannot build it: {str(error).splitlines()[0]}") from error
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.loss = ClipLoss()  # several processes contrast each its own batch

    def forward(self, pixel_values, pictures, patches, texts):
        """pixel_values (n, 3, S, S); patch `patches[i]` of picture `pictures[i]` belongs to caption `texts[i]`, and no
        two captions are equal. Returns {"loss": scalar}."""
        regions = self.encode_patches(pixel_values)[pictures, patches]
        captions = self.encode_captions(texts)
        # Cosines of near-duplicates differ in the third digit: bfloat16 could not tell them apart.
        with torch.autocast(regions.device.type, enabled=False):
            return {"loss": self.loss(regions.float(), captions.float(), self.logit_scale.exp().clamp(max=100))}

    def encode_patches(self, pixel_values):
        """(n, 3, S, S) -> unit vectors (n, patches, embed_dim)."""
        rows, columns = self.tower.config.patch_grid
        return F.normalize(self.shared(self.tower(pixel_values)[:, : rows * columns]), dim=-1)

    def encode_captions(self, texts):
        """(n, context) ids -> unit vectors (n, embed_dim)."""
        return F.normalize(self.text(texts), dim=-1)


class PatchCaptions(Dataset):
    """Item i: `pixel_values` (3, S, S) of a scene and `captions`, a list of (patch, caption tokens).

    Args:
        scenes: `recipe.ScenesData`.
        tokenizer, image_processor: of the model; the processor squashes, so that a patch shows the same share of the
            picture in every picture.
        patch_grid: rows and columns of the tower.
        context: caption length in tokens, the end token included.
        length: scenes of the whole run.
        split: "train", or "val" for pictures that no training sample shows.
    """

    def __init__(self, scenes, tokenizer, image_processor, patch_grid, context, length, split="train"):
        self.scenes, self.tokenizer, self.image_processor = scenes, tokenizer, image_processor
        self.patch_grid, self.context, self.length, self.split = patch_grid, context, length, split
        self.curriculum = Curriculum(scenes, length)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        scene, captions = self.captioned(index)
        return {
            "objects": sum(names_thing(caption) for _, caption in captions),  # they come first
            "pixel_values": pixels(self.image_processor, [draw(scene)])[0],
            "captions": [(patch, self.tokens(caption)) for patch, caption in captions],
        }

    def captioned(self, index):
        """The scene of sample `index`, and (patch, caption) pairs."""
        rng = scene_rng(self.scenes.seed, self.split, index)
        scene = sample(rng, self.scenes, self.curriculum(index), self.split)
        return scene, patch_captions(scene, self.patch_grid, rng)

    def tokens(self, caption):
        """The caption, the end token (the highest id), zeros: `context` ids."""
        ids = [*self.tokenizer.encode_text(caption), self.tokenizer.image_token_id]
        if len(ids) > self.context:
            raise InputError(
                f"model.new.text.context_length {self.context}: the caption {caption!r} has {len(ids)} tokens"
            )
        return tuple(ids + [0] * (self.context - len(ids)))


def collate_captions(items):
    """A batch for `ContrastiveModel.forward`. Of equal captions the first stays: their patches are no contrast."""
    first = {}
    for picture, item in enumerate(items):
        for patch, caption in item["captions"]:
            first.setdefault(caption, (picture, patch))
    pictures, patches = zip(*first.values(), strict=True)
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "pictures": torch.tensor(pictures),
        "patches": torch.tensor(patches),
        "texts": torch.tensor(list(first)),
    }


@torch.no_grad()
def retrieval(model, items, device, batch=64):
    """How well the model names the patches of held-out pictures.

    Returns:
        {"caption among N": share of patches whose own caption is the nearest of all N that occur, "objects": the same
        of the patches under objects' centres alone}.
    """
    was_training = model.training
    model.eval()
    index = {caption: i for i, caption in enumerate({c: None for item in items for _, c in item["captions"]})}
    texts = torch.tensor(list(index), device=device)
    captions = torch.cat([model.encode_captions(part) for part in texts.split(batch)]).float()
    right, right_objects = [], []
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        features = model.encode_patches(torch.stack([item["pixel_values"] for item in part]).to(device)).float()
        for row, item in zip(features, part, strict=True):
            for patch, caption in item["captions"]:
                right.append(int((row[patch] @ captions.T).argmax()) == index[caption])
            right_objects += right[-len(item["captions"]) :][: item["objects"]]
    model.train(was_training)
    return {
        f"caption among {len(index)}": round(sum(right) / len(right), 4),
        "objects": round(sum(right_objects) / max(1, len(right_objects)), 4),
    }


def run_contrastive(recipe):
    """Trains the stage and writes the tower: config.json, model.safetensors, preprocessor_config.json, the vocabulary,
    recipe.yaml and versions.json.

    Returns:
        The process's exit code.
    """
    from transformers import set_seed

    from visualrwkv.building import image_processor_for, tokenizer_for
    from visualrwkv.trainer import parameter_groups, train

    set_seed(recipe.seed)
    new = recipe.model.new
    if isinstance(new.vision, str):
        raise InputError(
            f"model.new.vision: the contrastive stage starts a new tower, expected a mapping, not {new.vision!r}"
        )
    tokenizer = tokenizer_for(new, recipe.output)
    config = describe_tower(new.vision, new.embed_dim)
    image_processor = image_processor_for(new, config)
    text = {"context_length": 16, **new.text, "vocab_size": tokenizer.image_token_id + 1}
    model = ContrastiveModel(new.embed_dim, config, text)
    steps, length = count_samples(recipe)
    parts = (tokenizer, image_processor, config.patch_grid, text["context_length"])
    unseen = replace(recipe.data.scenes, objects=recipe.eval.objects, curriculum=[])
    held_out = PatchCaptions(unseen, *parts, recipe.eval.pictures, "val")
    drawn = []

    def evaluate():
        if not drawn:
            drawn.extend(held_out[i] for i in range(recipe.eval.pictures))
        return retrieval(model, drawn, next(model.parameters()).device)

    groups = parameter_groups(model.named_parameters(), _part_of, recipe.train, recipe.weight_decay)
    captions = PatchCaptions(recipe.data.scenes, *parts, length)
    with alone(recipe.output):
        code = train(recipe, model, captions, collate_captions, groups, steps, evaluate=evaluate)
        if code == 0 and is_main_process():
            with writing(None, recipe.output):
                save_tower(model, config, image_processor, tokenizer, recipe.output)
    return code


def _part_of(name):
    return "vision" if name.startswith(("tower.", "shared.")) else "text"


def save_tower(model, config, image_processor, tokenizer, folder):
    """Writes the tower, without the projection into the space of captions."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.tower.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_versions(folder)
