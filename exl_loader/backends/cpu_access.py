"""CPU access to the tensors of a device: in place on the CPU, by copies on a card.

A step has a few integers that the CPU writes and logits that it reads. On the CPU they are in
the workspace and used in place; `cuda/cpu_access.py` copies them to and from a card, all
integers of a step at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    Array = npt.NDArray[np.generic]


class Inputs(Protocol):
    """What the CPU writes before a step: `arrays` by name, in the tensors' shapes."""

    arrays: dict[str, Array]

    def begin(self) -> None:
        """Wait until the arrays may be written: until the step before has read its own."""

    def send(self) -> None:
        """Let the operations that are issued from now on see the arrays."""


class CpuAccess(Protocol):
    """CPU access to the tensors of one device."""

    captures: bool
    """Whether `capture` may succeed."""

    def inputs(self, tensors: Mapping[str, torch.Tensor]) -> Inputs:
        """Return arrays for these tensors, which are neighbours in one buffer."""

    def mirror(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a CPU tensor of the same shape, for `collect`; the same tensor where it can be."""

    def collect(self, tensor: torch.Tensor, mirror: torch.Tensor) -> None:
        """Wait for a tensor's operations and copy it into (a part of) its mirror."""

    def read(self, tensor: torch.Tensor) -> Array:
        """Wait for a tensor's operations and return its values, valid until the next read."""

    def write(self, tensor: torch.Tensor, values: Array) -> None:
        """Set a tensor, before operations that are issued from now on."""

    def finish(self) -> None:
        """Wait for everything that this thread has issued.

        Operations that another thread issues afterwards, on whatever stream, see the results.
        """

    def receive(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy a tensor of another device's into one of this device's.

        On both devices the copy runs after what was issued before, and before what is issued
        from now on.
        """

    def capture(self, run: Callable[[], None]) -> Callable[[], None] | None:
        """Record the operations that `run` issues, without running them.

        Returns:
            What runs them all, as often as wanted. None where it did not succeed this time;
            while `captures` is true, it may the next time.
        """


class _InPlaceInputs:
    """Arrays that are the tensors."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        # Through numpy: a tenth of torch's overhead.
        self.arrays = {name: tensor.numpy() for name, tensor in tensors.items()}

    def begin(self) -> None:
        return

    def send(self) -> None:
        return


class InPlaceAccess:
    """CPU and operations use the same memory, and an operation has run when it returns."""

    captures = False

    def inputs(self, tensors: Mapping[str, torch.Tensor]) -> Inputs:
        return _InPlaceInputs(tensors)

    def mirror(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def collect(self, tensor: torch.Tensor, mirror: torch.Tensor) -> None:
        return

    def read(self, tensor: torch.Tensor) -> Array:
        values: Array = tensor.numpy()
        return values

    def write(self, tensor: torch.Tensor, values: Array) -> None:
        tensor.numpy()[...] = values

    def finish(self) -> None:
        return

    def receive(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)

    def capture(self, run: Callable[[], None]) -> Callable[[], None] | None:
        return None
