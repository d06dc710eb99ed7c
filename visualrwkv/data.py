"""Training samples: LLaVA-format files and scenes drawn on the fly, both numbered from 0 to the end of the run.

Every dataset here is one long numbered sequence: sample i depends on nothing but the seed and i, so several worker
processes, a curriculum and an exact resume need no state. A dataset item is a dict with `input_ids` and `labels`
(lists), `pixel_values` (n_images, 3, S, S) or None, and `skipped`: (name, reason) of samples that could not be used in
its place.
"""

import json
import random
from dataclasses import fields
from pathlib import Path

import torch
from torch.utils.data import Dataset

from visualrwkv.errors import InputError, short
from visualrwkv.image_processing import load_image
from visualrwkv.prompt import IGNORE, MARKER, Turn, llava_role, turns_from_llava
from visualrwkv.recipe import Stretch
from visualrwkv.scenes.drawing import draw
from visualrwkv.scenes.questions import KIND_WEIGHTS, OPTIONS, SHORT_KINDS, conversation
from visualrwkv.scenes.world import sample_scene, scene_rng

_PAD_MULTIPLE = 16  # the chunk length of the recurrence; other lengths would be padded inside every layer again
_SCENE_TRIES = 1000
_WINDOW = 8  # batches of drawn scenes that are sorted by length together


class Collator:
    """Pads a list of items on the right to a multiple of 16 positions.

    Right padding needs no attention mask in training: the recurrence reads padding only after everything that counts.
    """

    def __call__(self, items):
        """Returns input_ids, labels (B, T), pixel_values (n, 3, S, S) if there is any image, and skipped (a list)."""
        length = max(len(item["input_ids"]) for item in items)
        length = -(-length // _PAD_MULTIPLE) * _PAD_MULTIPLE
        input_ids = torch.zeros(len(items), length, dtype=torch.long)
        labels = torch.full((len(items), length), IGNORE, dtype=torch.long)
        for row, item in enumerate(items):
            input_ids[row, : len(item["input_ids"])] = torch.tensor(item["input_ids"])
            labels[row, : len(item["labels"])] = torch.tensor(item["labels"])
        batch = {"input_ids": input_ids, "labels": labels}
        pixels = [item["pixel_values"] for item in items if item["pixel_values"] is not None]
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
        batch["skipped"] = [entry for item in items for entry in item.get("skipped", ())]
        return batch


class JsonDataset(Dataset):
    """A LLaVA-format file, shuffled anew in every pass; pictures are decoded when a sample is asked for.

    A sample that cannot be used (a broken picture, no reply, a first turn beyond `max_length`) is replaced by the next
    one of the same pass and reported in the item's `skipped`.

    Args:
        path: JSON list or JSON lines of {"id", "image" (a name or a list of names, optional), "conversations"}.
        images: folder that picture names start from; the file's own folder by default.
        processor: `VisualRWKVProcessor`.
        max_length: longest sample in tokens; whole trailing turns are dropped to fit.
        seed: of the order.
        length: how many items; set by the stage, which knows the number of steps.
        foresight: share of conversations whose first picture stands below all of their questions.

    Attributes:
        unshown: how many samples name a picture but have no <image>, so that it is left out, as in the public code.
        unnamed: how many have <image> but name no picture; the characters are then ordinary text.
    """

    def __init__(self, path, images, processor, max_length, seed=0, length=None, foresight=1.0):
        self.samples = read_llava(path)
        self.folder = Path(images) if images else Path(path).parent
        if not self.folder.is_dir():
            raise InputError(f"{self.folder}: no such picture folder; data.images names it")
        self.processor, self.max_length, self.seed, self.foresight = processor, max_length, seed, foresight
        self.length = len(self.samples) if length is None else length
        self.unshown = sum(bool(sample.get("image")) and not _marks(sample) for sample in self.samples)
        self.unnamed = sum(not sample.get("image") and _marks(sample) for sample in self.samples)
        self._order = (None, None)  # the pass last asked for and its permutation

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        skipped, foresight = [], foresees(self.foresight, self.seed, index)
        epoch, place = divmod(index, len(self.samples))
        for attempt in range(len(self.samples)):
            number = self._permutation(epoch)[(place + attempt) % len(self.samples)]
            try:
                return {**self.encode(self.samples[number], foresight), "skipped": skipped}
            except InputError as error:
                skipped.append((sample_name(self.samples[number], number), str(error)))
        raise InputError(f"no sample can be used; the first one: {skipped[0][0]}: {skipped[0][1]}")

    def _permutation(self, epoch):
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self.samples), generator=generator).tolist())
        return self._order[1]

    def encode(self, sample, foresight=True):
        """One sample of the file as an item; see `prompt.build_prompt` for `foresight`.

        Raises:
            InputError: why the sample cannot be used.
        """
        names = sample.get("image") or []
        names = [names] if isinstance(names, str) else names
        turns = turns_from_llava(sample["conversations"], len(names))
        shown = sum(turn.images for turn in turns)
        if shown not in (0, len(names)):  # without any marker the pictures are left out, as in the public code
            told = f"its turns show {shown} images, but 'image' names {len(names)}"
            raise InputError(f"{told}; write one <image> for each")
        item = encode_sample(self.processor, turns, self.max_length, foresight)
        pictures = [load_image(self.folder / name) for name in names[: item["images"]]]
        item["pixel_values"] = pixels(self.processor.image_processor, pictures) if pictures else None
        return item


