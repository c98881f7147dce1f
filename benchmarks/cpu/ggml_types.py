"""The file types of llama.cpp, without and with an importance matrix, quantised by ggml itself.

A file type such as Q4_K_M gives each matrix one of ggml's types by rules of llama.cpp, which are
repeated here for a Llama with at most 3 queries for a key. A type of 256 weights to a block does
not fit a row that is no multiple of 256, and llama.cpp takes another one instead.

An importance matrix has the mean square of every input channel on calibration text, by which ggml
weights errors. llama.cpp's rules differ with one in the first eighth of the layers.

ggml is a shared library, `libggml-base.so`, which the wheels of several packages contain, for
example those of `pywhispercpp`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

# ggml's numbers of its types.
NUMBERS = {
    "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20, "IQ4_XS": 23,
}
_LARGE_BLOCK = 256
_INSTEAD = {
    "Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}

# (role of a matrix, number of its layer, number of layers) -> type.
Rule = Callable[[str, int, int], str]


def _gets_more(layer: int, count: int) -> bool:
    return layer < count // 8 or layer >= 7 * count // 8 or (layer - count // 8) % 3 == 2


def _uniform(name: str) -> Rule:
    return lambda role, layer, count: name


def _medium(name: str) -> Rule:
    def choose(role: str, layer: int, count: int) -> str:
        return "Q6_K" if role in ("v_proj", "down_proj") and _gets_more(layer, count) else name
    return choose


def _q2_k(role: str, layer: int, count: int) -> str:
    return "Q3_K" if role in ("v_proj", "o_proj", "down_proj") else "Q2_K"


def _q3_k_m(role: str, layer: int, count: int) -> str:
    if role == "v_proj":
        return "Q5_K" if layer < 2 else "Q4_K"
    if role == "o_proj":
        return "Q4_K"
    if role == "down_proj":
        return "Q5_K" if layer < count // 16 else "Q4_K" if _gets_more(layer, count) else "Q3_K"
    return "Q3_K"


def _q4_k_s(role: str, layer: int, count: int) -> str:
    early = (role == "v_proj" and layer < 4) or (role == "down_proj" and layer < count // 8)
    return "Q5_K" if early else "Q4_K"


def _iq4(name: str) -> Rule:
    return lambda role, layer, count: (
        "Q5_K" if role == "down_proj" and layer < count // 8 else name
    )


FILE_TYPES: dict[str, Rule] = {
    "Q2_K": _q2_k, "Q3_K_S": _uniform("Q3_K"), "Q3_K_M": _q3_k_m, "IQ4_XS": _iq4("IQ4_XS"),
    "Q4_0": _uniform("Q4_0"), "IQ4_NL": _iq4("IQ4_NL"), "Q4_K_S": _q4_k_s,
    "Q4_1": _uniform("Q4_1"), "Q4_K_M": _medium("Q4_K"), "Q5_0": _uniform("Q5_0"),
    "Q5_K_S": _uniform("Q5_K"), "Q5_K_M": _medium("Q5_K"), "Q5_1": _uniform("Q5_1"),
    "Q6_K": _uniform("Q6_K"),
}
# Those with an importance matrix.
_EARLY_WITH_IMPORTANCE = {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}


def _with_importance(name: str, rule: Rule) -> Rule:
    """Return the rule of a file type where there is an importance matrix."""
    if name.startswith("IQ4"):
        return _uniform(name)
    early = _EARLY_WITH_IMPORTANCE.get(name)
    if early is None:
        return rule
    return lambda role, layer, count: (
        early if role == "down_proj" and layer < count // 8 else rule(role, layer, count)
    )


IMPORTANCE_FILE_TYPES: dict[str, Rule] = {
    name: _with_importance(name, rule) for name, rule in FILE_TYPES.items()
}


class _Traits(ctypes.Structure):
    """The beginning of ggml_type_traits."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


def stored_type(name: str, in_features: int) -> str:
    """Return the type that llama.cpp takes for rows of a length instead of another."""
    return _INSTEAD.get(name, name) if in_features % _LARGE_BLOCK else name


class Ggml:
    """ggml's quantisers.

    Args:
        library: path of libggml-base.so.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        traits = self._library.ggml_get_type_traits
        traits.restype, traits.argtypes = ctypes.POINTER(_Traits), [ctypes.c_int]
        quantize = self._library.ggml_quantize_chunk
        quantize.restype = ctypes.c_size_t
        quantize.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p
        ]

    def round_trip(
        self, weight: torch.Tensor, name: str, importance: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, int]:
        """Quantise and decode a weight.

        Args:
            weight: float32 [out_features, in_features].
            name: a type that `stored_type` returns.
            importance: float32 [in_features], the mean square of each input; None for none.

        Returns:
            The decoded weight; its bits in a file.
        """
        rows, in_features = weight.shape
        weight = weight.contiguous()
        number = NUMBERS[name]
        traits = self._library.ggml_get_type_traits(number).contents
        assert traits.type_name.decode().upper() == name, (traits.type_name, name)
        codes = ctypes.create_string_buffer(weight.numel() // traits.blck_size * traits.type_size)
        written = self._library.ggml_quantize_chunk(
            number, weight.data_ptr(), codes, 0, rows, in_features,
            None if importance is None else importance.data_ptr(),
        )
        assert written == len(codes), (written, len(codes))
        decoded = torch.empty_like(weight)
        traits.to_float(codes, decoded.data_ptr(), decoded.numel())
        return decoded, 8 * written
