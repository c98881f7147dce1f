"""Large key biases, kept out of the cache.

Keys of some models (Qwen2) have a constant part from `k_proj.bias` that is a hundred times
what a token adds. A quantised cache would spend its levels on that constant, and what it lost
would be a share of it. But it need not be stored: with R_p the rotation of RoPE at position p,

    q' . R_p (k + b) = q' . R_p k + q' . R_p b

and the last term needs no cache. RoPE turns elements i and half + i of a head together, so
that a pair of bias elements (b1, b2) adds to the score of query row q' at position p

    cos(p f) (q1 b1 + q2 b2) + sin(p f) (q2 b1 - q1 b2),   f = inv_freq[i]

times RoPE's factor: two more elements for a dot product of head_dim, and no byte read. The
few pairs that matter are taken out of `k_proj.bias` after loading, and attention adds them.
What stays in the bias is small compared with the keys' own spread, which is estimated by sending
random rows through the layer's norm and projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ...cache.layout import MAX_BIAS_PAIRS, KeyBias

if TYPE_CHECKING:
    from ...backends.base import AttentionShape, DeviceOps, Linear
    from ...backends.cpu_access import CpuAccess
    from .norm import Norm

# What may stay in the projection: a share of the keys' own mean square, by which it adds to
# the squared error of a quantised cache.
KEPT_SHARE = 0.05
_PROBE_ROWS = 8


def split_bias(bias: torch.Tensor, mean_squares: torch.Tensor, half: int) -> KeyBias | None:
    """Choose the pairs that attention shall add.

    Args:
        bias: float32 [kv_heads, head_dim].
        mean_squares: float32 [kv_heads], of the squared length of a head's keys without bias.
        half: pairs of RoPE in a head. Elements from 2 * half on are not turned and stay.

    Returns:
        the fewest pairs without which the bias is small, at most `MAX_BIAS_PAIRS`, the largest
        first; None where it is small as it is.
    """
    turned = bias[:, : 2 * half].double().unflatten(1, (2, half))
    energy, order = turned.square().sum(dim=1).sort(dim=1, descending=True, stable=True)
    # left[:, n] is what stays when n pairs are taken.
    left = energy.sum(dim=1, keepdim=True) - energy.cumsum(dim=1)
    left = torch.cat([energy.sum(dim=1, keepdim=True), left], dim=1)
    small = left <= KEPT_SHARE * mean_squares.double()[:, None]
    small[:, -1] = True
    counts = small.int().argmax(dim=1).clamp(max=MAX_BIAS_PAIRS)
    most = int(counts.max())
    if most == 0:
        return None
    pairs = order[:, :most]
    taken = torch.arange(most) < counts[:, None]
    first, second = (
        (part.gather(1, pairs) * taken).float().contiguous() for part in turned.unbind(dim=1)
    )
    return KeyBias((pairs * taken).int().contiguous(), first, second, half)


def remove_from(bias: torch.Tensor, taken: KeyBias) -> None:
    """Take the pairs out of a bias, float32 [kv_heads, head_dim], in place."""
    heads = torch.arange(len(bias))[:, None].expand(taken.pairs.shape)
    places = taken.pairs.long()
    # Accumulating, because pairs of zeros may name a pair that another one has.
    bias.index_put_((heads, places), -taken.first, accumulate=True)
    bias.index_put_((heads, places + taken.half), -taken.second, accumulate=True)


def take_key_bias(
    ops: DeviceOps, k: Linear, norm: Norm | None, shape: AttentionShape, half: int,
    workspace: Mapping[str, torch.Tensor], room: torch.Tensor,
) -> KeyBias | None:
    """Split a layer's key bias, and leave the small part in the projection.

    Args:
        ops: the device's. Nothing happens unless they have `adds_key_bias`.
        k: the key projection; its bias changes in place.
        norm: the norm before it; None where there is none.
        shape: the layer's attention. half: pairs of RoPE in a head.
        workspace: views of `workspace_specs`, by name; `x`, `k` and `scratch` are used.
        room: int32 [3, kv_heads * MAX_BIAS_PAIRS] of the operations' device, for the result.

    Returns:
        None where nothing was taken out.
    """
    if not ops.adds_key_bias or k.bias is None:
        return None
    cpu, heads = ops.cpu_access, (shape.num_kv_heads, shape.head_dim)
    stored = torch.from_numpy(cpu.read(k.bias).copy())
    bias = stored[: shape.num_kv_heads * shape.head_dim].view(heads)
    if not bias.any():
        return None
    keys = _probe(ops, k, norm, workspace)
    own = keys[:, : bias.numel()].unflatten(1, heads) - bias
    taken = split_bias(bias, own.square().sum(dim=2).mean(dim=0), half)
    if taken is None:
        return None
    remove_from(bias, taken)
    cpu.write(k.bias, stored.numpy())
    return place(cpu, taken, room)


def _probe(ops: DeviceOps, k: Linear, norm: Norm | None,
           workspace: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the keys of random rows, float32 [rows, out_features] on the CPU."""
    cpu = ops.cpu_access
    rows, keys = (workspace[name][:_PROBE_ROWS] for name in ("x", "k"))
    cpu.write(rows, torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)).numpy())
    if norm is not None:
        norm.run(ops, rows, rows)
    ops.linear(rows, k, keys, workspace["scratch"])
    return torch.from_numpy(cpu.read(keys))


def place(cpu: CpuAccess, taken: KeyBias, room: torch.Tensor) -> KeyBias:
    """Bring a key bias to `room` on its device, int32 [3, kv_heads * MAX_BIAS_PAIRS]."""
    pairs, first, second = (part[: taken.pairs.numel()].view(taken.pairs.shape) for part in room)
    placed = KeyBias(pairs, first.view(torch.float32), second.view(torch.float32), taken.half)
    cpu.write(placed.pairs, taken.pairs.numpy())
    cpu.write(placed.first, taken.first.numpy())
    cpu.write(placed.second, taken.second.numpy())
    return placed
