"""Which attention kernel serves a call, and the shape of its launch. No PyTorch.

Everything here follows from shapes, cache type and the card's shared memory: never from a
sequence's length, so that a launch can be replayed, nor from the batch, so that a row's
result does not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...cache.layout import GROUP, MAX_BIAS_PAIRS, CacheType, code_bytes, num_groups

# Constants of csrc/cuda/attention_decode.cu and attention_prefill.cu.
_UNIT = 16
_MAX_HEAD_DIM = 256
_ROWS = 8
_ROW_DATA_BYTES = 4 * _ROWS * 4 + 16
_FRAGMENT_BYTES = 16
_WARP = 32
_FLOAT_BYTES, _HALF_BYTES = 4, 2
# Padded head_dim -> tokens of a tile.
_DECODE_TILES = {64: 32, 128: 32, 256: 16}
_PREFILL_TILES = {64: 64, 128: 64, 256: 32}
# Padding of a row of halves in shared memory, so that ldmatrix meets no bank twice.
_ROW_PADDING = 8
_WARP_ROWS = 16
# csrc/cuda/key_bias.cuh: pairs of a product, and the bytes of what each has.
_STEP_PAIRS = 8
_FREQUENCY_BYTES = MAX_BIAS_PAIRS * _FLOAT_BYTES
_FACTOR_BYTES = _STEP_PAIRS * 2 * _FLOAT_BYTES
_WAVE_BYTES = _STEP_PAIRS * 4 * _HALF_BYTES


@dataclass(frozen=True)
class DecodePlan:
    """A launch of attention_decode_*_kernel.

    Args:
        kernel: its name.
        warps: of a block.
        units: slots of a warp's ring.
        bias_begin: where BiasMemory begins in shared memory.
        shared_bytes: of a block.
    """

    kernel: str
    warps: int
    units: int
    bias_begin: int
    shared_bytes: int


@dataclass(frozen=True)
class PrefillPlan:
    """A launch of attention_prefill_*_kernel; `rows` query rows a block."""

    kernel: str
    warps: int
    rows: int
    bias_begin: int
    shared_bytes: int


def is_generic(head_dim: int, cache_type: CacheType) -> bool:
    """Whether no kernel with tensor cores takes such heads."""
    wide = max(cache_type.k_bits, cache_type.v_bits) > 16
    return wide or head_dim % _UNIT != 0 or head_dim > _MAX_HEAD_DIM


def _padded(head_dim: int) -> int:
    return next(size for size in _DECODE_TILES if head_dim <= size)


def _token_bytes(head_dim: int, cache_type: CacheType) -> int:
    """Bytes of a token's codes and scales, keys or values, whichever are more."""
    return max(
        code_bytes(head_dim, bits) + _HALF_BYTES * num_groups(head_dim, bits)
        for bits in (cache_type.k_bits, cache_type.v_bits)
    )


def bias_bytes(pairs: int, tile: int, rows: int) -> int:
    """Return the shared memory of BiasMemory.

    Args:
        pairs: of a key/value head. tile: tokens. rows: of a block, a multiple of 8.
    """
    if pairs == 0:
        return 0
    steps = -(-pairs // _STEP_PAIRS)
    per_step = rows * _FACTOR_BYTES + tile * _WAVE_BYTES
    return _FREQUENCY_BYTES + rows * _FLOAT_BYTES + steps * per_step


def decode_plan(
    head_dim: int, cache_type: CacheType, shared_limit_bytes: int, bias_pairs: int = 0
) -> DecodePlan:
    """Choose the ring: as much under way as leaves room for two blocks, if it can be.

    Args:
        head_dim: not `is_generic`.
        shared_limit_bytes: what a block may have on the card.
        bias_pairs: of the layer's key bias.
    """
    padded = head_dim if head_dim in _DECODE_TILES else _padded(max(head_dim, 65))
    tile = _DECODE_TILES[padded]
    fixed = padded // GROUP * _WARP * _FRAGMENT_BYTES + _ROWS * padded * _FLOAT_BYTES
    fixed += _ROW_DATA_BYTES
    merge = (padded // 4 + 4) * _WARP * _FLOAT_BYTES
    bias = bias_bytes(bias_pairs, tile, _ROWS)

    def before_bias(warps: int, units: int) -> int:
        ring = warps * units * tile * _token_bytes(head_dim, cache_type)
        return fixed + max(ring, warps // 2 * merge)

    half = shared_limit_bytes // 2
    choices = ((8, 4, half), (8, 2, half), (8, 2, shared_limit_bytes), (8, 1, shared_limit_bytes),
               (4, 2, shared_limit_bytes), (4, 1, shared_limit_bytes))
    for warps, units, limit in choices:
        begin = before_bias(warps, units)
        if begin + bias <= limit:
            # Kernels for heads of one length know their strides when they are compiled.
            name = str(head_dim) if head_dim == padded else f"up_to_{padded}"
            return DecodePlan(
                f"attention_decode_{name}_kernel", warps, units, begin, begin + bias
            )
    raise AssertionError(f"{shared_limit_bytes} bytes of shared memory")


def prefill_plan(
    head_dim: int, cache_type: CacheType, shared_limit_bytes: int, multiprocessors: int,
    num_kv_heads: int, rows: int, bias_pairs: int = 0,
) -> PrefillPlan:
    """Choose how many query rows share a tile of unpacked keys and values.

    More rows unpack less often; fewer make more blocks. A row's result is the same.

    Args:
        head_dim: not `is_generic`.
        rows: query rows of a key/value head, of all its query heads, in the call.
        bias_pairs: of the layer's key bias.
    """
    padded = _padded(head_dim)
    tile = _PREFILL_TILES[padded]
    tile_bytes = tile * (padded + _ROW_PADDING) * _HALF_BYTES
    raw = tile * _token_bytes(head_dim, cache_type)

    def before_bias(warps: int) -> int:
        queries = warps * _WARP_ROWS * (padded + _ROW_PADDING) * _HALF_BYTES
        return max(queries + tile_bytes + raw, warps * 8 * padded * _FLOAT_BYTES)

    for warps in (8, 4, 2, 1):
        blocks = num_kv_heads * -(-rows // (warps * _WARP_ROWS))
        enough = blocks >= 2 * multiprocessors or warps <= 4
        begin = before_bias(warps)
        shared_bytes = begin + bias_bytes(bias_pairs, tile, warps * _WARP_ROWS)
        if shared_bytes <= shared_limit_bytes and enough:
            return PrefillPlan(
                f"attention_prefill_{padded}_kernel", warps, warps * _WARP_ROWS, begin,
                shared_bytes,
            )
    raise AssertionError(f"{shared_limit_bytes} bytes of shared memory")
