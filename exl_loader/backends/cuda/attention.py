"""Attention over the packed cache and cache writing on a card: calls, launches, scratch memory.

A launch follows from shapes, cache type and the card's shared memory. It does not depend on a
sequence's length, so that it can be replayed: lengths and page tables are read on the device.
Nor does a row's result depend on the batch. A sequence with up to DECODE_ROWS rows in a call is
decoded, one with more is a prompt: two kernels, each of which ignores the other's sequences.

Only decoding needs scratch memory. The tokens that a row sees are cut into kv_splits
(csrc/cuda/decode_rows.cuh), and each kv_split leaves its sums of head_dim float32, its largest
score and its total. An open page is a kv_split of its own. The sizes need no PyTorch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...cache.layout import (
    GROUP,
    MAX_BIAS_PAIRS,
    PAGE_LEN,
    CacheType,
    code_bytes,
    num_groups,
    open_bits,
    pages_for,
)
from ...utils.integers import ceil_div, round_up
from ..kernel_structs import (
    BatchStruct,
    CacheLayerStruct,
    KeyBiasStruct,
    ShapeStruct,
    batch_struct,
    cache_layer_struct,
    key_bias_struct,
    shape_struct,
)
from .launcher import COUNTER_BYTES, WARP, KernelOps, address, pointer
from .rows import NORM_HEAD_SIZE

if TYPE_CHECKING:
    import torch

    from ...cache.layout import CacheLayer
    from ..base import AttentionShape, Batch

_I32, _I64, _F32, _P = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_FLOAT_BYTES, _HALF_BYTES = 4, 2

# ---- Scratch memory --------------------------------------------------------------------------

# Most rows of a sequence that is decoded (kDecodeRows of csrc/cuda/attention.cuh): as many as a
# draft may have, so that a text is the same with and without drafts, bit for bit.
DECODE_ROWS = 32
# Rows of all sequences together that scratch has room for at least. Drafts with more rows take
# several launches.
HELD_ROWS = 16
# Blocks that the largest cards' multiprocessors hold at once, two each. The number is the same
# for every card, so that a row's result depends on the card as little as possible.
_BLOCKS = 264
_LEAST_SPLITS = 8
_MOST_SPLITS = 64
# A sliding window that starts within a kv_split touches one more of them, and the rows of a
# sequence start at different positions.
_SLIDING_WINDOW_SPLITS = 2
# An open page is a kv_split of its own. All rows of a sequence end in it, so that with a sliding
# window they touch one other kv_split more, not two.
_OPEN_PAGE_SPLITS = 1

assert PAGE_LEN == 256, "kv_splits are whole pages, see decode_rows.cuh"


def most_kv_splits(num_kv_heads: int) -> int:
    """Return the most kv_splits of a row, without those that a sliding window adds.

    The shape alone decides: the order of sums must not depend on the batch.
    """
    return min(max(_BLOCKS // num_kv_heads, _LEAST_SPLITS), _MOST_SPLITS)


def kv_split_slots(
    num_kv_heads: int, sliding_window: int, max_pages: int, has_open_pages: bool = False
) -> int:
    """Return the kv_splits that a launch has room for, with page tables of `max_pages` pages."""
    most = most_kv_splits(num_kv_heads)
    if sliding_window:
        most += _SLIDING_WINDOW_SPLITS
    elif has_open_pages:
        most += _OPEN_PAGE_SPLITS
    return min(most, max_pages)


def _row_bytes(shape: AttentionShape, slots: int) -> int:
    """Return what the kv_splits of one row leave, all heads together."""
    if slots < 2:
        return 0
    return slots * shape.num_heads * (shape.head_dim + 2) * _FLOAT_BYTES


def attention_scratch_bytes(
    rows: int, max_batch_size: int, ctx_size: int, shape: AttentionShape
) -> int:
    """Return what `attention` needs, counters included.

    There is room for a row of each of max_batch_size sequences, and for HELD_ROWS rows.

    Args:
        rows: rows of a call, of all its sequences together.
        max_batch_size: sequences of a call.
        ctx_size: tokens of the longest sequence.
        shape: of any layer. The need counts a sliding window even if this layer has none, which
            also has room for the kv_split of an open page.
    """
    held = min(rows, max(max_batch_size, HELD_ROWS))
    slots = kv_split_slots(shape.num_kv_heads, 1, pages_for(ctx_size))
    return COUNTER_BYTES + held * _row_bytes(shape, slots)


# ---- The kernel of a call and its blocks -----------------------------------------------------

# csrc/cuda/cache_tile.cuh: head_dim is a multiple of kUnit where tensor cores are used.
_UNIT = 16
_MAX_HEAD_DIM = 256
# csrc/cuda/decode_rows.cuh: rows of a block (kRows), and the size of RowData.
_DECODE_BLOCK_ROWS = 8
_ROW_DATA_BYTES = 4 * _DECODE_BLOCK_ROWS * 4 + 16
_FRAGMENT_BYTES = 16
# Padded head_dim -> tokens of a tile.
_DECODE_TILES = {64: 32, 128: 32, 256: 16}
_PREFILL_TILES = {64: 64, 128: 64, 256: 32}
# Tokens of a tile of an open page: csrc/cuda/decode_loop.cuh (kOpenTile), and the share of
# _PREFILL_TILES in csrc/cuda/attention_prefill.cu.
_DECODE_OPEN_TILE = 16
_PREFILL_OPEN_SHARE = 2
# csrc/cuda/prefill_tile.cuh: rows of a warp (kWarpRows), and the padding of a row of halves in
# shared memory (kPadding), without which ldmatrix would meet a bank twice.
_WARP_ROWS = 16
_ROW_PADDING = 8
# csrc/cuda/key_bias.cuh: pairs of a product (kStepPairs), and the bytes that each takes.
_STEP_PAIRS = 8
_FREQUENCY_BYTES = MAX_BIAS_PAIRS * _FLOAT_BYTES
_FACTOR_BYTES = _STEP_PAIRS * 2 * _FLOAT_BYTES
_WAVE_BYTES = _STEP_PAIRS * 4 * _HALF_BYTES
# csrc/cuda/attention_generic.cu, csrc/cuda/cache_write.cu, csrc/cuda/cache_grid.cuh.
_GENERIC_THREADS = 128
_WRITE_WARPS = 8
_CODEBOOK_FLOATS = 64
# csrc/cuda/key_feedback.cuh: rows of a slot of the ring of a matrix' rows, slots of heads with more
# than 2 groups and with fewer, the most groups of a head that has a ring and of a short head, and
# the scale of a group with its inverse.
_FEEDBACK_ROWS = 16
_FEEDBACK_SLOTS, _ALL_FEEDBACK_SLOTS = 2, 4
_MOST_FEEDBACK_REGISTERS = 8
_SHORT_FEEDBACK_GROUPS = 4
_GROUP_SCALE_BYTES = 8


def write_shared_bytes(head_dim: int, has_feedback: bool) -> int:
    """Return the shared memory of a block that writes the cache (WriteMemory).

    Args:
        head_dim: of the layer.
        has_feedback: whether keys are rounded with feedback.
    """
    groups = ceil_div(head_dim, GROUP)
    head_bytes = groups * GROUP * _FLOAT_BYTES
    shared_bytes = head_bytes + _CODEBOOK_FLOATS * _FLOAT_BYTES
    if not has_feedback:
        return shared_bytes
    shared_bytes += head_bytes + round_up(groups, 2) * _GROUP_SCALE_BYTES
    if groups > _MOST_FEEDBACK_REGISTERS:
        return shared_bytes
    # A row is as long as the registers that hold a head: 2, 4 or 8 of each lane.
    registers = next(size for size in (2, 4, 8) if groups <= size)
    slots = _ALL_FEEDBACK_SLOTS if registers <= 2 else _FEEDBACK_SLOTS
    return shared_bytes + slots * _FEEDBACK_ROWS * registers * GROUP * _HALF_BYTES


@dataclass(frozen=True)
class DecodeBlock:
    """A kernel that decodes, and its blocks.

    Args:
        kernel: name of the kernel.
        warps: of a block.
        units: slots of a warp's ring of cache tiles.
        open_warps, open_units: warps that attend an open page, and slots of their rings; 0 for no
            open pages.
        bias_begin: offset of BiasMemory in shared memory.
        shared_bytes: shared memory of a block.
    """

    kernel: str
    warps: int
    units: int
    open_warps: int
    open_units: int
    bias_begin: int
    shared_bytes: int


@dataclass(frozen=True)
class PrefillBlock:
    """A kernel that attends for prompts, and its blocks.

    Args:
        kernel: name of the kernel.
        warps: of a block.
        rows: query rows of a block.
        bias_begin: offset of BiasMemory in shared memory.
        shared_bytes: shared memory of a block.
    """

    kernel: str
    warps: int
    rows: int
    bias_begin: int
    shared_bytes: int


def is_generic(head_dim: int, cache_type: CacheType) -> bool:
    """Tell whether such heads need the kernel without tensor cores."""
    is_wide = max(cache_type.k_bits, cache_type.v_bits) > 16
    return is_wide or head_dim % _UNIT != 0 or head_dim > _MAX_HEAD_DIM


def _padded(head_dim: int) -> int:
    return next(size for size in _DECODE_TILES if head_dim <= size)


def _token_bytes(head_dim: int, cache_type: CacheType, in_open_page: bool = False) -> int:
    """Return the bytes of a token's codes and scales: of keys or of values, the larger."""
    kinds = [cache_type.k_bits, cache_type.v_bits]
    if in_open_page:
        kinds = [open_bits(bits) or bits for bits in kinds]
    return max(
        code_bytes(head_dim, bits) + _HALF_BYTES * num_groups(head_dim, bits) for bits in kinds
    )


