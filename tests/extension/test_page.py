"""The standalone page from end to end, in headless Chromium.

With EXL_LOADER_SCREENSHOTS=docs/images the pictures that the README shows are taken on the way.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from exl_loader import plan
from exl_loader.commands.generate import DEMO_PROMPT
from support.tiny import give_chat_template, write_tiny_model
from support.webui_page import CHROMIUM

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")

from support.page_server import REPO, Page, serve, write_endless_model  # noqa: E402

DEMO_MODEL = REPO / "exl_loader" / "demo_model"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium"),
    pytest.mark.skipif(not (DEMO_MODEL / "config.json").exists(), reason="no shipped model"),
]


@pytest.fixture(scope="module")
def address():
    yield from serve()


@pytest.fixture(scope="module")
def tight_address():
    """A page with a memory limit: with 8 cache bits the whole context just fits, with 16 not."""
    least = plan(DEMO_MODEL, ctx_size=1024, cache_type="q8").total_bytes
    yield from serve(EXL_LOADER_MEMORY_LIMIT=str(least + 300_000))


def test_the_shipped_model_loads_generates_follows_its_options_and_unloads(browser, address):
    with Page(browser, address) as page:
        page.expect_gauge("Measured equals reserved, to the byte")
        # The user has not clicked yet and sees text.
        page.expect_text("#exl_stats", "tokens/s")
        page.expect_text("#exl_stats", "seed")
        text = page.value("#exl_text textarea")
        assert text.startswith(DEMO_PROMPT) and text != DEMO_PROMPT
        # The seed is drawn: one text in a hundred is so short that nothing scrolls.
        page.page.wait_for_function(
            "() => { const e = document.querySelector('#exl_text textarea');"
            " return e.scrollHeight - e.clientHeight - e.scrollTop < 60; }")

        fp16_bytes = page.cache_bytes()
        page.toggle("cache_4bit")
        page.expect_options("4-bit cache")
        assert page.cache_bytes() < fp16_bytes / 3
        assert page.value("#exl_cache_type input") == "q4"
        page.toggle("cache_8bit")
        page.expect_options("8-bit cache")
        assert page.toggled("cache_8bit") and not page.toggled("cache_4bit")
        page.toggle("cache_8bit")
        page.expect_gauge("Loaded")
        assert page.value("#exl_cache_type input") == "fp16"
        page.page.locator("#exl_cache_type input").click()
        page.page.get_by_role("option", name="q4").click()
        page.expect_options("4-bit cache")
        assert page.toggled("cache_4bit")

        page.click("#exl_load")
        page.expect_gauge("Measured equals reserved, to the byte")
        page.expect_options("4-bit cache")
        before = page.value("#exl_text textarea")
        page.page.locator("#exl_text textarea").fill("def add(a, b):\n")
        write_on(page)
        written = page.value("#exl_text textarea")
        assert written.startswith("def add(a, b):\n") and written != before
        page.click("#exl_undo")
        sync_api.expect(page.page.locator("#exl_text textarea")).to_have_value(
            "def add(a, b):\n")

        page.click("#exl_unload")
        page.expect_gauge("Fits")
        page.expect_text("#exl_line", "No model is loaded")
        page.click("#exl_write")
        page.expect_text("#exl_problem", "not loaded")
        assert [url for url in page.urls if "127.0.0.1" not in url and url[:5] != "data:"] == []


def write_on(page):
    """Have the notebook's text continued, after the one that is being written, to its end."""
    stop = page.page.locator("#exl_stop")
    sync_api.expect(stop).to_be_disabled()
    before = len(page.value("#exl_text textarea"))
    page.click("#exl_write")
    page.page.wait_for_function(
        "than => document.querySelector('#exl_text textarea').value.length > than", arg=before)
    sync_api.expect(stop).to_be_disabled()
    page.expect_text("#exl_stats", "seed")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_one_click_makes_a_model_fit(browser, tight_address, theme):
    # High enough for the whole page, so nothing moves while a screenshot is taken.
    with Page(browser, tight_address, theme=theme, height=1600) as page:
        page.expect_gauge("Does not fit")
        box = page.gauge.bounding_box()
        assert box["y"] + box["height"] <= 768, "visible on a small screen as well"
        page.shoot("gauge-does-not-fit")
        # A failed load leaves the page unchanged.
        assert page.value("#exl_text textarea").startswith("import os")
        page.expect_text("#exl_write", "Continue")
        page.click("#exl_load")
        page.expect_text("#exl_status", "does not fit")
        details = page.page.locator("#exl_status details")
        assert not details.locator("pre").is_visible()
        details.locator("summary").click()
        sync_api.expect(details.locator("pre")).to_be_visible()
        sync_api.expect(details.locator("pre")).to_contain_text("Largest context that fits")

        page.gauge.get_by_role("button", name="tokens of context, 8-bit cache").click()
        page.expect_gauge("Fits")
        assert page.toggled("cache_8bit") and page.value("#exl_ctx_size input") == "1024"
        page.shoot("gauge-fits")
        page.gauge.locator("summary").click()
        page.gauge.get_by_role("button", name="tokens of context, 16-bit cache").click()
        page.expect_options("16-bit cache")
        page.expect_gauge("Fits")
        assert not page.toggled("cache_8bit")
        assert int(page.value("#exl_ctx_size input")) < 1024
        page.gauge.get_by_role("button", name="tokens of context, 4-bit cache").click()
        page.expect_options("1,024 tokens of context · 4-bit cache")
        page.gauge.get_by_role("button", name="Choose 8-bit cache, saves").click()
        page.expect_options("1,024 tokens of context · 8-bit cache")
        page.gauge.get_by_role("button", name="Choose 4-bit cache, saves").click()
        page.expect_options("1,024 tokens of context · 4-bit cache")
        page.click("#exl_load")
        page.expect_gauge("Measured equals reserved, to the byte")
        page.gauge.locator("dl.exl-proof").wait_for()
        page.shoot("gauge-loaded")
        page.gauge.locator("summary").click()
        page.expect_text("#exl_line", "3.6 MB and has read only Python")
        write_on(page)
        page.shoot("page", whole=True)
        page.click("#exl_unload")
        page.expect_gauge("Fits")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1366, 768), (400, 800)])
