"""A low-rank adapter (LoRA) on a linear layer or on the embedding: out += (x @ A) @ B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ...backends import base
    from ...backends.base import Ops


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrices of one adapter on one part, on the part's device.

    A step first makes h, float32 [T, rank], and adds its product to the part's output later.

    Args:
        a: A as a linear layer from in_features to rank. For an embedding, a layer from rank to
            vocab_size whose columns are looked up by ids, as those of a tied head are.
        b: B as a linear layer from rank to out_features, with the adapter's scale in it.
        room: float32 [n], for h; the adapter's parts on a device share it.
    """

    a: base.Linear
    b: base.Linear
    room: torch.Tensor

    def project(self, ops: Ops, x: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
        """Return h = x @ A; x is float32 [T, in_features]."""
        h = self._h(x.shape[0])
        ops.linear(x, self.a, h, scratch)
        return h

    def look_up(self, ops: Ops, ids: torch.Tensor, factor: float) -> torch.Tensor:
        """Return h = A[ids] * factor; ids is int32 [T]."""
        h = self._h(ids.shape[0])
        ops.embed(ids, self.a, factor, h)
        return h

    def add(self, ops: Ops, h: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> None:
        """out += h @ B, float32 [T, out_features]."""
        ops.linear(h, self.b, out, scratch, True)

    def _h(self, rows: int) -> torch.Tensor:
        rank = self.b.in_features
        return self.room[: rows * rank].view(rows, rank)
