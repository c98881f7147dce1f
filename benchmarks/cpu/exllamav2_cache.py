"""The cache of exllamav2 in plain torch, to compare quality with.

As its archived kernels compute it: a 32-point Hadamard transform over the
even and over the odd elements of each 64, one float16 scale (absolute maximum / 2^(bits-1))
per 32 consecutive elements, codes rounded and clamped, so that the largest positive value
clips. exllamav2 uses 4 bits; the same scheme at 6 and 8 bits represents a uniform quantiser by
absolute maximum of that size.
"""

from __future__ import annotations

import math

import torch

GROUP = 32


def hadamard(size: int) -> torch.Tensor:
    """Return the orthonormal Sylvester-Hadamard matrix, float64; size is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def _transform(x: torch.Tensor) -> torch.Tensor:
    """Transform even and odd elements of each 64; its own inverse."""
    pairs = x.double().unflatten(-1, (-1, GROUP, 2))
    return torch.einsum("...gip,ij->...gjp", pairs, hadamard(GROUP)).flatten(-3)


def round_trip(x: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Return x, float32 [..., a multiple of 64], as exllamav2's cache returns it."""
    half = 2 ** (bits - 1)
    groups = _transform(x).float().unflatten(-1, (-1, GROUP))
    scales = (groups.abs().amax(-1, keepdim=True) / half).half().float()
    codes = (groups / scales.clamp(min=1e-30)).round().clamp(-half, half - 1)
    return _transform((codes * scales).flatten(-2)).float()
