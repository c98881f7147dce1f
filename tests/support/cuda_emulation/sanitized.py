"""Run tests with kernels built under AddressSanitizer and UBSan, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from exl_loader.backends.build.toolchain import find_compiler
from support import exhaustive

from .launcher import REPO, SANITIZE_ENV

RUNTIMES = ("libasan.so", "libubsan.so")

# Of a process that a sanitizer ended; pytest has its own up to 5.
EXIT_CODE = 99

# For tests of all kernels: the first one compiles them, which takes a busy machine longer than the
# ten minutes that a test usually has.
_LIMIT_S = 1800
compiles_all = pytest.mark.timeout(_LIMIT_S)

# Of a test's cases the first runs, and one in so many of the others.
ONE_IN = 12


@lru_cache
def runtimes() -> tuple[str, ...]:
    """Paths of the sanitizers' runtimes that Python has to start with; () where gcc has none."""
    compiler = find_compiler()
    if compiler is None or compiler.kind != "gcc":
        return ()
    paths = []
    for name in RUNTIMES:
        command = [*compiler.command, f"-print-file-name={name}"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        # Where there is none, gcc answers with the bare name.
        path = Path(answer.stdout.strip())
        if not path.is_absolute() or not path.exists():
            return ()
        paths.append(str(path.resolve()))
    return tuple(paths)


def run_sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest with these arguments so that every emulated kernel is checked.

    Reads and writes outside of buffers and of shared memory, misaligned access and undefined
    arithmetic end the process with a report. Kernels take several times as long as without:
    of each test's cases some run, or with `--exhaustive` all.
    """
    one_in = 1 if os.environ.get(exhaustive.ENV) else ONE_IN
    # What a sanitizer writes would be lost in pytest's capture when the process ends: -s.
    common = f"exitcode={EXIT_CODE}"
    environ = {
        **os.environ,
        SANITIZE_ENV: "1",
        "LD_PRELOAD": " ".join(runtimes()),
        # Python and its extensions never free all they have.
        "ASAN_OPTIONS": f"{common}:detect_leaks=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": f"{common}:print_stacktrace=1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
    command += ["-o", f"timeout={_LIMIT_S}", f"--one-in={one_in}"]
    return subprocess.run(
        [*command, *arguments], cwd=REPO, env=environ, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
