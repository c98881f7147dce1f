"""How the host gets at what operations read and write: at once, or over a device's copies.

A step has a few integers that the host writes and logits that it reads. On the CPU they lie in
the workspace and are used where they lie; `cuda/host.py` copies them to and from a card, all
of a step's integers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch


class Inputs(Protocol):
    """What the host writes before a step: `arrays` by name, in the tensors' shapes."""

    arrays: dict[str, np.ndarray[Any, Any]]

    def begin(self) -> None:
        """Wait until the arrays may be written: until the step before has read its own."""

    def send(self) -> None:
        """Let the operations that are issued from now on see the arrays."""


class Host(Protocol):
    """The host's side of a device. `captures`: whether `capture` may succeed."""

    captures: bool

    def inputs(self, tensors: Mapping[str, torch.Tensor]) -> Inputs:
        """Give the host arrays for these tensors, neighbours in one buffer."""

    def mirror(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the same shape on the CPU, for `collect`; maybe the same."""

    def collect(self, tensor: torch.Tensor, mirror: torch.Tensor) -> None:
        """Wait for a tensor's operations and bring it over into (a part of) its mirror."""

    def read(self, tensor: torch.Tensor) -> np.ndarray[Any, Any]:
        """Wait for a tensor's operations and return its values, valid until the next read."""

    def write(self, tensor: torch.Tensor, values: np.ndarray[Any, Any]) -> None:
        """Set a tensor, before operations that are issued from now on."""

    def finish(self) -> None:
        """Wait for everything that this thread has issued.

        Operations that another thread issues afterwards, on whatever stream, see the results.
        """

    def receive(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy a tensor of another device's into one of this device's.

        On both devices the copy comes behind what was issued before, and before what is issued
        from now on.
        """

    def capture(self, run: Callable[[], None]) -> Callable[[], None] | None:
        """Record the operations that `run` issues, without running them.

        Returns:
            What runs them all, as often as wanted. None where it did not succeed this time;
            while `captures` is true, it may the next time.
        """


class _SharedInputs:
    """Arrays that are the tensors."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        # Through numpy: a tenth of torch's overhead.
        self.arrays = {name: tensor.numpy() for name, tensor in tensors.items()}

    def begin(self) -> None:
        return

    def send(self) -> None:
        return


class SharedMemory:
    """Host and operations use the same memory, and an operation has run when it returns."""

    captures = False

    def inputs(self, tensors: Mapping[str, torch.Tensor]) -> Inputs:
        return _SharedInputs(tensors)

    def mirror(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def collect(self, tensor: torch.Tensor, mirror: torch.Tensor) -> None:
        return

    def read(self, tensor: torch.Tensor) -> np.ndarray[Any, Any]:
        values: np.ndarray[Any, Any] = tensor.numpy()
        return values

    def write(self, tensor: torch.Tensor, values: np.ndarray[Any, Any]) -> None:
        tensor.numpy()[...] = values

    def finish(self) -> None:
        return

    def receive(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)

    def capture(self, run: Callable[[], None]) -> Callable[[], None] | None:
        return None


_SHARED = SharedMemory()


def host_of(ops: object) -> Host:
    """Return how the host gets at what these operations use: their `host`, or its own memory."""
    return getattr(ops, "host", _SHARED)
