"""NVIDIA cards as a backend: their memory, and operations that run compiled CUDA kernels."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from ...formats.layer import DenseSizes, QuantizedSizes
from ...utils.byte_counts import MIB
from ...utils.errors import InvalidSettings
from ..base import Capacity, Process
from ..layouts import dense_shapes
from ..reference import reference_is_forced

if TYPE_CHECKING:
    import torch

    from ...utils.progress import Progress
    from ..base import DeviceOps, Shapes, StepSizes

# Tensors start at multiples of the driver's own granularity, for coalesced loads.
ALIGNMENT_BYTES = 256

# A CUDA context, its library handles and kernel modules. Between 250 and 500 MiB by card and
# driver. Before there is a context to measure, the upper end is assumed, and the reservation
# marks it as assumed.
ASSUMED_CONTEXT_BYTES = 512 * MIB


class CudaBackend:
    """`Backend` of `cuda:0`, `cuda:1`, ...

    PyTorch is asked only if this process already uses it on the card, because otherwise the
    question itself would take hundreds of MiB of the card. What asks the driver is imported by
    the methods that need it, because plans for main memory import this module too.
    """

    kind = "cuda"
    default_device = "cuda:0"
    is_main_memory = False
    alignment_bytes = ALIGNMENT_BYTES
    # The driver allocates memory in pages of 2 MiB.
    granularity_bytes = 2 * MIB
    taken_by_touch = False
    # Each half is several times the caches of a card, of which the largest have 128 MiB.
    read_buffer_bytes = 1024 * MIB

    def __init__(self) -> None:
        # Card -> what its context took when it was created.
        self._context_bytes: dict[str, int] = {}

    def initialize(self, device: str) -> None:
        """Create the context, and measure what it takes.

        Raises:
            InvalidSettings: PyTorch has no CUDA, or there is no such card.
        """
        if self.is_initialized(device):
            return
        import torch

        from .cards import card_index, smi_memory

        if not torch.cuda.is_available() or card_index(device) >= torch.cuda.device_count():
            raise InvalidSettings(
                f"device {device}",
                expected="a card that PyTorch sees",
                actual=f"PyTorch {torch.__version__} sees "
                f"{torch.cuda.device_count() if torch.cuda.is_available() else 'no cards'}",
                remedy="Install PyTorch for CUDA and NVIDIA's driver, or choose device='cpu'",
            )
        before = smi_memory(device)
        torch.cuda.synchronize(card_index(device))
        free, _ = torch.cuda.mem_get_info(card_index(device))
        self._context_bytes[device] = 0 if before is None else max(0, before.free_bytes - free)

    def is_initialized(self, device: str) -> bool:
        """Tell whether this process has a context on the card."""
        return device in self._context_bytes or _torch_in_use(device) is not None

    def capacity(self, device: str) -> Capacity:
        """Ask PyTorch if it has a context on the card, else `nvidia-smi`.

        The memory of our context counts as free, because `overhead` has it.
        """
        from .cards import card_index, smi_memory
        from .driver import held_bytes
        from .taken import held_taken

        torch = _torch_in_use(device)
        if torch is not None:
            free, total = torch.cuda.mem_get_info(card_index(device))
            own = torch.cuda.memory_reserved(card_index(device)) + held_bytes(card_index(device))
            own += held_taken(device)
            return Capacity(total, free + self._context_bytes.get(device, 0), own)
        found = smi_memory(device)
        if found is not None:
            return found
        raise InvalidSettings(
            f"device {device}",
            expected="an NVIDIA card that nvidia-smi lists",
            actual="none of that number",
            remedy="Use device='cpu'",
        )

    def overhead(self, device: str) -> tuple[int, bool]:
        """Return what the context, kernels and graphs take; True if all of it was measured.

        A context that other code of this process has created is not free already.
        """
        from .taken import ASSUMED_GRAPH_BYTES, ASSUMED_KERNEL_BYTES, known_taken

        taken = known_taken(device)
        if not self.is_initialized(device):
            return ASSUMED_CONTEXT_BYTES + (taken or ASSUMED_GRAPH_BYTES), False
        if taken is None:
            taken = ASSUMED_KERNEL_BYTES + ASSUMED_GRAPH_BYTES
            return self._context_bytes.get(device, 0) + taken, False
        return self._context_bytes.get(device, 0) + taken, True

    def relative_speed(self, device: str) -> int:
        """Return the same for all cards."""
        return 1

    def processes(self, device: str, limit: int) -> list[Process]:
        """Return the other compute processes on the card, as far as the driver knows them."""
        from .cards import query_nvidia_smi, smi_id

        rows = query_nvidia_smi(
            "--query-compute-apps=pid,used_memory,process_name", f"--id={smi_id(device)}", cells=3
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

        from .cards import card_index
        from .driver import CardMemory

        memory = CardMemory(card_index(device), nbytes)
        return torch.as_tensor(memory, device=device), memory

    def empty_mapped(self, device: str, nbytes: int) -> tuple[torch.Tensor, object]:
        """Take pinned memory from the driver."""
        import numpy as np
        import torch

        from .cards import card_index
        from .driver import MappedMemory

        memory = MappedMemory(card_index(device), nbytes)
        return torch.from_numpy(np.asarray(memory)), memory

    def touch(self, buffer: torch.Tensor) -> None:
        """Fill with zeros, as on the CPU. Device memory is taken when it is allocated."""
        buffer.zero_()

    def auto_devices(self, count: int = 0) -> list[str]:
        from .cards import auto_cards, card_name

        return [card_name(index) for index in range(count)] or [*auto_cards()]

    def linear_shapes(self, sizes: QuantizedSizes | DenseSizes) -> Shapes:
        """Streams have room for a part of a block in their last group only, so a layer whose
        groups are no whole blocks is kept as float16 weights.
        """
        from .layout import stream_shapes

        if isinstance(sizes, DenseSizes):
            return dense_shapes(sizes)
        if not sizes.whole_blocks:
            return dense_shapes(DenseSizes(sizes.out_features, sizes.in_features, "float16"))
        return stream_shapes(sizes)

    def stored_rows(self, sizes: QuantizedSizes | DenseSizes) -> int:
        return sizes.in_features

    def scratch_bytes(self, step: StepSizes) -> int:
        from .attention import attention_scratch_bytes
        from .launcher import COUNTER_BYTES
        from .layout import least_upload_bytes
        from .linear import quantized_scratch_bytes
        from .linear_dense import dense_scratch_bytes
        from .top_logits import top_logits_scratch_bytes

        needs = [
            attention_scratch_bytes(
                step.rows, step.max_batch_size, step.ctx_size, step.attention
            )
        ]
        for rows, in_features in step.products:
            needs.append(quantized_scratch_bytes(rows, in_features))
            # Scratch is the upload buffer while weights are read.
            needs.append(least_upload_bytes(in_features))
        for rows, in_features in step.dense_products:
            needs.append(COUNTER_BYTES + dense_scratch_bytes(rows, in_features))
        if step.logits_rows:
            needs.append(top_logits_scratch_bytes(step.logits_rows, step.vocab_size))
        return max(needs)

    def workspace_shapes(self, step: StepSizes) -> Shapes:
        """Return `top_logits`, results of that operation, and `expert_tables`: a description of
        each expert's three projections, for every layer.
        """
        from ..top_logits import RESULT_WORDS
        from .moe import expert_table_shape

        specs: Shapes = {}
        if step.logits_rows:
            specs["top_logits"] = ("int32", (step.logits_rows, RESULT_WORDS))
        if step.num_experts:
            shape = expert_table_shape(step.num_layers, step.num_experts)
            specs["expert_tables"] = ("uint8", shape)
        return specs

    def open(self, device: str, progress: Progress | None = None) -> DeviceOps:
        if reference_is_forced():
            raise InvalidSettings(
                f"kernels for device {device!r}", expected="cpu for the reference operations"
            )
        from . import ops
        from .cards import card_index

        return ops.open_ops(card_index(device), progress)


def _torch_in_use(name: str) -> Any:
    """Return PyTorch if this process has a context on the card; else None."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    from .cards import card_index

    return torch if torch._C._cuda_hasPrimaryContext(card_index(name)) else None
