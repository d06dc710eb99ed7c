"""Conversations in files: they go on exactly, and a file that was changed is refused."""

import json
import os
import stat

import pytest
import torch
from conversations import QUESTIONS, SHORT, same
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import visualrwkv
from visualrwkv import InputError, saved_chat


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
    with pytest.raises(InputError, match="is a folder"):
        vlm.chat.load(tmp_path)
    for name in ("nothing.safetensors", "words.txt"):
        (tmp_path / "words.txt").write_text("words")
        with pytest.raises(InputError, match=name):
            vlm.chat.load(tmp_path / name)


def test_a_saved_conversation_goes_on_with_its_prompt(vlm, random_folder, pictures, tmp_path):
    other = visualrwkv.load(random_folder, prompt="first")
    chat = other.chat()
    assert chat.prompt == "first" and vlm.chat().prompt == "sandwich"
    chat.say(QUESTIONS[0], pictures[0], **SHORT)
    chat.save(tmp_path / "talk.safetensors")
    loaded = vlm.chat.load(tmp_path / "talk.safetensors")
    assert loaded.prompt == loaded.fork().prompt == "first"
    for _ in range(2):
        assert loaded.say("Where?", pictures[1], **SHORT) == chat.say("Where?", pictures[1], **SHORT)
        assert same(loaded, chat) and loaded.prompt == "first"
    loaded.reset()
    assert loaded.prompt == "sandwich"


def test_a_saved_conversation_goes_on_with_its_pictures_and_seeds(vlm, pictures, tmp_path):
    chat = vlm.chat()
    chat.say(QUESTIONS[2], [pictures[0], pictures[1]], **SHORT)
    chat.say("Why?", **SHORT)
    chat.save(tmp_path / "talk.safetensors")
    loaded = vlm.chat.load(tmp_path / "talk.safetensors")
    assert same(loaded, chat) and torch.equal(loaded._now.features, chat._now.features)
    assert loaded.tokens_read == chat.tokens_read
    with pytest.raises(InputError, match="before a load"):
        loaded.undo()
    options = {"max_new_tokens": 12, "temperature": 1.5, "seed": 3, "frequency_penalty": 0.5}
    for turn in ({"look_again": True}, {}, {"images": pictures[2]}):
        assert loaded.say("Where?", **turn, **options) == chat.say("Where?", **turn, **options)
    assert same(loaded, chat)


@pytest.fixture
def saved(vlm, pictures, tmp_path):
    """A saved conversation, and a function that saves it again with changes."""
    path = tmp_path / "talk.safetensors"
    chat = vlm.chat()
    chat.say("What?", pictures[0], **SHORT)
    chat.save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        meta = file.metadata()

    def write(change_meta=None, change_tensors=None, drop=None):
        kept = {name: value for name, value in (tensors | (change_tensors or {})).items() if name != drop}
        save_file(kept, path, metadata={k: v for k, v in (meta | (change_meta or {})).items() if v is not None})
        return path

    return path, write


TURNS = [{"role": "user", "text": "a", "images": 1}, {"role": "assistant", "text": "b", "images": 0}]


@pytest.mark.parametrize(
    "meta",
    [
        {"format": "visualrwkv-chat-0"},
        {"model": None},
        {"prompt": "above"},
        {"transcript": "{"},
        {"transcript": "[" * 100_000},
        {"transcript": "7"},
        {"transcript": json.dumps(TURNS[:1])},
        {"transcript": json.dumps([TURNS[1], TURNS[0]])},
        {"transcript": json.dumps([{**TURNS[0], "role": "system"}, TURNS[1]])},
        {"transcript": json.dumps([{**TURNS[0], "images": -1}, TURNS[1]])},
        {"transcript": json.dumps([{**TURNS[0], "more": 1}, TURNS[1]])},
        {"transcript": "[]"},
        {"unread": "[0]"},
        {"unread": "[1e3]"},
        {"unread": "3"},
        {"unread": json.dumps([10**30])},
        {"seen": "-1"},
        {"seen": "many"},
        {"seen": None},
    ],
)
def test_a_conversation_with_wrong_words_is_refused(vlm, saved, meta):
    path, write = saved
    write(meta)
    refused(vlm, path)


def test_the_image_token_cannot_be_smuggled_in(vlm, saved):
    path, write = saved
    write({"unread": json.dumps([vlm.model.config.image_token_id])})
    refused(vlm, path)


