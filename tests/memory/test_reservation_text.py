"""A reservation as text: the table, and the error for one that does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from exl_loader.backends.base import Process
from exl_loader.memory.reservation import LoadOptions, plan
from exl_loader.memory.reservation.text import compare_allocated, refusal, render
from exl_loader.utils.byte_counts import amount
from exl_loader.utils.errors import InsufficientMemory
from support.plan_machines import FakeConnection, plan_over
from support.sparse import LLAMA_2_7B, write_sparse_exl2

GIB, MIB = 1 << 30, 1 << 20
CACHE_TYPES = ("fp16", "q8", "q6", "q4", "q3")


def test_the_table_has_every_amount_and_fits_the_terminal(tmp_path, machine):
    folder = write_sparse_exl2(tmp_path / "m", **LLAMA_2_7B)
    machine(free_bytes=7 * GIB, capacity_bytes=8 * GIB)
    found = plan(folder, ctx_size=18432, cache_type="q4")
    text = render(found)
    (device,) = found.devices
    for part in ("weights", "cache", "workspace", "total", "overhead"):
        assert amount(getattr(device, f"{part}_bytes")) in text
    for word in ("weights", "cache", "workspace", "overhead", "7.00 GiB", "8.00 GiB", "1.00 GiB"):
        assert word in text
    assert f"fits, {amount(device.headroom_bytes)} to spare" in text
    for name, tokens in found.largest_ctx_size.items():
        assert f"{name} " in text and f"{tokens:,} tokens" in text
    assert "does not fit" in render(plan(folder, ctx_size=18432, cache_type="fp16"))
    assert max(map(len, text.splitlines()[1:])) < 80
    split = plan(folder, ctx_size=18432, cache_type="q4", vram="4GiB,4GiB")
    two = render(split)
    assert "cuda:0" in two and "cuda:1" in two and amount(split.total_bytes) in two


def test_the_refusal_names_missing_bytes_and_what_would_fit(tmp_path, machine):
    folder = write_sparse_exl2(tmp_path / "m", **LLAMA_2_7B)
    machine(8 * GIB, processes=[Process(4321, "firefox", 3 * GIB), Process(7, "x", MIB)])
    found = plan(folder, ctx_size=18432, cache_type="fp16")
    error = refusal(found)
    (device,) = found.devices
    assert isinstance(error, InsufficientMemory) and error.reservation is found
    text = str(error)
    for nbytes in (
        device.needed_bytes,
        device.weights_bytes,
        device.cache_bytes,
        device.workspace_bytes,
        device.overhead_bytes,
        device.missing_bytes,
    ):
        assert amount(nbytes) in text
    assert "8.00 GiB free" in text and "18432 tokens" in text and "\n" not in text
    fitting = [name for name in CACHE_TYPES if plan(folder, ctx_size=18432, cache_type=name).fits]
    assert fitting == ["q6", "q4", "q3"]
    assert "these cache types fit: q6, q4, q3." in text
    assert f"the largest context is {found.largest_ctx_size['fp16']} tokens" in text
    assert "firefox (pid 4321) 3.00 GiB" in text
    assert error.details == render(found)


def test_a_refusal_by_a_limit_names_no_other_process(tmp_path, machine):
    machine(64 * GIB, processes=[Process(4321, "firefox", 3 * GIB)])
    folder = write_sparse_exl2(tmp_path / "m", **LLAMA_2_7B)
    text = str(refusal(plan(folder, ctx_size=18432, cache_type="q4", memory_limit="2GiB")))
    assert "a limit of 2.00 GiB" in text and "firefox" not in text
    assert "Not even the shortest context fits" in text and "no cache type fits" in text


def test_needed_minus_found_bytes_are_the_missing_bytes(tmp_path, machine):
    folder = write_sparse_exl2(tmp_path / "m", **LLAMA_2_7B)
    machine(64 * GIB)
    (device,) = plan(folder, ctx_size=18432, cache_type="q4").devices
    total, overhead = amount(device.total_bytes), amount(device.overhead_bytes)
    # A limit is set on the buffers: memory outside them is no part of the sum.
    limits = {"ctx_size": 18432, "cache_type": "q4", "memory_limit": device.total_bytes}
    text = str(refusal(plan(folder, **limits | {"memory_limit": device.total_bytes - 1})))
    assert f"expected {total} (" in text and "overhead" not in text
    assert f"found a limit of {amount(device.total_bytes - 1)}, 1 byte missing" in text
    # A limit that holds does not cut what the system has free.
    machine(device.needed_bytes - MIB)
    text = str(refusal(plan(folder, **limits)))
    assert f"expected {amount(device.needed_bytes)} (" in text and f"overhead {overhead}" in text
    assert f"found {amount(device.needed_bytes - MIB)} free, 1.0 MiB missing" in text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (640, "640 bytes"),
        (MIB, "1.0 MiB"),
        (3 * GIB // 2, "1.50 GiB"),
    ],
)
def test_amounts(nbytes, text):
    assert amount(nbytes) == text


def two_machines(folder, connection_bytes: int = 0, **options):
    """Plan for this machine and another one, each with a CPU."""
    connection = FakeConnection([folder], [LoadOptions(device="cpu")])
    found = plan_over(connection, folder, connection_bytes, device="cpu", **options)
    connection.close()
    return found


def test_the_table_of_several_machines_names_them(tmp_path, machine):
    folder = write_sparse_exl2(tmp_path / "m", **LLAMA_2_7B)
    machine(free_bytes=7 * GIB, capacity_bytes=8 * GIB)
    found = two_machines(folder, ctx_size=4096, cache_type="q4", gpu_split="2;")
    text = render(found)
    assert "cache q4\nlayers on 2 of 2 machines\n" in text
    (names,) = [line for line in text.splitlines() if line.startswith("machine")]
    assert names.split() == ["machine", "0", "host-a", "1", "host-b"]
    assert amount(found.total_bytes) in text
    assert max(map(len, text.splitlines()[1:])) < 80
    one = two_machines(folder, ctx_size=256, cache_type="q4", gpu_split="7;")
    assert "layers on 1 of 2 machines" in render(one)
    assert "machine" not in render(plan(folder, device="cpu"))


def test_a_refusal_names_the_machine_that_lacks_memory(tmp_path, machine):
    folder = write_sparse_exl2(tmp_path / "m", **LLAMA_2_7B)
    machine(2 * GIB, processes=[Process(4321, "firefox", 3 * GIB)])
    found = two_machines(folder, ctx_size=9000, cache_type="fp16", gpu_split=";1")
    error = refusal(found)
    text = str(error)
    here, there = found.devices
    assert here.fits and text.startswith("machine 1 (host-b), cpu: a context of 9000 tokens")
    assert amount(there.missing_bytes) in text and error.reservation is found
    # Processes of this machine hold nothing of that one.
    assert "firefox" not in text
    short = two_machines(folder, ctx_size=9000, cache_type="fp16", gpu_split="0.01;1")
    assert str(refusal(short)).startswith(
        "the first machine (host-a), cpu, machine 1 (host-b), cpu: a context"
    )


def test_a_refusal_for_the_connection_alone_says_so(tmp_path, machine):
    folder = write_sparse_exl2(tmp_path / "m")
    machine(free_bytes=400 * MIB)
    found = two_machines(folder, ctx_size=300, gpu_split=";")
    memory = replace(
        found.devices[0], weights_bytes=0, cache_bytes=0, workspace_bytes=0, first_layer=2,
        headroom_bytes=-MIB, overhead_bytes=9 * MIB,
    )
    text = str(refusal(replace(found, devices=(memory,))))
    assert "expected 9.0 MiB of overhead" in text and "1.0 MiB missing" in text


def test_allocated_bytes_of_other_machines_are_their_own(tmp_path, machine):
    folder = write_sparse_exl2(tmp_path / "m", **LLAMA_2_7B)
    machine(free_bytes=7 * GIB, capacity_bytes=8 * GIB)
    found = two_machines(folder, ctx_size=4096, cache_type="q4", gpu_split="2;")
    here, there = found.devices
    own = {"weights": here.weights_bytes, "cache": here.cache_bytes,
           "workspace": here.workspace_bytes}
    text = compare_allocated(
        found, lambda device, segment: own.get(segment, 0), {(1, "cpu"): there.total_bytes}
    )
    *_, last, together = text.splitlines()
    assert last.split() == ["machine", "1", "(host-b),", "cpu", *[f"{there.total_bytes:,}"] * 2]
    assert together.split() == ["bytes", "together", *[f"{found.total_bytes:,}"] * 2]
    # A device of that machine that is missing is no device of this one.
    text = compare_allocated(found, lambda device, segment: own.get(segment, 0))
    assert text.splitlines()[-2].split()[-1] == "0"
