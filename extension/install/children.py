"""Runs the programs that installing needs, pip above all, and ends them on an interrupt."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

# pip removes its temporary files and undoes a package that it has half installed.
GRACE_S = 10.0


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as `subprocess.run` does with text.

    If this process is interrupted meanwhile, the command gets GRACE_S to clean up;
    `subprocess.run` gives it a quarter of a second.

    Args:
        command: program and arguments.
        options: of `Popen`.

    Raises:
        OSError: the program cannot be started.
    """
    process = subprocess.Popen(command, text=True, errors="replace", **options)
    try:
        stdout, stderr = process.communicate()
    except BaseException as interruption:
        # Ctrl-C has reached the command as well; other signals have reached this process only.
        _end(process, received_sigint=isinstance(interruption, KeyboardInterrupt))
        raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _end(process: subprocess.Popen[str], received_sigint: bool) -> None:
    if not received_sigint and os.name == "nt":
        process.terminate()
    elif not received_sigint:
        process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=GRACE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.communicate()
