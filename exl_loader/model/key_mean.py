"""The mean of a layer's keys before RoPE, without which a quantised cache stores them.

Keys of most models have a constant part, also without a bias: a few pairs of elements are nearly
the same for all tokens. A quantised cache would spend its levels on it. So the mean of the sample's
keys is subtracted before RoPE, in the few pairs where it is large, and attention adds what it
contributes to scores as it adds a key bias (`parts/key_bias.py`). The first token of a text is no
part of the mean, because its key is like no other; the cache keeps it in more bits.

Scores are the same whatever the mean is. It decides how large the rest is that the cache stores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..cache.layout import MAX_BIAS_PAIRS, KeyBias
from .parts.key_bias import place

if TYPE_CHECKING:
    from ..backends.cpu_access import CpuAccess
    from ..cache.layout import CacheLayer

# Pairs of a head that are taken out at most. On SmolLM2 all pairs are no better than 8.
MEAN_PAIRS = 8
# A pair is taken out if its mean has at least this share of the mean square of the head's keys.
LEAST_SHARE = 1 / 64


class KeySums:
    """Sums over the keys of one text, which come in steps.

    Args:
        kv_heads, head_dim: as those of the keys.
    """

    def __init__(self, kv_heads: int, head_dim: int) -> None:
        self._rows = 0
        self._sum = torch.zeros(kv_heads, head_dim, dtype=torch.float64)
        self._squares = torch.zeros(kv_heads, dtype=torch.float64)

    def add(self, keys: torch.Tensor) -> None:
        """Add the next keys, float32 [rows, kv_heads, head_dim] before RoPE."""
        counted = keys[1 if self._rows == 0 else 0 :].double()
        self._rows += len(keys)
        # One by one, so that the sums have the same bits however the text is cut into steps.
        for key in counted:
            self._sum += key
            self._squares += key.square().sum(dim=1)

    def mean(self) -> torch.Tensor:
        """Return the mean, float64 [kv_heads, head_dim], of all keys but the text's first."""
        return self._sum / max(self._rows - 1, 1)

    def mean_squares(self) -> torch.Tensor:
        """Return the mean squared length of each head's keys, float64 [kv_heads]."""
        return self._squares / max(self._rows - 1, 1)


def store_mean(layer: CacheLayer, keys: KeySums, half: int, cpu: CpuAccess) -> None:
    """Write the mean that RoPE subtracts, and the key bias by which attention adds it.

    Args:
        layer: the cache. Its `key_bias` is what was taken out of the projection, or None.
        keys: sums over the sample's keys.
        half: pairs of RoPE in a head.
        cpu: access to its device.
    """
    assert layer.key_mean is not None and layer.key_mean_room is not None
    taken = _dense(layer.key_bias, layer.key_mean.shape, half, cpu)
    mean = _largest_pairs(keys, taken, half)
    if not mean.any():
        return
    cpu.write(layer.key_mean, mean.numpy())
    layer.key_bias = place(cpu, _pairs_of(taken + mean, half), layer.key_mean_room)


def _largest_pairs(keys: KeySums, taken: torch.Tensor, half: int) -> torch.Tensor:
    """Return the mean in the largest pairs of each head, zero elsewhere.

    It is float32 [kv_heads, head_dim], rounded to bfloat16.

    Pairs that `taken` has do not count, so that all fit into a `KeyBias`.
    """
    mean, squares = keys.mean(), keys.mean_squares()
    pairs = mean[:, : 2 * half].unflatten(1, (2, half))
    energy = pairs.square().sum(dim=1)
    is_taken = taken[:, : 2 * half].unflatten(1, (2, half)).any(dim=1)
    energy[is_taken] = 0.0
    count = min(MEAN_PAIRS, half, MAX_BIAS_PAIRS - int(is_taken.sum(dim=1).max()))
    result = torch.zeros_like(mean)
    if count > 0 and mean.isfinite().all() and squares.isfinite().all():
        chosen = torch.zeros_like(is_taken)
        chosen.scatter_(1, energy.topk(count, dim=1).indices, True)
        chosen &= (energy > 0) & (energy >= LEAST_SHARE * squares[:, None])
        result[:, : 2 * half] = (pairs * chosen[:, None]).flatten(1)
    # The last bits of a card's sums depend on the length of its steps. So few bits are kept.
    return result.bfloat16().float()


def _dense(bias: KeyBias | None, shape: torch.Size, half: int, cpu: CpuAccess) -> torch.Tensor:
    """Return a bias of a device as float32 [kv_heads, head_dim] of the CPU; zeros for None."""
    dense = torch.zeros(shape)
    if bias is not None:
        pairs = torch.from_numpy(cpu.read(bias.pairs)).long()
        # Adding, because pairs of zeros may name a pair that another one has.
        dense.scatter_add_(1, pairs, torch.from_numpy(cpu.read(bias.first)))
        dense.scatter_add_(1, pairs + half, torch.from_numpy(cpu.read(bias.second)))
    return dense


def _pairs_of(dense: torch.Tensor, half: int) -> KeyBias:
    """Return a bias, float32 [kv_heads, head_dim], by its pairs that are not zero."""
    first, second = dense[:, : 2 * half].unflatten(1, (2, half)).unbind(dim=1)
    is_set = (first != 0) | (second != 0)
    count = int(is_set.sum(dim=1).max())
    # The pairs that are set come first.
    pairs = is_set.int().sort(dim=1, descending=True, stable=True).indices[:, :count]
    first, second = (part.gather(1, pairs).contiguous() for part in (first, second))
    return KeyBias(pairs.int().contiguous(), first, second, half)
