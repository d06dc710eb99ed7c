"""How the demo's page looks, on wide screens and on phones, in headless Chromium."""

import pytest
from demo_browser import needs_chromium, said

from visualrwkv.demo.screenshots import SIZES, ask, idle

pytestmark = needs_chromium


def sideways(page):
    """Pixels by which the page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


def test_what_is_chosen_shows_as_chosen_under_the_pointer(open_page):
    page = open_page()
    page.locator("#reading button").first.click()
    chosen, other = (page.locator(f"#reading input[value={name}]") for name in ("sandwich", "first"))
    colour = "one => getComputedStyle(one).backgroundColor"
    page.mouse.move(5, 5)
    away = chosen.evaluate(colour)
    assert away != other.evaluate(colour)
    chosen.hover()
    page.wait_for_timeout(500)  # a change of colour would take a moment
    assert chosen.evaluate(colour) == away


def test_words_run_in_the_direction_of_their_script(open_page):
    page = open_page()
    ask(page, "What?\nמה זה?")
    places = page.locator("#chat [data-testid=user]").evaluate("""(element) => {
        const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
        while (!walker.nextNode().data.includes("?"));
        const range = document.createRange(), text = walker.currentNode;
        return [...text.data].map((_, index) => {
            range.setStart(text, index);
            range.setEnd(text, index + 1);
            return range.getBoundingClientRect().x;
        });
    }""")
    english, hebrew = places[:5], places[6:12]
    assert english == sorted(english) and hebrew == sorted(hebrew, reverse=True)


@pytest.mark.parametrize("size", [(820, 700), (720, 375), (390, 844), (320, 568), (1280, 600)])
def test_nothing_lies_over_something_else(open_page, size):
    page = open_page("wide")
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.wait_for_timeout(300)
    places = [page.locator(name).bounding_box() for name in ("#chat", "#examples", "#box", "#actions")]
    if size[0] <= 820:
        places.append(page.locator("#figures").bounding_box())
    for upper, lower in zip(places, places[1:], strict=False):
        assert upper["y"] + upper["height"] <= lower["y"] + 1
    assert sideways(page) <= 0
    if size[0] <= 820:
        assert page.locator("#figures .summary").bounding_box()["y"] == 0
        places = [page.locator(name).bounding_box() for name in ("#figures .summary", "#brand h1")]
        assert places[0]["height"] <= places[1]["y"]
    wide = "element => element.scrollWidth - element.clientWidth"
    for words in page.locator("#brand h1, #actions button, #keep button").all():
        assert words.evaluate(wide) <= 0, words.inner_text()


def test_a_phone_needs_no_scrolling_sideways(open_page):
    page = open_page("phone")
    assert sideways(page) <= 0
    page.locator("#examples button").first.click()
    page.locator("#chat .bot-row").wait_for()
    idle(page)
    for accordion in ("#reading", "#sampling"):
        page.locator(f"{accordion} button").first.click()
    page.wait_for_timeout(500)
    assert sideways(page) <= 0
    for name in ("#chat", "#box", "#figures", "#actions", "#sampling"):
        place = page.locator(name).bounding_box()
        assert place["x"] >= 0 and place["x"] + place["width"] <= SIZES["phone"][0], name


def test_chinese(open_page, vlm):
    page = open_page(locale="zh-CN")  # the browser's own language is taken up
    page.locator("#new", has_text="新对话").wait_for()
    page.locator("#figures", has_text="记忆").wait_for()
    page.locator("#examples button").first.click()
    page.locator("#chat .bot-row").wait_for()
    idle(page)
    page.locator("#language label", has_text="English").click()
    page.locator("#new", has_text="New chat").wait_for()
    page.locator("#figures", has_text="Memory").wait_for()
    assert len(said(page, "bot")) == 1
    page.reload()  # what was chosen is remembered
    page.locator("#new", has_text="New chat").wait_for()
    page.wait_for_function("document.documentElement.lang === 'en'")
