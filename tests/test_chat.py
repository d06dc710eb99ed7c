"""load, ask, stream and chat: one way to an answer, whatever the door."""

import threading

import numpy as np
import pytest
import torch

import visualrwkv
from visualrwkv import InputError
from visualrwkv.chat import Sampling, unread_end
from visualrwkv.prompt import Turn
from visualrwkv.tokenization import Vocabulary

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


def test_leaving_a_stream_ends_its_thread(vlm, pictures):
    before = threading.active_count()
    stream = vlm.stream(pictures[0], "What?", max_new_tokens=400)
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_an_error_while_streaming_reaches_the_reader(vlm, pictures, monkeypatch):
    monkeypatch.setattr(vlm.model, "generate", lambda **_: 1 / 0)
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
        (None, "What?", {"top_p": 0}, "top_p is 0"),
        (None, "What?", {"beams": 3}, "beams"),
        ([None, None, None], ["a", "b"], {}, "3 pictures for 2 questions"),
    ],
)
def test_bad_input_is_refused_on_one_line(vlm, image, question, options, words):
    with pytest.raises(InputError) as caught:
        vlm.ask(image, question, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_image_of_900_million_pixels_is_refused_unread(vlm, huge_png):
    with pytest.raises(InputError, match="pixels, the limit is"):
        vlm.ask(huge_png, "What?")


# Conversations


def record_inputs(vlm, monkeypatch):
    """Collect the ids that each generate call reads."""
    seen, generate = [], vlm.model.generate

    def spy(**inputs):
        seen.append(inputs["input_ids"].tolist()[0])
        return generate(**inputs)

    monkeypatch.setattr(vlm.model, "generate", spy)
    return seen


def test_the_first_turn_of_a_chat_is_ask(vlm, pictures):
    assert vlm.chat().say(QUESTIONS[0], images=pictures[0], **SHORT) == vlm.ask(pictures[0], QUESTIONS[0], **SHORT)


def test_a_turn_reads_only_itself_and_the_state_is_as_if_all_was_read(vlm, pictures, monkeypatch):
    fed = record_inputs(vlm, monkeypatch)
    chat = vlm.chat()
    shown = [[pictures[0]], [], [pictures[1], pictures[2]], []]
    sizes = []
    history = []  # the ids that the state has read: prompts, and replies but for their last token
    for number, images in enumerate(shown):
        before = list(chat._unread)
        reply = chat.say(QUESTIONS[number], images=images, **SHORT)
        assert fed[-1][: len(before)] == before
        own, _ = vlm.processor.encode_turns(
            [Turn(**turn) for turn in chat.transcript[:-1]], open_reply=True, start=2 * number
        )
        assert fed[-1][len(before) :] == own
        assert chat.transcript[-1] == {"role": "assistant", "text": reply, "images": 0}
        history += fed[-1]
        pixels = [picture for group in shown[: number + 1] for picture in group]
        pixel_values = vlm.processor.image_processor(pixels, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            reread = vlm.model(torch.tensor([history]), pixel_values)
        # the state continues over the reply: read it again as well
        read = chat._state.seen - len(history)
        steps = []
        logits = reread.logits[:, -1]
        for _ in range(read):
            logits[:, vlm.model.config.image_token_id] = float("-inf")
            steps.append(int(logits.argmax()))
            with torch.no_grad():
                reread = vlm.model(torch.tensor([[steps[-1]]]), cache=reread.cache)
            logits = reread.logits[:, -1]
        history += steps
        with torch.no_grad():
            whole = vlm.model(torch.tensor([history]), pixel_values).cache
        for layer, other in zip(chat._state.layers, whole.layers, strict=True):
            for tensor, expected in zip(layer, other, strict=True):
                assert torch.allclose(tensor, expected, atol=2e-4), number
        sizes.append(chat.nbytes)
    assert len(set(sizes)) == 1 and sizes[0] == chat._state.nbytes


def test_streamed_turns_equal_blocking_turns(vlm, pictures):
    one, two = vlm.chat(), vlm.chat()
    for number, images in enumerate(([pictures[0]], None, [pictures[1]])):
        expected = one.say(QUESTIONS[number], images, **SHORT)
        assert "".join(two.stream(QUESTIONS[number], images, **SHORT)) == expected
    assert one.transcript == two.transcript
    assert one._unread == two._unread


def test_fork_and_reset(vlm, pictures):
    chat = vlm.chat()
    chat.say(QUESTIONS[0], pictures[0], **SHORT)
    fork = chat.fork()
    answer = chat.say(QUESTIONS[1], **SHORT)
    chat.say(QUESTIONS[2], **SHORT)
    assert len(fork.transcript) == 2
    assert fork.say(QUESTIONS[1], **SHORT) == answer
    fork.reset()
    assert (fork.transcript, fork.nbytes) == ([], 0)
    assert fork.say(QUESTIONS[0], pictures[0], **SHORT) == chat.transcript[1]["text"]


def test_save_and_load_continue_the_same_conversation(vlm, pictures, tmp_path):
    chat = vlm.chat()
    chat.say(QUESTIONS[2], pictures[0], **SHORT)
    chat.save(tmp_path / "talk.safetensors")
    loaded = vlm.chat.load(tmp_path / "talk.safetensors")
    assert loaded.transcript == chat.transcript
    assert loaded.nbytes == chat.nbytes
    assert loaded.say(QUESTIONS[1], pictures[1], **SHORT) == chat.say(QUESTIONS[1], pictures[1], **SHORT)
    vlm.chat().save(tmp_path / "fresh.safetensors")
    assert vlm.chat.load(tmp_path / "fresh.safetensors").transcript == []


def test_a_conversation_of_another_model_is_refused(vlm, random_folder, pictures, tmp_path):
    chat = vlm.chat()
    chat.say("What?", pictures[0], **SHORT)
    chat.save(tmp_path / "talk.safetensors")
    other = visualrwkv.load(random_folder)
    assert other.chat.load(tmp_path / "talk.safetensors").transcript == chat.transcript
    with torch.no_grad():
        other.model.rwkv.blocks[1].att.key.weight.add_(0.5)
    with pytest.raises(InputError, match="another model"):
        other.chat.load(tmp_path / "talk.safetensors")
    for name in ("nothing.safetensors", "words.txt"):
        (tmp_path / "words.txt").write_text("words")
        with pytest.raises(InputError, match=name):
            vlm.chat.load(tmp_path / name)


def test_a_refused_turn_leaves_the_conversation_as_it_was(vlm, pictures):
    chat = vlm.chat()
    chat.say("What?", pictures[0], **SHORT)
    before = chat.transcript
    for text, images in (("", None), ("<image>", None), ("What?", "nowhere.png")):
        with pytest.raises(InputError):
            chat.say(text, images)
        with pytest.raises(InputError):
            chat.stream(text, images)
    assert chat.transcript == before


def test_leaving_a_streamed_turn_keeps_what_was_said(vlm, pictures):
    chat = vlm.chat()
    stream = chat.stream("What?", pictures[0], max_new_tokens=400)
    first = next(stream)
    stream.close()
    assert chat.transcript[-1]["text"].startswith(first)
    assert vlm.processor.tokenizer.decode_bytes(chat._unread).endswith(b"\n\n")
    chat.say("What?", **SHORT)


@pytest.mark.parametrize(
    ("reply", "unread"),
    [
        ([b"red", b"\n\n"], b"\n\n"),  # the usual end
        ([b"red", b".\n\n\n"], b".\n\n"),  # the end and more in one token
        ([b"red", b"\n", b"\n"], b"\n"),  # the end in two tokens
        ([b"red", b".\n", b"\nUser"], b"\n"),
        ([b"red", b" and"], b" and\n\n"),  # cut by the length limit
        ([b"red", None], b"\n\n"),  # the end-of-text token
        ([b"red"], b"red\n\n"),
    ],
)
def test_what_the_state_has_not_read_closes_the_turn(reply, unread):
    words = [b"\n\n", b"\n\n\n", b".\n\n\n", b".\n\n", b".\n", b"\nUser", b" and", b"red"]
    vocabulary = Vocabulary(dict(enumerate([bytes([i]) for i in range(256)] + words, 1)))
    ids = [0 if token is None else vocabulary.ids[token] for token in reply]
    assert b"".join(vocabulary.tokens[index] for index in unread_end(vocabulary, ids)) == unread


def test_sampling_defaults_are_greedy():
    config = Sampling().config(image_token_id=9)
    assert not config.do_sample and config.max_new_tokens == 128 and config.suppress_tokens == [9]
