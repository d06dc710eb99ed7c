"""ask and stream: one way to an answer, whatever the door."""

from itertools import count

import numpy as np
import pytest
import torch

import visualrwkv
from visualrwkv import InputError

SHORT = {"max_new_tokens": 12}
QUESTIONS = ["What is the colour?", "What?", "What is it, 在哪里?", "How many objects do you see in the picture?"]


def test_ask_accepts_every_kind_of_picture(vlm, pictures, picture_file):
    expected = vlm.ask(pictures[0], "What?", **SHORT)
    for source in (str(picture_file), picture_file, picture_file.read_bytes(), np.asarray(pictures[0]), [pictures[0]]):
        assert vlm.ask(source, "What?", **SHORT) == expected
    assert vlm.ask(pictures[1], "What?", **SHORT) != expected


def test_a_batch_equals_single_questions(vlm, pictures):
    entries = [pictures[0], [pictures[1], pictures[2]], None, [pictures[3]]]
    batch = vlm.ask(entries, QUESTIONS, **SHORT)
    assert batch == [vlm.ask(entry, question, **SHORT) for entry, question in zip(entries, QUESTIONS, strict=True)]
    assert len(set(batch)) == len(batch)


def test_one_picture_serves_several_questions(vlm, pictures):
    answers = vlm.ask(pictures[0], QUESTIONS[:2], **SHORT)
    assert answers == [vlm.ask(pictures[0], question, **SHORT) for question in QUESTIONS[:2]]
    assert vlm.ask([], []) == []


def test_stream_equals_ask(vlm, pictures):
    for question in QUESTIONS:
        pieces = list(vlm.stream(pictures[0], question, **SHORT))
        assert "".join(pieces) == vlm.ask(pictures[0], question, **SHORT)
        assert len(pieces) > 1


def test_a_stream_computes_nothing_that_nobody_asks_for(vlm, pictures, monkeypatch):
    calls, forward = [], vlm.model.forward
    monkeypatch.setattr(vlm.model, "forward", lambda **inputs: calls.append(inputs) or forward(**inputs))
    stream = vlm.stream(pictures[0], "What?", max_new_tokens=400)
    assert not calls
    next(stream)
    before = len(calls)
    assert before < 20
    next(stream)
    assert before < len(calls) < before + 20
    stream.close()


def test_an_error_while_streaming_reaches_the_reader(vlm, pictures, monkeypatch):
    monkeypatch.setattr(vlm.model, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(vlm.stream(pictures[0], "What?"))


def test_sampling_repeats_with_a_seed_and_leaves_the_global_generator_alone(vlm, pictures):
    options = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.9}
    before = torch.get_rng_state()
    answers = [vlm.ask(pictures[0], "What?", seed=seed, **options) for seed in (1, 1, 2, 3)]
    assert torch.equal(torch.get_rng_state(), before)
    assert answers[0] == answers[1]
    assert len(set(answers)) > 1
    assert "".join(vlm.stream(pictures[0], "What?", seed=1, **options)) == answers[0]


