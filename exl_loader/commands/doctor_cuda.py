"""The part of `doctor` about CUDA: driver, compilers, and the kernels of this machine's cards."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

from ..backends.build.store import find_entry
from ..backends.cuda.arch import arch_name, check_capability
from ..backends.cuda.compilers import KINDS, cuda_spec, find_cuda_compilers
from ..backends.cuda.driver import driver_release
from ..utils.errors import DeviceError, ExlLoaderError

# Importing PyTorch and creating a context take seconds, and a broken driver may not answer.
_CHECK_SECONDS = 120


def examine_cuda(gpus: list[dict[str, Any]]) -> tuple[dict[str, Any], list[ExlLoaderError]]:
    """Examine what CUDA kernels need. Nothing is compiled.

    Args:
        gpus: from `doctor.find_gpus`.

    Returns:
        A report (`driver`, `compilers`, `kernels`, `checks`), and the problems. Without a card
        nothing is missing.
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
    checks = []
    compiled = any(found["current"] is not None for found in kernels)
    if compiled and importlib.util.find_spec("torch") is not None:
        try:
            checks = _check_cards()
        except DeviceError as error:
            errors.append(error)
    errors += [
        DeviceError(found["thing"], actual=found["actual"], remedy=found["remedy"])
        for found in checks if "thing" in found
    ]
    return {
        "driver": None if driver is None else f"{driver[0]}.{driver[1]}",
        "compilers": compilers,
        "kernels": kernels,
        "checks": checks,
    }, errors


def _check_cards() -> list[dict[str, Any]]:
    """Check the kernels of every card for which they are compiled; see `check_cards`.

    Raises:
        DeviceError: the check failed or did not finish in time.
    """
    command = [sys.executable, "-m", "exl_loader.commands.check_cards"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace",
            timeout=_CHECK_SECONDS, check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
        raise DeviceError(
            "the check of the CUDA kernels", actual=lines[-1] if lines else str(error),
            remedy="Update NVIDIA's driver, or run on the CPU: device='cpu'",
        ) from error
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _kernels_for(gpu: dict[str, Any], driver: tuple[int, int] | None) -> dict[str, Any]:
    """Report a card's compiler and its compiled kernels.

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
    """Return the report as rows of name and value."""
    rows = [("CUDA driver", report["driver"] or "none")]
    first: dict[str, str] = {}
    for found in report["compilers"]:
        first.setdefault(found["kind"], f"{found['version']}, {found['path']}")
    rows += [(kind, first.get(kind, "none")) for kind in KINDS]
    for kernels in report["kernels"]:
        current = kernels["current"] or (
            "not compiled yet (the first load compiles them, or: exl_loader build --cuda-arch "
            f"{kernels['arch']})"
        )
        rows.append((f"for {kernels['arch']}", current))
    for check in report["checks"]:
        good = f"kernels checked, opened in {check.get('milliseconds')} ms"
        rows.append((check["card"], check.get("actual") or good))
    return rows
