"""The standalone page for tests: served by a process of its own, and as a user sees it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright import sync_api

from support import REPO
from support.tiny import write_tiny_model
from support.webui_page import WAIT_MS

SCREENSHOTS = os.environ.get("EXL_LOADER_SCREENSHOTS")


def serve(*arguments, **environ):
    """Start the page as `install.py --demo` does; yield its address."""
    with running(*arguments, **environ) as (address, _):
        yield address


@contextlib.contextmanager
def running(*arguments, **environ):
    """Run the page for the block: its address, and its process, which may be killed."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "extension.page.server", "--no-browser", *arguments], cwd=REPO,
            stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **environ},
        )
        try:
            line = process.stdout.readline()
            address = re.search(r"http://127\.0\.0\.1:\d+/", line)
            if address is None:
                process.terminate()
                process.wait(300)
                errors.seek(0)
                raise AssertionError(f"the page did not start: {line!r}\n{errors.read()[-3000:]}")
            yield address[0], process
        finally:
            process.terminate()
            process.wait(300)


# What a page says that has not got one of its files. It opens again then.
LOST_FILE = re.compile("preload CSS|dynamically imported module")

# What Chromium says when the machine's network changes, as other tests have it do.
NETWORK_CHANGED = "net::ERR_NETWORK_CHANGED"


class Page:
    """An open page: what a user sees of it and does with it."""

    def __init__(self, browser, address, *, theme="light", width=1280, height=1000):
        """Open it in a browser, or in a context, where it is another tab of the same browser."""
        if isinstance(browser, sync_api.BrowserContext):
            self.page = browser.new_page()
            self.page.set_viewport_size({"width": width, "height": height})
        else:
            self.page = browser.new_page(viewport={"width": width, "height": height},
                                         color_scheme=theme)
        self.page.set_default_timeout(WAIT_MS)
        self.theme, self.errors, self.urls = theme, [], []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.urls.append(request.url))
        self._navigate(lambda: self.page.goto(address))
        self.gauge = self.page.locator("#exl_gauge .exl-gauge")
        try:
            self.wait_until_open()
        except AssertionError as error:
            raise AssertionError(f"{error}\nThe page's errors: {self.errors}") from None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.page.close()
        if kind is None:
            assert [each for each in self.errors if not LOST_FILE.search(each)] == []

    @staticmethod
    def _navigate(go):
        """Go to the page, again where the network has changed, as a browser with a window does."""
        for _ in range(5):
            try:
                return go()
            except sync_api.Error as error:
                if NETWORK_CHANGED not in str(error):
                    raise
        return go()

    def wait_until_open(self):
        """Wait until the page shows the loaded model, if there is one."""
        self.gauge.wait_for()
        line = self.page.locator("#exl_line")
        sync_api.expect(line).to_be_visible()
        sync_api.expect(line).not_to_contain_text("Opening")
        sync_api.expect(line).not_to_contain_text("being loaded")
        # The panel shows it too, and would overwrite what is typed before.
        seen = self.page.locator("#exl_seen_model textarea, #exl_seen_model input")
        sync_api.expect(seen).to_have_value(re.compile(r"^\d+$"))

    def reload(self):
        self._navigate(self.page.reload)
        self.wait_until_open()

    def load_model(self, folder):
        """Type a folder, and load its model."""
        self.choose_model(folder)
        self.click("#exl_load")
        self.expect_gauge("Measured equals reserved, to the byte")
        self.expect_text("#exl_line", folder.name)

    def choose_model(self, folder):
        self.page.locator("#exl_model_dir input").fill(str(folder))
        self.page.keyboard.press("Enter")
        self.expect_gauge(folder.name)

    def expect_gauge(self, text):
        sync_api.expect(self.gauge).to_contain_text(text)

    def expect_options(self, text):
        sync_api.expect(self.gauge.locator(".exl-model")).to_contain_text(text)

    def expect_text(self, selector, text):
        sync_api.expect(self.page.locator(selector)).to_contain_text(text)

    def click(self, selector):
        self.page.locator(selector).click()

    def toggle(self, name):
        self.page.locator(f"#exl_{name} input[type=checkbox]").click()

    def toggled(self, name):
        return self.page.locator(f"#exl_{name} input[type=checkbox]").is_checked()

    def value(self, selector):
        return self.page.locator(selector).first.input_value()

    def cache_bytes(self):
        """Return the cache's exact bytes from the legend."""
        entry = self.gauge.locator("dl.exl-parts > div", has_text="Cache").locator("dd")
        return int(entry.get_attribute("title").removesuffix(" bytes").replace(",", ""))

    def shoot(self, name, whole=False):
        """Take a screenshot, if EXL_LOADER_SCREENSHOTS is set."""
        if SCREENSHOTS:
            path = Path(SCREENSHOTS) / f"{name}-{self.theme}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            # Without transitions, such as that of a button's border after a click.
            if whole:
                upper = {"x": 0, "y": 0, "width": 1280, "height": 880}
                self.page.screenshot(path=path, clip=upper, animations="disabled")
            else:
                self.gauge.screenshot(path=path, animations="disabled")


def write_endless_model(folder):
    """Write a model that generates `a` after any text, with a context for minutes of it.

    It has enough layers that the page's longest answer takes seconds.
    """
    from safetensors.torch import load_file, save_file

    write_tiny_model(folder, num_hidden_layers=64)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            tensor.zero_()
        elif name.endswith(("norm.weight", "embed_tokens.weight")):
            tensor.fill_(1)
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    tensors["lm_head.weight"][vocab["a"]] = 1
    save_file(tensors, folder / "model.safetensors")
    return folder
