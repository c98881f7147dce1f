"""What `doctor` says of CUDA: driver, compilers, and kernels for the cards that are there."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

from ..backends.build.store import find_entry
from ..backends.cuda.arch import arch_name, check_capability
from ..backends.cuda.driver import driver_release
from ..backends.cuda.spec import cuda_spec
from ..backends.cuda.toolchain import KINDS, find_cuda_compilers
from ..utils.errors import DeviceError, ExlLoaderError

# Importing PyTorch and making a context take seconds, and a driver in trouble may not answer.
_CHECK_SECONDS = 120


def examine_cuda(gpus: list[dict[str, Any]]) -> tuple[dict[str, Any], list[ExlLoaderError]]:
    """Look at what CUDA kernels need; compiles nothing.

    Args:
        gpus: of `doctor.find_gpus`.

    Returns:
        Findings (`driver`, `compilers`, `kernels`, `checks`), and what is wrong: only a machine
        with a card misses anything.
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
    """Let every card whose kernels are compiled compute something, see `check_cards`.

    Raises:
        DeviceError: the check did not come to its end.
    """
    command = [sys.executable, "-m", "exl_loader.commands.check_cards"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace",
            timeout=_CHECK_SECONDS, check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        words = str(getattr(error, "stderr", None) or error).strip().splitlines()
        raise DeviceError(
            "check of the cards' kernels", actual=words[-1] if words else str(error),
            remedy="Update NVIDIA's driver, or run on the CPU: device='cpu'",
        ) from error
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


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
    for check in report["checks"]:
        good = f"kernels compute what they should, opened in {check.get('milliseconds')} ms"
        rows.append((check["card"], check.get("actual") or good))
    return rows
