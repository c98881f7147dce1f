"""NVIDIA cards: memory by the driver's own figures."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from ...utils.errors import ExlLoaderError, InvalidSettings
from ..base import Capacity, Process
from ..reference import reference_is_forced
from .device_taken import ASSUMED_GRAPH_BYTES, ASSUMED_KERNEL_BYTES, held_taken, known_taken
from .nvml import card_count, card_memory, card_uuid

if TYPE_CHECKING:
    import torch

MIB = 1 << 20

# Tensors start on multiples of the driver's own granularity, for coalesced loads.
ALIGNMENT_BYTES = 256

# A CUDA context, its library handles and kernel modules. Between 250 and 500 MiB by card
# and driver; where no context of ours exists to measure, the upper end is assumed, and the
# reservation says that it is assumed.
ASSUMED_CONTEXT_BYTES = 512 * MIB

OLDEST_CAPABILITY = (7, 5)

# What no card is called.
_HIDDEN = "none"


class CudaDevice:
    """NVIDIA cards. PyTorch is asked only where the process already uses it on the card:
    asking it otherwise would itself take hundreds of MiB of the card.
    """

    # The driver hands out memory in pages of 2 MiB.
    granularity_bytes = 2 * MIB
    taken_by_touch = False

    def __init__(self) -> None:
        # Card -> what its context was seen to take when it was made.
        self._context_bytes: dict[str, int] = {}

    def initialize(self, device: str) -> None:
        """Make the context, and measure what it takes.

        Raises:
            InvalidSettings: this PyTorch has no CUDA, or there is no such card.
        """
        if self.is_initialized(device):
            return
        import torch

        if not torch.cuda.is_available() or card_index(device) >= torch.cuda.device_count():
            raise InvalidSettings(
                f"device {device}",
                expected="a card that PyTorch sees",
                actual=f"PyTorch {torch.__version__} sees "
                f"{torch.cuda.device_count() if torch.cuda.is_available() else 'no cards'}",
                remedy="Install PyTorch for CUDA and NVIDIA's driver, or choose device='cpu'",
            )
        before = _smi_memory(device)
        torch.cuda.synchronize(card_index(device))
        free, _ = torch.cuda.mem_get_info(card_index(device))
        self._context_bytes[device] = 0 if before is None else max(0, before.free_bytes - free)

    def is_initialized(self, device: str) -> bool:
        """Whether this process has a context on the card."""
        return device in self._context_bytes or _torch_in_use(device) is not None

    def capacity(self, device: str) -> Capacity:
        """Ask PyTorch if it holds a context there, else `nvidia-smi`.

        What our context takes counts as free: it stands in `overhead`.
        """
        torch = _torch_in_use(device)
        if torch is not None:
            free, total = torch.cuda.mem_get_info(card_index(device))
            own = torch.cuda.memory_reserved(card_index(device)) + _held_bytes(device)
            own += held_taken(device)
            return Capacity(total, free + self._context_bytes.get(device, 0), own)
        found = _smi_memory(device)
        if found is not None:
            return found
        raise InvalidSettings(
            f"device {device}",
            expected="an NVIDIA card that nvidia-smi lists",
            actual="none of that number",
            remedy="Use device='cpu', or vram='24GiB' to plan for a card that is not here.",
        )

    def overhead(self, device: str) -> tuple[int, bool]:
        """What the context, kernels and graphs take, measured or as far as that goes assumed.

        A context that somebody else of this process has made is in what is not free already.
        """
        taken = known_taken(device)
        if not self.is_initialized(device):
            return ASSUMED_CONTEXT_BYTES + (taken or ASSUMED_GRAPH_BYTES), False
        if taken is None:
            taken = ASSUMED_KERNEL_BYTES + ASSUMED_GRAPH_BYTES
            return self._context_bytes.get(device, 0) + taken, False
        return self._context_bytes.get(device, 0) + taken, True

    def processes(self, device: str, limit: int) -> list[Process]:
        """Return the other compute processes on the card, as far as the driver tells."""
        rows = query_nvidia_smi(
            "--query-compute-apps=pid,used_memory,process_name", f"--id={_smi_id(device)}", cells=3
        )
        found = [
            Process(int(pid), process, int(used) * MIB)
            for pid, used, process in rows
            if used.isdigit() and int(pid) != os.getpid()
        ]
        return sorted(found, key=lambda process: -process.held_bytes)[:limit]

    def empty(self, device: str, nbytes: int) -> tuple[torch.Tensor, object]:
        """Take a buffer from the driver: PyTorch's allocator would round it up and keep it."""
        import torch

        from .memory import CardMemory

        memory = CardMemory(card_index(device), nbytes)
        return torch.as_tensor(memory, device=device), memory

    def touch(self, buffer: torch.Tensor) -> None:
        """Device memory is taken when it is allocated; zeros, as on the CPU."""
        buffer.zero_()


