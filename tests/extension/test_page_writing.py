"""Open conversations: written by threads of the server, whatever tabs and models do meanwhile."""

import itertools
import json
import time
from dataclasses import replace

import pytest

import exl_loader
from exl_loader import InvalidSettings, SamplingSettings
from exl_loader.commands.model_options import DEMO_MODEL
from extension.page.conversation import Conversation, Turn
from extension.page.conversation_list import (
    MAX_CONVERSATIONS,
    Conversations,
    KeptTitle,
    new_key,
)
from extension.page.session import ContinuedAnswer, Session
from extension.page.writing import PAUSE_S, OpenConversation
from extension.panel.panel import ModelChoice
from support.tiny import give_chat_template

SHORT = {"max_new_tokens": 6, "temperature": 0}
LONG = {"max_new_tokens": 4000, "temperature": 0, "ban_eos_token": True}


@pytest.fixture
def session(tiny_model):
    folder = tiny_model("talker")
    give_chat_template(folder)
    session = Session()
    session.start_load(ModelChoice(str(folder), ctx_size=8192))
    assert session.wait() == ""
    yield session
    session.unload()


def opened(session, settings, **values):
    return OpenConversation(session, Conversation(settings=dict(settings), **values))


def finish(conversation):
    while conversation.is_writing:
        time.sleep(0.01)
    return conversation.shown()


def wait_for_text(conversation):
    while not (shown := conversation.shown()).conversation.turns[-1].content:
        time.sleep(0.01)
    return shown


def test_a_question_is_answered_and_the_answer_goes_on_and_is_written_again(session):
    conversation = opened(session, SHORT | {"ban_eos_token": True}, draft="a")
    assert conversation.attempt(OpenConversation.send, "ab")
    shown = finish(conversation)
    question, answer = shown.conversation.turns
    assert (question.content, shown.conversation.draft, shown.problem) == ("ab", "", "")
    assert "6 tokens" in shown.stats and "length" in shown.stats and answer.content

    assert conversation.attempt(OpenConversation.continue_answer)
    longer = finish(conversation)
    assert longer.conversation.turns[1].content.startswith(answer.content)
    assert len(longer.conversation.turns[1].content) > len(answer.content)
    assert len(longer.conversation.turns) == 2 and "6 tokens" in longer.stats

    assert conversation.attempt(OpenConversation.regenerate)
    assert finish(conversation).conversation.turns == shown.conversation.turns


@pytest.mark.skipif(not DEMO_MODEL.is_dir(), reason="no demo model")
def test_an_answer_that_goes_on_keeps_the_space_at_its_beginning():
    with exl_loader.load(DEMO_MODEL, ctx_size=512) as model:
        settings = SamplingSettings(max_new_tokens=20, temperature=0)
        for prompt in ("def read(self, path):\n    return", "import os\nfrom"):
            expected = "".join(model.generate(prompt, settings))
            assert expected.startswith(" "), "else this test shows nothing"
            ids = model.tokenizer.prompt_ids(prompt)
            assert "".join(ContinuedAnswer(model, ids, settings)) == expected


def test_an_edited_question_is_answered_anew(session):
    conversation = opened(session, SHORT)
    for text in ("ab", "cd"):
        conversation.send(text)
        finish(conversation)
    conversation.edit(1, "edited")
    assert finish(conversation).conversation.turns[1].content == "edited"
    assert len(conversation.shown().conversation.turns) == 4
    conversation.edit(0, "xy")
    assert [turn.content for turn in finish(conversation).conversation.turns][:1] == ["xy"]


def test_the_system_prompt_is_read(session):
    plain, with_system = opened(session, LONG), opened(session, LONG, system="You know this.")
    for conversation in (plain, with_system):
        conversation.send("ab")
        wait_for_text(conversation)
        conversation.stop()
    tokens = [int(finish(c).stats.split("prompt ")[1].split()[0]) for c in (plain, with_system)]
    assert tokens[1] - tokens[0] == len("system: You know this.\n")


def test_several_conversations_are_written_at_once_and_stop_alone(session):
    first, second = opened(session, LONG), opened(session, LONG)
    first.send("ab")
    second.send("ab")
    wait_for_text(first)
    wait_for_text(second)
    assert first.is_writing and second.is_writing
    first.stop()
    assert "stopped" in finish(first).stats
    assert second.is_writing
    second.stop()
    finish(second)


