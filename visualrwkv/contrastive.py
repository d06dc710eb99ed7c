"""The contrastive stage: an open_clip model learns which caption belongs to which drawn scene.

Model and loss are open_clip's own (`CustomTextCLIP`, `ClipLoss`; CLIP, arXiv 2103.00020). A dataset item is a family of
near-duplicate scenes, so that the captions of a batch differ in one colour, shape, size or place: telling whole
pictures apart would not teach a tower to name every object. The result is the vision tower alone, in a folder that
later stages name as `model.new.vision`.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from visualrwkv.data import Curriculum, pixels, sample
from visualrwkv.errors import InputError
from visualrwkv.runs import count_samples, is_main_process, world_size, write_versions, writing
from visualrwkv.vision import describe_tower


class ContrastiveModel(nn.Module):
    """An open_clip model with its loss, as the Trainer wants it.

    Args:
        embed_dim: width of the shared space.
        vision: open_clip vision_cfg.
        text: open_clip text_cfg with vocab_size and context_length.
    """

    accepts_loss_kwargs = False  # contrasts within one forward pass: accumulated steps average by themselves

    def __init__(self, embed_dim, vision, text):
        super().__init__()
        from open_clip.loss import ClipLoss
        from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

        from visualrwkv.vision import register_towers

        register_towers()
        vision = {"timm_model_pretrained": False, **vision}
        try:
            self.clip = CustomTextCLIP(embed_dim, CLIPVisionCfg(**vision), CLIPTextCfg(**text), output_dict=True)
        except (TypeError, RuntimeError) as error:
            raise InputError(f"model.new: open_clip cannot build this model: {str(error).splitlines()[0]}") from error
        self.register_buffer("causal_mask", self.clip.text.attn_mask, persistent=False)
        self.loss = ClipLoss(
            local_loss=True, gather_with_grad=True, rank=_rank(), world_size=world_size(), cache_labels=True
        )

    def forward(self, pixel_values, texts):
        """pixel_values (n, 3, S, S), texts (n, length) -> {"loss": scalar}; picture i belongs to text i."""
        pictures, captions = self.encode(pixel_values, texts)
        # Near-duplicates differ in the third digit of a cosine: bfloat16 could not tell them apart.
        with torch.autocast(pictures.device.type, enabled=False):
            scale = self.clip.logit_scale.exp().clamp(max=100)
            return {"loss": self.loss(pictures.float(), captions.float(), scale)}

    def encode(self, pixel_values, texts):
        """Both as unit vectors (n, embed_dim); texts may be shorter than the context."""
        length = texts.shape[1]
        self.clip.text.attn_mask = self.causal_mask[:length, :length]  # open_clip keeps it at full length alone
        pictures = self.clip.encode_image(pixel_values).float()
        captions = self.clip.encode_text(texts).float()
        return F.normalize(pictures, dim=-1), F.normalize(captions, dim=-1)


def _rank():
    import os

    return int(os.environ.get("RANK", "0"))


class CaptionFamilies(Dataset):
    """Item i: the pixels (F, 3, S, S) and caption tokens (F, context) of a family of near-duplicate scenes.

    Args:
        scenes: `recipe.ScenesData`.
        tokenizer, image_processor: of the model.
        context: caption length in tokens, the end token included.
        length: families of the whole run.
        split: "train", or "val" for pictures that no training sample shows.
    """

    def __init__(self, scenes, tokenizer, image_processor, context, length, split="train"):
        self.scenes, self.tokenizer, self.image_processor = scenes, tokenizer, image_processor
        self.context, self.length, self.split = context, length, split
        self.curriculum = Curriculum(scenes, length)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        from visualrwkv.scenes.drawing import draw

        family, captions = self.family(index)
        texts = torch.stack([self.tokens(caption) for caption in captions])
        return {"pixel_values": pixels(self.image_processor, [draw(scene) for scene in family]), "texts": texts}

    def family(self, index):
        """Scenes and captions. A scene with too few variants is joined by a second scene and its variants, so that
        every item has the same size."""
        from visualrwkv.scenes.descriptions import caption
        from visualrwkv.scenes.variants import variants
        from visualrwkv.scenes.world import scene_rng

        rng, settings = scene_rng(self.scenes.seed, self.split, index), self.curriculum(index)
        family = []
        while len(family) < self.scenes.family:
            scene = sample(rng, self.scenes, settings, self.split)
            family += [scene, *variants(scene, rng, self.scenes.family - len(family) - 1, split=self.split)]
        return family, [caption(scene, rng) for scene in family]

    def tokens(self, text):
        """(context,) ids: the caption, cut where it is too long, the end token (the highest id), zeros."""
        ids = self.tokenizer.encode_text(text)[: self.context - 1] + [self.tokenizer.image_token_id]
        return torch.tensor(ids + [0] * (self.context - len(ids)))


def collate_families(items):
    """Flattens families: pixel_values (n, 3, S, S), texts (n, length of the longest)."""
    batch = {name: torch.cat([item[name] for item in items]) for name in ("pixel_values", "texts")}
    longest = int((batch["texts"] != 0).sum(1).max())
    return {**batch, "texts": batch["texts"][:, :longest]}


def retrieval(model, families, device, batch=32):
    """How well the model matches held-out pictures and captions.

    Returns:
        {"caption among N": share of pictures whose own caption is the nearest of all N, "caption in family": the same
        among the near-duplicates of its family alone}.
    """
    was_training = model.training
    model.eval()
    pictures, captions, groups = [], [], []
    with torch.no_grad():
        for start in range(0, len(families), batch):
            items = [families[i] for i in range(start, min(start + batch, len(families)))]
            groups += [start + i for i, item in enumerate(items) for _ in item["texts"]]
            inputs = collate_families(items)
            features = model.encode(inputs["pixel_values"].to(device), inputs["texts"].to(device))
            pictures.append(features[0].float())
            captions.append(features[1].float())
    model.train(was_training)
    similarity = torch.cat(pictures) @ torch.cat(captions).T
    own = torch.arange(len(similarity), device=similarity.device)
    groups = torch.tensor(groups, device=similarity.device)
    overall = (similarity.argmax(1) == own).float().mean().item()
    similarity = similarity.masked_fill(groups[:, None] != groups[None], -torch.inf)
    within = (similarity.argmax(1) == own).float().mean().item()
    return {f"caption among {len(own)}": round(overall, 4), "caption in family": round(within, 4)}


def run_contrastive(recipe):
    """Trains the stage and writes the tower: config.json, model.safetensors, preprocessor_config.json, the vocabulary,
    recipe.yaml and versions.json.

    Returns:
        The process's exit code.
    """
    from transformers import set_seed

    from visualrwkv.building import image_processor_for, tokenizer_for
    from visualrwkv.engine import parameter_groups, train

    set_seed(recipe.seed)
    new, scenes = recipe.model.new, recipe.data.scenes
    if isinstance(new.vision, str):
        raise InputError(
            f"model.new.vision: the contrastive stage starts a new tower, expected a mapping, not {new.vision!r}"
        )
    tokenizer = tokenizer_for(new, recipe.output)
    config = describe_tower(new.vision, new.embed_dim)
    image_processor = image_processor_for(new, config)
    text = {"context_length": 77, **new.text, "vocab_size": tokenizer.image_token_id + 1}
    model = ContrastiveModel(new.embed_dim, config.tower, text)
    model.clip.set_grad_checkpointing(recipe.gradient_checkpointing)
    steps, length = count_samples(recipe)
    dataset = CaptionFamilies(scenes, tokenizer, image_processor, text["context_length"], length)
    groups = parameter_groups(model.named_parameters(), _part_of, recipe.train, recipe.weight_decay)
    held_out = _HeldOut(recipe, dataset)

    def evaluate():
        return retrieval(model, held_out.items(), next(model.parameters()).device)

    code = train(recipe, model, dataset, collate_families, groups, steps, evaluate=evaluate)
    if code == 0 and is_main_process():
        with writing(None, recipe.output):
            save_tower(model, config, image_processor, tokenizer, recipe.output)
    return code


def _part_of(name):
    return "vision" if name.startswith("clip.visual.") else "text"


class _HeldOut:
    """Drawn once, asked often."""

    def __init__(self, recipe, training):
        scenes, self.count = recipe.data.scenes, recipe.eval.pictures
        self.families = CaptionFamilies(
            scenes,
            training.tokenizer,
            training.image_processor,
            training.context,
            max(1, self.count // scenes.family),
            "val",
        )
        self.families.curriculum = lambda index: {**training.curriculum.base, "objects": recipe.eval.objects}
        self.drawn = None

    def items(self):
        if self.drawn is None:
            self.drawn = [self.families[i] for i in range(len(self.families))]
        return self.drawn


def save_tower(model, config, image_processor, tokenizer, folder):
    """Writes the tower in the names of `vision.VisionTower`, without the projection into the space of captions."""
    from safetensors.torch import save_file

    from visualrwkv.vision import VisionTower

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trained = model.clip.visual.state_dict()
    with torch.device("meta"):
        names = VisionTower(config).visual.state_dict()
    weights = {f"visual.{name}": trained[name].detach().cpu().contiguous() for name in names}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_versions(folder)
