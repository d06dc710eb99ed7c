"""The demo without a browser: its sessions, its figures, its handlers, and what its server refuses.

Handlers are called as Gradio calls them; the server is a real one, asked by Gradio's own client. `test_demo_browser.py`
looks at the page.
"""

import gc
import html
import json
import os
import re
import signal
import string
import subprocess
import sys
import threading
import time
import weakref
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import visualrwkv
from visualrwkv import InputError, RWKVState, cli
from visualrwkv.image_processing import load_image

gr = pytest.importorskip("gradio")

from visualrwkv.demo import examples, panel, texts  # noqa: E402
from visualrwkv.demo.models import Models  # noqa: E402
from visualrwkv.demo.sessions import Branch, Ended, Sessions  # noqa: E402
from visualrwkv.demo.talk import Limits, Talk  # noqa: E402

SHORT = {"max_new_tokens": 8}


# The store of sessions.


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def sessions(tmp_path, clock):
    return Sessions(tmp_path / "sessions", limit=8, idle=100, grace=10, clock=clock)


@pytest.fixture(scope="module")
def spoken(vlm, pictures):
    """A conversation of one turn."""
    chat = vlm.chat()
    chat.say("What?", pictures[0], **SHORT)
    return chat


def begin(sessions, key, chat):
    session = sessions.open(key)
    session.branches = [Branch(chat, [[]], [[]])]
    session.file("picture.png").write_bytes(b"0" * 100)
    return session


def test_two_hundred_sessions_stay_within_the_bound(sessions, vlm, pictures, spoken):
    gc.collect()
    states = sum(type(thing) is RWKVState for thing in gc.get_objects())
    chats = []
    for number in range(200):
        chat = spoken.fork()
        chat.say("And now?", max_new_tokens=1)
        chats.append(weakref.ref(chat))
        begin(sessions, (None, f"page {number}"), chat)
        del chat
        assert len(sessions) <= 8 and sessions.nbytes <= 8 * spoken.nbytes
    gc.collect()
    assert sum(chat() is not None for chat in chats) == 8
    # each that is left holds its state and, for undo, the one before, which all of these share
    assert sum(type(thing) is RWKVState for thing in gc.get_objects()) - states <= 8
    assert len(list(sessions._folder.iterdir())) == 8


def test_the_one_unused_longest_makes_room_and_is_told_once(sessions, spoken):
    for number in range(8):
        begin(sessions, (None, f"page {number}"), spoken)
    sessions.open((None, "page 0"))  # used again
    begin(sessions, (None, "one more"), spoken)
    assert sessions.peek((None, "page 0")) and not sessions.peek((None, "page 1"))
    with pytest.raises(Ended) as ended:
        sessions.open((None, "page 1"))
    assert ended.value.reason == "crowded"
    assert sessions.open((None, "page 1")).branch is None


def test_idle_sessions_go(sessions, spoken, clock):
    old = begin(sessions, (None, "old"), spoken)
    clock.now = 60
    begin(sessions, (None, "new"), spoken)
    clock.now = 120
    sessions.sweep()
    assert len(sessions) == 1 and sessions.peek((None, "new"))
    assert old.halt.is_set() and not old.folder.exists()
    with pytest.raises(Ended, match="idle"):
        sessions.open((None, "old"))


def test_a_closed_page_frees_its_session_unless_it_comes_back(sessions, spoken, clock):
    back, gone = begin(sessions, (None, "back"), spoken), begin(sessions, (None, "gone"), spoken)
    sessions.leave((None, "back"))
    sessions.leave((None, "gone"))
    assert gone.halt.is_set()  # its reply ends at once
    clock.now = 9
    assert sessions.open((None, "back")) is back
    clock.now = 11
    sessions.sweep()
    assert len(sessions) == 1 and not sessions.peek((None, "gone"))


def test_the_store_watches_by_itself(tmp_path, spoken):
    sessions = Sessions(tmp_path, limit=8, idle=0.3, grace=0.1)
    begin(sessions, (None, "page"), spoken)
    sessions.watch()
    deadline = time.monotonic() + 20
    while len(sessions) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not len(sessions)
    sessions.close()


def test_a_session_belongs_to_a_page_and_a_login(sessions):
    one = sessions.open(("anna", "page"))
    assert sessions.open(("anna", "page")) is one
    assert sessions.open(("berta", "page")) is not one and sessions.open(("anna", "other")) is not one


# The side panel and the texts.


