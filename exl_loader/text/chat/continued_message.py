"""Prompts that end inside the last message, so that the model continues it.

Only rendering shows which text a template writes after a message. So a mark is appended to the
message, and the rendered text is cut at the mark. The rules are those of transformers'
`continue_final_message`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...utils.errors import InvalidSettings

# The space at the end detects templates that trim messages, because they remove it.
_MARK = "EXL_LOADER_CONTINUES_HERE "

_SETTING = "continue_final_message"


def mark_end(
    messages: list[dict[str, Any]], key: bool | str, source: str, aliases: Sequence[str]
) -> str:
    """Append the mark to the last message, in place.

    Args:
        messages: JSON objects, at least one.
        key: the key of the text that is continued; True for `content`.
        source: the template, which must read that key.
        aliases: keys that hold the same text.

    Returns:
        The text that is continued.

    Raises:
        InvalidSettings: the last message has no such text, or the template does not read it.
    """
    name = key if isinstance(key, str) else "content"
    final = messages[-1]
    value = final.get(name)
    if value is None:
        raise InvalidSettings(_SETTING, expected=f"a final message with {name!r}",
                              actual=f"one with {sorted(final)}")
    names = [name]
    if name in aliases:
        names = [alias for alias in aliases if final.get(alias) == value]
    if not any(alias in source for alias in names):
        raise InvalidSettings(_SETTING, expected=f"a template that reads {name!r}",
                              actual="one that does not")
    if isinstance(value, list):
        return _mark_last_text(value)
    if not isinstance(value, str):
        raise InvalidSettings(_SETTING, expected="text", actual=type(value).__name__)
    for alias in names:
        final[alias] = value + _MARK
    return value


def _mark_last_text(parts: list[Any]) -> str:
    for part in reversed(parts):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text = part["text"]
            part["text"] = text + _MARK
            return text
    raise InvalidSettings(_SETTING, expected="a final message with text",
                          actual="only other parts")


def cut_after(prompt: str, text: str) -> str:
    """Cut a rendered prompt at the mark.

    Raises:
        InvalidSettings: the template left the message out, or changed it.
    """
    mark = _MARK.strip()
    at = prompt.rfind(mark)
    if at < 0 or text.strip() not in prompt:
        raise InvalidSettings(
            _SETTING, expected="a template that shows the final message as it is",
            actual="one that leaves out or changes it",
            remedy="Let the model begin a new message instead",
        )
    if prompt.startswith(_MARK, at):
        return prompt[:at]
    return prompt[:at].rstrip()
