"""Every operation on a card: launches that are prepared once and run by a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from ...utils.progress import Progress
from .fusion import Recorded, bind_all
from .host import CardHost
from .layout import StreamLinear
from .open import open_launcher
from .ops_attention import CudaAttentionOps
from .ops_linear import ExpertLayers, LinearOps
from .ops_rows import Launch, RowOps
from .ops_sampling import SamplingOps

if TYPE_CHECKING:
    from ..base import Ops
    from ..host import Host
    from .launcher import Launcher


class CudaOps:
    """The operations of `interface.Ops`, each by the part that has it.

    An operation `foo` is a part's `prepare_foo`, which returns what launches it:
    `ops.foo(...)` prepares and launches, `bind("foo", ...)` prepares.

    Args:
        launcher: runs kernels on the device's current stream.
        host: how the host gets at the device's tensors.
    """

    name = "cuda"

    def __init__(self, launcher: Launcher, host: Host):
        self.host = host
        self._linear = LinearOps(launcher)
        self._parts = (
            self._linear, CudaAttentionOps(launcher), RowOps(launcher), SamplingOps(launcher)
        )

    @property
    def staging(self) -> torch.Tensor | None:
        """uint8 [n] of the device for raw weights on their way, while a model is loaded."""
        return self._linear.staging

    @staging.setter
    def staging(self, lent: torch.Tensor | None) -> None:
        self._linear.staging = lent

    def bind(self, operation: str, *args: Any) -> Launch:
        """Prepare a call of an operation for any number of runs."""
        launch: Launch = getattr(self, f"prepare_{operation}")(*args)
        return launch

    def bind_all(self, recorded: Sequence[Recorded]) -> list[Launch]:
        """Prepare the operations of a step, neighbours as one launch where that can be."""
        return bind_all(self, recorded)

    def expert_layers(self, layers: Sequence[Any], table: torch.Tensor) -> ExpertLayers | None:
        """Describe one projection of all experts to `linear_pairs`; None if it cannot run them.

        Args:
            layers: in the order of experts. table: uint8 [n] of the device, for the result.
        """
        if not all(isinstance(layer, StreamLinear) for layer in layers):
            return None
        return ExpertLayers(layers, table)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        for part in self._parts:
            if hasattr(part, name):
                return getattr(part, name)
        if name.startswith("prepare_"):
            raise AttributeError(f"no operation {name.removeprefix('prepare_')}")
        prepare = getattr(self, f"prepare_{name}")
        return lambda *args: prepare(*args)()


# Cards whose kernels this process has checked.
_checked: set[int] = set()


def open_ops(index: int, progress: Progress | None = None) -> Ops:
    """Return the operations of a card, compiling its kernels where that was not done yet.

    The first time in a process they are checked (`self_check.py`).

    Args:
        index: the card, as PyTorch counts.
        progress: shows compiling.

    Raises:
        As `open.open_launcher`. DeviceError: they do not compute what they should; nothing of
        the card is held then.
    """

    def stream() -> int:
        # What torch.cuda.current_stream does, without an object a launch.
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