def test_figures_are_those_of_the_conversation(vlm, pictures):
    config = vlm.model.config.text_config
    empty = panel.figures(vlm)
    chat = vlm.chat()
    assert panel.figures(vlm, chat) == empty
    chat.say("What?", pictures[0], **SHORT)
    chat.say("Why?", **SHORT)
    numbers = panel.figures(vlm, chat)
    assert numbers.state_bytes == empty.state_bytes == chat.nbytes
    assert numbers.tokens_read == chat.tokens_read > vlm.model.config.num_image_tokens and numbers.turns == 2
    # keys and values of each layer in 16 bits
    assert numbers.cache_bytes == chat.tokens_read * config.num_hidden_layers * config.hidden_size * 2 * 2
    assert numbers.first_token_s == chat.stats.first_token_s > 0
    at = numbers.break_even
    assert numbers.cache_bytes_per_token * at > numbers.state_bytes >= numbers.cache_bytes_per_token * (at - 1)
    for language in texts.LANGUAGES.values():
        shown = panel.html(numbers, language)
        assert panel.size(chat.nbytes) in shown and f"{chat.tokens_read:,}" in shown


def test_sizes():
    assert [panel.size(n) for n in (0, 999, 4608, 156672, 13841203, 2**31)] == [
        *("0 B", "999 B", "4.5 KiB", "153 KiB", "13.2 MiB", "2.0 GiB"),
    ]


def test_every_text_is_there_in_both_languages():
    for key, pair in texts.TEXTS.items():
        fields = [{field for _, field, _, _ in string.Formatter().parse(words) if field} for words in pair]
        assert len(pair) == 2 and all(pair) and fields[0] == fields[1], key
    files = set(Path(panel.__file__).parent.glob("*.py")) - {Path(texts.__file__)}
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    literal = set(re.findall(r'["\'](\w+)["\']', source))
    built = {f"{kind}_{name}" for kind in ("prompt", "scan") for name in literal}
    assert set(texts.TEXTS) <= literal | built  # no text is left over
    assert [texts.language_of(header) for header in ("zh-CN,zh;q=0.9", "en-US,zh;q=0.5", None)] == ["zh", "en", "en"]


def test_examples_are_drawn_with_questions_in_both_languages(tmp_path):
    drawn = examples.draw(tmp_path / "new")
    assert len(drawn) == len({Path(example.picture).read_bytes() for example in drawn}) == 4
    for example in drawn:
        assert set(example.questions) == {"en", "zh"} and not example.questions["en"].isspace()
        assert re.search("[\u4e00-\u9fff]", example.questions["zh"])


# The handlers.


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


def controls(models, **changes):
    """The arguments of `Talk.say` behind the message, as the page would send them."""
    model, prompt, scan = models.default
    sampling = dict(max_new_tokens=8, temperature=0, top_p=1, top_k=0, seed=None)
    penalties = dict(presence_penalty=0, frequency_penalty=0, penalty_decay=0.996)
    values = dict(language="en", model=model, prompt=prompt, scan=scan, look_again=False)
    return values | sampling | penalties | dict(stop="") | changes


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
    say(talk, "Why?", temperature=float("nan"))
    assert "temperature is nan" in told[-1]


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
    shown, box, *_ = talk.edit(*setting(talk), caller())
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
    said = words(say(talk, "What?", files[0], scan="uni")[-1][0])
    path = talk.save("en", caller())
    assert Path(path).is_relative_to(tmp_path / "sessions") and path.endswith(".safetensors")
    other = caller("elsewhere")
    shown, _, _, _, *found = talk.load(path, *setting(talk), other)
    assert words(shown) == [texts.text("en", "picture_not_saved"), *said]
    assert found == [talk.models.default[0], "sandwich", "uni"]  # the scan it was held with
    onward = words(say(talk, "Why?", scan="uni")[-1][0])[-1]
    assert words(say(talk, "Why?", scan="uni", request=other)[-1][0])[-1] == onward
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
        *shown, label = talk.setting("en", talk.models.default[0], prompt, scan, caller())
        assert words(shown[0]) == [] and label == talk.models.default[0] and "New conversation" in told[-1]
        expected = visualrwkv.load(random_folder, prompt=prompt, scan=scan).ask(files[0], "What?", **SHORT)
        assert words(say(talk, "What?", files[0], prompt=prompt, scan=scan)[-1][0])[-1] == expected
        ours = talk.models.get(talk.models.default[0], prompt, scan).model
        plain = talk.models.get(talk.models.default[0]).model
        assert (ours.config.prompt, ours.config.scan) == (prompt, scan) != (plain.config.prompt, plain.config.scan)
        assert ours.rwkv.emb.weight is plain.rwkv.emb.weight
    assert vlm.ask(files[0], "What?", **SHORT) == words(say(talk, "What?", files[0])[-1][0])[-1]


