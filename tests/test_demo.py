"""The handlers of the demo, called as Gradio calls them.

Beside it: `test_demo_panel.py`, `test_demo_sessions.py`, `test_demo_server.py`, `test_demo_browser.py`, which uses
the page, and `test_demo_look.py`, which looks at it.
"""

import errno
import html
import os
import re
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from demo_controls import SHORT, controls
from PIL import Image

import visualrwkv
from visualrwkv import InputError, saved_chat
from visualrwkv.image_processing import load_image

gr = pytest.importorskip("gradio")

from visualrwkv.demo import examples, texts  # noqa: E402
from visualrwkv.demo.models import Models  # noqa: E402
from visualrwkv.demo.sessions import Sessions  # noqa: E402
from visualrwkv.demo.talk import Limits, Talk  # noqa: E402


@pytest.fixture(scope="module")
def models(random_folder):
    return Models([str(random_folder)])


@pytest.fixture
def talk(models, tmp_path, told):
    drawn = [examples.Example(str(tmp_path / "example.png"), {"en": "What?", "zh": "什么？"})]
    return Talk(models, Sessions(tmp_path / "sessions", limit=8), drawn, Limits())


@pytest.fixture
def told(monkeypatch):
    """What the page was told in pop-ups."""
    words = []
    for name in ("Warning", "Info"):
        monkeypatch.setattr(gr, name, lambda message, **options: words.append(message))
    return words


@pytest.fixture
def files(pictures, tmp_path):
    """Two picture files."""
    paths = [str(tmp_path / f"{name}.png") for name in ("one", "two")]
    for path, picture in zip(paths, pictures, strict=False):
        picture.save(path)
    return paths


def caller(name="a page", user=None):
    return SimpleNamespace(username=user, session_hash=name)


def say(talk, words, *files, request=None, **changes):
    """Everything the page was given while a message was answered."""
    message = {"text": words, "files": list(files)}
    return list(talk.say(message, **controls(talk.models, **changes), request=request or caller()))


def setting(talk):
    return ("en", *talk.models.default)


def words(messages):
    return [html.unescape(part["text"]) for message in messages for part in message["content"] if "text" in part]


