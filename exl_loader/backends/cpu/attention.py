"""Attention over the packed cache and cache writing, as calls of the compiled kernels."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from ...cache.layout import MAX_BIAS_SHARING
from ..cache_structs import batch_struct, cache_layer_struct, key_bias_struct, shape_struct

if TYPE_CHECKING:
    import torch

    from ...cache.layout import CacheLayer
    from ..base import AttentionShape, Batch


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
            self._layer(layer, k.shape[2]), ctypes.byref(batch_struct(batch)),
            k.data_ptr(), v.data_ptr(),
        )  # fmt: skip

    def attention(self, q: torch.Tensor, layer: CacheLayer, batch: Batch,
                  shape: AttentionShape, out: torch.Tensor, scratch: torch.Tensor) -> None:
        assert q.is_contiguous() and out.is_contiguous()
        assert q.shape[1:] == (shape.num_heads, shape.head_dim) and out.shape == q.shape
        bias = None
        if layer.key_bias is not None:
            assert shape.num_heads // shape.num_kv_heads <= MAX_BIAS_SHARING
            bias = ctypes.byref(key_bias_struct(layer.key_bias, batch))
        status = self._attention(
            self._layer(layer, shape.head_dim), ctypes.byref(batch_struct(batch)),
            ctypes.byref(shape_struct(shape)), bias, q.data_ptr(), out.data_ptr(),
            scratch.data_ptr(), scratch.numel(),
        )  # fmt: skip
        assert status == 0, f"attention in {scratch.numel()} bytes of scratch"

    def _layer(self, layer: CacheLayer, head_dim: int) -> int:
        if layer.native is None:
            layer.native = cache_layer_struct(layer, head_dim)
        return ctypes.addressof(layer.native)
