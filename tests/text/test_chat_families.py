"""Templates built like those of Llama 3, Mistral, Qwen 2.5, Gemma 2 and Phi 3.

`chat_templates/` holds templates of our own with the control tokens and the Jinja constructs of
those families; each conversation must come out as transformers writes it, or be refused with the
same words.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path

import pytest

from exl_loader.text.chat.template import ChatTemplates
from exl_loader.text.tokenizer import Tokenizer
from exl_loader.utils.errors import ExlLoaderError, InvalidSettings, InvalidTokenizer
from support.fake_model import fake_engine
from support.tiny import write_tokenizer

SOURCES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))
}
TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>"}

WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Wie's Wetter \"dort\" <ist> – jetzt",
    "parameters": {"type": "object", "required": ["city"], "properties": {
        "city": {"type": "string", "description": "Ort"}, "days": {"type": "integer"},
    }},
}}
CLOCK = {"type": "function", "function": {
    "name": "clock", "description": "Time", "parameters": {"type": "object", "properties": {}},
    "return": {"type": "string"},
}}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(name, arguments, id="call12345"):
    return {"type": "function", "id": id, "function": {"name": name, "arguments": arguments}}


def result(content, **more):
    return {"role": "tool", "content": content, "tool_call_id": "call12345", **more}


SYSTEM = {"role": "system", "content": "  Sei höflich. 🎉\n"}
ASKED = [user("Wetter in Köln?"),
         assistant(None, tool_calls=[call("get_weather", {"city": "Köln", "days": 2})])]
CONVERSATIONS = {
    "question": [user("Hi <b>&amp;</b>")],
    "spaces": [user(" \n hallo \t\n"), assistant("  ja \n"), user("weiter\n\n")],
    "system": [SYSTEM, user("你好")],
    "turns": [SYSTEM, user("a"), assistant("b"), user("{{ 7 * 7 }} {% raw %}"), assistant("d ")],
    "answer": [user("Erzähl"), assistant("Es war einmal  ")],
    "answer in the system's words": [SYSTEM, user("x"), assistant(SYSTEM["content"])],
    "empty": [user(""), assistant("")],
    "call": ASKED,
    "result": [SYSTEM, *ASKED, result("{\"grad\": 21}")],
    "answered": [*ASKED, result("21 °C", name="get_weather"), assistant("21 Grad."), user("Oh")],
    "result object": [*ASKED, result({"content": 21, "unit": "C"})],
    "two results": [*ASKED, result("a"), result("b"), assistant("c")],
    "two calls": [user("?"), assistant("Moment", tool_calls=[
        call("clock", {}), call("get_weather", {"city": "x"}, id="abcdefghi")])],
    "short id": [user("?"), assistant("", tool_calls=[call("clock", {}, id="1")])],
    "ipython": [user("?"), assistant("!"), {"role": "ipython", "content": [1, {"a": "ß"}]}],
    "parts": [user([{"type": "image"}, {"type": "text", "text": "Was ist das? "}])],
    "parts of an answer": [user("?"), assistant([{"type": "text", "text": "Ein"},
                                                {"type": "text", "text": "e Katze "}])],
    "two questions": [user("a"), user("b")],
    "two systems": [SYSTEM, user("a"), SYSTEM, user("b")],
    "assistant first": [assistant("Na?"), user("Ja")],
    "only a system": [SYSTEM],
    "unknown role": [user("a"), {"role": "narrator", "content": "b"}],
    "reasoning": [user("2+2?"), assistant("\n4", reasoning_content="\nzwei plus zwei\n")],
    "thinking": [user("2+2?"), assistant("4", thinking="hm", reasoning="überholt")],
    "no content": [{"role": "user"}],
    "null content": [{"role": "user", "content": None, "name": None}],
}
ENDINGS = {
    "answer next": {"add_generation_prompt": True},
    "nothing": {"add_generation_prompt": False},
    "continued": {"continue_final_message": True, "add_generation_prompt": False},
}
EXTRAS = {
    "no tools": {},
    "tools": {"tools": [WEATHER, CLOCK]},
    "system tools": {"tools": [WEATHER], "tools_in_user_message": False},
    "builtin tools": {"builtin_tools": ["get_weather", "code_interpreter"],
                      "date_string": "26 Jul 2024"},
}


@cache
def reference_tokenizer(family):
    pytest.importorskip("transformers", minversion="5")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), chat_template=SOURCES[family], **TOKENS
    )


def reference(family, messages, options):
    """Return the text of transformers, or the exception that it raises."""
    tokenizer = reference_tokenizer(family)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:
        return error


@cache
def templates(family):
    return ChatTemplates({"default": SOURCES[family]})


def ours(family, messages, options):
    try:
        return templates(family).render(messages, **TOKENS, **options)
    except ExlLoaderError as error:
        return error


@pytest.mark.parametrize("family", SOURCES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_equals_transformers(family, conversation):
    messages = CONVERSATIONS[conversation]
    for ending, extra in product(ENDINGS, EXTRAS):
        options = {**ENDINGS[ending], **EXTRAS[extra]}
        expected, actual = (
            reference(family, messages, options), ours(family, messages, options)
        )
        if isinstance(expected, str):
            assert actual == expected, (ending, extra)
            continue
        assert isinstance(actual, ExlLoaderError), (ending, extra, expected)
        if type(expected).__name__ == "TemplateError":
            assert str(expected) in str(actual)


def test_the_conversations_reach_all_outcomes():
    """Each family renders some conversations of each ending; strict families refuse some."""
    refused = dict.fromkeys(SOURCES, 0)
    for family, ending in product(SOURCES, ENDINGS):
        outcomes = [ours(family, messages, ENDINGS[ending]) for messages in CONVERSATIONS.values()]
        rendered = sum(isinstance(outcome, str) for outcome in outcomes)
        assert rendered >= 7, (family, ending)
        refused[family] += len(outcomes) - rendered
    assert refused["mistral"] > 10 and refused["gemma2"] > 10


# Control tokens in their places, so that an error shared with transformers would show.


def test_llama_31_with_tools():
    prompt = ours("llama31", CONVERSATIONS["result"],
                  {"tools": [CLOCK], "date_string": "26 Jul 2024"})
    assert prompt.startswith(
        "<bos><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
        "Today Date: 26 Jul 2024\n\nSei höflich. 🎉<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n"
    )
    assert '{\n    "type": "function",\n    "function": {\n        "name": "clock",' in prompt
    assert prompt.endswith(
        '{"name": "get_weather", "parameters": {"city": "Köln", "days": 2}}<|eot_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"{\\"grad\\": 21}"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_mistral_with_tools():
    assert ours("mistral", CONVERSATIONS["answered"][:4], {}) == (
        '<bos>[INST] Wetter in Köln?[/INST][TOOL_CALLS] [{"name": "get_weather", "arguments": '
        '{"city": "Köln", "days": 2}, "id": "call12345"}]<eos>[TOOL_RESULTS] {"content": 21 °C, '
        '"call_id": "call12345"}[/TOOL_RESULTS] 21 Grad.<eos>'
    )


def test_qwen_with_tools():
    assert ours("qwen25", CONVERSATIONS["two results"][1:], {}).endswith(
        "<|im_start|>user\n<tool_response>\na\n</tool_response>\n<tool_response>\nb\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n<|im_start|>assistant\n"
    )


def test_gemma_2():
    assert ours("gemma2", CONVERSATIONS["spaces"], {}) == (
        "<bos><start_of_turn>user\nhallo<end_of_turn>\n<start_of_turn>model\nja<end_of_turn>\n"
        "<start_of_turn>user\nweiter<end_of_turn>\n<start_of_turn>model\n"
    )


def test_phi_3():
    assert ours("phi3", CONVERSATIONS["system"], {}) == (
        "<|system|>\n  Sei höflich. 🎉\n<|end|>\n<|user|>\n你好<|end|>\n<|assistant|>\n"
    )


def test_a_refusal_has_the_templates_own_message():
    with pytest.raises(InvalidTokenizer, match="this model takes no system message") as caught:
        templates("gemma2").render(CONVERSATIONS["system"], **TOKENS)
    assert "Change the messages" in caught.value.remedy


# Continuing the final message


@pytest.mark.parametrize(("family", "end"), [
    ("llama3", "Es war einmal"), ("phi3", "Es war einmal  "), ("qwen25", "Es war einmal  "),
    ("gemma2", "<start_of_turn>model\nEs war einmal"), ("mistral", "[/INST] Es war einmal"),
])
def test_a_continued_message_ends_in_its_text(family, end):
    messages = CONVERSATIONS["answer"]
    assert ours(family, messages, {"continue_final_message": True}).endswith(end)
    assert messages == [user("Erzähl"), assistant("Es war einmal  ")]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_can_be_continued(key):
    messages = [user("?"), assistant("", **{key: "Also "})]
    options = {"continue_final_message": key, "add_generation_prompt": False}
    prompt = ours("qwen25", messages, options)
    assert prompt == reference("qwen25", messages, options)
    assert prompt.endswith("<think>\nAlso ")


@pytest.mark.parametrize(("source", "messages", "options"), [
    ("{{ messages[0].content }}", [user("a")], {"add_generation_prompt": True}),
    ("{{ messages[0].content }}", [{"role": "user"}], {}),
    ("{{ messages[0].content }}", [user(5)], {}),
    ("{{ messages[0].content[0] }}", [user([{"type": "image"}])], {}),
    ("{{ messages[0].content }}", [user("a")], {"continue_final_message": "thinking"}),
    ("{{ messages[0].content | length }}", [user("a")], {}),
    ("{{ messages[0].content | upper }}", [user("a")], {}),
    ("text", [user("a")], {}),
])
def test_messages_that_cannot_be_continued_are_errors(source, messages, options):
    with pytest.raises(InvalidSettings):
        ChatTemplates({"default": source}).render(
            messages, **{"continue_final_message": True, **options}
        )


# Through the engine


@pytest.fixture
def engine(tmp_path):
    """A model whose folder has the Llama 3.1 and Qwen 2.5 templates as files."""
    write_tokenizer(tmp_path, 300)
    (tmp_path / "chat_template.jinja").write_text(SOURCES["qwen25"], encoding="utf-8")
    named = tmp_path / "additional_chat_templates"
    named.mkdir()
    (named / "llama.jinja").write_text(SOURCES["llama31"], encoding="utf-8")
    engine, _, _ = fake_engine(lambda ids: 7, 300, Tokenizer.from_dir(tmp_path))
    return engine


def test_the_engine_takes_tools_and_variables(engine):
    messages = CONVERSATIONS["two results"]
    prompt = engine.apply_chat_template(messages, tools=[WEATHER])
    assert prompt == ours("qwen25", messages, {"tools": [WEATHER]})
    dated = engine.apply_chat_template(
        messages, tools=[CLOCK], template="llama", tools_in_user_message=False,
        date_string="today", bos_token="<b>",
    )
    assert dated.startswith("<b><|start_header_id|>system") and "Today Date: today\n" in dated
    assert "These functions can be called" in dated


def test_the_engine_continues_the_final_message(engine):
    messages = CONVERSATIONS["answer"]
    prompt = engine.apply_chat_template(messages, continue_final_message=True)
    assert prompt.endswith("<|im_start|>assistant\nEs war einmal  ")
    ids = engine.chat_ids(messages, continue_final_message=True)
    assert ids == engine.encode(prompt, add_bos=False)
    assert list(engine.generate(ids, {"max_new_tokens": 2, "temperature": 0}))
    assert not engine.apply_chat_template(messages, add_generation_prompt=False).endswith(
        "assistant\n"
    )
