"""A conversation that is open in the page, and the thread that writes into it.

A tab of a browser only looks at its conversation. The text is written by a thread of the server,
so it goes on while the tab is reloaded or closed, and several conversations are written at once.
The server has everything in memory and nothing on its disk. Each tab has its browser keep what it
shows (`browser_storage.py`), and hands it back to a server that does not know it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exl_loader import InvalidSettings, ModelUnloaded, PromptTooLong
from exl_loader.utils.json_keys import InvalidJson, parse_json

from ..panel.panel import error_html
from .conversation import Conversation
from .session import ContinuedAnswer, Session

if TYPE_CHECKING:
    from exl_loader.generation.generator import TextGeneration

    Writing = TextGeneration | ContinuedAnswer

# What a person types is kept when they have paused for so long; a tab keeps it itself meanwhile.
PAUSE_S = 1.0

REASONS = {
    "eos": "ended by the model", "stop": "stop text found",
    "loop": "it repeated itself", "length": "the length that was asked for is reached",
    "context": "the context is full", "cancelled": "stopped", "failed": "failed",
}

FAILED, CANNOT_OPEN = "Generation failed", "Cannot be opened"

CUT_OFF = "exl_loader ended while this was written. Continue goes on with it."
KEPT = "The conversation that this browser keeps"
NOT_DELETED = "The browser keeps it as it is. This is a new one"
NO_SETTINGS = "The settings of this conversation could not be read, so they are those of a new one."


@dataclass(frozen=True)
class Shown:
    """What a tab shows of a conversation.

    Args:
        conversation: a copy.
        writing: True while the model writes.
        stats: the figures of the last text; empty before the first.
        notice: what the reader should know of the last text; empty for nothing.
        problem: an error as HTML; empty for none.
        in_text: True if the model wrote last into the text, and not into the chat.
        version: changes with every other value here.
        text_version: changes with the text, but not when a person types it.
        record_version: changes when the browser has to keep the conversation again.
    """

    conversation: Conversation
    writing: bool
    stats: str
    notice: str
    problem: str
    in_text: bool
    version: int
    text_version: int
    record_version: int


@dataclass(frozen=True)
class Problem:
    """An error that a tab shows.

    Args:
        html: empty for none.
        model_version: `Session.version` with which alone it is true; empty for any.
    """

    html: str = ""
    model_version: str = ""


class OpenConversation:
    """A conversation, and the text that the model writes into it. For use from any thread.

    Args:
        session: the page's model.
        conversation: it belongs to this object from now on.
    """

    def __init__(self, session: Session, conversation: Conversation) -> None:
        self._first_text = conversation.text
        self._session = session
        self._lock = threading.RLock()
        self._conversation = conversation
        self._writing: Writing | None = None
        self._add: Callable[[Conversation, str], None] = Conversation.add_to_answer
        self._stats = self._notice = ""
        self._problem = Problem()
        self._version = self._text_version = 0
        # When it was changed, in milliseconds since 1970, each time another number. Records of
        # several servers are ordered by it.
        self._changed = self._to_keep = int(1000 * time.time())
        self._typed_s = 0.0
        # Field of the conversation -> when the newest text was typed into it.
        self._typed: dict[str, float] = {}

    @classmethod
    def from_record(
        cls, session: Session, values: Mapping[str, Any], settings: Mapping[str, Any],
    ) -> OpenConversation:
        """Open what a browser has kept.

        Args:
            session: the page's model.
            values: as `record_values` returns them.
            settings: those that the record lacks.

        Raises:
            InvalidSettings: it is no conversation.
        """
        try:
            conversation, has_settings = Conversation.from_kept(values)
        except InvalidSettings as error:
            raise InvalidSettings(
                KEPT, expected=error.expected, actual=error.actual, remedy=NOT_DELETED) from None
        conversation.settings = {**settings, **conversation.settings}
        opened = cls(session, conversation)
        opened._first_text = ""
        opened._changed = opened._to_keep = values["changed"]
        if values.get("in_text") is True:
            opened._add = Conversation.add_to_text
        notices = [CUT_OFF] * (values.get("writing") is True) + [NO_SETTINGS] * (not has_settings)
        opened._notice = " ".join(notices)
        return opened

    def record(self, key: str) -> str:
        """Return what a browser keeps: a line with what it needs to know, and one with the rest.

        Args:
            key: the conversation's name.
        """
        with self._lock:
            conversation = self._conversation.copy()
            more = {"changed": self._changed, "writing": self._writing is not None,
                    "in_text": self._add is Conversation.add_to_text}
        is_empty = not (conversation.turns or conversation.draft) and (
            conversation.text in ("", self._first_text))
        return "\n".join(json.dumps(values, ensure_ascii=False) for values in (
            [key, more["changed"], conversation.title, is_empty, more["writing"]],
            conversation.to_kept() | more))

    @property
    def changed(self) -> int:
        """When it was last changed, in milliseconds since 1970."""
        return self._changed

    @property
    def record_version(self) -> int:
        """As `Shown.record_version`."""
        with self._lock:
            if time.monotonic() - self._typed_s >= PAUSE_S:
                self._to_keep = self._changed
            return self._to_keep

    @property
    def version(self) -> int:
        """As `Shown.version`."""
        return self._version

    @property
    def is_writing(self) -> bool:
        """True while the model writes."""
        return self._writing is not None

    @property
    def title(self) -> str:
        """As `Conversation.title`."""
        with self._lock:
            return self._conversation.title

    def shown(self) -> Shown:
        """Return what a tab shows."""
        with self._lock:
            if self._problem.model_version not in ("", self._session.version):
                self._problem = Problem()
            writing = self._writing
            stats = self._stats if writing is None else stats_line(writing)
            return Shown(self._conversation.copy(), writing is not None, stats, self._notice,
                         self._problem.html, self._add is Conversation.add_to_text, self._version,
                         self._text_version, self.record_version)

    def _touch(self, typed: bool = False) -> None:
        """Note a change, which the browser has to keep at once unless a person types."""
        self._changed = max(self._changed + 1, int(1000 * time.time()))
        if typed:
            self._typed_s = time.monotonic()
        else:
            self._version += 1
            self._to_keep = self._changed

    def keep(self, times: Mapping[str, float] | None = None, /, **values: Any) -> None:
        """Keep what a person types: fields of `Conversation`, such as `draft` and `settings`.

        The text is kept only while the model does not write into it.

        Args:
            times: when the texts of fields were typed, in the browser's clock. An older text than
                the newest one, or the same again, is not kept: requests may arrive late.
            values: the fields.
        """
        with self._lock:
            if self._writing is not None:
                values.pop("text", None)
            for name, value in values.items():
                typed_ms = (times or {}).get(name)
                newest_ms = self._typed.get(name, 0)
                if ((typed_ms is None or typed_ms > newest_ms)
                        and getattr(self._conversation, name) != value):
                    setattr(self._conversation, name, value)
                    self._touch(typed=True)
                if typed_ms is not None:
                    self._typed[name] = max(typed_ms, newest_ms)

    def restore(self, typed: Mapping[str, tuple[float, str]]) -> None:
        """Keep what a tab has stored before it was reloaded, where it is newer.

        Args:
            typed: field -> when it was typed, and the text.
        """
        with self._lock:
            text = self._conversation.text
            self.keep({name: time for name, (time, _) in typed.items()},
                      **{name: value for name, (_, value) in typed.items()})
            self._text_version += text != self._conversation.text

    def attempt(self, action: Callable[..., None], *values: Any) -> bool:
        """Call one of the methods below; show an error instead of raising it.

        Returns:
            False if there was an error. The conversation is then as it was.
        """
        try:
            action(self, *values)
        except Exception as error:
            self.say(error, FAILED)
            return False
        return True

    def say(self, error: Exception, heading: str = CANNOT_OPEN) -> None:
        """Show an error."""
        with self._lock:
            # Only its text is kept: a traceback would keep tensors alive.
            is_of_model = isinstance(error, (ModelUnloaded, PromptTooLong))
            self._problem = Problem(error_html(error, heading=heading),
                                    self._session.version if is_of_model else "")
            self._version += 1

    def send(self, message: str) -> None:
        """Ask a question, and have it answered."""
        with self._changing() as conversation:
            conversation.ask(message)
            self._answer(conversation)
            conversation.draft = ""

    def edit(self, index: int, content: str) -> None:
        """Change a turn. A question is answered anew, and what followed it is dropped."""
        with self._changing() as conversation:
            if conversation.edit(index, content):
                self._answer(conversation)

    def regenerate(self) -> None:
        """Answer the last question again."""
        with self._changing() as conversation:
            conversation.drop_answer()
            self._answer(conversation)

    def continue_answer(self) -> None:
        """Let the model go on with its last answer."""
        with self._changing() as conversation:
            conversation.check_continues()
            self._answer(conversation, continued=True)

    def write(self, text: str) -> None:
        """Let the model continue a text, which becomes the conversation's."""
        with self._changing() as conversation:
            conversation.text = text
            self._continue_text(conversation)

    def write_again(self) -> None:
        """Let the model continue the text again from where it last began."""
        with self._changing() as conversation:
            conversation.undo_text()
            self._continue_text(conversation)

    def undo(self) -> None:
        """Take back what the model last wrote into the text."""
        with self._changing() as conversation:
            conversation.undo_text()

    def set_text(self, text: str) -> None:
        """Begin another text."""
        with self._changing() as conversation:
            conversation.text, conversation.before = text, None

    def replace(self, data: str) -> None:
        """Show the conversation of a file. A bad file changes nothing."""
        with self._changing() as conversation:
            loaded = Conversation.from_json(data)
            # What the file does not have stays.
            conversation.system, conversation.turns = loaded.system, loaded.turns
            conversation.text, conversation.before = loaded.text, None
            conversation.settings = conversation.settings | loaded.settings

    def stop(self) -> None:
        """End the text that is being written after the current step. Does not wait."""
        writing = self._writing
        if writing is not None:
            writing.stop()

    @contextmanager
    def _changing(self) -> Iterator[Conversation]:
        """Change the conversation; an error undoes the changes.

        Raises:
            InvalidSettings: the model writes into it.
        """
        with self._lock:
            if self._writing is not None:
                raise InvalidSettings(
                    "conversation", expected="one text at a time",
                    actual="a text that is being written", remedy="Stop it, or wait for its end")
            changed = self._conversation.copy()
            yield changed
            self._text_version += changed.text != self._conversation.text
            self._conversation = changed
            self._touch()
            if self._writing is None:
                self._stats = self._notice = ""
                self._problem = Problem()
            else:
                threading.Thread(target=self._run, args=(self._writing,), daemon=True).start()

    def _answer(self, conversation: Conversation, continued: bool = False) -> None:
        notices: list[str] = []
        writing = self._session.answer(
            conversation.messages(), _given(conversation.settings), notices,
            system=conversation.system, continued=continued)
        if not continued:
            conversation.begin_answer()
        self._begin(writing, Conversation.add_to_answer, notices)

    def _continue_text(self, conversation: Conversation) -> None:
        notices: list[str] = []
        conversation.begin_text()
        writing = self._session.continue_text(
            conversation.text, _given(conversation.settings), notices)
        self._begin(writing, Conversation.add_to_text, notices)

    def _begin(
        self, writing: Writing, add: Callable[[Conversation, str], None], notices: list[str]
    ) -> None:
        """Note what `_changing` starts to write at its end, and what adds a piece of it."""
        self._writing, self._add = writing, add
        self._stats, self._problem = "", Problem()
        self._notice = ". ".join(text[:1].upper() + text[1:] for text in notices)

    def _run(self, writing: Writing) -> None:
        """Write to the end, in a thread of its own."""
        try:
            with writing:
                for piece in writing:
                    with self._lock:
                        self._add(self._conversation, piece)
                        self._text_version += self._add is Conversation.add_to_text
                        self._touch()
        except Exception as error:
            problem = Problem(error_html(error, heading=FAILED))
        else:
            problem = Problem()
        with self._lock:
            self._conversation.drop_empty_answer()
            self._stats, self._problem = stats_line(writing), problem
            self._writing = None
            self._touch()