def odd_pictures(folder):
    """Files of the kinds that go wrong elsewhere."""
    rng = np.random.default_rng(1)
    rgb = Image.fromarray(rng.integers(0, 256, (30, 50, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera held upright
    exif[0x010F] = "maker"
    rgb.save(folder / "turned.jpg", exif=exif)
    rgb.convert("CMYK").save(folder / "print.jpg")
    rgb.save(folder / "moving.gif", save_all=True, append_images=[rgb.transpose(Image.Transpose.ROTATE_180)] * 2)
    Image.fromarray(rng.integers(0, 65536, (30, 50), dtype=np.uint16)).save(folder / "deep.png")
    clear = rgb.convert("RGBA")
    clear.putalpha(Image.fromarray(rng.integers(0, 256, (30, 50), dtype=np.uint8)))
    clear.save(folder / "clear.png")
    rgb.resize((1600, 900)).save(folder / "large.tif")
    return sorted(folder.iterdir())


def test_every_kind_of_picture_is_answered_as_by_the_api(talk, vlm, told, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    for number, file in enumerate(odd_pictures(folder)):
        request = caller(f"page {number}")
        *growing, last = say(talk, "What?", str(file), request=request)
        answer = vlm.ask(file, "What?", **SHORT)
        assert words(last[0]) == ["What?", answer], file.name
        assert all(answer.startswith(words(shown[0])[1]) for shown in growing if len(words(shown[0])) > 1)
        (shown,) = talk.sessions.peek((None, f"page {number}")).branch.shown[0]
        with Image.open(shown) as small, Image.open(file) as original:
            upright = load_image(file)
            upright.thumbnail((768, 768))
            assert small.mode == "RGB" and small.size == upright.size and not small.getexif()
            assert file.name != "turned.jpg" or small.size == original.size[::-1]
    assert told == []


def test_what_cannot_be_used_is_said_and_changes_nothing(talk, told, files, huge_png, tmp_path):
    say(talk, "What?", files[0])
    before = talk.sessions.peek((None, "a page")).branch.chat.transcript
    text, huge = tmp_path / "notes.png", tmp_path / "huge.png"
    text.write_text("no picture")
    huge.write_bytes(huge_png)
    for refused, expected in (
        (("What?", str(text)), "notes.png: not an image"),
        (("What?", str(huge)), "huge.png"),
        (("What?", str(tmp_path / "<b>gone.png")), "&lt;b&gt;gone.png: no such file"),
        (("What?", *files * 3), "6 pictures"),
        (("x" * 5000,), "5000 characters"),
        (("",), "Ask something"),
        (("What is <image>?",), "&lt;image&gt;"),
    ):
        told.clear()
        (shown,) = say(talk, *refused)
        assert len(told) == 1 and expected in told[0] and str(tmp_path) not in told[0], told
        assert talk.sessions.peek((None, "a page")).branch.chat.transcript == before
        assert words(shown[0]) == [turn["text"] for turn in before]
    for changes, expected in (
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"stop": "\n".join("abcdefghijklmnopq")}, "16 lines"),
        ({"stop": "x" * 257}, "256 characters"),
    ):
        say(talk, "Why?", **changes)
        assert expected in told[-1]
        assert talk.sessions.peek((None, "a page")).branch.chat.transcript == before


def test_a_second_turn_goes_on_and_can_look_again(talk, vlm, files):
    chat = vlm.chat()
    expected = [chat.say("What?", files[0], **SHORT), chat.say("Why?", look_again=True, **SHORT)]
    say(talk, "What?", files[0], look_again=True)  # nothing to look at again yet: no complaint
    assert words(say(talk, "Why?", look_again=True)[-1][0])[1::2] == expected


def test_two_pages_never_meet(talk, vlm, files):
    solo = [vlm.chat(), vlm.chat()]
    for turn in ("What?", "Why?", "And?"):
        for chat, file, name in zip(solo, files, ("one", "two"), strict=True):
            shown = files and [file] if turn == "What?" else []
            expected = chat.say(turn, shown, **SHORT)
            assert words(say(talk, turn, *shown, request=caller(name))[-1][0])[-1] == expected
    assert words(talk.show(*setting(talk), caller("three"))[0]) == []


def test_undo_edit_and_retry(talk, told, files):
    first = words(say(talk, "What?", files[0])[-1][0])
    second = words(say(talk, "Why?", files[1])[-1][0])
    shown, box, *_ = talk.edit(None, *setting(talk), caller())
    assert words(shown) == first and box["value"]["text"] == "Why?"
    again = box["value"]["files"]
    assert Image.open(again[0]).tobytes() == Image.open(files[1]).tobytes()
    assert words(say(talk, "Why?", *again)[-1][0]) == second
    *_, message = talk.take_back(*setting(talk), caller())
    assert words(say(talk, message["text"], *message["files"])[-1][0]) == second
    assert words(talk.undo(*setting(talk), caller())[0]) == first
    assert words(talk.undo(*setting(talk), caller())[0]) == [] and told == []
    assert talk.take_back(*setting(talk), caller())[-1] is None and "nothing yet" in told[-1]
    assert list(talk.say(None, **controls(talk.models), request=caller())) == [(gr.skip(),) * 4]


def test_branches_part_and_can_be_switched(talk, told, files):
    common = words(say(talk, "What?", files[0])[-1][0])
    switch = talk.fork(*setting(talk), caller())[-1]
    assert switch["choices"] == ["A", "B"] and switch["value"] == "B" and switch["visible"]
    on_b = words(say(talk, "Why?")[-1][0])
    assert words(talk.switch("A", *setting(talk), caller())[0]) == common
    assert words(talk.switch("B", *setting(talk), caller())[0]) == on_b
    assert words(talk.switch("D", *setting(talk), caller())[0]) == on_b  # there is no such branch
    for _ in range(3):
        talk.fork(*setting(talk), caller())
    assert "4 branches" in told[-1] and len(talk.sessions.peek((None, "a page")).branches) == 4
    assert words(talk.new(*setting(talk), caller())[0]) == []


def test_a_saved_conversation_goes_on_elsewhere(talk, vlm, told, files, tmp_path):
    said = words(say(talk, "What?", files[0], prompt="first", scan="uni")[-1][0])
    path = talk.save("en", caller())
    assert Path(path).is_relative_to(tmp_path / "sessions") and path.endswith(".safetensors")
    other = caller("elsewhere")
    shown, _, _, _, *found = talk.load(path, *setting(talk), other)
    assert words(shown) == [texts.text("en", "picture_not_saved"), *said]
    assert found == [talk.models.default[0], "first", "uni"]  # as it was held
    onward = words(say(talk, "Why?", files[1], prompt="first", scan="uni")[-1][0])[-1]
    assert words(say(talk, "Why?", files[1], prompt="first", scan="uni", request=other)[-1][0])[-1] == onward
    talk.undo(*setting(talk), other)
    *_, message = talk.take_back(*setting(talk), other)  # from before the load
    assert message is None and "attach them again" in told[-1]
    # files that are none
    for content, expected in ((b"no", "not a saved conversation"), (b"", "not a saved conversation")):
        bad = tmp_path / "bad.safetensors"
        bad.write_bytes(content)
        talk.load(str(bad), *setting(talk), other)
        assert f"bad.safetensors: {expected}" in told[-1] and str(tmp_path) not in told[-1]
    assert talk.save("en", caller("a new one")) is None


def test_a_conversation_of_another_model_is_refused(talk, told, tmp_path):
    chat = visualrwkv.load().chat()
    chat.say("What?", max_new_tokens=1)
    chat.save(tmp_path / "other.safetensors")
    talk.load(str(tmp_path / "other.safetensors"), *setting(talk), caller())
    assert "held with another model" in told[-1]


def test_stopping_keeps_what_was_said(talk, files):
    stream = talk.say(
        {"text": "What?", "files": files[:1]}, **controls(talk.models, max_new_tokens=1000), request=caller()
    )
    seen = [words(shown) for shown, *_ in (next(stream) for _ in range(3))]
    talk.stop(caller())
    rest = list(stream)
    branch = talk.sessions.peek((None, "a page")).branch
    assert branch.chat.stats.finish == "cancelled" and branch.chat.stats.reply_tokens < 1000
    assert words(rest[-1][0]) == ["What?", branch.chat.transcript[-1]["text"]]
    assert branch.chat.transcript[-1]["text"].startswith(seen[-1][1])
    say(talk, "Why?")
    # a page that is closed leaves its generator behind
    stream = talk.say({"text": "What?", "files": []}, **controls(talk.models, max_new_tokens=1000), request=caller())
    next(stream), next(stream)
    stream.close()
    assert not talk.sessions.peek((None, "a page")).lock.locked()
    assert branch.chat.stats.finish == "cancelled" and len(branch.shown) == 3


def test_another_way_of_reading_begins_anew_with_the_same_weights(talk, vlm, random_folder, told, files):
    say(talk, "What?", files[0])
    for prompt, scan in (("last", "bi"), ("sandwich", "multi")):
        picked = (talk.models.default[0], prompt, scan)
        *shown, label, place, order = talk.setting("en", *picked, caller())
        assert words(shown[0]) == [] and (label, place, order) == picked and "New conversation" in told[-1]
        expected = visualrwkv.load(random_folder, prompt=prompt, scan=scan).ask(files[0], "What?", **SHORT)
        assert words(say(talk, "What?", files[0], prompt=prompt, scan=scan)[-1][0])[-1] == expected
        ours = talk.models.get(talk.models.default[0], prompt, scan).model
        plain = talk.models.get(talk.models.default[0]).model
        assert (ours.config.prompt, ours.config.scan) == (prompt, scan) != (plain.config.prompt, plain.config.scan)
        assert ours.rwkv.emb.weight is plain.rwkv.emb.weight
    assert vlm.ask(files[0], "What?", **SHORT) == words(say(talk, "What?", files[0])[-1][0])[-1]


def test_a_look_at_the_menus_or_a_failed_pick_changes_nothing(random_folder, talk, told, files, tmp_path):
    talk.models = Models([str(random_folder), str(tmp_path / "nowhere")])
    default = talk.models.default
    say(talk, "What?", files[0])
    before = talk.sessions.peek((None, "a page")).branch
    assert talk.setting("en", *default, caller()) == (*(gr.skip(),) * 4, *default) and told == []
    assert talk.setting("en", "nowhere", "last", "uni", caller()) == (*(gr.skip(),) * 4, *default)
    assert told[0].startswith("Loading nowhere") and "nowhere" in told[-1]
    assert talk.sessions.peek((None, "a page")).branch is before
    # what was picked before is what a failed pick goes back to, also before anything was said
    picked = (default[0], "last", "uni")
    assert talk.setting("en", *picked, caller("another"))[4:] == picked
    assert talk.setting("en", "nowhere", "last", "uni", caller("another"))[4:] == picked


def test_nobody_waits_for_a_model_that_others_pick(random_folder, monkeypatch):
    models, load = Models([str(random_folder)]), visualrwkv.load
    begun, go_on = threading.Event(), threading.Event()

    def slow(*arguments, **options):
        begun.set()
        assert go_on.wait(60)
        return load(*arguments, **options)

    monkeypatch.setattr(visualrwkv, "load", slow)
    thread = threading.Thread(target=models.get, args=("embedded",))
    thread.start()
    assert begun.wait(60) and not models.is_loaded("embedded")
    assert models.get(*models.default) and models.get(models.labels[0], "last", "uni")  # while it loads
    go_on.set()
    thread.join()
    assert models.is_loaded("embedded")


def test_a_draft_stays_while_something_else_is_answered(talk, told, files):
    say(talk, "What?", files[0])
    *_, again = talk.take_back(*setting(talk), caller())
    assert again["text"] == "What?" and "draft" in again
    for message in (again, talk.example("en", SimpleNamespace(index=0))):
        if Path(message["files"][0]).name == "example.png":
            shutil.copy(files[0], message["files"][0])
        boxes = [shown[1] for shown in talk.say(message, **controls(talk.models), request=caller())]
        assert not any("value" in box for box in boxes)
    boxes = [shown[1] for shown in talk.say({"text": "What?", "files": []}, **controls(talk.models), request=caller())]
    assert boxes[0]["value"] == {"text": "", "files": []}
    for draft in ({"text": "A draft", "files": []}, {"text": "", "files": [files[0]]}):
        assert talk.edit(draft, *setting(talk), caller()) == (gr.skip(),) * 4 and "not sent" in told[-1]


def test_an_answer_is_only_given_up_for_another(talk, told, files):
    before = words(say(talk, "What?", files[0])[-1][0])
    page = talk.sessions.peek((None, "a page"))

    def again(**changes):
        *_, message = talk.take_back(*setting(talk), caller())
        return talk.say(message, **controls(talk.models, **changes), request=caller())

    (shown,) = again(seed="x")
    assert words(shown[0]) == before and shown[1] == gr.skip() and "Seed x" in told[-1]
    stream = again()
    next(stream)
    page.halt.set()
    with page.branch.chat._alone():  # no word comes
        *_, shown = stream
    assert words(shown[0]) == before and "value" not in shown[1]
    *_, shown = again(max_new_tokens=4)  # pictures and all
    assert words(shown[0])[0] == before[0] and page.branch.chat.stats.reply_tokens == 4
    # a message to answer again that never came is no part of what follows
    talk.take_back(*setting(talk), caller())
    (shown,) = say(talk, "")
    assert words(shown[0]) == [] and page.branch.chat.transcript == []


def test_what_the_library_refuses_is_told_in_chinese(talk, told, files, random_folder, tmp_path):
    talk.models = Models([str(random_folder), str(tmp_path / "nowhere")])
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    for refused, expected in (
        (lambda: say(talk, "What?", str(text), language="zh"), "图片无法使用"),
        (lambda: say(talk, "<image>", language="zh"), "消息无法回答"),
        (lambda: say(talk, "What?", model="nowhere", language="zh"), "模型无法载入"),
        (lambda: talk.setting("zh", "nowhere", "last", "uni", caller()), "模型无法载入"),
        (lambda: talk.load(str(text), "zh", *talk.models.default, caller()), "无法载入对话"),
    ):
        refused()
        assert expected in told[-1] and str(tmp_path) not in told[-1], told


def test_a_full_disk_loses_nothing(talk, told, files, monkeypatch, tmp_path):
    before = words(say(talk, "What?", files[0])[-1][0])

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "file"))

    monkeypatch.setattr(saved_chat, "save_file", full)
    assert talk.save("en", caller()) is None
    monkeypatch.setattr(Image.Image, "save", full)
    (shown,) = say(talk, "Why?", files[1])
    assert words(shown[0]) == before and shown[1] == gr.skip()
    for said in told:
        assert "No space left" in said and str(tmp_path) not in said, told
    assert len(told) == 2


