"""How machines meet: who is missing, who is refused, who comes back."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from exl_loader.machines.address import Seat, parse_address
from exl_loader.machines.connection import close_all, connect
from exl_loader.machines.frames import Frame
from exl_loader.machines.station import Station
from exl_loader.utils.errors import MachineRefused
from support.ports import free_port
from support.stations import EchoHandler, StationProcess, ones

TIMEOUT_S = 3.0
BEAT_S = 0.3


class StationThread:
    """A station in this process.

    Args:
        changed: fields of its hello that are changed before it says it.
    """

    def __init__(
        self, address: str, rank: int, world_size: int, /, **changed: object
    ) -> None:
        self._said: list[str] = []
        self._heard = threading.Condition()
        self.station = Station(Seat(parse_address(address), rank, world_size), self._hear)
        guest = self.station._guest
        guest._hello = dataclasses.replace(guest._hello, **changed)
        self._thread = threading.Thread(target=self.station.serve, args=[EchoHandler()])
        self._thread.start()

    def _hear(self, line: str) -> None:
        with self._heard:
            self._said.append(line)
            self._heard.notify_all()

    def hears(self, words: str) -> None:
        with self._heard:
            found = self._heard.wait_for(lambda: any(words in line for line in self._said), 300)
        assert found, f"{words!r} is not in {self._said}"

    def stop(self) -> None:
        self.station.close()
        self._thread.join()


@pytest.fixture
def join() -> Iterator:
    joined: list[StationThread] = []

    def start(*arguments: object, **changed: object) -> StationThread:
        joined.append(StationThread(*arguments, **changed))
        return joined[-1]

    yield start
    close_all()
    for station in joined:
        station.stop()


@pytest.fixture
def address() -> Iterator[str]:
    yield f"tcp://127.0.0.1:{free_port()}"
    close_all()


def refused(address: str, patience: float = 60.0) -> str:
    with pytest.raises(MachineRefused) as caught:
        connect(parse_address(address), patience=patience, timeout=TIMEOUT_S, beat=BEAT_S)
    return str(caught.value)


@pytest.mark.parametrize("changed, words", [
    ({"version": "0.0.1"}, "exl_loader's version: expected .* as on the first .*, found 0.0.1"),
    ({"sources": "abc"}, "the digest of exl_loader's sources: .*found abc. Check out the same"),
    ({"byteorder": "big"}, "the byte order: expected little"),
    ({"dtype": "float16"}, "the type of hidden states: expected float32 .* found float16"),
    ({"rank": 0}, "expected a rank from 1 to 1, found 0"),
    ({"rank": 7}, "expected a rank from 1 to 1, found 7"),
    ({"rank": "1"}, "a machine that wants to join: expected what this version"),
])
def test_a_machine_that_does_not_fit_is_refused_on_both_sides(address, join, changed, words):
    other = join(address, 1, 2, **changed)
    text = refused(address)
    assert re.search(words, text), text
    other.hears("the first machine refuses: ")
    # It goes on waiting, and is refused again.
    assert refused(address) == text


def test_missing_machines_are_named_and_fewer_can_load(address, join):
    assert "ranks that came: none" in refused(address, 0.5)
    for rank in (3, 1):
        join(address, rank, 4).hears("waiting for the first machine")
    text = refused(address, 5.0)
    assert "expected rank 2, found ranks that came: 1 (" in text
    assert "?world_size=3 behind the address loads with those that came" in text
    machines = connect(parse_address(f"{address}?world_size=3"), timeout=TIMEOUT_S)
    assert [(other.place, other.rank) for other in machines.others] == [(1, 1), (2, 3)]
    machines.send(Frame("pass", {}, [ones(2)]))
    assert (machines.receive().arrays[0] == 3).all()


def test_a_rank_that_two_machines_have_is_refused(address, join):
    for host in ("node-a", "node-b"):
        join(address, 1, 3, host=host)
    assert re.search(
        "rank 1: expected one machine with each rank, found node-. and node-.", refused(address)
    )


def test_a_machine_that_was_started_again_replaces_its_old_process(address, join):
    for process in ("old", "new"):
        join(address, 1, 3, host="node-a", process=process)
    assert "expected rank 2, found ranks that came: 1 (node-a)" in refused(address, 5.0)


def test_machines_that_count_differently_are_refused(address, join):
    join(address, 1, 2)
    join(address, 2, 3)
    # One that counts two machines is enough for a ring, so both must be there before.
    text = refused(f"{address}?world_size=3")
    assert "the number of machines: expected the same on all of them" in text


def test_an_address_that_cannot_be_listened_at_is_refused(address):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", parse_address(address).port))
        listener.listen()
        assert "expected an address of this machine with a free port" in refused(address)
    assert "an address of this machine" in refused("tcp://192.0.2.1:29500")
    assert "no known host name" in refused("tcp://no-such-host.invalid:29500")


def test_the_first_machine_may_end_and_come_back(address, tmp_path):
    """A first machine in a process of its own, killed, then one in this process."""
    other = StationProcess(address, 1, 2)
    script = (
        "import sys, time\n"
        "from exl_loader.machines.address import parse_address\n"
        "from exl_loader.machines.connection import connect\n"
        "machines = connect(parse_address(sys.argv[1]), timeout=3.0, beat=0.3)\n"
        "print(machines.ask(1, 'echo')['pid'], flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    first = subprocess.Popen(
        [sys.executable, "-c", script, address], stdout=subprocess.PIPE, text=True,
        env=environment, cwd=tmp_path,
    )
    try:
        assert first.stdout is not None
        assert int(first.stdout.readline()) == other.process.pid
        first.kill()
        first.wait()
        other.hears("the session is over")
        machines = connect(parse_address(address), timeout=TIMEOUT_S, beat=BEAT_S)
        assert machines.ask(1, "echo")["pid"] == other.process.pid
        machines.send(Frame("pass", {}, [ones(2)]))
        assert (machines.receive().arrays[0] == 2).all()
    finally:
        first.kill()
        other.kill()