def test_the_gauge_is_visible_while_the_context_is_dragged(
    browser, address, width, height, theme
):
    with Page(browser, address, width=width, height=height, theme=theme) as page:
        page.expect_gauge("Details")
        slider = page.page.locator("#exl_ctx_size input[type=range]").bounding_box()
        # Unfolded details are below the rest of the gauge.
        assert not page.gauge.locator("details").evaluate("details => details.open")
        gauge = page.gauge.bounding_box()
        assert slider["y"] < gauge["y"] < slider["y"] + 60, "right below the slider"
        # A narrow window is scrolled to the slider, a wide one is not scrolled.
        top = slider["y"] if width == 400 else 0
        assert gauge["y"] + gauge["height"] - top <= height
        assert gauge["x"] >= 0 and gauge["x"] + gauge["width"] <= width
        assert page.page.evaluate("document.documentElement.scrollWidth") <= width
        # Unfolded details stay unfolded while the gauge is redrawn.
        page.gauge.locator("summary").click()
        page.toggle("cache_4bit")
        page.expect_options("4-bit cache")
        sync_api.expect(page.gauge.locator("dl.exl-parts")).to_be_visible()
        page.gauge.locator("summary").click()
        page.toggle("cache_4bit")
        page.expect_options("16-bit cache")
        sync_api.expect(page.gauge.locator("dl.exl-parts")).to_be_hidden()


def test_a_context_beyond_the_model_is_a_warning(browser, address):
    with Page(browser, address) as page:
        typed = page.page.locator("#exl_ctx_size input[type=number]")
        typed.fill("3000")
        page.expect_gauge("Details")
        warning = page.gauge.locator(".exl-warning")
        sync_api.expect(warning).to_contain_text("compress_pos_emb 3")
        sync_api.expect(warning).to_have_attribute("role", "alert")
        page.click("#exl_rope > button")
        type_number(page.page, "compress_pos_emb", "3")
        sync_api.expect(warning).to_have_count(0)
        slider = page.page.locator("#exl_ctx_size input[type=range]")
        sync_api.expect(slider).to_have_attribute("max", "3072")


def test_no_window_is_opened_without_a_display(monkeypatch):
    from extension.page.server import has_browser

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert not has_browser()
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("webbrowser.get", lambda: object())
    assert has_browser()


def test_the_page_listens_on_this_machine_only(address):
    port = int(address.rpartition(":")[2].strip("/"))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")}
    assert listening == {f"0100007F:{port:04X}"}
    assert f":{port:04X} " not in Path("/proc/net/tcp6").read_text()


