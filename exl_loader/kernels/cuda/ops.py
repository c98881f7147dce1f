"""Every operation on a card: launches that are prepared once and run by a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from ...progress import Progress
from .host import CardHost
from .open import open_launcher
from .ops_attention import CudaAttentionOps
from .ops_linear import LinearOps
from .ops_rows import Launch, RowOps

if TYPE_CHECKING:
    from ..host import Host
    from ..interface import Ops
    from .launcher import Launcher


class CudaOps(LinearOps, CudaAttentionOps, RowOps):
    """The operations of `interface.Ops`.

    An operation `foo` is `prepare_foo`, which returns what launches it: `ops.foo(...)`
    prepares and launches, `bind("foo", ...)` prepares.

    Args:
        launcher: runs kernels on the device's current stream.
        host: how the host gets at the device's tensors.

    Attributes:
        staging: uint8 [n] of the device that raw weights may pass through while a model is
            being loaded; None otherwise.
    """

    name = "cuda"

    def __init__(self, launcher: Launcher, host: Host):
        LinearOps.__init__(self, launcher)
        CudaAttentionOps.__init__(self, launcher)
        RowOps.__init__(self, launcher)
        self.host = host
        self.staging: torch.Tensor | None = None

    def bind(self, operation: str, *args: Any) -> Launch:
        """Prepare a call of an operation for any number of runs."""
        launch: Launch = getattr(self, f"prepare_{operation}")(*args)
        return launch

    def __getattr__(self, operation: str) -> Any:
        if operation.startswith(("_", "prepare_")):
            raise AttributeError(operation)
        prepare = getattr(self, f"prepare_{operation}")
        return lambda *args: prepare(*args)()


def open_ops(index: int, progress: Progress | None = None) -> Ops:
    """Return the operations of a card, compiling its kernels where that was not done yet.

    Args:
        index: the card, as PyTorch counts.
        progress: shows compiling.

    Raises:
        As `open.open_launcher`.
    """

    def stream() -> int:
        # What torch.cuda.current_stream does, without an object a launch.
        handle: int = torch._C._cuda_getCurrentRawStream(index)
        return handle

    launcher = open_launcher(index, stream, progress)
    return cast("Ops", CudaOps(launcher, CardHost(f"cuda:{index}")))
