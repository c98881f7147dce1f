"""All operations of a card, run at once or prepared for a step that is replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch

from ...utils.progress import Progress
from .attention import AttentionOps
from .fusion import Recorded, issue_all
from .host import CardHost
from .kernels import open_launcher
from .launcher import Launch, Launcher, run_now
from .linear import LinearOps
from .moe import MoeOps
from .pack import PackOps
from .top_logits import TopLogitsOps

if TYPE_CHECKING:
    from ..base import Ops
    from ..host import Host


class CudaOps(LinearOps, AttentionOps, MoeOps, TopLogitsOps, PackOps):
    """The operations of `base.Ops` on a card.

    Args:
        launcher: prepares launches on the device's current stream.
        host: CPU access to the device's tensors.
        issue: see `KernelOps`.
    """

    name = "cuda"

    def __init__(
        self, launcher: Launcher, host: Host, issue: Callable[[Launch], None] = run_now
    ):
        super().__init__(launcher, issue)
        self.host = host

    def bind_all(self, recorded: Sequence[Recorded]) -> list[Launch]:
        """Prepare the operations of a step: neighbours become one launch where that can be."""
        launches: list[Launch] = []
        issue_all(CudaOps(self.launcher, self.host, launches.append), recorded)
        return launches


# Cards whose kernels this process has checked.
_checked: set[int] = set()


def open_ops(index: int, progress: Progress | None = None) -> Ops:
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
    ops = CudaOps(launcher, CardHost(f"cuda:{index}", launcher))
    if index not in _checked:
        from .self_check import check_card

        try:
            check_card(ops, f"cuda:{index}")
        except BaseException:
            launcher.close()
            raise
        _checked.add(index)
    return cast("Ops", ops)
