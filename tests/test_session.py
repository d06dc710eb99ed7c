"""Conversations: what the state has read, fork, undo, looking again."""

import copy
import threading
from functools import partial

import pytest
import torch
from conversations import QUESTIONS, SHORT, same

from visualrwkv import InputError
from visualrwkv.decoding import Decoder
from visualrwkv.prompt import Turn
from visualrwkv.session import UNDO_LIMIT, unread_end
from visualrwkv.tokenization import Vocabulary


def record_inputs(monkeypatch):
    """Collect the ids that each turn reads."""
    seen, read = [], Decoder.read

    def spy(self, replies, inputs, state=None):
        seen.append(inputs["input_ids"].tolist()[0])
        return read(self, replies, inputs, state)

    monkeypatch.setattr(Decoder, "read", spy)
    return seen


def test_the_first_turn_of_a_chat_is_ask(vlm, pictures):
    assert vlm.chat().say(QUESTIONS[0], images=pictures[0], **SHORT) == vlm.ask(pictures[0], QUESTIONS[0], **SHORT)


def test_a_turn_reads_only_itself_and_the_state_is_as_if_all_was_read(vlm, pictures, monkeypatch):
    fed = record_inputs(monkeypatch)
    chat = vlm.chat()
    shown = [[pictures[0]], [], [pictures[1], pictures[2]], []]
    sizes = []
    history = []  # the ids that the state has read: prompts, and replies but for their last token
    for number, images in enumerate(shown):
        before = list(chat._now.unread)
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
        read = chat._now.state.seen - len(history)
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
        for layer, other in zip(chat._now.state.layers, whole.layers, strict=True):
            for tensor, expected in zip(layer, other, strict=True):
                assert torch.allclose(tensor, expected, atol=2e-4), number
        sizes.append(chat.nbytes)
    assert len(set(sizes)) == 1 and sizes[0] == chat._now.state.nbytes


def test_streamed_turns_equal_blocking_turns(vlm, pictures):
    one, two = vlm.chat(), vlm.chat()
    for number, images in enumerate(([pictures[0]], None, [pictures[1]])):
        expected = one.say(QUESTIONS[number], images, **SHORT)
        assert "".join(two.stream(QUESTIONS[number], images, **SHORT)) == expected
    assert one.transcript == two.transcript
    assert one._now.unread == two._now.unread


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


def test_a_copy_is_a_fork(vlm, pictures):
    """Frameworks such as Gradio copy what they keep for each visitor."""
    chat = vlm.chat()
    chat.say("What?", pictures[0], **SHORT)
    for other in (copy.deepcopy({"chat": chat})["chat"], copy.copy(chat)):
        assert other is not chat and other.say("Why?", **SHORT) == chat.fork().say("Why?", **SHORT)
        assert len(chat.transcript) == 2
        assert chat.fork().undo()["text"] == "What?"


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
    assert vlm.processor.tokenizer.decode_bytes(chat._now.unread).endswith(b"\n\n")
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


def close_to(state, other):
    return all(
        torch.allclose(x, y, atol=2e-4)
        for p, q in zip(state.layers, other.layers, strict=True)
        for x, y in zip(p, q, strict=True)
    )


def test_undo_is_exact_and_bounded(vlm, pictures):
    chat, forks = vlm.chat(), []
    for number in range(UNDO_LIMIT + 2):
        forks.append(chat.fork())
        chat.say(QUESTIONS[number % 4], pictures[number % 4] if number % 2 else None, **SHORT)
    last = chat.transcript[-1]["text"]
    assert chat.undo() == {"role": "user", "text": QUESTIONS[(UNDO_LIMIT + 1) % 4], "images": 1}
    assert same(chat, forks[-1]) and chat.stats is None
    assert chat.say(QUESTIONS[(UNDO_LIMIT + 1) % 4], pictures[(UNDO_LIMIT + 1) % 4], **SHORT) == last
    for number in range(UNDO_LIMIT):
        chat.undo()
        assert same(chat, forks[-1 - number])
    with pytest.raises(InputError, match=f"only the last {UNDO_LIMIT}"):
        chat.undo()
    assert same(chat, forks[2]) and len(chat.transcript) == 4
    fresh = vlm.chat()
    fresh.say("What?", **SHORT)
    fresh.undo()
    assert (fresh.transcript, fresh.nbytes, fresh.tokens_read) == ([], 0, 0)
    with pytest.raises(InputError, match="nothing was said"):
        fresh.undo()


