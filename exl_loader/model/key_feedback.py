"""The matrices by which keys are rounded with feedback, from the queries of a sample.

`backends/reference/feedback.py` defines what is done with them and why. They follow from the second
moments of each layer's queries. The sample's queries are at the first positions, those of real
texts anywhere. RoPE turns each pair of elements by an angle that is proportional to the position,
so the moments are averaged over the first `POSITIONS` positions. The mean of a turn is a geometric
sum, so this needs no loop over them.

Moments are computed on the CPU in float64 and take no memory of the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..backends.reference.codec import rotation_matrix
from ..backends.reference.feedback import feedback_matrix

# Positions that real texts may have, and over which moments are averaged.
POSITIONS = 4096
# Added to the diagonal of the moments, as a share of its mean, because the sample does not have
# every direction. On SmolLM2 shares from 0.03 to 0.3 are equally good. It also bounds the
# matrices: no element is above sqrt(10 * head_dim + 1), far within float16.
RIDGE = 0.1


class MeanOverPositions:
    """The mean of R_p M R_p^T for p from 0 to POSITIONS - 1, with R_p RoPE's turn at position p.

    With a the angle of element i and b that of element j, element (i, j) of the turned M is
    cos(a) cos(b) times that of M, sin(a) cos(b) times that of M with the rows of each pair crossed,
    and so on. Each of these products is half the sum or difference of a function of a + b and one
    of a - b, whose means `_mean_turn` returns.

    Args:
        head_dim: elements of a head; those in no pair do not turn.
        frequencies: radians a position, of each pair.
        interleaved: see `Ops.rope`.
    """

    def __init__(self, head_dim: int, frequencies: Sequence[float], interleaved: bool) -> None:
        pairs = torch.arange(len(frequencies))
        first, second = pairs, len(pairs) + pairs
        if interleaved:
            first, second = 2 * pairs, 2 * pairs + 1
        speed, self._sign = torch.zeros(2, head_dim, dtype=torch.float64)
        speed[first] = speed[second] = torch.tensor(frequencies, dtype=torch.float64)
        self._sign[first], self._sign[second] = -1.0, 1.0
        self._other = torch.arange(head_dim)
        self._other[first], self._other[second] = second, first
        cos_sum, sin_sum = _mean_turn(speed[:, None] + speed)
        cos_difference, sin_difference = _mean_turn(speed[:, None] - speed)
        self._cos_cos, self._sin_sin = cos_difference + cos_sum, cos_difference - cos_sum
        self._sin_cos, self._cos_sin = sin_sum + sin_difference, sin_sum - sin_difference

    def __call__(self, moments: torch.Tensor) -> torch.Tensor:
        """Return the mean for M, float64 [head_dim, head_dim]."""
        rows_crossed = self._sign[:, None] * moments[self._other]
        result = self._cos_cos * moments
        result += self._sin_cos * rows_crossed
        result += self._cos_sin * (self._sign * moments[:, self._other])
        result += self._sin_sin * (self._sign * rows_crossed[:, self._other])
        return result / 2


def _mean_turn(frequency: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means of cos(f p) and sin(f p) for p from 0 to POSITIONS - 1.

    The sum of exp(i f p) is geometric: exp(i f (P - 1) / 2) sin(f P / 2) / sin(f / 2).

    Args:
        frequency: f, float64 of any shape.
    """
    # Positions are whole numbers, so whole turns do not count; near them sines would lose digits.
    half = (frequency - 2 * math.pi * torch.round(frequency / (2 * math.pi))) / 2
    length = torch.sin(POSITIONS * half) / (POSITIONS * torch.sin(half))
    length = torch.where(half == 0, 1.0, length)
    angle = (POSITIONS - 1) * half
    return length * torch.cos(angle), length * torch.sin(angle)


def layer_feedback(
    queries: torch.Tensor, out: torch.Tensor, mean: MeanOverPositions | None
) -> None:
    """Compute a layer's matrices from its queries.

    Args:
        queries: float32 [rows, heads, head_dim], after RoPE, not rotated.
        out: float16 [kv_heads, head_dim, padded head_dim] of the CPU. The matrix of a head whose
            queries are all zero or not all finite is zero, which rounds its keys without feedback.
        mean: with the layer's RoPE; None without RoPE.
    """
    num_kv_heads, head_dim = out.shape[:2]
    rotation = rotation_matrix(head_dim)
    out.zero_()
    for head, shared in enumerate(queries.chunk(num_kv_heads, dim=1)):
        rows = shared.reshape(-1, head_dim).double()
        moments = rows.T @ rows / len(rows)
        if mean is not None:
            moments = mean(moments)
        moments = rotation.T @ moments @ rotation
        size = moments.diagonal().mean()
        if not moments.isfinite().all() or size <= 0:
            continue
        moments.diagonal().add_(RIDGE * size)
        out[head, :, :head_dim] = feedback_matrix(moments)
