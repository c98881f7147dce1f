"""Emulated cards: the engine on `cuda:0`, `cuda:1`, ..., on the CPU.

Device memory is main memory, and everything else is as on a card: the table of bytes, the
layouts, the launches, copied inputs and logits, captured decode steps. Work of a captured step
that is no launch would be missing from its replay.

Every card has memory, a launcher and a stream of its own. A launch with an address in another
card's memory is refused when it is prepared. A stream can postpone its work until the
test or the engine waits for it, so that a result that is used without waiting does not exist yet.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from exl_loader.backends.base import Capacity
from exl_loader.backends.cpu.memory import MainMemory
from exl_loader.backends.cuda.backend import CudaBackend
from exl_loader.backends.cuda.cpu_access import CardAccess, CardInputs
from exl_loader.memory.buffers import live_bytes
from exl_loader.utils.errors import DeviceError
from support.targets import emulated_launcher

DEVICE = "cuda:0"


class EmulatedCard(MainMemory, CudaBackend):
    """The backend of emulated cards: main memory, and a record of which card owns it.

    Args:
        sizes: a card's name -> its bytes; other cards have as much as main memory.
    """

    taken_by_touch = False
    granularity_bytes = 2 << 20

    def __init__(self, sizes: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self._sizes = sizes or {}
        self._buffers: weakref.WeakKeyDictionary[Any, tuple[str, int, int]] = (
            weakref.WeakKeyDictionary()
        )

    def capacity(self, device: str) -> Capacity:
        if device not in self._sizes:
            return super().capacity(device)
        held = live_bytes(device)
        return Capacity(self._sizes[device], self._sizes[device] - held, held)

    def empty(self, device: str, nbytes: int) -> tuple[Any, Any]:
        buffer, owner = super().empty(device, nbytes)
        self._buffers[owner] = device, buffer.data_ptr(), nbytes
        return buffer, owner

    def empty_mapped(self, device: str, nbytes: int) -> tuple[Any, Any]:
        # Memory of no card: kernels of every card may read it.
        return MainMemory.empty(self, device, nbytes)

    def owner_of(self, address: int) -> str | None:
        """Return the card that owns an address; None for other main memory."""
        for name, first, nbytes in self._buffers.values():
            if first <= address < first + nbytes:
                return name
        return None


class Stream:
    """The work of a card, in order.

    With `lazy` work is postponed until something waits for it.
    """

    def __init__(self) -> None:
        self.lazy = False
        self._work: deque[Callable[[], Any]] = deque()
        self._issued = self._done = 0

    def add(self, work: Callable[[], Any]) -> None:
        self._work.append(work)
        self._issued += 1
        if not self.lazy:
            self.run_to(self._issued)

    def mark(self) -> int:
        """Return a mark after all work so far."""
        return self._issued

    def run_to(self, mark: int) -> None:
        """Do the work up to a mark."""
        while self._done < mark:
            work = self._work.popleft()
            try:
                work()
            finally:
                self._done += 1


class CapturingLauncher:
    """Launches on a stream, or keeps launches while a step is being captured.

    Args:
        launcher: runs the kernels.
        check: raises for an address of another card.
    """

    def __init__(self, launcher: Any, check: Callable[[str, int], None] | None = None):
        self._launcher = launcher
        self._check = check
        self.stream = Stream()
        self.captured: list[Callable[[], None]] | None = None
        self.launches = 0
        # The number of next captures that fail.
        self.spoilt_captures = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._launcher, name)

    def prepare(self, name: str, grid: Any, block: int, shared_bytes: int,
                *args: Any) -> Callable[[], None]:
        if self._check is not None:
            for address in (address for arg in args for address in _addresses(arg)):
                self._check(name, address)
        launch = self._launcher.prepare(name, grid, block, shared_bytes, *args)

        def run() -> None:
            self.launches += 1
            if self.captured is None:
                self.stream.add(launch)
            else:
                # A graph keeps the arguments that a launch had when it was captured.
                kept = [type(arg).from_buffer_copy(arg) for arg in args]
                self.captured.append(
                    self._launcher.prepare(name, grid, block, shared_bytes, *kept)
                )

        return run

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self.captured = launches = []
        try:
            run()
        finally:
            self.captured = None
        if self.spoilt_captures > 0:
            self.spoilt_captures -= 1
            raise DeviceError("graphics card, cuStreamEndCapture", actual="invalidated (901)")

        def replay() -> None:
            for launch in launches:
                self.stream.add(launch)

        return replay


def _addresses(value: Any) -> Iterator[int]:
    """Yield the addresses in a kernel's argument."""
    if isinstance(value, ctypes.c_void_p):
        if value.value:
            yield value.value
    elif isinstance(value, ctypes.Array):
        for element in value:
            yield from _addresses(element)
    elif isinstance(value, ctypes.Structure):
        for name, kind, *_ in value._fields_:
            field = getattr(value, name)
            yield from _addresses(kind(field) if kind is ctypes.c_void_p else field)


