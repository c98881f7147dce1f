"""Attention over the packed cache and cache writing, as launches of compiled kernels.

A launch depends on shapes alone; lengths and page tables are read on the device. A sequence
with up to `DECODE_ROWS` rows in a call is decoded, one with more is a prompt: two kernels,
each leaving the other's sequences alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ...cache.layout import GROUP
from ..cache_structs import (
    BatchStruct,
    CacheLayerStruct,
    KeyBiasStruct,
    ShapeStruct,
    batch_struct,
    cache_layer_struct,
    key_bias_struct,
    shape_struct,
)
from .attention_plan import decode_plan, is_generic, prefill_plan
from .ops_rows import NORM_HEAD_SIZE
from .scratch import COUNTER_BYTES
from .scratch_attention import DECODE_ROWS, most_splits, row_bytes, slots

if TYPE_CHECKING:
    import torch

    from ...cache.layout import CacheLayer
    from ..base import AttentionShape, Batch
    from .launcher import Launcher

Launch = Callable[[], None]

_I32, _I64, _F32, _P = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
# Of groups of rows that share a sum, in one launch.
_MOST_COUNTERS = COUNTER_BYTES // ctypes.sizeof(_I32)
_FLOAT_BYTES = ctypes.sizeof(_F32)
_WARP = 32
_ROWS = 8  # kRows of csrc/cuda/decode_rows.cuh
_GENERIC_THREADS = 128
_WRITE_WARPS = 8
_CODEBOOK_FLOATS = 64


class _Call(ctypes.Structure):
    """AttentionCall of csrc/cuda/attention.cuh."""

    _fields_ = [("layer", CacheLayerStruct), ("batch", BatchStruct), ("shape", ShapeStruct),
                ("bias", KeyBiasStruct), ("bias_begin", _I64), ("q", _P), ("out", _P)]

    def beginning(self, bias_begin: int) -> _Call:
        """The same call, with BiasMemory at another place of a block's shared memory."""
        call = _Call.from_buffer_copy(self)
        call.bias_begin = bias_begin
        return call


class _Rope(ctypes.Structure):
    """RopeCall of csrc/cuda/cache_write.cu."""

    _fields_ = [("q", _P), ("table", _P), ("q_weight", _P), ("k_weight", _P),
                ("q_heads", _I32), ("half", _I32), ("eps", _F32), ("unused", _I32)]


class _Decode(ctypes.Structure):
    """DecodeLaunch of csrc/cuda/decode_rows.cuh."""

    _fields_ = [("partials", _P), ("counters", _P), ("first_row", _I32), ("rows", _I32),
                ("slots", _I32), ("max_kv_splits", _I32), ("units", _I32),
                ("heads_per_kv", _I32), ("groups", _I32)]


