"""Scales of one group of rows, chosen by least weighted error."""

from __future__ import annotations

import torch

from .packing import effective_scales

SCALE_LEVELS = 16
# The group's maximum is tried at these shares of what the widest column needs to clip
# nothing: with few levels, clipping the outliers costs less than coarser steps.
_SHARES = (1.08, 1.0, 0.93, 0.86, 0.8, 0.74, 0.68, 0.62, 0.56, 0.5, 0.44, 0.38)
_SAMPLED_COLUMNS = 64
# Trial weights in flight: a few megabytes, about what a core's cache holds.
_PIECE_ELEMENTS = 1 << 20
# Below this, scale_max / 256 is no float16 above zero and every weight would decode as zero.
_LEAST_SCALE_MAX = 256 * 2.0**-24
_MOST_SCALE_MAX = 65504.0


def quantize_rows(rows: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes nearest to the rows: float32 [..., N], whole numbers in the code's range."""
    half = 2 ** (bits - 1)
    return torch.round(rows / scales).clamp_(-half, half - 1)


def _best_levels(
    rows: torch.Tensor, scale_max: torch.Tensor, bits: int, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For every maximum and column the level 1 to 16 of least error, and that error.

    Args:
        rows: float32 [n, N]. scale_max: float16 [C]. weights: float32 [n].

    Returns:
        Levels int64 [C, N]; weighted squared errors float32 [C, N].
    """
    levels = torch.arange(1, SCALE_LEVELS + 1)
    scales = effective_scales(levels, scale_max[:, None])[:, :, None, None]
    columns = max(1, _PIECE_ELEMENTS // (scales.numel() * rows.shape[0]))
    best_levels, best_errors = [], []
    for piece in rows.split(columns, dim=1):
        difference = quantize_rows(piece, scales, bits).mul_(scales).sub_(piece)
        error, level = (weights @ difference.square_()).min(dim=1)
        best_levels.append(level + 1)
        best_errors.append(error)
    return torch.cat(best_levels, dim=1), torch.cat(best_errors, dim=1)


def _columns_to_try(unclipped: torch.Tensor) -> torch.Tensor:
    """The widest columns and an even sample of the others: they settle the maximum."""
    count = unclipped.shape[0]
    if count <= _SAMPLED_COLUMNS:
        return torch.arange(count)
    widest = unclipped.topk(_SAMPLED_COLUMNS // 4).indices
    even = torch.arange(0, count, -(-count // _SAMPLED_COLUMNS))
    return torch.cat([widest, even]).unique()


def choose_scales(
    rows: torch.Tensor, bits: int, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a group's `scale_max` and every column's level.

    Args:
        rows: float32 [n, N], the group's weights.
        bits: width of a code.
        weights: float32 [n], what a squared error in a row costs.

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
