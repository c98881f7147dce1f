"""C structs and numbers that the CPU kernels and the CUDA kernels use.

The structs have the fields of csrc/cache_codec.h and csrc/packed.h. CPU kernels take pointers to
the structs. CUDA kernels take them by value.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from ..cache.layout import (
    GROUP,
    MAX_BIAS_PAIRS,
    PAGE_LEN,
    code_bytes,
    has_feedback,
    num_groups,
)
from ..utils.integers import round_up

if TYPE_CHECKING:
    import torch

    from ..cache.layout import CacheLayer, KeyBias, OpenPages, StoredTokens
    from .base import AttentionShape, Batch

# Enum Activation of csrc/common.h.
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3, "relu2": 4, "quick_gelu": 5}
# What `Ops.gate` takes; the last ones change the other factor as well.
GATES = {**ACTIVATIONS, "clamped_swiglu": 6}

_I32, _I64, _F32, _P = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class HalfStruct(ctypes.Structure):
    """ExlCacheHalf: keys or values of a layer."""

    _fields_ = [("codes", _P), ("scales", _P), ("bits", _I32)]


class OpenPagesStruct(ctypes.Structure):
    """ExlOpenPages."""

    _fields_ = [("tokens", HalfStruct), ("first", HalfStruct)]


class CacheLayerStruct(ctypes.Structure):
    """ExlCacheLayer."""

    _fields_ = [("k", HalfStruct), ("v", HalfStruct), ("k_open", OpenPagesStruct),
                ("v_open", OpenPagesStruct), ("key_feedback", _P), ("num_kv_heads", _I64),
                ("head_dim", _I64)]


class BatchStruct(ctypes.Structure):
    """ExlBatch."""

    _fields_ = [("q_start", _P), ("past_len", _P), ("page_table", _P), ("open_pages", _P),
                ("num_sequences", _I64), ("max_pages", _I64)]


class KeyBiasStruct(ctypes.Structure):
    """ExlKeyBias."""

    _fields_ = [("pairs", _P), ("first", _P), ("second", _P), ("inv_freq", _P),
                ("num_pairs", _I64), ("half", _I64), ("rope_factor", _F32)]


class ShapeStruct(ctypes.Structure):
    """ExlAttentionShape."""

    _fields_ = [("num_heads", _I64), ("sliding_window", _I64), ("scale", _F32), ("softcap", _F32)]


def dtype_code(dtype: torch.dtype) -> int:
    """Return the number of a dtype in the enum `ExlDtype` of csrc/packed.h."""
    import torch

    return {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}[dtype]


def cache_layer_struct(layer: CacheLayer, head_dim: int) -> CacheLayerStruct:
    """Return a layer's part of the cache. It has addresses, so the layer must outlive it."""
    heads, feedback = layer.k_codes.shape[1], layer.key_feedback
    if feedback is not None:
        assert feedback.shape == (heads, head_dim, round_up(head_dim, GROUP))
        assert feedback.is_contiguous() and has_feedback(layer.cache_type.k_bits)
    return CacheLayerStruct(
        _half(layer.keys, head_dim, PAGE_LEN), _half(layer.values, head_dim, PAGE_LEN),
        _open_pages(layer.k_open, head_dim), _open_pages(layer.v_open, head_dim),
        None if feedback is None else feedback.data_ptr(), heads, head_dim,
    )  # fmt: skip


def batch_struct(batch: Batch) -> BatchStruct:
    """Return a batch's lengths and pages. They are addresses, so the batch must outlive it."""
    table = batch.page_table
    assert table.is_contiguous() and batch.q_start.is_contiguous()
    assert batch.past_len.is_contiguous()
    opened = batch.open_pages
    assert opened is None or opened.is_contiguous()
    return BatchStruct(
        batch.q_start.data_ptr(), batch.past_len.data_ptr(), table.data_ptr(),
        None if opened is None else opened.data_ptr(), *table.shape,
    )  # fmt: skip


def key_bias_struct(bias: KeyBias | None, batch: Batch) -> KeyBiasStruct:
    """Return a layer's key bias with a batch's frequencies; num_pairs is 0 if `bias` is None.

    The struct has addresses, so the bias and the batch must outlive it.
    """
    if bias is None:
        return KeyBiasStruct()
    frequencies, (_, num_pairs) = batch.inv_freq, bias.pairs.shape
    assert frequencies is not None and frequencies.is_contiguous()
    assert frequencies.shape == (batch.num_sequences, bias.half)
    assert num_pairs <= MAX_BIAS_PAIRS
    for tensor in (bias.pairs, bias.first, bias.second):
        assert tensor.shape == bias.pairs.shape and tensor.is_contiguous()
    return KeyBiasStruct(
        bias.pairs.data_ptr(), bias.first.data_ptr(), bias.second.data_ptr(),
        frequencies.data_ptr(), num_pairs, bias.half, batch.rope_factor,
    )  # fmt: skip


def shape_struct(shape: AttentionShape) -> ShapeStruct:
    """Return the part of `shape` that is not in the structs of the cache."""
    return ShapeStruct(shape.num_heads, shape.sliding_window, shape.scale, shape.softcap)


def _open_pages(opened: OpenPages | None, head_dim: int) -> OpenPagesStruct:
    if opened is None:
        return OpenPagesStruct()
    return OpenPagesStruct(
        _half(opened.tokens, head_dim, PAGE_LEN), _half(opened.first, head_dim, 1)
    )


def _half(stored: StoredTokens, head_dim: int, page_len: int) -> HalfStruct:
    codes, scales, bits = stored.codes, stored.scales, stored.bits
    pages, heads = codes.shape[:2]
    width = code_bytes(head_dim, bits) // codes.element_size()
    assert codes.shape == (pages, heads, page_len, width) and codes.is_contiguous()
    if scales is None:
        assert num_groups(head_dim, bits) == 0
        return HalfStruct(codes.data_ptr(), None, bits)
    assert scales.shape == (pages, heads, page_len, num_groups(head_dim, bits))
    assert scales.is_contiguous()
    return HalfStruct(codes.data_ptr(), scales.data_ptr(), bits)
