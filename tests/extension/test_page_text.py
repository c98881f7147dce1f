"""The chat and the notebook of the standalone page, in headless Chromium.

The model of these tests writes `a` after any text for as long as it may, so that there is time
to scroll, to reload and to open another tab while it writes.
"""

import json

import pytest

from support.tiny import give_chat_template, write_tiny_model
from support.webui_page import CHROMIUM

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")

from support.page_server import WAIT_MS, Page, serve, write_endless_model  # noqa: E402

LOG = "#exl_chatbot [role=log]"
TEXT = "#exl_text textarea"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium"),
]

expect = sync_api.expect


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    talker = write_endless_model(folder / "talker")
    give_chat_template(talker)
    write_tiny_model(folder / "silent")
    (folder / "llama.gguf").write_bytes(b"GGUF")
    return folder


@pytest.fixture(scope="module")
def server(models):
    yield from serve(str(models / "talker"))


@pytest.fixture
def address(server, browser, models):
    """A page whose model is loaded, also after a test that has unloaded it."""
    with Page(browser, server) as page:
        if "talker" not in page.page.inner_text("#exl_line"):
            page.load_model(models / "talker")
    return server


def set_length(page, tokens):
    if not page.page.locator("#exl_max_new_tokens input").is_visible():
        page.click("#exl_settings > button")
    page.page.locator("#exl_max_new_tokens input").fill(str(tokens))
    page.page.keyboard.press("Tab")


def say(page, text):
    page.page.locator("#exl_message textarea").fill(text)
    page.page.keyboard.press("Enter")


def expect_writing(page, stop="#exl_stop_chat"):
    expect(page.page.locator(stop)).to_be_enabled()


def expect_idle(page, stop="#exl_stop_chat"):
    expect(page.page.locator(stop)).to_be_disabled()


def answers(page):
    return page.page.locator("#exl_chatbot [data-testid=bot]")


def questions(page):
    return page.page.locator("#exl_chatbot [data-testid=user]")


def length_of_answer(page):
    return len(answers(page).last.inner_text())


def wait_until_longer(page, than):
    page.page.wait_for_function(
        "([css, than]) => [...document.querySelectorAll(css)].at(-1)?.innerText.length > than",
        arg=["#exl_chatbot [data-testid=bot]", than])


def position(page, selector):
    """Return how far an element is scrolled, and the pixels below what is visible."""
    return page.page.locator(selector).evaluate(
        "e => [e.scrollTop, e.scrollHeight - e.clientHeight - e.scrollTop]")


def wait_until_it_scrolls(page, selector, pixels):
    page.page.wait_for_function(
        "([css, pixels]) => { const e = document.querySelector(css);"
        " return e.scrollHeight > e.clientHeight + pixels; }", arg=[selector, pixels])


def expect_at_end(page, selector):
    page.page.wait_for_function(
        "css => { const e = document.querySelector(css);"
        " return e.scrollTop > 0 && e.scrollHeight - e.clientHeight - e.scrollTop < 60; }",
        arg=selector)


def test_a_chat_is_written_continued_written_again_and_edited(browser, address):
    with Page(browser, address) as page:
        set_length(page, 20)
        say(page, "Hello <b>you</b>")
        expect(answers(page)).to_have_text("a" * 20)
        expect(questions(page)).to_contain_text("Hello")
        assert page.page.locator("#exl_message textarea").input_value() == ""
        page.expect_text("#exl_stats", "20 tokens")
        expect_idle(page)
        for name in ("Copy message", "Copy conversation"):
            expect(page.page.get_by_role("button", name=name).last).to_be_visible()

        page.click("#exl_continue")
        expect(answers(page)).to_have_text("a" * 40)
        expect_idle(page)
        page.click("#exl_regenerate")
        expect(answers(page)).to_have_text("a" * 20)
        say(page, "And now?")
        expect(answers(page)).to_have_count(2)
        expect_idle(page)

        # Another answer stays, another question drops what followed it.
        edit(page, 1, "edited answer")
        expect(answers(page).first).to_have_text("edited answer")
        expect(answers(page)).to_have_count(2)
        edit(page, 0, "Who are you?")
        expect(questions(page)).to_have_count(1)
        expect(questions(page)).to_have_text("Who are you?")
        expect(answers(page)).to_have_text("a" * 20)


