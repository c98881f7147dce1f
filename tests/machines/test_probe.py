"""What `doctor --machines` measures of links and says about them."""

from __future__ import annotations

import json

import pytest

from exl_loader.commands import cli
from exl_loader.commands.doctor_machines import expected_speed
from exl_loader.machines.address import parse_address
from exl_loader.machines.connection import close_all, connect
from exl_loader.machines.probe import (
    LONG_PING_BYTES,
    LinkMeasure,
    measure,
    measure_link,
    token_seconds,
)
from exl_loader.machines.ring import Machine
from support.namespaces import Network, refusal
from support.ports import free_port
from support.stations import StationProcess

FIRST, OTHER = Machine(0, 0, "node-a"), Machine(1, 1, "node-b")


def test_latency_and_bandwidth_are_told_apart():
    """Pings over a link of 0.2 ms and 100 MB/s, of which the first short one takes longer."""
    asked = []

    def ping(nbytes: int, count: int) -> list[float]:
        asked.append((nbytes, count))
        first = 0.05 if len(asked) == 1 else 0.0
        return [2 * 0.2e-3 + nbytes / 100e6 + first * (i == 0) for i in range(count)]

    link = measure_link(FIRST, OTHER, ping)
    assert link.bytes_per_s == pytest.approx(100e6)
    # A short ping has 1 KiB.
    assert link.latency_s == pytest.approx(0.2e-3, rel=0.03)
    assert asked[1][0] == LONG_PING_BYTES


def test_a_token_takes_every_link_once():
    links = [LinkMeasure(FIRST, OTHER, 1e-3, 1e8), LinkMeasure(OTHER, FIRST, 2e-3, 4e6)]
    assert token_seconds(links, 1000) == pytest.approx(1e-3 + 4e-5 + 2e-3 + 1e-3)
    assert expected_speed(20.0, 0.05) == pytest.approx(10.0)


def test_doctor_reports_machines_and_links(capsys):
    address = f"tcp://127.0.0.1:{free_port()}"
    others = [StationProcess(address, rank, 3) for rank in (1, 2)]
    try:
        assert cli.main(["doctor", "--machines", address]) == 0
        text = capsys.readouterr().out
        assert cli.main(["doctor", "--machines", address, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert [machine["rank"] for machine in report["machines"]] == [0, 1, 2]
        assert [(link["from"], link["to"]) for link in report["links"]] == [(0, 1), (1, 2), (2, 0)]
        assert all(link["latency_s"] > 0 and link["bytes_per_s"] > 0 for link in report["links"])
        assert report["token_seconds"]["8192"] > report["token_seconds"]["4096"]
        assert report["problems"] == []
        host, torch = report["machines"][2]["host"], report["machines"][2]["torch"]
        for words in (f"3 machines at {address}", f"2  {host}: exl_loader", f"PyTorch {torch}",
                      "2 -> 0  latency", "hidden size 8192: ", "20 tokens/s on one machine"):
            assert words in text
        # The machines wait for the next one.
        assert all(other.is_alive for other in others)
    finally:
        close_all()
        for other in others:
            other.kill()


def test_doctor_refuses_what_is_no_address(capsys):
    assert cli.main(["doctor", "--machines", "node-a"]) == 1
    assert "--machines: expected an address of the first machine" in capsys.readouterr().err


@pytest.mark.skipif(bool(refusal()), reason=f"no namespaces: {refusal()}")
def test_a_slow_link_is_measured_where_it_is():
    with Network(2) as network:
        network.stations.start()
        machines = connect(parse_address(network.stations.address))
        try:
            refused = network.shape(1, "tbf", "rate", "80mbit", "burst", "64kb", "latency", "99ms")
            if refused:
                pytest.skip(f"tc: {refused}")
            links = measure(machines)
            # 80 Mbit/s are 10 MB/s, and a queue of 64 KiB makes 8 MiB seem 1 % faster.
            assert links[1].bytes_per_s < 10.5e6
            assert [link.sender.rank for link in links] == [0, 1, 2]
        finally:
            close_all()
