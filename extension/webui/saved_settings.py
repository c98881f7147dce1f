"""Settings that a person saved for our loaders, today or years ago, as the page of today has them.

The web UI puts them into its page and its options as they stand in the file, key by key, and
leaves what a file does not name as the model before had it.
"""

from __future__ import annotations

from typing import Any

from exl_loader.utils.errors import InvalidSettings

from ..panel.panel import DEFAULT_CACHE_TYPE, LoadOptions, plain_cache_type, toggles_for
from .host import LOADERS, say

# Loaders that the web UI once had for what these read; it ends with a KeyError over one of them.
RETIRED = ("AutoGPTQ", "ExLlama", "ExLlama_HF", "GPTQ-for-LLaMa")

_CACHE_OPTIONS = ("cache_type", "cache_8bit", "cache_4bit")


def with_current_values(config: Any) -> Any:
    """Bring what was saved for our loaders, and those before them, up to date, in place.

    The rest stays as it is, loaders that nobody knows included: another plugin may bring one.

    Args:
        config: model pattern -> its settings, as the web UI has read them.
    """
    for pattern, saved in config.items() if isinstance(config, dict) else ():
        if isinstance(saved, dict) and saved.get("loader") in (*LOADERS, *RETIRED):
            try:
                saved.update(_current(saved))
            except InvalidSettings as error:
                # A load with them is refused by name.
                say(f"the settings saved for {pattern} stay as they are: {error}")
            if saved["loader"] in RETIRED:
                # The folder says which loader reads it today.
                del saved["loader"]
    return config


def _current(saved: dict[str, Any]) -> dict[str, Any]:
    """What to set: today's names, numbers that are numbers, toggles and cache type in step."""
    changed: dict[str, Any] = {}
    if "max_seq_len" in saved:
        changed["ctx_size"] = saved.get("ctx_size", saved["max_seq_len"])
    options = LoadOptions.from_values(saved | changed)
    for name in ("ctx_size", "alpha_value", "compress_pos_emb"):
        if name in saved or name in changed:
            changed[name] = getattr(options, name)
    if any(name in saved for name in _CACHE_OPTIONS):
        # Another model's toggle would stay on where this one names its own alone.
        changed |= toggles_for(options.cache_type)._asdict()
        named = str(saved.get("cache_type") or DEFAULT_CACHE_TYPE)
        if plain_cache_type(named) != DEFAULT_CACHE_TYPE:
            changed["cache_type"] = saved["cache_type"]
    return changed
