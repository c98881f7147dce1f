"""Conversations that the browser keeps: they outlive the server, and can be deleted."""

import json
import re

import pytest

from extension.page import browser_storage
from extension.page.browser_script import MAX_FILE_BYTES
from support.ports import free_port
from support.tiny import give_chat_template
from support.webui_page import CHROMIUM

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")

from support.page_server import Page, running, write_endless_model  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium"),
]

expect = sync_api.expect

# Nothing listens there; the tests answer for it.
ORIGIN = "http://127.0.0.1:9/"
BLANK = {"body": "<!doctype html><title>a page</title>", "content_type": "text/html"}

# The storage as another origin, another version or a browser without it has it.
NO_STORAGE = """for (const name of ["indexedDB", "localStorage", "sessionStorage"])
  Object.defineProperty(
    window, name, {get() { throw new DOMException("no", "SecurityError"); }});"""
SILENT_STORAGE = "IDBFactory.prototype.open = () => ({});"

# Writes into the storage what another version may have written.
PUT = """records => new Promise(done => {
  const asked = indexedDB.open("exl_loader");
  asked.onsuccess = () => {
    const change = asked.result.transaction(["texts", "titles"], "readwrite");
    for (const [key, title, changed, text] of records) {
      change.objectStore("titles").put({key, title, changed});
      change.objectStore("texts").put(text, key);
    }
    change.oncomplete = () => { asked.result.close(); done(); };
  }; })"""


# The scripts alone, in a page of another server.

@pytest.fixture
def origin(browser):
    """A browser of its own, with an empty page at an address that has storage."""
    context = browser.new_context()
    context.route(ORIGIN, lambda route: route.fulfill(**BLANK))
    yield context
    context.close()


def blank(context, script=""):
    page = context.new_page()
    if script:
        page.add_init_script(script)
    page.goto(ORIGIN)
    return page


def run(page, source, *values):
    return page.evaluate(f"values => ({source})(...values)", list(values))


def open_tab(page):
    tab, typed, kept, others = run(page, browser_storage.open_tab())
    return tab, typed, kept, json.loads(others)


def record(key, changed, text="{}", title="a title", empty=False, writing=False):
    return json.dumps([key, changed, title, empty, writing]) + "\n" + text


def keep(page, *values, **more):
    return run(page, browser_storage.keep_record(), record(*values, **more))


def key(number):
    return f"{number:032x}"


def test_a_tab_has_its_name_after_a_reload_and_another_tab_has_another(origin):
    page = blank(origin)
    tab, _, kept, others = open_tab(page)
    assert re.fullmatch("[0-9a-f]{32}/[0-9a-f]{32}", tab) and kept == ""
    assert others == {"listed": [], "before": None, "unread": "", "isOff": False}
    page.reload()
    assert open_tab(page)[0] == tab
    other = open_tab(blank(origin))[0]
    assert other.split("/")[0] == tab.split("/")[0] and other != tab


def test_a_newer_record_is_kept_and_an_older_one_is_not(origin):
    page, other = blank(origin), blank(origin)
    own = open_tab(page)[0].split("/")[1]
    open_tab(other)
    assert keep(page, own, 5, "five") == {"__type__": "update"}
    keep(other, own, 4, "four")
    page.reload()
    _, _, kept, others = open_tab(page)
    assert (kept, others["listed"]) == ("five", [[own, "a title", 5]])
    keep(other, own, 6, "six", title="<b>")
    keep(page, key(1), 7, '{"settings": {"seed": 1}, "messages": [{"role": "system"}, {}]}')
    chosen = run(page, browser_storage.open_chosen(), f"{key(0)}/{own}", "", "", "")
    assert chosen[2] == "six"
    assert run(page, browser_storage.list_kept(), "tab", "", "seen") == [
        "tab", json.dumps({"listed": [[key(1), "a title", 7], [own, "<b>", 6]]},
                          separators=(",", ":")), "seen"]
    before = open_tab(blank(origin))[3]["before"]
    assert before == {"settings": {"seed": 1}, "messages": [{"role": "system"}]}


