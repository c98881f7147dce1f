"""What tabs ask for, what they keep of what is typed, and a server that ends and starts again."""

import json

import pytest

from support.ports import free_port
from support.tiny import write_tiny_model
from support.webui_page import CHROMIUM

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")

from extension.page.conversation import Conversation  # noqa: E402
from extension.page.conversation_list import Conversations, new_key  # noqa: E402
from extension.page.session import Session  # noqa: E402
from extension.page.text_view import _typed  # noqa: E402
from extension.page.watch import MAX_TAB_BYTES, Watch  # noqa: E402
from extension.page.writing import OpenConversation  # noqa: E402
from support.page_server import Page, serve  # noqa: E402

expect = sync_api.expect

TEXT = "#exl_text textarea"


def opened():
    return OpenConversation(Session(), Conversation())


def test_a_text_that_is_older_than_what_the_server_has_is_not_kept():
    conversation = opened()
    conversation.keep({"draft": 5.0}, draft="newer")
    conversation.keep({"draft": 4.0}, draft="late request")
    conversation.keep({"draft": 5.0}, draft="late request")
    assert conversation.shown().conversation.draft == "newer"
    conversation.restore({"draft": (5.0, "stored"), "text": (1.0, "typed")})
    shown = conversation.shown()
    assert (shown.conversation.draft, shown.conversation.text) == ("newer", "typed")
    assert shown.text_version == 1
    conversation.restore({"draft": (6.0, "stored"), "text": (1.0, "again")})
    shown = conversation.shown()
    assert (shown.conversation.draft, shown.conversation.text) == ("stored", "typed")
    assert shown.text_version == 1
    # A browser without storage gives no times.
    conversation.keep(draft="typed now")
    assert conversation.shown().conversation.draft == "typed now"


@pytest.mark.parametrize("stored", [
    "", "{", "[]", "null", "1", '{"conversation": "CONVERSATION"}',
    '{"conversation": "other", "fields": {"draft": [1, "a"]}}',
    '{"conversation": "CONVERSATION", "fields": {"draft": [1]}}',
    '{"conversation": "CONVERSATION", "fields": {"draft": ["1", "a"], "turns": [1, "a"]}}',
    '{"conversation": "CONVERSATION", "fields": {"draft": [true, "a"], "text": [1, null]}}',
])
def test_what_a_tab_has_stored_is_checked(stored):
    key = new_key()
    assert _typed(f"{new_key()}/{key}", stored.replace("CONVERSATION", key)) == {}
    good = json.dumps({"conversation": key, "fields": {"draft": [1, "a"]}})
    assert _typed(f"{new_key()}/{key}", good) == {"draft": (1, "a")}


def test_the_versions_are_answered_for_a_tab_and_nothing_else():
    import gradio as gr
    from starlette.applications import Starlette
    from starlette.testclient import TestClient

    watch, conversations = Watch(), Conversations(Session(), Conversation())
    with gr.Blocks():
        watch.add("text", lambda tab: str(conversations.get(tab).version), lambda tab: False)
        watch.add("model", lambda tab: "3", lambda tab: tab.startswith("0"))
    client = TestClient(Starlette(routes=[watch.route()]))
    tab = f"0{new_key()[1:]}/{new_key()}"
    for each in (tab, "1" + tab[1:]):
        assert client.post("/exl_loader/versions", content=each).status_code == 400
        conversations.open(each)
    answer = client.post("/exl_loader/versions", content=tab)
    assert answer.json() == {"versions": {"text": "0", "model": "3"}, "busy": True}
    assert client.post("/exl_loader/versions", content="1" + tab[1:]).json()["busy"] is False
    assert client.get("/exl_loader/versions").status_code == 405
    for body in (b"", b"nobody", b"\xff", tab.encode() + b"/x", b"2" + tab[1:].encode()):
        assert client.post("/exl_loader/versions", content=body).status_code == 400
    too_long = b"a" * (MAX_TAB_BYTES + 1)
    assert client.post("/exl_loader/versions", content=too_long).status_code == 413


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_what_was_just_typed_outlives_a_reload_and_the_server(browser, tmp_path):
    port = str(free_port())
    folder = write_tiny_model(tmp_path / "tiny")
    server = serve(str(folder), "--port", port)
    with Page(browser, next(server)) as page:
        # An idle tab has Gradio draw nothing. What the page still asks for as it opens is over
        # when it has looked for news several times.
        for _ in range(2):
            page.urls.clear()
            for _ in range(3):
                with page.page.expect_request_finished(lambda request: "versions" in request.url):
                    pass
        assert [url for url in page.urls if "versions" not in url] == []

        # Nothing that is typed reaches the server, as when the page is reloaded at once.
        reloads = []
        page.page.on("framenavigated", lambda frame: reloads.append(frame))
        page.page.route(
            "**/run/predict", lambda route: route.continue_() if reloads else route.abort())
        page.click(TEXT)
        page.page.keyboard.type("typed just now")
        page.reload()
        expect(page.page.locator(TEXT)).to_have_value("typed just now")

        server.close()
        page.expect_text("#exl_gone", "does not answer")
        server = serve(str(folder), "--port", port)
        next(server)
        expect(page.page.locator("#exl_gone")).to_have_count(0)
        page.wait_until_open()
        expect(page.page.locator(TEXT)).to_have_value("typed just now")
        # The requests of the server that had ended.
        page.errors.clear()
    server.close()
