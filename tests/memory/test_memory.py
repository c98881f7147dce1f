"""The memory that the system reports, limits, and buffers that are allocated and released."""

from __future__ import annotations

import gc
import mmap
import os
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exl_loader.backends import backend_of
from exl_loader.backends.base import Capacity, Process
from exl_loader.backends.cpu.backend import CpuBackend
from exl_loader.backends.cpu.memory import ASSUMED_RUNTIME_BYTES
from exl_loader.backends.cuda.backend import ASSUMED_CONTEXT_BYTES, CudaBackend
from exl_loader.backends.cuda.taken import ASSUMED_GRAPH_BYTES
from exl_loader.memory import buffers as memory
from exl_loader.memory.segments import lay_out
from exl_loader.utils.byte_counts import parse_bytes
from exl_loader.utils.errors import InsufficientMemory, InvalidSettings
from exl_loader.utils.table import TensorSpec

GIB = 1 << 30


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE


@pytest.fixture
def machine(tmp_path):
    """A machine of 16 GiB, 8 of them free, whose files a test may add to."""

    def make(cgroup: str = "", **files: str) -> CpuBackend:
        proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
        (proc / "self").mkdir(parents=True)
        cgroups.mkdir()
        (proc / "meminfo").write_text(
            f"MemTotal: {16 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {8 * GIB // 1024} kB\n"
        )
        (proc / "self" / "status").write_text("Name:\tpython\nVmRSS:\t  1048576 kB\n")
        (proc / "self" / "cgroup").write_text(cgroup)
        for path, text in files.items():
            file = cgroups / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return CpuBackend(str(proc), str(cgroups))

    return make


def test_machine_without_limits(machine):
    found = machine().capacity("cpu")
    assert found == Capacity(16 * GIB, 8 * GIB, GIB)
    assert found.other_bytes == 7 * GIB


def test_cgroup_v2_limit_counts_file_cache_as_free(machine):
    found = machine(
        "0::/a/b\n",
        **{
            "a/memory.max": f"{4 * GIB}\n",
            "a/memory.current": f"{3 * GIB}\n",
            "a/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 4096\n",
            "a/b/memory.max": "max\n",
            "a/b/memory.current": f"{GIB}\n",
        },
    ).capacity("cpu")
    assert (found.capacity_bytes, found.free_bytes) == (4 * GIB, 2 * GIB + 4096)


def test_cgroup_v1_limit(machine):
    found = machine(
        "5:cpu:/x\n4:memory:/docker/1\n0::/\n",
        **{
            "memory/memory.limit_in_bytes": str(2 * GIB),
            "memory/memory.usage_in_bytes": str(GIB),
            "memory/memory.stat": "cache 9\ntotal_inactive_file 4096\n",
        },
    ).capacity("cpu")
    assert (found.capacity_bytes, found.free_bytes) == (2 * GIB, GIB + 4096)


def test_cgroup_without_a_limit_changes_nothing(machine):
    unlimited = {
        "memory/memory.limit_in_bytes": "9223372036854771712",
        "memory/memory.usage_in_bytes": "1",
    }
    assert machine("4:memory:/\n", **unlimited).capacity("cpu").capacity_bytes == 16 * GIB


def test_other_processes_largest_first_without_our_own(machine, tmp_path):
    cpu = machine()
    for pid, name, kib in ((os.getpid(), "python", 9), (7, "small", 3), (8, "large", 5)):
        (tmp_path / "proc" / str(pid)).mkdir()
        (tmp_path / "proc" / str(pid) / "status").write_text(f"Name:\t{name}\nVmRSS:\t{kib} kB\n")
    assert cpu.processes("cpu", 5) == [Process(8, "large", 5120), Process(7, "small", 3072)]
    assert cpu.processes("cpu", 1) == [Process(8, "large", 5120)]


def test_this_machine_has_memory():
    found = CpuBackend().capacity("cpu")
    assert 0 < found.free_bytes <= found.capacity_bytes


