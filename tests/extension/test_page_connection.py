"""Requests of the standalone page that fail while the server runs: they are repeated.

Chromium ends all requests when the machine's network changes. The tests end them themselves.
"""

import asyncio
import re

import pytest

from support.webui_page import CHROMIUM

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")

from extension.page.connection import (  # noqa: E402
    HEADER,
    KEPT_BYTES,
    KEPT_S,
    MOST_RELOADS,
    UNOPENED,
    HeadScript,
    Repeats,
)
from extension.page.model_view import OPTION_NAMES  # noqa: E402
from support.page_server import Page, serve, write_endless_model  # noqa: E402
from support.tiny import give_chat_template  # noqa: E402

expect = sync_api.expect


class Application:
    """An application that answers how often it was called, and the text of the request."""

    def __init__(self):
        self.calls = 0
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(self, scope, receive, send):
        self.calls += 1
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError("the request was cut")
            body, more = body + message["body"], message.get("more_body", False)
        await self.go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d " % self.calls + body})


async def ask(app, name=None, pieces=(b"text",), *, cut=False, gone=False):
    """Send a request; return the text of its answer.

    Args:
        app: the application.
        name: of the request, if it has one.
        pieces: of its body.
        cut: the connection ends before the last piece.
        gone: it ends before the answer.
    """
    waiting = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    waiting[-1] = {"type": "http.disconnect"} if cut else waiting[-1] | {"more_body": False}
    answer = b""

    async def receive():
        return waiting.pop(0)

    async def send(message):
        nonlocal answer
        if gone:
            raise OSError("nobody is there")
        answer += message.get("body", b"")

    headers = [(HEADER.encode(), name)] if name else []
    await app({"type": "http", "headers": headers}, receive, send)
    assert not waiting, "all of the request has been read"
    return answer


def test_a_request_with_a_name_is_answered_once():
    async def run():
        app = Repeats(application := Application())
        assert await ask(app, b"one") == b"1 text"
        assert await ask(app, b"one", (b"te", b"xt")) == b"1 text"
        assert await ask(app, b"two") == b"2 text"
        assert await ask(app) == b"3 text"
        assert await ask(app) == b"4 text"
        assert application.calls == 4

    asyncio.run(run())


