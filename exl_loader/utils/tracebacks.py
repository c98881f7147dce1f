"""What an error keeps alive: the frames it went through, with all that was in their locals."""

from __future__ import annotations

import traceback


def drop_locals(error: BaseException) -> None:
    """Empty the frames that an error went through, as far as they have ended.

    A host that keeps an error to show it (an interactive session does so with its last one)
    would otherwise keep, through its traceback, every buffer and view that was in a local
    variable on the way: a model's whole memory, long after it was unloaded.
    """
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            traceback.clear_frames(current.__traceback__)
            pending += [current.__cause__, current.__context__]


def modules_of(error: BaseException) -> list[str]:
    """Return the names of the modules that an error passed through, the one that raised it last."""
    names = []
    trace = error.__traceback__
    while trace is not None:
        names.append(str(trace.tb_frame.f_globals.get("__name__", "")))
        trace = trace.tb_next
    return names