def edit(page, index, text):
    page.page.get_by_role("button", name="Edit").nth(index).click()
    field = page.page.locator("#exl_chatbot textarea")
    field.fill(text)
    page.page.get_by_role("button", name="Submit").click()


def test_the_chat_scrolls_with_what_is_written_but_not_under_a_reader(browser, address):
    with Page(browser, address, height=700) as page:
        set_length(page, 4000)
        say(page, "\n\n".join("one two three" for _ in range(30)))
        wait_until_it_scrolls(page, LOG, 300)
        expect_writing(page)
        wait_until_longer(page, 200)
        expect_at_end(page, LOG)
        # The reader scrolls up: the text grows, and stays where it is.
        page.page.locator(LOG).evaluate("e => { e.scrollTop = 10; }")
        before = length_of_answer(page)
        wait_until_longer(page, before + 300)
        assert position(page, LOG)[0] == 10
        page.click("#exl_stop_chat")
        expect_idle(page)
        page.expect_text("#exl_stats", "stopped")


def test_the_notebook_scrolls_with_what_is_written_but_not_under_a_reader(browser, address):
    with Page(browser, address, height=900) as page:
        page.page.get_by_role("tab", name="Notebook").click()
        # It copies the text.
        expect(page.page.locator("#exl_text button")).to_be_visible()
        set_length(page, 4000)
        page.page.locator(TEXT).fill("one two three\n" * 60)
        page.click("#exl_write")
        expect_writing(page, "#exl_stop")
        expect_at_end(page, TEXT)
        written = len(page.value(TEXT))
        page.page.wait_for_function(
            "([css, than]) => document.querySelector(css).value.length > than",
            arg=[TEXT, written + 800])
        expect_at_end(page, TEXT)
        page.page.locator(TEXT).evaluate("e => { e.scrollTop = 10; }")
        written = len(page.value(TEXT))
        page.page.wait_for_function(
            "([css, than]) => document.querySelector(css).value.length > than",
            arg=[TEXT, written + 300])
        assert position(page, TEXT)[0] == 10
        page.click("#exl_stop")
        expect_idle(page, "#exl_stop")
        assert len(page.value(TEXT)) > written
        page.click("#exl_undo")
        expect(page.page.locator(TEXT)).to_have_value("one two three\n" * 60)


def test_a_text_that_was_written_while_it_was_hidden_is_shown_at_its_end(browser, address):
    with Page(browser, address, height=900) as page:
        set_length(page, 4000)
        page.page.get_by_role("tab", name="Notebook").click()
        page.page.locator(TEXT).fill("one two three\n" * 10)
        page.click("#exl_write")
        expect_writing(page, "#exl_stop")
        page.page.get_by_role("tab", name="Chat").click()
        page.page.wait_for_function(
            "([css, than]) => document.querySelector(css).value.length > than", arg=[TEXT, 2500],
            timeout=2 * WAIT_MS)
        page.page.get_by_role("tab", name="Notebook").click()
        expect_at_end(page, TEXT)
        page.click("#exl_stop")
        expect_idle(page, "#exl_stop")
        # The page opens with the chat, where the text is set before anybody sees it.
        page.page.get_by_role("tab", name="Chat").click()
        set_length(page, 5)
        say(page, "\n\n".join("one two three" for _ in range(30)))
        expect(answers(page)).to_have_count(1)
        page.reload()
        expect(questions(page)).to_have_count(1)
        expect_at_end(page, LOG)
        page.page.get_by_role("tab", name="Notebook").click()
        expect_at_end(page, TEXT)


