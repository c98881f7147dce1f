"""The definition of the quantised cache: rotation, grids, search of codes, byte layout.

A vector x of one head is stored as codes and scales of y = H (s * x), where s are fixed
signs and H is an orthonormal Hadamard transform over blocks of the largest power of
two that divides head_dim. The rotation spreads outliers of a few channels over all
channels. A dot product does not change if both sides are rotated. So queries are rotated once,
attention uses the stored vectors, and its output is rotated back once.

Every group of 32 elements of y has one float16 scale, and

    y = scale * level

    bits 8   level = (code - 128) / 128
    bits 6   level = (code - 32) / 32
    bits 4   level = CODEBOOKS[4][table][code] / 128, table = lowest bit of the float16 scale
    bits 3   level = CODEBOOKS[3][table][code] / 128, likewise

The levels are asymmetric on purpose: a negative scale mirrors them. With two tables and two
signs each group of 4-bit or 3-bit codes has a choice of four grids. This choice takes no memory,
because the table is the lowest bit of the scale and changes it by 0.1 % at most. It takes no
operation in a dot product either. The writer tries scales around the largest magnitude and keeps
the scale with the least squared error. Then it fits the scale to its codes by least squares.

The codebooks were found by Lloyd's iteration with this search (`tools/fit_codebooks.py`). Its
data were rotated normal vectors, and rotated normal vectors with 3, 5 or 8 outlier channels
(factors 20 to 40). The error of each kind of data was counted relative to its own norm.

The newest page of a running sequence is stored in more bits as well (`cache/layout.py`): rotated
vectors in 16 bits as in `fp16.py`, or in 8 bits with the scale of `quantize_plainly`.

Bytes: the codes of a group are split into bit planes, 8 = (8), 6 = (4 high, 2 low), 4 = (4),
3 = (2 high, 1 low).
Byte i of a plane of w bits holds elements i, i + m, i + 2m, ... starting at its lowest bits,
where m is the plane's length in bytes. So a whole register is unpacked with one shift.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from ...cache.layout import CODE_STEP, CacheType, code_bytes, group_sizes
from ...utils.integers import round_up
from . import fp16 as reference_fp16
from .feedback import round_with_feedback

# Bits of a code -> its tables of levels.
CODEBOOKS = {
    4: (
        (-127, -105, -88, -71, -56, -41, -26, -13, 1, 14, 27, 42, 57, 73, 91, 111),
        (-127, -99, -79, -62, -47, -32, -19, -5, 9, 23, 37, 52, 68, 86, 106, 127),
    ),
    3: (
        (-127, -87, -56, -27, 0, 28, 59, 96),
        (-127, -86, -51, -20, 10, 41, 76, 120),
    ),
}
PLANES = {8: (8,), 6: (4, 2), 4: (4,), 3: (2, 1)}

# Scales that the writer tries: first and last factor on a group's largest magnitude, and their
# number. Each scale is tried with both signs and all tables. The uniform grids of 8 and 6 bits
# gain by chance: among many scales near the largest magnitude, one fits most elements best.
SEARCH_RANGE = {8: (0.99, 1.08), 6: (0.95, 1.16), 4: (0.82, 1.14), 3: (0.8, 1.1)}
SEARCH_STEPS = {8: 24, 6: 24, 4: 8, 3: 8}
REFITS = 1
_LARGEST_HALF = 65504.0


def rotation_block(head_dim: int) -> int:
    """Return the length of a Hadamard block: the largest power of two dividing head_dim."""
    return head_dim & -head_dim


def rotation_sign(index: int) -> int:
    """Return the sign, 1 or -1, that element `index` of a head gets before the transform."""
    mixed = (index * 0x9E3779B1) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x85EBCA77) & 0xFFFFFFFF
    return -1 if (mixed >> 16) & 1 else 1


@lru_cache(maxsize=16)
def rotation_matrix(head_dim: int) -> torch.Tensor:
    """Return R, float64 [head_dim, head_dim], orthonormal: a stored vector is x @ R."""
    block = torch.ones(1, 1, dtype=torch.float64)
    size = rotation_block(head_dim)
    while block.shape[0] < size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    signs = torch.tensor([rotation_sign(i) for i in range(head_dim)], dtype=torch.float64)
    hadamard = torch.block_diag(*[block] * (head_dim // size)) / math.sqrt(size)
    return signs[:, None] * hadamard


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotate the last dimension; float64 in, float64 out."""
    return x @ rotation_matrix(x.shape[-1])


def rotate_back(y: torch.Tensor) -> torch.Tensor:
    """Undo `rotate`."""
    return y @ rotation_matrix(y.shape[-1]).T


