"""Machines in network namespaces: cut links, slow links, restarts, and what listens where."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from exl_loader.machines.address import parse_address
from exl_loader.machines.connection import Machines, close_all, connect
from exl_loader.machines.frames import Frame
from exl_loader.utils.errors import MachineLost
from support.namespaces import Network, refusal
from support.stations import ones

TIMEOUT_S = 4.0
BEAT_S = 0.3

needs_namespaces = pytest.mark.skipif(bool(refusal()), reason=f"no namespaces: {refusal()}")


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(2) as made:
        yield made


@pytest.fixture
def machines(network) -> Iterator[Machines]:
    network.stations.start()
    yield open_connection(network)
    close_all()


def open_connection(network: Network) -> Machines:
    return connect(parse_address(network.stations.address), timeout=TIMEOUT_S, beat=BEAT_S)


def goes_around(machines: Machines, array: np.ndarray) -> None:
    machines.send(Frame("pass", {}, [array]))
    with machines.receive() as frame:
        np.testing.assert_array_equal(frame.arrays[0], array + 2)


def test_frames_go_around_a_network(machines):
    assert len(machines.ask_all("echo")) == 2
    goes_around(machines, ones(3, 1000))


@needs_namespaces
def test_machines_listen_at_their_own_address_alone(machines, network):
    for rank in (1, 2):
        assert {text.rpartition(":")[0] for text in network.listening(rank)} == {
            network.address(rank)
        }


@needs_namespaces
@pytest.mark.parametrize("rank", [1, 2])
def test_a_machine_that_is_cut_off_is_lost_and_may_come_back(machines, network, rank):
    alive = [network.stations[number].process.pid for number in (1, 2)]
    network.cut(rank)
    try:
        # Another machine may notice the silence first, and close its connections.
        reasons = f"nothing was heard for {TIMEOUT_S:g} s|its connection was closed"
        with pytest.raises(MachineLost, match=reasons):
            machines.receive()
        # The machine that was cut off notices it itself.
        network.stations[rank].hears("nothing was heard")
    finally:
        network.mend(rank)
    again = open_connection(network)
    assert [reply["pid"] for reply in again.ask_all("echo")] == alive
    goes_around(again, ones(5))


@needs_namespaces
def test_a_cut_between_two_others_reaches_the_first_machine(machines, network):
    network.cut_between(1, 2)
    try:
        with pytest.raises(MachineLost, match=r"^machine [12] \(.*: nothing was heard"):
            machines.receive()
    finally:
        network.mend_between(1, 2)
    goes_around(open_connection(network), ones(5))


@needs_namespaces
def test_a_slow_link_is_no_lost_one(machines, network):
    """2 MiB at 10 Mbit/s take 1.7 s, in which no beat can be sent."""
    refused = network.shape(1, "tbf", "rate", "10mbit", "burst", "64kb", "latency", "100ms")
    if refused:
        pytest.skip(f"tc: {refused}")
    try:
        goes_around(machines, np.random.default_rng().random(1 << 19, np.float32))
    finally:
        network.shape(1, "pfifo")


@needs_namespaces
def test_delay_and_loss_change_no_frame(machines, network):
    refused = network.shape(1, "netem", "delay", "5ms", "2ms", "loss", "1%")
    if refused:
        pytest.skip(f"tc: {refused}")
    try:
        for number in range(50):
            goes_around(machines, ones(8, 1024) * number)
    finally:
        network.shape(1, "pfifo")


@pytest.mark.parametrize("rank", [1, 2])
def test_a_machine_may_be_started_again(machines, network, rank):
    network.stations[rank].kill()
    with pytest.raises(MachineLost):
        machines.receive()
    network.stations.start()
    again = open_connection(network)
    assert again.ask(rank, "echo")["pid"] == network.stations[rank].process.pid
    goes_around(again, ones(5))