def card_index(name: str) -> int:
    """Return a card's number, as PyTorch counts."""
    return int(name.partition(":")[2] or 0)


def card_name(index: int) -> str:
    """Name a card by its number."""
    return f"cuda:{index}"


def _torch_in_use(name: str) -> Any:
    """PyTorch, where this process has a context on the card; else None."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return torch if torch._C._cuda_hasPrimaryContext(card_index(name)) else None


def _held_bytes(name: str) -> int:
    from .memory import held_bytes

    return held_bytes(card_index(name))


@functools.cache
def auto_cards() -> tuple[str, ...]:
    """Return the cards that `device="auto"` may use, in order; none to run on the CPU.

    A card counts where PyTorch is built for CUDA, the driver lists the card, it is new enough,
    and something here compiles kernels for it. PyTorch is not imported to find out.
    """
    if reference_is_forced() or not _torch_has_cuda():
        return ()
    rows = query_nvidia_smi("--query-gpu=index,uuid,compute_cap", cells=3)
    names = map(card_name, range(len(rows)))
    return tuple(name for name in names if _can_run(_capability(_smi_id(name), rows)))


def _capability(card: str, rows: list[list[str]]) -> str:
    """Look a card's compute capability up in nvidia-smi's rows; empty where it is not there."""
    for index, uuid, capability in rows:
        # Users may shorten an identifier.
        if card == index or (not card.isdigit() and uuid.startswith(card)):
            return capability
    return ""


@functools.cache
def _can_run(capability: str) -> bool:
    """Whether our kernels run on cards of a compute capability such as `8.6`."""
    match = re.fullmatch(r"(\d+)\.(\d+)", capability)
    if match is None or (int(match[1]), int(match[2])) < OLDEST_CAPABILITY:
        return False
    from .toolchain import choose_cuda_compiler

    try:
        choose_cuda_compiler((int(match[1]), int(match[2])))
    except ExlLoaderError:
        return False
    return True


def _torch_has_cuda() -> bool:
    """Look at the version that PyTorch was built with, without importing it."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return torch.version.cuda is not None
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r"^cuda[^=\n]*=\s*['\"]", text, re.MULTILINE) is not None


def _smi_id(name: str) -> str:
    """Return how nvidia-smi calls a card.

    It counts along the bus and knows nothing of CUDA_VISIBLE_DEVICES; CUDA counts the fastest
    card first unless CUDA_DEVICE_ORDER says otherwise.
    """
    index = card_index(name)
    uuid = _uuid(index)
    if uuid is not None:
        return uuid
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(index)
    names = [part.strip() for part in visible.split(",") if part.strip()]
    return names[index] if index < len(names) else _HIDDEN


def card_identity(name: str) -> str | None:
    """Return a card's UUID; None where the monitoring library does not know the card."""
    card = _smi_id(name)
    return None if card == _HIDDEN else card_uuid(card)


@functools.cache
def _uuid(index: int) -> str | None:
    """Ask the driver which card CUDA gives a number; None where that cannot be in question.

    That takes nothing of a card.
    """
    if os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or card_count() < 2:
        return None
    from .driver import Driver

    found = (ctypes.c_ubyte * 16)()
    try:
        driver = Driver()
        driver.call("cuDeviceGetUuid_v2", found, driver.device(index))
    except (ExlLoaderError, AttributeError):  # no such card, or an old driver
        return None
    name = f"GPU-{UUID(bytes=bytes(found))}"
    return None if card_memory(name) is None else name


def _smi_memory(name: str) -> Capacity | None:
    """Ask the monitoring library, else `nvidia-smi`; None where there is no such card."""
    card = _smi_id(name)
    found = None if card == _HIDDEN else card_memory(card)
    if found is not None:
        return Capacity(*found)
    rows = query_nvidia_smi("--query-gpu=index,memory.total,memory.free", f"--id={card}", cells=3)
    for index, total, free in rows:
        # A name that is no number (GPU-8a3...) has chosen its row already.
        if card != _HIDDEN and (index == card or not card.isdigit()):
            return Capacity(int(total) * MIB, int(free) * MIB)
    return None


def query_nvidia_smi(*arguments: str, cells: int) -> list[list[str]]:
    """Run `nvidia-smi` and return its rows; [] where there is none, or it fails.

    Nothing is quoted there: a comma in the last cell belongs to it.
    """
    try:
        answer = subprocess.run(
            ["nvidia-smi", *arguments, "--format=csv,noheader,nounits"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(",", cells - 1) for line in answer.stdout.splitlines()]
    return [[cell.strip() for cell in row] for row in rows if len(row) == cells]
