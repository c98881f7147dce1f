"""Attention over the packed cache and cache writing, as calls of the compiled kernels."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from ..cache import PAGE_LEN, code_bytes, num_groups
from ..key_bias import MAX_PAIRS, MAX_SHARING

if TYPE_CHECKING:
    import torch

    from ..cache import CacheLayer, KeyBias
    from .interface import AttentionShape, Batch


class _HalfStruct(ctypes.Structure):
    """ExlCacheHalf of csrc/cache_codec.h: keys or values of a layer."""

    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bits", ctypes.c_int32),
    ]


class _LayerStruct(ctypes.Structure):
    """ExlCacheLayer."""

    _fields_ = [
        ("k", _HalfStruct),
        ("v", _HalfStruct),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
    ]


class _BatchStruct(ctypes.Structure):
    """ExlBatch."""

    _fields_ = [
        ("q_start", ctypes.c_void_p),
        ("past_len", ctypes.c_void_p),
        ("page_table", ctypes.c_void_p),
        ("num_sequences", ctypes.c_int64),
        ("max_pages", ctypes.c_int64),
    ]


class _ShapeStruct(ctypes.Structure):
    """ExlAttentionShape."""

    _fields_ = [
        ("num_heads", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


def _half(codes: torch.Tensor, scales: torch.Tensor | None, bits: int,
          head_dim: int) -> _HalfStruct:
    pages, heads = codes.shape[:2]
    width = code_bytes(head_dim, bits) // codes.element_size()
    assert codes.shape == (pages, heads, PAGE_LEN, width) and codes.is_contiguous()
    if scales is None:
        assert num_groups(head_dim, bits) == 0
        return _HalfStruct(codes.data_ptr(), None, bits)
    assert scales.shape == (pages, heads, PAGE_LEN, num_groups(head_dim, bits))
    assert scales.is_contiguous()
    return _HalfStruct(codes.data_ptr(), scales.data_ptr(), bits)


def _layer_struct(layer: CacheLayer, head_dim: int) -> _LayerStruct:
    kind = layer.cache_type
    return _LayerStruct(
        _half(layer.k_codes, layer.k_scales, kind.k_bits, head_dim),
        _half(layer.v_codes, layer.v_scales, kind.v_bits, head_dim),
        layer.k_codes.shape[1],
        head_dim,
    )


def _batch_struct(batch: Batch) -> _BatchStruct:
    table = batch.page_table
    assert table.is_contiguous() and batch.q_start.is_contiguous()
    assert batch.past_len.is_contiguous()
    return _BatchStruct(
        batch.q_start.data_ptr(), batch.past_len.data_ptr(), table.data_ptr(),
        table.shape[0], table.shape[1],
    )  # fmt: skip


class _BiasStruct(ctypes.Structure):
    """ExlKeyBias."""

    _fields_ = [
        ("pairs", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("second", ctypes.c_void_p),
        ("inv_freq", ctypes.c_void_p),
        ("num_pairs", ctypes.c_int64),
        ("half", ctypes.c_int64),
        ("rope_factor", ctypes.c_float),
    ]


def _bias_struct(bias: KeyBias, batch: Batch) -> _BiasStruct:
    frequencies, (_, num_pairs) = batch.inv_freq, bias.pairs.shape
    assert frequencies is not None and frequencies.is_contiguous()
    assert frequencies.shape == (batch.num_sequences, bias.half)
    assert num_pairs <= MAX_PAIRS
    return _BiasStruct(
        bias.pairs.data_ptr(), bias.first.data_ptr(), bias.second.data_ptr(),
        frequencies.data_ptr(), num_pairs, bias.half, batch.rope_factor,
    )  # fmt: skip


class AttentionOps:
    """`write_cache` and `attention` of `interface.Ops`."""

    takes_key_bias = True
    attention_calls = ("write_cache", "attention")

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        pointer = ctypes.c_void_p
        self._write_cache = library.exl_write_cache
        self._write_cache.restype, self._write_cache.argtypes = None, [pointer] * 4
        self._attention = library.exl_attention
        self._attention.restype = ctypes.c_int
        self._attention.argtypes = [pointer] * 7 + [ctypes.c_int64]

    def write_cache(self, k: torch.Tensor, v: torch.Tensor, layer: CacheLayer, batch: Batch,
                    scratch: torch.Tensor) -> None:
        assert k.is_contiguous() and v.is_contiguous() and k.shape == v.shape
        self._write_cache(
            self._layer(layer, k.shape[2]), ctypes.byref(_batch_struct(batch)),
            k.data_ptr(), v.data_ptr(),
        )  # fmt: skip

    def attention(self, q: torch.Tensor, layer: CacheLayer, batch: Batch,
                  shape: AttentionShape, out: torch.Tensor, scratch: torch.Tensor) -> None:
        assert q.is_contiguous() and out.is_contiguous()
        assert q.shape[1:] == (shape.num_heads, shape.head_dim) and out.shape == q.shape
        bias = None
        if layer.key_bias is not None:
            assert shape.num_heads // shape.num_kv_heads <= MAX_SHARING
            bias = ctypes.byref(_bias_struct(layer.key_bias, batch))
        native_shape = _ShapeStruct(shape.num_heads, shape.window, shape.scale, shape.softcap)
        status = self._attention(
            self._layer(layer, shape.head_dim), ctypes.byref(_batch_struct(batch)),
            ctypes.byref(native_shape), bias, q.data_ptr(), out.data_ptr(),
            scratch.data_ptr(), scratch.numel(),
        )  # fmt: skip
        assert status == 0, f"attention in {scratch.numel()} bytes of scratch"

    def _layer(self, layer: CacheLayer, head_dim: int) -> int:
        if layer.native is None:
            layer.native = _layer_struct(layer, head_dim)
        return ctypes.addressof(layer.native)
