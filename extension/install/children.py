"""Programs that installing runs, pip above all, and how they end where it is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

# pip puts away what it has fetched and takes back what it has half installed.
GRACE_S = 10.0


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as `subprocess.run` does with text.

    Where this process is interrupted meanwhile, the command gets time to end in good order;
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
        # Ctrl-C has reached the command as well; what else ends this process has not.
        _end(process, told=isinstance(interruption, KeyboardInterrupt))
        raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _end(process: subprocess.Popen[str], told: bool) -> None:
    if not told and os.name == "nt":
        process.terminate()
    elif not told:
        process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=GRACE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.communicate()
