"""Read a folder's quantization config and check every key of it.

The keys of a quantization config are an allow-list. A key is one of four kinds:

    implemented   read here, or known from the shapes of the tensors (bits, group size)
    harmless      describes how the weights were found, not how they are multiplied; ignored
    arithmetic    changes the forward pass and is not implemented; refused unless neutral
    unknown       a warning names it

Sources of the keys: GPTQModel 7 (`quantization/config.py`), AutoGPTQ 0.7
(`quantization/config.py`), auto-round 0.16 (`schemes.py`, `export/`), transformers 5
(`utils/quantization_config.py`), exllamav2 0.3 (`conversion/compile.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..utils.errors import InvalidConfig, UnsupportedFormat, shown
from ..utils.json_keys import read_json_object_if_there
from ..utils.output import warn_once

GPTQ_METHODS = frozenset({"gptq", "gptqmodel", "auto_gptq", "autogptq"})
AUTO_ROUND_METHODS = frozenset({"auto_round", "autoround", "intel/auto_round"})

# Layouts of the zero points; see formats/gptq_zeros.py.
V1, V2 = "gptq", "gptq_v2"
_LAYOUTS = {"gptq": V1, "gptq_v1": V1, "gptqv1": V1, "gptq_v2": V2, "gptqv2": V2}
# auto-round's packings, without their prefix `auto_round:`. auto-round's own packing and AWQ's
# store zero points unchanged; AutoGPTQ's subtracts 1.
_AWQ_PACKINGS = ("awq", "auto_awq")
_PACKINGS = {
    "auto": V1, "gptq": V1, "auto_gptq": V1, "autogptq": V1,
    "auto_round": V2, "gptqmodel": V2, "exllamav2": V2, "triton": V2, "tritonv2": V2,
    "torch": V2, **dict.fromkeys(_AWQ_PACKINGS, V2),
}  # fmt: skip

_IMPLEMENTED = frozenset("""
    quant_method method bits wbits w_bit group_size q_group_size groupsize sym zero_point desc_act
    format checkpoint_format is_marlin_format packing_format dynamic extra_config lm_head
""".split())
_HARMLESS = frozenset("""
    version head_bits calibration
    damp_percent damp_auto_increment static_groups true_sequential model_name_or_path
    model_file_base_name quantizer meta uri mse tokenizer dataset block_name_to_quantize
    module_name_preceding_first_block modules_in_block_to_quantize modules_to_not_convert
    inside_layer_modules batch_size pad_token_id use_exllama disable_exllama exllama_config
    max_input_length use_cuda_fp16 model_seqlen cache_block_outputs act_group_aware hyb_act
    backend parallel_packing offload_to_disk offload_to_disk_path pack_impl gc_mode fallback
    failsafe failsafe_with_rtn gptaq gptaq_alpha gptaq_memory_device foem vram_strategy moe
    smooth hessian calibration_data_device auto_forward_data_parallel v2 v2_alpha
    v2_memory_device wait_for_submodule_finalizers
    autoround_version provider block_name block_list to_quant_block_names quant_block_list
    quant_lm_head scale_dtype scale_data_type iters lr minmax_lr nsamples n_samples n_blocks
    seqlen amp enable_minmax_tuning enable_quanted_input enable_norm_bias_tuning
    low_gpu_mem_usage low_cpu_mem_usage not_use_best_mse dynamic_max_gap train_bs
    gradient_accumulate_steps enable_alg_ext enable_torch_compile disable_opt_rtn supported_types
    quant_nontext_module use_quant_input regex_config nblocks sampler optimizer seed
    act_sym act_dynamic act_group_size act_data_type to_quant_block ignore_layers