def test_one_conversation_is_written_once_at_a_time(session):
    conversation = opened(session, LONG)
    conversation.send("ab")
    before = wait_for_text(conversation).conversation.turns[0]
    for action, values in ((OpenConversation.send, ["cd"]), (OpenConversation.regenerate, []),
                           (OpenConversation.edit, [0, "x"]), (OpenConversation.write, ["x"])):
        assert not conversation.attempt(action, *values)
        assert "being written" in conversation.shown().problem
    conversation.keep(text="typed", draft="typed")
    conversation.stop()
    shown = finish(conversation)
    assert shown.conversation.turns[0] == before
    assert (shown.conversation.text, shown.conversation.draft) == ("", "typed")


@pytest.mark.parametrize("reload", [False, True])
def test_unloading_ends_a_text_with_a_message_and_keeps_it(session, reload):
    conversation = opened(session, LONG)
    conversation.send("ab")
    wait_for_text(conversation)
    if reload:
        session.start_load(session.options)
        assert session.wait() == ""
    else:
        session.unload()
    shown = finish(conversation)
    assert "unloaded" in shown.problem and shown.conversation.turns[1].content
    assert conversation.attempt(OpenConversation.continue_answer) == reload
    conversation.stop()
    finish(conversation)


def test_an_error_of_the_model_goes_when_another_one_is_loaded(session):
    conversation = opened(session, SHORT | {"max_new_tokens": 8}, draft="", text="")
    options = session.options
    assert not conversation.attempt(OpenConversation.send, "ab " * 9000)
    assert "expected at most 8191 tokens" in conversation.shown().problem
    session.unload()
    assert conversation.shown().problem == ""
    assert not conversation.attempt(OpenConversation.send, "ab")
    assert "not loaded" in conversation.shown().problem
    session.start_load(options)
    assert session.wait() == "" and conversation.shown().problem == ""
    # Another one is as true as before, and so is why a text has ended.
    assert not conversation.attempt(OpenConversation.replace, "{")
    session.unload()
    assert "not a conversation" in conversation.shown().problem


def test_an_error_leaves_the_conversation_as_it_was():
    conversation = opened(Session(), SHORT, draft="ab", text="x")
    before = conversation.shown().conversation
    for action, values in ((OpenConversation.send, ["ab"]), (OpenConversation.write, ["cd"])):
        assert not conversation.attempt(action, *values)
        assert "not loaded" in conversation.shown().problem
        assert conversation.shown().conversation == before
    for data in ("{", '{"messages": 3}'):
        assert not conversation.attempt(OpenConversation.replace, data)
        assert "not a conversation" in conversation.shown().problem
        assert conversation.shown().conversation == before


def test_a_file_replaces_the_conversation_and_keeps_other_settings():
    conversation = opened(Session(), SHORT)
    other = Conversation(text="new", settings={"temperature": 0.5})
    conversation.replace(other.to_json())
    assert conversation.shown().conversation.text == "new"
    assert conversation.shown().conversation.settings == SHORT | {"temperature": 0.5}


def test_a_text_goes_on_is_taken_back_and_written_again(session):
    conversation = opened(session, SHORT)
    conversation.write("ab")
    written = finish(conversation).conversation.text
    assert written.startswith("ab") and len(written) > 2 and conversation.shown().in_text
    conversation.write_again()
    assert finish(conversation).conversation.text == written
    conversation.undo()
    assert conversation.shown().conversation.text == "ab"


def test_what_the_model_did_not_read_is_said(session):
    conversation = opened(session, {"max_new_tokens": 2, "temperature": 0})
    conversation.write("ab\n" * 4000)
    shown = finish(conversation)
    assert "did not read the first" in shown.notice and "8,192" in shown.notice
    assert shown.conversation.text.startswith("ab\n" * 4000) and shown.problem == ""
    for index in range(3):
        conversation.send(f"{index}" * 4000)
        shown = finish(conversation)
    assert "The 2 oldest messages were left out" in shown.notice or "4 oldest" in shown.notice
    assert len(shown.conversation.turns) >= 5, "the page still shows them"
    conversation.send("a")
    assert "left out" in finish(conversation).notice
    conversation.write("ab")
    assert finish(conversation).notice == ""


def tab(browser, key=None):
    return f"{browser}/{key or new_key()}"


