"""Round trips of frames between two processes of this machine, beside bare gloo in the same run.

    python -m benchmarks.machine_links [--rounds 300]

The other process sends back what it gets. Bare gloo sends and receives the same number of bytes
from one fixed buffer each, on the calling thread, with its receives posted in advance; a frame
adds its text, a copy into the buffer that is sent, and the receiver's thread. Both alternate in
batches. The contents are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from exl_loader.machines.address import Address, checked_seat, parse_address
from exl_loader.machines.connection import Machines, connect
from exl_loader.machines.frames import Frame, room
from exl_loader.machines.link import POSTED, SHORT_BYTES, Group
from exl_loader.machines.meeting import join_store, make_links
from exl_loader.machines.station import Station

SIZES = (32 << 10, 256 << 10, 4 << 20, 64 << 20)
BATCH = 25
WAIT = timedelta(seconds=20)


class Bare:
    """Both directions of gloo between two processes, without frames."""

    def __init__(self, address: Address, place: int) -> None:
        store, own = join_store(address, 10)
        self._out: Group
        self._in: Group
        self._out, self._in = make_links(store, own, "bare", place, 2, 20)

    def exchange(self, nbytes: int, rounds: int, begins: bool) -> list[float]:
        """Send and receive in turn; return the seconds of each round trip."""
        count = POSTED if nbytes <= SHORT_BYTES else 1
        buffers = [torch.empty(nbytes, dtype=torch.uint8) for _ in range(count)]
        message = torch.ones(nbytes, dtype=torch.uint8)
        posted = [self._in.recv([buffers[i]], 0, 0) for i in range(min(count, rounds))]
        seconds = []
        for i in range(rounds):
            began = time.perf_counter()
            if begins:
                self._out.send([message], 1, 0).wait(WAIT)
            posted[i % count].wait(WAIT)
            if i + count < rounds:
                posted[i % count] = self._in.recv([buffers[i % count]], 0, 0)
            if not begins:
                self._out.send([message], 1, 0).wait(WAIT)
            seconds.append(time.perf_counter() - began)
        return seconds


class Echo:
    """Sends every frame back, and takes the other end of bare gloo."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.station: Any = None
        self.bare: Bare | None = None

    def answer(self, question: str, fields: dict[str, Any], progress: Any) -> dict[str, Any]:
        if question == "reserve":
            self.station.reserve(**fields)
        elif question == "connect":
            self.bare = Bare(self.address, 1)
        elif self.bare is not None:
            self.bare.exchange(fields["nbytes"], fields["rounds"], begins=False)
        return {}

    def execute(self, frame: Frame) -> Iterable[Frame]:
        yield Frame(frame.kind, frame.fields, frame.arrays)

    def lost(self) -> None:
        self.station.close()


def serve(address: Address) -> None:
    """Be the other machine."""
    echo = Echo(address)
    echo.station = Station(checked_seat(address, 1, 2), lambda line: print(line, file=sys.stderr))
    echo.station.serve(echo)


def frames(machines: Machines, array: np.ndarray, rounds: int) -> list[float]:
    """Send a frame around in turn; return the seconds of each round trip."""
    seconds = []
    for number in range(rounds):
        began = time.perf_counter()
        machines.send(Frame("pass", {"n": number}, [array]))
        machines.receive().release()
        seconds.append(time.perf_counter() - began)
    return seconds


def run(rounds: int) -> None:
    """Measure and print a table."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = parse_address(f"tcp://127.0.0.1:{probe.getsockname()[1]}")
    other = subprocess.Popen([sys.executable, "-m", __spec__.name, "--serve", str(address)])
    try:
        machines = connect(address)
        machines.ask(1, "reserve", {"count": 4, "nbytes": room(max(SIZES))})
        machines.reserve(4, room(max(SIZES)))
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(machines.ask, 1, "connect")
            bare = Bare(address, 0)
            asked.result()
            print("bytes      gloo: median, best   frames: median, best   (µs, there and back)")
            for nbytes in SIZES:
                array = np.random.default_rng().integers(0, 255, nbytes, np.uint8)
                machines.send(Frame("pass", {}, [array]))
                with machines.receive() as frame:
                    assert np.array_equal(frame.arrays[0], array)
                found: dict[str, list[float]] = {"gloo": [], "frames": []}
                batches = max(1, (rounds if nbytes <= SHORT_BYTES else rounds // 10) // BATCH)
                for _ in range(batches + 1):
                    asked = pool.submit(
                        machines.ask, 1, "bare", {"nbytes": nbytes, "rounds": BATCH}
                    )
                    found["gloo"] += bare.exchange(nbytes, BATCH, begins=True)
                    asked.result()
                    found["frames"] += frames(machines, array, BATCH)
                # The first batch of each warms up.
                line = [
                    f"{statistics.median(seconds[BATCH:]) * 1e6:9.0f} "
                    f"{min(seconds[BATCH:]) * 1e6:9.0f}"
                    for seconds in found.values()
                ]
                print(f"{nbytes:9d}", *line, sep="  ", flush=True)
        machines.close()
        other.wait(20)
    finally:
        other.kill()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(parse_address(arguments.serve))
    else:
        run(arguments.rounds)
