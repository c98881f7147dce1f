"""A card that is not there: the engine on `cuda:0`, its kernels emulated on the CPU.

Device memory is main memory, and everything else is as on a card: the table of bytes, the
layouts, the launches, inputs and logits that are copied, decode steps that are captured. What
a captured step does besides launching kernels would be missing from its replay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cuda_targets import emulated_launcher

from exl_loader.devices.cpu import CpuDevice
from exl_loader.kernels.cuda.host import CardHost

DEVICE = "cuda:0"


class EmulatedCard(CpuDevice):
    """Main memory in the place of a card's."""

    taken_by_touch = False
    granularity_bytes = 2 << 20


class CapturingLauncher:
    """Launches at once, or keeps launches while a step is being captured."""

    def __init__(self, launcher: Any):
        self._launcher = launcher
        self.captured: list[Callable[[], None]] | None = None
        self.launches = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._launcher, name)

    def prepare(self, *arguments: Any) -> Callable[[], None]:
        launch = self._launcher.prepare(*arguments)

        def run() -> None:
            self.launches += 1
            if self.captured is None:
                launch()
            else:
                self.captured.append(launch)

        return run


class EmulatedHost(CardHost):
    """Copies as a card's host does; `replays` counts steps that ran as a graph."""

    def __init__(self, launcher: CapturingLauncher):
        super().__init__("cpu")
        self._launcher = launcher
        self.captures_made = 0
        self.replays = 0
        self.waiting = False

    def capture(self, run: Callable[[], None]) -> Callable[[], None] | None:
        self.captures_made += 1
        self._launcher.captured = launches = []
        try:
            run()
        finally:
            self._launcher.captured = None

        def replay() -> None:
            self.replays += 1
            for launch in launches:
                launch()

        return replay

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def mark(self) -> Any:
        return self

    def wait(self, mark: Any) -> None:
        assert mark is self


def emulated_ops(order: str = "forward", seed: int = 1) -> Any:
    """Return a card's operations, their launcher and host emulated."""
    from exl_loader.kernels.cuda.ops import CudaOps

    emulated = emulated_launcher()
    emulated.set_order(order, seed)
    launcher = CapturingLauncher(emulated)
    return CudaOps(launcher, EmulatedHost(launcher))


def install(monkeypatch: Any, ops: Any) -> None:
    """Let `cuda:0` be the emulated card, with these operations."""
    from exl_loader import devices
    from exl_loader.kernels.cuda import ops as cuda_ops

    monkeypatch.setitem(devices.KINDS, "cuda", EmulatedCard())
    monkeypatch.setattr(cuda_ops, "open_ops", lambda index, progress=None: ops)
