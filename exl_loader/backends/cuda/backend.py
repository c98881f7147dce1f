"""NVIDIA cards as a backend: their memory, and operations that run compiled CUDA kernels."""

from __future__ import annotations

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
        from .attention import attention_scratch_bytes
        from .layout import least_upload_bytes
        from .linear import linear_scratch_bytes
        from .top_logits import top_logits_scratch_bytes

        needs = [
            attention_scratch_bytes(
                step.rows, step.max_batch_size, step.ctx_size, step.attention
            )
        ]
        for rows, in_features, _ in step.products:
            needs.append(linear_scratch_bytes(rows, in_features))
            # Scratch is the upload buffer while weights are read.
            needs.append(least_upload_bytes(in_features))
        if step.logits_rows:
            needs.append(top_logits_scratch_bytes(step.logits_rows, step.vocab_size))
        return max(needs)

    def workspace_specs(self, step: StepSizes) -> Shapes:
        """Return `top_logits`, results of that operation, and `expert_tables`: a description of
        each expert's three projections, for every layer."""
        from .moe import expert_table_shape
        from .top_logits import RESULT_WORDS

        specs: Shapes = {}
        if step.logits_rows:
            specs["top_logits"] = ("int32", (step.logits_rows, RESULT_WORDS))
        if step.num_experts:
            shape = expert_table_shape(step.num_layers, step.num_experts)
            specs["expert_tables"] = ("uint8", shape)
        return specs

    def open(self, device: str, progress: Progress | None = None) -> Ops:
        if reference_is_forced():
            raise InvalidSettings(
                f"kernels for device {device!r}", expected="cpu for the reference operations"
            )
        from . import ops

        return ops.open_ops(card_index(device), progress)
