"""How many questions about unseen drawn scenes a model answers rightly, by kind of question.

Every question is asked alone, as a user would. `python -m visualrwkv.scenes.accuracy MODEL --pictures N` prints the
table of the embedded model's card; `--blind` shows a gray picture instead, which tells what the questions alone give
away, and `--follow-up` asks each question second in a conversation, when the picture is only in the state.
"""

import argparse
import json
import re
import sys
from collections import Counter

from PIL import Image
from tqdm import tqdm

from visualrwkv.errors import InputError, error_line
from visualrwkv.scenes.drawing import draw
from visualrwkv.scenes.questions import KINDS, SHORT_KINDS, questions
from visualrwkv.scenes.world import sample_scene, scene_rng

GRAY = (128, 128, 128)
_FRAME = re.compile(r"^(the image shows,? ?(from left to right, ?)?|图中(从左到右)?有)")
_BETWEEN = re.compile(r",\s*| and |、|和")


def evaluate_scenes(
    model, processor, pictures, seed, blind=False, batch_size=64, objects=(1, 6), split="test", progress=False
):
    """Asks one question of each kind that a scene allows.

    Args:
        model, processor: as in `visualrwkv.chat.VisualRWKV`; the model is left in evaluation mode.
        pictures: number of scenes.
        seed: of the scenes.
        blind: show a gray picture of the same size instead.
        batch_size: questions answered at a time.
        objects: fewest and most objects in a scene.
        split: "val" or "test"; "train" would show scenes that training may have shown.
        progress: show a bar on stderr.

    Returns:
        {kind: (right, asked)} for each of `KINDS`.
    """
    from visualrwkv.chat import VisualRWKV

    vlm = VisualRWKV(model, processor)
    asked = list(_questions(pictures, seed, blind, objects, split))
    # answers of like length together: a batch runs until its longest answer ends
    asked.sort(key=lambda entry: (entry[1].kind == "describe", len(entry[1].text)))

    def replies():
        for start in range(0, len(asked), batch_size):
            shown, batch = zip(*asked[start : start + batch_size], strict=True)
            longest = 160 if any(question.kind == "describe" for question in batch) else 16
            said = vlm.ask(list(shown), [question.text for question in batch], max_new_tokens=longest)
            yield from zip(batch, said, strict=True)

    return _tally(replies(), len(asked), progress)


def evaluate_follow_ups(model, processor, pictures, seed, look_again=False, progress=False):
    """Asks the short-answer questions of `evaluate_scenes` second in a conversation, behind another one about the same
    picture that does not give the answer away.

    Args:
        look_again: show the picture once more with the second question; otherwise the state has to remember it.

    Returns:
        {kind: (right, asked)} for each of `KINDS`; questions without a fitting other one are left out.
    """
    from visualrwkv.chat import VisualRWKV

    vlm = VisualRWKV(model, processor)
    scenes = {}
    for picture, question in _questions(pictures, seed):
        if question.kind != "describe":
            scenes.setdefault(id(picture), (picture, []))[1].append(question)
    pairs = []
    for picture, asked in scenes.values():
        for number, question in enumerate(asked):
            others = asked[number + 1 :] + asked[:number]
            pairs += [(picture, other, question) for other in others if other.fits(question)][:1]

    def replies():
        for picture, other, question in pairs:
            chat = vlm.chat()
            chat.say(other.text, picture, max_new_tokens=16)
            yield question, chat.say(question.text, look_again=look_again, max_new_tokens=16)

    return _tally(replies(), len(pairs), progress)


def _questions(pictures, seed, blind=False, objects=(1, 6), split="test"):
    for index in range(pictures):
        rng = scene_rng(seed, split, index)
        scene = sample_scene(rng, min_objects=objects[0], max_objects=objects[1], split=split)
        picture = Image.new("RGB", (scene.width, scene.height), GRAY) if blind else draw(scene)
        for question in questions(scene, rng):
            yield picture, question


def _tally(replies, total, progress):
    """{kind: (right, asked)} of (question, reply) pairs, counted as they come."""
    right, asked = Counter(), Counter()
    for question, reply in tqdm(replies, total=total, unit="question", disable=not progress):
        asked[question.kind] += 1
        right[question.kind] += is_right(question.kind, question.answer, reply)
    return {kind: (right[kind], asked[kind]) for kind in KINDS}


def is_right(kind, answer, reply):
    """Exact match after normalisation; a description is right if it names the same things, in any order."""
    if kind == "describe":
        return named(reply) == named(answer)
    return normalise(reply) == normalise(answer)


def normalise(text):
    """Lower case, single spaces, no period at the end."""
    return " ".join(text.lower().split()).rstrip(".。").rstrip()


def named(text):
    """What a description names, sorted."""
    return sorted(_BETWEEN.split(_FRAME.sub("", normalise(text))))


def shares(counts):
    """{kind: share of right answers} of the kinds that were asked, and "short": over all short-answer questions."""
    result = {kind: round(right / asked, 4) for kind, (right, asked) in counts.items() if asked}
    short = [counts[kind] for kind in (*SHORT_KINDS, "choice")]
    total = sum(asked for _, asked in short)
    return result | ({"short": round(sum(right for right, _ in short) / total, 4)} if total else {})


def main(argv=None):
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m visualrwkv.scenes.accuracy", description=__doc__.split("\n")[0])
    parser.add_argument("model", metavar="MODEL", nargs="?", help="as in visualrwkv.load; the embedded one by default")
    parser.add_argument("--pictures", metavar="N", type=int, default=200)
    parser.add_argument("--seed", metavar="S", type=int, default=0)
    parser.add_argument("--blind", action="store_true", help="show a gray picture instead")
    parser.add_argument("--follow-up", action="store_true", help="ask each question second in a conversation")
    parser.add_argument("--look-again", action="store_true", help="and show the picture once more with it")
    parser.add_argument("--batch-size", metavar="B", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="print counts and shares as one JSON object")
    arguments = parser.parse_args(argv)
    try:
        for name in ("pictures", "batch_size"):
            if getattr(arguments, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: give a number from 1 up")
        if arguments.follow_up and arguments.blind or arguments.look_again and not arguments.follow_up:
            raise InputError("--look-again goes with --follow-up, and --blind with neither; leave one out")
        counts = _measure(arguments)
    except InputError as error:
        print(error_line(error), file=sys.stderr)
        return 2
    result = shares(counts)
    if arguments.json:
        asked = {name: getattr(arguments, name) for name in ("blind", "follow_up", "look_again", "seed")}
        print(json.dumps({"counts": counts, "shares": result} | asked))
        return 0
    for kind, share in result.items():
        of = f"{counts[kind][0]}/{counts[kind][1]}" if kind in counts else ""
        print(f"{kind:10} {share:6.1%}  {of}")
    return 0


def _measure(arguments):
    from visualrwkv.loading import load

    vlm = load(arguments.model)
    what = (vlm.model, vlm.processor, arguments.pictures, arguments.seed)
    if arguments.follow_up:
        return evaluate_follow_ups(*what, look_again=arguments.look_again, progress=True)
    return evaluate_scenes(*what, blind=arguments.blind, batch_size=arguments.batch_size, progress=True)


if __name__ == "__main__":
    sys.exit(main())
