"""Choose the scales of one group of rows by the smallest weighted error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..formats.exl2 import effective_scales
from ..utils.integers import ceil_div

if TYPE_CHECKING:
    from ..backends.base import DeviceOps

SCALE_LEVELS = 16
# Candidates for the group's maximum, as shares of the maximum at which the widest column is not
# clipped. With few levels, clipping the outliers costs less than coarser steps.
_SHARES = (1.08, 1.0, 0.93, 0.86, 0.8, 0.74, 0.68, 0.62, 0.56, 0.5, 0.44, 0.38)
_SAMPLED_COLUMNS = 64
# Levels that are tried for a column. The lowest of 7 has (10 / 16)^2, two fifths, of the scale of
# the highest. Codes of 2 bits, which are -2 to 1, may clip more than that with profit.
_TRIED_LEVELS = 7
_TRIED_LEVELS_OF_2_BITS = 10
# Below this, scale_max / 256 rounds to zero in float16, and every weight would decode to zero.
_LEAST_SCALE_MAX = 256 * 2.0**-24
_MOST_SCALE_MAX = 65504.0


def _best_levels(
    ops: DeviceOps, rows: torch.Tensor, unclipped: torch.Tensor, scale_max: torch.Tensor,
    bits: int, weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find, for every maximum and column, the level with the smallest error.

    Only the lowest level at which nothing is clipped and those just below it are tried: a higher
    one makes the steps coarser for nothing, and far lower ones clip most of the column.

    Args:
        ops: of the device that has the tensors.
        rows: float32 [n, N].
        unclipped: float32 [N], the smallest scale of each column that clips nothing.
        scale_max: float16 [C].
        bits: bits of a code.
        weights: float32 [n], the cost of a squared error in a row.

    Returns:
        Levels int32 [C, N]; weighted squared errors float32 [C, N].
    """
    scales = level_scales(scale_max)
    tried = _TRIED_LEVELS_OF_2_BITS if bits == 2 else _TRIED_LEVELS
    highest = (unclipped / scales[:, :1]).sqrt_().ceil_().clamp_(tried, SCALE_LEVELS).int()
    levels, errors = torch.empty_like(highest), torch.empty(highest.shape, device=rows.device)
    ops.choose_levels(rows, scales, highest, tried, bits, weights, levels, errors)
    return levels, errors


def level_scales(scale_max: torch.Tensor) -> torch.Tensor:
    """Return the scales of all levels, float32 [C, 16], for maxima float16 [C]."""
    levels = torch.arange(1, SCALE_LEVELS + 1, device=scale_max.device)
    return effective_scales(levels, scale_max[:, None]).float()


def _columns_to_try(unclipped: torch.Tensor) -> torch.Tensor:
    """Return the widest columns and an even sample of the others, which decide the maximum."""
    count = unclipped.shape[0]
    if count <= _SAMPLED_COLUMNS:
        return torch.arange(count, device=unclipped.device)
    widest = unclipped.topk(_SAMPLED_COLUMNS // 4).indices
    spacing = ceil_div(count, _SAMPLED_COLUMNS)
    even = torch.arange(0, count, spacing, device=unclipped.device)
    return torch.cat([widest, even]).unique()


def choose_scales(
    ops: DeviceOps, rows: torch.Tensor, bits: int, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a group's `scale_max` and every column's level.

    Args:
        ops: of the device that has the tensors.
        rows: float32 [n, N], the group's weights.
        bits: bits of a code.
        weights: float32 [n], the cost of a squared error in a row.

    Returns:
        scale_max, float16 scalar tensor; levels, int32 [N], 1 to 16.
    """
    half = 2 ** (bits - 1)
    unclipped = torch.maximum(rows.amax(0) / (half - 1), -rows.amin(0) / half)
    columns = _columns_to_try(unclipped)
    widest = unclipped.max()
    candidates = widest * torch.tensor(_SHARES, device=rows.device)
    candidates = candidates.clamp_(_LEAST_SCALE_MAX, _MOST_SCALE_MAX).to(torch.float16)
    sample = rows[:, columns].contiguous()
    totals = _best_levels(ops, sample, unclipped[columns], candidates, bits, weights)[1].sum(dim=1)
    scale_max = candidates[totals.argmin()]
    return scale_max, _best_levels(ops, rows, unclipped, scale_max[None], bits, weights)[0][0]
