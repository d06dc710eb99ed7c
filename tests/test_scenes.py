"""Drawn scenes: the geometry keeps its rules, and an independent reader of the questions agrees with the answers."""

import random
import re
from collections import Counter

import numpy as np
import pytest
from scene_reader import expected, parse, the

from visualrwkv import scenes
from visualrwkv.errors import InputError
from visualrwkv.prompt import SHORT_ANSWER
from visualrwkv.scenes import phrases
from visualrwkv.scenes.descriptions import left_to_right
from visualrwkv.scenes.world import COLOURS, SHAPES, SIZES, Object, Sign, is_valid


def sample(index, **limits):
    return scenes.sample_scene(random.Random(index), **limits)


@pytest.fixture(scope="module")
def many():
    return [sample(index) for index in range(600)]


# --- the world


def test_scenes_keep_the_rules(many):
    for scene in many:
        short = min(scene.width, scene.height)
        assert 96 <= short and max(scene.width, scene.height) <= 512
        assert 3 / 4 <= scene.width / scene.height <= 4 / 3
        assert 1 <= len(scene.objects) <= 6 and scene.noise <= 8
        assert sum(isinstance(thing, Sign) for thing in scene.objects) <= 1
        named = [(thing.colour, thing.shape, thing.size) for thing in scene.shapes]
        assert len(set(named)) == len(named)
        for i, thing in enumerate(scene.objects):
            x0, y0, x1, y1 = thing.box
            assert x0 >= 0 and y0 >= 0 and x1 <= scene.width and y1 <= scene.height
            for other in scene.objects[:i]:
                a0, b0, a1, b1 = other.box
                assert max(a0 - x1, x0 - a1, b0 - y1, y0 - b1) >= 0.03 * short - 1e-6
            if isinstance(thing, Sign):
                assert 0.25 <= thing.height / short + 1e-3 and thing.height / short <= 0.311
                continue
            low, high = {"small": (0.13, 0.17), "large": (0.25, 0.31)}[thing.size]
            assert low - 1e-3 <= max(x1 - x0, y1 - y0) / short <= high + 1e-3
            assert all(abs(a - b) <= 18 for a, b in zip(thing.rgb, COLOURS[thing.colour], strict=True))
            assert abs(thing.rotation) <= 20
            assert thing.rotation == 0 or thing.shape in ("triangle", "star", "square", "hexagon", "cross")
    counts = Counter(len(scene.objects) for scene in many)
    assert all(counts[n] > 60 for n in range(1, 7))
    assert 0.28 < sum(scene.sign is not None for scene in many) / len(many) < 0.42
    assert {thing.colour for scene in many for thing in scene.shapes} == set(COLOURS)
    assert {thing.shape for scene in many for thing in scene.shapes} == set(SHAPES)


def test_limits_of_sampling():
    for index in range(50):
        scene = sample(index, min_objects=2, max_objects=3, sides=(128, 160), sign_probability=1.0)
        assert 2 <= len(scene.objects) <= 3 and 128 <= scene.width <= 160 and 128 <= scene.height <= 160
        assert scene.sign is not None
    for wrong in ({"min_objects": 0}, {"max_objects": 7}, {"min_objects": 3, "max_objects": 2}, {"sides": (300, 200)}):
        with pytest.raises(InputError):
            sample(0, **wrong)
    with pytest.raises(InputError, match="split 'dev'"):
        sample(0, split="dev")


def test_equal_seeds_give_equal_bytes():
    for index in range(20):
        scene = scenes.sample_scene(scenes.scene_rng(3, "train", index))
        again = scenes.sample_scene(scenes.scene_rng(3, "train", index))
        assert scene == again and scenes.draw(scene).tobytes() == scenes.draw(again).tobytes()
        assert scenes.conversation(scene, random.Random(index), 4) == scenes.conversation(
            again, random.Random(index), 4
        )
        assert scenes.draw(scene).size == (scene.width, scene.height) and scenes.draw(scene).mode == "RGB"
    assert scenes.sample_scene(scenes.scene_rng(3, "val", 0)) != scenes.sample_scene(scenes.scene_rng(3, "train", 0))


