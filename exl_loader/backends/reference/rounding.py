"""The definition of rounding weights to codes, on any device of PyTorch."""

from __future__ import annotations

import torch

from ...utils.integers import ceil_div

# Elements that are tried at once: half a megabyte, which stays in a core's cache.
_PIECE_ELEMENTS = 1 << 17
# Rows between two products that pass errors on. Within a block each row is updated on its own.
_BLOCK = 32


class RoundingOps:
    """Operations of `base.DeviceOps` that round weights, by their definitions."""

    def choose_levels(self, rows: torch.Tensor, scales: torch.Tensor, highest: torch.Tensor,
                      tried: int, bits: int, weights: torch.Tensor, levels: torch.Tensor,
                      errors: torch.Tensor) -> None:
        steps = torch.arange(1 - tried, 1, device=rows.device)
        found = highest.long()[:, None] + steps[:, None]
        candidates = scales[:, None, :].expand(-1, tried, -1).gather(2, found - 1)
        half = 2 ** (bits - 1)
        totals = torch.empty(candidates.shape, device=rows.device)
        count = max(1, _PIECE_ELEMENTS // (len(scales) * tried * len(rows)))
        for first in range(0, rows.shape[1], count):
            columns = slice(first, first + count)
            piece, step = rows[:, columns], candidates[:, :, None, columns]
            difference = (piece * step.reciprocal()).round_().clamp_(-half, half - 1)
            difference.mul_(step).sub_(piece).square_()
            totals[..., columns] = weights @ difference
        best, index = totals.min(dim=1)
        levels.copy_(found.gather(1, index[:, None])[:, 0])
        errors.copy_(best)

    def round_rows(self, rows: torch.Tensor, feedback: torch.Tensor, scales: torch.Tensor,
                   bits: int, codes: torch.Tensor, errors: torch.Tensor) -> None:
        half = 2 ** (bits - 1)
        diagonal = feedback.diagonal().tolist()
        for block in range(ceil_div(len(rows), _BLOCK)):
            first, end = block * _BLOCK, (block + 1) * _BLOCK
            for i in range(first, min(end, len(rows))):
                code = torch.div(rows[i], scales).round_().clamp_(-half, half - 1)
                codes[i] = code
                torch.addcmul(rows[i], code, scales, value=-1, out=errors[i]).div_(diagonal[i])
                rows[i + 1 : end].addr_(feedback[i, i + 1 : end], errors[i], alpha=-1)
            rows[end:].addmm_(feedback[first:end, end:].T, errors[first:end], alpha=-1)
