"""Other machines for tests: processes that serve a handler over `exl_loader.machines`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from exl_loader.machines.frames import Frame
from exl_loader.utils.errors import InvalidSettings
from support.ports import free_port

TESTS = Path(__file__).resolve().parent.parent


class EchoHandler:
    """Answers what the tests ask, and adds 1 to the arrays that go around."""

    def __init__(self) -> None:
        self.station: Any = None
        self.sessions_lost = 0

    def answer(self, question: str, fields: dict[str, Any], progress: Any) -> dict[str, Any]:
        if question == "echo":
            return {"echo": fields, "pid": os.getpid(), "lost": self.sessions_lost}
        if question == "refuse":
            raise InvalidSettings("ctx_size", expected="fewer", actual="more", remedy="Ask less")
        if question == "bug":
            raise KeyError("no such thing")
        if question == "sleep":
            time.sleep(fields["seconds"])
            return {}
        if question == "work":
            progress.start("reading", 100, "bytes")
            for _ in range(10):
                progress.advance("reading", 10)
            progress.finish("reading")
            return {}
        if question == "load for ever":
            progress.start("reading", None, "bytes")
            while True:
                progress.advance("reading", 1)
                time.sleep(0.01)
        if question == "reserve":
            self.station.reserve(fields["count"], fields["nbytes"])
            return {}
        raise AssertionError(question)

    def execute(self, frame: Frame) -> Iterable[Frame]:
        if frame.kind == "refuse":
            raise InvalidSettings("frame", actual="refused")
        if frame.kind == "slow":
            time.sleep(frame.fields["seconds"])
        if frame.kind == "drop":
            return
        for array in frame.arrays:
            array += 1
        yield Frame(frame.kind, frame.fields, frame.arrays)

    def lost(self) -> None:
        self.sessions_lost += 1


class StationProcess:
    """A station in a process of its own.

    Args:
        address: the first machine's. rank, world_size: its own.
        changed: fields of its hello that are changed before it says it.
        prefix: a command before Python's, such as one that enters a network namespace.
        variables: of its environment, besides this process's.
    """

    def __init__(
        self, address: str, rank: int, world_size: int, changed: dict[str, Any] | None = None,
        prefix: tuple[str, ...] = (), variables: dict[str, str] | None = None,
    ) -> None:
        self.said: list[str] = []
        self._heard = threading.Condition()
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "support.stations", address, str(rank),
             str(world_size), repr(changed or {})],
            cwd=TESTS, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
                              "PYTHONUNBUFFERED": "1"} | (variables or {}),
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._heard:
                self.said.append(line.rstrip())
                self._heard.notify_all()

    def hears(self, words: str, count: int = 1) -> None:
        """Wait until the process has printed lines with these words."""
        with self._heard:
            found = self._heard.wait_for(
                lambda: sum(words in line for line in self.said) >= count, 300
            )
        assert found, f"{words!r} is not in {self.said}"

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None


class Stations:
    """The other machines of one address; those that a test killed are started again."""

    def __init__(self, count: int, host: str = "127.0.0.1") -> None:
        self.address = f"tcp://{host}:{free_port(host)}"
        self.processes: list[StationProcess | None] = [None] * count
        # By rank: a command before Python's.
        self.prefixes: dict[int, tuple[str, ...]] = {}

    def start(self) -> None:
        for index, process in enumerate(self.processes):
            if process is None or not process.is_alive:
                self.processes[index] = StationProcess(
                    self.address, index + 1, len(self.processes) + 1,
                    prefix=self.prefixes.get(index + 1, ()),
                )

    def __getitem__(self, rank: int) -> StationProcess:
        process = self.processes[rank - 1]
        assert process is not None
        return process

    def stop(self) -> None:
        for process in self.processes:
            if process is not None:
                process.signal(signal.SIGCONT)
                process.kill()


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def main() -> None:
    """Serve sessions in this process: ADDRESS RANK WORLD_SIZE CHANGED."""
    import ast
    import dataclasses

    from exl_loader.machines import meeting
    from exl_loader.machines.address import (
        checked_seat,
        is_under_torchrun,
        parse_address,
        torchrun_seat,
    )
    from exl_loader.machines.station import Station

    address, rank, world_size, changed = sys.argv[1:]
    original = meeting.own_hello
    meeting.own_hello = lambda *given: dataclasses.replace(
        original(*given), **ast.literal_eval(changed)
    )
    seat = torchrun_seat() if is_under_torchrun() else checked_seat(
        parse_address(address), int(rank), int(world_size)
    )
    handler = EchoHandler()
    station = Station(seat, say=print)
    handler.station = station
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        station.serve(handler)
    except KeyboardInterrupt:
        print("interrupted")


if __name__ == "__main__":
    main()
