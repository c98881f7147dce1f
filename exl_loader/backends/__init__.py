"""The operations of a forward pass: compiled for this machine, or the reference."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.errors import InvalidSettings, KernelBuildError
from ..utils.warn import warn

if TYPE_CHECKING:
    from ..utils.progress import Progress
    from .base import Ops

REFERENCE_ENV = "EXL_LOADER_REFERENCE"

_warned = False


def get_ops(
    device: str = "cpu", progress: Progress | None = None, force_reference: bool = False
) -> Ops:
    """Return the operations of a device, compiling its kernels where that was not done yet.

    On the CPU without a C++ compiler the reference operations serve, and one warning a
    process says what to install.

    Args:
        device: `cpu`, or a card: `cuda:0`.
        progress: shows compiling, as units done of all.
        force_reference: take the reference operations; so does EXL_LOADER_REFERENCE=1.

    Raises:
        InvalidSettings: there are no kernels for this kind of device, or the reference
            operations are asked for on a card.
        KernelBuildError: the kernels do not compile or do not open.
        DeviceError: the card cannot be used.
    """
    reference = force_reference or os.environ.get(REFERENCE_ENV, "") not in ("", "0")
    kind, _, index = device.partition(":")
    if kind == "cuda" and (not index or index.isdigit()) and not reference:
        from .cuda.ops import open_ops

        return open_ops(int(index or 0), progress)
    if device != "cpu":
        raise InvalidSettings(
            f"kernels for device {device!r}",
            expected="cpu for the reference operations" if reference else "cpu or cuda:0, ...",
        )
    if reference:
        return _reference()
    library = open_library(progress)
    if library is None:
        return _reference()
    from .cpu.ops import CompiledOps, missing_symbols

    if missing_symbols(library):
        # Another program's library under the name of ours, or a linker that kept nothing.
        _close(library)
        library = open_library(progress, anew=True)
        missing = missing_symbols(library) if library is not None else []
        if library is None or missing:
            raise KernelBuildError(
                "compiled kernels", expected="every function that the engine calls",
                actual=f"a library without {', '.join(missing) or 'any'}, compiled twice",
                remedy="Choose another compiler: set CXX to g++ or clang++",
            )
    return CompiledOps(library)


def open_library(
    progress: Progress | None = None, *, anew: bool = False
) -> ctypes.CDLL | None:
    """Build and open the CPU kernels; None, and a warning, where there is no compiler.

    Args:
        progress: shows compiling.
        anew: discard what was built before.

    Raises:
        KernelBuildError: the kernels do not compile or do not open.
    """
    from .build.build import build
    from .build.spec import cpu_spec
    from .build.store import discard

    spec = cpu_spec()
    if spec is None:
        _warn_of_reference()
        return None
    library = build(spec, progress)
    if anew:
        discard(library)
        return _open(build(spec, progress))
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        # Whole, but not for this system (a folder shared by machines, say): once anew.
        discard(library)
        return _open(build(spec, progress))


def _close(library: ctypes.CDLL) -> None:
    """Unload a library: the system would return it once more for the same path."""
    import _ctypes

    # Any: each system has one of the two.
    functions: Any = _ctypes
    close = functions.FreeLibrary if os.name == "nt" else functions.dlclose
    close(library._handle)


def _open(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelBuildError(
            f"compiled kernels {library}",
            actual=f"cannot be opened: {error}",
            remedy="If that folder is on a file system mounted noexec, set "
            "EXL_LOADER_CACHE_DIR to one that is not",
        ) from error


def _reference() -> Ops:
    from .reference.ops import ReferenceOps

    return ReferenceOps()


def _warn_of_reference() -> None:
    global _warned
    from .build.toolchain import compiler_remedy

    if not _warned:
        _warned = True
        warn(
            "No C++ compiler was found, so slow reference operations are used. "
            f"{compiler_remedy()}."
        )
