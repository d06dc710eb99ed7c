"""Writes drawn scenes in the layouts of public datasets: LLaVA, VQA v2, ScienceQA and POPE.

The files depend on the seed alone: equal seeds give equal bytes (with the same Pillow version, which encodes them).
"""

import json
import random
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from visualrwkv.errors import InputError
from visualrwkv.scenes import phrases
from visualrwkv.scenes.drawing import draw
from visualrwkv.scenes.questions import SHORT_KINDS, ask, conversation
from visualrwkv.scenes.world import COLOURS, SHAPES, SPLITS, sample_scene, scene_rng, split_of

_INFO = {
    "description": "drawn scenes",
    "version": "1.0",
    "year": 2026,
    "url": "",
    "contributor": "",
    "date_created": "",
}
_TURNS = 4  # questions about one picture, at most
_QUESTION_TYPES = (
    "what color is the",
    "what is the",
    "what is",
    "what",
    "how many",
    "is there a",
    "is there",
    "is the",
    "which",
)
_SUBJECTS = {  # subject, topic, category and skill of a ScienceQA problem
    "colour": ("natural science", "physics", "Light and color", "Name the color of an object"),
    "shape": ("natural science", "physics", "Properties of objects", "Name the shape of an object"),
    "existence": ("natural science", "science-and-engineering-practices", "Observation", "Find an object"),
    "count": ("natural science", "science-and-engineering-practices", "Observation", "Count objects"),
    "compare": ("natural science", "physics", "Properties of objects", "Compare sizes"),
    "relation": ("social science", "geography", "Maps", "Compare the positions of two objects"),
    "neighbour": ("social science", "geography", "Maps", "Find the object in a direction"),
    "read": ("language science", "reading-comprehension", "Signs", "Read a sign"),
}


def write_scenes(out, format="llava", pictures=100, seed=0):
    """Writes pictures and their questions.

    LLaVA is all training, POPE all validation; a fifth of the VQA v2 pictures are validation; ScienceQA is cut
    3 : 1 : 1. Splits have no seed and no list of objects in common, whatever the seeds and formats.

    Args:
        out: a folder that is missing or empty.
        format: "llava", "vqav2", "scienceqa" or "pope".
        pictures: how many, in all splits together.
        seed: any whole number.

    Raises:
        InputError: an argument is not usable or the folder cannot be written.
    """
    if format not in _WRITERS:
        raise InputError(f"format {format!r} is not known; use one of {', '.join(_WRITERS)}")
    if isinstance(pictures, bool) or not isinstance(pictures, int) or pictures < 1:
        raise InputError(f"{pictures!r} pictures asked for; give a whole number from 1 up")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"seed {seed!r} is not a whole number")
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise InputError(f"{out}: the folder is not empty; name a new one")
        with tqdm(total=pictures, desc=f"{format} scenes", unit="picture") as progress:
            _WRITERS[format](out, pictures, seed, progress)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None


