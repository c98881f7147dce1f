"""CPU access to a card's tensors: pinned memory, copies both ways, and steps captured as graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ...utils.errors import DeviceError, InsufficientMemory
from ...utils.output import warn
from .backend import ALIGNMENT_BYTES
from .taken import remember_taken

if TYPE_CHECKING:
    import numpy as np

    from .launcher import Launcher



class CardInputs:
    """A step's integers: arrays in one block of main memory, copied to the card as a whole.

    Args:
        host: copies.
        tensors: neighbours in one buffer of the device.
    """

    def __init__(self, host: CardHost, tensors: Mapping[str, torch.Tensor]):
        self._host = host
        self._target, first = _span(tensors)
        self._source = host.pinned(self._target.nbytes).zero_()
        self._sent: Any = None
        self.arrays = {}
        for name, tensor in tensors.items():
            start = tensor.data_ptr() - first
            piece = self._source[start : start + tensor.nbytes].view(tensor.dtype)
            self.arrays[name] = piece.view(tensor.shape).numpy()

    def begin(self) -> None:
        if self._sent is not None:
            self._host.wait(self._sent)

    def send(self) -> None:
        self._target.copy_(self._source, non_blocking=True)
        self._sent = self._host.mark()


def _span(tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Return the bytes from the first of these tensors to the last, and their address."""
    lowest = min(tensors.values(), key=lambda tensor: tensor.data_ptr())
    first = lowest.data_ptr()
    end = max(tensor.data_ptr() + tensor.nbytes for tensor in tensors.values())
    step = ALIGNMENT_BYTES
    held = sum(-(-t.nbytes // step) * step for t in tensors.values())
    storage = lowest.untyped_storage()
    same = all(t.untyped_storage().data_ptr() == storage.data_ptr() for t in tensors.values())
    assert same and end - first <= held, "inputs are no neighbours"
    whole = torch.empty(0, dtype=torch.uint8, device=lowest.device)
    nbytes = end - first
    return whole.set_(storage, first - storage.data_ptr(), (nbytes,), (1,)), first


# Captures of a device in a row that may fail before no step is captured any more.
CAPTURE_TRIES = 8


class CardHost:
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
        # Between cards PyTorch copies on the source's current stream, with events that hold it
        # until the target's stream has come here and the target's until the copy is done. From
        # and to pageable memory the host waits.
        target.copy_(source)

    def capture(self, run: Callable[[], None]) -> Callable[[], None] | None:
        try:
            graph = self._launcher.capture(run)
        except (DeviceError, InsufficientMemory) as error:
            # Another library's call on the device may have spoilt this capture, and it need not
            # spoil the next.
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
        """Return uint8 [nbytes] of the host that the card copies from and to by itself."""
        with torch.cuda.device(self._device):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Any:
        """Note how far the stream has been filled, for `wait`."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, mark: Any) -> None:
        """Wait until the stream has come to a mark."""
        mark.synchronize()
