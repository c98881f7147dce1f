"""Take the README's pictures of the page, and record the first minute.

    .venv/bin/python tools/pictures.py [page] [minute]

`page` writes docs/images/page-*.png and gauge-*.png, by the test that drives the page. `minute`
runs `install.py --demo`, and writes what its terminal and its page show to docs/images/minute.gif.
Both need chromium and the packages of the tests, the second one a complete environment as well.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from playwright import sync_api

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "tests"))

from support.page_server import WAIT_MS, Page  # noqa: E402
from support.webui_page import CHROMIUM, FLAGS  # noqa: E402

IMAGES = REPO / "docs" / "images"
SIZE = {"width": 940, "height": 640}

# Seconds between pictures, the longest pause that is kept, and that of the last picture.
STEP_S = 0.12
LEAST_S = 0.08
PAUSE_S = 1.6
LAST_S = 5.0
# Time to read the plan before the text scrolls it away.
READING_S = 3.0

COLOURS = 240
# How often the page continues the text.
TEXTS = 2
MAX_GIF_BYTES = 1_500_000

COMMAND = "python install.py --demo"
ROWS = 34

TERMINAL = """<!doctype html><meta charset="utf-8"><style>
body { margin: 0; background: #16181d; color: #d6dae2; }
pre { margin: 14px 18px; font: 13.5px/18px "DejaVu Sans Mono", monospace; white-space: pre-wrap; }
b { color: #7ee2a8; font-weight: 400; }
</style><pre id="text"></pre>"""


@dataclass(frozen=True)
class Picture:
    """A picture, and for how long it is shown.

    Args:
        image: the picture.
        seconds: until the next one.
    """

    image: Image.Image
    seconds: float


def main() -> int:
    """Make what is asked for, by default everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", choices=["page", "minute", []], default=[])
    wanted = parser.parse_args().what or ["page", "minute"]
    if CHROMIUM is None:
        print("error: chromium is missing", file=sys.stderr)
        return 1
    if "page" in wanted:
        test = "tests/extension/test_page.py::test_one_click_makes_a_model_fit"
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", test], cwd=REPO,
                       env={**os.environ, "EXL_LOADER_SCREENSHOTS": str(IMAGES)}, check=True)
    if "minute" in wanted:
        record(IMAGES / "minute.gif")
    return 0


def record(path: Path) -> None:
    """Run the demo, and write its recording."""
    process = subprocess.Popen(
        [sys.executable, "install.py", "--demo", "--no-browser"], cwd=REPO,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        written = follow_terminal(process)
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
            address = re.search(r"http://127\.0\.0\.1:\d+/", written[-1][1])
            assert address is not None
            # The page first: its text is written once, when the model has been loaded.
            page = page_pictures(browser, address[0])
            pictures = [*terminal_pictures(browser, written), *page]
            browser.close()
    finally:
        # As a terminal's Ctrl-C, which reaches the page as well.
        os.killpg(process.pid, signal.SIGINT)
        process.wait(60)
    save(path, pictures)
    print(f"{path}: {len(pictures)} pictures, {path.stat().st_size:,} bytes")


def follow_terminal(process: subprocess.Popen[bytes]) -> list[tuple[float, str]]:
    """Return (seconds, all text until then) of the demo, up to its page's address."""
    assert process.stdout is not None
    written: list[tuple[float, str]] = []
    text, began = b"", time.monotonic()
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        while not re.search(rb"is at http\S+ .*\n", text):
            ready.select()
            data = os.read(process.stdout.fileno(), 65536)
            if not data:
                raise SystemExit(f"the demo ended early:\n{text.decode(errors='replace')}")
            text += data
            written.append((time.monotonic() - began, text.decode(errors="ignore")))
    return written


def terminal_pictures(
    browser: sync_api.Browser, written: list[tuple[float, str]]
) -> list[Picture]:
    """Draw the terminal as it was written, with its long pauses shortened."""
    page = browser.new_page(viewport=SIZE)
    page.set_content(TERMINAL)
    pictures = []

    def draw(typed: str, output: str, seconds: float) -> None:
        lines = output.expandtabs().splitlines()[-ROWS + 2 :]
        whole = f"<b>$ {html.escape(typed)}</b>\n" + html.escape("\n".join(lines))
        page.evaluate("text => { document.getElementById('text').innerHTML = text; }", whole)
        pictures.append(Picture(shot(page), seconds))

    for end in range(0, len(COMMAND) + 1, 4):
        draw(COMMAND[:end], "", 0.08)
    draw(COMMAND, "", 0.5)
    drawn_at, was_plan = written[0][0], False
    for (now, text), (following, _) in zip(written, [*written[1:], (written[-1][0], "")],
                                           strict=True):
        pause = following - now
        if now - drawn_at < STEP_S and pause < STEP_S and following != now:
            continue
        drawn_at, is_plan = now, "bytes" in text
        shown = min(max(pause, STEP_S), PAUSE_S)
        draw(COMMAND, text, READING_S if is_plan and not was_plan else shown)
        was_plan = was_plan or is_plan
    draw(COMMAND, written[-1][1], READING_S)
    page.close()
    return pictures


def page_pictures(browser: sync_api.Browser, address: str) -> list[Picture]:
    """Show the page with its first text, what a smaller cache saves, and another text."""
    with Page(browser, address, width=1180, height=803) as page:
        stop = page.page.locator("#exl_stop")
        page.expect_text("#exl_stats", "seed")
        pictures = [Picture(scaled(shot(page.page)), 2.5)]
        page.gauge.get_by_role("button", name="Choose 4-bit cache, saves").click()
        page.expect_options("4-bit cache")
        pictures.append(Picture(scaled(shot(page.page)), 2.0))
        page.click("#exl_load")
        page.expect_gauge("Measured equals reserved, to the byte")
        page.expect_options("4-bit cache")
        page.page.get_by_role("button", name="A class").click()
        sync_api.expect(page.page.locator("#exl_text textarea")).to_have_value(
            re.compile("^class"), timeout=WAIT_MS)
        pictures.append(Picture(scaled(shot(page.page)), 1.5))
        with screencast(page.page) as painted:
            for _ in range(TEXTS):
                page.click("#exl_write")
                sync_api.expect(stop).to_be_enabled(timeout=WAIT_MS)
                sync_api.expect(stop).to_be_disabled(timeout=WAIT_MS)
        times = [when for when, _ in painted]
        for (when, data), following in zip(painted, [*times[1:], times[-1]], strict=True):
            image = Image.open(io.BytesIO(data)).convert("RGB")
            pictures.append(Picture(scaled(image), min(max(following - when, 0.02), 0.3)))
        pictures.append(Picture(scaled(shot(page.page)), LAST_S))
    return pictures


@contextmanager
def screencast(page: sync_api.Page) -> Iterator[list[tuple[float, bytes]]]:
    """Collect (seconds, PNG) of what the browser paints during the block."""
    painted: list[tuple[float, bytes]] = []
    session = page.context.new_cdp_session(page)

    def collect(frame: dict[str, Any]) -> None:
        painted.append((frame["metadata"]["timestamp"], base64.b64decode(frame["data"])))
        session.send("Page.screencastFrameAck", {"sessionId": frame["sessionId"]})

    session.on("Page.screencastFrame", collect)
    session.send("Page.startScreencast", {"format": "png"})
    try:
        yield painted
    finally:
        session.send("Page.stopScreencast")


def shot(page: sync_api.Page) -> Image.Image:
    return Image.open(io.BytesIO(page.screenshot(animations="disabled"))).convert("RGB")


def scaled(image: Image.Image) -> Image.Image:
    """Return a picture of the page in the recording's size."""
    return image.resize((SIZE["width"], SIZE["height"]), Image.Resampling.LANCZOS)


def save(path: Path, pictures: list[Picture]) -> None:
    """Write a GIF that runs in a loop. Pictures that are equal or too short become one."""
    kept: list[Picture] = []
    for picture in pictures:
        # Viewers show nothing for less than that.
        if kept and (picture.image == kept[-1].image or kept[-1].seconds < LEAST_S):
            kept[-1] = Picture(picture.image, kept[-1].seconds + picture.seconds)
        else:
            kept.append(picture)
    # One palette, of all pictures together, so that nothing flickers.
    strip = Image.new("RGB", (SIZE["width"], SIZE["height"] * 4))
    for row, index in enumerate((len(kept) // 4, len(kept) // 2, -2, -1)):
        strip.paste(kept[index].image, (0, row * SIZE["height"]))
    palette = strip.quantize(COLOURS, dither=Image.Dither.NONE)
    frames = [one.image.quantize(palette=palette, dither=Image.Dither.NONE) for one in kept]
    data = io.BytesIO()
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:], loop=0, optimize=True,
                   duration=[round(1000 * one.seconds) for one in kept])
    if data.tell() > MAX_GIF_BYTES:
        raise SystemExit(f"{path} would be too large and stays as it is: {data.tell():,} bytes")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data.getvalue())


if __name__ == "__main__":
    sys.exit(main())
