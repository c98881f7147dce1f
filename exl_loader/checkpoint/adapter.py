"""A low-rank adapter (LoRA) as PEFT saves it: `adapter_config.json`, `adapter_model.safetensors`.

    module(x) += scale * (x @ A.T) @ B.T      A: [rank, in_features], B: [out_features, rank]

scale is alpha / rank, or alpha / sqrt(rank) with rsLoRA. The tensors in the file decide which
modules are adapted. `target_modules`, a list of names or a regular expression, only chose them in
training; a list is held against the tensors. Opening reads the config and the header; values are
read later. PyTorch is not imported.

The rules are PEFT's (0.21): `tuners/lora/model.py`, `utils/other.py` and `utils/save_and_load.py`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..utils.errors import (
    ExlLoaderError,
    InvalidCheckpoint,
    InvalidConfig,
    ModelNotFound,
    UnsupportedFormat,
    shown,
    shown_name,
    shown_names,
)
from ..utils.json_keys import Keys, read_json_object
from ..utils.output import warn_once
from ..utils.untrusted_files import is_there
from . import Checkpoint
from .quantization import Quantization
from .safetensors_header import TensorHeader, read_header

if TYPE_CHECKING:
    import torch

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

MAX_RANK = 1 << 16
_MAX_ALPHA = 1e6
_DTYPES = ("float16", "bfloat16", "float32")
_DOWNLOAD_AGAIN = "Download the adapter again"

_LINEAR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.default)?")
_PREFIX = "base_model.model."
# PEFT saves the frozen weight of an adapted embedding or head as well. It is the model's own.
_BASE_COPY = ".base_layer.weight"

# Settings of config.json that change what an adapter computes -> what they are.
_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias of B",
    "modules_to_save": "modules trained as a whole (modules_to_save)",
    "trainable_token_indices": "trained token embeddings (trainable_token_indices)",
    "target_parameters": "adapted parameters (target_parameters)",
    "layer_replication": "replicated layers (layer_replication)",
    "megatron_config": "Megatron's parallel layers",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow's routing of adapters",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "ensure_weight_tying": "tied adapters (ensure_weight_tying)",
}
# Initialisations of A and B that leave the base model's weights as they are. PiSSA, OLoRA,
# CorDA, LoftQ and LoRA-GA change them, so that their adapters fit no other base weights.
_PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
# Settings that do not change what an adapter computes, or that the tensors show.
_HARMLESS = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout",
    "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
    "velora_config",
})

# Keys of rank_pattern and alpha_pattern are regular expressions from an untrusted file. Those
# that could take long to match are refused: repeated groups, references, many repetitions or
# groups. Bounded names and numbers of modules bound the rest.
_MAX_PATTERN = 500
_MAX_REPEATS = 3
_MAX_CHOICES = 6
_UNSAFE_PATTERN = re.compile(r"\)[*+{]|\\[1-9]|\(\?(?!:)")
_MAX_NAME = 200
_MAX_MODULES = 1 << 16


@dataclass(frozen=True)
class AdaptedModule:
    """The matrices of one module of the base model.

    Args:
        name: the module's name in the base model, such as `model.layers.0.self_attn.q_proj`.
        a: [rank, in_features]; [rank, vocab_size] for an embedding.
        b: [out_features, rank].
        scale: the factor on their product.
        is_embedding: the module is an embedding, so A is looked up by token ids.
    """

    name: str
    a: TensorHeader
    b: TensorHeader
    scale: float
    is_embedding: bool

    @property
    def rank(self) -> int:
        """Rows of A and columns of B."""
        return self.a.shape[0]


def same_folder_key(folder: str | os.PathLike[str]) -> str:
    """Return text that is equal for all spellings of a folder.

    Spellings differ by a slash at the end, a tilde, a path that is relative, or a symbolic link.
    """
    return os.path.normcase(os.path.realpath(os.path.expanduser(folder)))


class Adapter:
    """An adapter folder whose config and header were read. Use it as a context manager.

    Attributes:
        path: the folder.
        base_class: the class of the base model where the config names it, else None.
        modules: the adapted modules, in the order of their names.
    """

    def __init__(self, path: Path, base_class: str | None, modules: tuple[AdaptedModule, ...],
                 tensors: Checkpoint) -> None:
        self.path = path
        self.base_class = base_class
        self.modules = modules
        self._tensors = tensors

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.name or str(self.path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Adapter:
        """Read and check the config and the header of an adapter folder.

        Raises:
            ModelNotFound: there is no such folder, or no adapter in it.
            InvalidConfig: adapter_config.json cannot be read, or a value has another type.
            InvalidCheckpoint: the tensors are damaged, or contradict each other or the config.
            UnsupportedFormat: another method than LoRA, an extension of it, or a pickle file.
        """
        folder = Path(os.path.expanduser(path))
        if not folder.is_dir():
            raise ModelNotFound(
                f"LoRA {folder}", expected="an adapter folder", actual="no such folder",
                remedy=f"Give the folder that has {CONFIG_NAME}",
            )
        config = _read_config(folder)
        weights = folder / WEIGHTS_NAME
        if not is_there(weights):
            raise _without_weights(folder)
        headers, identity = read_header(weights)
        modules = _modules(weights, headers, config)
        tensors = Checkpoint(folder, {header.name: header for header in headers},
                             {weights: identity}, "dense", Quantization())
        return cls(folder, config.base_class, modules, tensors)

    def read_rows(self, header: TensorHeader, first: int, end: int) -> torch.Tensor:
        """Read rows first..end of a tensor; see `Checkpoint.read_rows`. Values are not checked."""
        return self._tensors.read_rows(header.name, first, end)

    def close(self) -> None:
        """Close the file. `read` opens it again."""
        self._tensors.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True)
class _Config:
    """What decides the scale of a module.

    Args:
        targets: the names of target_modules where these are a list, else None.
        ranks, alphas: pattern -> value, in the order of the file.
    """

    rank: int
    alpha: float
    rank_stabilised: bool
    targets: tuple[str, ...] | None
    ranks: dict[re.Pattern[str], float]
    alphas: dict[re.Pattern[str], float]
    base_class: str | None

    def rank_of(self, module: str) -> int:
        """Return the rank that the config gives a module."""
        return int(_first_match(self.ranks, module, self.rank))

    def scale_of(self, module: str) -> float:
        """Return the factor on the product of a module's matrices."""
        rank = self.rank_of(module)
        alpha = _first_match(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def is_target(self, module: str) -> bool:
        """Return whether target_modules, if a list of names, has this module."""
        if self.targets is None:
            return True
        return any(module == name or module.endswith(f".{name}") for name in self.targets)


def _first_match(values: Mapping[re.Pattern[str], float], module: str, default: float) -> float:
    return next((value for key, value in values.items() if key.match(module)), default)


def _read_config(folder: Path) -> _Config:
    path = folder / CONFIG_NAME
    values = read_json_object(path, remedy=_DOWNLOAD_AGAIN)
    keys = Keys(values, str(path), {
        "r": 8, "lora_alpha": 8, "use_rslora": False, "bias": "none", "init_lora_weights": True,
        "rank_pattern": {}, "alpha_pattern": {}, "auto_mapping": None,
    })
    method = keys.text("peft_type")
    if method is None:
        raise keys.fail("peft_type", "LORA")
    if method.upper() != "LORA":
        raise _unsupported(path, f"the method {shown(method)}")
    for name, meaning in _REFUSED.items():
        if keys.raw(name):
            raise _unsupported(path, meaning)
    bias = keys.text("bias")
    if bias not in (None, "none"):
        raise _unsupported(path, f"trained biases (bias={shown(bias)})")
    initialisation = keys.raw("init_lora_weights")
    if initialisation not in _PLAIN_INITIALISATIONS:
        raise _unsupported(
            path, f"init_lora_weights={shown(initialisation)}, which may change the base weights")
    unknown = sorted(name for name, value in values.items()
                     if value and name not in _HARMLESS and name not in _REFUSED)
    if unknown:
        warn_once(f"{path}: these settings are ignored: {shown_names(unknown)}")
    mapping = keys.mapping("auto_mapping") or {}
    return _Config(
        rank=keys.required_integer("r", 1, MAX_RANK),
        alpha=keys.required_number("lora_alpha", -_MAX_ALPHA, _MAX_ALPHA),
        rank_stabilised=bool(keys.boolean("use_rslora")),
        targets=_targets(keys),
        ranks=_patterns(keys, "rank_pattern", path),
        alphas=_patterns(keys, "alpha_pattern", path),
        base_class=Keys(mapping, f"auto_mapping in {path}").text("base_model_class"),
    )


def _targets(keys: Keys) -> tuple[str, ...] | None:
    """Read target_modules; None where it is no list of names.

    A regular expression is not evaluated, because one from an untrusted file may run forever.
    """
    value = keys.raw("target_modules")
    if value is None or isinstance(value, str):
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise keys.fail("target_modules", "a list of names, a regular expression or all-linear")
    return None if value == ["all-linear"] else tuple(value)


def _patterns(keys: Keys, name: str, path: Path) -> dict[re.Pattern[str], float]:
    """Read a mapping of patterns to ranks or alphas. A pattern matches the end of a name."""
    found = {}
    inner = Keys(keys.mapping(name) or {}, f"{name} in {path}")
    for pattern in inner.values:
        if name == "rank_pattern":
            value: float = inner.required_integer(pattern, 1, MAX_RANK)
        else:
            value = inner.required_number(pattern, -_MAX_ALPHA, _MAX_ALPHA)
        if not _is_bounded(pattern):
            raise UnsupportedFormat(
                f"{name} in {path}: {shown(pattern)}",
                expected=f"a module's name, or a regular expression with at most {_MAX_REPEATS} "
                "repetitions, none of a group", remedy="Write out the names of the modules",
            )
        try:
            found[re.compile(rf"(?:.*\.)?(?:{pattern})$")] = value
        except re.error as error:
            raise InvalidConfig(
                f"{name} in {path}: {shown(pattern)}", expected="a regular expression",
                actual=str(error), remedy=_DOWNLOAD_AGAIN,
            ) from None
    return found


def _is_bounded(pattern: str) -> bool:
    """Return whether matching a pattern with a name takes a bounded number of steps."""
    plain = pattern.replace("(?:", "(")
    return (
        len(pattern) <= _MAX_PATTERN
        and not _UNSAFE_PATTERN.search(pattern)
        and sum(map(plain.count, "*+{")) <= _MAX_REPEATS
        and sum(map(plain.count, "*+{?(")) <= _MAX_CHOICES
    )


def _unsupported(path: Path, what: str) -> UnsupportedFormat:
    return UnsupportedFormat(
        f"{path}: {what}", expected="a plain LoRA adapter",
        remedy="Merge the adapter into the model with PEFT, and convert the result",
    )


def _without_weights(folder: Path) -> ExlLoaderError:
    if is_there(folder / PICKLE_NAME):
        return UnsupportedFormat(
            f"{folder / PICKLE_NAME}: a pickle file, which can run code when it is opened: "
            "refused, never opened", expected=WEIGHTS_NAME,
            remedy="Save the adapter again with a newer PEFT",
        )
    return ModelNotFound(f"LoRA {folder}", expected=WEIGHTS_NAME, actual="no such file",
                         remedy=_DOWNLOAD_AGAIN)


def _modules(
    path: Path, headers: list[TensorHeader], config: _Config
) -> tuple[AdaptedModule, ...]:
    """Pair the tensors of a file by module."""
    pairs: dict[tuple[str, bool], dict[str, TensorHeader]] = {}
    copies = []
    for header in headers:
        name = header.name.removeprefix(_PREFIX)
        linear, embedding = _LINEAR.fullmatch(name), _EMBEDDING.fullmatch(name)
        found = linear or embedding
        if found is None:
            if name.endswith(_BASE_COPY):
                copies.append(name.removesuffix(_BASE_COPY))
                continue
            raise _unsupported(path, f"the tensor {shown_name(header.name)}, which is neither "
                               "lora_A nor lora_B")
        matrices = pairs.setdefault((found[1], embedding is not None), {})
        if found[2] in matrices:
            raise _contradiction(path, found[1], f"one lora_{found[2]}", "two")
        matrices[found[2]] = header
    if not pairs:
        raise _contradiction(path, "tensors", "lora_A and lora_B of a module or more", "none")
    if len(pairs) > _MAX_MODULES:
        raise _contradiction(path, "tensors", f"at most {_MAX_MODULES} modules", len(pairs))
    adapted = {name for name, _ in pairs}
    if len(adapted) < len(pairs):
        raise _contradiction(path, "tensors", "each module as linear layer or as embedding",
                             "both for one module")
    unpaired = [name for name in copies if name not in adapted]
    if unpaired:
        raise _unsupported(path, f"whole weights of {shown_names(unpaired)}")
    if copies:
        warn_once(f"{path}: the copies of base weights are ignored: {shown_names(copies)}")
    return tuple(
        _module(path, name, is_embedding, matrices, config)
        for (name, is_embedding), matrices in sorted(pairs.items())
    )


def _module(path: Path, name: str, is_embedding: bool, matrices: dict[str, TensorHeader],
            config: _Config) -> AdaptedModule:
    """Check the matrices of a module against each other and the config."""
    if len(name) > _MAX_NAME:
        raise _contradiction(path, name, f"a name of at most {_MAX_NAME} characters", len(name))
    if len(matrices) < 2:
        raise _contradiction(path, name, "lora_A and lora_B", f"lora_{next(iter(matrices))} alone")
    a, b = matrices["A"], matrices["B"]
    for header in (a, b):
        if header.dtype not in _DTYPES:
            raise UnsupportedFormat(f"{path.name}: {shown_name(header.name)}: dtype",
                                    expected=" or ".join(_DTYPES), actual=header.dtype)
        if len(header.shape) != 2 or 0 in header.shape:
            raise _contradiction(path, header.name, "a matrix", list(header.shape))
    if not config.is_target(name):
        raise _contradiction(path, name, "a module that target_modules names", "another one")
    rank = config.rank_of(name)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise _contradiction(
            path, name, f"rank {rank}, as {CONFIG_NAME} says",
            f"lora_A of shape {list(a.shape)}, lora_B of shape {list(b.shape)}",
        )
    return AdaptedModule(name, a, b, config.scale_of(name), is_embedding)


def _contradiction(path: Path, what: str, expected: str, actual: Any) -> InvalidCheckpoint:
    return InvalidCheckpoint(
        f"{path.name}: {shown_name(what)}", expected=expected, actual=actual,
        remedy=f"{_DOWNLOAD_AGAIN}; {CONFIG_NAME} and {WEIGHTS_NAME} belong together",
    )