@pytest.mark.parametrize("shape", SHAPES)
def test_drawn_pixels_fill_the_box(shape):
    for rotation, style in ((0.0, 0.0), (17.0, 0.6), (-20.0, 1.0)):
        thing = Object("red", shape, "large", COLOURS["red"], 100.3, 120.7, 60.0, rotation, style)
        scene = scenes.Scene(200, 240, "white", (255,) * 3, (255,) * 3, 0, False, 0, (thing,))
        marked = np.asarray(scenes.draw(scene).convert("L")) < 180
        rows, columns = np.flatnonzero(marked.any(1)), np.flatnonzero(marked.any(0))
        drawn = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        # A sharp tip covers less than half of its last pixels.
        assert np.allclose(drawn, thing.box, atol=3.0)
        assert max(thing.box[2] - thing.box[0], thing.box[3] - thing.box[1]) == pytest.approx(60)
        centre = scenes.draw(scene).getpixel((100, 120))
        assert centre == ((255, 255, 255) if shape == "ring" else COLOURS["red"])


def test_noise_stays_within_its_amplitude(many):
    scene = next(scene for scene in many if scene.noise > 4 and scene.top == scene.bottom == (225, 225, 225))
    corner = np.asarray(scenes.draw(scene)).astype(int)[:2, :2]
    assert abs(corner - 225).max() <= scene.noise


# --- questions


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("vary", [0.0, 1.0])
def test_an_independent_reader_agrees(many, language, vary):
    kinds = Counter()
    rng = random.Random(5)
    for scene in many:
        for question in scenes.questions(scene, rng, languages=(language,), vary=vary):
            kinds[question.kind] += 1
            assert question.language == language
            if question.kind == "describe":
                continue
            answer = expected(scene, question)
            if question.kind == "choice":
                lines = question.text.split("\n")
                assert lines[1:-1] == [f"{'ABCDE'[i]}. {option}" for i, option in enumerate(question.options)]
                assert 2 <= len(question.options) <= 5 and len(set(question.options)) == len(question.options)
                assert (
                    lines[-1]
                    == {
                        "en": "Answer with the option's letter from the given choices directly.",
                        "zh": "请直接回答选项字母。",
                    }[language]
                )
                assert question.options["ABCDE".index(question.answer)] == answer
            else:
                assert question.answer == answer
    assert set(kinds) == set(scenes.KINDS) and min(kinds.values()) > 60


def test_a_told_choice_says_its_answer(many):
    for seed, scene in enumerate(many[:200]):
        question = scenes.ask(scene, random.Random(seed), "told", ("en", "zh")[seed % 2])
        asked, *options, _ = question.text.split("\n")
        letter, said = next(option for option in options if option.startswith(question.answer)).split(". ", 1)
        assert letter == question.answer and asked.endswith(f" {said}")


def test_places_are_seen_from_the_middle_or_from_another_object(many):
    """An independent reading of the picture's list of objects: the axis along which two centres differ most decides."""
    answers, asked = Counter(), Counter()
    for seed, scene in enumerate(many):
        question = scenes.ask(scene, random.Random(seed), "place", vary=0, short_line=0)
        if question is None:
            continue
        named = {f"{a.colour} {a.shape}": a for a in scene.shapes} | {a.key: a for a in scene.shapes}
        name, other = re.fullmatch(r"Where is the (.+?)(?:, seen from the (.+))?\?", question.text).groups()
        a = named[name]
        x, y = (named[other].cx, named[other].cy) if other else (scene.width / 2, scene.height / 2)
        dx, dy = a.cx - x, a.cy - y
        told = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("below" if dy > 0 else "above")
        assert question.answer == told
        assert max(abs(dx), abs(dy)) >= 0.15 * min(scene.width, scene.height)
        answers[told] += 1
        asked[other is None] += 1
        chinese = scenes.ask(scene, random.Random(seed), "place", "zh", vary=0)
        assert chinese.answer in ("左边", "右边", "上面", "下面")
    assert set(answers) == {"left", "right", "above", "below"} and min(asked.values()) > 50


