"""Chat templates: Jinja programs that come with a model and are untrusted.

They run in a separate process (`renderer.py`), which bounds their time and memory, and get only
copies of JSON data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...utils.errors import InvalidSettings, InvalidTokenizer, shown
from ...utils.json_keys import read_json_object_if_there
from ...utils.untrusted_files import TEMPLATE_BYTES, is_there, read_text
from .continued_message import cut_after, mark_end
from .renderer import RENDERER, RenderError, TemplateRefusal

_REMEDY = "Use the original model's template, or give a plain prompt"

# Keys of a message's reasoning. Most templates read the first one.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplates:
    """The templates of one model folder.

    Args:
        sources: name -> Jinja source. The usual template has the name `default`.
        where: the name of the templates in errors.
    """

    def __init__(self, sources: Mapping[str, str], where: str = "chat template") -> None:
        self.sources = dict(sources)
        self.where = where

    @classmethod
    def from_dir(cls, folder: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplates:
        """Collect the folder's templates.

        `chat_template.jinja` and `additional_chat_templates/*.jinja` win over
        `chat_template.json`, and that over `tokenizer_config.json`, as in transformers.

        Raises:
            InvalidTokenizer: a file cannot be read or has no template in it.
        """
        return cls(
            _from_jinja_files(folder)
            or _from_value(_json_template(folder / "chat_template.json"), folder)
            or _from_value(tokenizer_config.get("chat_template"), folder),
            f"chat template of {folder}",
        )

    def __bool__(self) -> bool:
        return bool(self.sources)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        name: str | None = None,
        **variables: Any,
    ) -> str:
        """Render a conversation.

        Args:
            messages: JSON objects with `role` and usually `content`. Keys that are None are left
                out, and reasoning is passed under all its keys, as transformers does.
            tools: JSON schemas. With tools, the template `tool_use` is the default.
            add_generation_prompt: end with the header of the model's answer. None means yes,
                unless the final message is continued.
            continue_final_message: end inside the last message, so that the model continues it
                from its last character; a string names the key that is continued.
            name: the template's name; None for the default one.
            variables: further variables that the template may read.

        Raises:
            InvalidSettings: `messages` is no list of objects or is not JSON data, or the final
                message cannot be continued.
            InvalidTokenizer: there is no such template, or it is broken, refuses the
                conversation, tries what the sandbox forbids, or reaches a limit.
        """
        _check_options(tools, add_generation_prompt, continue_final_message, name)
        if continue_final_message and add_generation_prompt:
            raise InvalidSettings(
                "continue_final_message", expected="add_generation_prompt=False beside it",
                actual="both", remedy="Ask for one of the two",
            )
        name = self._choose(name, tools)
        plain = _plain_messages(messages)
        text = None
        if continue_final_message:
            text = mark_end(plain, continue_final_message, self.sources[name], _REASONING_KEYS)
        prompt = self._run(self.sources[name], {
            "messages": plain,
            "tools": _plain(tools, "tools") if tools is not None else None,
            "documents": None,
            "add_generation_prompt":
                not continue_final_message if add_generation_prompt is None
                else add_generation_prompt,
            **{key: _plain(value, key) for key, value in variables.items()},
        })
        return prompt if text is None else cut_after(prompt, text)

    def _run(self, source: str, context: dict[str, Any]) -> str:
        try:
            return RENDERER.render(source, context)
        except TemplateRefusal as error:
            raise InvalidTokenizer(
                self.where, expected="a conversation that the template accepts",
                actual=str(error), remedy="Change the messages, or use another template",
            ) from None
        except RenderError as error:
            raise InvalidTokenizer(
                self.where, expected="a template that renders this conversation",
                actual=str(error), remedy=_REMEDY,
            ) from None

    def _choose(self, name: str | None, tools: Any) -> str:
        if name is None:
            name = "tool_use" if tools and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise InvalidTokenizer(
                f"{self.where}: {shown(name)}",
                expected=f"one of {sorted(self.sources)}" if self.sources else "a template",
                actual="no such template" if self.sources else "none in this folder",
                remedy=_REMEDY,
            )
        return name


def _check_options(
    tools: Any, add_generation_prompt: Any, continue_final_message: Any, name: Any
) -> None:
    """Raise InvalidSettings for an option of `render` of another type."""
    wanted = (
        ("tools", tools, (list, tuple, type(None)), "a list of JSON schemas, or None"),
        ("add_generation_prompt", add_generation_prompt, (bool, type(None)),
         "true, false or None"),
        ("continue_final_message", continue_final_message, (bool, str),
         "true, false or the key that is continued"),
        ("template", name, (str, type(None)), "the name of a template, or None"),
    )
    for option, value, kinds, expected in wanted:
        if not isinstance(value, kinds):
            raise InvalidSettings(option, expected=expected, actual=shown(value))


def _plain(value: Any, what: str) -> Any:
    """Copy JSON data, so that a template gets no object of another class."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidSettings(what, expected="JSON data", actual=str(error)) from None


def _plain_messages(messages: Any) -> list[dict[str, Any]]:
    expected = "a list of objects with `role` and `content`"
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidSettings("messages", expected=expected, actual=type(messages).__name__)
    if not messages:
        raise InvalidSettings("messages", expected=expected, actual="an empty list")
    plain = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise InvalidSettings("messages", expected=expected,
                                  actual=f"a message of type {type(message).__name__}")
        present = {key: value for key, value in message.items() if value is not None}
        plain.append(_with_reasoning(_plain(present, "messages")))
    return plain


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    for key in _REASONING_KEYS:
        if message.get(key) is not None:
            reasoning = message[key]
            return {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _from_jinja_files(folder: Path) -> dict[str, str]:
    files = {path.stem: path for path in _additional_templates(folder)}
    if is_there(folder / "chat_template.jinja"):
        files["default"] = folder / "chat_template.jinja"
    return {
        name: read_text(path, TEMPLATE_BYTES, error=InvalidTokenizer, missing=InvalidTokenizer,
                        remedy=_REMEDY)
        for name, path in files.items()
    }


def _additional_templates(folder: Path) -> list[Path]:
    templates = folder / "additional_chat_templates"
    if not is_there(templates):
        return []
    try:
        return [templates / name for name in sorted(os.listdir(templates))
                if name.endswith(".jinja")]
    except OSError as error:
        raise InvalidTokenizer(str(templates), expected="a folder of templates",
                               actual=error.strerror, remedy=_REMEDY) from None


def _json_template(path: Path) -> Any:
    values = read_json_object_if_there(path, error=InvalidTokenizer, remedy=_REMEDY)
    return values.get("chat_template")


def _from_value(value: Any, folder: Path) -> dict[str, str]:
    """Read `chat_template`: a string, a list of {name, template}, or name -> template."""
    named: Any = value
    if value is None:
        return {}
    if isinstance(value, str):
        named = {"default": value}
    elif isinstance(value, list):
        named = {
            entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)
        }
    if not isinstance(named, dict) or not all(
        isinstance(text, str) for pair in named.items() for text in pair
    ):
        raise InvalidTokenizer(
            f"chat_template of {folder}", expected="a string or a list of {name, template}",
            actual=shown(value), remedy=_REMEDY,
        )
    return named
