"""Questions about a card before a model runs on it: which card, its memory, its context.

No card is here: nvidia-smi, the driver and PyTorch's answers are given by the tests.
"""

from __future__ import annotations

import os
import types
from dataclasses import replace

import pytest
import torch

import exl_loader
from exl_loader.backends import BACKENDS
from exl_loader.backends.base import Capacity
from exl_loader.backends.build.store import kernel_dirs
from exl_loader.backends.cuda import backend, cards, taken
from exl_loader.backends.cuda.backend import MIB, CudaBackend
from exl_loader.backends.cuda.cards import (
    auto_cards,
    card_count,
    card_memory,
    card_uuid,
)
from exl_loader.loader import _open_devices as open_devices
from exl_loader.memory.reservation import LoadOptions
from exl_loader.memory.reservation.budgets import chosen_devices
from exl_loader.utils.errors import (
    InsufficientMemory,
    InvalidSettings,
    KernelBuildError,
)

ASSUMED = taken.ASSUMED_KERNEL_BYTES + taken.ASSUMED_GRAPH_BYTES

SMI = """#!/bin/sh
case "$*" in
*compute_cap*) printf '0, GPU-8a3f, %s\\n1, GPU-77, %s\\n' "$SMI_CAPABILITY" "$SMI_SECOND" ;;
*--query-gpu*) printf '0, 24576, 20000\\n1, 8192, 4000\\n' ;;
*) printf '41, 300, python\\n%s, 700, own\\n' "$SMI_PID" ;;
esac
"""


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """An nvidia-smi that knows two cards of compute capability 8.6."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SMI_CAPABILITY", "8.6")
    monkeypatch.setenv("SMI_SECOND", "8.6")
    monkeypatch.setenv("SMI_PID", str(os.getpid()))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    auto_cards.cache_clear()
    cards._can_run.cache_clear()
    monkeypatch.setattr(cards, "auto_cards", auto_cards)
    yield
    auto_cards.cache_clear()
    cards._can_run.cache_clear()


@pytest.fixture(autouse=True)
def nothing_measured(tmp_path, monkeypatch):
    """No kernels or graphs were measured, in this process or an earlier one."""
    monkeypatch.setenv("EXL_LOADER_CACHE_DIR", str(tmp_path / "a cache"))
    monkeypatch.setattr(taken, "_taken", {})
    monkeypatch.setattr("exl_loader.backends.cuda.taken.driver_release", lambda: (13, 0))


@pytest.fixture
def torch_with_cuda(monkeypatch):
    """PyTorch with CUDA and two cards, none of which is in use yet."""
    state = types.SimpleNamespace(open=set(), reserved=0)
    free = {0: 20000 * MIB, 1: 4000 * MIB}

    def synchronize(index):
        state.open.add(index)
        free[index] -= 300 * MIB

    card = types.SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2, synchronize=synchronize,
        is_initialized=lambda: bool(state.open),
        mem_get_info=lambda index: (free[index], 24576 * MIB),
        memory_reserved=lambda index: state.reserved,
    )
    monkeypatch.setattr(torch, "cuda", card)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", state.open.__contains__,
                        raising=False)
    return state


def test_a_context_is_measured_and_counts_as_overhead(smi, torch_with_cuda):
    device = CudaBackend()
    assert not device.is_initialized("cuda:0") and device.overhead("cuda:0")[1] is False
    before = device.capacity("cuda:0")
    device.initialize("cuda:0")
    assert device.is_initialized("cuda:0") and not device.is_initialized("cuda:1")
    assert device.overhead("cuda:0") == (300 * MIB + ASSUMED, False)
    assert device.capacity("cuda:0") == before
    device.initialize("cuda:0")
    assert device.overhead("cuda:0") == (300 * MIB + ASSUMED, False)


def test_a_context_of_other_code_is_no_overhead_of_ours(smi, torch_with_cuda):
    torch_with_cuda.open.add(0)
    torch_with_cuda.reserved = 5 * MIB
    device = CudaBackend()
    assert device.overhead("cuda:0") == (ASSUMED, False)
    assert device.capacity("cuda:0") == Capacity(24576 * MIB, 20000 * MIB, 5 * MIB)


# ---- Memory of kernels and graphs --------------------------------------------------------------


@pytest.fixture
def card_uuids(monkeypatch):
    """The UUIDs of cards, from the monitoring library."""
    uuids = {"0": "GPU-0", "1": "GPU-1"}
    monkeypatch.setattr(cards, "card_uuid", uuids.get)
    return uuids


def take(name, nbytes, graphs=1):
    taken.taken_of(name).add(nbytes)
    taken.taken_of(name).graphs += graphs


def restart():
    """Forget measurements, as in a new process."""
    taken._taken.clear()


def test_measured_memory_is_in_the_next_plan(smi, torch_with_cuda, card_uuids):
    device = CudaBackend()
    device.initialize("cuda:0")
    take("cuda:0", 7 * MIB, graphs=0)  # kernels alone are no measure of graphs
    assert device.overhead("cuda:0") == (300 * MIB + ASSUMED, False)
    assert device.capacity("cuda:0").own_bytes == 7 * MIB
    take("cuda:0", 4 * MIB)
    assert device.overhead("cuda:0") == (311 * MIB, True)
    # The memory of an unloaded model still counts.
    take("cuda:0", -11 * MIB, graphs=0)
    assert device.overhead("cuda:0") == (311 * MIB, True)
    assert device.capacity("cuda:0").own_bytes == 0
    assert not device.overhead("cuda:1")[1]


def test_measured_memory_is_in_the_plan_of_a_model(smi, torch_with_cuda, card_uuids,
                                                    tiny_model_dir, monkeypatch):
    monkeypatch.setitem(BACKENDS, "cuda", CudaBackend())
    BACKENDS["cuda"].initialize("cuda:0")
    assumed = exl_loader.plan(tiny_model_dir, ctx_size=512, device="cuda:0").devices[0]
    take("cuda:0", 23 * MIB)
    measured = exl_loader.plan(tiny_model_dir, ctx_size=512, device="cuda:0").devices[0]
    assert (assumed.overhead_measured, measured.overhead_measured) == (False, True)
    assert assumed.overhead_bytes - measured.overhead_bytes == ASSUMED - 23 * MIB
    assert assumed.total_bytes == measured.total_bytes


def test_the_next_process_reads_the_measured_memory(smi, torch_with_cuda, card_uuids, monkeypatch):
    take("cuda:0", 9 * MIB)
    taken.remember_taken("cuda:0")
    restart()
    device = CudaBackend()
    # There is no context yet, so its size is assumed.
    assert device.overhead("cuda:0") == (backend.ASSUMED_CONTEXT_BYTES + 9 * MIB, False)
    device.initialize("cuda:0")
    assert device.overhead("cuda:0") == (309 * MIB, True)
    # The largest figure stays.
    take("cuda:0", 5 * MIB)
    taken.remember_taken("cuda:0")
    assert device.overhead("cuda:0") == (309 * MIB, True)
    # Only for the same card and the same driver.
    assert not device.overhead("cuda:1")[1]
    restart()
    card_uuids["0"] = "GPU-9"
    assert not device.overhead("cuda:0")[1]
    card_uuids["0"] = "GPU-0"
    monkeypatch.setattr("exl_loader.backends.cuda.taken.driver_release", lambda: (13, 1))
    assert not device.overhead("cuda:0")[1]


@pytest.mark.parametrize("text", [
    "", "[]", "{", '{"GPU-0 13.0": -1}', '{"GPU-0 13.0": 1e6}', '{"GPU-0 13.0": "9"}',
    '{"GPU-0 13.0": true}', '{"GPU-0 13.0": 99999999999999}', "null", "{" * 70000,
])  # fmt: skip
def test_a_damaged_file_of_figures_counts_as_none(smi, torch_with_cuda, card_uuids, text):
    take("cuda:0", 9 * MIB)
    taken.remember_taken("cuda:0")
    restart()
    (path,) = kernel_dirs()[0].glob("*.json")
    path.write_text(text)
    assert taken.known_taken("cuda:0") is None
    take("cuda:0", 3 * MIB)
    taken.remember_taken("cuda:0")
    restart()
    assert taken.known_taken("cuda:0") == 3 * MIB


def test_a_folder_that_is_not_writable_is_no_error(card_uuids, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EXL_LOADER_CACHE_DIR", str(tmp_path / "file"))
    take("cuda:0", 3 * MIB)
    taken.remember_taken("cuda:0")
    assert taken.known_taken("cuda:0") == 3 * MIB
    restart()
    assert taken.known_taken("cuda:0") is None


def test_the_file_keeps_figures_of_few_cards(card_uuids):
    for index in range(100):
        card_uuids["0"] = f"GPU-{index}"
        take("cuda:0", MIB)
        taken.remember_taken("cuda:0")
        restart()
    (path,) = kernel_dirs()[0].glob("*.json")
    assert path.read_text().count("GPU-") == 64
    assert taken.known_taken("cuda:0") == MIB


def test_a_card_that_torch_does_not_see_is_refused(smi, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidSettings, match="PyTorch for CUDA"):
        CudaBackend().initialize("cuda:0")


def test_a_model_that_cannot_fit_touches_no_card(smi, tiny_model_dir, torch_with_cuda):
    with pytest.raises(InsufficientMemory):
        exl_loader.load(tiny_model_dir, device="cuda:0", memory_limit="1KiB")
    assert not torch_with_cuda.open


def test_only_cards_that_hold_layers_are_opened(
    smi, torch_with_cuda, tiny_model_dir, monkeypatch
):
    monkeypatch.setitem(BACKENDS, "cuda", CudaBackend())
    options = LoadOptions(ctx_size=512, gpu_split="18,3")
    open_devices(tiny_model_dir, options, None)
    assert torch_with_cuda.open == {0}
    total = exl_loader.plan(tiny_model_dir, ctx_size=512, device="cuda:0").devices[0].total_bytes
    open_devices(tiny_model_dir, replace(options, gpu_split=[(total - 1) / 2**30, 3]), None)
    assert torch_with_cuda.open == {0, 1}


def test_other_processes_leave_this_one_out(smi):
    assert [process.pid for process in CudaBackend().processes("cuda:0", 5)] == [41]


@pytest.mark.parametrize(("visible", "free"), [
    ("1,0", 4000), ("0", 20000), (" 1 ", 4000), ("GPU-8a3", 20000),
])  # fmt: skip
def test_visible_devices_renumber_cards(smi, monkeypatch, visible, free):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert CudaBackend().capacity("cuda:0").free_bytes == free * MIB


@pytest.mark.parametrize(("order", "free"), [("", (4000, 20000)), ("PCI_BUS_ID", (1, 2))])
def test_cards_are_numbered_as_cuda_numbers_them(smi, monkeypatch, order, free):
    """The fastest card is first: here the second on the bus, whose UUID ends in 00."""
    class Driver:
        def device(self, index):
            return index + 10

        def call(self, function, *arguments):
            assert function == "cuDeviceGetUuid_v2" and arguments[1] in (10, 11)
            arguments[0][15] = arguments[1] - 10

    ids = [f"GPU-00000000-0000-0000-0000-00000000000{i}" for i in range(2)]
    held = {"0": 1, "1": 2, ids[0]: 4000, ids[1]: 20000}
    monkeypatch.setattr(cards, "card_count", lambda: 2)
    monkeypatch.setattr(cards, "card_memory", lambda card: (24576 * MIB, held[card] * MIB))
    monkeypatch.setattr("exl_loader.backends.cuda.cards.Driver", Driver)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    cards._uuid.cache_clear()
    found = [CudaBackend().capacity(f"cuda:{i}").free_bytes for i in range(2)]
    cards._uuid.cache_clear()
    assert found == [count * MIB for count in free]


def test_a_hidden_card_is_refused(smi, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(InvalidSettings, match="cuda:1"):
        CudaBackend().capacity("cuda:1")


class FakeNvml:
    """A monitoring library that knows card 1, whose UUID is GPU-1."""

    def __init__(self, fails=0):
        self.fails = fails

    def nvmlInit_v2(self):
        return self.fails

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        handle._obj.value = 100 + index
        return 0 if index == 1 else 2

    def nvmlDeviceGetHandleByUUID(self, name, handle):
        handle._obj.value = 101
        return 0 if name == b"GPU-1" else 6

    def nvmlDeviceGetUUID(self, handle, text, size):
        assert handle.value == 101 and size == 96
        text.value = b"GPU-1"
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 2
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle, memory):
        assert handle.value == 101
        memory._obj.total, memory._obj.free = 900, 700
        return 0


@pytest.fixture
def opened_nvml(monkeypatch):
    """Let the monitoring library be a fake."""

    def make(library):
        def open_library(name):
            if library is None:
                raise OSError(name)
            return library

        cards._opened.cache_clear()
        monkeypatch.setattr(cards.ctypes, "CDLL", open_library)

    yield make
    cards._opened.cache_clear()


def test_a_monitoring_library_that_is_too_old_is_none(opened_nvml):
    class OldNvml:
        """Has the functions under the names from ten years ago."""

        nvmlInit = nvmlDeviceGetCount = nvmlDeviceGetMemoryInfo = staticmethod(lambda *_: 0)

    opened_nvml(OldNvml())
    assert card_count() == 0 and card_memory("0") is None


def test_memory_by_the_monitoring_library(opened_nvml, smi, monkeypatch):
    opened_nvml(FakeNvml())
    assert card_memory("1") == card_memory("GPU-1") == (900, 700)
    assert card_memory("0") is None and card_memory("GPU-2") is None
    assert card_uuid("1") == card_uuid("GPU-1") == "GPU-1"
    assert card_uuid("0") is None
    assert card_count() == 2
    monkeypatch.setattr(cards, "card_memory", card_memory)
    assert CudaBackend().capacity("cuda:1") == Capacity(900, 700)
    # nvidia-smi knows a card that the library does not know.
    assert CudaBackend().capacity("cuda:0").free_bytes == 20000 * MIB


@pytest.mark.parametrize("library", [None, FakeNvml(fails=9)])
def test_without_the_monitoring_library(opened_nvml, library):
    opened_nvml(library)
    assert card_memory("1") is None and card_count() == 0


@pytest.fixture
def compiler(monkeypatch):
    """Set whether there is a compiler for cards."""
    from exl_loader.backends.cuda import compilers

    def make(found):
        def choose(capability):
            assert capability == (8, 6)
            if not found:
                raise KernelBuildError("CUDA compiler")

        monkeypatch.setattr(compilers, "choose_cuda_compiler", choose)

    make(True)
    return make


def test_auto_means_the_cards_that_can_run_models(smi, torch_with_cuda, compiler):
    assert cards.auto_cards() == ("cuda:0", "cuda:1")
    assert chosen_devices(LoadOptions()) == ["cuda:0", "cuda:1"]
    assert chosen_devices(LoadOptions(device="cpu")) == ["cpu"]
    assert chosen_devices(LoadOptions(gpu_split="20,8")) == ["cuda:0", "cuda:1"]
    assert not torch_with_cuda.open


@pytest.mark.parametrize(("visible", "found"), [
    (None, ("cuda:1",)), ("1,0", ("cuda:0",)), ("0", ()), ("GPU-77,GPU-8a", ("cuda:0",)),
])  # fmt: skip
def test_auto_ignores_old_cards(smi, torch_with_cuda, compiler, monkeypatch, visible, found):
    monkeypatch.setenv("SMI_CAPABILITY", "6.1")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert cards.auto_cards() == found


@pytest.mark.parametrize("missing", [
    "compiler", "driver", "torch", "capability", "visible", "reference"
])
def test_auto_means_the_cpu_if_something_is_missing(
    smi, torch_with_cuda, compiler, monkeypatch, missing, tmp_path
):
    if missing == "compiler":
        compiler(False)
    elif missing == "driver":
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    elif missing == "torch":
        monkeypatch.setattr(torch.version, "cuda", None)
    elif missing == "capability":
        monkeypatch.setenv("SMI_CAPABILITY", "6.1")
        monkeypatch.setenv("SMI_SECOND", "7.0")
    elif missing == "visible":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    else:
        monkeypatch.setenv("EXL_LOADER_REFERENCE", "1")
    assert cards.auto_cards() == ()
    assert chosen_devices(LoadOptions()) == ["cpu"]


@pytest.mark.parametrize(("text", "answer"), [
    ("cuda: Optional[str] = '12.8'", True), ("cuda = '13.0'", True), ("cuda = None", False),
    ("hip = '6'\ncuda: Optional[str] = None", False),
])  # fmt: skip
def test_pytorchs_build_is_read_without_importing_it(monkeypatch, tmp_path, text, answer):
    (tmp_path / "version.py").write_text(f"__version__ = '2.9'\n{text}\n")
    monkeypatch.delitem(cards.sys.modules, "torch")
    spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(cards.importlib.util, "find_spec", lambda name: spec)
    assert cards._torch_has_cuda() is answer


def test_a_buffer_that_fills_the_card_is_kept(monkeypatch):
    """Device memory is taken at allocation, so the free bytes afterwards do not matter."""
    from exl_loader.memory import buffers as memory
    from exl_loader.memory.segments import lay_out
    from exl_loader.utils.table import TensorSpec
    from support.emulated_cuda import EmulatedCard

    class Full(EmulatedCard):
        def capacity(self, name):
            return Capacity(1 << 30, 0)

    monkeypatch.setitem(BACKENDS, "cuda", Full())
    segments = lay_out([TensorSpec("t", "cache", "uint8", (1 << 20,), "cuda:0")])
    buffers = memory.allocate(segments.values())
    assert buffers.allocated_bytes() == 1 << 20
    buffers.release()
