"""Screenshots of the demo for the documentation: `python -m visualrwkv.demo.screenshots docs/pictures`.

A real conversation in headless Chromium, once on a wide page and once on a phone's. Needs the extra `dev` (playwright)
and Chromium.
"""

import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from visualrwkv import InputError

SIZES = {"wide": (1280, 800), "phone": (390, 844)}
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),  # a camera that draws a test card
)
QUESTIONS = ("What shape is the blue object?", "How many objects are there?")


def find_chromium() -> str | None:
    """Path of an installed Chromium or Chrome."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def browser():
    """A headless Chromium, as a playwright browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_chromium(), args=list(FLAGS))
        try:
            yield chromium
        finally:
            chromium.close()


def idle(page) -> None:
    """Wait until no reply is being written: the box shows its button for sending again."""
    page.locator("#box [data-testid=submit-button]").wait_for(timeout=120_000)


def ask(page, question: str) -> None:
    """Send a message and wait for the whole reply."""
    rows = page.locator("#chat .bot-row").count()
    page.locator("#box textarea").fill(question)
    page.locator("#box [data-testid=submit-button]").click()
    page.locator("#chat .bot-row").nth(rows).wait_for(timeout=120_000)
    idle(page)


def main(folder: Path) -> None:
    """Write demo-wide.png and demo-phone.png."""
    from visualrwkv.demo.app import Server

    if find_chromium() is None:
        raise InputError("no Chromium was found; install it, for instance: apt-get install chromium")
    server = Server()
    try:
        with browser() as chromium:
            for name, (width, height) in SIZES.items():
                page = chromium.new_page(viewport={"width": width, "height": height}, locale="en-US")
                page.goto(server.url)
                page.locator("#examples button").nth(1).click()
                page.locator("#chat .bot-row").wait_for(timeout=120_000)
                idle(page)
                for question in QUESTIONS:
                    ask(page, question)
                page.wait_for_timeout(1000)  # bars and scrolling come to rest
                path = folder / f"demo-{name}.png"
                page.screenshot(path=path)
                # few colours make a small file
                Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
                print(f"{path}: {path.stat().st_size:,} bytes")
                page.close()
    finally:
        server.close()


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python -m visualrwkv.demo.screenshots FOLDER")
    main(Path(sys.argv[1]))
