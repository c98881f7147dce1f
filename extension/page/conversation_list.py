"""All conversations that are open in the page, and what is listed of those that browsers keep."""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from exl_loader import InvalidSettings

from .conversation import TITLE_CHARS, Conversation
from .session import Session
from .writing import OpenConversation, is_stamp, record_values

# Most conversations that the server keeps. The ones that were used least recently go first.
MAX_CONVERSATIONS = 1000

# Most browsers of which the server remembers what they keep.
MAX_BROWSERS = 100

# Records of other conversations in one answer end after so many characters.
MAX_UNKEPT_CHARS = 4 << 20

# Names that `new_key` and the page's script give to browsers and conversations.
_KEY = re.compile("[0-9a-f]{32}")


def new_key() -> str:
    """Return a name for a conversation that nobody can guess."""
    return secrets.token_hex(16)


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
                if _is_key(key) and isinstance(title, str) and is_stamp(changed)]


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
        values = record_values(kept) if kept else None
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


def _key(tab: str) -> tuple[str, str]:
    browser, _, conversation = tab.partition("/")
    if not (_is_key(browser) and _is_key(conversation)):
        raise InvalidSettings("tab", expected="the names of a browser and a conversation",
                              actual="another text", remedy="Reload the page")
    return browser, conversation
