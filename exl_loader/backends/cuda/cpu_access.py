"""CPU access to a card's tensors: pinned memory, copies both ways, and steps captured as graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ...utils.errors import DeviceError, InsufficientMemory
from ...utils.integers import round_up
from ...utils.output import warn
from .backend import ALIGNMENT_BYTES
from .taken import remember_taken

if TYPE_CHECKING:
    import numpy as np

    from .launcher import Launcher

# Captures of a device in a row that may fail before steps are no longer captured.
CAPTURE_TRIES = 8


class CardInputs:
    """A step's integers: arrays in one block of main memory, copied to the card as a whole.

    Args:
        access: of the card.
        tensors: neighbours in one buffer of the device.
    """

    def __init__(self, access: CardAccess, tensors: Mapping[str, torch.Tensor]):
        self._access = access
        self._target, first = _span(tensors)
        self._source = access.pinned(self._target.nbytes).zero_()
        self._sent: Any = None
        self.arrays = {}
        for name, tensor in tensors.items():
            start = tensor.data_ptr() - first
            piece = self._source[start : start + tensor.nbytes].view(tensor.dtype)
            self.arrays[name] = piece.view(tensor.shape).numpy()

    def begin(self) -> None:
        if self._sent is not None:
            self._access.wait(self._sent)

    def send(self) -> None:
        self._target.copy_(self._source, non_blocking=True)
        self._sent = self._access.mark()


def _span(tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Return the bytes from the first of these tensors to the last, and their address.

    They are one run of a buffer, with nothing but alignment between the tensors.
    """
    lowest = min(tensors.values(), key=lambda tensor: tensor.data_ptr())
    first = lowest.data_ptr()
    end = max(tensor.data_ptr() + tensor.nbytes for tensor in tensors.values())
    held = sum(round_up(tensor.nbytes, ALIGNMENT_BYTES) for tensor in tensors.values())
    storage = lowest.untyped_storage()
    same = all(t.untyped_storage().data_ptr() == storage.data_ptr() for t in tensors.values())
    assert same and end - first <= held, "inputs are not neighbours"
    whole = torch.empty(0, dtype=torch.uint8, device=lowest.device)
    nbytes = end - first
    return whole.set_(storage, first - storage.data_ptr(), (nbytes,), (1,)), first


class CardAccess:
    """`CpuAccess` of one card, through PyTorch's current stream.

    Args:
        device: such as `cuda:0`.
        launcher: of that card.
    """

    captures = True

    def __init__(self, device: str, launcher: Launcher):
        self._device = torch.device(device)
        self._launcher = launcher
        self._failures = 0

    def inputs(self, tensors: Mapping[str, torch.Tensor]) -> CardInputs:
        return CardInputs(self, tensors)

    def mirror(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.pinned(tensor.nbytes).view(tensor.dtype).view(tensor.shape)

    def collect(self, tensor: torch.Tensor, mirror: torch.Tensor) -> None:
        mirror.copy_(tensor, non_blocking=True)
        self.wait(self.mark())

    def read(self, tensor: torch.Tensor) -> np.ndarray[Any, Any]:
        values: np.ndarray[Any, Any] = tensor.cpu().numpy()
        return values

    def write(self, tensor: torch.Tensor, values: np.ndarray[Any, Any]) -> None:
        tensor.copy_(torch.from_numpy(values).to(tensor.dtype))

    def finish(self) -> None:
        self.wait(self.mark())

    def receive(self, source: torch.Tensor, target: torch.Tensor) -> None:
        # Between cards PyTorch copies on the source's current stream. An event holds that stream
        # until the target's stream has reached this point, and another holds the target's stream
        # until the copy is done. For copies from and to pageable memory the CPU waits.
        target.copy_(source)

    def capture(self, run: Callable[[], None]) -> Callable[[], None] | None:
        try:
            graph = self._launcher.capture(run)
        except (DeviceError, InsufficientMemory) as error:
            # Another library's call on the device may have spoilt this capture only.
            self._failures += 1
            self.captures = self._failures < CAPTURE_TRIES
            if not self.captures:
                warn(
                    "Steps are not captured as graphs, and decoding is slower: "
                    f"{self._failures} captures in a row failed, the last with: {error}"
                )
            return None
        self._failures = 0
        remember_taken(str(self._device))
        return graph

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Return uint8 [nbytes] of pinned main memory, which the card copies by itself."""
        with torch.cuda.device(self._device):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Any:
        """Return a mark after everything that the stream was given, for `wait`."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, mark: Any) -> None:
        """Wait until the stream has reached a mark."""
        mark.synchronize()
