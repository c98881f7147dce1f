"""The CPU as a backend: main memory, and operations that use it in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..reference import reference_is_forced
from . import scratch
from .memory import PAGE_BYTES, MainMemory

if TYPE_CHECKING:
    from ...utils.progress import Progress
    from ..base import Ops, Shapes, StepSizes


class CpuBackend(MainMemory):
    """`Backend` of `cpu`. Names with a number share it, so that plans can be tried on several."""

    kind = "cpu"
    default_device = "cpu"
    is_main_memory = True
    # One cache line, and one AVX-512 register.
    alignment_bytes = 64
    granularity_bytes = PAGE_BYTES
    taken_by_touch = True

    def auto_devices(self, count: int = 0) -> list[str]:
        return [self.default_device]

    def scratch_bytes(self, step: StepSizes) -> int:
        return max(
            *(scratch.linear_scratch_bytes(rows, features) for rows, features, _ in step.products),
            scratch.write_cache_scratch_bytes(step.rows, step.attention, step.cache_type),
            scratch.attention_scratch_bytes(
                step.rows, step.max_batch_size, step.ctx_size, step.attention, step.cache_type
            ),
        )

    def workspace_specs(self, step: StepSizes) -> Shapes:
        return {}

    def open(self, device: str, progress: Progress | None = None) -> Ops:
        """Return the compiled operations; the reference where it is forced or no compiler is."""
        from .open import open_compiled, reference

        return reference() if reference_is_forced() else open_compiled(progress)
