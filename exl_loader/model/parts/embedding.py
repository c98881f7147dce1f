"""The token embedding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...formats.common import require_finite
from ...formats.layer import LOAD_THREADS, READ_BYTES
from ...utils.table import TensorSpec
from .linear import Linear
from .lora import LowRank

if TYPE_CHECKING:
    import torch

    from ...backends import base
    from ...backends.base import Ops
    from .part import Loading

# Rows of tables that are read at a time, by all threads of a load together, so that tens of
# megabytes are in flight at most.
EMBEDDING_ROWS = 2048


def load_table(loading: Loading, spec: TensorSpec, offset: int = 0) -> torch.Tensor:
    """Read a table of embeddings in pieces.

    Args:
        loading: where from and where to.
        spec: the table; its name is that of the tensor in the checkpoint.
        offset: rows of that tensor in front of the table.

    Raises:
        InvalidCheckpoint: a value is not finite, or the file shrank.
    """
    name = spec.name
    table = loading.views[name]
    # Few enough to stay in the second level cache until they are checked and copied.
    fitting = READ_BYTES // (table.shape[1] * table.element_size())
    step = max(1, min(EMBEDDING_ROWS // LOAD_THREADS, fitting))
    for first in range(0, table.shape[0], step):
        end = min(first + step, table.shape[0])
        rows = loading.checkpoint.read_rows(name, offset + first, offset + end)
        require_finite(loading.checkpoint.header(name).name, rows)
        table[first:end].copy_(rows)
        loading.advance(rows.numel() * rows.element_size())
    return table


@dataclass(eq=False)
class Embedding:
    """table[ids] * multiplier.

    Args:
        spec: [vocab_size, hidden_size] in the checkpoint's dtype; its name is that of the
            tensor in the checkpoint.
        multiplier: on the table's rows.
        head: the output head where it serves as the table as well; the embedding then has no
            weights of its own.

    Attributes:
        low_ranks: the loaded adapters on the embedding. A step records those that it finds.
    """

    spec: TensorSpec
    multiplier: float
    head: Linear | None = None
    table: torch.Tensor | base.Linear = field(init=False, repr=False)
    low_ranks: list[LowRank] = field(init=False, default_factory=list, repr=False)

    def specs(self) -> Iterator[TensorSpec]:
        """Describe the table as it will be on the device."""
        if self.head is None:
            yield self.spec

    def load(self, loading: Loading) -> None:
        """Read the table, after the head.

        Raises:
            InvalidCheckpoint: a value is not finite, or the file shrank.
        """
        if self.head is not None:
            self.table = self.head.weights
            return
        self.table = load_table(loading, self.spec)

    def run(self, ops: Ops, ids: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> None:
        """Look up ids, int32 [T], into `out`, float32 [T, hidden_size]."""
        ops.embed(ids, self.table, self.multiplier, out)
        for low_rank in self.low_ranks:
            h = low_rank.look_up(ops, ids, self.multiplier)
            low_rank.add(ops, h, out, scratch)