def test_several_records_are_kept_and_a_text_that_is_being_written_once_a_second(origin):
    page = blank(origin)
    open_tab(page)
    page.evaluate(f"records => ({browser_storage.keep_record()})(records)",
                  record(key(1), 1, "one") + "\n" + record(key(2), 1, "two"))
    assert [each[0] for each in open_tab(page)[3]["listed"]] == [key(1), key(2)]
    # A clock of the test's own: no time passes unless it says so.
    page.clock.install()
    page.clock.pause_at(page.evaluate("Date.now()") + 10_000)
    texts = "key => window.exlStorage.find(key).then(found => found[0])"
    start = "record => { window.exlStorage.keep(record); }"
    for changed, more in ((2, {"writing": True}), (3, {"writing": True})):
        page.evaluate(start, record(key(1), changed, str(changed), **more))
        page.clock.run_for(1)
    assert page.evaluate(texts, key(1)) == "2"
    page.clock.run_for(browser_storage.WRITE_MS)
    assert page.evaluate(texts, key(1)) == "3"
    page.evaluate(start, record(key(1), 4, "4", writing=True))
    page.evaluate(start, record(key(1), 5, "5"))
    assert page.evaluate(texts, key(1)) == "5", "its end is kept at once"


def test_an_empty_conversation_is_kept_only_where_there_was_something(origin):
    page = blank(origin)
    open_tab(page)
    keep(page, key(1), 1, empty=True)
    keep(page, key(2), 1)
    keep(page, key(2), 2, "emptied", empty=True)
    assert open_tab(page)[3]["listed"] == [[key(2), "a title", 2]]


def test_the_oldest_conversation_goes_and_the_page_says_which(origin):
    page = blank(origin)
    open_tab(page)
    page.evaluate(PUT, [[key(i), f"title {i}", i, "{}"] for i in range(browser_storage.MAX_KEPT)])
    assert len(open_tab(page)[3]["listed"]) == browser_storage.MAX_KEPT
    told = keep(page, key(5000), 5000, title="new")
    assert told["visible"] and "1,000 conversations" in told["value"]
    assert "title 0<" in told["value"]
    listed = open_tab(page)[3]["listed"]
    assert len(listed) == browser_storage.MAX_KEPT and listed[0][1] == "new"
    assert listed[-1][1] == "title 1"
    assert keep(page, key(5000), 5001)["visible"] is False, "said once"


def test_a_deleted_conversation_is_gone_in_all_tabs_with_what_is_under_way(origin):
    page, other = blank(origin), blank(origin)
    tab = open_tab(page)[0]
    own = tab.split("/")[1]
    open_tab(other)
    keep(page, own, 5, "five")
    page.evaluate("key => sessionStorage.setItem('exl_loader_typed',"
                  " JSON.stringify({conversation: key, fields: {}}))", own)
    page.once("dialog", lambda dialog: dialog.dismiss())
    assert run(page, browser_storage.delete_kept(), tab) == ""
    assert len(open_tab(page)[3]["listed"]) == 1
    page.once("dialog", lambda dialog: dialog.accept())
    assert run(page, browser_storage.delete_kept(), tab) == tab
    assert page.evaluate("sessionStorage.exl_loader_typed") is None
    keep(page, own, 9, "late")
    other.wait_for_timeout(200)
    keep(other, own, 9, "late")
    assert json.loads(run(other, browser_storage.list_kept(), "", "")[1])["listed"] == []
    # Its name may be used again after a reload.
    other.reload()
    open_tab(other)
    keep(other, own, 10, "new")
    assert open_tab(other)[3]["listed"] == [[own, "a title", 10]]


