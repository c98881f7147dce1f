"""Rounding of weights to codes on the CPU, for conversions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .library import INT, INT64, POINTER, KernelOps, Signature, address

if TYPE_CHECKING:
    import torch

SIGNATURES = {
    "choose_levels": Signature(
        (POINTER, INT64, INT64, POINTER, POINTER, INT64, INT, INT, POINTER, POINTER, POINTER),
        replayed=False,
    ),
    "round_rows": Signature(
        (POINTER, INT64, INT64, POINTER, POINTER, INT, POINTER, POINTER), replayed=False
    ),
}


class RoundingOps(KernelOps):
    """Operations of `base.DeviceOps` that round weights."""

    def choose_levels(self, rows: torch.Tensor, scales: torch.Tensor, highest: torch.Tensor,
                      tried: int, bits: int, weights: torch.Tensor, levels: torch.Tensor,
                      errors: torch.Tensor) -> None:
        shape = (len(scales), rows.shape[1])
        assert scales.shape[1] == 16 and weights.shape == (len(rows),)
        assert highest.shape == levels.shape == errors.shape == shape
        self._call("choose_levels", address(rows), *rows.shape, address(scales), address(highest),
                   len(scales), tried, bits, address(weights), address(levels), address(errors))

    def round_rows(self, rows: torch.Tensor, feedback: torch.Tensor, scales: torch.Tensor,
                   bits: int, codes: torch.Tensor, errors: torch.Tensor) -> None:
        assert feedback.shape == (len(rows), len(rows)) and scales.shape == (rows.shape[1],)
        assert codes.shape == errors.shape == rows.shape
        self._call("round_rows", address(rows), *rows.shape, address(feedback), address(scales),
                   bits, address(codes), address(errors))
