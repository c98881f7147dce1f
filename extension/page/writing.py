"""Conversations that are open in the page, and the threads that write into them.

A tab of a browser only looks at its conversation. The text is written by a thread of the server,
so it goes on while the tab is reloaded or closed, and several conversations are written at once.
The server has everything in memory and nothing on its disk. Each tab has its browser keep what it
shows (`browser_storage.py`), and hands it back to a server that does not know it.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from exl_loader import InvalidSettings, ModelUnloaded, PromptTooLong
from exl_loader.utils.json_keys import InvalidJson, parse_json

from ..panel.panel import error_html
from .conversation import TITLE_CHARS, Conversation
from .session import ContinuedAnswer, Session

if TYPE_CHECKING:
    from exl_loader.generation.generator import TextGeneration

    Writing = TextGeneration | ContinuedAnswer

# Most conversations that the server keeps. The ones that were used least recently go first.
MAX_CONVERSATIONS = 1000

# Most browsers of which the server remembers what they keep.
MAX_BROWSERS = 100

# Records of other conversations in one answer end after so many characters.
MAX_UNKEPT_CHARS = 4 << 20

# What a person types is kept when they have paused for so long; a tab keeps it itself meanwhile.
PAUSE_S = 1.0

# Names that `new_key` and the page's script give to browsers and conversations.
_KEY = re.compile("[0-9a-f]{32}")

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


def new_key() -> str:
    """Return a name for a conversation that nobody can guess."""
    return secrets.token_hex(16)


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
            values: as `_record_values` returns them.
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


@dataclass(frozen=True)
class KeptTitle:
    """A conversation that a browser keeps.

    Args:
        key: its name.
        title: as `Conversation.title`.
        changed: as `OpenConversation.changed`.
    """

    key: str
    title: str
    changed: int

    @classmethod
    def read(cls, values: Any) -> list[KeptTitle]:
        """Read untrusted values `[[key, title, changed], ...]`; others are left out."""
        if not isinstance(values, list):
            return []
        return [cls(key, title[:TITLE_CHARS], changed)
                for key, title, changed in (each for each in values if _is_triple(each))
                if _is_key(key) and isinstance(title, str) and _is_stamp(changed)]


class Conversations:
    """The open conversations of all browsers. All methods may be called from any thread.

    Args:
        session: the page's model.
        first: what a browser's first conversation begins with. Later ones take the settings and
            the system prompt of the one before.
    """

    def __init__(self, session: Session, first: Conversation) -> None:
        self._session = session
        self._first = first
        self._lock = threading.Lock()
        # (browser, conversation) -> it; the one used last is at the end.
        self._open: dict[tuple[str, str], OpenConversation] = {}
        # The same -> when it was deleted, in milliseconds since 1970.
        self._deleted: dict[tuple[str, str], int] = {}
        # Browser -> what it keeps; the one used last is at the end.
        self._kept: dict[str, list[KeptTitle]] = {}

    def find(self, tab: str) -> OpenConversation | None:
        """Return a tab's conversation; None if the server does not know it.

        Args:
            tab: `BROWSER/CONVERSATION`, both names as `new_key` makes them.

        Raises:
            InvalidSettings: it is something else.
        """
        key = _key(tab)
        with self._lock:
            found = self._open.pop(key, None)
            if found is not None:
                self._open[key] = found
            return found

    def get(self, tab: str) -> OpenConversation:
        """As `find`, of a tab that has opened its conversation.

        Raises:
            InvalidSettings: the server does not know it: it was started again, or another tab has
                deleted the conversation.
        """
        found = self.find(tab)
        if found is None:
            raise InvalidSettings("conversation", expected="one that is open",
                                  actual="one that the server does not know",
                                  remedy="Reload the page")
        return found

    def open(self, tab: str, kept: str = "", before: Any = None) -> OpenConversation:
        """Return a tab's conversation. If the server does not know it, it is the one kept, or new.

        Args:
            tab: as for `find`.
            kept: the conversation as the tab's browser has kept it; empty for nothing.
            before: the one that the browser kept before it, from whose system prompt and settings
                a new one begins if the server knows none of this browser.

        Raises:
            InvalidSettings: what was kept cannot be read.
        """
        found = self.find(tab)
        if found is not None:
            return found
        key = _key(tab)
        values = _record_values(kept) if kept else None
        with self._lock:
            if values is None or values["changed"] <= self._deleted.get(key, -1):
                found = OpenConversation(self._session, self._next(key[0], before))
            else:
                found = OpenConversation.from_record(
                    self._session, values, self._first.settings)
            self._open[key] = found
            idle = [key for key, value in self._open.items() if not value.is_writing]
            for each in idle[: max(0, len(self._open) - MAX_CONVERSATIONS)]:
                del self._open[each]
            return found

    def delete(self, tab: str) -> None:
        """Forget a conversation, and end what is written into it. Its name may be used again."""
        key = _key(tab)
        with self._lock:
            found = self._open.pop(key, None)
            if found is not None:
                found.stop()
            # A tab may still send what it has read from its browser's storage before.
            self._deleted[key] = max(int(1000 * time.time()),
                                     found.changed if found is not None else 0)
            for oldest in list(self._deleted)[:-MAX_CONVERSATIONS]:
                del self._deleted[oldest]
            kept = self._kept.get(key[0], [])
            self._kept[key[0]] = [each for each in kept if each.key != key[1]]

    def _next(self, browser: str, before: Any) -> Conversation:
        """Make a browser's next conversation."""
        for (owner, _), opened in reversed(self._open.items()):
            if owner == browser:
                last = opened.shown().conversation
                return Conversation(system=last.system, settings=last.settings)
        first = self._first.copy()
        if before is not None:
            try:
                last, _ = Conversation.from_kept(before)
            except InvalidSettings:
                # The page says so when that conversation is opened.
                return first
            first = replace(first, system=last.system, settings=first.settings | last.settings)
        return first

    def note_kept(self, tab: str, kept: Sequence[KeptTitle]) -> None:
        """Remember what a tab's browser keeps, for `listed`."""
        browser = _key(tab)[0]
        with self._lock:
            self._kept.pop(browser, None)
            self._kept[browser] = list(kept)
            for oldest in list(self._kept)[:-MAX_BROWSERS]:
                del self._kept[oldest]

    def unkept(self, tab: str) -> list[str]:
        """Return records of the other conversations of which the tab's browser keeps older ones.

        Their tabs were closed before their texts had been written. `note_kept` says what it has.
        """
        browser, own = _key(tab)
        with self._lock:
            kept = {each.key: each.changed for each in self._kept.get(browser, [])}
            newer = [(key, opened) for (owner, key), opened in reversed(self._open.items())
                     if owner == browser and key != own and opened.changed > kept.get(key, -1)]
        records, characters = [], 0
        for key, opened in newer:
            records.append(opened.record(key))
            characters += len(records[-1])
            if characters > MAX_UNKEPT_CHARS:
                break
        return records

    def listed(self, tab: str) -> list[tuple[str, str]]:
        """Return (title, tab) of each conversation of a tab's browser, the one changed last first.

        Those without a title are left out, except the tab's own, which is the first then.
        """
        browser, own = _key(tab)
        with self._lock:
            opened = {key: each for (owner, key), each in self._open.items() if owner == browser}
            kept = [each for each in self._kept.get(browser, []) if each.key not in opened
                    and each.changed > self._deleted.get((browser, each.key), -1)]
        # Not by their use: tabs that are open use theirs all the time.
        found = sorted(
            [*kept, *(KeptTitle(key, each.title, each.changed) for key, each in opened.items())],
            key=lambda each: (not each.title, each.changed), reverse=True)
        return [(each.title or "New conversation", f"{browser}/{each.key}")
                for each in found if each.title or each.key == own]


def _is_triple(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3


def _is_key(value: Any) -> bool:
    return isinstance(value, str) and _KEY.fullmatch(value) is not None


def _is_stamp(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _key(tab: str) -> tuple[str, str]:
    browser, _, conversation = tab.partition("/")
    if not (_is_key(browser) and _is_key(conversation)):
        raise InvalidSettings("tab", expected="the names of a browser and a conversation",
                              actual="another text", remedy="Reload the page")
    return browser, conversation


def _record_values(kept: str) -> dict[str, Any]:
    """Read a record without its first line.

    Raises:
        InvalidSettings: it is none.
    """
    try:
        values = parse_json(kept)
    except InvalidJson as error:
        raise _unreadable(str(error)) from None
    if not isinstance(values, dict) or not _is_stamp(values.get("changed")):
        raise _unreadable("an object without the time of its last change")
    return values


def _unreadable(actual: str) -> InvalidSettings:
    return InvalidSettings(KEPT, expected="one that this version of exl_loader can read",
                           actual=actual, remedy=NOT_DELETED)
