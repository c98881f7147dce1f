"""The definition of every operation, in plain torch; and when it serves in place of kernels."""

from __future__ import annotations

import os

REFERENCE_ENV = "EXL_LOADER_REFERENCE"


def reference_is_forced() -> bool:
    """Whether the environment asks for the reference operations in place of kernels."""
    return os.environ.get(REFERENCE_ENV, "") not in ("", "0")
