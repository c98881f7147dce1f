"""Neighbouring operations of a recorded step as one launch.

A decode step of a 7B model on a fast card has a millisecond for some 500 operations, and each
launch costs one or two microseconds of it. What runs as one gives the same bits as one after
the other: the layer's definition stays in `layers.py`, and this module only looks for
neighbours that fit together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...formats.packed_cuda import StreamLinear

if TYPE_CHECKING:
    from .ops_rows import Launch

Recorded = tuple[str, tuple[Any, ...]]

# Layers that `prepare_linears` takes at a time.
_MAX_LINEARS = 3


def bind_all(ops: Any, recorded: Sequence[Recorded]) -> list[Launch]:
    """Prepare recorded operations in order, neighbours as one where that can be.

    Args:
        ops: a `CudaOps`.
        recorded: names and arguments of operations of `interface.Ops`.
    """
    launches: list[Launch] = []
    at = 0
    while at < len(recorded):
        for fuse in (_fuse_linears, _fuse_heads):
            launch, count = fuse(ops, recorded[at:])
            if launch is not None:
                break
        else:
            operation, args = recorded[at]
            launch, count = ops.bind(operation, *args), 1
        launches.append(launch)
        at += count
    return launches


def _fuse_linears(ops: Any, recorded: Sequence[Recorded]) -> tuple[Launch | None, int]:
    """Products of one input, whose layers permute it the same way."""
    group: list[tuple[Any, ...]] = []
    for operation, args in recorded[:_MAX_LINEARS]:
        if operation != "linear" or not isinstance(args[1], StreamLinear):
            break
        if group and not _share_input(group[0], args):
            break
        group.append(args)
    if len(group) < 2:
        return None, 0
    x, _, _, scratch = group[0][:4]
    add = group[0][4:]
    layers, outs = [args[1] for args in group], [args[2] for args in group]
    return ops.prepare_linears(x, layers, outs, scratch, *add), len(group)


def _share_input(first: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return (
        other[0] is first[0]
        and other[1].perm is first[1].perm
        and other[3] is first[3]
        and other[4:] == first[4:]
    )


def _fuse_heads(ops: Any, recorded: Sequence[Recorded]) -> tuple[Launch | None, int]:
    """Rotation of queries and keys, behind their norms where a model has those."""
    names = [operation for operation, _ in recorded[:4]]
    if names[:2] == ["rope", "rope"]:
        (q, table), (k, k_table) = (args for _, args in recorded[:2])
        if k_table is table:
            return ops.prepare_rope_heads(q, k, table), 2
    if names != ["rms_norm", "rms_norm", "rope", "rope"]:
        return None, 0
    q_norm, k_norm, (q, table), (k, k_table) = (args for _, args in recorded[:4])
    for (rows, _, _, out), heads in ((q_norm, q), (k_norm, k)):
        if rows is not out or rows.data_ptr() != heads.data_ptr():
            return None, 0
    if k_table is not table or q_norm[2] != k_norm[2]:
        return None, 0
    return ops.prepare_rope_heads(q, k, table, q_norm[1], k_norm[1], q_norm[2]), 4
