"""Neighbouring operations of a recorded step as one launch.

A decode step of a 7B model on a fast card has a millisecond for about 500 operations, and each
launch costs one or two microseconds of it. Operations in one launch give the same bits as the
separate ones: `base.Ops` defines them, and this module only finds neighbours that fit together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..recorder import Gate, Product, RmsNorm, Rope, WriteCache
from .layout import StreamLinear
from .linear import MAX_LAYERS

if TYPE_CHECKING:
    from ..base import Call
    from .ops import CudaOps


def issue_all(ops: CudaOps, calls: Sequence[Call]) -> None:
    """Issue recorded operations in order, neighbours as one launch where that can be.

    Args:
        ops: issues them.
        calls: the operations.
    """
    first = 0
    while first < len(calls):
        rest = calls[first:]
        count = _norm_linears(ops, rest) or _gated_linear(ops, rest) or _linears(ops, rest)
        count = count or _rope_write_cache(ops, rest)
        if count == 0:
            rest[0].run(ops)
            count = 1
        first += count


def _norm_linears(ops: CudaOps, calls: Sequence[Call]) -> int:
    """Issue a norm and the products of its result; return how many operations these are."""
    norm = calls[0]
    if not isinstance(norm, RmsNorm):
        return 0
    products, layers = _products(calls[1:])
    if not products or products[0].x is not norm.out:
        return 0
    is_issued = ops.normed_linears(
        norm.x, norm.weight, norm.eps, norm.out, layers, [product.out for product in products],
        products[0].add,
    )
    return 1 + len(products) if is_issued else 0


def _gated_linear(ops: CudaOps, calls: Sequence[Call]) -> int:
    """Issue a gate in place and the product that follows, the only reader of its result."""
    gate = calls[0]
    if not isinstance(gate, Gate) or gate.out is not gate.gate:
        return 0
    products, layers = _products(calls[1:2])
    if not products or products[0].x is not gate.out:
        return 0
    (product,) = products
    is_issued = ops.gated_linear(
        gate.gate, gate.up, gate.activation, layers[0], product.out, product.add
    )
    return 2 if is_issued else 0


def _linears(ops: CudaOps, calls: Sequence[Call]) -> int:
    """Issue products of one input, whose layers permute it in the same way."""
    products, layers = _products(calls)
    if len(products) < 2:
        return 0
    first = products[0]
    ops.linears(first.x, layers, [product.out for product in products], first.scratch, first.add)
    return len(products)


def _products(calls: Sequence[Call]) -> tuple[list[Product], list[StreamLinear]]:
    """Return the leading products that can be one launch, and their layers."""
    products: list[Product] = []
    layers: list[StreamLinear] = []
    for call in calls[:MAX_LAYERS]:
        if not isinstance(call, Product) or not isinstance(call.w, StreamLinear):
            break
        if products:
            first = products[0]
            shares_input = call.x is first.x and call.w.perm is layers[0].perm
            if not (shares_input and call.scratch is first.scratch and call.add == first.add):
                break
        products.append(call)
        layers.append(call.w)
    return products, layers


def _rope_write_cache(ops: CudaOps, calls: Sequence[Call]) -> int:
    """Issue norms, if any, and RoPE of queries and keys together with the writing of the cache.

    The rotated keys have no other reader than the cache. Norms are those of single heads: a norm
    over a token's whole projection stays a launch of its own.
    """
    norms = [call for call in calls[:2] if isinstance(call, RmsNorm)]
    count = len(norms) + 3
    if len(norms) == 1 or len(calls) < count:
        return 0
    q, k, write = calls[len(norms) : count]
    if not (isinstance(q, Rope) and isinstance(k, Rope) and isinstance(write, WriteCache)):
        return 0
    if k.table is not q.table or k.interleaved != q.interleaved or write.k is not k.x:
        return 0
    if q.mean is not None:
        return 0
    if not norms:
        ops.rope_write_cache(q.x, k.x, write.v, q.table, write.layer, write.batch,
                             interleaved=q.interleaved, mean=k.mean)
        return count
    q_norm, k_norm = norms
    for norm, rope in ((q_norm, q), (k_norm, k)):
        if norm.x is not norm.out or norm.x.data_ptr() != rope.x.data_ptr():
            return 0
        if norm.x.shape[1] != rope.x.shape[2]:
            return 0
    if q_norm.eps != k_norm.eps:
        return 0
    ops.rope_write_cache(q.x, k.x, write.v, q.table, write.layer, write.batch, q_norm.weight,
                         k_norm.weight, q_norm.eps, q.interleaved, k.mean)
    return count