def stats_line(writing: Writing) -> str:
    """Return a line with the figures of a text."""
    stats = writing.stats
    if not stats.new_tokens and writing.finish_reason is None:
        return "Reading the prompt …"
    parts = [_tokens(stats.new_tokens), f"{stats.tokens_per_s:.1f} tokens/s"]
    reused = f", {stats.reused_tokens} reused" if stats.reused_tokens else ""
    parts.append(f"prompt {_tokens(stats.prompt_tokens)}{reused} in {stats.prefill_s:.2f} s")
    if stats.draft_summary:
        parts.append(stats.draft_summary)
    if writing.finish_reason is not None:
        parts.append(REASONS.get(writing.finish_reason, writing.finish_reason))
        parts.append(f"seed {writing.seed}")
    return " · ".join(parts)


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings whose fields are not empty."""
    return {name: value for name, value in settings.items() if value is not None}


def is_stamp(value: Any) -> bool:
    """Return whether an untrusted value is one as of `OpenConversation.changed`."""
    return isinstance(value, int) and not isinstance(value, bool)


def record_values(kept: str) -> dict[str, Any]:
    """Read a record without its first line.

    Raises:
        InvalidSettings: it is none.
    """
    try:
        values = parse_json(kept)
    except InvalidJson as error:
        raise _unreadable(str(error)) from None
    if not isinstance(values, dict) or not is_stamp(values.get("changed")):
        raise _unreadable("an object without the time of its last change")
    return values


def _unreadable(actual: str) -> InvalidSettings:
    return InvalidSettings(KEPT, expected="one that this version of exl_loader can read",
                           actual=actual, remedy=NOT_DELETED)
