"""Which model folders are for this loader, and which names mean it."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from .host import LOADERS

# `quant_method` of config.json -> whether this engine reads it.
QUANT_METHODS = ("exl2", "gptq")

# Folders with larger headers than any model has are left to others.
_MAX_HEADER_BYTES = 100 << 20

_SPELLINGS = {"exllamav2", "exllama2", "exl2"}


def loader_name(text: str) -> str | None:
    """Return the loader that a user means, None where it is not one of ours.

    >>> loader_name("exllama-v2_hf")
    'ExLlamav2_HF'
    """
    plain = "".join(c for c in text.lower() if c not in " -_.")
    native, hf = LOADERS
    if plain in _SPELLINGS:
        return native
    return hf if plain.endswith("hf") and plain[:-2] in _SPELLINGS else None


def is_quantised(folder: Path) -> bool:
    """Whether a folder holds EXL2 or GPTQ weights.

    `config.json` says so in what was quantised since 2023; older EXL2 folders are known by
    their tensors, older GPTQ ones by `quantize_config.json`. Reads headers at most.
    """
    if not folder.is_dir():
        return False
    config = _read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        return str(quantization.get("quant_method", "")).lower() in QUANT_METHODS
    if "bits" in _read_json(folder / "quantize_config.json"):
        return True
    first = next(iter(sorted(folder.glob("*.safetensors"))), None)
    return first is not None and _has_exl2_tensors(first)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _has_exl2_tensors(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= _MAX_HEADER_BYTES else {}
    except (OSError, ValueError, struct.error):
        return False
    return any(name.endswith(".q_weight") for name in header)
