"""What the tests of the demo's page in a browser share; their server and pages are fixtures of `conftest.py`."""

import pytest

pytest.importorskip("gradio")
pytest.importorskip("playwright.sync_api")

from visualrwkv.demo.screenshots import find_chromium

needs_chromium = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium is installed (apt-get install chromium)"
)

SLOW = 120_000  # ms; other work may hold the machine


def attach(page, picture):
    page.locator("#box input[type=file]").first.set_input_files(picture)
    page.locator("#box .thumbnail-item").first.wait_for()


def said(page, who):
    """The texts of all messages of "user" or "bot"."""
    spoken = [part.inner_text().strip() for part in page.locator(f"#chat [data-testid={who}]").all()]
    return [words for words in spoken if words]  # pictures have none


def toast(page):
    return page.locator("[data-testid=toast-text]").last.inner_text()


def replies_go_on(page):
    """Pick the model with random weights in the menu, and long replies."""
    page.locator("#reading button").first.click()
    page.locator("#model input").click()
    page.locator("[role=option]", has_text="random").click()
    page.locator("#sampling button").first.click()
    longest = page.locator("#max_new_tokens input[type=number]")
    longest.fill("1024")
    longest.press("Tab")
