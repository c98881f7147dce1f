"""What one rendering of a chat template may use: time, and the amount of text and values made.

Templates share values freely, so a few lines can make a list whose text would fill a disk
(`[a, a]`, again and again). Every value that a template makes is therefore weighed with all that
it contains, and the memory that it newly takes is counted against one total.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from itertools import chain
from typing import Any, TypeVar

MAX_RENDER_SECONDS = 5.0
# A conversation that fills a context of a million tokens has about 4 MB of text.
MAX_RENDER_CHARS = 16 << 20
# All values together, kept or not: that a value has been dropped cannot be seen. Room for a
# template that collects half a megabyte of text message by message over a thousand messages.
MAX_TOTAL_CHARS = 256 << 20
# Longer numbers take noticeable time to divide and to write.
MAX_INTEGER_BITS = 1 << 16

# What Python takes for a list or dict, and for an entry of one, in characters of one byte.
CONTAINER_CHARS = 64
ENTRY_CHARS = 16
# Lighter containers are weighed again rather than remembered.
_REMEMBERED_CHARS = 4096

_CONTAINERS = (list, tuple, dict, set, frozenset)
_Value = TypeVar("_Value")


class LimitReached(Exception):
    """A template ran too long or made too much."""


class Budget(threading.local):
    """What the rendering of this thread may still use."""

    def __init__(self) -> None:
        self._deadline = float("inf")
        self._total = 0
        # Containers never change in the sandbox. The reference keeps the id from being reused.
        self._weights: dict[int, tuple[Any, int]] = {}

    def running(self) -> Budget:
        """Begin a rendering: `with budget.running(): ...`."""
        self._deadline = time.monotonic() + MAX_RENDER_SECONDS
        self._total = 0
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        self._deadline = float("inf")
        self._weights = {}

    def tick(self, chars: int = 0) -> str:
        """Stop the template where its time is over, or its text too much.

        Args:
            chars: of text that the template may write before the next tick.

        Returns:
            Text to be shown in a template: none.

        Raises:
            LimitReached: always where it stops.
        """
        if time.monotonic() > self._deadline:
            raise LimitReached(f"it did not end within {MAX_RENDER_SECONDS:g} s")
        self._total += chars
        if chars > MAX_RENDER_CHARS or self._total > MAX_TOTAL_CHARS:
            raise LimitReached(
                f"it makes values of more than {MAX_RENDER_CHARS} characters, "
                f"or of {MAX_TOTAL_CHARS} together"
            )
        return ""

    def made(self, value: _Value) -> _Value:
        """Count a value that the template made, and return it.

        Raises:
            LimitReached: it is too much.
        """
        self.check(value)
        if isinstance(value, str):
            self.tick(len(value))
        elif isinstance(value, _CONTAINERS):
            self.tick(CONTAINER_CHARS + ENTRY_CHARS * len(value))
        else:
            self.tick()
        return value

    def check(self, value: Any) -> int:
        """Weigh a value with all that it contains, as often as it contains it.

        Returns:
            About the characters that it would take when written out.

        Raises:
            LimitReached: it is too heavy, or a number is too long.
        """
        if isinstance(value, str):
            weight = len(value)
        elif isinstance(value, int):
            if value.bit_length() > MAX_INTEGER_BITS:
                raise LimitReached(f"it makes numbers of more than {MAX_INTEGER_BITS} bits")
            weight = ENTRY_CHARS + value.bit_length() // 3
        elif isinstance(value, _CONTAINERS):
            weight = self._weigh(value)
        else:
            weight = ENTRY_CHARS
        if weight > MAX_RENDER_CHARS:
            self.tick(weight)
        return weight

    def _weigh(self, container: Any) -> int:
        known = self._weights.get(id(container))
        if known is not None:
            return known[1]
        weight = CONTAINER_CHARS
        parts: Iterable[Any] = container
        if isinstance(container, dict):
            parts = chain(container, container.values())
        for part in parts:
            weight += ENTRY_CHARS + self.check(part)
            if weight > MAX_RENDER_CHARS:
                break
        if weight > _REMEMBERED_CHARS:
            self.tick()
            self._weights[id(container)] = (container, weight)
        return weight


BUDGET = Budget()
