"""Neighbouring operations of a recorded step as one launch.

A decode step of a 7B model on a fast card has a millisecond for about 500 operations, and each
launch costs one or two microseconds of it. Operations in one launch give the same bits as the
separate ones: `base.Ops` defines them, and this module only finds neighbours that fit together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .layout import StreamLinear
from .linear import MAX_LAYERS

if TYPE_CHECKING:
    from .ops import CudaOps

Recorded = tuple[str, tuple[Any, ...]]


def issue_all(ops: CudaOps, recorded: Sequence[Recorded]) -> None:
    """Issue recorded operations in order, neighbours as one launch where that can be.

    Args:
        ops: issues them.
        recorded: names and arguments of operations of `base.Ops`.
    """
    first = 0
    while first < len(recorded):
        rest = recorded[first:]
        count = _norm_linears(ops, rest) or _gated_linear(ops, rest) or _linears(ops, rest)
        count = count or _rope_write_cache(ops, rest)
        if count == 0:
            operation, args = rest[0]
            getattr(ops, operation)(*args)
            count = 1
        first += count


def _norm_linears(ops: CudaOps, recorded: Sequence[Recorded]) -> int:
    """Issue a norm and the products of its result; return how many operations these are."""
    operation, args = recorded[0]
    group = _products(recorded[1:]) if operation == "rms_norm" else []
    if not group or group[0][0] is not args[3]:
        return 0
    layers, outs = [product[1] for product in group], [product[2] for product in group]
    is_issued = ops.normed_linears(*args, layers, outs, *group[0][4:])
    return 1 + len(group) if is_issued else 0


def _gated_linear(ops: CudaOps, recorded: Sequence[Recorded]) -> int:
    """Issue a gate in place and the product that follows, the only reader of its result."""
    operation, args = recorded[0]
    group = _products(recorded[1:2]) if operation == "gate" else []
    if not group or group[0][0] is not args[3] or args[3] is not args[0]:
        return 0
    _, layer, out, _, *add = group[0]
    return 2 if ops.gated_linear(*args[:3], layer, out, *add) else 0


def _linears(ops: CudaOps, recorded: Sequence[Recorded]) -> int:
    """Issue products of one input, whose layers permute it in the same way."""
    group = _products(recorded)
    if len(group) < 2:
        return 0
    x, _, _, scratch, *add = group[0]
    ops.linears(x, [args[1] for args in group], [args[2] for args in group], scratch, *add)
    return len(group)


def _products(recorded: Sequence[Recorded]) -> list[tuple[Any, ...]]:
    """Return the arguments of the leading products that can be one launch."""
    group: list[tuple[Any, ...]] = []
    for operation, args in recorded[:MAX_LAYERS]:
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


def _rope_write_cache(ops: CudaOps, recorded: Sequence[Recorded]) -> int:
    """Issue norms, if any, and RoPE of queries and keys together with the writing of the cache.

    The rotated keys have no other reader than the cache.
    """
    names = [operation for operation, _ in recorded[:5]]
    norms: tuple[Any, ...] = ()
    if names == ["rms_norm", "rms_norm", "rope", "rope", "write_cache"]:
        q_norm, k_norm = recorded[0][1], recorded[1][1]
        for (rows, _, _, out), (_, (heads, _)) in zip(
            (q_norm, k_norm), recorded[2:4], strict=True
        ):
            if rows is not out or rows.data_ptr() != heads.data_ptr():
                return 0
        if q_norm[2] != k_norm[2]:
            return 0
        norms = q_norm[1], k_norm[1], q_norm[2]
    elif names[:3] != ["rope", "rope", "write_cache"]:
        return 0
    first = 2 if norms else 0
    (q, table), (k, k_table), (written, v, layer, batch, _) = (
        args for _, args in recorded[first : first + 3]
    )
    if k_table is not table or written is not k:
        return 0
    ops.rope_write_cache(q, k, v, table, layer, batch, *norms)
    return first + 3