def _shares(pictures, **parts):
    """[(split, number of pictures)] by weights, of which the last one is never 0."""
    total = sum(parts.values())
    *first, last = parts
    shares = {name: pictures * parts[name] // total for name in first}
    return [(name, n) for name, n in {**shares, last: pictures - sum(shares.values())}.items() if n]


def _sample(seed, split, index, **limits):
    """The scene of a picture and the random stream that goes on with its questions."""
    rng = scene_rng(seed, split, index)
    return sample_scene(rng, split=split, **limits), rng


def _save(scene, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    # JPEG only where the official layout has it; full colour resolution keeps small objects' edges.
    options = {"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}
    draw(scene).save(path, **options)


def _write_json(path, content, indent=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((json.dumps(content, ensure_ascii=False, indent=indent) + "\n").encode())


def _write_llava(out, pictures, seed, progress):
    """``train.json`` and ``images/*.png``."""
    records = []
    for index in range(pictures):
        scene, rng = _sample(seed, "train", index)
        turns = conversation(scene, rng, _TURNS)
        messages = []
        for i, question in enumerate(turns):
            messages.append({"from": "human", "value": question.text if i else f"<image>\n{question.text}"})
            messages.append({"from": "gpt", "value": question.answer})
        name = f"{index:08d}.png"
        _save(scene, out / "images" / name)
        records.append({"id": f"train-{seed}-{index}", "image": name, "conversations": messages})
        progress.update()
    _write_json(out / "train.json", records)


def _write_vqav2(out, pictures, seed, progress):
    """Questions, annotations and a picture folder per split, under the official names."""
    first = 1
    for part, number in _shares(pictures, train=4, val=1):
        questions, annotations = [], []
        for index in range(number):
            scene, rng = _sample(seed, part, index, min_objects=2)
            image_id = first + index
            asked = conversation(
                scene, rng, _TURNS - 1, kinds=dict.fromkeys(SHORT_KINDS, 1), languages=("en",), short_line=0
            )
            for i, question in enumerate(asked):
                number_of = {"image_id": image_id, "question_id": image_id * 1000 + i}
                questions.append({**number_of, "question": question.text})
                annotations.append({**_annotation(question), **number_of})
            _save(scene, out / f"{part}2014" / _coco_name(part, image_id))
            progress.update()
        first += number
        head = {"info": _INFO, "license": {"url": "", "name": ""}, "data_type": "mscoco", "data_subtype": f"{part}2014"}
        _write_json(
            out / f"v2_OpenEnded_mscoco_{part}2014_questions.json",
            {**head, "task_type": "Open-Ended", "questions": questions},
        )
        _write_json(out / f"v2_mscoco_{part}2014_annotations.json", {**head, "annotations": annotations})


def _annotation(question):
    """The answer of a question in VQA v2's words: all ten people agree."""
    answer = question.answer
    kind = "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"
    wording = question.text.lower()
    return {
        "question_type": next((start for start in _QUESTION_TYPES if wording.startswith(start)), "none of the above"),
        "multiple_choice_answer": answer,
        "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)],
        "answer_type": kind,
    }


def _coco_name(split, image_id):
    return f"COCO_{split}2014_{image_id:012d}.jpg"


def _write_scienceqa(out, pictures, seed, progress):
    """``problems.json``, ``pid_splits.json``, ``images/<split>/<id>/image.png``; every tenth problem has no picture."""
    problems, ids = {}, {name: [] for name in SPLITS}
    for part, number in _shares(pictures, train=3, val=1, test=1):
        for index in range(number):
            if len(problems) % 10 == 4:
                text_rng = random.Random(f"visualrwkv text problem/{part}/{seed}/{index}")
                _add_problem(problems, ids, part, _text_problem(text_rng, part))
            problem, scene = _picture_problem(seed, part, index)
            pid = _add_problem(problems, ids, part, problem)
            _save(scene, out / "images" / part / pid / "image.png")
            progress.update()
    _write_json(out / "problems.json", problems)
    mini = {f"mini{part}": members[: max(1, len(members) // 10)] for part, members in ids.items()}
    _write_json(out / "pid_splits.json", {**ids, "trainval": ids["train"] + ids["val"], **mini})


def _add_problem(problems, ids, part, problem):
    pid = str(len(problems) + 1)
    problems[pid] = {**problem, "split": part}
    ids[part].append(pid)
    return pid


def _picture_problem(seed, part, index):
    """A multiple-choice problem about a scene that allows a question of a randomly chosen kind."""
    rng = scene_rng(seed, part, index)
    kind = rng.choice(SHORT_KINDS)
    question = None
    while question is None:
        scene = sample_scene(rng, split=part, min_objects=2)
        question = ask(scene, rng, "choice", "en", bases=(kind,))
    hint = "Look at the picture." if rng.random() < 0.3 else ""
    text = question.text.split("\n")[0]
    answer = phrases.LETTERS.index(question.answer)
    return _problem(rng, question.base, text, question.options, answer, hint, "image.png"), scene


def _text_problem(rng, part):
    """A problem whose hint tells what a picture would show."""
    while True:
        colours, shapes = rng.sample(tuple(COLOURS), 3), rng.sample(SHAPES, 3)
        if split_of(f"{colour} {shape}" for colour, shape in zip(colours, shapes, strict=True)) == part:
            break
    things = [
        phrases.article(phrases.object_name("en", colour, shape)) for colour, shape in zip(colours, shapes, strict=True)
    ]
    i = rng.randrange(3)
    kind = rng.choice(("colour", "shape"))
    text = f"What color is the {shapes[i]}?" if kind == "colour" else f"What shape is the {colours[i]} object?"
    right = colours[i] if kind == "colour" else shapes[i]
    choices = list(colours if kind == "colour" else shapes)
    rng.shuffle(choices)
    hint = f"A box holds {things[0]}, {things[1]} and {things[2]}."
    return _problem(rng, kind, text, choices, choices.index(right), hint, None)


def _problem(rng, kind, text, choices, answer, hint, image):
    subject, topic, category, skill = _SUBJECTS[kind]
    return {
        "question": text,
        "choices": list(choices),
        "answer": answer,
        "hint": hint,
        "image": image,
        "task": "yes or no" if set(choices) == {"yes", "no"} else "closed choice",
        "grade": f"grade{rng.randint(1, 12)}",
        "subject": subject,
        "topic": topic,
        "category": category,
        "skill": skill,
        "lecture": "",
        "solution": f"The answer is {choices[answer]}.",
    }


def _write_pope(out, pictures, seed, progress):
    """``coco_pope_{random,popular,adversarial}.json`` over one folder of pictures, as many yes as no."""
    scenes = []
    for index in range(pictures):
        scene, rng = _sample(seed, "val", index, min_objects=2)
        name = _coco_name("val", index + 1)
        _save(scene, out / "val2014" / name)
        scenes.append((name, {(thing.colour, thing.shape) for thing in scene.shapes}, rng))
        progress.update()
    everything = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    frequency = Counter(pair for _, present, _ in scenes for pair in sorted(present))
    popular = sorted(everything, key=lambda pair: -frequency[pair])
    lines = {"random": [], "popular": [], "adversarial": []}
    for name, present, rng in scenes:
        yes = sorted(present)
        rng.shuffle(yes)
        yes = yes[:3]
        for category, records in lines.items():
            absent = [pair for pair in (popular if category == "popular" else everything) if pair not in present]
            if category != "popular":
                rng.shuffle(absent)
            if category == "adversarial":  # made of what is there: both words occur, then one of them
                absent.sort(key=lambda pair: -any(pair[0] == c for c, _ in yes) - any(pair[1] == s for _, s in yes))
            for pair_yes, pair_no in zip(yes, absent, strict=False):
                for pair, label in ((pair_yes, "yes"), (pair_no, "no")):
                    text = f"Is there {phrases.article(phrases.object_name('en', *pair))} in the image?"
                    records.append({"question_id": len(records) + 1, "image": name, "text": text, "label": label})
    for category, records in lines.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (out / f"coco_pope_{category}.json").write_bytes(text.encode())


_WRITERS = {"llava": _write_llava, "vqav2": _write_vqav2, "scienceqa": _write_scienceqa, "pope": _write_pope}
