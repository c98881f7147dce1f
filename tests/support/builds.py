"""Tools for tests of builds, of libraries and of cubins."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from exl_loader.backends.build import toolchain
from support import REPO

needs_compiler = pytest.mark.skipif(
    os.name == "nt" or toolchain.find_compiler() is None, reason="needs g++ or clang++"
)

_BUILD = """
import sys, pathlib
from exl_loader.backends.build.build import build
from exl_loader.backends.build.spec import cpu_spec
print(build(cpu_spec(pathlib.Path(sys.argv[1]))))
"""


class Recorder:
    """Progress that records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def start(self, task, total, unit):
        self.calls.append(("start", task, total, unit))

    def advance(self, task, n=1):
        self.calls.append(("advance", task, n))

    def finish(self, task):
        self.calls.append(("finish", task))


def find_partials(cache: Path) -> list[str]:
    """Name the private directories of unfinished builds in a folder of builds."""
    return [path.name for path in cache.iterdir() if "partial" in path.name]


def write_sources(root: Path) -> Path:
    """Write two translation units and a header."""
    (root / "cpu").mkdir(parents=True)
    (root / "shared.h").write_text("#define ANSWER 42\n")
    (root / "cpu" / "one.cpp").write_text(
        '#include "shared.h"\nextern "C" int exl_answer() { return ANSWER; }\n'
    )
    (root / "cpu" / "two.cpp").write_text('extern "C" int exl_double(int x) { return 2 * x; }\n')
    return root


def works(library: str | Path) -> bool:
    """Return whether a library's functions are those of `write_sources`."""
    opened = ctypes.CDLL(str(library))
    return opened.exl_answer() == 42 and opened.exl_double(21) == 42


def write_compiler(script: Path, before_compiling: str) -> Path:
    """Write a script that runs shell commands and then the machine's compiler."""
    found = toolchain.find_compiler()
    assert found is not None
    script.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *--version*) ;; *-c*) {before_compiling} ;; esac\n'
        f'exec "{found.command[0]}" "$@"\n'
    )
    script.chmod(0o755)
    return script


def spawn_build(sources: Path, **options) -> subprocess.Popen[str]:
    """Build in another process, which prints the library's path."""
    return subprocess.Popen(
        [sys.executable, "-c", _BUILD, str(sources)], cwd=REPO, stdout=subprocess.PIPE,
        text=True, **options,
    )


def is_running(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    try:
        return not status.parent.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def default_signals() -> None:
    """Let signals end a child; a process that a shell starts in the background ignores them."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
