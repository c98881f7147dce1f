"""Launching kernels: what a launcher offers, and the base class of a card's operations."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

Launch = Callable[[], None]
Grid = tuple[int, int, int]

WARP = 32  # threads

# The first bytes of scratch memory are int32 counters for blocks that share a sum: the last block
# to arrive adds the parts. Counters are 0 before and after every operation, because the last
# block resets its own. The rest of an operation's scratch memory follows them.
COUNTER_BYTES = 1 << 16


class Launcher(Protocol):
    """Launches kernels of one device by name: `kernels.DriverLauncher`, or the tests' emulation.

    Attributes:
        multiprocessors: of the device.
        shared_limit_bytes: most shared memory of a block.
    """

    multiprocessors: int
    shared_limit_bytes: int

    def prepare(
        self, name: str, grid: Grid, block: int, shared_bytes: int, *args: Any
    ) -> Launch:
        """Prepare a launch once, to be run any number of times.

        Args:
            name: of the kernel, `foo_kernel`.
            grid: blocks in x, y and z.
            block: threads, a multiple of 32.
            shared_bytes: dynamic shared memory of a block.
            args: ctypes values (`c_void_p`, `c_int32`, `c_int64`, `c_float`, a `Structure`) of
                exactly the kernel's parameter types. Tensors at these addresses are not kept
                alive.

        Returns:
            A function that puts the launch on the device's current stream. It reads the
            arguments again each time: changing `arg.value` changes the next launch.
        """

    def capture(self, run: Callable[[], None]) -> Launch:
        """Record the launches that this thread makes in `run`, without running them.

        Args:
            run: runs prepared launches, and does nothing else with the device.

        Returns:
            A function that launches all of them on the device's current stream, with the
            arguments that they had during the recording.

        Raises:
            DeviceError: the launches could not be recorded; a later try may succeed.
            InsufficientMemory: the device has no room for the recording.
        """


def run_now(launch: Launch) -> None:
    """Run a launch as soon as it is prepared."""
    launch()


class KernelOps:
    """Base class of a card's operations.

    An operation looks at shapes and addresses only and calls `_launch` once for each kernel.

    Args:
        launcher: prepares launches.
        issue: takes each prepared launch in order. It runs the launch, or keeps it for a step
            that is recorded.
    """

    def __init__(self, launcher: Launcher, issue: Callable[[Launch], None] = run_now):
        self.launcher = launcher
        self._issue = issue

    def _launch(self, kernel: str, grid: Grid, block: int, shared_bytes: int, *args: Any) -> None:
        self._issue(self.launcher.prepare(kernel, grid, block, shared_bytes, *args))


def address(tensor: torch.Tensor | None) -> int | None:
    """Return a contiguous tensor's address as a field of a struct; None for None."""
    if tensor is None:
        return None
    assert tensor.is_contiguous(), tensor.shape
    return tensor.data_ptr()


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Return a contiguous tensor's address as an argument of a kernel; null for None."""
    return ctypes.c_void_p(address(tensor))
