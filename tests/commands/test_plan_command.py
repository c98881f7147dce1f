"""`plan --machines`: the figures of all machines, as a table and as JSON."""

from __future__ import annotations

import json

import pytest

import exl_loader
from exl_loader.commands.cli import main
from exl_loader.memory.reservation import LoadOptions
from support.plan_machines import FakeConnection
from support.sparse import write_sparse_exl2

ADDRESS = "tcp://127.0.0.1:29500"
OPTIONS = {"ctx_size": 600, "cache_type": "q4", "device": "cpu"}


@pytest.fixture
def folder(tmp_path):
    return write_sparse_exl2(tmp_path / "m", num_hidden_layers=6)


@pytest.fixture
def connection(folder, monkeypatch):
    """Connect to one other machine, which is in this process."""
    pytest.importorskip("torch")
    from exl_loader.machines import connection as module

    made = FakeConnection([folder], [LoadOptions(device="cpu")])
    made.addresses = []

    def connect(address, progress=None):
        made.addresses.append(str(address))
        return made

    monkeypatch.setattr(module, "connect", connect)
    yield made
    made.close()


def split(folder) -> str:
    return f"{exl_loader.plan(folder, **OPTIONS).total_bytes * 0.8 / 2**30!r};"


def test_a_plan_asks_the_machines_of_an_address(connection, folder):
    found = exl_loader.plan(folder, machines=ADDRESS, gpu_split=split(folder), **OPTIONS)
    assert set(connection.addresses) == {ADDRESS}
    assert found.hosts == ("host-a", "host-b") and [d.machine for d in found.devices] == [0, 1]
    # Frames between machines take main memory on both.
    alone = exl_loader.plan(folder, **OPTIONS).devices[0].overhead_bytes
    assert all(device.overhead_bytes > alone + (1 << 20) for device in found.devices)


def test_a_plan_without_machines_connects_to_none(connection, folder):
    for machines in (None, ""):
        assert exl_loader.plan(folder, machines=machines, **OPTIONS).hosts == ()
    assert connection.addresses == []


def test_the_command_prints_a_column_for_each_machine(connection, folder, capsys):
    command = ["plan", str(folder), "--machines", ADDRESS, "--gpu-split", split(folder),
               "--ctx-size", "600", "--cache-type", "q4", "--device", "cpu"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "layers on 2 of 2 machines" in text and "1 host-b" in text
    assert main([*command, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["hosts"] == ["host-a", "host-b"]
    assert [(d["machine"], d["host"]) for d in values["devices"]] == [(0, "host-a"), (1, "host-b")]


@pytest.mark.parametrize("address", ["localhost:29500", "tcp://", "tcp://h:0", "tcp://h:1?x=2"])
def test_an_address_that_is_none_is_refused(address, folder, capsys):
    assert main(["plan", str(folder), "--machines", address]) == 1
    assert "machines: expected" in capsys.readouterr().err
