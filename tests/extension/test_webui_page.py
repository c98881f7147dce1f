"""The plugin in the page of a real text-generation-webui, in headless Chromium.

Needs TEXTGEN_WEBUI_DIR, see support.webui_server. With EXL_LOADER_SCREENSHOTS=docs/images the tests
take the screenshots of the documents.
"""

from __future__ import annotations

import random
import shutil
import struct

import pytest

from extension.install import saved_settings
from extension.panel.panel import toggles_for
from support.host_server import DEMO, copy_demo
from support.lora_folders import write_adapter
from support.quick_clicks import (
    GAUGE_NAMES,
    after_the_last_click,
    start_clicking,
    until_all_is_answered,
)
from support.webui_page import CHROMIUM, WebuiPage, user_data
from support.webui_server import MARKS, Server

pytest.importorskip("playwright.sync_api")

pytestmark = [*MARKS, pytest.mark.skipif(CHROMIUM is None, reason="no chromium")]

Q4 = {"ctx_size": 512, "cache_type": "fp16", "cache_8bit": False, "cache_4bit": True}


@pytest.fixture(scope="module")
def data(webui, tmp_path_factory):
    """The web UI's user data: settings, chats, texts and LoRAs of these tests."""
    folder = user_data(webui, tmp_path_factory.mktemp("page") / "user_data")
    (folder / "training/datasets").mkdir(parents=True, exist_ok=True)
    (folder / "training/datasets/code.txt").write_text("import os\nimport sys\n" * 100)
    shapes = {f"model.layers.{i}.self_attn.o_proj": (256, 256) for i in range(5)}
    write_adapter(folder / "loras/mine", shapes, rank=8)
    write_adapter(folder / "loras/dora", shapes, use_dora=True)
    return folder


@pytest.fixture(scope="module")
def server(webui, data, tmp_path_factory):
    models = copy_demo(tmp_path_factory.mktemp("page") / "models", "demo", "another")
    flags = ["--user-data-dir", str(data), "--extensions", "exl_loader"]
    # Without compiled kernels, so that the first load is long enough to be watched.
    kernels = tmp_path_factory.mktemp("kernels")
    with Server(webui, models, *flags, page=True, kernels=kernels) as running:
        yield running


@pytest.fixture
def page(browser, server):
    with WebuiPage(browser, server, height=1500) as page:
        yield page


def test_choose_toggle_gauge_load_and_refuse(page, server):
    page.choose_model()
    page.expect(page.gauge).to_contain_text("Fits")
    assert not page.page.locator("#exl_pick").is_visible()
    page.page.get_by_label("cache_4bit").check()
    page.expect(page.cache_type).to_have_value("q4")
    page.expect(page.gauge).to_contain_text("4-bit cache")
    page.page.get_by_label("cache_8bit").check()
    page.expect(page.cache_type).to_have_value("q8")
    page.expect(page.page.get_by_label("cache_4bit")).not_to_be_checked()
    page.gauge.get_by_role("button", name="Choose 4-bit cache, saves").click()
    page.expect(page.cache_type).to_have_value("q4")
    page.gauge.locator("summary").click()
    page.gauge.get_by_role("button", name="1,024 tokens of context, 8-bit cache").click()
    page.expect(page.page.get_by_label("cache_8bit")).to_be_checked()
    page.gauge.get_by_role("button", name="1,024 tokens of context, 4-bit cache").click()
    page.expect(page.page.get_by_label("cache_4bit")).to_be_checked()
    page.gauge.locator("summary").click()
    page.watch_progress()
    page.load()
    page.expect(page.page.locator("#exl_progress")).to_be_hidden()
    assert any("kernels" in text for text in page.seen_progress())
    page.shoot("webui-model-tab", clip={"x": 0, "y": 0, "width": 1400, "height": 1000})
    assert server.info()["loader"] == "ExLlamav2"
    page.cache_type.fill("q5")
    page.cache_type.press("Enter")
    page.expect(page.gauge).to_contain_text("Cannot be loaded")
    page.button("Load").click()
    page.expect(page.page.locator(".exl-verdict")).to_have_count(2)
    assert server.info()["model_name"] in ("demo", "None")
    # The web UI keeps what a page showed, for pages that are opened later.
    page.cache_type.fill("fp16")
    page.cache_type.press("Enter")
    page.expect(page.gauge).to_contain_text("Fits")
    page.load()


