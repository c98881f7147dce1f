"""The end of a chain of the page's events that somebody else wires: a click and what follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


class EventChain:
    """A button's click and every event that was chained to it, as they are wired.

    Attributes:
        last: Gradio's dependency at the end so far; None before the click is wired.
    """

    def __init__(self) -> None:
        self.last: Any = None

    def then(self, *args: Any, **kwargs: Any) -> None:
        """Have something done when all of the chain is; nothing where there is no chain."""
        if self.last is not None:
            self.last.then(*args, **kwargs)

    def follow(self, wire: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap one of Gradio's functions that wire an event; what it wires is the end."""

        def wired(*args: Any, **kwargs: Any) -> Any:
            self.last = dependency = wire(*args, **kwargs)
            for name in ("then", "success"):
                setattr(dependency, name, self.follow(getattr(dependency, name)))
            return dependency

        return wired


@contextmanager
def event_chains(
    components: Mapping[str, Any], buttons: Sequence[str]
) -> Iterator[list[EventChain]]:
    """Follow what is wired to some buttons' clicks within the block.

    Args:
        components: of the page. buttons: names; those that are not there are left out.
    """
    chains, clicks = [], []
    for name in buttons:
        button = components.get(name)
        if button is not None:
            chain, click = EventChain(), button.click
            button.click = chain.follow(click)
            chains.append(chain)
            clicks.append((button, click))
    try:
        yield chains
    finally:
        for button, click in clicks:
            button.click = click
