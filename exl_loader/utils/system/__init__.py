"""Everything that depends on the operating system: the only code that asks which one this is.

main_memory.py: the memory of the machine and of processes. processors.py: cores and instruction
sets. processes.py: child processes, their limits, and interrupts. files.py: owners and
renaming. libraries.py: shared libraries. windows.py: the Win32 functions that these call.
"""

from __future__ import annotations

import platform
import sys


def is_windows() -> bool:
    """Return whether this is Windows. Only compilers and file permissions need to know."""
    return sys.platform == "win32"


def is_mac() -> bool:
    """Return whether this is macOS. Only compilers need to know."""
    return sys.platform == "darwin"


def system_kind() -> str:
    """Name the operating system as `sys.platform` does: `linux`, `darwin`, `win32`."""
    return sys.platform


def system_name() -> str:
    """Name the operating system with its version, for a person."""
    return platform.platform()


def machine_type() -> str:
    """Name the instruction set of this machine in lower case, such as `x86_64` or `amd64`."""
    return platform.machine().lower()


def linux_distributions() -> list[str]:
    """Name this Linux distribution and those it is derived from, by /etc/os-release."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return []
    return [release.get("ID", ""), *release.get("ID_LIKE", "").split()]