@pytest.mark.parametrize(
    ("image", "question", "options", "words"),
    [
        ("nowhere.png", "What?", {}, "nowhere.png"),
        (b"text", "What?", {}, "image"),
        (None, "", {}, "empty"),
        (None, "  \n", {}, "empty"),
        (None, "What is <image>?", {}, "<image>"),
        (None, "What?", {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (None, "What?", {"temperature": -1}, "temperature is -1"),
        (None, "What?", {"temperature": "hot"}, "temperature is 'hot'"),
        (None, "What?", {"temperature": float("nan")}, "temperature is nan"),
        (None, "What?", {"top_p": 0}, "top_p is 0"),
        (None, "What?", {"top_p": 1.5}, "top_p is 1.5"),
        (None, "What?", {"top_k": -1}, "top_k is -1"),
        (None, "What?", {"seed": 1.5}, "seed is 1.5"),
        (None, "What?", {"seed": 2**70}, "seed is"),
        (None, "What?", {"presence_penalty": 3}, "presence_penalty is 3"),
        (None, "What?", {"frequency_penalty": None}, "frequency_penalty is None"),
        (None, "What?", {"penalty_decay": 1.1}, "penalty_decay is 1.1"),
        (None, "What?", {"stop": ""}, "stop is ''"),
        (None, "What?", {"stop": ["a", 3]}, "stop is ['a', 3]"),
        (None, "What?", {"beams": 3}, "beams"),
        ([None, None, None], ["a", "b"], {}, "3 pictures for 2 questions"),
        (None, None, {}, "must be a string, or a list of strings, got NoneType"),
        (None, {"What?": 1}, {}, "got dict"),
        (None, b"What?", {}, "got bytes"),
    ],
)
def test_bad_input_is_refused_on_one_line(vlm, image, question, options, words):
    with pytest.raises(InputError) as caught:
        vlm.ask(image, question, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_image_of_900_million_pixels_is_refused_unread(vlm, huge_png):
    with pytest.raises(InputError, match="pixels, the limit is"):
        vlm.ask(huge_png, "What?")


def test_the_limit_of_pixels_is_that_of_the_processor(random_folder, pictures):
    vlm = visualrwkv.load(random_folder)
    vlm.processor.image_processor.max_pixels = 10
    for act in (lambda: vlm.ask(pictures[0], "What?"), lambda: vlm.chat().say("What?", pictures[0])):
        with pytest.raises(InputError, match="the limit is 1e-05 million"):
            act()


def test_a_model_that_computes_no_numbers_is_refused(random_folder, pictures):
    """Its likeliest token would be the first one of the vocabulary, which ends a reply: an empty answer."""
    vlm = visualrwkv.load(random_folder)
    with torch.no_grad():
        vlm.model.rwkv.blocks[0].att.output.weight[3, 5] = torch.nan
    chat = vlm.chat()
    for ask in (
        lambda: vlm.ask(pictures, QUESTIONS),
        lambda: vlm.ask(pictures[0], "What?", temperature=1.0),
        lambda: list(vlm.stream(pictures[0], "What?")),
        lambda: chat.say("What?"),
    ):
        with pytest.raises(InputError, match="NaN.*float32"):
            ask()
    assert chat.transcript == []


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}])
def test_numbers_that_leave_their_range_within_a_reply_end_it(random_folder, pictures, sampling):
    """As float16's may; tokens chosen from then on would be made up."""
    vlm = visualrwkv.load(random_folder)
    calls = count()
    vlm.model.rwkv.head.register_forward_hook(lambda *x: x[-1] * torch.nan if next(calls) % 3 == 2 else None)
    chat = vlm.chat()
    for ask in (lambda: vlm.ask(pictures, QUESTIONS, **sampling), lambda: chat.say("What?", **sampling)):
        with pytest.raises(InputError, match="NaN.*float32"):
            ask()
    assert chat.transcript == []


def test_stop_strings_end_a_reply_however_it_is_asked_for(vlm, pictures):
    free = vlm.ask(pictures[0], QUESTIONS[0], max_new_tokens=24)
    for start in range(0, len(free) - 3, 3):
        stop = free[start : start + 3]
        if not stop.strip():
            continue
        expected = free[: free.index(stop)].strip()
        options = {"max_new_tokens": 24, "stop": ["never", stop]}
        assert vlm.ask(pictures[0], QUESTIONS[0], **options) == expected
        pieces = list(vlm.stream(pictures[0], QUESTIONS[0], **options))
        assert "".join(pieces) == expected
        entries, questions = [pictures[0], pictures[1], None], [QUESTIONS[0], QUESTIONS[1], QUESTIONS[0]]
        singles = [vlm.ask(entry, text, **options) for entry, text in zip(entries, questions, strict=True)]
        assert vlm.ask(entries, questions, **options) == singles


def test_seeded_and_penalised_batches_equal_single_questions(vlm, pictures):
    for options in (
        {"temperature": 1.3, "top_p": 0.9, "top_k": 40, "seed": 5},
        {"presence_penalty": 0.7, "frequency_penalty": 0.9, "penalty_decay": 0.9},
        {"temperature": 0.8, "seed": 2, "frequency_penalty": 1.5, "stop": ["e"]},
    ):
        options |= {"max_new_tokens": 16}
        batch = vlm.ask(pictures[:3], QUESTIONS[:3], **options)
        singles = [vlm.ask(one, text, **options) for one, text in zip(pictures[:3], QUESTIONS[:3], strict=True)]
        assert batch == singles
        assert ["".join(vlm.stream(pictures[n], QUESTIONS[n], **options)) for n in range(3)] == singles