def test_usual_wordings():
    a = Object("red", "circle", "small", COLOURS["red"], 30, 100, 30)
    b = Object("orange", "star", "large", COLOURS["orange"], 150, 100, 56)
    sign = Sign("42", (255, 255, 255), (0, 0, 0), None, 100, 30, 60, 55, 0.7)
    scene = scenes.Scene(200, 200, "white", (255,) * 3, (255,) * 3, 0, False, 0, (b, sign, a))
    assert is_valid(scene)
    texts = {"en": set(), "zh": set()}
    for seed in range(200):
        for question in scenes.questions(scene, random.Random(seed), languages=("en", "zh"), vary=0, short_line=0):
            texts[question.language].add((question.text, question.answer))
    assert {
        ("What color is the circle?", "red"),
        ("What color is the small circle?", "red"),
        ("What shape is the orange object?", "star"),
        ("Is there an orange star?", "yes"),
        ("How many circles are there?", "1"),
        ("How many objects are there?", "3"),
        ("How many red objects are there?", "1"),
        ("Is the red circle to the left of the orange star?", "yes"),
        ("Is the red circle to the right of the orange star?", "no"),
        ("Which is larger, the red circle or the orange star?", "orange star"),
        ("What number is on the sign?", "42"),
        (
            "Describe the image.",
            "The image shows, from left to right, a small red circle, a sign with the number 42 and a large orange "
            "star.",
        ),
    } <= texts["en"]
    assert {
        ("圆形是什么颜色的？", "红色"),
        ("红色的物体是什么形状？", "圆形"),
        ("图中有红色的圆形吗？", "有"),
        ("图中有几个圆形？", "1"),
        ("红色的圆形在橙色的五角星的左边吗？", "是"),
        ("红色的圆形和橙色的五角星哪个更大？", "橙色的五角星"),
        ("牌子上写的是什么？", "42"),
        ("描述这张图片。", "图中从左到右有一个小的红色的圆形、一个写着42的牌子和一个大的橙色的五角星。"),
    } <= texts["zh"]
    # The sign lies between the two, so neither has exactly one thing to its side.
    assert not any(text.startswith("What is to the") for text, _ in texts["en"])


def test_answers_are_balanced(many):
    rng = random.Random(1)
    answers = Counter()
    for scene in many * 3:
        for question in scenes.conversation(scene, rng, 4, languages=("en",)):
            answers[question.base or question.kind, question.options and "choice", question.answer] += 1
    for kind in ("existence", "relation"):
        yes, no = answers[kind, None, "yes"], answers[kind, None, "no"]
        assert yes + no > 200 and 0.42 < yes / (yes + no) < 0.58
    assert {answer for kind, _, answer in answers if kind == "count"} >= set("0123456")
    wordings = Counter(
        parse(question)[0] == "existence" and question.text == f"Is there {phrases.article(slots)}?"
        for scene in many
        for question in scenes.questions(scene, rng, ("existence",), ("en",), short_line=0)
        for slots in [parse(question)[1]["an"].split(" ", 1)[1]]
    )
    assert 0.4 < wordings[True] / sum(wordings.values()) < 0.6


def test_conversations_give_nothing_away(many):
    rng = random.Random(2)
    turns = []
    for scene in many:
        asked = scenes.conversation(scene, rng, 8, languages=("en",), vary=0, short_line=0)
        assert asked
        turns.append(len(asked))
        if any(question.kind == "describe" for question in asked):
            assert len(asked) == 1
            continue
        for question in asked:
            others = [other for other in asked if other is not question]
            assert all(question.fits(other) for other in others)
            read = " ; ".join(
                f"{other.text.splitlines()[0]} {'' if other.options else other.answer}" for other in others
            )
            kind = question.base or question.kind
            answer = question.options["ABCDE".index(question.answer)] if question.options else question.answer
            if kind in ("colour", "shape"):
                thing = the(scene, parse(question)[1]["a"])
                assert f"{thing.colour} {thing.shape}" not in read
                assert not (kind == "colour" and f"What shape is the {answer} object" in read)
            elif kind == "neighbour":
                assert answer not in read
            elif kind == "existence":
                assert parse(question)[1]["an"].split(" ", 1)[1] not in read
            elif question.text.startswith("How many objects"):
                assert not any(thing.shape in read for thing in scene.shapes)
    assert 2.5 < sum(turns) / len(turns)