def test_a_cache_for_more_than_one_context(page, server):
    page.choose_model()
    page.page.get_by_role("button", name="Memory").click()
    cache_size = page.page.get_by_label("cache_size")
    line = page.gauge.locator(".exl-model")
    cache_size.fill("4096")
    cache_size.press("Enter")
    page.expect(line).to_contain_text("cache of 4,096 tokens")
    page.load()
    # The web UI keeps what a page showed, for pages that are opened later.
    cache_size.fill("0")
    cache_size.press("Enter")
    page.expect(line).not_to_contain_text("cache of")
    page.load()
    larger, own = server.reserved_bytes()[-2:]
    assert larger > own


def test_quick_clicks_and_another_model_leave_fields_and_gauge_in_agreement(browser, server):
    with WebuiPage(browser, server, late=True) as page:
        page.choose_model()
        toggles = [page.page.get_by_label(name) for name in ("cache_8bit", "cache_4bit")]
        for number, toggle in enumerate(toggles):
            toggle.evaluate(f"box => box.id = 'toggle-{number}'")
        seed = random.randrange(1 << 30)
        for turn in range(6):
            name = ("another", "demo")[turn % 2]
            start_clicking(page.page, ["#toggle-0", "#toggle-1"], seed + turn)
            page.choose("Model", name)
            after_the_last_click(page.page)
            # The web UI writes it after all its events of a choice.
            page.expect(page.page.locator("#model-tab h3").get_by_text(name)).to_be_visible()
            until_all_is_answered(page.page)
            cache_type = page.cache_type.input_value()
            shown = page.gauge.locator(".exl-model").inner_text()
            found = (*(toggle.is_checked() for toggle in toggles), cache_type)
            assert found == toggles_for(cache_type), f"seed {seed}, turn {turn}"
            assert GAUGE_NAMES[cache_type] in shown and name in shown, f"seed {seed}, turn {turn}"


def test_the_gauge_keeps_what_is_unfolded_and_focused_while_it_is_redrawn(browser, server):
    with WebuiPage(browser, server, late=True) as page:
        page.choose_model()
        details = page.gauge.locator("details")
        page.expect(details).to_have_count(1)
        until_all_is_answered(page.page)
        for bits, is_open in (("4", True), ("16", False), ("4", True), ("16", False)):
            # The drawing is asked for before the click on the details.
            page.page.get_by_label("cache_4bit").click()
            details.locator("summary").click()
            page.expect(page.gauge.locator(".exl-model")).to_contain_text(f"{bits}-bit cache")
            until_all_is_answered(page.page)
            assert details.evaluate("details => details.open") == is_open
        page.gauge.get_by_role("button", name="Choose 8-bit cache, saves").press("Enter")
        page.expect(page.gauge.locator(".exl-model")).to_contain_text("8-bit cache")
        until_all_is_answered(page.page)
        focused = page.page.evaluate("document.activeElement.getAttribute('aria-label')")
        assert focused.startswith("Choose 8-bit cache, saves")


@pytest.mark.parametrize(("width", "height"), [(1366, 768), (400, 850)])
def test_the_gauge_is_visible_while_the_context_is_dragged(browser, server, width, height):
    with WebuiPage(browser, server) as page:
        # In a narrow window the web UI folds its tabs.
        page.page.set_viewport_size({"width": width, "height": height})
        page.choose_model()
        page.expect(page.gauge.locator("details")).to_have_count(1)
        slider = page.page.get_by_label("range slider for ctx-size")
        page.expect(slider).to_have_attribute("max", "1024")
        gauge, handle = page.box(page.gauge.locator("section")), page.box(slider)
        assert handle["y"] < gauge["y"] < handle["y"] + 60, "right below the slider"
        assert gauge["y"] + gauge["height"] <= height, "without scrolling"
        assert gauge["x"] >= 0 and gauge["x"] + gauge["width"] <= width
        assert page.page.evaluate("document.documentElement.scrollWidth") <= width
        # The RoPE fields are folded, and only our loaders have them.
        alpha = page.page.get_by_label("alpha_value")
        assert not alpha.is_visible()
        page.page.get_by_text("RoPE scaling").click()
        page.expect(alpha).to_be_visible()
        alpha.fill("2")
        page.expect(slider).to_have_attribute("max", "2048")
        alpha.fill("1")
        page.expect(slider).to_have_attribute("max", "1024")
        page.choose("Model loader", "Transformers")
        page.expect(page.page.get_by_text("RoPE scaling")).to_be_hidden()
        page.expect(page.gauge).to_be_hidden()


