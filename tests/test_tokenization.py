"""The World tokenizer: golden ids, raw bytes, special tokens, files, subset vocabularies, reply streaming."""

import json
import random
import sys
import threading

import pytest
import torch
from golden_data import GOLDEN

from visualrwkv.errors import InputError
from visualrwkv.streaming import ReplyText, StopAtTurnEnd, Utf8Streamer, turn_end_ids
from visualrwkv.tokenization import (
    RWKVWorldTokenizer,
    read_vocabulary,
    subset_vocabulary,
    world_vocabulary_file,
    write_vocabulary,
)

CASES = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
BYTES = [bytes([i]) for i in range(256)]


@pytest.fixture(scope="module")
def world():
    return RWKVWorldTokenizer()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "rwkv_vocab.txt"
    words = ["User:", " the", " red", "\n\n", "\n\n\n", "。\n", "图", "😀"]
    write_vocabulary([*BYTES, *(word.encode() for word in words)], path)
    return RWKVWorldTokenizer(path)


def random_text(rng, length):
    pools = [
        lambda: chr(rng.randrange(0x20)),
        lambda: rng.choice(" \t\n\r\u00a0\u3000\u200d"),
        lambda: chr(rng.randrange(0x20, 0x7F)),
        lambda: chr(rng.randrange(0x80, 0x800)),
        lambda: chr(rng.randrange(0x4E00, 0xA000)),
        lambda: chr(rng.randrange(0x1F300, 0x1FB00)),
        lambda: rng.choice(["<image>", "<|endoftext|>", "\n\n", "User:", "👩‍👩‍👧", "🇮🇸", "é", "the "]),
    ]
    return "".join(rng.choice(pools)() for _ in range(rng.randrange(length)))


def test_golden_strings(world):
    for case in CASES["strings"]:
        assert world.encode_text(case["text"]) == case["ids"]
        assert world(case["text"])["input_ids"] == case["ids"]
        assert world.decode(case["ids"]) == case["text"]


def test_golden_bytes(world):
    for case in CASES["bytes"]:
        assert world.encode_bytes(bytes.fromhex(case["hex"])) == case["ids"]
        assert world.decode_bytes(case["ids"]) == bytes.fromhex(case["hex"])


@pytest.mark.parametrize("case", CASES["decode"], ids=lambda case: str(case["ids"]))
def test_golden_decode(world, case):
    assert world.decode(case["ids"]) == case["text"]
    assert world.batch_decode([case["ids"], case["ids"]]) == [case["text"]] * 2
    assert world.decode(torch.tensor(case["ids"], dtype=torch.long)) == case["text"]


def test_round_trip_of_any_text_and_bytes(world, small):
    rng = random.Random(1)
    for _ in range(300):
        text, data = random_text(rng, 60), rng.randbytes(rng.randrange(60))
        for tokenizer in (world, small):
            assert tokenizer.decode(tokenizer.encode_text(text)) == text
            assert tokenizer(text)["input_ids"] == tokenizer.encode_text(text)
            assert tokenizer.convert_tokens_to_string(tokenizer.tokenize(text)) == text
            assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


def test_greedy_match_takes_the_longest_token(world, small):
    rng = random.Random(2)
    for tokenizer in (world, small):
        ids = tokenizer.vocabulary.ids
        for _ in range(50):
            data, out = random_text(rng, 80).encode(), []
            position = 0
            while position < len(data):
                length = next(n for n in range(128, 0, -1) if data[position : position + n] in ids and n)
                out.append(ids[data[position : position + length]])
                position += min(length, len(data) - position)
            assert tokenizer.encode_bytes(data) == out


def test_every_token_keeps_its_own_id(world, small):
    for index, token in world.vocabulary.tokens.items():
        assert world.encode_bytes(token) == [index]
    assert len(world.get_vocab()) == 65529 + 2
    assert len(world) == 65536 and len(small) == len(small.get_vocab())  # rows of an embedding; World has free ids
    assert world.vocab_size == CASES["vocab_size"]


def test_special_tokens_have_fixed_ids_and_text_never_becomes_one(world, small):
    assert (world.pad_token_id, world.eos_token_id, world.image_token_id) == (0, 0, 65535)
    assert world.image_token == "<image>"
    assert small.image_token_id == 256 + 8 + 1 == len(small) - 1
    for tokenizer in (world, small):
        special = {0, tokenizer.image_token_id}
        for text in ("<image>", "a<image>b", "<|endoftext|>", "<image>" * 3):
            ids = tokenizer(text)["input_ids"]
            assert not special & set(ids)
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.convert_tokens_to_ids("<image>") == tokenizer.image_token_id
    assert world("<image>", split_special_tokens=False)["input_ids"] == [65535]