def test_short_line_and_refusals(many):
    assert phrases.SHORT_LINE == SHORT_ANSWER  # the scenes stand alone, and the prompt knows the line by its words
    lined = [
        question.text.endswith("\nAnswer the question using a single word or phrase.")
        for scene in many[:200]
        for question in scenes.questions(scene, random.Random(0), ("colour", "count"), ("en",), short_line=0.5)
    ]
    assert 0.4 < sum(lined) / len(lined) < 0.6
    for share, low, high in ((1.0, 1, 1), (0.5, 0.4, 0.6), (0.0, 0, 0)):
        asked = [
            scenes.ask(scene, random.Random(seed), "choice", "en", letter_line=share)
            for seed, scene in enumerate(many[:200])
        ]
        asked = [question for question in asked if question]
        lined = [question.text.endswith("letter from the given choices directly.") for question in asked]
        assert low <= sum(lined) / len(lined) <= high
        for question, line in zip(asked, lined, strict=True):
            assert len(question.text.split("\n")) == 1 + len(question.options) + line
    scene = many[0]
    with pytest.raises(InputError, match="smell"):
        scenes.questions(scene, random.Random(0), kinds=("smell",))
    with pytest.raises(InputError, match="fr"):
        scenes.conversation(scene, random.Random(0), 2, languages={"fr": 1})
    with pytest.raises(InputError, match="0 turns"):
        scenes.conversation(scene, random.Random(0), 0)
    with pytest.raises(InputError, match="weight"):
        scenes.conversation(scene, random.Random(0), 1, kinds={"count": 0})
    with pytest.raises(InputError, match="base"):
        scenes.ask(scene, random.Random(0), "choice", bases=("describe",))


# --- whole-picture texts


def test_descriptions_go_from_left_to_right(many):
    for scene in many[:200]:
        text = scenes.describe(scene)
        places = []
        for thing in sorted(scene.objects, key=lambda thing: thing.cx):
            if isinstance(thing, Sign):
                assert text.count(f" {thing.text}") == 1 or thing.text in "AI"
                places.append(text.index("sign with"))
            else:
                places.append(text.index(f"{thing.size} {thing.colour} {thing.shape}"))
        assert places == sorted(places)
        assert text.count(".") == 1 and scenes.describe(scene, "zh").count("一个") == len(scene.objects)


def test_patch_captions_name_what_a_patch_shows(many):
    rng = random.Random(3)
    for scene in many[:150]:
        captions = scenes.patch_captions(scene, (8, 8), rng)
        assert len(dict(captions)) == len(captions)
        for patch, caption in captions:
            row, column = divmod(patch, 8)
            left, right = scene.width * column / 8, scene.width * (column + 1) / 8
            top, bottom = scene.height * row / 8, scene.height * (row + 1) / 8
            touching = [
                t
                for t in scene.objects
                if t.box[0] <= right and t.box[2] >= left and t.box[1] <= bottom and t.box[3] >= top
            ]
            if caption.endswith(" background"):
                assert not touching and caption == f"{scene.background} background"
                continue
            inside = [t for t in scene.objects if left <= t.cx <= right and top <= t.cy <= bottom]
            assert bool(inside) != caption.startswith("part of")
            name = [
                f"the {'number' if t.is_number else 'letter'} {t.text}" if isinstance(t, Sign) else t.key
                for t in inside or touching
            ]
            assert any(caption.endswith(part) for part in name)
    spread = scenes.patch_captions(scene, (64, 64), rng)
    assert sum(not c.startswith("part of") and not c.endswith(" background") for _, c in spread) == len(scene.objects)


def test_all_texts_cover_every_word(many):
    known = set(re.findall(r"[A-Za-z0-9']+|[^\x00-\x7f]", "\n".join(scenes.all_texts())))
    rng = random.Random(4)
    for scene in many:
        said = [scenes.describe(scene), scenes.describe(scene, "zh")]
        said += [caption for _, caption in scenes.patch_captions(scene, (8, 8), rng)]
        said += [text for q in scenes.conversation(scene, rng, 6) for text in (q.text, q.answer)]
        assert set(re.findall(r"[A-Za-z0-9']+|[^\x00-\x7f]", "\n".join(said))) <= known


# --- splits


def test_splits_share_no_list_of_objects():
    found = {}
    for split in ("train", "val", "test"):
        drawn = [scenes.sample_scene(scenes.scene_rng(0, split, i), max_objects=2, split=split) for i in range(300)]
        found[split] = {tuple(sorted(thing.key for thing in scene.objects)) for scene in drawn}
    assert not (found["train"] & found["val"] or found["train"] & found["test"] or found["val"] & found["test"])


def test_names_of_sizes_and_order():
    assert set(SIZES) == {"small", "large"}
    scene = sample(3, min_objects=6)
    assert [thing.cx for thing in left_to_right(scene)] == sorted(thing.cx for thing in scene.objects)
