"""Conversations that are open in the page, and the threads that write into them.

A tab of a browser only looks at its conversation. The text is written by a thread of the server,
so it goes on while the tab is reloaded or closed, and several conversations are written at once.
Everything is kept in memory until the server ends; a file is made only where a person saves one.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exl_loader import InvalidSettings

from ..panel.panel import error_html
from .conversation import Conversation
from .session import ContinuedAnswer, Session

if TYPE_CHECKING:
    from exl_loader.generation.generator import TextGeneration

    Writing = TextGeneration | ContinuedAnswer

# Most conversations that the server keeps. The ones that were used least recently go first.
MAX_CONVERSATIONS = 1000

# Names that `new_key` and the page's script give to browsers and conversations.
_KEY = re.compile("[0-9a-f]{32}")

REASONS = {
    "eos": "ended by the model", "stop": "stop text found",
    "loop": "it repeated itself", "length": "the length that was asked for is reached",
    "context": "the context is full", "cancelled": "stopped", "failed": "failed",
}

FAILED = "Generation failed"


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
    """

    conversation: Conversation
    writing: bool
    stats: str
    notice: str
    problem: str
    in_text: bool
    version: int
    text_version: int


class OpenConversation:
    """A conversation, and the text that the model writes into it. For use from any thread.

    Args:
        session: the page's model.
        conversation: it belongs to this object from now on.
    """

    def __init__(self, session: Session, conversation: Conversation) -> None:
        self._session = session
        self._lock = threading.RLock()
        self._conversation = conversation
        self._writing: Writing | None = None
        self._add: Callable[[Conversation, str], None] = Conversation.add_to_answer
        self._stats = self._notice = self._problem = ""
        self._version = self._text_version = 0
        # Field of the conversation -> when the newest text was typed into it.
        self._typed: dict[str, float] = {}

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
            writing = self._writing
            stats = self._stats if writing is None else stats_line(writing)
            return Shown(self._conversation.copy(), writing is not None, stats, self._notice,
                         self._problem, self._add is Conversation.add_to_text, self._version,
                         self._text_version)

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
                time = (times or {}).get(name)
                if time is None or time > self._typed.get(name, 0):
                    setattr(self._conversation, name, value)
                if time is not None:
                    self._typed[name] = max(time, self._typed.get(name, 0))

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
            with self._lock:
                # Only its text is kept: a traceback would keep tensors alive.
                self._problem = error_html(error, heading=FAILED)
                self._version += 1
            return False
        return True

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
            self._version += 1
            if self._writing is None:
                self._stats = self._notice = self._problem = ""
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
        self._stats = self._problem = ""
        self._notice = ". ".join(text[:1].upper() + text[1:] for text in notices)

    def _run(self, writing: Writing) -> None:
        """Write to the end, in a thread of its own."""
        try:
            with writing:
                for piece in writing:
                    with self._lock:
                        self._add(self._conversation, piece)
                        self._text_version += self._add is Conversation.add_to_text
                        self._version += 1
        except Exception as error:
            problem = error_html(error, heading=FAILED)
        else:
            problem = ""
        with self._lock:
            self._conversation.drop_empty_answer()
            self._stats, self._problem = stats_line(writing), problem
            self._writing = None
            self._version += 1


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

    def get(self, tab: str) -> OpenConversation:
        """Return a tab's conversation, a new one if it has none.

        Args:
            tab: `BROWSER/CONVERSATION`, both names as `new_key` makes them.

        Raises:
            InvalidSettings: it is something else.
        """
        browser, _, conversation = tab.partition("/")
        if not (_KEY.fullmatch(browser) and _KEY.fullmatch(conversation)):
            raise InvalidSettings("tab", expected="the names of a browser and a conversation",
                                  actual="another text", remedy="Reload the page")
        with self._lock:
            found = self._open.pop((browser, conversation), None)
            if found is None:
                found = OpenConversation(self._session, self._next(browser))
            self._open[browser, conversation] = found
            idle = [key for key, value in self._open.items() if not value.is_writing]
            for key in idle[: max(0, len(self._open) - MAX_CONVERSATIONS)]:
                del self._open[key]
            return found

    def _next(self, browser: str) -> Conversation:
        """Make a browser's next conversation."""
        for (owner, _), opened in reversed(self._open.items()):
            if owner == browser:
                before = opened.shown().conversation
                return Conversation(system=before.system, settings=before.settings)
        return self._first.copy()

    def listed(self, tab: str) -> list[tuple[str, str]]:
        """Return (title, tab) of each conversation of a tab's browser, the newest first.

        Those without a turn or a text are left out, except the tab's own.
        """
        browser = tab.partition("/")[0]
        with self._lock:
            own = [("/".join(key), opened) for key, opened in reversed(self._open.items())
                   if key[0] == browser]
        found = []
        for name, opened in own:
            title = opened.title
            if title or name == tab:
                found.append((title or "New conversation", name))
        return found