@pytest.mark.parametrize(("script", "words", "unread"), [
    (NO_STORAGE, "keeps no conversations", ""), (SILENT_STORAGE, "cannot be written", "failed"),
    ("const open = IDBFactory.prototype.open; IDBFactory.prototype.open = function (name) {"
     " return open.call(this, name, 0.5); };", "cannot be written", "failed"),
])
def test_a_storage_that_does_not_work_is_said_and_the_page_opens(origin, script, words, unread):
    page = blank(origin, script)
    tab, typed, kept, others = open_tab(page)
    assert re.fullmatch("[0-9a-f]{32}/[0-9a-f]{32}", tab) and (typed, kept) == ("", "")
    assert others == {"listed": [], "before": None, "unread": unread,
                      "isOff": script == NO_STORAGE}
    assert run(page, browser_storage.list_kept(), "tab", "", "seen") == [
        "tab", '{"listed":[]}', "seen"]
    assert keep(page, key(1), 1, empty=True) == {"__type__": "update"}, "nothing is lost"
    told = keep(page, key(1), 2)
    assert words in told["value"] and told["visible"]
    assert keep(page, key(1), 3) == {"__type__": "update"}, "said already"


def test_a_full_storage_is_said_until_there_is_room_again(origin):
    page = blank(origin)
    devtools = origin.new_cdp_session(page)
    quota = {"origin": ORIGIN.rstrip("/")}
    devtools.send("Storage.overrideQuotaForOrigin", quota | {"quotaSize": 10})
    own = open_tab(page)[0].split("/")[1]
    assert "storage is full" in keep(page, own, 1, "a text")["value"]
    assert open_tab(page)[2] == ""
    devtools.send("Storage.overrideQuotaForOrigin", quota)
    # Another record brings the one that had no room.
    assert keep(page, key(1), 1, "another")["visible"] is False
    assert open_tab(page)[2] == "a text"


def test_a_storage_of_a_newer_version_is_left_as_it_is(origin):
    page = blank(origin)
    page.evaluate("""name => new Promise(done => {
        const asked = indexedDB.open(name, 99);
        asked.onsuccess = () => { asked.result.close(); done(); }; })""", browser_storage.DATABASE)
    assert open_tab(page)[3]["unread"] == "newer"
    assert "A newer exl_loader" in keep(page, key(1), 1)["value"]
    assert page.evaluate("indexedDB.databases()")[0]["version"] == 99


