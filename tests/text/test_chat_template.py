"""Chat templates: the same text as transformers, and no access to anything else."""

from __future__ import annotations

import json

import pytest

from exl_loader.text.chat.template import ChatTemplates
from exl_loader.utils.errors import InvalidSettings, InvalidTokenizer

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}
{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}
{% set system = false %}{% endif %}{% for message in rest %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}
{% if loop.index0 == 0 and system != false %}
{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' ~ content.strip() ~ ' ' ~ eos_token }}{% endif %}
{% endfor %}"""

CHATML = """{%- for message in messages %}
    {%- if message.content is not string %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- generation %}{{ message.content }}{% endgeneration %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

TOOLS = """{% macro show(tool, depth=0) %}{{ '  ' * depth }}{{ tool.function.name }}:
{{ tool | tojson(indent=2) }}{% endmacro -%}
{% set ns = namespace(found=false, calls=[]) %}
{% for tool in tools or [] %}{{ show(tool, loop.index) }}
{% endfor %}
{% for message in messages %}
  {%- if message.tool_calls is defined and message.tool_calls %}
    {%- set ns.found = true %}{{ message.tool_calls | tojson }}
  {%- else %}
{{ loop.cycle('a', 'b') }}|{{ message.role | upper }}|{{ message.content | trim }}|{{ '%s' }}
  {%- endif %}
{% endfor %}{{ ns.found }} {{ dict(a=1).items() | list }} {{ range(3) | join(',') }}
{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i * 2 ** 2 }}{% endfor %}"""

TEMPLATES = {"llama2": LLAMA2, "chatml": CHATML, "tools": TOOLS}

TOOL = {"type": "function", "function": {"name": "wetter", "description": "Größe <b> & 'x'",
                                         "parameters": {"type": "object", "properties": {}}}}
CONVERSATIONS = {
    "one": [{"role": "user", "content": "Hi <b>&amp;</b> \n"}],
    "system": [
        {"role": "system", "content": "Sei höflich. 🎉"},
        {"role": "user", "content": "  Hallo  "},
        {"role": "assistant", "content": "Guten Tag!"},
        {"role": "user", "content": "{{ 7 * 7 }} {% raw %}"},
    ],
    "call": [
        {"role": "user", "content": "Wetter?"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "wetter", "arguments": {"ort": "Köln"}}}
        ]},
        {"role": "user", "content": "Danke", "name": None},
    ],
}


def reference(template: str, messages, **options) -> str:
    pytest.importorskip("transformers", minversion="5")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), chat_template=template, **TOKENS
    )
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tools", [None, [TOOL]])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_equals_transformers(template, conversation, tools, add_generation_prompt):
    source, messages = TEMPLATES[template], CONVERSATIONS[conversation]
    options = {"tools": tools, "add_generation_prompt": add_generation_prompt,
               "enable_thinking": False}
    actual = ChatTemplates({"default": source}).render(messages, **options, **TOKENS)
    assert actual == reference(source, messages, **options)


def test_strftime_now_exists():
    source = "{{ strftime_now('%Y-%m') }}"
    messages = CONVERSATIONS["one"]
    assert ChatTemplates({"default": source}).render(messages) == reference(source, messages)


def render(source: str, **options) -> str:
    return ChatTemplates({"default": source}).render(CONVERSATIONS["one"], **options)


# Where templates come from


def test_the_string_of_tokenizer_config(tmp_path):
    found = ChatTemplates.from_dir(tmp_path, {"chat_template": "hello"})
    assert found.sources == {"default": "hello"}


def test_named_templates(tmp_path):
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    found = ChatTemplates.from_dir(tmp_path, {"chat_template": named})
    messages = CONVERSATIONS["one"]
    assert found.render(messages) == "d"
    assert found.render(messages, tools=[TOOL]) == "t"
    assert found.render(messages, name="tool_use") == "t"
    with pytest.raises(InvalidTokenizer, match="default.*tool_use"):
        found.render(messages, name="other")


def test_template_files_win(tmp_path):
    config = {"chat_template": "config"}
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert ChatTemplates.from_dir(tmp_path, config).sources == {"default": "json"}
    (tmp_path / "chat_template.jinja").write_text("jinja")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    found = ChatTemplates.from_dir(tmp_path, config)
    assert found.sources == {"default": "jinja", "rag": "rag"}


def test_no_template(tmp_path):
    found = ChatTemplates.from_dir(tmp_path, {})
    assert not found
    with pytest.raises(InvalidTokenizer, match="none in this folder") as caught:
        found.render(CONVERSATIONS["one"])
    assert caught.value.remedy


@pytest.mark.parametrize("value", [5, [5], [{"name": "a"}], {"a": 1}, [["name", "template"]]])
def test_values_that_are_not_templates_are_errors(value, tmp_path):
    with pytest.raises(InvalidTokenizer):
        ChatTemplates.from_dir(tmp_path, {"chat_template": value}).render(CONVERSATIONS["one"])


@pytest.mark.parametrize(("name", "data"), [
    ("chat_template.jinja", b"\xff\xfe"), ("chat_template.json", b"{"),
])
def test_broken_files(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InvalidTokenizer):
        ChatTemplates.from_dir(tmp_path, {})


# What a template may not do


@pytest.mark.parametrize("source", [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ namespace(__init__=1) }}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "{{ ''['__class__'] }}{{ (''|attr('__class__')).__name__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{% include 'other' %}",
    "{% import 'other' as x %}",
    "{{ undefined_function() }}",
    "{{ messages[0].content.no.such }}",
    "{{ 1 / 0 }}",
    "{{ raise_exception('roles must alternate') }}",
    "{% for x in %}",
    "{{ messages",
    "{% unknown %}",
])
def test_templates_that_are_refused(source):
    with pytest.raises(InvalidTokenizer) as caught:
        render(source)
    assert caught.value.remedy


def test_the_error_shows_the_templates_own_message():
    with pytest.raises(InvalidTokenizer, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidTokenizer, match="line 2"):
        render("a\n{% unknown %}")


def test_formatting_works():
    assert render("{{ '%s-%03d' % ('a', 7) }}") == "a-007"


def test_concatenation_works():
    assert render("{{ 'a' ~ 1 ~ none ~ [2] }}{{ ('b' ~ 'c') ~ 'd' }}") == "a1None[2]bcd"


def test_messages_are_not_changed():
    messages = [{"role": "user", "content": ["a"]}]
    ChatTemplates({"default": "{% set m = messages[0] %}{{ m.content }}"}).render(messages)
    assert messages == [{"role": "user", "content": ["a"]}]


@pytest.mark.parametrize("messages", [
    [], "text", {"role": "user"}, ["text"], [{"role": "user", "content": object()}], None,
])
def test_values_that_are_not_conversations_are_errors(messages):
    with pytest.raises(InvalidSettings):
        ChatTemplates({"default": "x"}).render(messages)
