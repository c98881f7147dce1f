"""NVIDIA cards: memory by the driver's own figures."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from ..errors import InvalidSettings
from . import Capacity, Process

MIB = 1 << 20

# A CUDA context, its library handles and kernel modules. Between 250 and 500 MiB by card
# and driver; where no context of ours exists to measure, the upper end is assumed, and the
# reservation says that it is assumed.
ASSUMED_CONTEXT_BYTES = 512 * MIB


class CudaDevice:
    """NVIDIA cards. PyTorch is asked only where the process already uses it on a card:
    asking it otherwise would itself take hundreds of MiB of the card.
    """

    # The driver hands out memory in pages of 2 MiB.
    granularity_bytes = 2 * MIB

    def capacity(self, name: str) -> Capacity:
        """Ask PyTorch if it holds a context here, else `nvidia-smi`."""
        torch = _torch_in_use()
        if torch is not None:
            free, total = torch.cuda.mem_get_info(_index(name))
            reserved = torch.cuda.memory_reserved(_index(name))
            return Capacity(total, free, reserved)
        for row in query_nvidia_smi("--query-gpu=index,memory.total,memory.free", cells=3):
            if row[0] == str(_index(name)):
                return Capacity(int(row[1]) * MIB, int(row[2]) * MIB)
        raise InvalidSettings(
            f"device {name}",
            expected="an NVIDIA card that nvidia-smi lists",
            actual="none of that number",
            remedy="Use device='cpu', or vram='24GiB' to plan for a card that is not here.",
        )

    def overhead(self, name: str) -> tuple[int, bool]:
        """A context that exists is in `free` already; one that does not is assumed."""
        return (0, True) if _torch_in_use() is not None else (ASSUMED_CONTEXT_BYTES, False)

    def processes(self, name: str, limit: int) -> list[Process]:
        """Return the compute processes on the card, as far as the driver tells."""
        rows = query_nvidia_smi(
            "--query-compute-apps=pid,used_memory,process_name", f"--id={_index(name)}", cells=3
        )
        found = [
            Process(int(pid), process, int(used) * MIB)
            for pid, used, process in rows
            if used.isdigit()
        ]
        return sorted(found, key=lambda process: -process.held_bytes)[:limit]

    def empty(self, name: str, nbytes: int) -> tuple[Any, Any]:
        """Take a buffer from the driver through PyTorch."""
        import torch

        try:
            buffer = torch.empty(nbytes, dtype=torch.uint8, device=name)
        except torch.cuda.OutOfMemoryError as error:
            raise MemoryError(str(error)) from error
        return buffer, buffer

    def touch(self, buffer: Any) -> None:
        """Device memory is taken when it is allocated; zeros, as on the CPU."""
        buffer.zero_()


def _index(name: str) -> int:
    return int(name.partition(":")[2] or 0)


def _torch_in_use() -> Any:
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_initialized() else None


def query_nvidia_smi(*arguments: str, cells: int) -> list[list[str]]:
    """Run `nvidia-smi` and return its rows; [] where there is none, or it fails.

    Nothing is quoted there: a comma in the last cell belongs to it.
    """
    try:
        answer = subprocess.run(
            ["nvidia-smi", *arguments, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(",", cells - 1) for line in answer.stdout.splitlines()]
    return [[cell.strip() for cell in row] for row in rows if len(row) == cells]
