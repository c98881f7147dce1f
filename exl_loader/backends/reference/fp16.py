"""The definition of the `fp16` cache type: 16 bits an element, more exact than float16.

float16 spends 5 of its bits on an exponent range that the elements of one vector do not need:
keys and values rounded to float16 change logits by 4e-4 (relative). Here a group of 32 elements
shares one scale instead. This takes the same 16 bits an element, without a tensor for scales:

    x = code * scale / 32768        code: int16

The scale is a float16 slightly above the group's largest magnitude. Bit i of the scale is the
lowest bit of code i, for the group's first 16 codes. The writer rounds these codes to the
nearest integer with that lowest bit, so the reader needs no mask. The rounding error is 1/6 of
that of float16 (3.4e-5 against 2.1e-4 on normal data, relative root mean square).

Groups are not rotated. A last group of fewer than 16 elements has no room for a scale, so it is
part of the group before it. A head of fewer than 16 elements is stored in float16.
"""

from __future__ import annotations

import torch

from ...cache.layout import GROUP

SCALE_BITS = 16
UNIT = 32768.0
_LARGEST_HALF = 65504.0
# The largest code that stays an int16 after rounding to either parity.
_LARGEST_CODE = 32766.0


def block_sizes(head_dim: int) -> list[int]:
    """Return the number of elements of each group, e.g. 80 -> [32, 32, 16], 72 -> [32, 40]."""
    sizes = [GROUP] * (head_dim // GROUP)
    rest = head_dim % GROUP
    if rest >= SCALE_BITS or not sizes:
        return [*sizes, rest] if rest else sizes
    sizes[-1] += rest
    return sizes


def _shared_scale(x: torch.Tensor) -> torch.Tensor:
    """Return the scale of each row of x, float16 [n, 1]; NaN for a row that is not finite."""
    largest = x.abs().amax(dim=1, keepdim=True)
    # The sum exceeds the error of rounding to float16: 2^-11 of a normal number, and 2^-25 of a
    # subnormal one.
    scale = (largest * (1 + 2**-10) + 2**-25).clamp(max=_LARGEST_HALF).half()
    return torch.where(largest.isfinite(), scale, torch.nan)


def _encode_block(x: torch.Tensor) -> torch.Tensor:
    scale = _shared_scale(x)
    exact = scale.float()
    steps = x * torch.where(exact > 0, UNIT / exact, 0.0)
    steps = steps.clamp(-_LARGEST_CODE, _LARGEST_CODE).nan_to_num(0.0)
    bits = (scale.view(torch.int16).int() >> torch.arange(SCALE_BITS)) & 1
    marked = ((steps[:, :SCALE_BITS] - bits) / 2).round() * 2 + bits
    return torch.cat([marked, steps[:, SCALE_BITS:].round()], dim=1).to(torch.int16)


def _decode_block(codes: torch.Tensor) -> torch.Tensor:
    bits = (codes[:, :SCALE_BITS].int() & 1) << torch.arange(SCALE_BITS)
    scale = bits.sum(dim=1, keepdim=True).to(torch.int16).view(torch.float16)
    return codes.float() * (scale.float() / UNIT)


def encode(x: torch.Tensor) -> torch.Tensor:
    """Encode vectors x, float32 [n, head_dim], to codes, int16 [n, head_dim]."""
    if x.shape[1] < SCALE_BITS:
        return x.half().view(torch.int16)
    return torch.cat([_encode_block(part) for part in x.split(block_sizes(x.shape[1]), 1)], 1)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Decode the codes of `encode` to vectors, float32 [n, head_dim]."""
    if codes.shape[1] < SCALE_BITS:
        return codes.view(torch.float16).float()
    return torch.cat(
        [_decode_block(part) for part in codes.split(block_sizes(codes.shape[1]), 1)], 1
    )
