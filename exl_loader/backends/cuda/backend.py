"""NVIDIA cards as a backend: their memory, and operations that run compiled CUDA kernels."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from ...utils.errors import InvalidSettings
from ..reference import reference_is_forced
from .device import ALIGNMENT_BYTES, CudaDevice, auto_cards, card_index, card_name

if TYPE_CHECKING:
    from ...utils.progress import Progress
    from ..base import Ops, Shapes, StepSizes


class CudaBackend(CudaDevice):
    """`Backend` of `cuda:0`, `cuda:1`, ..."""

    kind = "cuda"
    default_device = card_name(0)
    is_main_memory = False
    alignment_bytes = ALIGNMENT_BYTES

    def auto_devices(self, count: int = 0) -> list[str]:
        return [card_name(index) for index in range(count)] or [*auto_cards()]

    def scratch_bytes(self, step: StepSizes) -> int:
        from . import scratch

        attention, rows = step.attention, step.rows
        need = max(
            *(scratch.linear_scratch_bytes(*product) for product in step.products),
            scratch.write_cache_scratch_bytes(rows, attention, step.cache_type),
            scratch.attention_scratch_bytes(
                rows, step.max_batch_size, step.ctx_size, attention, step.cache_type
            ),
        )
        if not step.logits_rows:
            return need
        return max(need, scratch.top_logits_scratch_bytes(step.logits_rows, step.vocab_size))

    def workspace_specs(self, step: StepSizes) -> Shapes:
        """Return `top_logits`, results of that operation, and `expert_tables`: a description of
        each expert's three projections, for every layer."""
        from .linear_structs import LayerStruct
        from .scratch_sampling import RESULT_WORDS

        specs: Shapes = {}
        if step.logits_rows:
            specs["top_logits"] = ("int32", (step.logits_rows, RESULT_WORDS))
        if step.num_experts:
            row_bytes = step.num_experts * ctypes.sizeof(LayerStruct)
            specs["expert_tables"] = ("uint8", (step.num_layers, 3, row_bytes))
        return specs

    def open(self, device: str, progress: Progress | None = None) -> Ops:
        if reference_is_forced():
            raise InvalidSettings(
                f"kernels for device {device!r}", expected="cpu for the reference operations"
            )
        from . import ops

        return ops.open_ops(card_index(device), progress)