def test_an_idle_page_sends_no_requests(page):
    page.choose_model()
    page.load()
    page.page.wait_for_timeout(3000)
    asked = []
    page.page.on("request", lambda request: asked.append(request.url))
    page.page.wait_for_timeout(5000)
    assert [url for url in asked if "/predict" in url or "/queue/join" in url] == []


def test_chat_streams_stops_continues_and_regenerates(page, server):
    assert server.load(**Q4) == "OK"
    page.tab("Chat")
    page.say("def add(a, b):")
    page.expect(page.page.locator("#stop").first).to_be_visible()
    first = page.wait_until_longer("")
    second = page.wait_until_longer(first)
    assert second.startswith(first[:5]) and page.is_writing(), "the answer is streamed"
    page.press("stop")
    stopped = page.wait_until_written()
    assert "100 tokens, context" not in server.said(), "the answer was stopped"
    page.press("Continue")
    page.wait_until_longer(stopped)
    continued = page.wait_until_written()
    assert continued.startswith(stopped[:-8]) and len(continued) > len(stopped)
    page.shoot("webui-chat", clip={"x": 0, "y": 0, "width": 1400, "height": 800})
    before = server.said().count("Output generated")
    page.press("Regenerate")
    for _ in range(300):
        if server.said().count("Output generated") > before:
            break
        page.page.wait_for_timeout(100)
    assert page.wait_until_written() not in ("", continued)


def test_saved_settings_survive_a_restart_of_the_page(page, server):
    page.choose_model()
    page.page.get_by_label("cache_8bit").check()
    page.expect(page.cache_type).to_have_value("q8")
    page.load()
    page.button("Save settings").click()
    page.status("Settings for")
    assert "cache_8bit: true" in (server.models / saved_settings.CONFIG).read_text()
    began = server.said().count("Running on local URL")
    page.tab("Session")
    page.button("Apply flags/extensions and restart").click()
    page.expect(page.page.get_by_text("Reloading...")).to_be_visible()
    for _ in range(300):
        if server.said().count("Running on local URL") > began:
            break
        page.page.wait_for_timeout(200)
    # The page reloads itself meanwhile, perhaps too early.
    page.page.wait_for_timeout(4000)
    page.open()
    page.expect(page.loader).to_have_value("ExLlamav2")
    page.expect(page.page.get_by_label("cache_8bit")).to_be_checked()
    page.expect(page.gauge).to_contain_text("Measured equals reserved, to the byte")
    # Opening the page does not change the model, and the extension is registered once.
    assert server.text(), server.said()[-3000:]
    assert page.page.locator("#exl-gauge").count() == 1
    page.page.get_by_label("cache_4bit").check()
    page.expect(page.gauge).to_contain_text("4-bit cache")
    (server.models / saved_settings.CONFIG).unlink()


def test_a_page_opened_after_a_load_over_the_api_shows_that_load(page, server, greedy_text):
    # A page that has just been opened still sends its values to the web UI.
    page.page.wait_for_timeout(4000)
    assert server.load(**Q4) == "OK"
    page.open()
    page.expect(page.loader).to_have_value("ExLlamav2")
    page.expect(page.cache_type).to_have_value("q4")
    page.expect(page.page.get_by_label("cache_4bit")).to_be_checked()
    page.expect(page.gauge).to_contain_text("512 tokens of context")
    page.expect(page.gauge).to_contain_text("Measured equals reserved, to the byte")
    assert server.info()["loader"] == "ExLlamav2" and server.text() == greedy_text


def test_errors_of_a_generation_are_one_line_with_details_folded(page, server):
    assert server.load(**Q4) == "OK"
    page.open()
    page.tab("Parameters")
    grammar = page.page.get_by_label("Grammar", exact=True)
    grammar.fill("root ::= missing")
    page.tab("Chat")
    page.say("Hello")
    toast = page.page.locator(".toast-body")
    page.expect(toast).to_contain_text("grammar_string")
    assert "Traceback" not in toast.inner_text()
    page.tab("Model")
    page.expect(page.gauge).to_contain_text("Generation failed")
    assert not page.gauge.locator("details pre").is_visible()
    page.tab("Parameters")
    grammar.fill("")
    page.tab("Chat")
    page.say("Hello again")
    page.wait_until_longer("")
    page.wait_until_written()
    page.tab("Model")
    page.expect(page.gauge).not_to_contain_text("Generation failed")