""".split())


def _is_none(value: Any) -> bool:
    """Return whether a value switches a feature off."""
    return value in (None, False, "", "none", "None", 0) or value in ({}, [])


def _is_float_activation(value: Any) -> bool:
    number = whole_number(value)
    return value is None or (number is not None and number >= 16)


# Key -> a test whether its value leaves the arithmetic unchanged.
_ARITHMETIC: Mapping[str, Callable[[Any], bool]] = {
    "act_bits": _is_float_activation,
    "a_bits": _is_float_activation,
    "pack_dtype": lambda value: value in (None, "int32", "torch.int32"),
    "data_type": lambda value: value in (None, "int", "int_sym", "int_asym"),
    **dict.fromkeys(
        """
        rotation rotation_config adapter lora loras eora transform_config spinquant
        hadamard hadamard_transform online_hadamard svdquant svd_rank
        super_bits super_group_size kv_cache_scheme kv_cache_quant_algo kv_bits static_kv_dtype
        static_attention_dtype activation_scheme input_activations output_activations
        input_scale smoothquant weight_block_size
        """.split(),
        _is_none,
    ),
}


@dataclass(frozen=True)
class Quantization:
    """A folder's quantization settings.

    Args:
        method: `quant_method` in lower case with underscores, such as `gptq`, `auto_round`,
            `exl2`, `bitsandbytes`; None where none is declared.
        values: the merged, unchecked settings, with keys in lower case.
        where: the name of the settings in messages.
    """

    method: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    where: str = "the quantization config"

    @classmethod
    def from_dir(cls, folder: Path, declared: dict[str, Any] | None = None) -> Quantization:
        """Merge `quantization_config` of config.json over the separate files of settings.

        These are `quantize_config.json`, which is AutoGPTQ's if it names no method, and
        auto-round's `quantization_config.json`.

        Args:
            folder: the model folder.
            declared: the `quantization_config` of config.json, empty if there is none; None to
                read it from the file.

        Raises:
            InvalidConfig: a file is not a JSON object, or a setting has the wrong type.
        """
        apart = _lower_keys(read_json_object_if_there(folder / "quantization_config.json"))
        older = _lower_keys(read_json_object_if_there(folder / "quantize_config.json"))
        if older:
            apart = _merged(apart, {"quant_method": "gptq"} | older)
        own: Any = declared
        if own is None:
            own = read_json_object_if_there(folder / "config.json").get("quantization_config")
        if own is not None and not isinstance(own, dict):
            raise InvalidConfig(
                f"quantization_config in {folder / 'config.json'}",
                expected="an object",
                actual=type(own).__name__,
            )
        merged = _merged(apart, _lower_keys(own or {}))
        method = merged.get("quant_method") or merged.get("method")
        if method is not None:
            method = _plain(method)
        return cls(method, merged, f"the quantization config of {folder}")

    @property
    def is_gptq(self) -> bool:
        """True where the declared method stores weights in GPTQ's format."""
        return self.method in GPTQ_METHODS or self.method in AUTO_ROUND_METHODS

    @property
    def is_supported(self) -> bool:
        """True where this engine reads the declared method."""
        return self.is_gptq or self.method == "exl2"

    @property
    def bits(self) -> int | None:
        """Declared bits of a code; None where not declared."""
        return self._whole_number("bits", "wbits", "w_bit")

    @property
    def group_size(self) -> int | None:
        """Declared rows of a group, -1 for a single group; None where not declared."""
        return self._whole_number("group_size", "q_group_size", "groupsize")

    @property
    def sym(self) -> bool | None:
        """True where every zero point is 2^(bits - 1); None where not declared.

        It is also None where single layers have their own settings, because it may not hold for
        them.
        """
        if self.per_layer:
            return None
        value = self._flag("sym")
        if value is None:
            zero_point = self._flag("zero_point")
            value = None if zero_point is None else not zero_point
        return value

    @property
    def desc_act(self) -> bool:
        """True where the groups were formed after sorting the input channels."""
        return bool(self._flag("desc_act"))

    @property
    def per_layer(self) -> bool:
        """True where single layers have their own settings."""
        return bool(self.values.get("dynamic") or self.values.get("extra_config"))

    @property
    def layout(self) -> str:
        """How zero points are stored: `gptq` (minus 1) or `gptq_v2` (unchanged).

        Raises:
            UnsupportedFormat: a layout or packing that this engine does not read, by name.
        """
        if self.method in AUTO_ROUND_METHODS:
            return _PACKINGS[self._packing()]
        if not _is_none(self.values.get("is_marlin_format")):
            raise self._unsupported("is_marlin_format", "marlin", _LAYOUTS)
        found = {
            key: self._layout_name(key)
            for key in ("format", "checkpoint_format")
            if self.values.get(key) not in (None, "")
        }
        if len(set(found.values())) > 1:
            warn_once(
                f"{self.where}: format says {found['format']}, the older key checkpoint_format "
                f"says {found['checkpoint_format']}; format is taken"
            )
        return next(iter(found.values()), V1)

    def _layout_name(self, key: str) -> str:
        name = _plain(self.values[key])
        if name not in _LAYOUTS:
            raise self._unsupported(key, self.values[key], _LAYOUTS)
        return _LAYOUTS[name]

    @property
    def packs_columns(self) -> bool:
        """True where codes are packed along the output columns; see formats/awq_packing.py."""
        return self.method in AUTO_ROUND_METHODS and self._packing() in _AWQ_PACKINGS

    def _packing(self) -> str:
        """Return auto-round's packing, a key of `_PACKINGS`.

        Folders of 2024 have the packing under the key `backend`.
        """
        key = "packing_format" if self.values.get("packing_format") is not None else "backend"
        value = self.values.get(key)
        if value is None:
            return "gptq"  # the default of transformers
        name = _plain(value)
        first, _, rest = name.partition(":")
        if first in ("auto_round", "autoround"):
            name = rest or "auto_round"
        name = name.partition(":")[0]  # `gptq:exllamav2` names the kernel as well
        if name not in _PACKINGS:
            raise self._unsupported(key, value, [f"auto_round:{name}" for name in _PACKINGS])
        return name

    def check(self) -> None:
        """Check every key of the settings of a GPTQ or EXL2 folder.

        Raises:
            UnsupportedFormat: a key that changes the arithmetic and is not implemented has a
                value that is not neutral, or the layout is unknown.
            InvalidConfig: a number or a flag has another type.
        """
        self._check_keys(self.values, "")
        for key in ("dynamic", "extra_config"):
            for layer, own in self._mapping(key).items():
                # GPTQModel writes false or {} for a layer that is not quantised.
                if isinstance(own, dict):
                    self._check_layer(_lower_keys(own), f"{key} of {shown(layer)}: ")
        if self.method in GPTQ_METHODS | AUTO_ROUND_METHODS:
            _ = self.layout, self.bits, self.group_size, self.sym, self.desc_act

    def _check_layer(self, values: dict[str, Any], within: str) -> None:
        """Check the settings of a single layer, whose layout must be that of the model."""
        for key in ("format", "checkpoint_format"):
            name = values.get(key)
            if name is not None and _LAYOUTS.get(_plain(name)) != self.layout:
                raise self._unsupported(within + key, name, [self.layout])
        bits = whole_number(values.get("bits"))
        if bits is not None and bits >= 16:  # not quantised, so data_type has no effect
            values.pop("data_type", None)
        self._check_keys(values, within)

    def _check_keys(self, values: Mapping[str, Any], within: str) -> None:
        unknown = []
        for key, value in values.items():
            neutral = _ARITHMETIC.get(key)
            if neutral is not None:
                if not neutral(value):
                    raise UnsupportedFormat(
                        f"{within}{key} in {self.where}",
                        expected="a model without it: it changes how weights are multiplied",
                        actual=shown(value),
                        remedy="Use a version of the model that was quantised without it",
                    )
            elif key not in _IMPLEMENTED and key not in _HARMLESS:
                unknown.append(key)
        if unknown:
            warn_once(
                f"{self.where}: {within}this engine does not know {shown(sorted(unknown), 200)}; "
                "if they change how weights are multiplied, the output is wrong"
            )

    def _mapping(self, key: str) -> dict[str, Any]:
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self._invalid(key, "an object")
        return value or {}

    def _whole_number(self, *keys: str) -> int | None:
        for key in keys:
            value = self.values.get(key)
            if value is not None:
                number = whole_number(value)
                if number is None:
                    raise self._invalid(key, "a whole number")
                return number
        return None

    def _flag(self, key: str) -> bool | None:
        value = self.values.get(key)
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if value is not None and not isinstance(value, bool):
            raise self._invalid(key, "true or false")
        return value

    def _invalid(self, key: str, expected: str) -> InvalidConfig:
        return InvalidConfig(
            f"{key} in {self.where}",
            expected=expected,
            actual=shown(self.values[key]),
            remedy="Compare this file with the original model's",
        )

    def _unsupported(self, key: str, value: Any, known: Any) -> UnsupportedFormat:
        return UnsupportedFormat(
            f"{key} in {self.where}",
            expected=f"one of {', '.join(known)}",
            actual=shown(value),
            remedy="Use a version of the model in one of these formats",
        )


def whole_number(value: Any) -> int | None:
    """Read a whole number, which may be text or a float without a fraction; else None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str) and len(value) <= 8:
        text = value.strip()
        return int(text) if text.removeprefix("-").isdecimal() else None
    if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 31:
        return int(value)
    return value if isinstance(value, int) and abs(value) < 1 << 31 else None


def _merged(older: dict[str, Any], newer: dict[str, Any]) -> dict[str, Any]:
    """Merge settings over older ones; ignore the older ones if they name another method."""
    methods = [_plain(values.get("quant_method") or "") for values in (older, newer)]
    if all(methods) and methods[0] != methods[1]:
        return newer
    layout = ("format", "checkpoint_format")
    if any(key in newer for key in layout):
        older = {key: value for key, value in older.items() if key not in layout}
    return older | newer


def _plain(name: Any) -> str:
    """Return a name in the spelling of the tables: lower case with underscores."""
    return str(name).strip().lower().replace("-", "_")


def _lower_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key.lower(): value for key, value in values.items()}