def test_a_tab_finds_its_conversation_again_and_others_do_not(monkeypatch):
    monkeypatch.setattr("extension.page.writing.time.time", itertools.count(1e9).__next__)
    conversations = Conversations(Session(), Conversation(text="first"))
    browser, other = new_key(), new_key()
    first, second = tab(browser), tab(browser)
    conversations.open(first).keep(text="mine", settings={"seed": 1})
    assert conversations.get(first).shown().conversation.text == "mine"
    fresh = conversations.open(second).shown().conversation
    assert (fresh.text, fresh.settings) == ("", {"seed": 1})
    assert conversations.open(tab(other)).shown().conversation.text == "first"
    assert conversations.listed(first) == [("mine", first)]
    assert conversations.listed(second) == [("New conversation", second), ("mine", first)]
    # The last one that was changed comes first, whichever was used last.
    conversations.get(second).keep(text="later")
    listed = [("later", second), ("mine", first)]
    assert conversations.listed(first) == listed
    conversations.get(first)
    assert conversations.listed(first) == conversations.listed(second) == listed


def test_the_oldest_conversations_go_when_there_are_too_many():
    conversations = Conversations(Session(), Conversation())
    browser = new_key()
    tabs = [tab(browser) for _ in range(MAX_CONVERSATIONS + 2)]
    for index, name in enumerate(tabs):
        conversations.open(name).keep(text=str(index))
    assert len(conversations.listed(tabs[-1])) == MAX_CONVERSATIONS
    assert ("0", tabs[0]) not in conversations.listed(tabs[-1])


@pytest.mark.parametrize("name", ["", "/", "a/b", "../" + "0" * 32, "0" * 65, f"{'0' * 32}/x"])
def test_a_tab_without_a_name_is_refused(name):
    with pytest.raises(InvalidSettings, match="Reload the page"):
        Conversations(Session(), Conversation()).open(name)


def split(record):
    head, text = record.split("\n")
    return json.loads(head), text


def test_a_kept_conversation_opens_in_another_server_as_it_was(session):
    conversation = opened(session, SHORT, system="Be brief.")
    conversation.send("ab")
    finish(conversation)
    conversation.write("cd")
    finish(conversation)
    conversation.keep(draft="typed")
    before = conversation.shown()
    browser, key = new_key(), new_key()
    head, text = split(conversation.record(key))
    assert head == [key, conversation.changed, "ab", False, False]

    conversations = Conversations(Session(), Conversation(text="first", settings={"seed": 7}))
    again = conversations.open(f"{browser}/{key}", text)
    shown = again.shown()
    assert shown.conversation.settings == {"seed": 7} | SHORT
    assert replace(shown.conversation, settings=before.conversation.settings) == (
        before.conversation)
    assert shown.conversation.before == "cd" and shown.in_text and shown.notice == ""
    assert split(again.record(key))[0] == head
    # The server's own is newer than what a late tab brings.
    again.keep(draft="newer")
    assert conversations.open(f"{browser}/{key}", text).shown().conversation.draft == "newer"
    assert again.changed > head[1]


def test_a_text_that_was_being_written_says_so_and_goes_on(session):
    conversation = opened(session, LONG)
    conversation.send("ab")
    wait_for_text(conversation)
    head, text = split(conversation.record(new_key()))
    assert head[4] is True
    conversation.stop()
    finish(conversation)
    again = Conversations(session, Conversation()).open(tab(new_key()), text)
    shown = again.shown()
    assert "ended while this was written" in shown.notice and not shown.writing
    written = shown.conversation.turns[1].content
    assert written == json.loads(text)["messages"][1]["content"] != ""
    assert again.attempt(OpenConversation.continue_answer)
    again.stop()
    shown = finish(again)
    assert shown.conversation.turns[1].content.startswith(written) and shown.notice == ""


@pytest.mark.parametrize("kept", [
    "{", "[]", "3", "{}", '{"changed": 1}', '{"changed": true, "messages": []}',
    '{"changed": 1, "messages": [{"role": "robot", "content": ""}]}',
    '{"changed": 1, "format": "exl_loader conversation 2", "messages": []}',
])
def test_a_record_of_another_version_is_refused_with_its_reason(kept):
    conversations = Conversations(Session(), Conversation())
    name = tab(new_key())
    with pytest.raises(InvalidSettings, match="The browser keeps it as it is"):
        conversations.open(name, kept)
    assert conversations.find(name) is None


