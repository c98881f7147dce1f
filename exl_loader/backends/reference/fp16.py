"""The definition of the `fp16` cache type: 16 bits an element, more exact than float16.

float16 spends 5 of its bits on a range that the elements of one vector do not have: keys and
values rounded to it move logits by 4e-4. Here a group of 32 elements shares one scale instead,
in the same 16 bits an element and without a tensor of its own:

    x = code * scale / 32768        code: int16

The scale, a float16 that is a little above the group's largest magnitude, is in the
lowest bits of the group's first 16 codes, bit i of it in code i. The writer rounds those
codes to the nearest whole number with that bit, so reading needs no mask. What is lost is
1/6 of what float16 loses (3.4e-5 of normal data against 2.1e-4, root mean square).

Groups are not rotated. A last group of fewer than 16 elements has no room for a scale and
belongs to the group before it; a head of fewer than 16 elements is kept in float16.
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
    """Return the elements that share each scale, e.g. 80 -> [32, 32, 16], 72 -> [32, 40]."""
    sizes = [GROUP] * (head_dim // GROUP)
    rest = head_dim % GROUP
    if rest >= SCALE_BITS or not sizes:
        return [*sizes, rest] if rest else sizes
    sizes[-1] += rest
    return sizes


def _shared_scale(x: torch.Tensor) -> torch.Tensor:
    """A float16 above the largest magnitude of each row of x; NaN where one is not finite."""
    largest = x.abs().amax(dim=1, keepdim=True)
    # 2^-10 is more than float16 rounds off, 2^-25 more than its subnormal numbers do.
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
    """Return the codes, int16 [n, head_dim], of vectors x, float32 [n, head_dim]."""
    if x.shape[1] < SCALE_BITS:
        return x.half().view(torch.int16)
    return torch.cat([_encode_block(part) for part in x.split(block_sizes(x.shape[1]), 1)], 1)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Return the vectors, float32 [n, head_dim], of `encode`'s codes."""
    if codes.shape[1] < SCALE_BITS:
        return codes.view(torch.float16).float()
    return torch.cat(
        [_decode_block(part) for part in codes.split(block_sizes(codes.shape[1]), 1)], 1
    )
