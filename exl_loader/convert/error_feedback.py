"""Quantise a matrix so that its outputs on calibration text change little (GPTQ).

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022: rows are rounded consecutively, and each row's rounding error is added to the
rows that follow, weighted by the inverse Hessian of the inputs. Rows are sorted by falling
diagonal of the Hessian, because the most important channels then have the most rows left to
compensate their errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ..formats.exl2 import effective_scales
from .mixes import Group, Mix
from .packing import QuantizedLinear, padded_columns
from .scales import choose_scales

if TYPE_CHECKING:
    from ..backends.base import DeviceOps

# Share of the mean diagonal added to the diagonal: the paper's value.
_DAMPING = 0.01
# Rows whose errors reach all rows after them in one product: a product of fewer is limited by the
# reading and writing of those rows.
_SPAN = 128
# Columns of a Hessian that are added to in one product, and of a triangle that is inverted as one.
_PANEL = 512


class Hessian:
    """Sum of x xᵀ over the inputs of a linear layer.

    Args:
        in_features: K.
        device: of the inputs; None for main memory.
    """

    def __init__(self, in_features: int, device: torch.device | None = None):
        self._upper = torch.zeros(in_features, in_features, device=device)
        self.num_rows = 0

    def add(self, x: torch.Tensor) -> None:
        """Add inputs: float32 [T, K]."""
        # Only blocks on the diagonal and above, because the sum is symmetric.
        for first in range(0, x.shape[1], _PANEL):
            panel = slice(first, first + _PANEL)
            self._upper[panel, first:].addmm_(x[:, panel].T, x[:, first:])
        self.num_rows += x.shape[0]

    def mean(self) -> torch.Tensor:
        """Return the mean of the inputs' x xᵀ: float64 [K, K]."""
        upper = self._upper.triu().double()
        upper += upper.triu(1).T
        return upper.div_(max(self.num_rows, 1))


class PreparedHessian:
    """A Hessian prepared for any number of quantisations.

    Args:
        hessian: the recorded inputs. Without any (an expert that no token reached) every channel
            has the same weight, and GPTQ becomes plain rounding with searched scales.

    Attributes:
        perm: int64 [K], channels in falling order of the diagonal.
        feedback: float32 [K, K] upper triangular U with inverse(damped H) = Uᵀ U.
    """

    def __init__(self, hessian: Hessian):
        matrix = hessian.mean()
        if not (matrix.diagonal() > 0).any():
            matrix = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
        self.perm = torch.argsort(matrix.diagonal(), descending=True, stable=True)
        matrix = matrix[self.perm][:, self.perm]
        self.feedback = _inverse_factor(matrix).float()


def _inverse_factor(matrix: torch.Tensor) -> torch.Tensor:
    """Return an upper triangular U with inverse(H) = Uᵀ U, with enough damping of H.

    With rows and columns in reverse, the Cholesky factor of H is R with H = R Rᵀ and R upper
    triangular; then U = inverse(R), which needs no inverse of H itself.
    """
    damping = _DAMPING * matrix.diagonal().mean()
    while True:
        damped = matrix.flip(0, 1)
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper = lower.flip(0, 1)
            _invert_upper(upper)
            return upper
        damping = damping * 10


def _invert_upper(matrix: torch.Tensor) -> None:
    """Invert an upper triangular matrix in place, by products of its quarters.

    inverse([[A, B], [0, C]]) = [[inverse(A), -inverse(A) B inverse(C)], [0, inverse(C)]].
    """
    size = matrix.shape[0]
    if size <= _PANEL:
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=True))
        return
    half = size // 2
    _invert_upper(matrix[:half, :half])
    _invert_upper(matrix[half:, half:])
    right = matrix[:half, half:] @ matrix[half:, half:]
    matrix[:half, half:] = (matrix[:half, :half] @ right).neg_()


def sort_rows(weight: torch.Tensor, hessian: PreparedHessian) -> torch.Tensor:
    """Return a weight [K, N] as it is quantised: float32, rows sorted, columns padded.

    It is on the device of the Hessian.
    """
    in_features, out_features = weight.shape
    device = hessian.perm.device
    rows = torch.zeros(in_features, padded_columns(out_features), device=device)
    rows[:, :out_features] = weight.to(device)[hessian.perm]
    return rows


def _quantize_group(
    ops: DeviceOps, rows: torch.Tensor, feedback: torch.Tensor, bits: int, codes: torch.Tensor,
    errors: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise one group with error feedback within it.

    Args:
        ops: of the device that has the tensors.
        rows: float32 [n, N], overwritten.
        feedback: diagonal block [n, n] of U.
        bits: bits of a code.
        codes: int8 [n, N], written.
        errors: float32 [n, N], written: the error of each row divided by its diagonal element,
            for the rows after the group.

    Returns:
        levels int32 [N]; scale_max float16.
    """
    scale_max, levels = choose_scales(ops, rows, bits, feedback.diagonal().pow(-2))
    scales = effective_scales(levels, scale_max).float()
    ops.round_rows(rows, feedback.contiguous(), scales, bits, codes, errors)
    return levels, scale_max


def quantize(
    ops: DeviceOps,
    rows: torch.Tensor,
    out_features: int,
    hessian: PreparedHessian,
    mix: Mix,
    bias: torch.Tensor | None = None,
    tick: Callable[[], None] | None = None,
) -> QuantizedLinear:
    """Quantise a weight.

    Args:
        ops: of the device that has the tensors.
        rows: the weight from `sort_rows`, overwritten.
        out_features: columns of the weight.
        hessian: of the layer's inputs, K channels.
        mix: widths and group sizes.
        bias: [N], passed through.
        tick: called after each group.

    Returns:
        The layer as codes, with columns padded to a multiple of 32.
    """
    in_features, columns = rows.shape
    groups = mix.groups(in_features)
    device = rows.device
    codes = torch.empty(in_features, columns, dtype=torch.int8, device=device)
    qs = torch.empty(len(groups), columns, dtype=torch.int32, device=device)
    scale_max = torch.empty(len(groups), dtype=torch.float16, device=device)
    spans = _spans(groups)
    errors = rows.new_empty(max(span.stop - span.start for span in spans), columns)
    first = 0
    for index, (group, span) in enumerate(zip(groups, spans, strict=True)):
        own = slice(first, first + group.rows)
        own_errors = errors[own.start - span.start : own.stop - span.start]
        qs[index], scale_max[index] = _quantize_group(
            ops, rows[own], hessian.feedback[own, own], group.bits, codes[own], own_errors
        )
        codes[own].view(torch.uint8).add_(2 ** (group.bits - 1))
        # Errors reach the rows of their span at once, and those after it together.
        rest = slice(own.stop, span.stop)
        rows[rest].addmm_(hessian.feedback[own, rest].T, own_errors, alpha=-1)
        if own.stop == span.stop:
            rest = slice(span.stop, None)
            span_errors = errors[: span.stop - span.start]
            rows[rest].addmm_(hessian.feedback[span, rest].T, span_errors, alpha=-1)
        first = own.stop
        if tick is not None:
            tick()
    codes = codes.view(torch.uint8)
    return QuantizedLinear(groups, codes, qs, scale_max, hessian.perm, out_features, bias)


def _spans(groups: Sequence[Group]) -> list[slice]:
    """Return for each group the rows of its span: whole groups of `_SPAN` rows or more."""
    spans: list[slice] = []
    first = end = count = 0
    for group in groups:
        end, count = end + group.rows, count + 1
        if end - first >= _SPAN:
            spans += count * [slice(first, end)]
            first, count = end, 0
    return spans + count * [slice(first, end)]
