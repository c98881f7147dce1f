"""From a card to a launcher: choose a compiler, build where needed, load."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from ...utils.progress import Progress
from ..build.build import build_entry
from .arch import check_capability
from .driver import LIBRARY, Driver, DriverLauncher, driver_release
from .spec import cuda_spec


def open_launcher(
    device_index: int,
    stream: Callable[[], int],
    progress: Progress | None = None,
    environ: Mapping[str, str] = os.environ,
    library: str = LIBRARY,
) -> DriverLauncher:
    """Build the CUDA kernels for a card where that was not done yet, and load them.

    Args:
        device_index: of the card, as PyTorch counts.
        stream: returns the handle of the stream to launch on, of the moment.
        progress: shows compiling.
        environ: see `toolchain.find_cuda_compilers` and `build.build_entry`.
        library: the driver's.

    Raises:
        DeviceError: no driver or no such card.
        KernelBuildError: the card is too old, or its kernels cannot be compiled.
        InsufficientMemory: the card has no room for the kernels.
    """
    driver = Driver(library)
    capability = driver.capability(device_index)
    check_capability(capability, f"cuda:{device_index}")
    spec = cuda_spec(capability, environ=environ, driver=driver_release(library))
    entry = build_entry(spec, progress, environ)
    return DriverLauncher(entry, device_index, stream, driver)
