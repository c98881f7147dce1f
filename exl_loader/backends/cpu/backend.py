"""The backend of the CPU: main memory, and operations that use it in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...formats.layer import DenseSizes, QuantizedSizes
from ..layouts import dense_shapes
from ..reference import reference_is_forced
from .attention import attention_scratch_bytes
from .layout import packed_shapes
from .linear import dense_scratch_bytes, packed_scratch_bytes
from .memory import PAGE_BYTES, MainMemory
from .threads import default_threads

if TYPE_CHECKING:
    from ...utils.progress import Progress
    from ..base import DeviceOps, Shapes, StepSizes


class CpuBackend(MainMemory):
    """The backend of `cpu`. `cpu:1`, ... are the same memory, to try several devices."""

    kind = "cpu"
    default_device = "cpu"
    is_main_memory = True
    # One cache line, and one AVX-512 register.
    alignment_bytes = 64
    granularity_bytes = PAGE_BYTES
    # Several times a last-level cache of 32 MiB, in whole claims of csrc/cpu/read_sum.cpp.
    read_buffer_bytes = 144 << 20
    taken_by_touch = True

    def auto_devices(self, count: int = 0) -> list[str]:
        return [self.default_device]

    def relative_speed(self, device: str) -> int:
        """Return the number of threads, because products of several rows compute."""
        return default_threads()

    def linear_shapes(self, sizes: QuantizedSizes | DenseSizes) -> Shapes:
        return dense_shapes(sizes) if isinstance(sizes, DenseSizes) else packed_shapes(sizes)

    def stored_rows(self, sizes: QuantizedSizes | DenseSizes) -> int:
        return sizes.in_features if isinstance(sizes, DenseSizes) else sizes.stored_rows

    def scratch_bytes(self, step: StepSizes) -> int:
        attention = attention_scratch_bytes(step.max_batch_size, step.ctx_size, step.attention)
        return max(
            attention,
            *(packed_scratch_bytes(rows, features) for rows, features in step.products),
            *(dense_scratch_bytes(rows, features) for rows, features in step.dense_products),
        )

    def workspace_shapes(self, step: StepSizes) -> Shapes:
        return {}

    def open(self, device: str, progress: Progress | None = None) -> DeviceOps:
        """Return the compiled operations; the reference if forced or without a compiler."""
        from .open import open_compiled, reference

        return reference() if reference_is_forced() else open_compiled(progress)
