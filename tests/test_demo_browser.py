"""The demo as a person meets it: headless Chromium on a real server, answers compared with those of the Python API.

How the page looks is tested in `test_demo_look.py`.
"""

import threading
import time

import pytest
from demo_browser import attach, needs_chromium, replies_go_on, said, toast
from PIL import Image

import visualrwkv
from visualrwkv import scenes
from visualrwkv.demo.screenshots import ask, idle
from visualrwkv.demo.talk import Talk

pytestmark = needs_chromium

COLOUR, DESCRIBE, LEFT = "What color is the object on the left?", "Describe the image.", "What shape is on the left?"
LONGEST = 256  # what the page asks for by itself


@pytest.fixture(scope="module")
def vlm():
    return visualrwkv.load()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Two drawn pictures."""
    folder = tmp_path_factory.mktemp("drawn")
    for number in range(2):
        rng = scenes.scene_rng(3, "test", number)
        scenes.draw(scenes.sample_scene(rng, min_objects=3, split="test")).save(folder / f"{number}.png")
    return [folder / f"{number}.png" for number in range(2)]


def visible(words):
    """Without white space and control characters, of which random weights write many and a page shows few."""
    return "".join(sign for sign in words if sign.isprintable() and not sign.isspace())


def figure(page, name):
    return page.locator(f"#figures [data-figure={name}] b").inner_text()


def test_a_conversation(open_page, server, vlm, drawn, tmp_path):
    page = open_page()
    chat = vlm.chat()
    attach(page, drawn[0])
    ask(page, DESCRIBE)
    assert said(page, "bot") == [vlm.ask(drawn[0], DESCRIBE, max_new_tokens=LONGEST)]
    assert not page.locator("#examples").is_visible()
    expected = [chat.say(DESCRIBE, drawn[0], max_new_tokens=LONGEST)]

    # a follow-up, then another picture
    ask(page, COLOUR)
    attach(page, drawn[1])
    ask(page, LEFT)
    expected += [chat.say(COLOUR, max_new_tokens=LONGEST), chat.say(LEFT, drawn[1], max_new_tokens=LONGEST)]
    assert said(page, "bot") == expected and said(page, "user") == [DESCRIBE, COLOUR, LEFT]
    shown = page.locator("#chat .user-row img")
    assert shown.count() == 2
    assert shown.first.evaluate("image => image.complete && image.naturalWidth") == Image.open(drawn[0]).width
    page.locator("#figures [data-figure=turns] b", has_text="3").wait_for()
    assert figure(page, "tokens_read") == f"{chat.tokens_read:,}"
    assert float(figure(page, "first_token").split()[0]) > 0

    # saved here, loaded by somebody else, who goes on
    with page.expect_download() as download:
        page.locator("#save").click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert vlm.chat.load(file).transcript == chat.transcript
    other = open_page()
    other.locator("#keep input[type=file]").set_input_files(file)
    other.locator("#chat .bot-row").nth(2).wait_for()
    ask(other, COLOUR)
    assert said(other, "bot") == [*expected, vlm.chat.load(file).say(COLOUR, max_new_tokens=LONGEST)]
    assert said(page, "bot") == expected

    # back, and in two directions
    page.locator("#undo").click()
    page.locator("#chat .bot-row").nth(2).wait_for(state="detached")
    page.locator("#fork").click()
    page.locator("#branches").wait_for()
    ask(page, LEFT)
    page.locator("#branches label", has_text="A").click()
    page.locator("#chat .bot-row").nth(2).wait_for(state="detached")
    assert said(page, "bot") == expected[:2]
    page.locator("#edit").click()
    page.locator("#chat .bot-row").nth(1).wait_for(state="detached")
    page.wait_for_function("text => document.querySelector('#box textarea').value === text", arg=COLOUR)
    page.locator("#retry").click()
    page.wait_for_timeout(500)
    idle(page)
    page.locator("#chat [data-testid=bot]", has_text=expected[0]).wait_for()
    assert said(page, "bot") == expected[:1] and said(page, "user") == [DESCRIBE]
    page.locator("#new").click()
    page.locator("#chat .bot-row").first.wait_for(state="detached")
    page.locator("#examples").wait_for()


def test_a_reply_grows_and_can_be_stopped(open_page, server, drawn):
    page = open_page()
    replies_go_on(page)
    page.evaluate("""() => {
        window.grown = [];
        new MutationObserver(() => {
            const rows = document.querySelectorAll("#chat [data-testid=bot]");
            const text = rows.length ? rows[rows.length - 1].innerText.trim() : "";
            if (text && text !== window.grown[window.grown.length - 1]) window.grown.push(text);
        }).observe(document.querySelector("#chat"), {childList: true, subtree: true, characterData: true});
    }""")
    attach(page, drawn[0])
    page.locator("#box textarea").fill(DESCRIBE)
    page.locator("#box textarea").press("Enter")
    page.wait_for_function("window.grown.length >= 3")
    page.locator("#box [aria-label=Stop]").click()
    idle(page)
    live = [session for session in server.sessions._live.values() if session.branch]
    chat = max(live, key=lambda session: session.branch.chat.stats.total_s).branch.chat
    assert chat.stats.finish == "cancelled" and chat.stats.reply_tokens < 1024
    grown = page.evaluate("window.grown")
    assert len(set(map(len, grown))) >= 3 and grown == sorted(grown, key=len)
    (last,) = said(page, "bot")
    assert visible(last) == visible(chat.transcript[-1]["text"])


def test_what_is_pressed_during_a_reply_has_the_last_word(open_page, server):
    """Gradio sends the end of a reply once more, and the page showed a turn that had been taken back."""
    page = open_page()
    replies_go_on(page)
    box = page.locator("#box textarea")
    for number in range(4):
        box.fill(f"Question {number}")
        box.press("Enter")
        page.wait_for_function("document.querySelectorAll('#chat [data-testid=bot]').length > 0")
        page.locator("#edit").click()
        idle(page)
        page.wait_for_function("document.querySelectorAll('#chat [data-testid=user]').length == 0")
        page.wait_for_timeout(500)
        assert said(page, "user") == [] and box.input_value() == f"Question {number}"
    box.press("Enter")
    page.wait_for_function("document.querySelectorAll('#chat [data-testid=bot]').length > 0")
    page.locator("#language label", has_text="中文").click()
    page.wait_for_function("document.querySelector('#figures').innerText.includes('记忆')")


def test_a_reader_of_what_was_said_is_left_alone(open_page, drawn):
    """A growing reply is followed, unless somebody has scrolled up."""
    page = open_page()
    replies_go_on(page)
    area = "document.querySelector('#chat .bubble-wrap')"
    place = f"(area => [area.scrollTop, area.scrollHeight - area.clientHeight])({area})"
    attach(page, drawn[0])
    page.set_viewport_size({"width": 700, "height": 420})
    page.locator("#box textarea").fill(DESCRIBE)
    page.locator("#box textarea").press("Enter")
    page.wait_for_function(f"{area} && {place}[1] > 150")
    at, end = page.evaluate(place)
    assert end - at < 60
    page.locator("#chat .bubble-wrap").hover()
    page.mouse.wheel(0, -120)
    page.wait_for_function(f"{place}[0] < {place}[1] - 80")
    at, end = page.evaluate(place)
    page.wait_for_function(f"{place}[1] > {end} + 20")
    assert page.evaluate(place)[0] <= at
    page.locator("#box [aria-label=Stop]").click()
    idle(page)


def test_a_look_at_the_settings_changes_nothing(open_page):
    page = open_page(locale="de-DE")  # a language that the demo does not speak
    page.locator("#examples button").first.click()
    page.locator("#chat .bot-row").wait_for()
    idle(page)
    before = said(page, "bot")
    page.locator("#reading button").first.click()
    page.locator("#model input").click()
    page.locator("#figures").click()
    page.locator("#sampling button").first.click()
    assert page.locator("#seed textarea, #seed input").input_value() == ""
    page.wait_for_timeout(1000)
    assert said(page, "bot") == before and page.locator("[data-testid=toast-text]").count() == 0
    assert not any(button.is_visible() for button in page.locator("#chat .top-panel button").all())


def test_a_draft_survives_another_answer(open_page, drawn):
    page = open_page()
    page.locator("#examples button").first.click()
    page.locator("#chat .bot-row").wait_for()
    idle(page)
    attach(page, drawn[0])
    page.locator("#box textarea").fill("A draft")
    page.locator("#retry").click()
    page.wait_for_timeout(500)
    idle(page)
    page.locator("#chat .bot-row").wait_for()
    assert (
        page.locator("#box textarea").input_value() == "A draft" and page.locator("#box .thumbnail-item").count() == 1
    )
    page.locator("#edit").click()  # would overwrite it
    page.locator("[data-testid=toast-text]").wait_for()
    assert "not sent" in toast(page) and page.locator("#box textarea").input_value() == "A draft"
    assert page.locator("#chat .bot-row").count() == 1


def test_what_is_typed_before_the_reply_begins_stays(open_page, monkeypatch):
    page = open_page()
    box, begins, seed = page.locator("#box textarea"), threading.Event(), Talk._seed

    def held(*arguments):
        assert begins.wait(60)
        return seed(*arguments)

    monkeypatch.setattr(Talk, "_seed", held)
    for number, more in enumerate((" And then?", "")):
        begins.clear()
        box.fill(DESCRIBE)
        box.press("Enter")
        page.wait_for_timeout(1000)  # Gradio takes what is in the box a moment later
        box.press_sequentially(more)
        begins.set()
        page.locator("#chat .bot-row").nth(number).wait_for()
        idle(page)
        assert box.input_value() == more.strip()
    assert said(page, "user") == [DESCRIBE, DESCRIBE]


def bring(page, kind, target, *files):
    """Drop or paste files, pairs of a name and a type."""
    prevented = page.evaluate(
        """async ([kind, target, files]) => {
            const data = new DataTransfer();
            const blob = await (await fetch(document.querySelector("#examples img").src)).blob();
            for (const [name, type] of files) data.items.add(new File([blob], name, {type}));
            const options = {bubbles: true, cancelable: true};
            const event = kind === "drop" ? new DragEvent("drop", {dataTransfer: data, ...options})
                : new ClipboardEvent("paste", {clipboardData: data, ...options});
            document.querySelector(target).dispatchEvent(event);
            return event.defaultPrevented;
        }""",
        [kind, target, files],
    )
    assert prevented  # or the browser would show the file in place of the page


def test_pictures_are_dropped_and_pasted_anywhere(open_page):
    page = open_page()
    ways = (("drop", "#chat"), ("paste", "body"), ("drop", "#box textarea"), ("paste", "#box textarea"))
    for number, (kind, target) in enumerate(ways):
        bring(page, kind, target, ("picture.png", "image/png"))
        page.locator("#box .thumbnail-item").nth(number).wait_for()
    assert page.locator("#box .thumbnail-item").count() == len(ways)


@pytest.mark.parametrize("target", ["#chat", "#box textarea"])
def test_of_files_that_are_no_pictures_a_word_is_said(open_page, target):
    page = open_page(locale="zh-CN")
    page.locator("#new", has_text="新对话").wait_for()
    bring(page, "drop", target, ("notes.txt", "text/plain"), ("picture.png", "image/png"))
    page.locator("#box .thumbnail-item").wait_for()
    page.locator("[data-testid=toast-text]").wait_for()
    words = page.locator("[data-testid=toast-body]").inner_text().split("\n")
    assert set(words) == {"×", "这里只能添加图片，或载入保存的对话。"}
    assert page.locator("[data-testid=toast-text]").count() == page.locator("#box .thumbnail-item").count() == 1
    bring(page, "drop", target, ("chat.safetensors", ""))  # goes where it can be loaded
    page.locator("[data-testid=toast-text]", has_text="chat.safetensors").wait_for()


def test_pasted_words_win_over_a_picture_of_them(open_page):
    page = open_page()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate("""async () => {
        const picture = await (await fetch(document.querySelector("#examples img").src)).blob();
        const words = new Blob(["A1\\tB1"], {type: "text/plain"});
        await navigator.clipboard.write([new ClipboardItem({"text/plain": words, "image/png": picture})]);
    }""")
    page.locator("#box textarea").press("Control+v")
    page.wait_for_function("document.querySelector('#box textarea').value")
    assert page.locator("#box textarea").input_value() == "A1\tB1"
    page.wait_for_timeout(500)
    assert page.locator("#box .thumbnail-item").count() == 0


def test_a_page_loaded_again_goes_on_with_its_conversation(open_page, server, drawn, monkeypatch):
    """Gradio loads the page again where the connection was cut in the middle of a reply."""
    before = set(server.sessions._live)
    monkeypatch.setattr(server.sessions, "grace", 600)
    page = open_page()
    replies_go_on(page)
    attach(page, drawn[0])
    page.locator("#box textarea").fill(DESCRIBE)
    page.locator("#box textarea").press("Enter")
    page.locator("#chat .bot-row").wait_for()
    page.reload()
    page.locator("#chat .bot-row").wait_for()
    assert said(page, "user") == [DESCRIBE] and page.locator("#chat .user-row img").count() == 1
    ask(page, COLOUR)
    assert said(page, "user") == [DESCRIBE, COLOUR]
    fresh = (session for key, session in server.sessions._live.items() if key not in before)
    (chat,) = (session.branch.chat for session in fresh if session.branch and session.branch.chat.nbytes)
    assert [turn["text"] for turn in chat.transcript[::2]] == [DESCRIBE, COLOUR]
    assert list(map(visible, said(page, "bot"))) == [visible(turn["text"]) for turn in chat.transcript[1::2]]
    other = page.context.new_page()  # another page of the same browser has a conversation of its own
    other.goto(server.url)
    other.locator("#examples img").first.wait_for()
    ask(other, COLOUR)
    assert said(other, "user") == [COLOUR]
    server.sessions.grace = 0.5


def test_a_closed_page_frees_its_session(open_page, server):
    page = open_page()
    before = set(server.sessions._live)
    ask(page, "Hello <b>you</b> *there*")
    assert said(page, "user") == ["Hello <b>you</b> *there*"]  # shown as it was typed
    (key,) = set(server.sessions._live) - before
    page.close()
    deadline = time.monotonic() + 60
    while server.sessions.peek(key) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.sessions.peek(key) is None


def test_bad_files_get_a_clear_word(open_page, tmp_path):
    page = open_page()
    bad = tmp_path / "notes.png"
    bad.write_text("no picture")
    attach(page, bad)
    page.locator("#box textarea").fill("What?")
    page.locator("#box [data-testid=submit-button]").click()
    page.locator("[data-testid=toast-text]").first.wait_for()
    assert "notes.png: not an image that can be read" in toast(page)
    assert page.locator("#box textarea").input_value() == "What?" and said(page, "bot") == []
    page.reload()
    page.locator("#examples img").first.wait_for()
    bad = tmp_path / "bad.safetensors"
    bad.write_text("nothing")
    page.locator("#keep input[type=file]").set_input_files(bad)
    page.locator("[data-testid=toast-text]").first.wait_for()
    assert "bad.safetensors: not a saved conversation" in toast(page)


def test_a_photograph(open_page):
    """Chromium's stand-in for a camera draws a test card."""
    page = open_page()
    page.locator("#camera").click()
    page.locator("#viewfinder [title='grant webcam access'] button").click()
    # Before its first frame has come, the page leaves a click on the shutter unheard.
    page.wait_for_function("document.querySelector('#viewfinder video')?.videoWidth > 0")
    page.locator("#viewfinder button[aria-label='capture photo']").click()
    page.locator("#box .thumbnail-item").first.wait_for()
    ask(page, COLOUR)
    assert page.locator("#chat .user-row img").count() == 1 and len(said(page, "bot")) == 1