class _OnStream:
    """A device's tensor as the target of copies, which are work of its stream."""

    def __init__(self, stream: Stream, tensor: torch.Tensor):
        self._stream, self._tensor = stream, tensor
        self.nbytes = tensor.nbytes

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> None:
        self._stream.add(partial(self._tensor.copy_, source))


class EmulatedAccess(CardAccess):
    """CPU access to an emulated card; `replays` counts steps that ran as a graph.

    Args:
        launcher: the card's.
        stream_of: returns the stream of the card that owns a tensor; None for other memory.
    """

    def __init__(
        self, launcher: CapturingLauncher,
        stream_of: Callable[[torch.Tensor], Stream | None] = lambda tensor: None,
    ):
        super().__init__("cpu", launcher)
        self._stream_of = stream_of
        self.stream = launcher.stream
        self.captures_made = 0
        self.replays = 0

    def inputs(self, tensors: Mapping[str, torch.Tensor]) -> CardInputs:
        made = CardInputs(self, tensors)
        made._target = _OnStream(self.stream, made._target)
        return made

    def collect(self, tensor: torch.Tensor, mirror: torch.Tensor) -> None:
        self.stream.add(partial(mirror.copy_, tensor))
        self.wait(self.mark())

    def read(self, tensor: torch.Tensor) -> Any:
        self.wait(self.mark())
        return super().read(tensor)

    def write(self, tensor: torch.Tensor, values: Any) -> None:
        self.stream.add(partial(super().write, tensor, values.copy()))

    def receive(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy as PyTorch does between cards: on the source's stream.

        The copy waits for the work of the target's card, and that card waits for the copy.
        """
        copy, sender = partial(super().receive, source, target), self._stream_of(source)
        if sender is None:  # the CPU waits
            self.stream.add(copy)
            self.wait(self.mark())
            return
        sender.add(partial(self.stream.run_to, self.stream.mark()))
        sender.add(copy)
        self.stream.add(partial(sender.run_to, sender.mark()))

    def capture(self, run: Callable[[], None]) -> Callable[[], None] | None:
        self.captures_made += 1
        graph = super().capture(run)
        if graph is None:
            return None

        def replay() -> None:
            self.replays += 1
            graph()

        return replay

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def mark(self) -> Any:
        return self.stream.mark()

    def wait(self, mark: Any) -> None:
        self.stream.run_to(mark)


def emulated_ops(order: str = "forward", seed: int = 1) -> Any:
    """Return a card's operations with an emulated launcher and CPU access."""
    launcher = CapturingLauncher(_launcher(order, seed))
    return _ops(launcher, EmulatedAccess(launcher))


def _launcher(order: str, seed: int) -> Any:
    emulated = emulated_launcher()
    emulated.set_order(order, seed)
    return emulated


def _ops(launcher: CapturingLauncher, access: EmulatedAccess) -> Any:
    from exl_loader.backends.cuda.ops import CudaOps

    return CudaOps(launcher, access)


def install(monkeypatch: Any, ops: Any) -> None:
    """Let `cuda:0` be the emulated card, with these operations."""
    _install(monkeypatch, EmulatedCard(), lambda index, progress=None: ops)


def _install(monkeypatch: Any, cards: EmulatedCard, open_ops: Callable[..., Any]) -> None:
    from exl_loader.backends import BACKENDS
    from exl_loader.backends.cuda import ops as cuda_ops

    monkeypatch.setitem(BACKENDS, "cuda", cards)
    monkeypatch.setattr(cuda_ops, "open_ops", open_ops)


class EmulatedCards:
    """Several cards.

    Args:
        count: how many.
        sizes: see `EmulatedCard`.

    Attributes:
        ops: each card's operations, by name.
    """

    def __init__(self, count: int, sizes: Mapping[str, int] | None = None) -> None:
        self.memory = EmulatedCard(sizes)
        self.ops: dict[str, Any] = {}
        for name in (f"cuda:{index}" for index in range(count)):
            launcher = CapturingLauncher(_launcher("forward", 1), partial(self._check, name))
            self.ops[name] = _ops(launcher, EmulatedAccess(launcher, self._stream_of))

    def install(self, monkeypatch: Any) -> None:
        """Let `cuda:0` and so on be these cards."""
        _install(monkeypatch, self.memory, self._open)

    def accesses(self) -> list[EmulatedAccess]:
        """Return the CPU access of each card, in order."""
        return [ops.cpu_access for ops in self.ops.values()]

    def _open(self, index: int, progress: Any = None) -> Any:
        if f"cuda:{index}" not in self.ops:
            raise DeviceError("graphics card, cuDeviceGet", actual="invalid device ordinal (101)")
        return self.ops[f"cuda:{index}"]

    def _stream_of(self, tensor: torch.Tensor) -> Stream | None:
        owner = self.memory.owner_of(tensor.data_ptr())
        return None if owner is None else self.ops[owner].cpu_access.stream

    def _check(self, card: str, kernel: str, address: int) -> None:
        owner = self.memory.owner_of(address)
        assert owner in (None, card), f"{kernel} on {card} is given memory of {owner}"
