"""A vector of a layer that is no norm: attention sinks, or the correction of a router."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...utils.table import TensorSpec

if TYPE_CHECKING:
    import torch

    from .part import Loading


@dataclass(eq=False)
class Vector:
    """A float32 tensor that operations take as it is stored.

    Args:
        spec: float32 [n], with the name of the tensor in the checkpoint, [n] or [1, n].
    """

    spec: TensorSpec
    values: torch.Tensor = field(init=False, repr=False)

    def specs(self) -> Iterator[TensorSpec]:
        """Describe the tensor as it will be on the device."""
        yield self.spec

    def load(self, loading: Loading) -> None:
        """Read the values.

        Raises:
            InvalidCheckpoint: a value is not finite, or the file shrank.
        """
        self.values = loading.views[self.spec.name]
        self.values.copy_(loading.read_floats(self.spec.name).flatten())
        loading.advance(self.spec.nbytes)
