"""Machines on loopback: questions, frames around the ring, and every way in which it can end."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.distributed import HashStore, ProcessGroupGloo

from exl_loader.machines.address import parse_address
from exl_loader.machines.connection import Machines, close_all, connect
from exl_loader.machines.frames import Frame, room
from exl_loader.machines.link import SHORT_BYTES, UNRESERVED_BYTES, gloo_reason
from exl_loader.machines.meeting import make_group
from exl_loader.utils.errors import InvalidSettings, MachineFailed, MachineLost
from exl_loader.utils.progress import NullProgress
from support.stations import Stations, ones

# Short, so that tests of silence are; longer than a busy machine keeps a thread waiting.
TIMEOUT_S = 4.0
BEAT_S = 0.3


# With two, other tests are run too: test_meetings.py and test_load_over_machines.py.
@pytest.fixture(
    scope="module", params=[3, pytest.param(2, marks=pytest.mark.exhaustive)],
    ids="{} machines".format,
)
def stations(request) -> Iterator[Stations]:
    made = Stations(request.param - 1)
    yield made
    made.stop()


@pytest.fixture
def machines(stations) -> Iterator[Machines]:
    stations.start()
    yield open_connection(stations)
    close_all()


def open_connection(stations: Stations) -> Machines:
    return connect(parse_address(stations.address), timeout=TIMEOUT_S, beat=BEAT_S)


def test_each_machine_answers_in_its_place(machines, stations):
    replies = machines.ask_all("echo", {"words": ["a", 1, None, "ä"]})
    assert [reply["echo"] for reply in replies] == [{"words": ["a", 1, None, "ä"]}] * len(replies)
    assert [reply["pid"] for reply in replies] == [
        stations[rank].process.pid for rank in range(1, len(replies) + 1)
    ]
    assert [machine.rank for machine in machines.others] == [*range(1, len(replies) + 1)]
    last = len(machines.others)
    assert machines.ask(last, "echo", {"a": 2})["echo"] == {"a": 2}


def test_questions_of_several_threads_get_their_own_replies(machines):
    found = {}

    def ask(number: int) -> None:
        found[number] = [reply["echo"]["n"] for reply in machines.ask_all("echo", {"n": number})]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [number] * len(machines.others) for number in range(8)}


def test_an_error_of_a_machine_is_raised_with_its_type_and_names_the_machine(machines):
    last = len(machines.others)
    with pytest.raises(InvalidSettings) as caught:
        machines.ask(last, "refuse")
    assert str(caught.value) == (
        f"machine {last} ({socket.gethostname()}): ctx_size: expected fewer, found more. Ask less"
    )
    with pytest.raises(MachineFailed, match="machine 1 .*KeyError") as failed:
        machines.ask_all("bug")
    assert "Traceback" in failed.value.details and "in answer" in failed.value.details
    # Neither ends the session.
    assert machines.ask(last, "echo")["echo"] == {}


def test_progress_of_each_machine_has_its_name(machines):
    events = []

    class Recorded(NullProgress):
        def start(self, task, total, unit):
            events.append(("start", task, total, unit))

        def advance(self, task, n=1):
            events.append((task, n))

        def finish(self, task):
            events.append(("finish", task))

    machines.ask_all("work", progress=Recorded())
    for machine in machines.others:
        name = f"reading, {machine.name}"
        assert ("start", name, 100, "bytes") in events and ("finish", name) in events
        assert sum(event[1] for event in events if event[0] == name) == 100


def test_frames_come_around_in_order_with_what_each_machine_did(machines):
    for number in range(50):
        machines.send(Frame("pass", {"n": number}, [ones(1 + number % 3, 512) * number]))
    for number in range(50):
        with machines.receive() as frame:
            assert (frame.kind, frame.fields) == ("pass", {"n": number})
            expected = ones(1 + number % 3, 512) * number + len(machines.others)
            np.testing.assert_array_equal(frame.arrays[0], expected)


def test_arrays_may_be_changed_as_soon_as_a_frame_is_sent(machines):
    array = ones(SHORT_BYTES // 2)
    for number in range(20):
        array[:] = number
        machines.send(Frame("pass", {}, [array]))
    for number in range(20):
        with machines.receive() as frame:
            assert set(np.unique(frame.arrays[0])) == {number + len(machines.others)}


@pytest.mark.parametrize("floats", [SHORT_BYTES // 4 - 64, SHORT_BYTES // 4, 5 << 20])
def test_long_frames_arrive_whole(machines, floats):
    array = np.random.default_rng().random(floats, np.float32)
    for copies in (1, 2):
        for _ in range(3):
            machines.send(Frame("pass", {}, [array[: floats // copies]] * copies))
        for _ in range(3):
            with machines.receive() as frame:
                assert len(frame.arrays) == copies
                expected = array[: floats // copies]
                for _ in machines.others:
                    expected = expected + np.float32(1)
                for found in frame.arrays:
                    np.testing.assert_array_equal(found, expected)


def test_a_frame_larger_than_allowed_needs_a_reservation(machines):
    array = np.zeros(UNRESERVED_BYTES // 4 + 1, np.float32)
    with pytest.raises(ValueError, match="reserved or allowed"):
        machines.send(Frame("pass", {}, [array]))
    reserved = {"count": 2, "nbytes": room(array.nbytes)}
    machines.ask_all("reserve", reserved)
    machines.reserve(**reserved)
    machines.send(Frame("pass", {}, [array]))
    with machines.receive() as frame:
        assert (frame.arrays[0] == len(machines.others)).all()


def test_beats_keep_a_link_while_a_machine_works_for_longer_than_the_timeout(machines):
    """Nothing is lost meanwhile, neither for the first machine nor for the others."""
    lost = [reply["lost"] for reply in machines.ask_all("echo")]
    slept = machines.ask_all("sleep", {"seconds": TIMEOUT_S + 0.5})
    assert slept == [{}] * len(machines.others)
    assert [reply["lost"] for reply in machines.ask_all("echo")] == lost


def test_a_question_overtakes_frames_that_wait(machines):
    """The last machine answers while the first of the others still works on a frame."""
    if len(machines.others) == 1:
        pytest.skip("needs a machine in between")
    machines.send(Frame("slow", {"seconds": 1.0}, [ones(3)]))
    machines.send(Frame("drop", {}))
    machines.ask(2, "echo")
    assert machines._ring.inbox.empty()
    machines.receive().release()


def test_an_error_in_a_frame_ends_the_session_and_the_next_one_works(machines, stations):
    machines.send(Frame("refuse", {}))
    with pytest.raises(MachineLost, match=r"^machine 1 \(.*\): frame: refused"):
        machines.receive()
    with pytest.raises(MachineLost, match="frame: refused"):
        machines.check()
    with pytest.raises(MachineLost, match="frame: refused"):
        machines.ask_all("echo")
    again = open_connection(stations)
    assert again is not machines
    assert len(again.ask_all("echo")) == len(machines.others)


def ranks(stations: Stations) -> range:
    return range(1, len(stations.processes) + 1)


def test_a_killed_machine_is_lost_and_may_come_back(machines, stations):
    for rank in ranks(stations):
        stations[rank].kill()
        with pytest.raises(MachineLost, match=r"machine \d \(.*\): the connection to it was lost"):
            machines.receive()
        stations.start()
        machines = open_connection(stations)
        machines.send(Frame("pass", {}, [ones(4)]))
        machines.receive().release()


def test_a_killed_machine_ends_a_question(machines, stations):
    """It is killed while it works on the question, which would never end."""
    last = len(machines.others)

    class Killing(NullProgress):
        def start(self, task, total, unit):
            if task == f"reading, {machines.others[-1].name}":
                stations[last].kill()

    with pytest.raises(MachineLost):
        machines.ask_all("load for ever", progress=Killing())
    assert not stations[last].is_alive


def test_a_machine_that_hangs_is_lost(machines, stations):
    for rank in ranks(stations):
        stations[rank].signal(signal.SIGSTOP)
        try:
            with pytest.raises(MachineLost, match=f"nothing was heard for {TIMEOUT_S:g} s"):
                machines.receive()
        finally:
            stations[rank].signal(signal.SIGCONT)
        machines = open_connection(stations)
        assert len(machines.ask_all("echo")) == len(machines.others)


def linked(timeout):
    """Return both ends of a link, in this process."""
    store, device = HashStore(), ProcessGroupGloo.create_device(hostname="127.0.0.1")
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: make_group(store, "a", rank, device, timeout), (0, 1)))


def test_a_silent_neighbour_is_told_from_one_that_closed_its_connection():
    own, _silent = linked(1.0)
    with pytest.raises(RuntimeError) as caught:
        own.recv([torch.empty(1)], 1, 0).wait()
    assert gloo_reason(caught.value, 1.0) == "nothing was heard for 1 s"
    own, other = linked(300.0)
    receiving = own.recv([torch.empty(1)], 1, 0)
    del other
    with pytest.raises(RuntimeError) as caught:
        receiving.wait()
    assert gloo_reason(caught.value, 300.0).startswith("its connection was closed")


def test_the_end_of_a_session_ends_what_the_machines_do(machines, stations):
    begun = threading.Semaphore(0)

    class Begun(NullProgress):
        def start(self, task, total, unit):
            begun.release()

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(machines.ask_all, "load for ever", progress=Begun())
        for _ in machines.others:
            assert begun.acquire(timeout=300)
        before = [
            sum("is over" in line for line in stations[rank].said) for rank in ranks(stations)
        ]
        close_all()
        assert isinstance(asked.exception(300), MachineLost)
    for rank, count in zip(ranks(stations), before, strict=True):
        stations[rank].hears("the session is over", count + 1)
    replies = open_connection(stations).ask_all("echo")
    assert all(reply["lost"] > 0 for reply in replies)


def test_the_connection_is_kept_and_can_be_closed(machines, stations):
    assert open_connection(stations) is machines
    close_all()
    with pytest.raises(MachineLost, match="closed"):
        machines.check()
    with pytest.raises(MachineLost, match="closed"):
        machines.receive()
    # The port is free again.
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", parse_address(stations.address).port))
    assert open_connection(stations) is not machines


def test_a_stopped_machine_says_so(machines, stations):
    stations[1].signal(signal.SIGINT)
    try:
        with pytest.raises(MachineLost, match=r"machine 1 \(.*\): it was stopped"):
            machines.receive()
        stations[1].hears("interrupted")
    finally:
        stations[1].process.wait()
    assert stations[1].process.returncode == 0


def test_the_store_listens_at_the_address_alone(machines, stations):
    port = parse_address(stations.address).port
    with socket.create_connection(("127.0.0.1", port)):
        pass
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port))