class CudaAttentionOps:
    """`write_cache` and `attention` of `interface.Ops`.

    Args:
        launcher: runs kernels.
    """

    takes_key_bias = True

    def __init__(self, launcher: Launcher):
        self.launcher = launcher

    def prepare_write_cache(self, k: torch.Tensor, v: torch.Tensor, layer: CacheLayer,
                            batch: Batch, scratch: torch.Tensor) -> Launch:
        """Rotate and quantise; a block writes one head of one row."""
        return self._write(k, v, layer, batch, _Rope(), 0)

    def prepare_rope_write_cache(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor,
        layer: CacheLayer, batch: Batch, q_weight: torch.Tensor | None = None,
        k_weight: torch.Tensor | None = None, eps: float = 0.0,
    ) -> Launch:
        """RoPE of queries and keys and `write_cache` in one launch; norms first where asked.

        The same bits as one after the other, but that `k` stays as it is.

        Args:
            q, k, v: float32 [T, heads, head_dim]. table: float32 [T, 2, rotary_dim / 2].
            q_weight, k_weight: float32 [head_dim], or None.
        """
        rows, q_heads, head_dim = q.shape
        assert q.is_contiguous() and table.is_contiguous() and table.shape[0] == rows
        assert k.shape[::2] == (rows, head_dim) and 2 * table.shape[2] <= head_dim
        for weight in (q_weight, k_weight):
            assert weight is None or (weight.is_contiguous() and head_dim <= NORM_HEAD_SIZE)
        rope = _Rope(
            q.data_ptr(), table.data_ptr(), None if q_weight is None else q_weight.data_ptr(),
            None if k_weight is None else k_weight.data_ptr(), q_heads, table.shape[2], eps,
        )
        return self._write(k, v, layer, batch, rope, q_heads)

    def _write(self, k: torch.Tensor, v: torch.Tensor, layer: CacheLayer, batch: Batch,
               rope: _Rope, q_heads: int) -> Launch:
        assert k.is_contiguous() and v.is_contiguous() and k.shape == v.shape
        rows, heads, head_dim = k.shape
        groups = -(-head_dim // GROUP)
        shared_bytes = (groups * GROUP + _CODEBOOK_FLOATS) * _FLOAT_BYTES
        # Two warps at least: they fill the codebooks.
        warps = min(max(groups, 2), _WRITE_WARPS)
        return self.launcher.prepare(
            "cache_write_kernel", (rows, 2 * heads + -(-q_heads // warps), 1), warps * _WARP,
            shared_bytes, cache_layer_struct(layer, head_dim), batch_struct(batch),
            _P(k.data_ptr()), _P(v.data_ptr()), rope,
        )

    def prepare_attention(self, q: torch.Tensor, layer: CacheLayer, batch: Batch,
                          shape: AttentionShape, out: torch.Tensor,
                          scratch: torch.Tensor) -> Launch:
        """Attend each sequence by the kernel that its number of rows asks for."""
        assert q.is_contiguous() and out.is_contiguous() and out.shape == q.shape
        assert q.shape[1:] == (shape.num_heads, shape.head_dim)
        call = _call(q, layer, batch, shape, out)
        rows = q.shape[0]
        if is_generic(shape.head_dim, layer.cache_type):
            shared_bytes = (5 * shape.head_dim + 8 + 3 * call.bias.num_pairs) * _FLOAT_BYTES
            return self.launcher.prepare("attention_generic_kernel", (rows, shape.num_heads, 1),
                                         _GENERIC_THREADS, shared_bytes, call)
        # Every sequence of a call has a row, so one of them has this many at most.
        most_rows = rows - batch.num_sequences + 1
        launches = []
        if batch.num_sequences > 1 or most_rows <= DECODE_ROWS:
            decoding = min(most_rows, DECODE_ROWS)  # rows of a sequence
            groups = -(-decoding * (shape.num_heads // shape.num_kv_heads) // _ROWS)
            for part in _parts(batch, _MOST_COUNTERS // (groups * shape.num_kv_heads)):
                held = min(rows, part.num_sequences * decoding)
                launches += self._decode(_call(q, layer, part, shape, out), layer, part, shape,
                                         held, groups, scratch)
        if most_rows > DECODE_ROWS:
            launches.append(self._prefill(call, layer, batch, shape, most_rows))
        return launches[0] if len(launches) == 1 else _in_turn(launches)

    def _decode(self, call: _Call, layer: CacheLayer, batch: Batch, shape: AttentionShape,
                rows: int, groups: int, scratch: torch.Tensor) -> list[Launch]:
        """Prepare launches for sequences with up to DECODE_ROWS rows, as many as scratch holds.

        Args:
            batch: sequences for whose groups of rows there are counters.
            rows: most rows of these sequences. groups: of _ROWS rows, of a sequence and kv head.
        """
        max_pages, kv_heads = batch.page_table.shape[1], shape.num_kv_heads
        plan = decode_plan(shape.head_dim, layer.cache_type, self.launcher.shared_limit_bytes,
                           call.bias.num_pairs)
        call = call.beginning(plan.bias_begin)
        held, one_bytes = rows, row_bytes(shape, max_pages)
        if one_bytes:
            held = min(rows, (scratch.nbytes - COUNTER_BYTES) // one_bytes)
        assert held > 0, f"attention in {scratch.nbytes} bytes of scratch"
        splits = slots(kv_heads, shape.window, max_pages)
        launches = []
        for first in range(0, rows, held):
            decode = _Decode(
                scratch.data_ptr() + COUNTER_BYTES, scratch.data_ptr(), first, held, splits,
                most_splits(kv_heads), plan.units, shape.num_heads // kv_heads, groups,
            )
            launches.append(self.launcher.prepare(
                plan.kernel, (splits, kv_heads * groups, batch.num_sequences),
                plan.warps * _WARP, plan.shared_bytes, call, decode,
            ))
        return launches

    def _prefill(self, call: _Call, layer: CacheLayer, batch: Batch, shape: AttentionShape,
                 max_rows: int) -> Launch:
        head_rows = max_rows * (shape.num_heads // shape.num_kv_heads)
        plan = prefill_plan(
            shape.head_dim, layer.cache_type, self.launcher.shared_limit_bytes,
            self.launcher.multiprocessors, shape.num_kv_heads, head_rows, call.bias.num_pairs,
        )
        grid = (-(-head_rows // plan.rows), shape.num_kv_heads, batch.num_sequences)
        return self.launcher.prepare(plan.kernel, grid, plan.warps * _WARP, plan.shared_bytes,
                                     call.beginning(plan.bias_begin))


def _call(q: torch.Tensor, layer: CacheLayer, batch: Batch, shape: AttentionShape,
          out: torch.Tensor) -> _Call:
    return _Call(
        cache_layer_struct(layer, shape.head_dim), batch_struct(batch), shape_struct(shape),
        key_bias_struct(layer.key_bias, batch), 0, q.data_ptr(), out.data_ptr(),
    )


def _parts(batch: Batch, most: int) -> list[Batch]:
    """Cut a batch into runs of up to `most` sequences, whose rows keep their numbers."""
    count = batch.num_sequences
    if count <= most:
        return [batch]
    return [
        replace(
            batch, q_start=batch.q_start[first : first + most + 1],
            past_len=batch.past_len[first : first + most],
            page_table=batch.page_table[first : first + most],
            inv_freq=None if batch.inv_freq is None else batch.inv_freq[first : first + most],
        )
        for first in range(0, count, most)
    ]


def _in_turn(launches: list[Launch]) -> Launch:
    def launch() -> None:
        for one in launches:
            one()

    return launch
