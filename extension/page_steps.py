"""What the Model tab does with a click: the fields that follow it, and the gauge, in one answer.

The gauge has an event of its own, one for all fields, which is told of the same click while the
others are as they were before it. A drawing of those would come too early, cost a second turn
and perhaps cover the right one, so what a click's answer draws is not drawn from them as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import loading, panel

# How long after a click the page may still tell of what it found.
_ECHO_S = 1.0


class PageSteps:
    """The page's answers; each takes the values of `names`, and those in brackets before them.

    Args:
        names: of the fields that the gauge draws, in the order in which their values come.
        draw: the gauge of such fields' values.
        unchanged: what leaves a component of the page as it is.
    """

    def __init__(
        self, names: Sequence[str], draw: Callable[[Mapping[str, Any]], str], unchanged: Any
    ) -> None:
        self._names, self._draw, self._unchanged = names, draw, unchanged
        self._answered: tuple[tuple[Any, ...], float] | None = None

    def redraw(self, *values: Any) -> Any:
        """Draw the gauge, unless it is the echo of a click that has its answer."""
        answered, self._answered = self._answered, None
        if answered is not None and answered[0] == values:
            if time.monotonic() - answered[1] < _ECHO_S:
                return self._unchanged
        return self._draw(self._shown(values))

    def toggled(self, name: str) -> Callable[..., list[Any]]:
        """Answer a click on a toggle: both toggles, the cache type, the gauge."""

        def answer(*values: Any) -> list[Any]:
            self._answered = values, time.monotonic()
            shown = self._shown(values)
            return self._step(shown, panel.after_toggle(name, bool(shown[name]), _type_of(shown)))

        return answer

    def typed(self, *values: Any) -> list[Any]:
        """Answer another cache type: both toggles, the gauge; nothing where they are in step."""
        shown = self._shown(values)
        after = panel.toggles_for(_type_of(shown))
        if (bool(shown["cache_8bit"]), bool(shown["cache_4bit"])) == after[:2]:
            return [self._unchanged] * 3
        self._answered = values, time.monotonic()
        # The field keeps the web UI's spelling, and what is being typed there.
        cache_8bit, cache_4bit, _, gauge = self._step(shown, after)
        return [cache_8bit, cache_4bit, gauge]

    def picked(self, text: str | None, *values: Any) -> list[Any]:
        """Answer a button of the gauge (what it wrote): ctx_size and what `toggled` gives."""
        chosen = panel.parse_pick(text)
        if chosen is None:
            return [self._unchanged] * 5
        shown = self._shown(values) | {"ctx_size": chosen.ctx_size}
        return [chosen.ctx_size, *self._step(shown, panel.toggles_for(chosen.cache_type))]

    def _step(self, shown: dict[str, Any], after: panel.Toggles) -> list[Any]:
        return [*after, self._draw(shown | after._asdict())]

    def _shown(self, values: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(self._names, values, strict=True))


def _type_of(shown: Mapping[str, Any]) -> str:
    return loading.plain_cache_type(shown["cache_type"] or panel.DEFAULT_CACHE_TYPE)