def has_tables(bits: int) -> bool:
    """Tell whether the levels of codes stand in tables, which the scale's lowest bit selects."""
    return bits in CODEBOOKS


def levels(bits: int) -> torch.Tensor:
    """Return the level of each code, float32 [tables, 2^bits], rising in each table."""
    if has_tables(bits):
        return torch.tensor(CODEBOOKS[bits], dtype=torch.float32) / 128
    half = 2 ** (bits - 1)
    return torch.arange(-half, half, dtype=torch.float32)[None] / half


def _as_half(scale: torch.Tensor, table: torch.Tensor | int, bits: int) -> torch.Tensor:
    """Round scales to float16; for codes with tables, store the table in the lowest bit."""
    half = scale.clamp(-_LARGEST_HALF, _LARGEST_HALF).half()
    if has_tables(bits):
        half = ((half.view(torch.int16) & ~1) | table).view(torch.float16)
    return half


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """Return 1 / scale, and 0 for scales of 0."""
    return torch.where(scale == 0, 0.0, 1 / scale)


class GroupSearch:
    """The best codes and scales found so far for groups of elements.

    Args:
        y: float32 [n, elements], a group a row.
        bits: 8, 6, 4 or 3.
        grids: the levels to choose from, float32 [tables, 2^bits].
    """

    def __init__(self, y: torch.Tensor, bits: int, grids: torch.Tensor) -> None:
        self.y, self.bits, self.levels = y, bits, grids
        self.thresholds = (grids[:, 1:] + grids[:, :-1]) / 2
        self.codes = torch.zeros(y.shape, dtype=torch.uint8)
        # NaN stays if no attempt has a finite error, so that NaN or infinity in y is not hidden.
        self.scales = torch.full((y.shape[0], 1), torch.nan, dtype=torch.float16)
        self.tables = torch.zeros(y.shape[0], 1, dtype=torch.int16)
        self.errors = torch.full((y.shape[0], 1), torch.inf)

    def attempt(self, scale: torch.Tensor, table: int, where: torch.Tensor | None = None) -> None:
        """Round y to the grid of `scale` [n, 1] and `table`; keep groups whose error is smaller.

        Args:
            where: bool [n, 1], the groups that may change; None is all of them.
        """
        half = _as_half(scale, table, self.bits)
        grid, exact = self.levels[table], half.float()
        codes = torch.bucketize(self.y * _inverse(exact), self.thresholds[table])
        errors = (grid[codes] * exact - self.y).square().sum(dim=1, keepdim=True)
        better = errors < self.errors
        if where is not None:
            better &= where
        self.codes = torch.where(better, codes.to(torch.uint8), self.codes)
        self.scales = torch.where(better, half, self.scales)
        self.tables = torch.where(better, table, self.tables)
        self.errors = torch.where(better, errors, self.errors)

    def round(self, y: torch.Tensor) -> torch.Tensor:
        """Round other elements to the grids that were found, and keep their codes.

        Args:
            y: float32 [n, elements]; there may be fewer elements than a group has.

        Returns:
            float32 [n, elements], y minus the values of its codes.
        """
        exact, tables = self.scales.float(), self.tables.long()
        is_above = (y * _inverse(exact))[..., None] > self.thresholds[tables]
        self.codes = is_above.sum(dim=-1).to(torch.uint8)
        return y - self.levels[tables, self.codes.long()] * exact

    def refit(self) -> None:
        """Fit each scale to its codes by least squares, and attempt the fitted scale."""
        tables = self.tables.clone()
        values = self.levels[tables.long(), self.codes.long()]
        norms = values.square().sum(dim=1, keepdim=True)
        scale = (values * self.y).sum(dim=1, keepdim=True) / norms.clamp(min=1e-30)
        for table in range(len(self.levels)):
            self.attempt(scale, table, where=tables == table)