def test_a_closed_session_is_told_and_keeps_the_message(models, told, tmp_path):
    talk = Talk(models, Sessions(tmp_path, limit=1), [], Limits())
    say(talk, "What?", request=caller("one"))
    say(talk, "What?", request=caller("two"))
    (shown,) = say(talk, "Why?", request=caller("one"))
    assert "make room" in told[-1] and words(shown[0]) == [] and shown[1] == gr.skip()
    assert len(words(say(talk, "Why?", request=caller("one"))[-1][0])) == 2


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


# The server.


@pytest.fixture(scope="module")
def server(random_folder):
    from visualrwkv.demo.app import Server

    server = Server([str(random_folder)], sessions=8, grace=0.5, max_upload=2, concurrency=1, queue=2)
    yield server
    server.close()
    assert not server._own.exists()


@pytest.fixture
def client(server):
    from gradio_client import Client

    client = Client(server.url, verbose=False)
    yield client
    client.close()


def ask(client, models, words, *files, **changes):
    from gradio_client import handle_file

    message = {"text": words, "files": [handle_file(file) for file in files]}
    return client.submit(message=message, **controls(models, **changes), api_name="/say")


def client_words(output):
    """The words of a conversation as Gradio's client gets them."""
    contents = [message["content"] for message in output[0]]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    said = [part if isinstance(part, str) else part.get("text") for part in parts]
    return [html.unescape(words) for words in said if words is not None]


def test_a_reply_streams_to_a_client(server, client, vlm, picture_file):
    job = ask(client, server.models, "What?", picture_file, max_new_tokens=200)
    assert client_words(job.result(timeout=300)) == ["What?", vlm.ask(picture_file, "What?", max_new_tokens=200)]
    grown = [client_words(output)[1:] for output in job.outputs()]
    assert len(grown) > 3 and all("".join(b).startswith("".join(a)) for a, b in zip(grown, grown[1:], strict=False))


def test_clients_side_by_side_never_see_each_other(server, vlm, files):
    from gradio_client import Client

    clients = [Client(server.url, verbose=False) for _ in files]
    jobs = [ask(*pair) for pair in zip(clients, [server.models] * 2, ("What?", "Where?"), files, strict=True)]
    first = [client_words(job.result(timeout=300)) for job in jobs]
    jobs = [ask(client, server.models, "Why?") for client in clients]
    second = [client_words(job.result(timeout=300)) for job in jobs]
    for words, file, before, after in zip(("What?", "Where?"), files, first, second, strict=True):
        chat = vlm.chat()
        assert before == [words, chat.say(words, file, **SHORT)]
        assert after == [*before, "Why?", chat.say("Why?", **SHORT)]
    keys = [(None, client.session_hash) for client in clients]
    assert all(map(server.sessions.peek, keys))
    for client in clients:
        client.close()
    deadline = time.monotonic() + 60
    while any(map(server.sessions.peek, keys)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(server.sessions.peek, keys))  # closing the page freed them


def api(server, path):
    return f"{server.url}gradio_api/{path}"


def test_no_file_of_the_server_can_be_read(server, picture_file):
    import httpx

    source, outside = Path(panel.__file__), server._own / "sessions" / ".." / ".." / picture_file.name
    for path in (source, picture_file, Path.cwd() / "README.md", outside, "/etc/passwd", "../../../etc/passwd"):
        for form in (f"file={path}", f"file/{path}", f"file={str(path).replace('/', '%2f')}"):
            assert httpx.get(api(server, form)).status_code in (403, 404), form
    for private in ("monitoring", "monitoring/summary", "gradio_api/runs"):
        assert httpx.get(f"{server.url}{private}").status_code in (403, 404), private


def call(server, data):
    """The events of one call of /say with raw data, or the status that refused it."""
    import httpx

    joined = httpx.post(api(server, "call/say"), json={"data": data}, timeout=60)
    if joined.status_code != 200:
        return joined.status_code
    return httpx.get(api(server, f"call/say/{joined.json()['event_id']}"), timeout=300).text


def message_with(server, path):
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    return [{"text": "What?", "files": [file]}, *controls(server.models).values()]


def test_only_uploaded_files_are_taken(server, picture_file):
    before = set(server.sessions._live)
    assert "event: error" in call(server, message_with(server, str(picture_file)))
    assert "event: error" in call(server, message_with(server, "/etc/passwd"))
    assert set(server.sessions._live) <= before  # it did not come to that


