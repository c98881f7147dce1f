"""What the page of a real text-generation-webui says of folders that cannot do everything.

Needs TEXTGEN_WEBUI_DIR, see host_server.
"""

from __future__ import annotations

import shutil
import struct

import pytest

from support.host_page import CHROMIUM, HostPage, user_data
from support.host_server import MARKS, Server, copy_demo

pytest.importorskip("playwright.sync_api")

pytestmark = [*MARKS, pytest.mark.skipif(CHROMIUM is None, reason="no chromium")]

# A header with nothing in it.
GGUF = b"GGUF" + struct.pack("<IQQ", 3, 0, 0)


@pytest.fixture(scope="module")
def server(webui, tmp_path_factory):
    models = copy_demo(tmp_path_factory.mktemp("messages") / "models", "demo", "mute", "damaged")
    for path in models.glob("mute/tokenizer*"):
        path.unlink()
    config = models / "damaged" / "config.json"
    config.write_text(config.read_text()[:100])
    (models / "single.gguf").write_bytes(GGUF)
    data = user_data(webui, tmp_path_factory.mktemp("messages_data") / "user_data")
    flags = ["--user-data-dir", str(data), "--extensions", "exl_loader", "--ctx-size", "2048"]
    with Server(webui, models, *flags, page=True) as running:
        yield running
    shutil.rmtree(models)


@pytest.fixture
def page(browser, server):
    with HostPage(browser, server, height=1500) as page:
        yield page


def toast(page, text: str) -> None:
    page.expect(page.page.locator(".toast-body").filter(has_text=text).first).to_be_visible()


def test_a_folder_without_tokenizer_says_so_and_is_no_chat_in_silence(page, server):
    page.choose_model("mute")
    page.load()
    page.status("has no tokenizer files")
    page.tab("Chat")
    page.say("Hello")
    toast(page, "tokenizer")


def test_the_context_ends_at_the_models_own_length(page):
    page.choose_model("demo")
    page.page.get_by_label("ctx-size").first.fill("2048")
    page.load()
    page.expect(page.gauge).to_contain_text("1,024 tokens of context")


def test_a_gguf_file_chosen_with_our_loader_is_named_with_its_loader(page):
    page.choose("Model", "single.gguf")
    page.expect(page.loader).to_have_value("llama.cpp")
    page.choose("Model loader", "ExLlamav2")
    page.expect(page.gauge).to_contain_text("a GGUF file, which is llama.cpp's")
    page.button("Load").click()
    page.status("Use llama.cpp for it")


def test_a_file_that_was_cut_off_is_named(page):
    page.choose("Model", "damaged")
    toast(page, "config.json: expected valid JSON")