def test_a_reload_loses_nothing_and_goes_on_with_the_text(context, address):
    with Page(context, address) as page:
        page.click("#exl_system_fold > button")
        page.page.locator("#exl_system textarea").fill("Be brief.")
        set_length(page, 3000)
        page.page.locator("#exl_temperature input").fill("0.25")
        page.page.keyboard.press("Tab")
        say(page, "Hello")
        expect_writing(page)
        wait_until_longer(page, 100)
        with page.page.expect_request_finished(
            lambda request: "next question" in (request.post_data or "")
        ):
            page.page.locator("#exl_message textarea").press_sequentially("next question")
        before = length_of_answer(page)
        page.reload()
        expect(questions(page)).to_have_text("Hello")
        expect_writing(page)
        wait_until_longer(page, before + 100)
        assert page.value("#exl_message textarea") == "next question"
        page.click("#exl_settings > button")
        assert page.value("#exl_temperature input") == "0.25"
        assert page.value("#exl_max_new_tokens input") == "3000"
        page.click("#exl_system_fold > button")
        assert page.value("#exl_system textarea") == "Be brief."
        page.click("#exl_stop_chat")
        expect_idle(page)
        page.page.get_by_role("tab", name="Notebook").click()
        # Gradio is still setting a field up when its tab opens, and typing takes a person longer.
        page.click(TEXT)
        page.page.locator(TEXT).press_sequentially("typed", delay=50)
        page.reload()
        page.page.get_by_role("tab", name="Notebook").click()
        expect(page.page.locator(TEXT)).to_have_value("typed")


def test_tabs_write_at_once_and_stop_alone(context, address):
    with Page(context, address) as first, Page(context, address) as second:
        for page, question in ((first, "first"), (second, "second")):
            set_length(page, 4000)
            say(page, question)
            expect_writing(page)
        for page in (first, second):
            page.page.bring_to_front()
            wait_until_longer(page, length_of_answer(page) + 50)
        second.click("#exl_stop_chat")
        expect_idle(second)
        first.page.bring_to_front()
        expect_writing(first)
        wait_until_longer(first, length_of_answer(first) + 50)
        first.click("#exl_stop_chat")
        expect_idle(first)
        expect(questions(first)).to_have_text("first")
    # What a closed tab wrote is in the list of the next one.
    with Page(context, address) as third:
        third.click("#exl_picker input")
        third.page.get_by_role("option", name="second").click()
        expect(questions(third)).to_have_text("second")
        third.click("#exl_new")
        expect(questions(third)).to_have_count(0)
        third.reload()
        expect(questions(third)).to_have_count(0)


def hold(page, belongs):
    """Hold requests of events back; return a list of them.

    Args:
        page: the page.
        belongs: the inputs of an event -> whether its requests are held.
    """
    held = []

    def take(route):
        if belongs(route.request.post_data_json["data"]):
            held.append(route)
        else:
            route.continue_()

    page.page.route("**/run/**", take)
    return held


def let_go(page, held):
    """Send held requests, and wait until their answers are drawn."""
    while held:
        with page.page.expect_request_finished():
            held.pop(0).continue_()
    page.page.unroute("**/run/**")
    page.page.evaluate("""async () => { for (let frame = 0; frame < 5; frame++)
        await new Promise(requestAnimationFrame); }""")


def test_a_conversation_that_is_chosen_before_a_late_answer_stays_chosen(context, address):
    def is_list(inputs):
        return len(inputs) == 3 and str(inputs[1]).startswith('{"listed"')

    def is_choice(inputs):
        return len(inputs) == 5 and "/" in str(inputs[0]) and "/" in str(inputs[4])

    with Page(context, address) as page:
        set_length(page, 3)
        for text in ("first", "second", "third"):
            page.click("#exl_new")
            expect(questions(page)).to_have_count(0)
            say(page, text)
            expect(answers(page)).to_have_count(1)
            expect_idle(page)
        picker = page.page.locator("#exl_picker input")
        expect(picker).to_have_value("third")

        def choose(title):
            picker.click()
            page.page.get_by_role("option", name=title).click()

        # The list that the click on the picker asks for comes after the choice.
        held = hold(page, is_list)
        choose("second")
        expect(questions(page)).to_have_text("second")
        let_go(page, held)
        expect(picker).to_have_value("second")
        expect(questions(page)).to_have_text("second")

        # A list that is as before is not drawn again, because a click in it might be lost.
        with page.page.expect_response(
            lambda answer: "/run/" in answer.url
            and is_list(answer.request.post_data_json["data"])
        ) as answer:
            picker.click()
        assert answer.value.json()["data"] == [{"__type__": "update"}] * 2
        page.click("#exl_message textarea")

        # Another one is chosen while the one before is on its way.
        held = hold(page, is_choice)
        with page.page.expect_request("**/run/**"):
            choose("first")
        choose("third")
        let_go(page, held)
        expect(questions(page)).to_have_text("third")
        expect(picker).to_have_value("third")


