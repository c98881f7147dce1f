"""Build and open the CPU operations; without a compiler, use the reference."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

from ...utils.errors import KernelBuildError
from ...utils.output import warn
from ...utils.system.libraries import close_library

if TYPE_CHECKING:
    from ...utils.progress import Progress
    from ..base import DeviceOps

_warned = False


def open_compiled(progress: Progress | None = None) -> DeviceOps:
    """Return the compiled operations. Without a compiler, warn and return the reference.

    Raises:
        KernelBuildError: the kernels do not compile or do not open.
    """
    library = open_library(progress)
    if library is None:
        return reference()
    from .amx import use_amx
    from .ops import CpuOps, missing_symbols

    if missing_symbols(library):
        # Another program's library has the name of ours, or the linker removed the functions.
        close_library(library)
        library = open_library(progress, rebuild=True)
        missing = missing_symbols(library) if library is not None else []
        if library is None or missing:
            raise KernelBuildError(
                "compiled kernels", expected="every function that the engine calls",
                actual=f"a library without {', '.join(missing) or 'any'}, compiled twice",
                remedy="Choose another compiler: set CXX to g++ or clang++",
            )
    ops = CpuOps(library)
    use_amx(ops)
    return ops


def reference() -> DeviceOps:
    """Return the reference operations."""
    from ..reference.ops import ReferenceOps

    return ReferenceOps()


def open_library(
    progress: Progress | None = None, *, rebuild: bool = False
) -> ctypes.CDLL | None:
    """Build and open the CPU kernels. Without a compiler, warn and return None.

    Args:
        progress: shows the compilation.
        rebuild: discard the library that was built before.

    Raises:
        KernelBuildError: the kernels do not compile or do not open.
    """
    from ..build.build import build
    from ..build.spec import cpu_spec
    from ..build.store import discard

    spec = cpu_spec()
    if spec is None:
        _warn_of_reference()
        return None
    library = build(spec, progress)
    if rebuild:
        discard(library)
        return _open(build(spec, progress))
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        # Complete, but for another system (machines may share a folder): build it once more.
        discard(library)
        return _open(build(spec, progress))


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


def _warn_of_reference() -> None:
    global _warned
    from ..build.toolchain import compiler_remedy

    if not _warned:
        _warned = True
        warn(
            "No C++ compiler was found, so slow reference operations are used. "
            f"{compiler_remedy()}."
        )
