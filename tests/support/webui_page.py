"""The page of a real text-generation-webui, as a user in Chromium sees it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from support.quick_clicks import LATE_ANSWERS
from support.webui_server import Server

CHROMIUM = shutil.which("chromium")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync")
SCREENSHOTS = os.environ.get("EXL_LOADER_SCREENSHOTS")
WAIT_MS = 180_000

# Slow enough to be watched and stopped, and long enough for both.
SETTINGS = """\
mode: instruct
max_new_tokens: 100
max_tokens_second: 20
ban_eos_token: true
dark_theme: false
"""

# Stock Gradio shows the chat's raw data, which the web UI's own Gradio does not show.
_HIDE_RAW_DATA = ".block:has(> .json-holder), .block:has(.json-node) { display: none !important }"


def user_data(webui: Path, folder: Path) -> Path:
    """Copy the web UI's folder of user data, so that its own is not changed."""
    shutil.copytree(webui / "user_data", folder, symlinks=True)
    (folder / "settings.yaml").write_text(SETTINGS)
    return folder


class WebuiPage:
    """An open page of a running web UI.

    Args:
        late: delay the server's answers, so that they arrive out of order.
    """

    def __init__(
        self, browser, server: Server, *, height: int = 1000, late: bool = False,
    ) -> None:
        from playwright.sync_api import expect

        self._server = server
        self.expect = expect
        self.page = browser.new_page(viewport={"width": 1400, "height": height})
        if late:
            self.page.add_init_script(LATE_ANSWERS)
        self.page.set_default_timeout(WAIT_MS)
        self.gauge = self.page.locator("#exl-gauge")
        self.cache_type = self.page.get_by_label("cache-type")
        self._messages = self.page.locator(".chat .message-body")
        self._said = ""
        self.loader = self.page.get_by_label("Model loader")
        self.open()

    def __enter__(self) -> WebuiPage:
        return self

    def __exit__(self, *_: object) -> None:
        self.page.close()

    def open(self) -> None:
        from playwright.sync_api import Error

        try:
            self.page.goto(self._server.address, wait_until="domcontentloaded")
        except Error as error:
            # A page that has restarted the web UI reloads itself.
            if "interrupted by another navigation" not in str(error):
                raise
            self.page.goto(self._server.address, wait_until="domcontentloaded")
        self.page.add_style_tag(content=_HIDE_RAW_DATA)
        self.tab("Model")

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def button(self, name: str):
        return self.page.get_by_role("button", name=name, exact=True)

    def choose(self, label: str, option: str, exact: bool = True) -> None:
        """Pick from a menu."""
        self.page.get_by_label(label, exact=exact).first.click()
        self.page.get_by_role("option", name=option, exact=True).click()

    def choose_model(self, name: str = "demo") -> None:
        self.choose("Model", name)
        # The web UI writes it after all its events of a choice.
        self.expect(self.page.locator("#model-tab h3").get_by_text(name)).to_be_visible()
        self.expect(self.loader).to_have_value("ExLlamav2")
        self.expect(self.gauge).to_contain_text(name)

    def box(self, locator) -> dict[str, float]:
        """Return where an element is, once it is not being redrawn."""
        for _ in range(WAIT_MS // 100):
            found = locator.bounding_box()
            if found is not None:
                return found
            self.page.wait_for_timeout(100)
        raise AssertionError(f"{locator} is not visible")

    def watch_progress(self) -> None:
        """Record what the page shows of loads from now on."""
        self.page.evaluate("""() => { window.seen = [];
            new MutationObserver(() => {
              const text = document.querySelector('#exl_progress section')?.innerText;
              if (text) window.seen.push(text);
            }).observe(document.querySelector('#exl_progress'),
                       {childList: true, subtree: true, characterData: true}); }""")

    def seen_progress(self) -> list[str]:
        return self.page.evaluate("window.seen")

    def load(self) -> None:
        # The log already has a line for each earlier load.
        before = len(self._server.reserved_bytes())
        self.button("Load").click()
        for _ in range(WAIT_MS // 100):
            if len(self._server.reserved_bytes()) > before:
                break
            self.page.wait_for_timeout(100)
        self.expect(self.gauge).to_contain_text("Measured equals reserved, to the byte")

    def status(self, text: str) -> None:
        """Wait for a text in the Model tab, which shows the result of the last action."""
        self.expect(self.page.locator("#model-tab")).to_contain_text(text)

    # The chat

    def say(self, text: str) -> None:
        self._said = _letters(text)
        box = self.page.locator("#chat-input textarea").first
        box.fill(text)
        box.press("Enter")

    def press(self, elem_id: str) -> None:
        """Click a button in a menu that opens under the mouse."""
        self.page.locator(f"#{elem_id}").first.evaluate("button => button.click()")

    def answer(self) -> str:
        """Return the letters of the answer to the last message, without their formatting."""
        messages = [_letters(text) for text in self._messages.all_text_contents()]
        if self._said not in messages:
            return ""
        # Counted from the end, because a greeting may still be inserted at the beginning.
        later = messages[::-1].index(self._said)
        return messages[-later] if later else ""

    def wait_until_longer(self, than: str) -> str:
        for _ in range(300):
            now = self.answer()
            if len(now) > len(than):
                return now
            self.page.wait_for_timeout(100)
        raise AssertionError(f"the answer stays {than!r}")

    def is_writing(self) -> bool:
        return self.page.locator("#stop").first.is_visible()

    def wait_until_written(self) -> str:
        self.expect(self.page.locator("#stop").first).to_be_hidden()
        return self.answer()

    def shoot(self, name: str, clip: dict[str, int] | None = None) -> None:
        """Take screenshots in both themes, if EXL_LOADER_SCREENSHOTS is set."""
        if not SCREENSHOTS:
            return
        for theme in ("light", "dark"):
            self.page.evaluate("on => document.body.classList.toggle('dark', on)", theme == "dark")
            self.page.wait_for_timeout(300)
            self.page.screenshot(path=Path(SCREENSHOTS) / f"{name}-{theme}.png", clip=clip)
        self.page.evaluate("document.body.classList.remove('dark')")


def _letters(text: str) -> str:
    """Return a text without spaces and without Markdown's marks."""
    return re.sub(r"[\s_*`#~]", "", text)
