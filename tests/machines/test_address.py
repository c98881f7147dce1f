"""Addresses of the first machine, and what torchrun sets."""

from __future__ import annotations

import pytest

from exl_loader.machines.address import (
    Address,
    Seat,
    checked_seat,
    is_under_torchrun,
    parse_address,
    torchrun_seat,
)
from exl_loader.utils.errors import InvalidSettings


@pytest.mark.parametrize("text, expected", [
    ("tcp://node-a:29500", Address("node-a", 29500)),
    ("tcp://10.0.0.1:1/", Address("10.0.0.1", 1)),
    ("tcp://[fe80::1%eth0]:29500", Address("fe80::1%eth0", 29500)),
    ("tcp://a.b.c:65535?world_size=3", Address("a.b.c", 65535, 3)),
    ("tcp://a:1/?world_size=64", Address("a", 1, 64)),
])
def test_an_address_is_read(text, expected):
    found = parse_address(text)
    assert found == expected
    assert parse_address(str(found)) == Address(expected.host, expected.port)


@pytest.mark.parametrize("text", [
    "", "node-a", "node-a:29500", "tcp://node-a", "tcp://:29500", "tcp://a:0", "tcp://a:65536",
    "tcp://a:1x", "http://a:1", "tcp://user@a:1", "tcp://a b:1", "tcp://fe80::1:29500",
    "tcp://a:1?world_size=", "tcp://a:1?world_size=1", "tcp://a:1?world_size=65",
    "tcp://a:1?rank=1", "tcp://a:1?world_size=2&rank=1", "tcp://a:1/path", None, 3,
])
def test_anything_else_is_refused(text):
    with pytest.raises(InvalidSettings, match="^machines: expected .*found"):
        parse_address(text)


def test_a_rank_is_of_another_machine():
    address = Address("a", 1)
    assert checked_seat(address, 2, 3) == Seat(address, 2, 3)
    with pytest.raises(InvalidSettings, match="rank: expected 1 to 2 of 3 machines, found 3"):
        checked_seat(address, 3, 3)
    with pytest.raises(InvalidSettings, match="found 0. Rank 0 is the first machine"):
        checked_seat(address, 0, 3)
    with pytest.raises(InvalidSettings, match="world size: expected 2 to 64 machines"):
        checked_seat(address, 1, 1)


TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "3", "RANK": "1", "WORLD_SIZE": "64", "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "node-a", "MASTER_PORT": "29500",
}


def test_what_torchrun_sets_is_read():
    assert is_under_torchrun(TORCHRUN) and not is_under_torchrun({})
    assert torchrun_seat(TORCHRUN) == Seat(Address("node-a", 29500, agent=True), 1, 3)
    assert torchrun_seat(TORCHRUN | {"GROUP_RANK": "0"}) == Seat(
        Address("node-a", 29500, 3, agent=True), 0, 3
    )


@pytest.mark.parametrize("changed, words", [
    ({"LOCAL_WORLD_SIZE": "2"}, "--nproc-per-node 1.*found '2' processes"),
    ({"MASTER_ADDR": ""}, "MASTER_ADDR=''"),
    ({"MASTER_PORT": "many"}, "MASTER_PORT='many'"),
    ({"MASTER_PORT": "99999"}, "MASTER_PORT: expected 1 to 65535"),
    ({"GROUP_WORLD_SIZE": "1"}, "expected 2 to 64 machines"),
    ({"GROUP_RANK": "3"}, "rank: expected 1 to 2"),
])
def test_what_torchrun_should_not_set_is_refused(changed, words):
    with pytest.raises(InvalidSettings, match=words):
        torchrun_seat(TORCHRUN | changed)
