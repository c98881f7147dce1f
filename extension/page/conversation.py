"""A conversation and a text as a page edits and keeps them, and their file.

Nothing here knows of Gradio or of a model. The file is JSON. `messages` in it are OpenAI's, so
that conversations of other programs can be read:

    {"format": "exl_loader conversation", "messages": [{"role": "user", "content": "Hi"}, ...],
     "text": "...", "settings": {"temperature": 0.7, ...}}

What a browser keeps of a conversation has the same fields, and `draft` and `before`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from exl_loader import InvalidSettings, SamplingSettings
from exl_loader.utils.errors import shown
from exl_loader.utils.json_keys import InvalidJson, parse_json

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"

# What the file says of itself. Files without it are read if they have messages.
FORMAT = "exl_loader conversation"

# The settings of sampling that the page has fields for.
SETTING_NAMES = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p",
                 "repetition_penalty", "seed", "stop_strings")

# Characters of a title in a list of conversations.
TITLE_CHARS = 40

_OTHER_FILE = "Choose a file that this page has saved, or JSON with OpenAI's messages"


@dataclass
class Turn:
    """What one side said.

    Args:
        role: USER or ASSISTANT.
        content: the text.
    """

    role: str
    content: str


@dataclass
class Conversation:
    """Turns of a chat, and a text that a model continues.

    Attributes:
        system: the system prompt; empty for none.
        turns: what was said, in order.
        draft: the message that is being typed.
        text: the text of the notebook.
        before: the text before the model last continued it; None if it has not.
        settings: the values of the page's fields of sampling, by their names.
    """

    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    draft: str = ""
    text: str = ""
    before: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def copy(self) -> Conversation:
        """Return a conversation that changes independently of this one."""
        return replace(self, turns=[replace(turn) for turn in self.turns],
                       settings=dict(self.settings))

    @property
    def title(self) -> str:
        """The beginning of the first question, of the text, or of the draft; else empty."""
        first = next((turn.content for turn in self.turns if turn.role == USER),
                     self.text or self.draft)
        line = " ".join(first.split())
        return line if len(line) <= TITLE_CHARS else line[: TITLE_CHARS - 1].rstrip() + "…"

    # The chat

    def ask(self, content: str) -> None:
        """Add a question.

        Raises:
            InvalidSettings: it is empty.
        """
        _check_message(content)
        self.turns.append(Turn(USER, content))

    def edit(self, index: int, content: str) -> bool:
        """Change a turn. After another question the turns that followed it no longer hold.

        Args:
            index: of the turn.
            content: its new text.

        Returns:
            True if the turn is a question, which has no answer now.

        Raises:
            InvalidSettings: there is no such turn, or the question would be empty.
        """
        if not 0 <= index < len(self.turns):
            raise InvalidSettings("message", expected=f"one of {len(self.turns)}",
                                  actual=f"number {index + 1}", remedy="Reload the page")
        if self.turns[index].role == ASSISTANT:
            self.turns[index].content = content
            return False
        _check_message(content)
        self.turns[index].content = content
        del self.turns[index + 1 :]
        return True

    def drop_answer(self) -> None:
        """Drop the last answer, so that the question before it can be answered again.

        Raises:
            InvalidSettings: there is no question.
        """
        if self.turns and self.turns[-1].role == ASSISTANT:
            self.turns.pop()
        if not self.turns or self.turns[-1].role != USER:
            raise InvalidSettings("Regenerate", expected="a question to answer",
                                  actual="none", remedy="Send a message first")

    def begin_answer(self) -> None:
        """Add an empty answer, to which `add_to_answer` appends."""
        self.turns.append(Turn(ASSISTANT, ""))

    def check_continues(self) -> None:
        """Check that the last answer can be continued.

        Raises:
            InvalidSettings: an answer with some text is not last.
        """
        if not self.turns or self.turns[-1].role != ASSISTANT or not self.turns[-1].content:
            raise InvalidSettings("Continue", expected="an answer to continue",
                                  actual="none", remedy="Send a message first")

    def add_to_answer(self, piece: str) -> None:
        """Append a piece of text to the last answer."""
        self.turns[-1].content += piece

    def drop_empty_answer(self) -> None:
        """Drop the last answer if nothing was written into it."""
        if self.turns and self.turns[-1] == Turn(ASSISTANT, ""):
            self.turns.pop()

    def messages(self) -> list[dict[str, str]]:
        """Return the turns as messages of a chat template, without the system prompt."""
        return [asdict(turn) for turn in self.turns]

    # The text

    def begin_text(self) -> None:
        """Remember the text as it is, before the model continues it."""
        self.before = self.text

    def add_to_text(self, piece: str) -> None:
        """Append a piece of text to the text."""
        self.text += piece

    def undo_text(self) -> None:
        """Take back what the model last wrote. Without such a text nothing changes."""
        if self.before is not None:
            self.text, self.before = self.before, None

    # The file

    def to_json(self) -> str:
        """Write the conversation as a file; `from_json` reads it. Empty fields are left out."""
        return json.dumps(self._file_values(), ensure_ascii=False, indent=2) + "\n"

    def _file_values(self) -> dict[str, Any]:
        settings = {name: value for name, value in self.settings.items() if value is not None}
        system = [{"role": SYSTEM, "content": self.system}] if self.system else []
        return {"format": FORMAT, "messages": [*system, *self.messages()], "text": self.text,
                "settings": settings}

    @classmethod
    def from_json(cls, data: str) -> Conversation:
        """Read a file.

        Args:
            data: its text.

        Raises:
            InvalidSettings: it is not JSON, or no conversation. The message says what is wrong.
        """
        try:
            values = parse_json(data)
        except InvalidJson as error:
            raise _refused("JSON", str(error)) from None
        return cls._from_values({"messages": values} if isinstance(values, list) else values)

    @classmethod
    def _from_values(cls, values: Any) -> Conversation:
        if not isinstance(values, dict) or not {"messages", "text"} & values.keys():
            raise _refused("an object with messages or text", shown(values))
        if values.get("format", FORMAT) != FORMAT:
            raise _refused(f"the format {FORMAT!r}", shown(values["format"]))
        turns = _turns(values.get("messages", []))
        system = turns.pop(0).content if turns and turns[0].role == SYSTEM else ""
        if any(turn.role == SYSTEM for turn in turns):
            raise _refused("one system message, the first", "another one later")
        text = values.get("text", "")
        if not isinstance(text, str):
            raise _refused("a text", shown(text))
        return cls(system=system, turns=turns, text=text,
                   settings=_settings(values.get("settings", {})))

    # What a browser keeps

    def to_kept(self) -> dict[str, Any]:
        """Return all fields as values of JSON; `from_kept` reads them."""
        return self._file_values() | {"draft": self.draft, "before": self.before}

    @classmethod
    def from_kept(cls, values: Any) -> tuple[Conversation, bool]:
        """Read what `to_kept` has returned, perhaps of another version of exl_loader.

        Args:
            values: untrusted values of JSON.

        Returns:
            The conversation, and whether its settings could be read. If not it has none.

        Raises:
            InvalidSettings: it is no conversation.
        """
        if not isinstance(values, dict):
            raise _refused("an object", shown(values))
        try:
            found, has_settings = cls._from_values(values), True
        except InvalidSettings:
            found, has_settings = cls._from_values(values | {"settings": {}}), False
        draft, before = values.get("draft", ""), values.get("before")
        found.draft = draft if isinstance(draft, str) else ""
        found.before = before if isinstance(before, str) else None
        # The server may have ended before the first piece of an answer.
        found.drop_empty_answer()
        return found, has_settings


def _check_message(content: str) -> None:
    if not content.strip():
        raise InvalidSettings("message", expected="some text", actual="an empty message")


def _refused(expected: str, actual: str) -> InvalidSettings:
    return InvalidSettings("This file is not a conversation", expected=expected, actual=actual,
                           remedy=_OTHER_FILE)


def _turns(messages: Any) -> list[Turn]:
    """Read messages, the system message among them."""
    if not isinstance(messages, list):
        raise _refused("a list of messages", shown(messages))
    turns = []
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        if not isinstance(message, dict):
            raise _refused(f"{where} as an object with role and content", shown(message))
        role, content = message.get("role"), message.get("content")
        if role not in (SYSTEM, USER, ASSISTANT):
            raise _refused(f"{where} of {SYSTEM}, {USER} or {ASSISTANT}", shown(role))
        if not isinstance(content, str):
            raise _refused(f"{where} with a text as its content", shown(content))
        turns.append(Turn(role, content))
    return turns


def _settings(values: Any) -> dict[str, Any]:
    """Read settings, and check them as the engine does."""
    if not isinstance(values, dict):
        raise _refused("settings as an object", shown(values))
    for name in values:
        if name not in SETTING_NAMES:
            raise _refused(f"settings out of {', '.join(SETTING_NAMES)}", shown(name))
    SamplingSettings.from_dict(values)
    return values


def fit_text(
    text: str, count_tokens: Callable[[str], int], ctx_size: int, max_new_tokens: int
) -> str:
    """Cut a text at its beginning, so that new text has room after it in the context.

    A text is kept whole as long as an eighth of the context is free, or all that was asked for.
    Then half of the context is freed at once, or what was asked for, so that the texts that follow
    begin alike and the cache is reused.

    Args:
        text: any text.
        count_tokens: returns the number of tokens of a text.
        ctx_size: most tokens of old and new text together.
        max_new_tokens: tokens of the new text.

    Returns:
        The end of the text, from the beginning of a line on where the text has lines.
    """
    count = count_tokens(text)
    if count + min(max_new_tokens, ctx_size // 8) <= ctx_size:
        return text
    most = ctx_size - min(max_new_tokens, ctx_size // 2)
    while count > most and text:
        # At least one character less, and a little more than the average so that few rounds do.
        share = 0.98 * most / count
        text = text[len(text) - min(len(text) - 1, int(share * len(text))) :]
        newline = text.find("\n")
        if 0 <= newline < len(text) // 2:
            text = text[newline + 1 :]
        count = count_tokens(text)
    return text


def stop_strings(lines: str) -> list[str]:
    r"""Read a field with a stop string in each line, in which `\n`, `\t` and `\\` are characters.

    Empty lines count as none.
    """
    escapes = {"n": "\n", "t": "\t", "\\": "\\"}
    found = []
    for line in lines.splitlines():
        text, rest = "", iter(line)
        for character in rest:
            if character == "\\":
                following = next(rest, "")
                character = escapes.get(following, "\\" + following)
            text += character
        if text:
            found.append(text)
    return found


def stop_lines(texts: Sequence[str]) -> str:
    """Write stop strings as the field shows them; `stop_strings` reads it."""
    escapes = {"\\": "\\\\", "\n": "\\n", "\t": "\\t"}
    return "\n".join("".join(escapes.get(c, c) for c in text) for text in texts)
