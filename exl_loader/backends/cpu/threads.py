"""How many threads the CPU kernels use."""

from __future__ import annotations

import os
import re

from ...utils.errors import InvalidSettings, shown
from ...utils.system.processors import physical_cores, processor_quota

THREADS_ENV = "EXL_LOADER_THREADS"
# A limit above the cores of any machine, because each thread takes a stack and scratch memory.
MAX_THREADS = 1024


def default_threads() -> int:
    """Return the number of threads of the kernels: EXL_LOADER_THREADS, or the physical cores.

    Only cores that this process may use are counted, and at most a container's processor limit,
    because all threads wait for a thread that has no core.

    Raises:
        InvalidSettings: EXL_LOADER_THREADS is not a number from 1 to `MAX_THREADS`.
    """
    setting = os.environ.get(THREADS_ENV, "").strip()
    if not setting:
        return max(1, min(physical_cores(), processor_quota()))
    if not re.fullmatch("[0-9]{1,9}", setting) or not 1 <= int(setting) <= MAX_THREADS:
        raise InvalidSettings(
            f"environment variable {THREADS_ENV}",
            expected=f"a number from 1 to {MAX_THREADS}",
            actual=shown(setting),
        )
    return int(setting)
