"""Scratch memory of each operation, in bytes; integers only, no PyTorch.

`workspace.scratch_bytes` takes the largest for a model. The reference operations need none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..cache import CacheType
    from .interface import AttentionShape


def linear_scratch_bytes(rows: int, in_features: int) -> int:
    """Return what `Ops.linear` needs for `rows` rows of `in_features` inputs."""
    return 0


def write_cache_scratch_bytes(rows: int, shape: AttentionShape, cache_type: CacheType) -> int:
    """Return what `Ops.write_cache` needs for `rows` rows."""
    return 0


def attention_scratch_bytes(
    rows: int, max_batch_size: int, ctx_size: int, shape: AttentionShape, cache_type: CacheType
) -> int:
    """Return what `Ops.attention` needs.

    Args:
        rows: rows of a call, of all its sequences together.
        max_batch_size: sequences of a call.
        ctx_size: tokens of the longest sequence.
    """
    return 0
