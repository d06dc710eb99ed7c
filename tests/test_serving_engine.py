"""What answers the requests of the endpoint: one batch that replies join and leave, and pictures seen lately."""

import asyncio
import base64
import io
import time

import pytest
import torch

from visualrwkv.prompt import Turn
from visualrwkv.sampling import Sampling
from visualrwkv.serving import engine, requests
from visualrwkv.serving.pictures import PictureReader, RecentPictures


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_replies_leave_and_join_without_touching_each_other(vlm):
    """The engine alone: every row of the batch is the state of its own words."""
    told = {}

    def reply(name, text, count):
        ids, _ = vlm.processor.encode_turns([Turn("user", text)], open_reply=True)
        told[name] = []
        sampling, tokenizer = Sampling(max_new_tokens=count), vlm.processor.tokenizer
        return engine.ServedReply(tokenizer, sampling, ids, [], lambda *event: told[name].append(event))

    line = engine.Engine(vlm, slots=2)
    replies = [reply(number, "What? " * (number + 1), 5 + 7 * number) for number in range(5)]
    for one in replies:
        line.submit(one)
    wait_until(lambda: all(told[name] and told[name][-1][1] for name in told))
    for number in told:
        expected = vlm.ask(None, "What? " * (number + 1), max_new_tokens=5 + 7 * number)
        assert "".join(text for text, _ in told[number]) == expected
    line.close()
    with pytest.raises(engine.ShuttingDown, match="closed"):
        line.submit(replies[0])


def test_who_has_left_does_not_wait_on_while_no_slot_is_free(vlm, monkeypatch):
    """Clients that come and go while all slots are taken would fill the queue with their pictures."""
    monkeypatch.setattr(engine.ServedReply, "take", lambda self, token: self.tokens.append(token) or "x")
    ids, _ = vlm.processor.encode_turns([Turn("user", "What?")], open_reply=True)
    line = engine.Engine(vlm, slots=1)
    tokenizer = vlm.processor.tokenizer
    endless, stays, *gone = (engine.ServedReply(tokenizer, Sampling(), ids, [], lambda *event: None) for _ in range(20))
    line.submit(endless)
    wait_until(lambda: line.load == (1, 0))
    for reply in (*gone[:9], stays, *gone[9:]):
        line.submit(reply)
    for reply in gone:
        reply.cancelled.set()
    wait_until(lambda: line.load == (1, 1))
    endless.cancelled.set()
    wait_until(lambda: stays.tokens)
    line.close()


def test_in_a_crowd_short_prompts_are_gathered_and_none_waits_for_long(vlm, monkeypatch):
    monkeypatch.setattr(engine.Engine, "_work", lambda self: None)  # the test asks for what is read next
    line = engine.Engine(vlm, slots=64)

    def ask(text):
        ids, _ = vlm.processor.encode_turns([Turn("user", text)], open_reply=True)
        reply = engine.ServedReply(vlm.processor.tokenizer, Sampling(), ids, [], lambda *event: None)
        line.submit(reply)
        return reply

    line._decoder.replies = ["one under way"] * (engine.CROWD - 1)
    alone = ask("Few others: at once")
    assert line._next_to_read() == [alone]
    line._decoder.replies = ["one under way"] * (2 * engine.CROWD)
    for _ in range(2):
        first = ask("This one lets two tokens pass")
        assert line._next_to_read() == [] and line.load[1] == 1
        second = ask("This one lets one pass")
        assert line._next_to_read() == []
        assert line._next_to_read() == [first, second] and line.load[1] == 0
    long = ask("word " * engine.WORTH_READING)
    assert line._next_to_read() == [long]
    many = [ask("Together they are long enough? " * 8) for _ in range(engine.WORTH_READING // 32)]
    assert line._next_to_read() == many
    line.close()


def test_pictures_seen_lately_are_not_encoded_again(vlm, pictures, picture_file, monkeypatch):
    encoded, told = [], []
    encode = vlm.model.get_image_features
    monkeypatch.setattr(vlm.model, "get_image_features", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    sampling = {"max_new_tokens": 4}
    line = engine.Engine(vlm, slots=4)
    reader = PictureReader(vlm.processor.image_processor, requests.Limits(), line.recent)

    def ask(*files):
        uris = ["data:image/png;base64," + base64.b64encode(file).decode() for file in files]
        ids, _ = vlm.processor.encode_turns([Turn("user", "What?", images=len(uris))], open_reply=True)
        read = asyncio.run(reader.read(uris))
        told.clear()
        tokenizer = vlm.processor.tokenizer
        line.submit(engine.ServedReply(tokenizer, Sampling(**sampling), ids, read, lambda *event: told.append(event)))
        wait_until(lambda: told and told[-1][1])
        return "".join(text for text, _ in told), read

    def png(picture):
        file = io.BytesIO()
        picture.save(file, "PNG")
        return file.getvalue()

    first, other = picture_file.read_bytes(), png(pictures[1])
    alone, _ = ask(first)
    assert alone == vlm.ask(picture_file, "What?", **sampling)
    before = len(encoded)
    again, read = ask(first)
    assert again == alone and len(encoded) == before and read[0].pixels is None
    both, _ = ask(first, other, other)  # the second one is new, and comes twice
    assert encoded[before:] == [1]
    assert both == vlm.ask([pictures[0], pictures[1], pictures[1]], "What?", **sampling)
    reader.close()
    line.close()


def test_recent_pictures_stay_within_their_bytes():
    recent = RecentPictures(limit=1000)
    for number in range(10):
        recent.put(bytes([number % 5]), torch.zeros(1, 10, 10) + number)
        assert recent.nbytes <= 1000
    assert recent.get(bytes([0])) is None and recent.get(bytes([4]))[0, 0, 0] == 9
    recent.get(bytes([3])), recent.put(b"new", torch.zeros(1, 10, 10))
    assert recent.get(bytes([3])) is not None and recent.get(bytes([4])) is None  # the longest unseen one went
    recent.put(b"large", torch.zeros(1, 100, 10))
    assert recent.nbytes == 0 and recent.get(b"large") is None


def test_states_of_different_age_make_one_batch(vlm):
    with torch.no_grad():
        one = vlm.model(torch.tensor([[5, 6, 7]])).cache
        two = vlm.model(torch.tensor([[8], [9]])).cache
        both = type(one).concatenate([one, two])
        assert both.batch_size == 3 and both.seen == 3
        for state, rows in ((one, [0]), (two, [1, 2])):
            part = both.select(rows)
            for name, tensor in state.tensors().items():
                assert torch.equal(tensor, part.tensors()[name])
