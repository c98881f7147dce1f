"""All operations of a card, run at once or prepared for a step that is replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from ...utils.progress import Progress
from ..recorder import Function
from ..reference.rounding import RoundingOps
from .attention import AttentionOps
from .cpu_access import CardAccess
from .fusion import issue_all
from .kernels import open_launcher
from .launcher import Launch, Launcher, run_now
from .layout import StreamLinear
from .linear import LinearOps
from .moe import MoeOps
from .pack import PackOps
from .top_logits import TopLogitsOps

if TYPE_CHECKING:
    from ..base import Call, DeviceOps, Linear
    from ..cpu_access import CpuAccess

# Copies of a buffer in `read_through`: enough that the last one's wait costs little.
_READ_ROUNDS = 8


class CudaOps(LinearOps, AttentionOps, MoeOps, TopLogitsOps, PackOps, RoundingOps):
    """The operations of `base.DeviceOps` on a card.

    Args:
        launcher: prepares launches on the device's current stream.
        cpu_access: to the device's tensors.
        issue: see `KernelOps`.
    """

    name = "cuda"

    def __init__(
        self, launcher: Launcher, cpu_access: CpuAccess,
        issue: Callable[[Launch], None] = run_now,
    ):
        super().__init__(launcher, issue)
        self.cpu_access = cpu_access

    def call(self, function: Callable[[DeviceOps], None]) -> None:
        function(self)

    def prepare(self, calls: Sequence[Call]) -> list[Launch]:
        """Prepare the operations of a step: neighbours become one launch where that can be."""
        prepared: list[Launch] = []
        issuing = CudaOps(self.launcher, self.cpu_access, prepared.append)
        for is_function, group in groupby(calls, lambda call: isinstance(call, Function)):
            if is_function:
                prepared += [partial(call.run, self) for call in group]
            else:
                issue_all(issuing, list(group))
        return prepared

    def read_through(self, buffer: torch.Tensor) -> int:
        source, target = buffer.chunk(2)
        for _ in range(_READ_ROUNDS):
            target.copy_(source)
        self.cpu_access.finish()
        nbytes: int = buffer.nbytes
        return _READ_ROUNDS * nbytes

    def share_permutations(self, layers: Sequence[Linear]) -> None:
        """A card then permutes and quantises the input of these layers once."""
        first, *others = layers
        for other in others:
            if not isinstance(first, StreamLinear) or not isinstance(other, StreamLinear):
                return
            if first.perm is None or other.perm is None:
                continue
            if torch.equal(first.perm.cpu(), other.perm.cpu()):
                other.perm = first.perm


# Cards whose kernels this process has checked.
_checked: set[int] = set()


def open_ops(index: int, progress: Progress | None = None) -> DeviceOps:
    """Return the operations of a card. Its kernels are compiled if that was not done yet.

    The first time in a process they are checked (`self_check.py`).

    Args:
        index: of the card, as PyTorch counts.
        progress: shows compiling.

    Raises:
        As `kernels.open_launcher`. DeviceError: the kernels compute wrong results; nothing of the
        card is held then.
    """

    def stream() -> int:
        # What torch.cuda.current_stream does, without creating an object at each launch.
        handle: int = torch._C._cuda_getCurrentRawStream(index)
        return handle

    launcher = open_launcher(index, stream, progress)
    ops = CudaOps(launcher, CardAccess(f"cuda:{index}", launcher))
    if index not in _checked:
        from .self_check import check_card

        try:
            check_card(ops, f"cuda:{index}")
        except BaseException:
            launcher.close()
            raise
        _checked.add(index)
    return ops
