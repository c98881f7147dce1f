"""Attention and cache writing on the CPU: the calls and the scratch memory.

`attention_scratch_bytes` works without PyTorch.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from ...cache.layout import MAX_BIAS_SHARING
from ...utils.integers import ceil_div, round_up
from ..kernel_structs import batch_struct, cache_layer_struct, key_bias_struct, shape_struct
from .library import INT64, POINTER, KernelOps, Signature, address
from .linear import cut_bytes
from .threads import default_threads

if TYPE_CHECKING:
    import torch

    from ...cache.layout import CacheLayer
    from ..base import AttentionShape, Batch

SIGNATURES = {
    "write_cache": Signature((POINTER,) * 4),
    "attention": Signature(
        (POINTER,) * 8 + (INT64,), "scratch is shorter than attention_scratch_bytes"
    ),
}

# Constants of csrc/cpu/attention.h and simd.h. tests/backends/cpu/test_constants.py checks that
# they are equal.
TILE_TOKENS = 64
KV_SPLIT_TOKENS = 512
TASK_ROWS = 128
LANES = 16
_FLOAT_BYTES = 4


class AttentionOps(KernelOps):
    """`write_cache` and `attention` of `base.Ops`."""

    def write_cache(self, k: torch.Tensor, v: torch.Tensor, layer: CacheLayer, batch: Batch,
                    scratch: torch.Tensor) -> None:
        assert k.is_contiguous() and v.is_contiguous() and k.shape == v.shape
        self._call("write_cache", _layer_address(layer, k.shape[2]),
                   ctypes.byref(batch_struct(batch)), k.data_ptr(), v.data_ptr())

    def attention(self, q: torch.Tensor, layer: CacheLayer, batch: Batch,
                  shape: AttentionShape, out: torch.Tensor, scratch: torch.Tensor,
                  sinks: torch.Tensor | None = None) -> None:
        assert q.is_contiguous() and out.is_contiguous()
        assert q.shape[1:] == (shape.num_heads, shape.head_dim) and out.shape == q.shape
        assert sinks is None or sinks.shape == (shape.num_heads,)
        bias = None
        if layer.key_bias is not None:
            assert shape.num_heads // shape.num_kv_heads <= MAX_BIAS_SHARING
            bias = ctypes.byref(key_bias_struct(layer.key_bias, batch))
        self._call(
            "attention", _layer_address(layer, shape.head_dim),
            ctypes.byref(batch_struct(batch)), ctypes.byref(shape_struct(shape)), bias,
            address(sinks), q.data_ptr(), out.data_ptr(), scratch.data_ptr(), scratch.numel(),
        )


def _layer_address(layer: CacheLayer, head_dim: int) -> int:
    if layer.native is None:
        layer.native = cache_layer_struct(layer, head_dim)
    return ctypes.addressof(layer.native)


def attention_scratch_bytes(
    max_batch_size: int, ctx_size: int, shape: AttentionShape
) -> int:
    """Return the bytes of scratch that `Ops.attention` needs.

    Every thread expands tiles and collects sums for the rows of one task. A decoding sequence
    writes one partial result for each of its kv splits of 512 tokens. The scratch has room for
    the partial results of one sequence of ctx_size tokens, or of max_batch_size sequences with
    as many tokens together. Sequences that share pages may need more. They are then processed
    consecutively.

    Args:
        max_batch_size: most sequences of a call.
        ctx_size: tokens of the longest sequence.
        shape: of the layers' attention.
    """
    sharing = shape.num_heads // shape.num_kv_heads
    task_rows = max(1, TASK_ROWS // sharing) * sharing
    stride = round_up(shape.head_dim, LANES)
    thread = sum(
        cut_bytes(count * _FLOAT_BYTES)
        for count in (
            shape.head_dim * TILE_TOKENS,
            TILE_TOKENS * stride,
            task_rows * TILE_TOKENS,
            task_rows * shape.head_dim,
            task_rows,
            task_rows,
        )
    )
    thread += 2 * _partial_bytes(task_rows, stride)
    slots = ceil_div(ctx_size, KV_SPLIT_TOKENS) + max_batch_size
    return default_threads() * thread + slots * _partial_bytes(shape.num_heads, stride)


def _partial_bytes(rows: int, stride: int) -> int:
    return sum(cut_bytes(rows * width * _FLOAT_BYTES) for width in (stride, LANES, 1))
