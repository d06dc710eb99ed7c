"""How the demo's page looks, on wide screens and on phones, in headless Chromium."""

import io

import pytest
from demo_browser import attach, needs_chromium, said
from PIL import Image

from visualrwkv.demo.screenshots import SIZES, ask, idle

pytestmark = needs_chromium


def sideways(page):
    """Pixels by which the page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


PHONE = {"has_touch": True, "is_mobile": True}


def contrast(one, other):
    """The ratio of WCAG between two colours."""

    def light(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
        return sum(part * share for part, share in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))

    dark, bright = sorted((light(one), light(other)))
    return (bright + 0.05) / (dark + 0.05)


def contrast_of(element, colour, outside=False):
    """How an element's `colour` stands out on its background, or on that around it."""
    return contrast(
        *element.evaluate(
            """(element, [colour, outside]) => {
                const numbers = (words) => words.match(/[\\d.]+/g).map(Number);
                let ground = outside ? element.parentElement : element;
                const filled = () => numbers(getComputedStyle(ground).backgroundColor);
                while (filled()[3] === 0) ground = ground.parentElement;
                return [numbers(getComputedStyle(element)[colour]).slice(0, 3), filled().slice(0, 3)];
            }""",
            [colour, outside],
        )
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_to_be_seen_stands_out(open_page, scheme):
    page = open_page(color_scheme=scheme)
    for accordion in ("#reading", "#sampling"):
        page.locator(f"{accordion} button").first.click()
    assert contrast_of(page.locator("#brand h1 span"), "color") >= 3
    for button in ("#new", "#save"):
        page.locator(button).hover()
        page.wait_for_timeout(500)  # a change of colour would take a moment
        assert contrast_of(page.locator(button), "color") >= 4.5
    for box in ("[type=checkbox]", "[type=radio]:not(:checked)"):
        box = page.locator(f"#side input{box}").first
        assert contrast_of(box, "borderTopColor") >= 3 and contrast_of(box, "borderTopColor", outside=True) >= 3
        box.hover()
        page.wait_for_timeout(500)
        assert contrast_of(box, "borderTopColor") >= 3 and contrast_of(box, "borderTopColor", outside=True) >= 3
    assert contrast_of(page.locator("#reading input:checked").first, "borderTopColor", outside=True) >= 3
    slider = page.locator("#temperature input[type=range]")
    slider.scroll_into_view_if_needed()
    slider = slider.bounding_box()
    shown = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    x, y = slider["x"] + 8, slider["y"] + slider["height"] / 2  # of the thumb: the value is the lowest
    assert contrast(shown.getpixel((x, y)), shown.getpixel((x, y - 14))) >= 3


@pytest.mark.parametrize("width", [390, 320])
def test_a_finger_meets_what_it_aims_at(open_page, picture_file, width):
    page = open_page("phone", **PHONE)
    page.set_viewport_size({"width": width, "height": 640})
    for accordion in ("#reading", "#sampling"):
        page.locator(f"{accordion} button").first.tap()
    attach(page, picture_file)
    page.locator("#save").tap()
    page.locator("[data-testid=toast-text]").wait_for()
    targets = page.locator("button, label:has(input), input:not([type=radio], [type=checkbox]), textarea")
    low = [
        element.evaluate("element => element.outerHTML.slice(0, 200)")
        for element in targets.all()
        if element.is_visible() and element.bounding_box()["height"] < 40
    ]
    assert low == []
    assert float(page.locator("#new").evaluate("button => parseFloat(getComputedStyle(button).fontSize)")) >= 12
    picture = page.locator("#box .thumbnail-item")
    place = picture.bounding_box()
    page.touchscreen.tap(place["x"] + place["width"] / 4, place["y"] + place["height"] * 0.75)
    page.wait_for_timeout(300)
    delete = picture.locator("button")
    assert picture.count() == 1 and delete.evaluate("button => getComputedStyle(button).opacity") == "1"
    delete.tap()
    picture.wait_for(state="detached")


def test_what_a_screen_reader_says(open_page, picture_file):
    page = open_page()
    page.get_by_role("group", name="Language").wait_for()
    page.get_by_role("button", name="Model and reading", expanded=False).click()
    page.get_by_role("button", name="Model and reading", expanded=True).wait_for()
    attach(page, picture_file)
    page.locator("#box").get_by_role("img", name="Picture 1").wait_for()
    page.locator("#save").click()
    page.locator("[data-testid=toast-text]").wait_for()
    assert "Info" not in page.locator("[data-testid=toast-body]").inner_text()
    page.get_by_role("button", name="What color is the ring?", exact=True).press("Enter")
    page.locator("#chat").get_by_role("button", name="Picture 1", exact=True).wait_for()
    assert page.evaluate("document.activeElement.closest('#box') !== null")
    idle(page)
    ask(page, "And here?")
    page.locator("#language label", has_text="中文").click()
    page.locator("#chat").get_by_role("button", name="图片 2", exact=True).wait_for()
    page.locator("#new", has_text="新对话").click()
    page.locator("#examples").get_by_role("button", name="颜色").wait_for()


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


@pytest.mark.parametrize("size", [(820, 700), (720, 375), (390, 844), (382, 800), (320, 568), (1280, 600)])
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