def test_the_field_of_the_seed(talk, told):
    replies = []
    for seed in ("3", " 3 "):
        replies.append(words(say(talk, "What?", seed=seed, temperature=1.5, request=caller(seed))[-1][0]))
    assert replies[0] == replies[1]
    for seed in ("-1", "x", "1.5", str(2**31)):
        (shown,) = say(talk, "What?", seed=seed)
        assert words(shown[0]) == [] and shown[1] == gr.skip() and f"Seed {seed}: use a whole number" in told[-1]
    say(talk, "What?", seed="")
    assert len(told) == 4


def test_who_has_to_wait_is_told(talk, told):
    stream = talk.say({"text": "What?", "files": []}, **controls(talk.models), request=caller())
    other = talk.say({"text": "What?", "files": []}, **controls(talk.models), request=caller("other"))
    next(stream), talk.queued("en")
    assert told == []
    next(other), talk.queued("en")
    assert "yours comes next" in told[0]
    stream.close(), other.close(), talk.queued("en")
    assert len(told) == 1


def test_the_panel_follows_a_reply(talk, monkeypatch):
    monkeypatch.setattr("visualrwkv.demo.talk.REFRESH", 0)
    monkeypatch.setattr("visualrwkv.demo.talk.REFRESH_PANEL", 0)
    panels = [shown[2] for shown in say(talk, "What?", max_new_tokens=40)]
    counts = [int(re.search(r'tokens_read"><b>(\d+)', html)[1]) for html in panels[1:]]
    assert len(counts) > 3 and counts == sorted(counts) and 0 < counts[0] < counts[-1]


