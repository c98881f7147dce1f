"""One line of the plugin's in a host's log."""

from __future__ import annotations

import sys

from exl_loader.utils.errors import printable


def log_line(message: str, level: str, module: str, logger: str) -> None:
    """Print one line in a host's log, or on stderr while there is no log yet.

    Args:
        message: control characters in it are escaped.
        level: a method of a logger, `info`, `warning` or `error`.
        module: the host's module that has its logger.
        logger: the logger's name in that module.
    """
    found = getattr(sys.modules.get(module), logger, None)
    line = f"exl_loader: {printable(message)}"
    if found is None:
        print(line, file=sys.stderr, flush=True)
    else:
        getattr(found, level)(line)