def test_another_browser_does_not_see_the_conversations(browser, address):
    with Page(browser, address) as page:
        set_length(page, 5)
        say(page, "a secret")
        expect(answers(page)).to_have_count(1)
    with Page(browser, address) as other:
        other.click("#exl_picker input")
        expect(other.page.get_by_role("option", name="New conversation")).to_be_visible()
        expect(other.page.get_by_role("option", name="a secret")).to_have_count(0)


def test_a_conversation_is_saved_and_opened_and_a_bad_file_changes_nothing(
    browser, address, tmp_path
):
    saved = tmp_path / "conversation.json"
    with Page(browser, address) as page:
        set_length(page, 15)
        say(page, "Keep this")
        expect(answers(page)).to_have_text("a" * 15)
        with page.page.expect_download() as download:
            page.click("#exl_save")
        assert download.value.suggested_filename == "conversation.json"
        download.value.save_as(saved)
        messages = json.loads(saved.read_text())["messages"]
        assert messages == [{"role": "user", "content": "Keep this"},
                            {"role": "assistant", "content": "a" * 15}]
        page.click("#exl_new")
        expect(questions(page)).to_have_count(0)
        say(page, "Another")
        expect(answers(page)).to_have_text("a" * 15)

        for data in (b"{", b'{"messages": [{"role": "user"}]}', b"\xff\xfe\x00"):
            bad = tmp_path / "bad.json"
            bad.write_bytes(data)
            choose_file(page, bad)
            page.expect_text("#exl_problem", "not a conversation")
            expect(questions(page)).to_have_text("Another")
        set_length(page, 3)
        choose_file(page, saved)
        expect(questions(page)).to_have_text("Keep this")
        expect(page.page.locator("#exl_problem")).not_to_be_visible()
        expect(page.page.locator("#exl_max_new_tokens input")).to_have_value("15")


def choose_file(page, path):
    with page.page.expect_file_chooser() as chooser:
        page.click("#exl_open")
    chooser.value.set_files(path)


def test_another_model_ends_the_text_of_every_tab_with_a_message(context, address, models):
    with Page(context, address) as first, Page(context, address) as second:
        set_length(first, 4000)
        say(first, "Hello")
        expect_writing(first)
        wait_until_longer(first, 50)
        second.load_model(models / "silent")
        first.page.bring_to_front()
        first.expect_text("#exl_problem", "unloaded")
        first.expect_text("#exl_line", "silent")
        first.expect_text("#exl_line", "no chat template")
        expect(first.page.get_by_role("tab", name="Chat")).to_have_count(0)
        first.expect_gauge("silent")
        second.load_model(models / "talker")
        first.expect_text("#exl_line", "talker")
        expect(questions(first)).to_have_text("Hello")
        assert length_of_answer(first) > 50
        second.click("#exl_unload")
        first.expect_text("#exl_line", "No model is loaded")
        first.page.get_by_role("tab", name="Notebook").click()
        first.page.locator(TEXT).fill("abc")
        first.click("#exl_write")
        first.expect_text("#exl_problem", "not loaded")
        assert first.value(TEXT) == "abc"
        second.load_model(models / "talker")
        expect(first.page.locator("#exl_problem")).not_to_be_visible()


def test_the_picker_names_models_and_what_cannot_be_loaded(browser, address):
    with Page(browser, address) as page:
        page.click("#exl_models > button")
        page.expect_text("#exl_found", "llama.gguf")
        page.expect_text("#exl_found", "GGUF file")
        page.click("#exl_model_dir input")
        page.page.get_by_role("option", name="silent").click()
        page.expect_gauge("silent")
        page.page.locator("#exl_models_dir textarea, #exl_models_dir input").fill("/nowhere")
        page.click("#exl_find")
        page.expect_text("#exl_found", "/nowhere")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1366])