def test_memory_does_not_grow_with_the_talk(vlm, pictures):
    chat = vlm.chat()
    for _ in range(UNDO_LIMIT + 5):
        chat.say("What?", [pictures[0], pictures[1]], max_new_tokens=2)
        chat.say("What?", look_again=True, max_new_tokens=2)
    assert len(chat._past) == UNDO_LIMIT
    assert all(len(moment.features) == 2 for moment in (*chat._past, chat._now))
    assert chat.nbytes == chat._past[0].state.nbytes
    shown = 4 * (UNDO_LIMIT + 5) * vlm.processor.num_image_tokens
    assert chat.tokens_read > shown


def test_looking_again_equals_a_prompt_written_by_hand(vlm, pictures, monkeypatch):
    chat = vlm.chat()
    chat.say("What?", pictures[3], **SHORT)
    chat.say("Which one?", [pictures[0], pictures[1]], **SHORT)
    chat.say("And then?", **SHORT)
    before = chat._now
    encoded, encode = [], vlm.model.get_image_features
    monkeypatch.setattr(vlm.model, "get_image_features", lambda pixels: encoded.append(pixels) or encode(pixels))
    seen = record_inputs(monkeypatch)
    for images, shown in (([], pictures[:2]), ([pictures[2]], [*pictures[:2], pictures[2]])):
        other, encoded[:], seen[:] = chat.fork(), [], []
        other.say("Colour?", images, look_again=True, max_new_tokens=1)
        assert sum(map(len, encoded)) == len(images)  # the tower ran for the new pictures alone
        marks = "<image>\n" * len(shown)
        text = f"User: Colour?\n{marks}Colour?\n\nAssistant:"  # the question before and after
        by_hand = vlm.processor(images=shown, text=text, return_tensors="pt")
        by_hand_ids = [*before.unread, *by_hand["input_ids"][0].tolist()]
        assert seen[0] == by_hand_ids
        assert other.transcript[-2] == {"role": "user", "text": "Colour?", "images": len(shown)}
        with torch.no_grad():
            whole = vlm.model(torch.tensor([by_hand_ids]), by_hand["pixel_values"], cache=before.state.clone())
        assert close_to(other._now.state, whole.cache)  # the one token of the reply has not been read
        assert len(other._now.features) == (len(images) or 2)  # the pictures passed last


def test_nothing_to_look_at_again(vlm, pictures):
    chat = vlm.chat()
    for call in (chat.say, chat.stream):
        with pytest.raises(InputError, match="no picture to look at again"):
            call("What?", look_again=True)
    chat.say("What?", pictures[0], **SHORT)
    chat.undo()
    with pytest.raises(InputError, match="no picture to look at again"):
        chat.say("What?", look_again=True)


def test_a_stream_that_begins_later_looks_at_what_is_there_then(vlm, pictures):
    chat = vlm.chat()
    chat.say("What?", pictures[0], **SHORT)
    stream = chat.stream("Where?", look_again=True, **SHORT)
    chat.reset()
    with pytest.raises(InputError, match="no picture to look at again"):
        next(stream)
    assert chat.transcript == [] and chat.say("What?", pictures[0], **SHORT)


def test_half_a_character_is_no_question(vlm):
    with pytest.raises(InputError, match="surrogate"):
        vlm.chat().say("What \ud83d?")


def stop_for(vlm, text):
    """A stop string that comes in the middle of a reply."""
    middle = len(text) // 2
    return text[middle : middle + 2]


