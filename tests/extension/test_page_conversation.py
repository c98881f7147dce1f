"""A conversation and a text as the page edits them, their file, and the fields of settings."""

import json
import random

import pytest

from exl_loader import InvalidSettings
from extension.page.conversation import (
    TITLE_CHARS,
    Conversation,
    Turn,
    fit_text,
    stop_lines,
    stop_strings,
)


def talk(*contents):
    roles = ("user", "assistant")
    return Conversation(turns=[Turn(roles[i % 2], text) for i, text in enumerate(contents)])


def said(conversation):
    return [turn.content for turn in conversation.turns]


def test_a_question_gets_an_answer_piece_by_piece():
    conversation = Conversation()
    conversation.ask("Hello?")
    conversation.begin_answer()
    conversation.add_to_answer("Good ")
    conversation.add_to_answer("day")
    assert conversation.messages() == [
        {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Good day"}]


@pytest.mark.parametrize("message", ["", "  \n "])
def test_an_empty_question_is_refused(message):
    conversation = talk("a", "b")
    with pytest.raises(InvalidSettings, match="empty message"):
        conversation.ask(message)
    with pytest.raises(InvalidSettings, match="empty message"):
        conversation.edit(0, message)
    assert said(conversation) == ["a", "b"]


def test_another_question_drops_what_followed_it():
    conversation = talk("a", "b", "c", "d")
    assert conversation.edit(0, "A")
    assert said(conversation) == ["A"]


def test_another_answer_leaves_the_other_turns():
    conversation = talk("a", "b", "c", "d")
    assert not conversation.edit(1, "B")
    assert said(conversation) == ["a", "B", "c", "d"]


@pytest.mark.parametrize("index", [-1, 2, 99])
def test_a_turn_that_is_not_there_cannot_be_edited(index):
    with pytest.raises(InvalidSettings):
        talk("a", "b").edit(index, "x")


def test_an_answer_is_dropped_to_be_written_again():
    conversation = talk("a", "b", "c", "d")
    conversation.drop_answer()
    assert said(conversation) == ["a", "b", "c"]
    conversation.drop_answer()
    assert said(conversation) == ["a", "b", "c"], "a question without an answer stays"
    with pytest.raises(InvalidSettings, match="Send a message first"):
        Conversation().drop_answer()


def test_only_an_answer_with_text_is_continued():
    talk("a", "b").check_continues()
    for conversation in (Conversation(), talk("a"), talk("a", "")):
        with pytest.raises(InvalidSettings):
            conversation.check_continues()


def test_an_empty_answer_is_dropped_and_others_stay():
    conversation = talk("a", "")
    conversation.drop_empty_answer()
    assert said(conversation) == ["a"]
    conversation.drop_empty_answer()
    assert said(conversation) == ["a"]


def test_what_the_model_wrote_into_the_text_is_taken_back_once():
    conversation = Conversation(text="def ")
    conversation.undo_text()
    assert conversation.text == "def "
    conversation.begin_text()
    conversation.add_to_text("main():")
    assert conversation.text == "def main():"
    conversation.undo_text()
    conversation.undo_text()
    assert conversation.text == "def "


def test_a_copy_changes_alone():
    conversation = talk("a", "b")
    conversation.settings["seed"] = 1
    copy = conversation.copy()
    copy.turns[0].content, copy.settings["seed"] = "x", 2
    copy.ask("c")
    assert said(conversation) == ["a", "b"] and conversation.settings == {"seed": 1}


def test_a_title_is_the_first_question_in_one_line():
    assert talk("How\nare  you?", "b").title == "How are you?"
    assert Conversation(text="import os\n").title == "import os"
    assert Conversation().title == ""
    assert len(talk("x" * 99).title) == TITLE_CHARS


def test_a_file_has_the_whole_conversation():
    conversation = talk("Ä \u2028 </script>", "\ud83e\udd8a".encode("utf-16", "surrogatepass")
                        .decode("utf-16"))
    conversation.system, conversation.text = "Be brief.", "def f():\n"
    conversation.settings = {"temperature": 0.5, "stop_strings": ["\n\n"], "seed": None}
    read = Conversation.from_json(conversation.to_json())
    del conversation.settings["seed"]
    assert read == conversation, "a field that is empty is not in the file"
    values = json.loads(conversation.to_json())
    assert values["messages"][0] == {"role": "system", "content": "Be brief."}


def test_messages_of_other_programs_are_read():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for data in (messages, {"messages": messages}, {"messages": messages, "model": "other"}):
        assert said(Conversation.from_json("\ufeff" + json.dumps(data))) == ["a", "b"]


@pytest.mark.parametrize(("data", "why"), [
    ("", "JSON"), ("{", "JSON"), ("NaN", "JSON"), ("3", "an object"), ('"x"', "an object"),
    ("null", "an object"), ("{}", "messages or text"), ('{"messages": 3}', "a list"),
    ('{"messages": [3]}', "message 1"), ('{"messages": [{"role": "user"}]}', "message 1"),
    ('{"messages": [{"role": "tool", "content": "a"}]}', "tool"),
    ('{"messages": [{"role": "user", "content": ["a"]}]}', "text as its content"),
    ('[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]', "one system"),
    ('{"text": 3}', "a text"), ('{"text": "", "format": "x"}', "format"),
    ('{"text": "", "settings": 3}', "settings"),
    ('{"text": "", "settings": {"tempratur": 1}}', "tempratur"),
    ('{"text": "", "settings": {"temperature": "hot"}}', "temperature"),
    ("[" * 500 + "]" * 500, "JSON"),
])
def test_a_bad_file_is_one_line_that_says_why(data, why):
    with pytest.raises(InvalidSettings) as caught:
        Conversation.from_json(data)
    assert why in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("seed", range(3))
def test_a_text_is_cut_at_its_beginning_until_it_fits(seed):
    numbers = random.Random(seed)
    for _ in range(200):
        lines = ["w" * numbers.randint(0, 60) for _ in range(numbers.randint(1, 80))]
        text = "\n".join(lines)
        ctx_size, asked = numbers.randint(16, 2000), numbers.randint(1, 500)
        fitted = fit_text(text, len, ctx_size, asked)
        assert text.endswith(fitted)
        if len(text) + min(asked, ctx_size // 8) <= ctx_size:
            assert fitted == text
        else:
            most = ctx_size - min(asked, ctx_size // 2)
            assert len(fitted) <= most
            # Not far more than was necessary: at most half of what fits, up to the next line.
            assert len(fitted) >= 0.45 * most - 1


def test_stop_strings_are_lines_with_escapes():
    assert stop_strings("\nUser:\n\\n\\n\n\nC:\\\\x\\q\\") == ["User:", "\n\n", "C:\\x\\q\\"]
    for texts in ([], ["\n"], ["a\tb", "\\n", "\\"], ["User:", "\n\n"]):
        assert stop_strings(stop_lines(texts)) == texts