SMI = """#!/bin/sh
case "$*" in
*--query-gpu*) printf '0, 24576, 20000\\n1, 8192, 100\\n' ;;
*) printf '41, 300, python\\n42, 700, a, b\\n43, [N/A], Xorg\\n' ;;
esac
"""


def test_cuda_by_the_drivers_tool(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    cuda = CudaBackend()
    assert cuda.capacity("cuda:1") == Capacity(8192 << 20, 100 << 20)
    assert cuda.processes("cuda:0", 3) == [
        Process(42, "a, b", 700 << 20),
        Process(41, "python", 300 << 20),
    ]
    assumed = ASSUMED_CONTEXT_BYTES + ASSUMED_GRAPH_BYTES
    assert cuda.overhead("cuda:0") == (assumed, False)
    with pytest.raises(InvalidSettings, match="cuda:2"):
        cuda.capacity("cuda:2")


def test_no_card_is_a_readable_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InvalidSettings, match="nvidia-smi"):
        backend_of("cuda:0").capacity("cuda:0")


@pytest.mark.parametrize("name", ["", "gpu", "cpu:x", "cuda:-1", "cuda:0:1"])
def test_unknown_device_names(name):
    with pytest.raises(InvalidSettings, match="device"):
        backend_of(name)


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        (1, 1),
        (123456, 123456),
        ("1234567", 1234567),
        ("77B", 77),
        ("24GiB", 24 * GIB),
        (" 24 gib ", 24 * GIB),
        ("24G", 24 * GIB),
        ("1.5GiB", 3 * GIB // 2),
        ("0.1KiB", 102),
        ("2 GB", 2 * 10**9),
        ("512M", 512 << 20),
        ("3TB", 3 * 10**12),
    ],
)
def test_byte_counts(value, nbytes):
    assert parse_bytes(value, "memory_limit") == nbytes


@pytest.mark.parametrize(
    "value", [0, -1, True, "", "GiB", "-1GiB", "1e9", "24Gb/s", "nan", 1.5, None, "0.0001K", "٣G",
              "24", "24576", " 0.5 "]
)
def test_a_value_that_is_no_byte_count_is_refused(value):
    with pytest.raises(InvalidSettings, match="memory_limit"):
        parse_bytes(value, "memory_limit")


def test_the_limit_of_the_environment_holds_for_all_models_together(monkeypatch):
    assert memory.environment_limit("cpu") is None
    monkeypatch.setenv(memory.LIMIT_VARIABLE, "1MiB")
    before = memory.environment_limit("cpu")
    assert before == (1 << 20) - memory.live_bytes("cpu")
    specs = [TensorSpec("t", name, "uint8", (300_000,)) for name in ("weights", "cache")]
    buffers = memory.allocate(lay_out(specs).values())
    assert memory.environment_limit("cpu") == before - buffers.allocated_bytes()
    assert memory.environment_limit("cpu:1") == 1 << 20
    larger = lay_out([TensorSpec("t", "cache", "uint8", (600_000,))]).values()
    with pytest.raises(InsufficientMemory, match="another model of this process"):
        memory.allocate(larger)
    assert memory.environment_limit("cpu") == before - buffers.allocated_bytes()
    with monkeypatch.context() as without_limit:
        without_limit.delenv(memory.LIMIT_VARIABLE)
        more = memory.allocate(larger)
    assert memory.environment_limit("cpu") == 0
    buffers.release()
    more.release()
    assert memory.environment_limit("cpu") == before
    monkeypatch.setenv(memory.LIMIT_VARIABLE, "much")
    with pytest.raises(InvalidSettings, match=memory.LIMIT_VARIABLE):
        memory.environment_limit("cpu")