def test_a_port_in_use_is_one_line(address):
    port = address.rpartition(":")[2].strip("/")
    result = subprocess.run(
        [sys.executable, "-m", "extension.page.server", "--no-browser", "--port", port],
        cwd=REPO, capture_output=True, text=True,
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "the page cannot be served" in result.stderr and port in result.stderr


@pytest.mark.parametrize("port", ["0", "65536", "-1", "²", "x"])
def test_an_invalid_port_is_one_line(port, capsys):
    from extension.page.server import main

    with pytest.raises(SystemExit):
        main([f"--port={port}"])
    assert f"expected a number from 1 to 65535, found {port!r}" in capsys.readouterr().err


def type_number(page, name, value):
    page.locator(f"#exl_{name} input[type=number]").fill(value)
    page.keyboard.press("Tab")


def test_stop_ends_the_text_at_once_and_keeps_it(browser, address, tmp_path):
    folder = write_endless_model(tmp_path / "endless")
    with Page(browser, address) as page:
        page.choose_model(folder)
        # The slider ends at the length of the new model, and further with RoPE scaling.
        slider = page.page.locator("#exl_ctx_size input[type=range]")
        sync_api.expect(slider).to_have_attribute("max", "32768")
        page.expect_options("8,192 tokens of context")
        page.click("#exl_rope > button")
        type_number(page.page, "alpha_value", "2")
        sync_api.expect(slider).to_have_attribute("max", "65536")
        page.click("#exl_load")
        page.expect_gauge("Measured equals reserved, to the byte")
        page.click("#exl_settings > button")
        # The first of four digits is below the slider's minimum, which is not an error.
        typed = page.page.locator("#exl_ctx_size input[type=number]")
        typed.fill("1")
        page.expect_options(" 1 tokens of context")
        typed.fill("8192")
        page.expect_gauge("Measured equals reserved, to the byte")
        page.page.locator("#exl_max_new_tokens input[type=number]").fill("4096")
        page.page.keyboard.press("Tab")
        page.click("#exl_write")
        page.expect_text("#exl_stats", "tokens/s")
        sync_api.expect(page.page.locator("#exl_stop")).to_be_enabled()
        page.click("#exl_stop")
        page.expect_text("#exl_stats", "stopped")
        sync_api.expect(page.page.locator("#exl_write")).to_be_enabled()
        tokens = int(re.match(r"\d+", page.page.locator("#exl_stats").inner_text())[0])
        assert 0 < tokens < 4096


def test_a_model_with_a_template_chats_and_the_page_can_be_opened_again(
    browser, address, tmp_path
):
    folder = give_chat_template(write_tiny_model(tmp_path / "talker"))
    with Page(browser, address) as page:
        page.load_model(folder)
        page.page.locator("#exl_message textarea").fill("Hello <b>you</b>")
        page.page.keyboard.press("Enter")
        page.expect_text("#exl_chatbot", "Hello")
        page.expect_text("#exl_stats", "seed")
        assert page.page.locator("#exl_message textarea").input_value() == ""
    # The same model on a narrow screen.
    with Page(browser, address, width=400) as page:
        page.expect_gauge("talker")
        page.expect_gauge("Measured equals reserved, to the byte")
        page.page.locator("#exl_message").wait_for()
        assert page.page.evaluate("document.documentElement.scrollWidth") <= 400
        # The model is deleted between choosing and loading.
        shutil.rmtree(folder)
        page.click("#exl_load")
        page.expect_gauge("Cannot be loaded")
        page.expect_text("#exl_line", "No model is loaded")
        assert not page.page.locator("#exl_status").is_visible(), "the gauge shows the error once"


def test_a_model_of_an_unknown_architecture_is_offered_to_run_as_llama(
    browser, address, tmp_path
):
    frob = write_tiny_model(tmp_path / "frob", architectures=["FrobForCausalLM"],
                            model_type="frob")
    with Page(browser, address) as page:
        toggle = page.page.locator("#exl_as_llama input")
        sync_api.expect(toggle).not_to_be_visible()
        page.choose_model(frob)
        page.expect_gauge("Cannot be loaded")
        toggle.check()
        page.expect_options("8,192 tokens of context")
        page.click("#exl_load")
        page.expect_gauge("Measured equals reserved, to the byte")
        page.expect_text("#exl_status", "may be wrong")
    # A page that is opened later shows the toggle of the loaded model.
    with Page(browser, address) as page:
        page.expect_gauge("Measured equals reserved, to the byte")
        sync_api.expect(page.page.locator("#exl_as_llama input")).to_be_checked()
        # It does not stay for another folder.
        page.choose_model(DEMO_MODEL)
        sync_api.expect(page.page.locator("#exl_as_llama input")).not_to_be_visible()
        page.expect_gauge("Details")
