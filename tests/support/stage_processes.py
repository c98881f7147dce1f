"""Processes that run `serve-stage`, forked from one that has imported everything.

As a program, it starts one process for each line of its input, a JSON list of arguments, and
prints its number.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent


class StageFarm:
    """Starts processes that serve layers, without importing everything anew for each.

    Args:
        log: the file that gets what they say.
        prefix: a command before Python's, such as one that enters a network namespace.
    """

    def __init__(self, log: Path, prefix: tuple[str, ...] = ()) -> None:
        self.log = log
        with log.open("w", encoding="utf-8") as file:
            self._parent = subprocess.Popen(
                [*prefix, sys.executable, "-m", "support.stage_processes"], cwd=TESTS, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file,
                env=os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
            )

    def start(self, arguments: list[str]) -> int:
        """Start `serve-stage` with these arguments; return its number."""
        assert self._parent.stdin is not None and self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(["serve-stage", *arguments]) + "\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())

    def close(self) -> None:
        """Start no more."""
        self._parent.kill()
        self._parent.communicate()


class StageProcesses:
    """The other machines of one address.

    Args:
        farm: starts them.
        models: what they serve.
        address: of the first machine.
        world_size: number of machines.
        options: further arguments of serve-stage.

    Attributes:
        pids: rank -> process.
    """

    def __init__(
        self, farm: StageFarm, models: Path, address: str, world_size: int,
        options: tuple[str, ...] = ("--device", "cpu"),
    ) -> None:
        self.pids: dict[int, int] = {}
        self.address, self.world_size = address, world_size
        self._farm, self._models, self._options = farm, models, options

    def start(self, *ranks: int) -> None:
        """Start a machine of each rank."""
        for rank in ranks:
            self.pids[rank] = self._farm.start([
                str(self._models), *self._options, "--machines", self.address,
                "--rank", str(rank), "--world-size", str(self.world_size),
            ])

    def signal(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a machine."""
        os.kill(self.pids[rank], number)

    def close(self) -> None:
        """End all of them."""
        for pid in self.pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def main() -> None:
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
    import torch  # noqa: F401

    import exl_loader.stage_server  # noqa: F401
    from exl_loader.commands import cli

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os._exit(cli.main(json.loads(line)))
        print(pid, flush=True)


if __name__ == "__main__":
    main()
