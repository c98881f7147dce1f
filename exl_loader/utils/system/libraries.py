"""Shared libraries: how their files are named, and closing one."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

# What the name of a shared library's file ends in.
LIBRARY_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")


def library_name(*, windows: str, posix: str) -> str:
    """Choose the file name that a vendor gives a library on this system."""
    return windows if sys.platform == "win32" else posix


def close_library(library: ctypes.CDLL) -> None:
    """Unload a library. While it is loaded, the system returns it again for the same path."""
    import _ctypes

    # Any: each system has one of the two functions.
    functions: Any = _ctypes
    close = functions.FreeLibrary if sys.platform == "win32" else functions.dlclose
    close(library._handle)