def test_libraries_are_overhead_until_they_are_loaded(monkeypatch):
    import torch  # noqa: F401

    assert CpuBackend().overhead("cpu") == (0, True)
    monkeypatch.delitem(sys.modules, "torch")
    assert CpuBackend().overhead("cpu") == (ASSUMED_RUNTIME_BYTES, False)


def test_views_have_the_dtypes_shapes_and_offsets_of_the_table():
    import torch

    specs = [
        TensorSpec("a", "weights", "int32", (3, 5)),
        TensorSpec("b", "weights", "float16", (7,)),
        TensorSpec("a", "cache", "uint8", (2, 2)),
    ]
    segments = lay_out(specs)
    buffers = memory.allocate(segments.values())
    weights = buffers.views("weights")
    assert list(weights) == ["a", "b"]
    assert (weights["a"].dtype, weights["a"].shape) == (torch.int32, (3, 5))
    assert (weights["b"].dtype, weights["b"].shape) == (torch.float16, (7,))
    assert weights["b"].data_ptr() - weights["a"].data_ptr() == 64
    assert weights["a"].data_ptr() % mmap.PAGESIZE == 0
    assert not weights["a"].any() and not buffers.views("cache")["a"].any()
    assert buffers.views("cache", "cpu:1") == {}
    weights["a"].fill_(-1)
    assert buffers.views("weights")["a"].eq(-1).all() and not weights["b"].any()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["weights", "cache", "workspace"]),
            st.sampled_from(["uint8", "float16", "float32"]),
            st.integers(1, 5000),
            st.sampled_from(["cpu", "cpu:0", "cpu:1"]),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_allocated_is_the_table_to_the_byte(rows):
    specs = [
        TensorSpec(f"t{i}", segment, dtype, (n,), device)
        for i, (segment, dtype, n, device) in enumerate(rows)
    ]
    segments = lay_out(specs)
    before = memory.live_bytes()
    buffers = memory.allocate(segments.values())
    assert buffers.allocated_bytes() == sum(s.nbytes for s in segments.values())
    assert memory.live_bytes() - before == buffers.allocated_bytes()
    for (device, name), segment in segments.items():
        assert buffers.allocated_bytes(device, name) == segment.nbytes
    buffers.release()
    assert buffers.allocated_bytes() == 0
    assert memory.live_bytes() == before


def test_a_view_that_is_still_held_is_counted():
    buffers = memory.allocate(lay_out([TensorSpec("t", "cache", "uint8", (100,))]).values())
    before = memory.live_bytes() - buffers.allocated_bytes()
    held = buffers.views("cache")["t"]
    buffers.release()
    assert memory.live_bytes() - before == 128
    del held
    assert memory.live_bytes() == before


def test_memory_is_taken_at_once_and_freed_on_release():
    nbytes = 64 << 20
    gc.collect()
    before = resident_bytes()
    buffers = memory.allocate(lay_out([TensorSpec("t", "cache", "uint8", (nbytes,))]).values())
    assert resident_bytes() - before > nbytes - (1 << 20)
    buffers.release()
    assert resident_bytes() - before < 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="the mapping is in /proc")
def test_buffers_may_have_huge_pages():
    """Linux gives them to private mappings that ask; to shared ones only where set up so."""
    buffer, _ = CpuBackend().empty("cpu", 4 << 20)
    with open("/proc/self/smaps") as file:
        text = file.read()
    entries = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags:(.*?)$", text, re.M | re.S)
    if not entries:
        pytest.skip("this system does not report huge pages")
    address = buffer.data_ptr()
    flags = next(f.split() for low, high, f in entries if int(low, 16) <= address < int(high, 16))
    assert "sh" not in flags
    assert "hg" in flags or not os.path.exists("/sys/kernel/mm/transparent_hugepage")


def test_an_impossible_size_is_refused_by_the_system():
    segments = lay_out([TensorSpec("t", "cache", "uint8", (1 << 62,))])
    with pytest.raises(InsufficientMemory, match="cpu: no memory for the cache buffer"):
        memory.allocate(segments.values())
