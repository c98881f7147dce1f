"""The definition of rounding keys with feedback.

A key is read to compute scores, so the error of its scores matters and not that of its elements.
Let y be a rotated key, z its stored value and e = y - z. The error of the score of a query q is
q . e. With M the second moments of the rotated queries, its mean square is e M e^T. Errors of
some elements can compensate errors of others. So elements are rounded in blocks of `BLOCK`, one
block after the other. The error of a block B moves the targets of all further elements R by the
amount that would minimise the mean square if they were not rounded:

    target[R] += e[B] . F[B, R],    F[B, R] = M[B, R] M[R, R]^-1

This is the rounding of GPTQ (Frantar et al. 2022) for vectors that are known one by one. Scales are
those of rounding without feedback, and what reads codes does not change. `model/key_feedback.py`
finds M.

The elements of a block are rounded independently, so that a kernel can round them in parallel. On
SmolLM2 blocks of 4 lost a seventh of what blocks of one element gain, blocks of 8 lost half.

A vector with a group for which no scale has a finite error is rounded without feedback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .codec import GroupSearch

# Elements that are rounded at once; a divisor of `layout.GROUP`. kFeedbackBlock of
# csrc/cache_codec.h.
BLOCK = 4


def feedback_matrix(moments: torch.Tensor) -> torch.Tensor:
    """Return F for the second moments of queries.

    Args:
        moments: float64 [..., head_dim, head_dim], positive definite, of rotated queries.

    Returns:
        float64, the same shape; F[i, j] is the share of element i's error that is added to the
        target of element j, 0 unless j is in a later block.
    """
    head_dim = moments.shape[-1]
    # Let C be upper triangular with C^T C = M^-1. Its lower right part gives in the same way the
    # inverse of M without the elements before block B. So M[B, R] M[R, R]^-1 is
    # -C[B, B]^-1 C[B, R].
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    upper = torch.linalg.cholesky(inverse, upper=True)
    result = torch.zeros_like(moments)
    for first in range(0, head_dim - BLOCK, BLOCK):
        end = first + BLOCK
        own, further = upper[..., first:end, first:end], upper[..., first:end, end:]
        solved = torch.linalg.solve_triangular(own, further, upper=True)
        result[..., first:end, end:] = -solved
    return result


def round_with_feedback(
    y: torch.Tensor, groups: Sequence[GroupSearch], feedback: torch.Tensor
) -> None:
    """Round vectors again with feedback, to the grids that were found without.

    A product and its addition are rounded once together, as in the fused instructions of the
    kernels. The terms of a target are added in the order of the elements.

    Args:
        y: float32 [n, head_dim].
        groups: the grids of y's groups; their codes are replaced.
        feedback: float16 [n, head_dim, padded head_dim].
    """
    scales = torch.cat([group.scales for group in groups], dim=1)
    finite = scales.isfinite().all(dim=1, keepdim=True)
    shares = feedback[..., : y.shape[1]].double()
    target = y.clone()
    codes = [group.codes for group in groups]
    rounded = [torch.zeros_like(part) for part in codes]
    start = 0
    for group, done in zip(groups, rounded, strict=True):
        for first in range(0, done.shape[1], BLOCK):
            end = min(first + BLOCK, done.shape[1])
            here, further = slice(start + first, start + end), slice(start + end, None)
            errors = group.round(target[:, here])
            done[:, first:end] = group.codes
            for i, error in enumerate(errors.double().unbind(dim=1)):
                added = error[:, None] * shares[:, start + first + i, further]
                target[:, further] = (target[:, further].double() + added).float()
        start += done.shape[1]
    for group, plain, done in zip(groups, codes, rounded, strict=True):
        group.codes = torch.where(finite, done, plain)