def test_a_conversation_with_wrong_tensors_is_refused(vlm, saved):
    path, write = saved
    wkv = "layers.1.wkv"
    shape, features = load_file(path)[wkv].shape, load_file(path)["image_features"]
    for change in (
        {wkv: torch.zeros(2, 2)},
        {wkv: torch.zeros(shape, dtype=torch.int32)},
        {wkv: torch.zeros(shape, dtype=torch.bfloat16)},
        {wkv: torch.full(shape, torch.nan)},
        {"layers.77.wkv": torch.zeros(shape)},
        {"surprise": torch.zeros(1)},
        {"\x1b[2Jsurprise": torch.zeros(1)},
        {"image_features": features[:0].clone()},
        {"image_features": features[0].clone()},
        {"image_features": features[..., :4].contiguous()},
    ):
        write(change_tensors=change)
        refused(vlm, path)
    write(drop=wkv)
    refused(vlm, path)
    write()
    data = path.read_bytes()
    for wrong in (b"", data[:100], data[: len(data) // 2], data + b"more", b"\xff" * 8 + data[8:]):
        path.write_bytes(wrong)
        refused(vlm, path)
    path.write_bytes(data)
    assert vlm.chat.load(path).say("Why?", **SHORT)


def refused(vlm, path):
    with pytest.raises(InputError, match="talk.safetensors") as caught:
        vlm.chat.load(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_a_loaded_conversation_is_its_own(vlm, saved):
    """The file may be written by somebody else afterwards."""
    path, _ = saved
    expected = vlm.chat.load(path).say("Why?", **SHORT)
    chat = vlm.chat.load(path)
    tensors = [tensor for layer in chat._now.state.layers for tensor in layer]
    before = [tensor.clone() for tensor in tensors]
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\x7f" * 4096)
        file.truncate()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert chat.say("Why?", **SHORT) == expected


def test_names_that_no_file_can_have(vlm, saved, tmp_path, monkeypatch):
    path, write = saved
    chat = vlm.chat.load(path)
    long = "x" * 250
    for name in ("", ".", f"{tmp_path}/{'x' * 300}", "a\0b", f"{path}/under"):
        with pytest.raises(InputError) as caught:
            chat.save(name)
        assert "\n" not in str(caught.value) and ".part" not in str(caught.value)
    chat.save(tmp_path / long)  # as long as names can be
    monkeypatch.setenv("HOME", str(tmp_path))
    chat.save("~/mine")
    assert vlm.chat.load("~/mine").transcript == chat.transcript
    assert {file.name for file in tmp_path.iterdir()} == {path.name, long, "mine"}
    write({"transcript": json.dumps([TURNS[0] | {"text": "\ud800"}, TURNS[1]])})
    refused(vlm, path)


def test_links_are_followed_and_modes_are_kept(vlm, saved, tmp_path):
    path, _ = saved
    chat = vlm.chat.load(path)
    chat.say("Why?", **SHORT)
    link, fresh = tmp_path / "link", tmp_path / "fresh"
    link.symlink_to(path)
    path.chmod(0o640)
    chat.save(link)
    assert link.is_symlink() and vlm.chat.load(path).transcript == chat.transcript
    assert path.stat().st_mode & 0o777 == 0o640
    former = os.umask(0o027)
    try:
        chat.save(fresh)
    finally:
        os.umask(former)
    assert fresh.stat().st_mode & 0o777 == 0o640
    os.mkfifo(tmp_path / "pipe")
    for name, words in (
        ("pipe", "is no file"),
        ("none/x", "there is no folder"),
        (5, "5 is no path"),
        ("", "is no path"),
    ):
        with pytest.raises(InputError, match=words):
            chat.save(tmp_path / name if isinstance(name, str) and name else name)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with pytest.raises(InputError, match="None is no path"):
        vlm.chat.load(None)
    with pytest.raises(InputError, match="~no-such-user/x: the conversation cannot be written: there is no folder"):
        chat.save("~no-such-user/x")


def test_a_full_disk_leaves_the_older_file(vlm, saved, monkeypatch, tmp_path):
    path, _ = saved
    before = path.read_bytes()

    def full(tensors, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device", str(name))

    monkeypatch.setattr(saved_chat, "save_file", full)
    with pytest.raises(InputError, match="talk.safetensors: .*No space left on device"):
        vlm.chat().save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
    monkeypatch.undo()
    for name in ("no/folder/talk.safetensors", "."):
        with pytest.raises(InputError, match="written|folder"):
            vlm.chat().save(tmp_path / name)
    assert os.listdir(tmp_path) == [path.name]
