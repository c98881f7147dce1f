"""Neighbouring operations of a recorded step as one launch.

A decode step of a 7B model on a fast card has a millisecond for some 500 operations, and each
launch costs one or two microseconds of it. What runs as one gives the same bits as one after
the other: the layer's definition stays in `layers.py`, and this module only looks for
neighbours that fit together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .layout import StreamLinear

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
        for fuse in (_fuse_norm, _fuse_gate, _fuse_linears, _fuse_heads):
            launch, count = fuse(ops, recorded[at:])
            if launch is not None:
                break
        else:
            operation, args = recorded[at]
            launch, count = ops.bind(operation, *args), 1
        launches.append(launch)
        at += count
    return launches


def _fuse_norm(ops: Any, recorded: Sequence[Recorded]) -> tuple[Launch | None, int]:
    """A norm, and products of what it makes."""
    operation, args = recorded[0]
    group = _linears(recorded[1:]) if operation == "rms_norm" else []
    if not group or group[0][0] is not args[3]:
        return None, 0
    layers, outs = [linear[1] for linear in group], [linear[2] for linear in group]
    launch = ops.prepare_normed_linears(*args, layers, outs, *group[0][4:])
    return launch, 1 + len(group)


def _fuse_gate(ops: Any, recorded: Sequence[Recorded]) -> tuple[Launch | None, int]:
    """A gate in place, and the product that follows; nothing else reads what it makes."""
    operation, args = recorded[0]
    group = _linears(recorded[1:2]) if operation == "gate" else []
    if not group or group[0][0] is not args[3] or args[3] is not args[0]:
        return None, 0
    _, layer, out, _, *add = group[0]
    return ops.prepare_gated_linear(*args[:3], layer, out, *add), 2


def _fuse_linears(ops: Any, recorded: Sequence[Recorded]) -> tuple[Launch | None, int]:
    """Products of one input, whose layers permute it the same way."""
    group = _linears(recorded)
    if len(group) < 2:
        return None, 0
    x, _, _, scratch, *add = group[0]
    layers, outs = [args[1] for args in group], [args[2] for args in group]
    return ops.prepare_linears(x, layers, outs, scratch, *add), len(group)


def _linears(recorded: Sequence[Recorded]) -> list[tuple[Any, ...]]:
    """Return the arguments of the products that come first and can be one launch."""
    group: list[tuple[Any, ...]] = []
    for operation, args in recorded[:_MAX_LINEARS]:
        if operation != "linear" or not isinstance(args[1], StreamLinear):
            break
        if group and not _share_input(group[0], args):
            break
        group.append(args)
    return group


def _share_input(first: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return (
        other[0] is first[0]
        and other[1].perm is first[1].perm
        and other[3] is first[3]
        and other[4:] == first[4:]
    )


def _fuse_heads(ops: Any, recorded: Sequence[Recorded]) -> tuple[Launch | None, int]:
    """Rotation of queries and keys and their way into the cache, behind norms if there are any.

    Nothing but the cache is given the keys.
    """
    names = [operation for operation, _ in recorded[:5]]
    norms: tuple[Any, ...] = ()
    if names == ["rms_norm", "rms_norm", "rope", "rope", "write_cache"]:
        q_norm, k_norm = recorded[0][1], recorded[1][1]
        for (rows, _, _, out), (_, (heads, _)) in zip(
            (q_norm, k_norm), recorded[2:4], strict=True
        ):
            if rows is not out or rows.data_ptr() != heads.data_ptr():
                return None, 0
        if q_norm[2] != k_norm[2]:
            return None, 0
        norms = q_norm[1], k_norm[1], q_norm[2]
    elif names[:3] != ["rope", "rope", "write_cache"]:
        return None, 0
    first = 2 if norms else 0
    (q, table), (k, k_table), (written, v, layer, batch, _) = (
        args for _, args in recorded[first : first + 3]
    )
    if k_table is not table or written is not k:
        return None, 0
    launch = ops.prepare_rope_write_cache(q, k, v, table, layer, batch, *norms)
    return launch, first + 3
