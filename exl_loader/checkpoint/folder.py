"""Recognise a model folder: which files hold its weights, and in which format they are.

Recognition is defined here only: `Checkpoint.open` uses it for the engine, and `is_quantised` for
the web UI's choice of a loader. Headers are read, weights are not, and PyTorch is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.errors import (
    ExlLoaderError,
    InvalidCheckpoint,
    UnsupportedFormat,
    shown_name,
    shown_names,
)
from ..utils.json_keys import read_json_object_if_there
from ..utils.output import warn_once
from .architectures import ARCHITECTURES, Architecture
from .model_class import architecture_of
from .quantization import Quantization
from .safetensors_header import FileIdentity, TensorHeader, read_header
from .weight_files import (
    all_files,
    candidates,
    check_finished,
    check_index,
    check_series,
    converter_output,
    weight_names,
)

if TYPE_CHECKING:
    from .config import ModelConfig

QUANTISED_FORMATS = ("exl2", "gptq")
# Names that begin with `model.` in a causal language model, and lack this prefix where the file was
# saved from the model without its head.
_BODY = ("layers.", "embed_tokens.", "norm.")
# How names of the language part begin in a model that reads images too -> in one of text.
_TEXT_PARTS = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
# An architecture for each way to name embedding, layers and final norm.
_BODIES = tuple(
    {(a.renames, a.embedding, a.layers, a.final_norm): a for a in ARCHITECTURES.values()}.values()
)
# How names begin that one of them renames.
_OTHER_STARTS = tuple(
    {text for a in _BODIES for text, _ in a.renames if not text.startswith(".")}
)

Headers = dict[str, TensorHeader]


@dataclass(frozen=True)
class Folder:
    """A model folder whose headers were read.

    Args:
        headers: tensor name -> TensorHeader. The names are those of the model's architecture;
            a header has the name in the file.
        identities: the files that hold the weights, in order.
        format: `exl2`, `gptq` or `dense`.
        quantization: the settings of this format; empty without settings.
    """

    headers: Headers
    identities: dict[Path, FileIdentity]
    format: str
    quantization: Quantization


def read_folder(model_dir: Path, config: ModelConfig | None = None) -> Folder:
    """Read the headers of a folder and recognise its format.

    Args:
        model_dir: the folder.
        config: the folder's configuration if it has been read already.

    Raises:
        ModelNotFound: there is no folder, or no weights in it.
        InvalidCheckpoint: the folder's download has not ended, a file is missing or truncated, a
            header contradicts itself or the file, a tensor is in two files, or the tensors of the
            declared method are missing.
        InvalidConfig: config.json or quantize_config.json is not a JSON object, or the class
            in config.json is no name.
        UnsupportedFormat: pickle files, GGUF, another quantization method, or settings that this
            engine does not implement.
    """
    check_finished(model_dir)
    files = _Files(model_dir, None if config is None else config.num_hidden_layers)
    declared = None if config is None else config.quantization
    quantization = Quantization.from_dir(model_dir, declared)
    chosen, whole = files.choose(quantization)
    headers, identities = files.read(chosen)
    format = format_of(headers, quantization)
    if format == "exl2" and quantization.method not in (None, "exl2"):
        warn_once(
            f"{quantization.where} declares {shown_name(quantization.method)}, but the weights "
            "are EXL2: the settings are another model's and are ignored"
        )
        quantization = Quantization()
    if format != "dense":
        quantization.check()
    if format != "exl2" and not whole:
        check_index(model_dir)
    unused = sorted(set(files.found) - set(chosen))
    if unused:
        warn_once(
            f"{model_dir}: the weights are read from {shown_names(chosen)}; ignored: "
            f"{shown_names(unused)}"
        )
    if config is None:
        architecture = architecture_of(model_dir)
    else:
        architecture = ARCHITECTURES[config.architecture]
    return Folder(usual_names(headers, architecture), identities, format, quantization)


def is_quantised(model_dir: str | os.PathLike[str]) -> bool:
    """Return whether a folder holds EXL2 or GPTQ weights; never raise.

    Damaged folders and folders whose settings this engine refuses count as well, because loading
    them raises an error that names the fault. Where no weights can be read, the declared
    method decides.
    """
    folder = Path(model_dir)
    try:
        quantization = Quantization.from_dir(folder)
    except ExlLoaderError:
        quantization = Quantization()
    try:
        files = _Files(folder)
        headers, _ = files.read(files.choose(quantization)[0])
    except ExlLoaderError:
        return os.path.isdir(folder) and quantization.is_supported
    try:
        return format_of(headers, quantization) in QUANTISED_FORMATS
    except ExlLoaderError:
        return False


class _Files:
    """The safetensors files of a folder. Each header is read only once."""

    def __init__(self, model_dir: Path, num_layers: int | None = None) -> None:
        self.model_dir = model_dir
        self._known_num_layers = num_layers
        self.found = weight_names(model_dir)
        self._read: dict[str, tuple[list[TensorHeader], FileIdentity]] = {}

    def choose(self, quantization: Quantization) -> tuple[list[str], bool]:
        """Choose the files that hold the weights.

        Returns:
            Their names, and True if they are known to hold a whole model.
        """
        outputs = converter_output(self.found)
        if outputs:
            check_series(outputs)
            return outputs, False
        num_layers = self._num_layers()
        whole = [
            files for files in candidates(self.model_dir, self.found)
            if self._is_whole(files, num_layers)
        ]
        # Quantised weights may be beside the model that they were made from.
        quantised = [files for files in whole if self._has_quantised(files)]
        if quantised and quantization.is_supported:
            whole = quantised
        return (whole[0], True) if whole else (all_files(self.model_dir, self.found), False)

    def read(self, names: Iterable[str]) -> tuple[Headers, dict[Path, FileIdentity]]:
        """Read the headers of several files together.

        Raises:
            InvalidCheckpoint: a file cannot be read, or a tensor is in two of them.
        """
        headers: Headers = {}
        identities = {}
        for name in names:
            path = self.model_dir / name
            if name not in self._read:
                self._read[name] = read_header(path)
            tensors, identities[path] = self._read[name]
            for header in tensors:
                other = headers.setdefault(header.name, header)
                if other is not header:
                    raise InvalidCheckpoint(
                        f"{header.name}: is in {other.path.name} and in {path.name}",
                        expected="one file",
                        remedy="Remove the file that does not belong to this model",
                    )
        return headers, identities

    def _is_whole(self, names: list[str], num_layers: int | None) -> bool:
        """Return whether files hold embedding, final norm and every layer of a model."""
        try:
            stored = self.read(names)[0]
        except ExlLoaderError:
            return False
        plain = with_body_prefix(stored)
        # Looked up once for all entries, because there may be thousands of tensors.
        has_other_names = any(name.startswith(_OTHER_STARTS) for name in stored)
        return any(
            _is_body(_renamed(stored, entry) if entry.renames else plain, entry, num_layers)
            for entry in _BODIES if has_other_names or not entry.renames
        )

    def _has_quantised(self, names: list[str]) -> bool:
        return not {"qweight", "q_weight"}.isdisjoint(_endings(self.read(names)[0]))

    def _num_layers(self) -> int | None:
        if self._known_num_layers is not None:
            return self._known_num_layers
        try:
            value = read_json_object_if_there(self.model_dir / "config.json")
        except ExlLoaderError:
            return None
        number = value.get("num_hidden_layers")
        # config.py refuses a damaged number by name.
        return number if type(number) is int and 0 < number < 1 << 16 else None


def _renamed(stored: Headers, architecture: Architecture) -> Headers:
    """Rename tensors as `usual_names`; none if two would have the same name."""
    try:
        return usual_names(stored, architecture)
    except InvalidCheckpoint:
        return {}


def _is_body(names: Headers, architecture: Architecture, num_layers: int | None) -> bool:
    """Return whether tensors are embedding, final norm and every layer of an architecture."""
    ends = {f"{architecture.embedding}.weight", f"{architecture.final_norm}.weight"}
    layers = f"{architecture.layers}."
    return ends <= names.keys() and _has_every_layer(names, layers, num_layers)


def _has_every_layer(names: Iterable[str], prefix: str, num_layers: int | None) -> bool:
    """Tell whether layers 0, 1, ... are named, without a gap or up to a known number."""
    numbers = {
        name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)
    }
    wanted = len(numbers) if num_layers is None else num_layers
    return bool(numbers) and numbers == {str(number) for number in range(wanted)}


def _endings(names: Iterable[str]) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in names}


def usual_names(headers: Mapping[str, TensorHeader], architecture: Architecture | None) -> Headers:
    """Rename tensors to the names that the fields of an architecture have.

    Args:
        headers: by the names in the files.
        architecture: None renames only what lacks the prefix `model.`.

    Raises:
        InvalidCheckpoint: two tensors would have the same name.
    """
    if architecture is not None and architecture.renames:
        renamed: Headers = {}
        for name, header in headers.items():
            other = renamed.setdefault(architecture.renamed(name), header)
            if other is not header:
                raise InvalidCheckpoint(
                    f"{name}: the same tensor of {architecture.name} as {other.name}",
                    expected="one of them",
                    remedy="Remove the file that does not belong to this model",
                )
        headers = renamed
    return with_body_prefix(headers)


def with_body_prefix(headers: Mapping[str, TensorHeader]) -> Headers:
    """Rename tensors to the names in a causal language model.

    Weights that were saved from a model without its head (`LlamaModel`) lack the prefix `model.`
    of the layers, the embedding and the final norm. In a model that reads images too, the
    language part has a prefix of its own.
    """
    prefixes = tuple(_TEXT_PARTS)
    if any(name.startswith(prefixes) for name in headers):
        headers = {_text_name(name): header for name, header in headers.items()}
    if any(name.startswith("model.layers.") for name in headers):
        return dict(headers)
    return {
        f"model.{name}" if name.startswith(_BODY) else name: header
        for name, header in headers.items()
    }


def _text_name(name: str) -> str:
    for prefix, text_prefix in _TEXT_PARTS.items():
        if name.startswith(prefix):
            return text_prefix + name.removeprefix(prefix)
    return name


def format_of(names: Iterable[str], quantization: Quantization) -> str:
    """Return `exl2`, `gptq` or `dense`, by tensor names and the quantization settings.

    No other format has EXL2's tensor names, so they win over config.json (whose files of 2023
    declare nothing). For the other formats the declared method decides.

    Raises:
        UnsupportedFormat: another quantization method, named.
        InvalidCheckpoint: the declared method's tensors are missing.
    """
    endings = _endings(names)
    if "q_weight" in endings:
        return "exl2"
    method = quantization.method
    if method == "mxfp4" or "gate_up_proj_blocks" in endings:
        raise UnsupportedFormat(
            "experts in MXFP4 (quant_method mxfp4: tensors *_blocks and *_scales)",
            expected="exl2, gptq or unquantised weights",
            remedy="Use a bfloat16, EXL2 or GPTQ version of the model, or save a bfloat16 one with "
            "transformers: Mxfp4Config(dequantize=True)",
        )
    if method is None and "trellis" not in endings and "weight_packed" not in endings:
        return "gptq" if "qweight" in endings else "dense"
    if not quantization.is_supported:
        undeclared = "exl3" if "trellis" in endings else "compressed-tensors"
        declared = quantization.values.get("quant_method", undeclared)
        raise UnsupportedFormat(
            f"quant_method {shown_name(str(declared))}",
            expected="exl2, gptq, auto-round or unquantised weights",
            remedy="Use a version of the model in one of these formats",
        )
    tensor = "q_weight" if method == "exl2" else "qweight"
    if tensor not in endings:
        raise InvalidCheckpoint(
            f"checkpoint with quant_method {quantization.values.get('quant_method')}",
            expected=f"tensors named *.{tensor}",
            actual="none",
            remedy="Check that the weight files belong to this config.json",
        )
    return "gptq" if tensor == "qweight" else "exl2"