def read_llava(path):
    """The samples of a LLaVA-format file, each checked for its form (not for its pictures).

    Raises:
        InputError: naming the file, the sample and what is wrong with it.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows puts a mark before it
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); data.json names a LLaVA-format file") from error
    lines, found = path.suffix == ".jsonl", []
    for before, document in enumerate(text.split("\n") if lines else [text]):
        try:
            if document.strip():
                found.append(json.loads(document))
        except json.JSONDecodeError as error:
            place = f"line {before + error.lineno} column {error.colno}"
            hint = "; a file of one object a line is called .jsonl" if error.msg == "Extra data" and not lines else ""
            raise InputError(f"{path}: not valid JSON: {error.msg}: {place}{hint}") from error
    samples = found if lines or not found else found[0]
    if not isinstance(samples, list):
        raise InputError(f"{path}: expected a list of samples, found {type(samples).__name__}; put them into a list")
    if not samples:
        raise InputError(f"{path}: holds no sample; data.json names a LLaVA-format file")
    for number, sample in enumerate(samples):
        try:
            _check(sample)
        except InputError as error:
            raise InputError(f"{path}: {sample_name(sample, number)}: {error}") from None
    return samples


def _marks(sample):
    """Whether a turn has a place for a picture."""
    return any(MARKER in turn["value"] for turn in sample["conversations"])


def sample_name(sample, number):
    """How messages call a sample."""
    label = sample.get("id") if isinstance(sample, dict) else None
    return f"sample {number}" + (f" (id {label})" if label is not None else "")


def _check(sample):
    """Raises an InputError that says what is wrong with the form of a sample."""
    if not isinstance(sample, dict):
        raise InputError(f"expected a mapping, found {type(sample).__name__}")
    image = sample.get("image")
    names = [image] if isinstance(image, str) else image or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"'image' is {short(image)}, expected a file name or a list of them")
    turns = sample.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise InputError("'conversations' is missing or empty")
    for number, turn in enumerate(turns, 1):
        llava_role(turn, number)


def foresees(share, seed, index):
    """Whether sample number `index` is one of the `share` whose first picture stands below all questions."""
    return random.Random(f"{seed} foresight {index}").random() < share


def encode_sample(processor, turns, max_length, foresight=True):
    """Token ids and labels of a conversation that fits `max_length`: whole trailing turns are dropped, nothing is cut.

    Raises:
        InputError: nothing to learn from is left.
    """
    turns = list(turns)
    ends = [number for number, turn in enumerate(turns, 1) if turn.role == "assistant"]
    if not ends:
        raise InputError("it holds no reply to learn from")

    def encode(count):
        return processor.encode_turns(turns[:count], open_reply=False, foresight=foresight)

    count = len(turns)
    encoded = encode(count)
    if len(encoded[0]) > max_length:
        encoded = encode(ends[0])
        if len(encoded[0]) > max_length:
            raise InputError(f"its first turns have {len(encoded[0])} tokens, more than data.max_length {max_length}")
        low, high = 0, len(ends) - (ends[-1] == len(turns))  # with reply `low` it fits, with reply `high` it does not
        count = ends[low]
        while high - low > 1:  # by halves: to encode a long conversation once for each of its turns takes long
            middle = (low + high) // 2
            longer = encode(ends[middle])
            if len(longer[0]) <= max_length:
                low, count, encoded = middle, ends[middle], longer
            else:
                high = middle
    input_ids, labels = encoded
    if all(label == IGNORE for label in labels):
        raise InputError("it holds no reply to learn from")
    images = sum(turn.images for turn in turns[:count])
    return {"input_ids": input_ids, "labels": labels, "images": images, "turns": count}


def pixels(image_processor, pictures):
    """PIL pictures -> float32 (n, 3, S, S)."""
    return image_processor(pictures, return_tensors="pt")["pixel_values"]


class Curriculum:
    """Which fields of the scenes recipe hold for sample number i.

    Args:
        scenes: `recipe.ScenesData`.
        length: samples of the whole run, for ends that are given as fractions.
    """

    def __init__(self, scenes, length):
        names = [field.name for field in fields(Stretch) if field.name != "until"]
        self.base = {name: getattr(scenes, name) for name in names}
        self.ends = [s.until * length if s.until <= 1 else s.until for s in scenes.curriculum]
        self.stretches = [
            {**self.base, **{name: value for name in names if (value := getattr(s, name)) is not None}}
            for s in scenes.curriculum
        ]

    def __call__(self, index):
        for end, stretch in zip(self.ends, self.stretches, strict=True):
            if index < end:
                return stretch
        return self.base


class ScenesDataset(Dataset):
    """Conversations about drawn scenes.

    Within windows of a few batches samples of like length stand together, and the batches in a random order: padding
    would otherwise be two fifths of all positions. Item i is still a function of the seed and i alone.

    Args:
        scenes: `recipe.ScenesData`.
        processor: `VisualRWKVProcessor`.
        max_length: longest sample in tokens.
        length: samples of the whole run.
        batch_size: samples that are padded together.
        foresight: share of conversations whose picture stands below all of their questions.
    """

    def __init__(self, scenes, processor, max_length, length, batch_size=1, foresight=1.0):
        self.scenes, self.processor, self.max_length, self.length = scenes, processor, max_length, length
        self.batch_size, self.foresight = batch_size, foresight
        self.curriculum = Curriculum(scenes, length)
        self._window = (None, None)  # the window last asked for and its samples in their final order

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        window, place = divmod(index, _WINDOW * self.batch_size)
        number, scene, item = self._arranged(window)[place]
        if not item["images"]:
            return {**item, "pixel_values": None}
        picture, zoom = draw(scene), self.curriculum(number)["zoom"]
        if zoom and len(scene.objects) == 1:
            picture = cut_out(picture, scene.objects[0].box, zoom, random.Random(f"{self.scenes.seed} zoom {number}"))
        values = pixels(self.processor.image_processor, [picture])
        return {**item, "pixel_values": values.repeat(item["images"], 1, 1, 1)}

    def _arranged(self, window):
        """(number, scene, item without pixels) of all samples of a window, in the order in which they are learnt."""
        if self._window[0] != window:
            size = _WINDOW * self.batch_size
            samples = []
            for number in range(window * size, min((window + 1) * size, self.length)):
                scene, turns = self.conversation(number)
                foresight = foresees(self.foresight, self.scenes.seed, number)
                item = encode_sample(self.processor, turns, self.max_length, foresight)
                samples.append((number, scene, item))
            samples.sort(key=lambda sample: len(sample[2]["input_ids"]))
            batches = [samples[i : i + self.batch_size] for i in range(0, len(samples), self.batch_size)]
            last = batches.pop() if len(batches[-1]) < self.batch_size else []
            random.Random(f"{self.scenes.seed} window {window}").shuffle(batches)
            self._window = (window, [sample for batch in batches for sample in batch] + last)
        return self._window[1]

    def conversation(self, index):
        """The scene of sample number `index` and the turns about it.

        Some scenes have no question of a wanted kind (nothing to read without a sign, no neighbours of a single
        object): then the next scene of the same random stream is taken.
        """
        scenes, settings = self.scenes, self.curriculum(index)
        rng = scene_rng(scenes.seed, "train", index)
        languages = {"en": 1 - scenes.chinese, "zh": scenes.chinese}
        for _ in range(_SCENE_TRIES):
            scene = sample(rng, scenes, settings, "train")
            questions = conversation(
                scene,
                rng,
                rng.randint(*settings["turns"]),
                kinds=settings["kinds"] or KIND_WEIGHTS,
                languages=languages,
                vary=scenes.vary,
                short_line=scenes.short_line,
                letter_line=scenes.letter_line,
                relations=settings["relations"],
                bases=tuple(settings["bases"] or SHORT_KINDS),
                options=tuple(settings["options"] or OPTIONS),
            )
            if questions:
                break
        else:
            raise InputError(
                f"data.scenes: {_SCENE_TRIES} scenes in a row allow no question of the kinds {settings['kinds']}"
            )
        turns = []
        for question in questions:
            image = int(not scenes.text_only and (not turns or rng.random() < scenes.again))
            turns += [Turn("user", question.text, image), Turn("assistant", question.answer)]
        return scene, turns


def cut_out(picture, box, zoom, rng):
    """The part of a picture around an object, between `zoom[0]` and `zoom[1]` times its box, the object anywhere in it.

    A recurrent model has to learn first that most patches are background. Where an object fills the picture there is
    nothing to be learnt to ignore, and its colour and shape are found within minutes.
    """
    side = max(box[2] - box[0], box[3] - box[1]) * rng.uniform(*zoom)
    edges = []
    for low, high, end in ((box[0], box[2], picture.width), (box[1], box[3], picture.height)):
        length = min(side, end)
        start = rng.uniform(max(0, high - length), min(low, end - length))
        edges.append((round(start), round(start + length)))
    (left, right), (top, bottom) = edges
    return picture.crop((left, top, right, bottom))


def sample(rng, scenes, settings, split):
    """A scene of one stretch of the curriculum, from the lists of objects that belong to the split."""
    return sample_scene(
        rng,
        min_objects=settings["objects"][0],
        max_objects=settings["objects"][1],
        sides=scenes.sides,
        sign_probability=settings["sign_probability"],
        split=split,
    )