def test_a_stop_string_is_not_remembered(vlm, pictures, monkeypatch):
    """The next turn goes on as if the model had stopped by itself there."""
    free = vlm.chat().say(QUESTIONS[0], pictures[0], max_new_tokens=24)
    stop = stop_for(vlm, free)
    chat, streamed, lengths, forward = vlm.chat(), vlm.chat(), [], vlm.model.forward

    def counted(input_ids=None, **inputs):
        lengths.append(1 if input_ids is None else input_ids.shape[1])
        return forward(input_ids=input_ids, **inputs)

    with monkeypatch.context() as patch:
        patch.setattr(vlm.model, "forward", counted)
        reply = chat.say(QUESTIONS[0], pictures[0], max_new_tokens=24, stop=stop)
    assert sum(length > 1 for length in lengths) == 1, "the prompt is read once"
    assert reply == free[: free.index(stop)].strip() and chat.stats.finish == "stop"
    assert "".join(streamed.stream(QUESTIONS[0], pictures[0], max_new_tokens=24, stop=stop)) == reply
    assert same(chat, streamed)
    turns = [Turn("user", QUESTIONS[0], 1), Turn("assistant", reply)]
    ids, _ = vlm.processor.encode_turns(turns[:1], open_reply=True)
    pixels = vlm.processor.image_processor(pictures[0], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        state = vlm.model(torch.tensor([ids]), pixels).cache
    assert close_to(chat._now.state, state) and chat.tokens_read == len(ids)
    tail = vlm.processor.tokenizer.encode_text((f" {reply}" if reply else "") + "\n\n")
    assert list(chat._now.unread) == tail
    chat.say("Why?", **SHORT)


def test_numbers_of_a_reply(vlm, pictures):
    chat = vlm.chat()
    assert chat.stats is None
    for call in (chat.say, lambda *a, **o: list(chat.stream(*a, **o))):
        before = chat.tokens_read
        call("What is the colour?", pictures[0], max_new_tokens=5)
        stats = chat.stats
        assert chat.tokens_read == before + stats.prompt_tokens + stats.reply_tokens - 1
        assert 1 <= stats.reply_tokens <= 5
        assert (stats.finish == "length") <= (stats.reply_tokens == 5)
        assert 0 < stats.first_token_s <= stats.total_s
    before, size = chat.tokens_read, chat.nbytes
    stream = chat.stream("What?", max_new_tokens=400)
    next(stream)
    assert chat.tokens_read > before and chat.nbytes == size  # with the turn under way
    stream.close()
    assert chat.stats.finish == "cancelled"


def test_one_turn_at_a_time(vlm, pictures, tmp_path):
    chat = vlm.chat()
    chat.say("What?", pictures[0], **SHORT)
    later = chat.stream("And?", **SHORT)  # not begun, so nothing is held up
    first = chat.stream("What?", **SHORT)
    next(first)
    save = partial(chat.save, tmp_path / "talk")
    for call in (partial(chat.say, "Why?"), chat.undo, chat.reset, save, partial(next, later)):
        with pytest.raises(InputError, match="still being written"):
            call()
    other = chat.fork()
    other.say("Why?", **SHORT)
    list(first)
    expected = chat.fork().say("And?", **SHORT)
    assert "".join(chat.stream("And?", **SHORT)) == expected
    assert len(chat.transcript) == 6


def test_ctrl_c_leaves_a_conversation_usable(vlm, pictures, monkeypatch):
    chat = vlm.chat()
    chat.say("What?", pictures[0], **SHORT)
    copy = chat.fork()

    def interrupted(**_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(vlm.model, "forward", interrupted)
        for call in (lambda: chat.say("Why?"), lambda: list(chat.stream("Why?"))):
            with pytest.raises(KeyboardInterrupt):
                call()
    assert same(chat, copy)
    assert chat.say("Why?", **SHORT) == copy.say("Why?", **SHORT)


def test_ctrl_c_within_a_token_keeps_what_was_said(vlm, pictures, monkeypatch):
    chat, said, forward = vlm.chat(), [], vlm.model.forward
    chat.say("What?", pictures[0], **SHORT)
    before, calls = chat.fork(), []

    def interrupted(**inputs):
        calls.append(inputs)
        output = forward(**inputs)
        if len(calls) == 6:  # the state has read the token, and nobody was told
            raise KeyboardInterrupt
        return output

    with monkeypatch.context() as patch:
        patch.setattr(vlm.model, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            for piece in chat.stream("Why?", max_new_tokens=40):
                said.append(piece)
    reply = chat.transcript[-1]["text"]
    assert said and reply.startswith("".join(said)) and chat.stats.finish == "cancelled"
    assert 0 < chat.stats.first_token_s <= chat.stats.total_s
    # the next turn reads the reply behind the prompt, as it does behind a stop string
    tokenizer = vlm.processor.tokenizer
    assert tokenizer.decode_bytes(chat._now.unread).decode() == f" {reply}\n\n"
    ids, _ = vlm.processor.encode_turns([*before._now.turns, Turn("user", "Why?")], open_reply=True, start=2)
    with torch.no_grad():
        read = torch.tensor([[*before._now.unread, *ids]])
        # a matrix product of fewer rows, as for the last scores alone, may be rounded otherwise
        state = forward(read, cache=before._now.state.clone(), logits_to_keep=1).cache
    assert chat.tokens_read == state.seen
    for ours, expected in zip(chat._now.state.layers, state.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_two_conversations_in_two_threads(vlm, pictures):
    """Neither their states nor their random numbers meet."""
    options = {"max_new_tokens": 24, "temperature": 1.2, "top_p": 0.9}
    expected = [vlm.chat().say("What?", pictures[n], seed=n, **options) for n in range(2)]
    replies = [[], []]

    def talk(n):
        for _ in range(4):
            replies[n].append("".join(vlm.chat().stream("What?", pictures[n], seed=n, **options)))

    threads = [threading.Thread(target=talk, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == [[answer] * 4 for answer in expected]