def test_a_conversation_that_no_request_can_carry_is_not_kept_and_the_one_before_is(origin):
    page = blank(origin)
    own = open_tab(page)[0].split("/")[1]
    keep(page, own, 1, "short")
    told = page.evaluate(
        f"async ([head, count]) => ({browser_storage.keep_record()})("
        r'head + "\n" + "é".repeat(count))',
        [json.dumps([own, 2, "", False, False]), MAX_FILE_BYTES // 2 + 1])
    assert "too long" in told["value"]
    assert open_tab(page)[2] == "short"
    assert keep(page, own, 3, "short again")["visible"] is False


# The page itself.

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_endless_model(tmp_path_factory.mktemp("models") / "talker")
    give_chat_template(folder)
    return folder


def say(page, text):
    page.page.locator("#exl_message textarea").fill(text)
    page.page.keyboard.press("Enter")


def set_length(page, tokens):
    if not page.page.locator("#exl_max_new_tokens input").is_visible():
        page.click("#exl_settings > button")
    page.page.locator("#exl_max_new_tokens input").fill(str(tokens))
    page.page.keyboard.press("Tab")


def answer(page):
    return page.page.locator("#exl_chatbot [data-testid=bot]").last


def question(page):
    return page.page.locator("#exl_chatbot [data-testid=user]")


def wait_until_longer(page, than):
    page.page.wait_for_function(
        "than => [...document.querySelectorAll('#exl_chatbot [data-testid=bot]')].at(-1)"
        "?.innerText.length > than", arg=than)


def wait_until_kept(page, title):
    page.page.wait_for_function(
        "async title => (await window.exlStorage.list()).some(each => each[1] === title)",
        arg=title)


def choose(page, title):
    """Choose the conversation whose first question is its title."""
    page.click("#exl_picker input")
    page.page.get_by_role("option", name=title, exact=True).click()
    expect(question(page)).to_have_text(title)


def test_conversations_outlive_a_server_that_is_killed_while_it_writes(context, model):
    port = str(free_port())
    with running(str(model), "--port", port) as (address, server):
        with Page(context, address) as closed:
            set_length(closed, 20)
            say(closed, "closed one")
            expect(answer(closed)).to_have_text("a" * 20)
            closed.click("#exl_new")
            expect(question(closed)).to_have_count(0)
        page, other = Page(context, address), Page(context, address)
        page.page.bring_to_front()
        page.click("#exl_system_fold > button")
        page.page.locator("#exl_system textarea").fill("Be brief.")
        set_length(page, 4000)
        say(page, "Hello")
        wait_until_longer(page, 100)
        other.page.bring_to_front()
        choose(other, "Hello")
        expect(question(other)).to_have_text("Hello")
        wait_until_longer(other, 150)
        page.page.bring_to_front()
        wait_until_longer(page, 200)
        server.kill()
        server.wait()
        page.expect_text("#exl_gone", "does not answer")
        received = len(answer(page).inner_text())
        page.page.locator("#exl_message textarea").fill("typed without a server")

    with running(str(model), "--port", port):
        for tab in (page, other):
            tab.page.bring_to_front()
            expect(tab.page.locator("#exl_gone")).to_have_count(0)
            tab.wait_until_open()
            expect(question(tab)).to_have_text("Hello")
            assert len(answer(tab).inner_text()) >= received
            tab.expect_text("#exl_notice", "ended while this was written")
        page.page.bring_to_front()
        expect(page.page.locator("#exl_message textarea")).to_have_value(
            "typed without a server")
        page.click("#exl_system_fold > button")
        assert page.value("#exl_system textarea") == "Be brief."
        set_length(page, 30)
        before = len(answer(page).inner_text())
        page.click("#exl_continue")
        page.expect_text("#exl_stats", "seed")
        expect(answer(page)).to_have_text("a" * (before + 30))
        # What a closed tab wrote.
        choose(page, "closed one")
        expect(answer(page)).to_have_text("a" * 20)
        # The other tab shows what the first one has continued, and loses it when it is deleted.
        other.page.bring_to_front()
        expect(answer(other)).to_have_text("a" * (before + 30))
        page.page.bring_to_front()
        choose(page, "Hello")
        expect(question(page)).to_have_text("Hello")
        page.page.once("dialog", lambda dialog: dialog.accept())
        page.click("#exl_delete")
        expect(question(page)).to_have_count(0)
        other.page.bring_to_front()
        expect(question(other)).to_have_count(0)
        other.wait_until_open()
        other.click("#exl_picker input")
        expect(other.page.get_by_role("option", name="closed one")).to_be_visible()
        expect(other.page.get_by_role("option", name="Hello")).to_have_count(0)
        titles = [each[1] for each in other.page.evaluate("window.exlStorage.list()")]
        assert "closed one" in titles and "Hello" not in titles
        for tab in (page, other):
            # The requests of the server that had ended.
            tab.errors.clear()
            tab.page.close()


def test_a_browser_without_storage_chats_and_a_record_that_cannot_be_read_stays(
    browser, context, model
):
    with running(str(model)) as (address, _):
        without = browser.new_context()
        without.add_init_script(NO_STORAGE)
        with Page(without, address) as page:
            set_length(page, 10)
            say(page, "nowhere")
            expect(answer(page)).to_have_text("a" * 10)
            page.expect_text("#exl_unkept", "keeps no conversations")
        without.close()
        with Page(context, address) as page:
            set_length(page, 10)
            say(page, "before")
            wait_until_kept(page, "before")
            own = page.page.evaluate("sessionStorage.exl_loader_conversation")
            page.page.evaluate(
                PUT, [["0" * 32, "damaged", 1, '{"changed": 1, "format": "other"}']])
            page.page.evaluate("sessionStorage.exl_loader_conversation = '0'.repeat(32)")
            page.reload()
            page.expect_text("#exl_problem", "The browser keeps it as it is")
            say(page, "another")
            wait_until_kept(page, "another")
            found = page.page.evaluate("window.exlStorage.find('0'.repeat(32))")
            assert json.loads(found[0])["format"] == "other"
            choose(page, "before")
            expect(question(page)).to_have_text("before")
            assert page.page.evaluate("sessionStorage.exl_loader_conversation") == own
            expect(page.page.locator("#exl_unkept")).to_have_count(0)