def test_decode_can_skip_special_tokens_and_replace_bad_pieces(world):
    ids = [0, 65535, *world.encode_text("cat"), 0]
    assert world.decode(ids) == "\ufffd"
    assert world.decode(ids, skip_special_tokens=True) == "cat"
    assert world.decode([*world.encode_text("cat"), 0, 65530, 195], errors="replace") == "cat\ufffd\ufffd\ufffd"
    with pytest.raises(InputError, match="65530"):
        world.decode_bytes([65530])
    with pytest.raises(InputError, match="clean_up"):
        world.decode([33], clean_up_tokenization_spaces=True)


def test_surrogates_in_text(world):
    assert world.decode(world.encode_text("\ud83d\ude00")) == "😀"
    assert world.decode(world.encode_text("a\ud83db")) == "a\ufffdb"


def test_padding_goes_left(world):
    batch = world(["a", "the cat sat"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0, 0] == 0 and batch["attention_mask"][0].tolist() == [0, 0, 1]


@pytest.mark.parametrize("name", ["world", "small"])
def test_save_and_load(name, request, tmp_path):
    tokenizer = request.getfixturevalue(name)
    tokenizer.save_pretrained(tmp_path)
    again = RWKVWorldTokenizer.from_pretrained(tmp_path)
    assert again.vocabulary.tokens == tokenizer.vocabulary.tokens
    assert again.image_token_id == tokenizer.image_token_id
    assert again("a <image> 😀")["input_ids"] == tokenizer("a <image> 😀")["input_ids"]
    moved = RWKVWorldTokenizer.from_pretrained(tmp_path, image_token_id=65531)
    assert moved.image_token_id == moved.convert_tokens_to_ids("<image>") == 65531
    assert len(moved.all_special_ids) == 2


def test_the_default_vocabulary_does_not_import_rwkv(monkeypatch):
    monkeypatch.delitem(sys.modules, "rwkv", raising=False)
    assert world_vocabulary_file().is_file()
    assert "rwkv" not in sys.modules


def test_vocabulary_files_with_both_line_ends_are_equal(small, tmp_path):
    path = tmp_path / "crlf.txt"
    small.vocabulary.write(path)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_vocabulary(path).tokens == small.vocabulary.tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text + "256 'x' 1\n", "256 occurs twice"),
        (lambda text: text + "257 'a' 1\n", "two ids"),
        (lambda text: text + "257 'xy' 3\n", "257 has 2 bytes, the file says 3"),
        (lambda text: text + "257 __import__('os') 3\n", "token 257 is __import__"),
        (lambda text: text + "257 'a', 'b' 3\n", "token 257"),
        (lambda text: text + "257 'a 3\n", "token 257"),
        (lambda text: text + "hello\n", "line 257"),
        (lambda text: text + "0 'ab' 2\n", "id 0 is reserved"),
        (lambda text: text.split("\n", 1)[1], "1 of the 256 single bytes are missing, first 0x00"),
        (lambda text: "", "256 of the 256"),
    ],
)
def test_broken_vocabularies_are_named(change, message, tmp_path):
    path = tmp_path / "broken.txt"
    write_vocabulary(BYTES, path)
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        read_vocabulary(path)
    assert "broken.txt" in str(error.value) and "\n" not in str(error.value)


def test_unusable_vocabulary_files(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"1 '\xe9' 1\n")
    for path, message in (("latin.txt", "not UTF-8"), ("missing.txt", "No such file"), (".", "not a file")):
        with pytest.raises(InputError, match=message):
            read_vocabulary(tmp_path / path)
    with pytest.raises(InputError, match="image_token_id 5 is taken"):
        RWKVWorldTokenizer(image_token_id=5)


