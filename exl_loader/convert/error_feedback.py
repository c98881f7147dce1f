"""Quantise a matrix so that its outputs on calibration text change little (GPTQ).

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022: rows are rounded consecutively, and each row's rounding error is added to the
rows that follow, weighted by the inverse Hessian of the inputs. Rows are sorted by falling
diagonal of the Hessian, because the most important channels then have the most rows left to
compensate their errors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..formats.exl2 import effective_scales
from .mixes import Mix
from .packing import QuantizedLinear, padded_columns
from .scales import choose_scales

# Share of the mean diagonal added to the diagonal: the paper's value.
_DAMPING = 0.01
# Rows between two products that pass errors on. Within a block each row is updated on its own.
_BLOCK = 32


class Hessian:
    """Sum of x xᵀ over the inputs of a linear layer.

    Args:
        in_features: K.
    """

    def __init__(self, in_features: int):
        self.matrix = torch.zeros(in_features, in_features)
        self.num_rows = 0

    def add(self, x: torch.Tensor) -> None:
        """Add inputs: float32 [T, K]."""
        self.matrix.addmm_(x.T, x)
        self.num_rows += x.shape[0]


class PreparedHessian:
    """A Hessian prepared for any number of quantisations.

    Args:
        hessian: the recorded inputs. Without any (an expert that no token reached) every channel
            has the same weight, and GPTQ becomes plain rounding with searched scales.

    Attributes:
        perm: int64 [K], channels in falling order of the diagonal.
        matrix: float32 [K, K], the mean Hessian in that order, undamped.
        feedback: float32 [K, K] upper triangular U with inverse(damped H) = Uᵀ U.
    """

    def __init__(self, hessian: Hessian):
        matrix = hessian.matrix.double() / max(hessian.num_rows, 1)
        if not (matrix.diagonal() > 0).any():
            matrix = torch.eye(matrix.shape[0], dtype=torch.float64)
        self.perm = torch.argsort(matrix.diagonal(), descending=True, stable=True)
        matrix = matrix[self.perm][:, self.perm]
        self.matrix = matrix.float()
        self.feedback = _inverse_factor(matrix).float()


def _inverse_factor(matrix: torch.Tensor) -> torch.Tensor:
    """Return an upper triangular U with inverse(H) = Uᵀ U, with enough damping of H.

    With rows and columns in reverse, the Cholesky factor of H is R with H = R Rᵀ and R upper
    triangular; then U = inverse(R), which needs no inverse of H itself.
    """
    damping = _DAMPING * matrix.diagonal().mean()
    identity = torch.eye(matrix.shape[0], dtype=matrix.dtype)
    while True:
        lower, failed = torch.linalg.cholesky_ex((matrix + damping * identity).flip(0, 1))
        if not failed:
            upper = lower.flip(0, 1)
            return torch.linalg.solve_triangular(upper, identity, upper=True)
        damping = damping * 10


def _quantize_group(rows: torch.Tensor, feedback: torch.Tensor, bits: int):
    """Quantise one group with error feedback within it.

    Args:
        rows: float32 [n, N], overwritten.
        feedback: diagonal block [n, n] of U.
        bits: bits of a code.

    Returns:
        codes uint8 [n, N]; levels int64 [N]; scale_max float16; errors float32 [n, N], the error
        of each row divided by its diagonal element, for the rows after the group.
    """
    diagonal = feedback.diagonal()
    scale_max, levels = choose_scales(rows, bits, diagonal.pow(-2))
    scales = effective_scales(levels, scale_max).float()
    half = 2 ** (bits - 1)
    signed = torch.empty_like(rows)
    errors = torch.empty_like(rows)
    factors = diagonal.reciprocal().tolist()
    for first in range(0, len(rows), _BLOCK):
        block = slice(first, first + _BLOCK)
        for i in range(first, min(first + _BLOCK, len(rows))):
            code = torch.div(rows[i], scales, out=signed[i]).round_().clamp_(-half, half - 1)
            torch.addcmul(rows[i], code, scales, value=-1, out=errors[i]).mul_(factors[i])
            rows[i + 1 : first + _BLOCK].addr_(
                feedback[i, i + 1 : first + _BLOCK], errors[i], alpha=-1
            )
        rest = slice(first + _BLOCK, None)
        rows[rest].addmm_(feedback[block, rest].T, errors[block], alpha=-1)
    return signed.add_(half).to(torch.uint8), levels, scale_max, errors


def quantize(
    weight: torch.Tensor,
    hessian: PreparedHessian,
    mix: Mix,
    bias: torch.Tensor | None = None,
    tick: Callable[[], None] | None = None,
) -> QuantizedLinear:
    """Quantise a weight.

    Args:
        weight: [K, N] in any float dtype, input channels first.
        hessian: of the layer's inputs, K channels.
        mix: widths and group sizes.
        bias: [N], passed through.
        tick: called after each group.

    Returns:
        The layer as codes, with columns padded to a multiple of 32.
    """
    in_features, out_features = weight.shape
    columns = padded_columns(out_features)
    groups = mix.groups(in_features)
    rest = torch.zeros(in_features, columns)
    rest[:, :out_features] = weight[hessian.perm].float()
    codes = torch.empty(in_features, columns, dtype=torch.uint8)
    qs = torch.empty(len(groups), columns, dtype=torch.int64)
    scale_max = torch.empty(len(groups), dtype=torch.float16)
    first = 0
    for index, group in enumerate(groups):
        end = first + group.rows
        block = hessian.feedback[first:end, first:end]
        codes[first:end], qs[index], scale_max[index], errors = _quantize_group(
            rest[first:end], block, group.bits
        )
        rest[end:].addmm_(hessian.feedback[first:end, end:].T, errors, alpha=-1)
        first = end
        if tick is not None:
            tick()
    return QuantizedLinear(groups, codes, qs, scale_max, hessian.perm, out_features, bias)


def relative_error(weight: torch.Tensor, decoded: torch.Tensor, hessian: PreparedHessian) -> float:
    """Return the relative error of the output: |X (W - W')|² / |X W|².

    Args:
        weight, decoded: [K, N], input channels in the model's own order.
        hessian: of X.
    """
    original = weight[hessian.perm].float()
    difference = original - decoded[hessian.perm].float()
    energy = (original * (hessian.matrix @ original)).sum()
    change = (difference * (hessian.matrix @ difference)).sum()
    return (change / energy).item() if energy > 0 else 0.0
