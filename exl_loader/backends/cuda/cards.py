"""The NVIDIA cards of a machine: their names, memory and capability. Nothing here uses a card.

The driver's monitoring library answers within microseconds and without a context. `nvidia-smi`
asks the same library, but takes tens of milliseconds to start, which the gauge would pay for
with every movement of a slider, so it is the fallback. Functions: NVIDIA Management Library, API
reference.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

from ...utils.byte_counts import MIB
from ...utils.errors import ExlLoaderError
from ...utils.system.libraries import library_name
from ..base import Capacity
from ..reference import reference_is_forced
from .arch import OLDEST
from .driver import Driver

_LIBRARY = library_name(windows="nvml.dll", posix="libnvidia-ml.so.1")

_FUNCTIONS = (
    "nvmlInit_v2", "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2",
    "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetUUID",
)
# NVML_DEVICE_UUID_V2_BUFFER_SIZE
_UUID_BYTES = 96


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = [
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


def card_memory(card: str) -> tuple[int, int] | None:
    """Return a card's (total, free) bytes.

    Args:
        card: number as `nvidia-smi` counts, or whole UUID.

    Returns:
        None if there is no such card or no library.
    """
    handle, memory = _handle(card), _Memory()
    if handle is None or _opened().nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
        return None
    return memory.total, memory.free


def card_uuid(card: str) -> str | None:
    """Return a card's UUID, as `GPU-...`; argument and None as those of `card_memory`."""
    handle, text = _handle(card), ctypes.create_string_buffer(_UUID_BYTES)
    if handle is None or _opened().nvmlDeviceGetUUID(handle, text, _UUID_BYTES) != 0:
        return None
    return text.value.decode(errors="replace")


def _handle(card: str) -> ctypes.c_void_p | None:
    """Return a card's handle; None if there is no such card or no library."""
    library = _opened()
    if library is None:
        return None
    handle = ctypes.c_void_p()
    if card.isdigit():
        code = library.nvmlDeviceGetHandleByIndex_v2(int(card), ctypes.byref(handle))
    else:
        code = library.nvmlDeviceGetHandleByUUID(card.encode(), ctypes.byref(handle))
    return handle if code == 0 else None


def card_count() -> int:
    """Return the number of cards, including those hidden from CUDA; 0 without the library."""
    library, count = _opened(), ctypes.c_uint()
    if library is None or library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return 0
    return count.value


@functools.cache
def _opened() -> Any:
    """Return the library, initialised once a process; None if there is none."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    # A driver from ten years ago has other names for the functions.
    if not all(hasattr(library, name) for name in _FUNCTIONS):
        return None
    return library if library.nvmlInit_v2() == 0 else None


# A name that no card has.
_HIDDEN = "none"


def card_index(name: str) -> int:
    """Return the number of a card such as `cuda:0`, as PyTorch counts."""
    return int(name.partition(":")[2] or 0)


def card_name(index: int) -> str:
    """Name a card by its number."""
    return f"cuda:{index}"


@functools.cache
def auto_cards() -> tuple[str, ...]:
    """Return the cards that `device="auto"` may use, in order; none means the CPU.

    A card counts if PyTorch is built for CUDA, the driver lists the card, it is new enough, and
    the machine has a compiler for it. PyTorch is not imported to find out.
    """
    if reference_is_forced() or not _torch_has_cuda():
        return ()
    rows = query_nvidia_smi("--query-gpu=index,uuid,compute_cap", cells=3)
    names = map(card_name, range(len(rows)))
    return tuple(name for name in names if _can_run(_capability(smi_id(name), rows)))


def _capability(card: str, rows: list[list[str]]) -> str:
    """Return a card's compute capability from the rows of nvidia-smi; empty if it is missing."""
    for index, uuid, capability in rows:
        # Users may shorten an identifier.
        if card == index or (not card.isdigit() and uuid.startswith(card)):
            return capability
    return ""


@functools.cache
def _can_run(capability: str) -> bool:
    """Tell whether our kernels run on cards of a compute capability such as `8.6`."""
    match = re.fullmatch(r"(\d+)\.(\d+)", capability)
    if match is None or (int(match[1]), int(match[2])) < OLDEST:
        return False
    from .compilers import choose_cuda_compiler

    try:
        choose_cuda_compiler((int(match[1]), int(match[2])))
    except ExlLoaderError:
        return False
    return True


def _torch_has_cuda() -> bool:
    """Tell whether PyTorch was built for CUDA, without importing it."""
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


def smi_id(name: str) -> str:
    """Return the name of a card for nvidia-smi.

    nvidia-smi numbers cards by their place on the bus and ignores CUDA_VISIBLE_DEVICES. CUDA
    numbers the fastest card first, unless CUDA_DEVICE_ORDER selects another order.
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
    """Return a card's UUID; None if the monitoring library does not know the card."""
    card = smi_id(name)
    return None if card == _HIDDEN else card_uuid(card)


@functools.cache
def _uuid(index: int) -> str | None:
    """Ask the driver for the UUID of a card's number; None if there is only one numbering.

    That takes no memory of a card.
    """
    if os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or card_count() < 2:
        return None
    found = (ctypes.c_ubyte * 16)()
    try:
        driver = Driver()
        driver.call("cuDeviceGetUuid_v2", found, driver.device(index))
    except (ExlLoaderError, AttributeError):  # no such card, or an old driver
        return None
    name = f"GPU-{UUID(bytes=bytes(found))}"
    return None if card_memory(name) is None else name


def smi_memory(name: str) -> Capacity | None:
    """Ask the monitoring library, else `nvidia-smi`; None if there is no such card."""
    card = smi_id(name)
    found = None if card == _HIDDEN else card_memory(card)
    if found is not None:
        return Capacity(*found)
    rows = query_nvidia_smi("--query-gpu=index,memory.total,memory.free", f"--id={card}", cells=3)
    for index, total, free in rows:
        # A name that is not a number (GPU-8a3...) has selected its row already.
        if card != _HIDDEN and (index == card or not card.isdigit()):
            return Capacity(int(total) * MIB, int(free) * MIB)
    return None


def query_nvidia_smi(*arguments: str, cells: int) -> list[list[str]]:
    """Run `nvidia-smi` and return its rows; [] if there is none, or it fails.

    Its output has no quotes: a comma in the last cell belongs to the cell.
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
