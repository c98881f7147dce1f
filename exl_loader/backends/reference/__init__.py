"""The definition of every operation in plain PyTorch. It also replaces kernels on request."""

from __future__ import annotations

import os

REFERENCE_ENV = "EXL_LOADER_REFERENCE"


def reference_is_forced() -> bool:
    """Return whether the environment requests the reference operations instead of kernels."""
    return os.environ.get(REFERENCE_ENV, "") not in ("", "0")
