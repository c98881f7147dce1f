"""Attention over the packed cache and cache writing, by the reference definitions."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from . import reference_cache

if TYPE_CHECKING:
    import torch

    from ..cache import CacheLayer
    from .interface import AttentionShape, Batch


class AttentionOps:
    """`write_cache` and `attention` of `interface.Ops`."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def write_cache(self, k: torch.Tensor, v: torch.Tensor, layer: CacheLayer, batch: Batch,
                    scratch: torch.Tensor) -> None:
        reference_cache.write_cache(k, v, layer, batch)

    def attention(self, q: torch.Tensor, layer: CacheLayer, batch: Batch,
                  shape: AttentionShape, out: torch.Tensor, scratch: torch.Tensor) -> None:
        reference_cache.attention(q, layer, batch, shape, out)
