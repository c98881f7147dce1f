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
# Weights that are tried at once: a few megabytes, about the size of a core's cache.
_PIECE_ELEMENTS = 1 << 20
# Below this, scale_max / 256 rounds to zero in float16, and every weight would decode to zero.
_LEAST_SCALE_MAX = 256 * 2.0**-24
_MOST_SCALE_MAX = 65504.0


def quantize_rows(rows: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Round rows to signed codes: float32 [..., N], whole numbers in the range of the code."""
    half = 2 ** (bits - 1)
    return torch.round(rows / scales).clamp_(-half, half - 1)


def _best_levels(
    rows: torch.Tensor, scale_max: torch.Tensor, bits: int, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find, for every maximum and column, the level (1 to 16) with the smallest error.

    Args:
        rows: float32 [n, N].
        scale_max: float16 [C].
        bits: bits of a code.
        weights: float32 [n], the cost of a squared error in a row.

    Returns:
        Levels int64 [C, N]; weighted squared errors float32 [C, N].
    """
    levels = torch.arange(1, SCALE_LEVELS + 1)
    scales = effective_scales(levels, scale_max[:, None]).float()[:, :, None, None]
    columns = max(1, _PIECE_ELEMENTS // (scales.numel() * rows.shape[0]))
    best_levels, best_errors = [], []
    for piece in rows.split(columns, dim=1):
        difference = quantize_rows(piece, scales, bits).mul_(scales).sub_(piece)
        error, level = (weights @ difference.square_()).min(dim=1)
        best_levels.append(level + 1)
        best_errors.append(error)
    return torch.cat(best_levels, dim=1), torch.cat(best_errors, dim=1)


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
    totals = _best_levels(sample, candidates, bits, weights)[1].sum(dim=1)
    scale_max = candidates[totals.argmin()]
    return scale_max, _best_levels(rows, scale_max[None], bits, weights)[0][0]