def test_showing_a_reply_takes_a_fraction_of_the_time(talk, monkeypatch):
    """Each picture of the page takes longer the more pictures there are in the conversation."""
    now = 0.0

    def clock():
        nonlocal now
        now += 0.1  # the model's work on a piece
        return now

    monkeypatch.setattr("visualrwkv.demo.talk.time", SimpleNamespace(monotonic=clock))
    message, steps = {"text": "What?", "files": []}, 0
    for _ in talk.say(message, **controls(talk.models, max_new_tokens=200), request=caller()):
        steps += 1
        now += 1  # until the page was shown it
    written = talk.sessions.peek((None, "a page")).branch.chat.stats.reply_tokens
    assert written > 100 and 4 < steps < written / 20


@pytest.mark.parametrize("earlier", [0, 1])
def test_a_message_sent_while_a_model_is_loaded_is_answered_by_it(earlier, talk, told, random_folder, monkeypatch):
    talk.models, load = Models([str(random_folder)]), visualrwkv.load
    for _ in range(earlier):
        say(talk, "What?")
    begun, go_on, results = threading.Event(), threading.Event(), []

    def slow(*arguments, **options):
        begun.set()
        assert go_on.wait(60)
        return load(*arguments, **options)

    monkeypatch.setattr(visualrwkv, "load", slow)
    picked = ("embedded", "sandwich", "bi")
    pick = threading.Thread(target=lambda: results.append(talk.setting("en", *picked, caller())))
    pick.start()
    assert begun.wait(60)
    assert talk.setting("en", *picked, caller()) == (gr.skip(),) * 7  # reported twice
    message = {"text": "How many?", "files": []}
    reply = talk.say(message, **controls(talk.models, model="embedded", max_new_tokens=60), request=caller())
    sent = threading.Thread(target=lambda: results.append(next(reply)))
    sent.start()
    while not talk._writing:
        time.sleep(0.01)
    go_on.set()
    pick.join()
    sent.join()
    shown = list(reply)[-1]
    assert words(shown[0]) == ["How many?", load().ask(None, "How many?", max_new_tokens=60)]
    assert sum("Loading" in word for word in told) == 1
    chat = talk.sessions.peek((None, "a page")).branch.chat
    assert talk.setting("en", *picked, caller())[4:] == picked
    assert talk.sessions.peek((None, "a page")).branch.chat is chat


