"""A quantised layer's values into the streams of `packed_cuda.py`, through the operations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from .layout import StreamLinear, group_table, window_table

if TYPE_CHECKING:
    import torch

    from ...formats.packed import LinearPlan

    Groups = list[tuple[int, int]]
    Tensors = dict[str, torch.Tensor]


class StreamOps(Protocol):
    """What packs streams on a device: `backends/cuda/ops_linear.py`."""

    def pack_exl2_streams(self, q_weight: torch.Tensor, scales: torch.Tensor,
                          groups: torch.Tensor, codes: torch.Tensor) -> None: ...

    def pack_gptq_streams(self, qweight: torch.Tensor, scales: torch.Tensor,
                          zeros: torch.Tensor, perm: torch.Tensor | None,
                          groups: torch.Tensor, codes: torch.Tensor) -> None: ...


def pack_exl2_streams(plan: LinearPlan, groups: Groups, words: torch.Tensor,
                      scales: torch.Tensor, perm: torch.Tensor | None, tensors: Tensors,
                      ops: StreamOps) -> StreamLinear:
    """Pack an EXL2 layer whose tensors were read and checked.

    Args:
        groups: (bits, rows) of each. words: int32 [R, out_features], scales: float16
        [G, out_features], both of the host. perm: the resident one, None where it is trivial.
        tensors: the plan's, of the device.
    """
    linear = _laid_out(plan, groups, perm, tensors, zeros=False)
    ops.pack_exl2_streams(words, scales, linear.groups, linear.codes)
    return linear


def pack_gptq_streams(plan: LinearPlan, groups: Groups, words: torch.Tensor,
                      scales: torch.Tensor, zeros: torch.Tensor, perm: torch.Tensor | None,
                      tensors: Tensors, ops: StreamOps) -> StreamLinear:
    """Pack a GPTQ layer; arguments as above, zeros uint8 [G, out_features] of the host."""
    linear = _laid_out(plan, groups, perm, tensors, zeros=True)
    ops.pack_gptq_streams(words, scales, zeros, perm, linear.groups, linear.codes)
    return linear


def _laid_out(plan: LinearPlan, groups: Groups, perm: torch.Tensor | None, tensors: Tensors,
              zeros: bool) -> StreamLinear:
    """Fill the tables of a layer whose streams are yet to be written."""
    import torch

    table = group_table(groups, zeros)
    windows = window_table(table, zeros)
    tensors["groups"].copy_(torch.tensor(table, dtype=torch.int32))
    tensors["windows"].copy_(torch.tensor(windows, dtype=torch.int32))
    return StreamLinear(
        plan.in_features,
        plan.out_features,
        tensors["codes"],
        tensors["groups"],
        tensors["windows"],
        windows,
        zeros=zeros,
        perm=perm,
        bias=tensors.get("bias"),
    )
