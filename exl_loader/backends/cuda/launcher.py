"""What launches compiled kernels: the CUDA driver (`driver.py`), or the tests' emulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Launcher(Protocol):
    """Kernels of one device, by name.

    Attributes:
        multiprocessors: of the device.
        shared_limit_bytes: shared memory that a block may have.
    """

    multiprocessors: int
    shared_limit_bytes: int

    def prepare(
        self, name: str, grid: tuple[int, int, int], block: int, shared_bytes: int, *args: Any
    ) -> Callable[[], None]:
        """Make a launch ready, once, to be run any number of times.

        Args:
            name: of the kernel, `foo_kernel`.
            grid: blocks in x, y and z.
            block: threads, a multiple of 32.
            shared_bytes: dynamic shared memory of a block.
            args: ctypes values (`c_void_p`, `c_int32`, `c_int64`, `c_float`, a `Structure`) of
                exactly the kernel's parameter types. Addresses are not kept alive.

        Returns:
            What puts the launch on the device's current stream. It reads the arguments anew
            each time: changing `arg.value` changes the next launch.
        """

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record the launches that this thread makes in `run`, without running them.

        Args:
            run: makes prepared launches, and does nothing else with the device.

        Returns:
            What launches them all on the device's current stream, with the arguments that they
            had during the recording.

        Raises:
            DeviceError: the launches could not be recorded, perhaps this time only.
            InsufficientMemory: the device has no room for the recording.
        """
