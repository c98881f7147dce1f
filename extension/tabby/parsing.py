"""How TabbyAPI is to build prompts of chats and to read answers: templates, reasoning, tools.

TabbyAPI does both itself. It asks the container for a template and for the tags that divide an
answer, and keeps what its own backend does with the configuration inside of that backend.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .contract import say

# Formats of whole messages that replace reasoning and tool formats -> their names as a tool format,
# and the special tokens of the models that write so.
_MESSAGE_FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "harmony": (("harmony",), ("<|channel|>", "<|message|>", "<|call|>", "<|return|>")),
    "muse_glimmer": (("muse_glimmer", "glimmer"),
                     ("<|start|>", "<|message|>", "<|eom|>", "<|eot|>")),
}

# Attributes that TabbyAPI reads of a container -> their value where nothing is configured.
_DEFAULTS: dict[str, Any] = {
    "reasoning": False,
    "reasoning_start_token": "<think>",
    "reasoning_end_token": "</think>",
    "reasoning_budget_tokens": None,
    "reasoning_budget_message": None,
    "tool_calls_in_reasoning": True,
    # Of the branch exl2-checkpoint.
    "reasoning_suppress_header": None,
    "force_enable_thinking": False,
}

_STARTS = ("auto", "always", "never")


async def find_template(name: str | None, model_dir: Path) -> Any:
    """Return the prompt template for chats, None if there is none.

    Args:
        name: of a template, None for the model's own.
        model_dir: the model's folder.
    """
    templating = importlib.import_module("common.templating")
    template = await templating.find_prompt_template(name, model_dir)
    if template is None:
        say("no prompt template was found, so chat completions are refused. Name one with "
            "prompt_template", level="warning")
    else:
        say(f"chat completions use the template {template.name}")
    return template


def settings(values: Mapping[str, Any], has_token: Callable[[str], bool]) -> dict[str, Any]:
    """Return the attributes by which TabbyAPI reads answers.

    Args:
        values: the configuration.
        has_token: returns whether the model has a token of that text.
    """
    found = {name: default if values.get(name) is None else values[name]
             for name, default in _DEFAULTS.items()}
    found["tool_format"] = _tool_format(values.get("tool_format"))
    found["tool_format_evidence"] = "tool_format in the configuration"
    found["start_in_reasoning"] = _start(values.get("start_in_reasoning"))
    found["template_vars_default"] = dict(values.get("template_vars_default") or {})
    found["template_vars_force"] = dict(values.get("template_vars_force") or {})
    if found["force_enable_thinking"]:
        found["template_vars_force"].setdefault("enable_thinking", True)
    found |= _message_formats(values, found, has_token)
    return found


def _tool_format(name: str | None) -> str | None:
    if not name:
        return None
    tools = importlib.import_module("endpoints.OAI.utils.tools")
    if tools.is_supported_format(name):
        return name
    say(f"tool_format: {name} is not known to this TabbyAPI; tool calls are not parsed",
        level="warning")
    return None


def _start(value: str | None) -> str:
    if value is None or value in _STARTS:
        return value or "auto"
    say(f"start_in_reasoning: {value} is none of {', '.join(_STARTS)}; auto is used",
        level="warning")
    return "auto"


def _message_formats(
    values: Mapping[str, Any], found: Mapping[str, Any], has_token: Callable[[str], bool]
) -> dict[str, bool]:
    """Return which formats of whole messages are read, at most one."""
    chosen = dict.fromkeys(_MESSAGE_FORMATS, False)
    for name, (tool_formats, tokens) in _MESSAGE_FORMATS.items():
        asked = values.get(name)
        if asked is False and found["tool_format"] in tool_formats:
            say(f"tool_format: {found['tool_format']} does nothing while {name} is false",
                level="warning")
        wanted = asked if asked is not None else (
            found["tool_format"] in tool_formats or all(map(has_token, tokens)))
        if wanted and any(chosen.values()):
            if asked:
                say(f"{name} does nothing, because harmony is chosen as well", level="warning")
        elif wanted:
            chosen[name] = True
            say(f"answers are read in the format {name}")
            if found["reasoning"] or found["tool_format"] not in (None, *tool_formats):
                say(f"reasoning and tool_format do nothing, because the format {name} has its own",
                    level="warning")
    return chosen
