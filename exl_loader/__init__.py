"""EXL2 and GPTQ models for text-generation-webui, with a memory reservation to trust."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loader import load as load
    from .memory.reservation import plan as plan

__version__ = "0.1.0"

__all__ = ["load", "plan"]

# Imported when first asked for: importing the package has no side effects and costs nothing.
_HOMES = {"load": "loader", "plan": "memory.reservation"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