def search_groups(
    y: torch.Tensor, bits: int, grids: torch.Tensor | None = None
) -> GroupSearch:
    """Search the codes and scales of groups y, float32 [n, elements].

    `grids` replaces `levels(bits)`, for experiments with other levels.
    """
    search = GroupSearch(y, bits, levels(bits) if grids is None else grids)
    largest = y.abs().amax(dim=1, keepdim=True)
    (first, last), steps = SEARCH_RANGE[bits], SEARCH_STEPS[bits]
    for table in range(len(search.levels)):
        for sign in (1, -1):
            for step in range(steps):
                factor = first + (last - first) * step / (steps - 1)
                search.attempt(largest * (sign * factor), table)
    for _ in range(REFITS):
        search.refit()
    return search


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes, uint8 [n, elements], to uint8 [n, padded elements * bits / 8]."""
    padding = -codes.shape[1] % CODE_STEP
    codes = torch.nn.functional.pad(codes, (0, padding))
    planes, shift = [], bits
    for width in PLANES[bits]:
        shift -= width
        fields = ((codes >> shift) & (2**width - 1)).unflatten(1, (8 // width, -1))
        plane = torch.zeros_like(fields[:, 0])
        for i in range(8 // width):
            plane |= fields[:, i] << (i * width)
        planes.append(plane)
    return torch.cat(planes, dim=1)


def unpack_codes(data: torch.Tensor, elements: int, bits: int) -> torch.Tensor:
    """Undo `pack_codes`: return codes, int64 [n, elements]."""
    padded = round_up(elements, CODE_STEP)
    codes = torch.zeros(data.shape[0], padded, dtype=torch.int64)
    start = 0
    for width in PLANES[bits]:
        length = padded * width // 8
        plane = data[:, start : start + length].long()
        fields = [(plane >> (i * width)) & (2**width - 1) for i in range(8 // width)]
        codes = (codes << width) | torch.cat(fields, dim=1)
        start += length
    return codes[:, :elements]


def quantize(
    y: torch.Tensor, bits: int, feedback: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rotated vectors.

    Args:
        y: float32 [n, head_dim].
        bits: 8, 6, 4 or 3.
        feedback: float16 [n, head_dim, padded head_dim], the matrix of each vector; None to
            round each element alone. See `feedback.py`.

    Returns:
        codes uint8 [n, code_bytes] and scales float16 [n, groups].
    """
    groups = [search_groups(part, bits) for part in y.split(group_sizes(y.shape[1]), dim=1)]
    if feedback is not None:
        round_with_feedback(y, groups, feedback)
    codes = torch.cat([pack_codes(group.codes, bits) for group in groups], dim=1)
    return codes, torch.cat([group.scales for group in groups], dim=1)


def quantize_plainly(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rotated vectors to 8 bits without a search, as open pages are written.

    The scale of a group is its element of largest magnitude, negated, because the lowest level
    is -1 and the highest 127/128. The search would take longer than that of 4-bit codes.

    Args:
        y: float32 [n, head_dim].

    Returns:
        As `quantize` with 8 bits.
    """
    codes, scales = [], []
    for group in y.split(group_sizes(y.shape[1]), dim=1):
        place = group.abs().argmax(dim=1, keepdim=True)
        half = _as_half(-group.gather(1, place), 0, 8)
        finite = group.isfinite().all(dim=1, keepdim=True)
        half = torch.where(finite, half, torch.nan)
        exact = half.float()
        inverse = torch.where(finite & (exact != 0), 128 / exact, 0.0)
        steps = (group * inverse).nan_to_num(0.0).round().clamp(-128, 127) + 128
        codes.append(pack_codes(steps.to(torch.uint8), 8))
        scales.append(half)
    return torch.cat(codes, dim=1), torch.cat(scales, dim=1)


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, head_dim: int, bits: int
) -> torch.Tensor:
    """Return the rotated vectors, float32 [n, head_dim], of `quantize`'s codes and scales."""
    sizes = group_sizes(head_dim)
    tables = (scales.view(torch.int16) & int(has_tables(bits))).long()
    parts = codes.split([code_bytes(size, bits) for size in sizes], dim=1)
    grid = levels(bits)
    groups = []
    for i, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        own = slice(i, i + 1)
        group_levels = grid[tables[:, own], unpack_codes(part, size, bits)]
        groups.append(group_levels * scales[:, own].float())
    return torch.cat(groups, dim=1)


def cache_round_trip(
    x: torch.Tensor, cache_type: str | CacheType, *, values: bool = False
) -> torch.Tensor:
    """Return vectors as they are read from the cache after they were written to it.

    Args:
        x: float32 [n, head_dim].
        cache_type: as in `CacheType.parse`.
        values: True if x are values, False if they are keys; a mixed type stores them differently.

    Returns:
        float32 [n, head_dim], not rotated.
    """
    parsed = CacheType.parse(cache_type)
    bits = parsed.v_bits if values else parsed.k_bits
    if bits == 32:
        return x.clone()
    if bits == 16:
        return reference_fp16.decode(reference_fp16.encode(x))
    codes, scales = quantize(rotate(x.double()).float(), bits)
    return rotate_back(dequantize(codes, scales, x.shape[1], bits).double()).float()
