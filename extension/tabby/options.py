"""What a configuration of TabbyAPI asks of the engine: its options, in the engine's names.

The values come from config.yml, from a request to load a model, or from tabby_config.yml in the
model folder; TabbyAPI has merged them. Of the options that the engine cannot honour, those that
would change what a model writes are refused, and the others are reported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exl_loader import InvalidSettings, LoadOptions

# The bits of a key/value cache's elements, as TabbyAPI writes them -> the engine's name.
_CACHE_BITS = {"8": "q8", "6": "q6", "4": "q4", "3": "q3"}
_CACHE_NAMES = {"FP16": "fp16", "FP8": "q8"} | {f"Q{bits}": f"q{bits}" for bits in _CACHE_BITS}
_KEYS_AND_VALUES = re.compile(r"([2-8])\s*,\s*([2-8])")

# Options of the engine that TabbyAPI does not know. They may stand in a model folder's
# tabby_config.yml, which TabbyAPI passes on without checking it.
ENGINE_OPTIONS = (
    "device", "memory_limit", "embedding_device", "cache_window", "as_architecture",
    "max_lora_bytes", "machines",
)

# Options that do nothing here, with the values at which they ask for nothing.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "tensor_parallel": (False,),
    "autosplit_reserve": ([96], [96.0], []),
    "cpu_moe_offload_layers": (0,),
    "vision": (False,),
    "vision_offload": (False,),
    "warmup": (False,),
}
_INSTEAD = {
    "tensor_parallel": "layers are split over the cards",
    "autosplit_reserve": "the reservation is exact; gpu_split limits a card",
    "cpu_moe_offload_layers": "all layers are on the cards",
    "vision": "this backend reads text alone",
}

# Options of a draft model that do nothing here, likewise.
_DRAFT_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "draft_rope_scale": (1, 1.0),
    "draft_rope_alpha": (1, 1.0, "auto"),
    "draft_gpu_split": ([],),
}

# Tokens that prompt lookup guesses at a time where draft_num_tokens is not set.
LOOKUP_TOKENS = 4

# The shortest match that the engine's prompt lookup accepts.
_LOOKUP_MATCH_MIN = 2

_DRAFT_MODES = ("model", "ngram", "disabled")


@dataclass(frozen=True)
class Choice:
    """The options of a load.

    Args:
        load: keywords of `exl_loader.load`.
        is_length_chosen: False where the largest context that fits is taken.
        lookup_tokens: tokens that prompt lookup guesses at a time; 0 for no prompt lookup.
        notices: what is to be reported, a line each.
    """

    load: dict[str, Any]
    is_length_chosen: bool = False
    lookup_tokens: int = 0
    notices: tuple[str, ...] = ()

    def for_plan(self) -> dict[str, Any]:
        """Return the keywords of `exl_loader.plan`."""
        return LoadOptions(**self.load).for_plan()


@dataclass
class _Reader:
    """Reads the values one group after the other."""

    model_dir: Path
    values: Mapping[str, Any]
    load: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def value(self, name: str, default: Any = None) -> Any:
        found = self.values.get(name)
        return default if found is None else found


def choose(model_dir: Path, values: Mapping[str, Any]) -> Choice:
    """Read a configuration.

    Args:
        model_dir: the model's folder.
        values: name -> value; unknown names are TabbyAPI's own and are left out.

    Raises:
        InvalidSettings: an option cannot be honoured, or makes no sense.
        ModelNotFound, InvalidConfig, UnsupportedArchitecture: of the folder's config.json, where
            the model's own length decides an option.
    """
    reader = _Reader(model_dir, values)
    reader.load["cache_type"] = cache_type("cache_mode", reader.value("cache_mode", "FP16"))
    _read_devices(reader)
    _read_batches(reader)
    reader.load |= {name: values[name] for name in ENGINE_OPTIONS if values.get(name) is not None}
    _read_rope(reader)
    _read_lengths(reader)
    lookup_tokens = _read_draft(reader)
    _report(reader, values, _WITHOUT_EFFECT)
    return Choice(
        reader.load, reader.load["ctx_size"] != "auto", lookup_tokens, tuple(reader.notices)
    )


def cache_type(name: str, mode: Any) -> str:
    """Return the engine's name of a cache mode.

    Args:
        name: of the option, for the error.
        mode: `FP16`, `Q8`, `Q6`, `Q4`, `Q3`, or bits of keys and values such as `8,4`.

    Raises:
        InvalidSettings: the engine has no such cache.
    """
    written = str(mode).strip()
    if written.upper() in _CACHE_NAMES:
        return _CACHE_NAMES[written.upper()]
    pair = _KEYS_AND_VALUES.fullmatch(written)
    if pair is not None and all(bits in _CACHE_BITS for bits in pair.groups()):
        keys, cached_values = (_CACHE_BITS[bits] for bits in pair.groups())
        return keys if keys == cached_values else f"{keys}_{cached_values}"
    raise InvalidSettings(
        name, expected="FP16, Q8, Q6, Q4, Q3, or the bits of keys and values out of 8, 6, 4 and 3, "
        "such as 8,4", actual=written,
    )


def _read_lengths(reader: _Reader) -> None:
    """Read the tokens of one request, and those of the cache that all requests share."""
    asked, cached = reader.value("max_seq_len"), reader.value("cache_size")
    if cached is None:
        reader.load["ctx_size"] = "auto" if asked is None else asked
        return
    if asked is not None and asked > cached:
        reader.notices.append(
            f"max_seq_len: {asked:,} tokens do not fit into a cache_size of {cached:,}; a request "
            f"can have {cached:,} tokens")
    reader.load["ctx_size"] = min(_own_length(reader) if asked is None else asked, cached)
    reader.load["cache_size"] = cached


def _read_devices(reader: _Reader) -> None:
    split = reader.value("gpu_split", [])
    if isinstance(split, str):
        # Of several machines, as a model folder's tabby_config.yml may have it.
        reader.load["gpu_split"] = split
    elif split:
        reader.load["gpu_split"] = ",".join(str(gib) for gib in split)


def _read_batches(reader: _Reader) -> None:
    for name in ("chunk_size", "max_batch_size"):
        if reader.value(name) is not None:
            reader.load[name] = reader.value(name)


def _read_rope(reader: _Reader) -> None:
    """Read the RoPE options. `auto`, the default, stretches a model to a longer max_seq_len."""
    scale, alpha = reader.value("rope_scale", 1.0), reader.value("rope_alpha", "auto")
    if alpha == "auto":
        length = reader.value("max_seq_len")
        alpha = 1.0
        if length is not None:
            own = LoadOptions(compress_pos_emb=scale, **_architecture(reader)).stretched_length(
                reader.model_dir)
            alpha = automatic_alpha(own, length)
        if alpha != 1.0:
            reader.notices.append(
                f"rope_alpha: {alpha:.2f}, because max_seq_len ({length:,}) is beyond the model's "
                f"own length of {own:,} tokens")
    reader.load |= {"compress_pos_emb": scale, "alpha_value": alpha}


def automatic_alpha(own_length: int, length: int) -> float:
    """Return the NTK factor for a length, by the formula that TabbyAPI documents for `auto`."""
    ratio = length / own_length
    # Just above a ratio of 1 the formula has less than 1, which would shorten the model's length.
    return 1.0 if ratio <= 1 else max(1.0, 0.28833 * ratio**2 + 0.80541 * ratio - 0.13436)


def _own_length(reader: _Reader) -> int:
    rope = {name: reader.load[name] for name in ("compress_pos_emb", "alpha_value")}
    return LoadOptions(**rope, **_architecture(reader)).stretched_length(reader.model_dir)


def _architecture(reader: _Reader) -> dict[str, Any]:
    chosen = reader.value("as_architecture")
    return {} if chosen is None else {"as_architecture": chosen}


def _read_draft(reader: _Reader) -> int:
    """Read the options of a draft; return the number of tokens for prompt lookup."""
    draft = reader.value("draft_model", {})
    mode = draft.get("draft_mode") or "model"
    if mode not in _DRAFT_MODES:
        raise InvalidSettings(
            "draft_mode", expected=f"one of {', '.join(_DRAFT_MODES)}", actual=repr(mode),
            remedy="Set it to ngram, which needs no draft model",
        )
    count = draft.get("draft_num_tokens")
    if mode == "ngram":
        shortest = draft.get("ngram_match_min")
        if shortest not in (None, _LOOKUP_MATCH_MIN):
            reader.notices.append(
                f"ngram_match_min: {shortest} does nothing here; matches of "
                f"{_LOOKUP_MATCH_MIN} to 4 tokens are used, the longest first")
        return LOOKUP_TOKENS if count is None else count
    name = draft.get("draft_model_name")
    if mode == "disabled" or not name:
        return 0
    reader.load["model_draft"] = str(Path(draft.get("draft_model_dir") or "models") / name)
    if count is not None:
        reader.load["draft_max"] = count
    kept = draft.get("draft_cache_mode")
    if kept is not None and cache_type("draft_cache_mode", kept) != reader.load["cache_type"]:
        reader.notices.append(
            f"draft_cache_mode: {kept} does nothing here; the draft model's cache is of the same "
            "type as the model's (cache_mode)")
    _report(reader, draft, _DRAFT_WITHOUT_EFFECT)
    return 0


def _report(
    reader: _Reader, values: Mapping[str, Any], options: Mapping[str, Sequence[Any]]
) -> None:
    """Report options that are set and do nothing here."""
    for name, neutral in options.items():
        value = values.get(name)
        if value is not None and value not in neutral:
            instead = _INSTEAD.get(name)
            line = f"{name}: {value} does nothing here"
            reader.notices.append(f"{line}; {instead}" if instead else line)