def test_a_model_that_vanishes_after_it_was_chosen(page, server):
    shutil.copytree(DEMO, server.models / "gone")
    page.page.locator("#model-tab .refresh-button").first.click()
    page.choose_model("gone")
    shutil.rmtree(server.models / "gone")
    page.button("Load").click()
    page.status("Cannot be loaded")
    page.expect(page.page.locator("#model-tab")).not_to_contain_text("Traceback")
    assert server.load(**Q4) == "OK" and server.text()


def test_loras(page, server):
    assert server.load(**Q4) == "OK"
    bare = server.text()
    page.open()
    page.page.get_by_text("See more options").click()
    page.choose("LoRA(s)", "mine")
    page.button("Apply LoRAs").click()
    page.status("Successfully applied the LoRAs")
    assert server.info()["lora_names"] == ["mine"] and server.text() != bare
    page.expect(page.gauge).to_contain_text("LoRAs")
    # Gradio's label has the chosen names after its text.
    page.choose("LoRA(s)", "dora", exact=False)
    page.button("Apply LoRAs").click()
    page.status("The LoRAs were not applied")
    page.status("DoRA")
    assert server.info()["lora_names"] == ["mine"]


@pytest.mark.parametrize("loader", ["ExLlamav2", "ExLlamav2_HF"])
def test_perplexity(page, server, loader):
    assert server.load(**Q4, loader=loader) == "OK"
    page.tab("Training")
    page.tab("Perplexity evaluation")
    page.choose("Input dataset", "code")
    page.page.get_by_label("max_length").fill("256")
    page.page.get_by_label("max_length").press("Tab")
    page.button("Evaluate loaded model").click()
    log = page.page.locator("#evaluate-tab")
    page.expect(log).to_contain_text("The perplexity for demo is:")
    assert float(log.inner_text().split("perplexity for demo is:")[1].split()[0]) < 10


def test_many_users(webui, data, server, browser, greedy_text):
    flags = ["--multi-user", "--model", "demo", "--ctx-size", "512", "--cache-4bit",
             "--user-data-dir", str(data)]
    with Server(webui, server.models, *flags, page=True) as running:
        assert running.text() == greedy_text
        with WebuiPage(browser, running) as page:
            page.tab("Chat")
            page.say("def add(a, b):")
            page.wait_until_longer("")
            page.wait_until_written()
        assert "Traceback" not in running.said()


# ---- Folders that lack something ----

# A header without tensors and without metadata.
GGUF = b"GGUF" + struct.pack("<IQQ", 3, 0, 0)


@pytest.fixture(scope="module")
def server_with_bad_folders(webui, tmp_path_factory):
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
def bad_folders(browser, server_with_bad_folders):
    """The page of a web UI whose models each lack something."""
    with WebuiPage(browser, server_with_bad_folders, height=1500) as page:
        yield page


def toast(page, text: str) -> None:
    page.expect(page.page.locator(".toast-body").filter(has_text=text).first).to_be_visible()


def test_a_folder_without_tokenizer_is_reported_at_load_and_in_the_chat(bad_folders):
    bad_folders.choose_model("mute")
    bad_folders.load()
    bad_folders.status("has no tokenizer files")
    bad_folders.tab("Chat")
    bad_folders.say("Hello")
    toast(bad_folders, "tokenizer")


def test_the_context_ends_at_the_models_own_length(bad_folders):
    bad_folders.choose_model("demo")
    bad_folders.page.get_by_label("ctx-size").first.fill("2048")
    bad_folders.load()
    bad_folders.expect(bad_folders.gauge).to_contain_text("1,024 tokens of context")


def test_a_gguf_file_chosen_with_our_loader_is_named_with_its_loader(bad_folders):
    bad_folders.choose("Model", "single.gguf")
    bad_folders.expect(bad_folders.loader).to_have_value("llama.cpp")
    bad_folders.choose("Model loader", "ExLlamav2")
    bad_folders.expect(bad_folders.gauge).to_contain_text("a GGUF file, which is llama.cpp's")
    bad_folders.button("Load").click()
    bad_folders.status("Use llama.cpp for it")


def test_a_file_that_was_cut_off_is_named(bad_folders):
    bad_folders.choose("Model", "damaged")
    toast(bad_folders, "config.json: expected valid JSON")
