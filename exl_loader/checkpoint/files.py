"""Which files of a model folder hold its weights, and in which format they are."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import (
    InvalidCheckpoint,
    InvalidConfig,
    ModelNotFound,
    UnsupportedFormat,
    shown,
)
from ..json_keys import read_json_object_if_there
from ..untrusted_files import INDEX_BYTES

INDEX_NAME = "model.safetensors.index.json"
SERIES = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What AutoGPTQ and GPTQModel call the layouts that formats/gptq.py reads.
GPTQ_LAYOUTS = ("gptq", "gptq_v2")


def _refuse(model_dir: Path, names: Iterable[str]) -> None:
    """Say why there is nothing to load in a folder without safetensors files."""
    for name in names:
        suffix = Path(name).suffix.lower()
        if suffix in PICKLE_SUFFIXES:
            raise UnsupportedFormat(
                f"{name}: a pickle file, which can run code when it is opened: refused, never "
                "opened",
                expected="*.safetensors",
                remedy="Convert the weights to safetensors",
            )
        if suffix == ".gguf":
            raise UnsupportedFormat(
                name, expected="*.safetensors", actual="GGUF", remedy="Use llama.cpp for this file"
            )
    raise ModelNotFound(
        str(model_dir),
        expected="*.safetensors with the model's weights",
        actual="none",
        remedy="Check the folder, or download the model again",
    )


def index_files(model_dir: Path) -> list[str]:
    """Names of the files that `model.safetensors.index.json` lists; empty without an index.

    Raises:
        InvalidCheckpoint: the index is no JSON object, or names a file outside the folder.
    """
    index = read_json_object_if_there(
        model_dir / INDEX_NAME, limit=INDEX_BYTES, error=InvalidCheckpoint
    )
    weight_map = index.get("weight_map", {})
    names = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InvalidCheckpoint(
                f"{INDEX_NAME}: weight_map",
                expected="names of files in this folder",
                actual=shown(name),
                remedy="Download the file again",
            )
    return sorted(set(names))


def weight_files(model_dir: Path) -> list[Path]:
    """Choose the safetensors files that hold the weights.

    `output*.safetensors`, what EXL2's converter writes, comes first: the folder may hold the
    source model's files beside it. Otherwise an index decides if all its files are there;
    otherwise every `*.safetensors` file counts.

    Raises:
        ModelNotFound: no folder, or no weights in it.
        UnsupportedFormat: the weights are pickle files or GGUF.
        InvalidCheckpoint: a numbered series of files has gaps.
    """
    if not os.path.isdir(model_dir):
        raise ModelNotFound(
            str(model_dir),
            expected="a model folder",
            actual="a file" if os.path.exists(model_dir) else "nothing",
            remedy="Check the path",
        )
    names = _names(model_dir)
    found = [name for name in names if name.endswith(".safetensors")]
    outputs = [n for n in found if n == "output.safetensors" or n.startswith("output-")]
    if outputs:
        chosen = outputs
    else:
        try:
            listed = index_files(model_dir)
        except InvalidCheckpoint:
            listed = []  # EXL2 folders keep stale ones; `check_index` judges once it matters
        chosen = listed if listed and set(listed) <= set(found) else found
        if not found:
            missing_shards(listed, found)
    if not chosen:
        _refuse(model_dir, names)
    _check_series(chosen)
    return [model_dir / name for name in chosen]


def _names(model_dir: Path) -> list[str]:
    try:
        return sorted(os.listdir(model_dir))
    except OSError as error:
        raise ModelNotFound(
            str(model_dir), expected="a folder that can be read", actual=error.strerror,
            remedy="Check who may read it",
        ) from None


def missing_shards(listed: Iterable[str], found: Iterable[str]) -> None:
    """Raise InvalidCheckpoint where the index lists files that are not there."""
    missing = sorted(set(listed) - set(found))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InvalidCheckpoint(
            f"{missing[0]}{more}: listed in {INDEX_NAME}",
            expected="the file",
            actual="nothing",
            remedy="Download the missing files",
        )


def check_index(model_dir: Path) -> None:
    """Check that every file of the index is there; not for EXL2, which has none of its own."""
    missing_shards(index_files(model_dir), _names(model_dir))


def _check_series(names: list[str]) -> None:
    """Check that every member of `NAME-00001-of-0000N.safetensors` is there."""
    present = set(names)
    matches = (SERIES.fullmatch(name) for name in names)
    series = {(match[1], len(match[2]), match[3]) for match in matches if match}
    for stem, digits, total in sorted(series):
        for number in range(1, int(total) + 1):
            member = f"{stem}-{number:0{digits}}-of-{total}.safetensors"
            if member not in present:
                raise InvalidCheckpoint(
                    f"{member}: one of a series of {int(total)} files",
                    expected="the file",
                    actual="nothing",
                    remedy="Download the missing file",
                )


def read_quantization(model_dir: Path) -> dict[str, Any]:
    """Merge `quantization_config` of config.json over `quantize_config.json`.

    Returns:
        the merged settings, `quant_method` in lower case; empty where there are none. A
        `quantize_config.json` without a method is AutoGPTQ's.

    Raises:
        InvalidConfig: either file is no JSON object, or a setting has the wrong type.
    """
    merged = read_json_object_if_there(model_dir / "quantize_config.json")
    if merged:
        merged.setdefault("quant_method", "gptq")
    own = read_json_object_if_there(model_dir / "config.json").get("quantization_config")
    if own is not None and not isinstance(own, dict):
        raise InvalidConfig(
            "config.json: quantization_config", expected="an object", actual=type(own).__name__
        )
    merged.update(own or {})
    if merged.get("quant_method") is not None:
        merged["quant_method"] = str(merged["quant_method"]).lower()
    return merged


def detect_format(names: Iterable[str], quantization: dict[str, Any]) -> str:
    """Tell `exl2`, `gptq` or `dense` from tensor names and the quantization settings.

    EXL2's tensor names occur nowhere else, so they win over whatever config.json says (files
    from 2023 say nothing). Every other method that is declared is taken at its word.

    Raises:
        UnsupportedFormat: another quantisation method, named.
        InvalidCheckpoint: the declared method's tensors are missing.
    """
    endings = {name.rsplit(".", 1)[-1] for name in names}
    if "q_weight" in endings:
        return "exl2"
    method = quantization.get("quant_method")
    if method is None:
        method = "exl3" if "trellis" in endings else "gptq" if "qweight" in endings else "dense"
    if method == "dense":
        return "dense"
    if method not in ("exl2", "gptq"):
        raise UnsupportedFormat(
            f"quant_method {method}",
            expected="exl2, gptq or unquantised weights",
            remedy="Use a version of the model in one of these formats",
        )
    tensor = "q_weight" if method == "exl2" else "qweight"
    if tensor not in endings:
        raise InvalidCheckpoint(
            f"checkpoint with quant_method {method}",
            expected=f"tensors named *.{tensor}",
            actual="none",
            remedy="Check that the weight files belong to this config.json",
        )
    _check_gptq_layout(quantization)
    return str(method)


def _check_gptq_layout(quantization: dict[str, Any]) -> None:
    layout = quantization.get("checkpoint_format") or "gptq"
    if quantization.get("is_marlin_format"):
        layout = "marlin"
    if layout not in GPTQ_LAYOUTS:
        raise UnsupportedFormat(
            "quantization_config: checkpoint_format",
            expected=" or ".join(GPTQ_LAYOUTS),
            actual=layout,
            remedy="Use a version of the model in one of these formats",
        )