def test_subset_vocabulary_holds_what_the_texts_use_most(world, tmp_path):
    texts = ["User: What colour is the cat?\n\n"] * 3 + ["Assistant: red\n\n"] * 2 + ["图片里有几只猫？"]
    tokens = subset_vocabulary(texts, 256 + 12)
    assert len(tokens) == 268 and tokens[:256] == [world.vocabulary.tokens[i] for i in range(1, 257)]
    order = [world.vocabulary.ids[token] for token in tokens]
    assert order == sorted(order)
    used = [token for text in texts for token in map(world.vocabulary.tokens.get, world.encode_text(text))]
    least = min(used.count(token) for token in tokens[256:])
    assert all(used.count(token) <= least for token in set(used) - set(tokens) if len(token) > 1)
    assert len(subset_vocabulary(texts, 5000)) < 300  # no more than the texts need
    write_vocabulary(tokens, tmp_path / "rwkv_vocab.txt")
    subset = RWKVWorldTokenizer(tmp_path / "rwkv_vocab.txt")
    assert subset.image_token_id == 269
    assert all(subset.decode(subset.encode_text(text)) == text for text in texts)
    with pytest.raises(InputError, match="size 100"):
        subset_vocabulary(texts, 100)


def blocking(tokenizer, ids):
    """The specification of a reply, for ids that form valid UTF-8."""
    return tokenizer.decode_bytes(ids).decode().split("\n\n")[0].strip()


def test_streamed_text_is_the_blocking_text_and_never_holds_half_a_character(world, small):
    rng = random.Random(3)
    for _ in range(200):
        text = random_text(rng, 40)
        for tokenizer in (world, small):
            data = text.encode()
            ids = (
                tokenizer.encode_bytes(data)
                if rng.random() < 0.5
                else [tokenizer.vocabulary.ids[bytes([b])] for b in data]
            )
            reply, pieces, position = ReplyText(tokenizer), [], 0
            while position < len(ids):
                step = rng.randrange(1, 4)
                pieces.append(reply.add(ids[position : position + step]))
                position += step
            pieces.append(reply.close())
            assert "".join(pieces) == blocking(tokenizer, ids) == ReplyText.whole(tokenizer, ids)
            assert "\ufffd" not in "".join(pieces)


def test_reply_text_of_incomplete_and_invalid_bytes(world):
    smile = [world.vocabulary.ids[bytes([byte])] for byte in "😀".encode()]
    assert ReplyText.whole(world, world.encode_text("so ") + smile[:3]) == "so"
    assert ReplyText.whole(world, world.encode_text("so ") + smile[:3] + world.encode_text("x")) == "so \ufffdx"
    assert ReplyText.whole(world, [65531, 0, 65535, *world.encode_text("x")]) == "\ufffdx"
    assert ReplyText.whole(world, world.encode_text("\n\nlate")) == ""
    assert ReplyText.whole(world, []) == ""


def test_streamer_follows_the_protocol_of_generate(world):
    streamer = Utf8Streamer(world, timeout=10)

    def generate():
        streamer.put(torch.tensor([[1, 2, 3]]))
        for index in world.encode_text("  Hello 世界 😀 \n") + [11, 50]:
            streamer.put(torch.tensor([index]))
        streamer.end()

    thread = threading.Thread(target=generate)
    thread.start()
    assert "".join(streamer) == "Hello 世界 😀"
    thread.join()
    with pytest.raises(ValueError, match="batch of 2"):
        streamer.put(torch.zeros(2, 1))
    failing = Utf8Streamer(world)
    failing.fail(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        next(iter(failing))


def test_stop_at_turn_end_sees_decoded_text_in_each_row(world):
    rows = {
        "a\n\n": [98, 261],
        "a\n then \n": [98, 11, 11],
        "。\n + \n": [98, 28329, 11],
        "\n\n + spaces": [98, world.vocabulary.ids[b"\n\n  "]],
        " \n\n": [98, world.vocabulary.ids[b" \n\n"]],
        "one line break": [98, 98, 11],
        "a free id": [11, 65534, 11],
        "the prompt's own end": [261],
    }
    expected = [True] * 5 + [False] * 3
    for (name, row), done in zip(rows.items(), expected, strict=True):
        prompt = [5585, 41693, 59] if name != "the prompt's own end" else [98, 11]
        ids = torch.tensor([prompt + (row if name != "the prompt's own end" else [11])])
        assert StopAtTurnEnd(world, len(prompt))(ids, None).tolist() == [done], name
    both = torch.tensor([[59, 98, 261], [59, 98, 98]])
    assert StopAtTurnEnd(world, 1)(both).tolist() == [True, False]
    assert StopAtTurnEnd(world, 3)(both).tolist() == [False, False]


def test_ids_that_end_a_reply():
    world = RWKVWorldTokenizer()
    ids = turn_end_ids(world)
    assert ids[0] == 0 and 261 in ids and all(b"\n\n" in world.vocabulary.tokens[index] for index in ids[1:])
    assert len(ids) == 1 + sum(b"\n\n" in token for token in world.vocabulary.tokens.values()) == 35