def test_a_reply_that_something_else_ends_is_told(talk, told):
    for end in (
        lambda: talk.save("en", caller()),
        lambda: talk.fork(*setting(talk), caller()),
        lambda: talk.switch("A", *setting(talk), caller()),
    ):
        end()
        assert "The reply that was being written ends here." not in told
        reply = talk.say({"text": "What?", "files": []}, **controls(talk.models, max_new_tokens=500), request=caller())
        next(reply)
        thread = threading.Thread(target=end)
        thread.start()
        list(reply)
        thread.join()
        assert "The reply that was being written ends here." in told
        told.clear()


def test_a_closed_session_is_told_and_keeps_the_message(models, told, tmp_path):
    talk = Talk(models, Sessions(tmp_path, limit=1), [], Limits())
    say(talk, "What?", request=caller("one"))
    say(talk, "What?", request=caller("two"))
    (shown,) = say(talk, "Why?", request=caller("one"))
    assert "make room" in told[-1] and words(shown[0]) == [] and shown[1] == gr.skip()
    assert len(words(say(talk, "Why?", request=caller("one"))[-1][0])) == 2


def test_a_page_loaded_again_is_shown_its_conversation_and_its_setting(talk, files):
    last = say(talk, "What?", files[0], scan="uni")[-1]
    model, prompt, _ = talk.models.default
    messages, *_, shown_model, shown_prompt, shown_scan = talk.arrive("a page", "en", caller("again"))
    assert messages == last[0] and (shown_model, shown_prompt, shown_scan) == (model, prompt, "uni")
    assert len(words(say(talk, "Why?", request=caller("again"), scan="uni")[-1][0])) == 4
    for former, request in (("", caller("new")), ("a page", caller("late")), ("again", caller("other", "berta"))):
        assert talk.arrive(former, "en", request) == (gr.skip(),) * 7


def test_models_are_those_of_the_operator(models, random_folder, tmp_path):
    assert models.labels == [random_folder.name, "embedded"]  # no path of the disk
    with pytest.raises(InputError, match="not offered"):
        models.get(str(random_folder))
    with pytest.raises(InputError, match="use one of"):
        models.get("embedded", "sideways")
    with pytest.raises(InputError, match="nowhere"):
        Models([str(tmp_path / "nowhere")])
    both = Models(["embedded", str(random_folder), str(random_folder)])
    assert both.labels == ["embedded", random_folder.name, f"{random_folder.name} (2)"]