def test_the_text_comes_before_the_options(browser, address, width, theme):
    with Page(browser, address, width=width, height=768, theme=theme) as page:
        chat = page.page.locator("#exl_chatbot").bounding_box()
        options = page.page.locator("#exl_model_dir").bounding_box()
        assert chat["y"] + chat["height"] < 768
        if width == 400:
            assert options["y"] > chat["y"] + chat["height"]
        else:
            assert options["x"] >= chat["x"] + chat["width"]
        assert page.page.evaluate("document.documentElement.scrollWidth") <= width
        for name in ("Send", "Stop", "Regenerate", "Continue", "New", "Save", "Open"):
            button = page.page.get_by_role("button", name=name, exact=True)
            assert button.evaluate("e => e.scrollWidth <= e.clientWidth"), name
        page.expect_text("#exl_ctx_size", "Context length")
        page.expect_text("#exl_ctx_size", "ctx_size")


# What a finger cannot hit: less than 24 pixels high or wide with its label. Gradio measures its
# tabs by copies that nobody sees.
SMALL = """() => [...document.querySelectorAll("button, input, textarea, summary")].filter(each => {
  const target = each.closest("label.checkbox-container") ?? each;
  const {width, height} = target.getBoundingClientRect();
  return height > 1 && width > 1 && Math.min(width, height) < 23.5;
}).map(each => `${each.getAttribute("aria-label") ?? each.innerText} in ` +
  each.closest("[id^=exl_]")?.id)"""


def test_what_is_clicked_is_large_enough_and_no_text_is_cut_on_a_narrow_screen(browser, address):
    with Page(browser, address, width=400, height=800) as page:
        message = page.page.locator("#exl_message textarea")
        # A hint of two lines in a field of one would be cut.
        hint = message.get_attribute("placeholder")
        assert message.evaluate("""field => {
            const style = getComputedStyle(field), pen = new OffscreenCanvas(1, 1).getContext("2d");
            pen.font = style.font;
            return pen.measureText(field.placeholder).width
              <= field.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
            }"""), hint
        set_length(page, 5)
        say(page, "Hello")
        expect(answers(page)).to_have_count(1)
        expect_idle(page)
        assert page.page.evaluate(SMALL) == []
        page.page.get_by_role("button", name="Edit").first.click()
        field = page.page.locator("#exl_chatbot textarea").bounding_box()
        assert field["height"] >= 90 and field["width"] >= 200
        assert page.page.evaluate("document.documentElement.scrollWidth") <= 400


# Roles of what a person types into, chooses from or clicks.
CONTROLS = {"textbox", "button", "combobox", "checkbox", "slider", "spinbutton", "tab", "listbox",
            "option", "link", "radio", "searchbox", "DisclosureTriangle"}


def nameless(page):
    """Return the HTML of controls that have no name for screen readers.

    A placeholder is none, because what is typed is in its place.
    """
    cdp = page.page.context.new_cdp_session(page.page)
    found = []
    for node in cdp.send("Accessibility.getFullAXTree")["nodes"]:
        if node["ignored"] or node["role"]["value"] not in CONTROLS:
            continue
        sources = [source["type"] for source in node["name"].get("sources", ())
                   if "value" in source and not source.get("superseded")]
        if not node["name"]["value"].strip() or sources == ["placeholder"]:
            html = cdp.send("DOM.getOuterHTML", {"backendNodeId": node["backendDOMNodeId"]})
            found.append(html["outerHTML"])
    return found


def test_everything_that_is_typed_into_or_clicked_has_a_name(browser, address):
    with Page(browser, address) as page:
        # Unfolded, so that all of it is there.
        folds = page.page.locator("button.label-wrap")
        expect(folds.first).to_be_visible()
        for fold in folds.all():
            fold.click()
        page.page.locator("#exl_max_new_tokens input").fill("5")
        page.page.keyboard.press("Tab")
        say(page, "Hello")
        expect(answers(page)).to_have_count(1)
        expect_idle(page)
        page.gauge.locator("summary").click()
        page.click("#exl_picker input")
        expect(page.page.get_by_role("option", name="Hello")).to_be_visible()
        assert nameless(page) == []
        page.page.get_by_role("button", name="Edit").first.click()
        expect(page.page.locator("#exl_chatbot textarea")).to_be_visible()
        assert nameless(page) == []
        page.page.get_by_role("tab", name="Notebook").click()
        expect(page.page.get_by_role("textbox", name="Text", exact=True)).to_be_visible()
        assert nameless(page) == []