def test_an_answer_that_nobody_got_is_sent_to_the_next_try():
    async def run():
        app = Repeats(application := Application())
        with pytest.raises(OSError):
            await ask(app, b"one", gone=True)
        # It had not sent the answer's text.
        assert await ask(app, b"one") == b"2 text"
        # The next try comes while the first one is still being answered.
        application.go_on.clear()
        first, second = asyncio.create_task(ask(app, b"two")), asyncio.create_task(ask(app, b"two"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        application.go_on.set()
        assert await first == await second == b"3 text"

    asyncio.run(run())


def test_a_request_that_was_cut_is_answered_when_it_is_whole():
    async def run():
        app = Repeats(Application())
        with pytest.raises(ConnectionError):
            await ask(app, b"one", (b"te", b"xt"), cut=True)
        assert await ask(app, b"one", (b"te", b"xt")) == b"2 text"
        assert await ask(app, b"one", (b"te", b"xt")) == b"2 text"

    asyncio.run(run())


def test_old_answers_and_too_many_bytes_are_forgotten(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("extension.page.connection.time.monotonic", lambda: now[0])

    async def run():
        app = Repeats(application := Application())
        await ask(app, b"one")
        now[0] += KEPT_S + 1
        await ask(app, b"two")
        assert await ask(app, b"two") == b"2 text"
        assert await ask(app, b"one") == b"3 text"
        large = bytes(KEPT_BYTES // 2)
        await ask(app, b"large", (large,))
        await ask(app, b"larger", (large,))
        assert application.calls == 5
        await ask(app, b"large", (large,))
        assert application.calls == 6

    asyncio.run(run())


def test_the_script_is_added_to_the_page_alone():
    async def page(scope, receive, send):
        text = b"<html><head><title></title></head></html>"
        await send({"type": "http.response.start", "status": 200,
                    "headers": [(b"content-length", b"%d" % len(text)), (b"a", b"b")]})
        await send({"type": "http.response.body", "body": text[:9], "more_body": True})
        await send({"type": "http.response.body", "body": text[9:]})

    async def get(method, path):
        sent = []

        async def send(message):
            sent.append(message)

        await HeadScript(page, "<script>1</script>")(
            {"type": "http", "method": method, "path": path}, None, send)
        return dict(sent[0]["headers"]), b"".join(message["body"] for message in sent[1:])

    headers, body = asyncio.run(get("GET", "/"))
    assert body == b"<html><head><script>1</script><title></title></head></html>"
    assert headers == {b"content-length": b"%d" % len(body), b"a": b"b"}
    for method, path in (("HEAD", "/"), ("GET", "/theme.css")):
        assert b"script" not in asyncio.run(get(method, path))[1]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "talker"
    yield from serve(str(give_chat_template(write_endless_model(folder))))


def end_first(context, pattern, count=1):
    """End a browser's first requests of some files; return a list of all of them."""
    urls = []

    def end(route):
        urls.append(route.request.url)
        if len(urls) <= count:
            route.abort("connectionreset")
        else:
            route.continue_()

    context.route(re.compile(pattern), end)
    return urls


@pytest.mark.parametrize("pattern", [
    r"/assets/index-\w+\.js", r"/assets/index-\w+\.css", r"/assets/Index-[\w-]+\.js",
    r"/assets/Index-[\w-]+\.css", r"/assets/Blocks-[\w-]+\.js", r"/assets/HTML-[\w-]+\.css",
    r"/theme\.css", "/run/",
])
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_page_opens_also_if_a_request_fails(context, address, pattern):
    urls = end_first(context, pattern)
    with Page(context, address) as page:
        page.expect_gauge("Measured equals reserved, to the byte")
        assert len(urls) > 1, "it has asked again"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_what_a_person_does_is_done_once_if_requests_fail(context, address):
    with Page(context, address) as page:
        page.click("#exl_settings > button")
        page.page.locator("#exl_max_new_tokens input").fill("3")
        page.page.keyboard.press("Tab")
        documents, lost = [], set()
        page.page.on("framenavigated", lambda frame: documents.append(frame))

        def lose(route):
            """Lose the first try before it is at the server, and the answer of the second."""
            name = route.request.headers[HEADER]
            if name not in lost:
                lost.add(name)
                route.abort("connectionreset")
            elif name + " answered" not in lost:
                lost.add(name + " answered")
                route.fetch()
                route.abort("connectionreset")
            else:
                route.continue_()

        page.page.route("**/run/**", lose)
        page.page.locator("#exl_message textarea").fill("Hello")
        page.click("#exl_send")
        answers = page.page.locator("#exl_chatbot [data-testid=bot]")
        expect(answers).to_have_text("aaa")
        expect(page.page.locator("#exl_stop_chat")).to_be_disabled()
        page.gauge.get_by_role("button", name="Choose 4-bit cache").click()
        page.expect_options("4-bit cache")
        page.click("#exl_continue")
        expect(answers).to_have_text("aaaaaa")
        expect(page.page.locator("#exl_chatbot [data-testid=user]")).to_have_text("Hello")
        page.page.unroute("**/run/**")
        assert lost and documents == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_page_that_never_gets_a_file_says_so(context, address):
    page = context.new_page()
    end_first(context, r"/assets/Blocks-[\w-]+\.js", count=1000)
    documents = []
    page.on("framenavigated", lambda frame: documents.append(frame))
    page.goto(address)
    expect(page.locator("#exl_gone")).to_have_text(UNOPENED)
    assert len(documents) == MOST_RELOADS + 1


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_drawing_that_fails_does_not_stop_the_next_one(context, address):
    with Page(context, address) as page:
        failed = []

        def fail_first(route):
            if not failed and len(route.request.post_data_json["data"]) == len(OPTION_NAMES):
                failed.append(route)
                route.fulfill(status=500, json={"error": "it has failed"})
            else:
                route.continue_()

        page.page.route("**/run/**", fail_first)
        with page.page.expect_response(lambda answer: answer.status == 500):
            page.gauge.get_by_role("button", name="Choose 4-bit cache").click()
        page.gauge.get_by_role("button", name="Choose 8-bit cache").click()
        page.expect_options("8-bit cache")
        assert failed


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_what_a_late_answer_has_overwritten_is_drawn_again_also_after_a_failure(context, address):
    with Page(context, address) as page:
        seen = page.page.locator("#exl_seen_by_text textarea, #exl_seen_by_text input")
        expect(seen).to_have_value(re.compile(r"^\d+$"))
        newest = seen.input_value()
        failed = []

        def fail_first(route):
            inputs = route.request.post_data_json["data"]
            if not failed and len(inputs) == 3 and inputs[2] == "older":
                failed.append(route)
                route.fulfill(status=500, json={"error": "it has failed"})
            else:
                route.continue_()

        page.page.route("**/run/**", fail_first)
        seen.evaluate("""field => { field.value = "older";
            field.dispatchEvent(new Event("input", {bubbles: true})); }""")
        expect(seen).to_have_value(newest)
        assert failed
