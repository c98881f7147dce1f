"""What `doctor` says of CUDA: driver, compilers, and kernels for the cards that are there."""

from __future__ import annotations

from typing import Any

from ..errors import ExlLoaderError
from ..kernels.cuda.arch import arch_name, check_capability
from ..kernels.cuda.driver import driver_release
from ..kernels.cuda.spec import cuda_spec
from ..kernels.cuda.toolchain import KINDS, find_cuda_compilers
from ..kernels.store import find_entry


def examine_cuda(gpus: list[dict[str, Any]]) -> tuple[dict[str, Any], list[ExlLoaderError]]:
    """Look at what CUDA kernels need; compiles nothing.

    Args:
        gpus: of `doctor.find_gpus`.

    Returns:
        Findings (`driver`, `compilers`, `kernels`), and what is wrong: only a machine with a
        card misses anything.
    """
    errors: list[ExlLoaderError] = []
    driver = driver_release()
    compilers: list[dict[str, str]] = []
    try:
        compilers = [
            {"kind": found.compiler.kind, "version": found.compiler.version,
             "path": str(found.path)}
            for found in find_cuda_compilers()
        ]
    except ExlLoaderError as error:
        errors.append(error)
    kernels = []
    for gpu in {gpu["compute_capability"]: gpu for gpu in gpus}.values():
        try:
            kernels.append(_kernels_for(gpu, driver))
        except ExlLoaderError as error:
            errors.append(error)
    return {
        "driver": None if driver is None else f"{driver[0]}.{driver[1]}",
        "compilers": compilers,
        "kernels": kernels,
    }, errors


def _kernels_for(gpu: dict[str, Any], driver: tuple[int, int] | None) -> dict[str, Any]:
    """Which compiler serves a card, and whether its work is done already.

    Raises:
        KernelBuildError: the card is too old, or nothing compiles for it.
    """
    major, minor = map(int, gpu["compute_capability"].split("."))
    check_capability((major, minor), gpu["name"])
    spec = cuda_spec((major, minor), driver=driver)
    entry = find_entry(spec)
    return {
        "arch": arch_name((major, minor)),
        "compiler": spec.compiler.version,
        "current": None if entry is None else str(entry.directory),
    }


def cuda_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The findings as lines of name and value."""
    rows = [("CUDA driver", report["driver"] or "none")]
    first: dict[str, str] = {}
    for found in report["compilers"]:
        first.setdefault(found["kind"], f"{found['version']}, {found['path']}")
    rows += [(kind, first.get(kind, "none")) for kind in KINDS]
    for kernels in report["kernels"]:
        ahead = f"not compiled yet (first load, or: exl_loader build --cuda-arch {kernels['arch']})"
        rows.append((f"for {kernels['arch']}", kernels["current"] or ahead))
    return rows