def bias_bytes(pairs: int, tile: int, rows: int) -> int:
    """Return the shared memory of BiasMemory.

    Args:
        pairs: of a key/value head.
        tile: tokens of a tile.
        rows: rows of a block, a multiple of 8.
    """
    if pairs == 0:
        return 0
    step_bytes = rows * _FACTOR_BYTES + tile * _WAVE_BYTES
    return _FREQUENCY_BYTES + rows * _FLOAT_BYTES + ceil_div(pairs, _STEP_PAIRS) * step_bytes


def decode_block(
    head_dim: int, cache_type: CacheType, shared_limit_bytes: int, bias_pairs: int = 0,
    has_open_pages: bool = False,
) -> DecodeBlock:
    """Choose how much of the cache is on its way at once.

    As much is chosen as leaves room for two blocks, or for one where two do not fit. Open pages do
    not change that.

    Args:
        head_dim: not `is_generic`.
        cache_type: of the layer.
        shared_limit_bytes: most shared memory of a block on the card.
        bias_pairs: of the layer's key bias.
        has_open_pages: whether the layer has open pages.
    """
    is_whole = head_dim in _DECODE_TILES
    padded = head_dim if is_whole else _padded(max(head_dim, 65))
    tile = _DECODE_TILES[padded]
    fixed = padded // GROUP * WARP * _FRAGMENT_BYTES
    fixed += _DECODE_BLOCK_ROWS * padded * _FLOAT_BYTES + _ROW_DATA_BYTES
    merge = (padded // 4 + 4) * WARP * _FLOAT_BYTES
    bias = bias_bytes(bias_pairs, tile, _DECODE_BLOCK_ROWS)
    half = shared_limit_bytes // 2
    choices = (
        (8, 4, half), (8, 2, half), (8, 2, shared_limit_bytes), (8, 1, shared_limit_bytes),
        (4, 2, shared_limit_bytes), (4, 1, shared_limit_bytes),
    )
    for warps, units, limit in choices:
        ring = warps * units * tile * _token_bytes(head_dim, cache_type)
        # The merge of the warps' sums takes the place of their rings.
        rings = max(ring, warps // 2 * merge)
        if fixed + rings + bias <= limit:
            break
    else:
        raise AssertionError(f"{shared_limit_bytes} bytes of shared memory")
    open_warps = open_units = 0
    if has_open_pages:
        # Registers leave room for two blocks only in the kernels of 64 and 128 elements.
        room = limit if is_whole and head_dim < _MAX_HEAD_DIM else shared_limit_bytes
        open_tile_bytes = _DECODE_OPEN_TILE * _token_bytes(head_dim, cache_type, True)
        open_warps, open_units = next(
            (open_warps, open_units)
            for open_warps, open_units in (
                (warps, 4), (warps, 2), (warps, 1), (warps // 2, 1), (warps // 4, 1)
            )
            if fixed + open_warps * open_units * open_tile_bytes + bias <= room
        )
        rings = max(rings, open_warps * open_units * open_tile_bytes)
    # Kernels for exactly one head_dim know their strides at compile time.
    name = str(head_dim) if is_whole else f"up_to_{padded}"
    return DecodeBlock(
        f"attention_decode_{name}_kernel", warps, units, open_warps, open_units, fixed + rings,
        fixed + rings + bias,
    )


def prefill_block(
    head_dim: int, cache_type: CacheType, shared_limit_bytes: int, multiprocessors: int,
    num_kv_heads: int, rows: int, bias_pairs: int = 0, has_open_pages: bool = False,
) -> PrefillBlock:
    """Choose how many query rows share a tile of unpacked keys and values.

    With more rows the cache is unpacked less often; with fewer there are more blocks. A row's
    result is the same.

    Args:
        head_dim: not `is_generic`.
        cache_type: of the layer.
        shared_limit_bytes: most shared memory of a block on the card.
        multiprocessors: of the card.
        num_kv_heads: key/value heads.
        rows: query rows of a key/value head, of all its query heads, in the call.
        bias_pairs: of the layer's key bias.
        has_open_pages: whether the layer has open pages.
    """
    padded = _padded(head_dim)
    tile = _PREFILL_TILES[padded]
    tile_bytes = tile * (padded + _ROW_PADDING) * _HALF_BYTES
    raw = tile * _token_bytes(head_dim, cache_type)
    if has_open_pages:
        open_tile = tile // _PREFILL_OPEN_SHARE
        raw = max(raw, open_tile * _token_bytes(head_dim, cache_type, True))
    for warps in (8, 4, 2, 1):
        blocks = num_kv_heads * ceil_div(rows, warps * _WARP_ROWS)
        is_enough = blocks >= 2 * multiprocessors or warps <= 4
        queries = warps * _WARP_ROWS * (padded + _ROW_PADDING) * _HALF_BYTES
        begin = max(queries + tile_bytes + raw, warps * 8 * padded * _FLOAT_BYTES)
        shared_bytes = begin + bias_bytes(bias_pairs, tile, warps * _WARP_ROWS)
        if shared_bytes <= shared_limit_bytes and is_enough:
            return PrefillBlock(
                f"attention_prefill_{padded}_kernel", warps, warps * _WARP_ROWS, begin,
                shared_bytes,
            )
    raise AssertionError(f"{shared_limit_bytes} bytes of shared memory")


# ---- The operations --------------------------------------------------------------------------


class AttentionStruct(ctypes.Structure):
    """AttentionCall of csrc/cuda/attention.cuh."""

    _fields_ = [("layer", CacheLayerStruct), ("batch", BatchStruct), ("shape", ShapeStruct),
                ("bias", KeyBiasStruct), ("bias_begin", _I64), ("q", _P), ("out", _P),
                ("sinks", _P)]


class RopeStruct(ctypes.Structure):
    """RopeCall of csrc/cuda/cache_write.cu."""

    _fields_ = [("q", _P), ("table", _P), ("q_weight", _P), ("k_weight", _P), ("mean", _P),
                ("q_heads", _I32), ("half", _I32), ("eps", _F32), ("interleaved", _I32)]


class DecodeStruct(ctypes.Structure):
    """DecodeLaunch of csrc/cuda/decode_rows.cuh."""

    _fields_ = [("partials", _P), ("counters", _P), ("first_row", _I32), ("rows", _I32),
                ("slots", _I32), ("max_kv_splits", _I32), ("units", _I32), ("open_warps", _I32),
                ("open_units", _I32), ("heads_per_kv", _I32), ("groups", _I32)]


# Groups of rows that share a sum, in one launch: each has a counter.
_MOST_COUNTERS = COUNTER_BYTES // ctypes.sizeof(_I32)


class AttentionOps(KernelOps):
    """`write_cache` and `attention` of `base.Ops`."""

    adds_key_bias = True
    # More rows are attended as those of a prompt, with other roundings.
    decode_rows: int | None = DECODE_ROWS

    def write_cache(self, k: torch.Tensor, v: torch.Tensor, layer: CacheLayer, batch: Batch,
                    scratch: torch.Tensor) -> None:
        """See `base.Ops.write_cache`. A block writes one head of one row."""
        self._cache_write(k, v, layer, batch, RopeStruct(), 0)

    def rope_write_cache(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor,
        layer: CacheLayer, batch: Batch, q_weight: torch.Tensor | None = None,
        k_weight: torch.Tensor | None = None, eps: float = 0.0, interleaved: bool = False,
        mean: torch.Tensor | None = None,
    ) -> None:
        """Run `rope` of queries and keys and `write_cache` in one launch, norms first if given.

        The bits are those of the separate operations, but `k` is not written.

        Args:
            q: float32 [T, num_heads, head_dim].
            k, v: float32 [T, num_kv_heads, head_dim].
            table: float32 [T, 2, rotary_dim / 2].
            layer: where to write.
            batch: the rows' sequences.
            q_weight, k_weight: float32 [head_dim], of the norms; or None.
            eps: of the norms.
            interleaved: as that of `rope`.
            mean: as that of `rope` of the keys.
        """
        rows, q_heads, head_dim = q.shape
        assert q.is_contiguous() and table.is_contiguous() and table.shape[0] == rows
        assert k.shape[::2] == (rows, head_dim) and 2 * table.shape[2] <= head_dim
        for weight in (q_weight, k_weight):
            assert weight is None or (weight.is_contiguous() and head_dim <= NORM_HEAD_SIZE)
        assert mean is None or mean.shape == k.shape[1:]
        rope = RopeStruct(
            q.data_ptr(), table.data_ptr(), address(q_weight), address(k_weight), address(mean),
            q_heads, table.shape[2], eps, interleaved,
        )
        self._cache_write(k, v, layer, batch, rope, q_heads)

    def _cache_write(self, k: torch.Tensor, v: torch.Tensor, layer: CacheLayer, batch: Batch,
                     rope: RopeStruct, q_heads: int) -> None:
        assert k.is_contiguous() and v.is_contiguous() and k.shape == v.shape
        rows, heads, head_dim = k.shape
        groups = ceil_div(head_dim, GROUP)
        feedback = layer.key_feedback
        assert feedback is None or feedback.data_ptr() % 16 == 0, "read in words of 16 bytes"
        shared_bytes = write_shared_bytes(head_dim, feedback is not None)
        # Two warps at least, because they fill the codebooks.
        warps = min(max(groups, 2), _WRITE_WARPS)
        kernel = "cache_write_kernel"
        if feedback is not None:
            is_short = groups <= _SHORT_FEEDBACK_GROUPS
            kernel = f"cache_write_feedback_{'' if is_short else 'long_'}kernel"
        self._launch(
            kernel, (rows, 2 * heads + ceil_div(q_heads, warps), 1), warps * WARP,
            shared_bytes, cache_layer_struct(layer, head_dim), batch_struct(batch), pointer(k),
            pointer(v), rope,
        )

    def attention(self, q: torch.Tensor, layer: CacheLayer, batch: Batch, shape: AttentionShape,
                  out: torch.Tensor, scratch: torch.Tensor,
                  sinks: torch.Tensor | None = None) -> None:
        """See `base.Ops.attention`."""
        assert q.is_contiguous() and out.is_contiguous() and out.shape == q.shape
        assert q.shape[1:] == (shape.num_heads, shape.head_dim)
        assert sinks is None or sinks.shape == (shape.num_heads,)
        rows, pairs = q.shape[0], _bias_pairs(layer)
        if is_generic(shape.head_dim, layer.cache_type):
            shared_bytes = (5 * shape.head_dim + 8 + 3 * pairs) * _FLOAT_BYTES
            self._launch("attention_generic_kernel", (rows, shape.num_heads, 1),
                         _GENERIC_THREADS, shared_bytes,
                         _call(q, layer, batch, shape, out, sinks, 0))
            return
        # Every sequence of a call has a row, so none has more than this.
        most_rows = rows - batch.num_sequences + 1
        if batch.num_sequences > 1 or most_rows <= DECODE_ROWS:
            decoded_rows = min(most_rows, DECODE_ROWS)  # of a sequence, at most
            groups = ceil_div(
                decoded_rows * (shape.num_heads // shape.num_kv_heads), _DECODE_BLOCK_ROWS
            )
            for part in _cut_batch(batch, _MOST_COUNTERS // (groups * shape.num_kv_heads)):
                part_rows = min(rows, part.num_sequences * decoded_rows)
                self._attention_decode(q, layer, part, shape, out, sinks, part_rows, groups,
                                       scratch)
        if most_rows > DECODE_ROWS:
            self._attention_prefill(q, layer, batch, shape, out, sinks, most_rows)

    def _attention_decode(
        self, q: torch.Tensor, layer: CacheLayer, batch: Batch, shape: AttentionShape,
        out: torch.Tensor, sinks: torch.Tensor | None, rows: int, groups: int,
        scratch: torch.Tensor,
    ) -> None:
        """Attend for sequences with up to DECODE_ROWS rows, as many rows as scratch holds.

        Args:
            batch: sequences whose groups of rows have counters.
            rows: most rows of these sequences together.
            groups: groups of rows of a sequence and key/value head.
        """
        max_pages, kv_heads = batch.page_table.shape[1], shape.num_kv_heads
        block = decode_block(
            shape.head_dim, layer.cache_type, self.launcher.shared_limit_bytes,
            _bias_pairs(layer), layer.num_open_pages > 0,
        )
        call = _call(q, layer, batch, shape, out, sinks, block.bias_begin)
        slots = kv_split_slots(
            kv_heads, shape.sliding_window, max_pages, layer.num_open_pages > 0
        )
        held, row_bytes = rows, _row_bytes(shape, slots)
        if row_bytes:
            held = min(rows, (scratch.nbytes - COUNTER_BYTES) // row_bytes)
        assert held > 0, f"attention in {scratch.nbytes} bytes of scratch"
        for first in range(0, rows, held):
            decode = DecodeStruct(
                scratch.data_ptr() + COUNTER_BYTES, scratch.data_ptr(), first, held, slots,
                most_kv_splits(kv_heads), block.units, block.open_warps, block.open_units,
                shape.num_heads // kv_heads, groups,
            )
            self._launch(
                block.kernel, (slots, kv_heads * groups, batch.num_sequences),
                block.warps * WARP, block.shared_bytes, call, decode,
            )

    def _attention_prefill(
        self, q: torch.Tensor, layer: CacheLayer, batch: Batch, shape: AttentionShape,
        out: torch.Tensor, sinks: torch.Tensor | None, max_rows: int,
    ) -> None:
        """Attend for sequences with more than DECODE_ROWS rows.

        Args:
            max_rows: most rows of a sequence.
        """
        head_rows = max_rows * (shape.num_heads // shape.num_kv_heads)
        block = prefill_block(
            shape.head_dim, layer.cache_type, self.launcher.shared_limit_bytes,
            self.launcher.multiprocessors, shape.num_kv_heads, head_rows,
            _bias_pairs(layer), layer.num_open_pages > 0,
        )
        grid = (ceil_div(head_rows, block.rows), shape.num_kv_heads, batch.num_sequences)
        self._launch(block.kernel, grid, block.warps * WARP, block.shared_bytes,
                     _call(q, layer, batch, shape, out, sinks, block.bias_begin))


def _bias_pairs(layer: CacheLayer) -> int:
    """Return the pairs of a layer's key bias; 0 where it has none."""
    return 0 if layer.key_bias is None else layer.key_bias.pairs.shape[1]


def _call(q: torch.Tensor, layer: CacheLayer, batch: Batch, shape: AttentionShape,
          out: torch.Tensor, sinks: torch.Tensor | None, bias_begin: int) -> AttentionStruct:
    return AttentionStruct(
        cache_layer_struct(layer, shape.head_dim), batch_struct(batch), shape_struct(shape),
        key_bias_struct(layer.key_bias, batch), bias_begin, q.data_ptr(), out.data_ptr(),
        address(sinks),
    )


def _cut_batch(batch: Batch, most: int) -> list[Batch]:
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
            open_pages=(
                None if batch.open_pages is None else batch.open_pages[first : first + most]
            ),
        )
        for first in range(0, count, most)
    ]