def test_no_address_is_fetched(server):
    import httpx

    visits = []

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            visits.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    inside = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=inside.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{inside.server_port}/picture.png"
    try:
        assert call(server, message_with(server, address)) == 403
        for form in (f"file={address}", f"proxy={address}", f"file=HTTPS{address[4:]}"):
            assert httpx.get(api(server, form)).status_code == 403, form
        escaped = json.dumps(message_with(server, address)).replace("http:", "\\u0068ttp:")
        headers = {"content-type": "application/json"}
        body = '{"data": ' + escaped + "}"
        assert httpx.post(api(server, "call/say"), content=body, headers=headers).status_code == 403
    finally:
        inside.shutdown()
    assert visits == []


def test_what_is_too_large_is_refused(server):
    import httpx

    large = b"\x89PNG" + b"0" * (5 * 2**20)
    refused = httpx.post(api(server, "upload"), files={"files": ("large.png", large)}, timeout=60)
    assert refused.status_code == 413 and "limit" in refused.text
    # between the limit for a file and that for a request
    refused = httpx.post(api(server, "upload"), files={"files": ("large.png", large[: 2**21 + 1000])}, timeout=60)
    assert refused.status_code == 413
    assert httpx.post(api(server, "upload"), files={"files": ("small.png", large[:1000])}).status_code == 200
    body = b'{"data": ["' + b"x" * 2**21 + b'"]}'
    assert httpx.post(api(server, "call/say"), content=body).status_code == 413

    def untold():  # without a length in the header
        yield b'--edge\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        for _ in range(64):
            yield b"0" * 2**18

    headers = {"content-type": "multipart/form-data; boundary=edge"}
    try:
        status = httpx.post(api(server, "upload"), content=untold(), headers=headers, timeout=60).status_code
    except httpx.HTTPError:  # cut off
        status = 0
    assert status != 200
    assert not [path for path in server._own.rglob("*") if path.is_file() and path.stat().st_size > 2**21]
    assert httpx.get(server.url).status_code == 200  # it goes on


def test_overload_is_refused_and_passes(server):
    import httpx

    data = [{"text": "What?", "files": []}, *controls(server.models, max_new_tokens=100).values()]
    joined = [httpx.post(api(server, "call/say"), json={"data": data}, timeout=60) for _ in range(8)]
    taken = [answer for answer in joined if answer.status_code == 200]
    refused = [answer for answer in joined if answer.status_code == 503]
    assert len(taken) + len(refused) == 8 and refused and "full" in refused[0].text
    for answer in taken:
        events = httpx.get(api(server, f"call/say/{answer.json()['event_id']}"), timeout=300).text
        assert "event: complete" in events


def test_a_login_can_be_asked_for(random_folder):
    import httpx

    from visualrwkv.demo.app import Server

    server = Server([str(random_folder)], auth=[("anna", "secret")])
    try:
        assert httpx.get(f"{server.url}config").status_code == 401
        assert httpx.post(api(server, "call/say"), json={"data": []}).status_code == 401
        with httpx.Client() as person:
            wrong = person.post(f"{server.url}login", data={"username": "anna", "password": "guess"})
            assert wrong.status_code == 400
            assert person.post(f"{server.url}login", data={"username": "anna", "password": "secret"}).status_code == 200
            assert person.get(f"{server.url}config").status_code == 200
        with pytest.raises(InputError, match="port"):
            Server([str(random_folder)], port=int(server.url.rstrip("/").rpartition(":")[2]))
    finally:
        server.close()


# The command.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--auth", "anna"], "USER:PASSWORD"),
        (["--port", "70000"], "--port is 70000"),
        (["--sessions", "0"], "--sessions is 0"),
        (["--max-upload", "-1"], "--max-upload is -1"),
        (["--model", "nowhere/at all"], "nowhere/at all"),
    ],
)
def test_wrong_calls_are_one_line(capsys, options, words):
    assert cli.main(["demo", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and words in captured.err and captured.err.count("\n") == 1


def test_the_command_serves_on_this_machine_alone_and_cleans_up(random_folder, tmp_path):
    import httpx

    demo = subprocess.Popen(
        [sys.executable, "-m", "visualrwkv.cli", "demo", "--model", str(random_folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a demo within this process has claimed Gradio's folder for itself
        env={**os.environ, "TMPDIR": str(tmp_path), "GRADIO_TEMP_DIR": str(tmp_path)},
    )
    try:
        line = demo.stdout.readline()
        url = re.fullmatch(r"VisualRWKV is at (http://127\.0\.0\.1:\d+/)\n", line)[1]
        assert httpx.get(url).status_code == 200
        assert list(tmp_path.glob("visualrwkv-demo-*"))
    finally:
        demo.send_signal(signal.SIGTERM)
        _, err = demo.communicate(timeout=60)
    assert (demo.returncode, err) == (143, "") and not list(tmp_path.glob("visualrwkv-demo-*"))
