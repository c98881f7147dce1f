"""Which model folders are for this loader, and which names mean it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exl_loader.checkpoint.safetensors_header import read_header
from exl_loader.errors import ExlLoaderError
from exl_loader.json_keys import read_json_object_if_there

from .host import LOADERS

# `quant_method` of config.json -> whether this engine reads it.
QUANT_METHODS = ("exl2", "gptq")

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
        return read_json_object_if_there(path)
    except ExlLoaderError:
        return {}


def _has_exl2_tensors(path: Path) -> bool:
    try:
        tensors, _ = read_header(path)
    except ExlLoaderError:
        return False
    return any(tensor.name.endswith(".q_weight") for tensor in tensors)