def test_a_record_with_unknown_settings_opens_with_those_of_a_new_conversation():
    conversations = Conversations(Session(), Conversation(settings={"seed": 7}))
    kept = {"changed": 1, "messages": [{"role": "user", "content": "ab"},
                                       {"role": "assistant", "content": ""}],
            "settings": {"warmth": 3}, "draft": 3, "before": [], "more": {}}
    shown = conversations.open(tab(new_key()), json.dumps(kept)).shown()
    assert shown.conversation == Conversation(turns=[Turn("user", "ab")], settings={"seed": 7})
    assert "settings of this conversation could not be read" in shown.notice


def test_a_deleted_conversation_ends_and_does_not_come_back(session):
    conversations = Conversations(session, Conversation(settings=dict(LONG)))
    browser = new_key()
    first, second = tab(browser), tab(browser)
    conversation = conversations.open(first)
    conversation.send("ab")
    wait_for_text(conversation)
    conversations.open(second)
    _, late = split(conversation.record(first.partition("/")[2]))
    conversations.delete(first)
    assert "stopped" in finish(conversation).stats
    assert conversations.find(first) is None
    with pytest.raises(InvalidSettings, match="Reload the page"):
        conversations.get(first)
    assert conversations.listed(second) == [("New conversation", second)]
    # What another tab has read from its browser's storage before.
    conversations.note_kept(second, KeptTitle.read([[first.partition("/")[2], "ab", 5]]))
    assert conversations.listed(second) == [("New conversation", second)]
    assert conversations.open(first, late).shown().conversation.turns == []


def test_what_the_browser_keeps_is_listed_and_its_newest_settings_are_taken():
    conversations = Conversations(Session(), Conversation(text="first", settings={"seed": 7}))
    browser, key = new_key(), new_key()
    own = tab(browser)
    conversations.note_kept(own, KeptTitle.read([
        [key, "kept", 5], [new_key(), "", 6], ["../x", "a", 1], [key, "a"], 3, [key, 3, 1]]))
    before = {"settings": {"temperature": 0.5}, "messages": [{"role": "system", "content": "S"}]}
    shown = conversations.open(own, "", before).shown().conversation
    assert (shown.text, shown.system) == ("first", "S")
    assert shown.settings == {"seed": 7, "temperature": 0.5}
    assert conversations.listed(own) == [("first", own), ("kept", f"{browser}/{key}")]
    assert KeptTitle.read({"a": 1}) == []
    for bad in ("x", {"messages": 3}, {}):
        name = tab(new_key())
        assert conversations.open(name, "", bad).shown().conversation.settings == {"seed": 7}


def test_what_changed_after_its_tab_was_closed_is_kept_by_the_next_tab():
    conversations = Conversations(Session(), Conversation())
    browser = new_key()
    closed, unchanged, own = tab(browser), tab(browser), tab(browser)
    for name in (closed, unchanged, own, tab(new_key())):
        conversations.open(name).keep(text=name)
    stamps = {name: conversations.get(name).changed for name in (closed, unchanged)}
    conversations.note_kept(own, [KeptTitle(closed.partition("/")[2], "", stamps[closed] - 1),
                                  KeptTitle(unchanged.partition("/")[2], "", stamps[unchanged])])
    (record,) = conversations.unkept(own)
    head, text = split(record)
    assert head[0] == closed.partition("/")[2] and json.loads(text)["text"] == closed


def test_what_is_typed_is_kept_after_a_pause_and_other_changes_at_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("extension.page.writing.time.monotonic", lambda: now[0])
    conversation = opened(Session(), SHORT)
    before = conversation.record_version
    conversation.keep(draft="a")
    assert conversation.record_version == before != conversation.changed
    conversation.keep(draft="a")
    now[0] += PAUSE_S
    assert conversation.record_version == conversation.changed
    conversation.keep(draft="ab")
    conversation.set_text("x")
    assert conversation.record_version == conversation.changed


@pytest.mark.parametrize(("values", "is_empty"), [
    ({}, True), ({"text": "first"}, True), ({"text": "other"}, False), ({"draft": "a"}, False),
    ({"turns": [Turn("user", "a")]}, False), ({"system": "S"}, True),
])
def test_a_conversation_in_which_nothing_was_said_is_not_kept(values, is_empty):
    conversation = OpenConversation(Session(), Conversation(text="first"))
    conversation.keep(**{"text": "", **values})
    assert split(conversation.record(new_key()))[0][3] == is_empty
