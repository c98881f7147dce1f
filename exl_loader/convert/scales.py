"""Choose the scales of one group of rows by the smallest weighted error."""

from __future__ import annotations

import torch

from ..formats.exl2 import effective_scales
from ..utils.integers import ceil_div

SCALE_LEVELS = 16
# Candidates for the group's maximum, as shares of the maximum at which the widest column is not
# clipped. With few levels, clipping the outliers costs less than coarser steps.
_SHARES = (1.08, 1.0, 0.93, 0.86, 0.8, 0.74, 0.68, 0.62, 0.56, 0.5, 0.44, 0.38)
_SAMPLED_COLUMNS = 64
# Levels that are tried for a column. The lowest of 7 has (10 / 16)^2, two fifths, of the scale of
# the highest. Codes of 2 bits, which are -2 to 1, may clip more than that with profit.
_TRIED_LEVELS = 7
_TRIED_LEVELS_OF_2_BITS = 10
# Elements that are tried at once: half a megabyte, which stays in a core's cache.
_PIECE_ELEMENTS = 1 << 17
# Below this, scale_max / 256 rounds to zero in float16, and every weight would decode to zero.
_LEAST_SCALE_MAX = 256 * 2.0**-24
_MOST_SCALE_MAX = 65504.0


def _best_levels(
    rows: torch.Tensor, unclipped: torch.Tensor, scale_max: torch.Tensor, bits: int,
    weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find, for every maximum and column, the level with the smallest error.

    Only the lowest level at which nothing is clipped and those just below it are tried: a higher
    one makes the steps coarser for nothing, and far lower ones clip most of the column.

    Args:
        rows: float32 [n, N].
        unclipped: float32 [N], the smallest scale of each column that clips nothing.
        scale_max: float16 [C].
        bits: bits of a code.
        weights: float32 [n], the cost of a squared error in a row.

    Returns:
        Levels int64 [C, N]; weighted squared errors float32 [C, N].
    """
    units = effective_scales(torch.ones(1, dtype=torch.int64), scale_max).float()
    tried = _TRIED_LEVELS_OF_2_BITS if bits == 2 else _TRIED_LEVELS
    highest = (unclipped / units[:, None]).sqrt_().ceil_().clamp_(tried, SCALE_LEVELS)
    steps = torch.arange(1 - tried, 1)
    levels = highest.long()[:, None] + steps[:, None]
    scales = effective_scales(levels, scale_max[:, None, None]).float()
    half = 2 ** (bits - 1)
    errors = torch.empty(scales.shape)
    count = max(1, _PIECE_ELEMENTS // (levels[..., 0].numel() * rows.shape[0]))
    for first in range(0, rows.shape[1], count):
        columns = slice(first, first + count)
        piece, step = rows[:, columns], scales[:, :, None, columns]
        difference = (piece * step.reciprocal()).round_().clamp_(-half, half - 1)
        difference.mul_(step).sub_(piece).square_()
        errors[..., columns] = weights @ difference
    best, index = errors.min(dim=1)
    return levels.gather(1, index[:, None])[:, 0], best


def _columns_to_try(unclipped: torch.Tensor) -> torch.Tensor:
    """Return the widest columns and an even sample of the others, which decide the maximum."""
    count = unclipped.shape[0]
    if count <= _SAMPLED_COLUMNS:
        return torch.arange(count)
    widest = unclipped.topk(_SAMPLED_COLUMNS // 4).indices
    even = torch.arange(0, count, ceil_div(count, _SAMPLED_COLUMNS))
    return torch.cat([widest, even]).unique()


def choose_scales(
    rows: torch.Tensor, bits: int, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a group's `scale_max` and every column's level.

    Args:
        rows: float32 [n, N], the group's weights.
        bits: bits of a code.
        weights: float32 [n], the cost of a squared error in a row.

    Returns:
        scale_max, float16 scalar tensor; levels, int64 [N], 1 to 16.
    """
    half = 2 ** (bits - 1)
    unclipped = torch.maximum(rows.amax(0) / (half - 1), -rows.amin(0) / half)
    columns = _columns_to_try(unclipped)
    sample = rows[:, columns]
    widest = unclipped.max()
    candidates = (widest * torch.tensor(_SHARES)).clamp_(_LEAST_SCALE_MAX, _MOST_SCALE_MAX)
    candidates = candidates.to(torch.float16)
    totals = _best_levels(sample, unclipped[columns], candidates, bits, weights)[1].sum(dim=1)
    scale_max = candidates[totals.argmin()]
    return scale_max, _best_levels(rows, unclipped, scale_max[None], bits, weights)[0][0]
