"""The RMS norm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...formats.common import require_finite
from ...utils.table import TensorSpec

if TYPE_CHECKING:
    import torch

    from ...backends.base import Ops
    from .part import Loading


@dataclass(eq=False)
class Norm:
    """x / sqrt(mean(x^2) + eps) * (stored weight + offset).

    Args:
        spec: float32 [size]; its name is that of the tensor in the checkpoint.
        eps: of the config.
        offset: added to the stored weight when it is read. Gemma stores weight - 1.
    """

    spec: TensorSpec
    eps: float
    offset: float
    weight: torch.Tensor = field(init=False, repr=False)

    def specs(self) -> Iterator[TensorSpec]:
        """Describe the weight as it will be on the device."""
        yield self.spec

    def load(self, loading: Loading) -> None:
        """Read the weight.

        Raises:
            InvalidCheckpoint: a value is not finite, or the file shrank.
        """
        stored = loading.checkpoint.read(self.spec.name)
        require_finite(self.spec.name, stored)
        self.weight = loading.views[self.spec.name]
        self.weight.copy_(stored.float() + self.offset)
        loading.advance(self.spec.nbytes)

    def run(self, ops: Ops, x: torch.Tensor, out: torch.Tensor) -> None:
        """Normalise the rows of x, float32 [R, size]; `out` may be x."""
        ops.rms_norm(x, self.weight, self.eps, out)
