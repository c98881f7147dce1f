"""Which model folders are for this loader, and which names mean it."""

from __future__ import annotations

from exl_loader.checkpoint import is_quantised

from .host import LOADERS

__all__ = ["is_quantised", "loader_name"]

_SPELLINGS = {"exllamav2", "exllama2", "exl2"}


def loader_name(text: object) -> str | None:
    """Return the loader that a user means, None where it is not one of ours.

    >>> loader_name("exllama-v2_hf")
    'ExLlamav2_HF'
    """
    if not isinstance(text, str):
        return None
    plain = "".join(c for c in text.lower() if c not in " -_.")
    native, hf = LOADERS
    if plain in _SPELLINGS:
        return native
    return hf if plain.endswith("hf") and plain[:-2] in _SPELLINGS else None
