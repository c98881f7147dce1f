"""auto-round's packing `auto_round:auto_awq` of 4-bit codes, converted to GPTQ's packing.

    P.qweight int32 [K, N / 8]   codes packed along N: a word holds 8 columns of one row
    P.qzeros  int32 [G, N / 8]   zero points without an offset, in the same order

Column 8 * w + c of a row is in word w at bits [4 * SLOTS[c], 4 * SLOTS[c] + 4). Source:
auto-round 0.16, `export/export_to_awq/utils.py`, which follows AutoAWQ's GEMM kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

BITS = 4
COLUMNS = 8
# Rows of codes that one row of words has, packed along the input channels.
WORD_ROWS = 8
SLOTS = (0, 4, 1, 5, 2, 6, 3, 7)


def codes_along_rows(words: Array) -> Array:
    """Repack codes from uint32 [K, N / 8] to GPTQ's `qweight`, uint32 [K / 8, N]."""
    import numpy as np

    rows, groups = words.shape
    packed = np.zeros((rows // WORD_ROWS, groups * COLUMNS), np.uint32)
    for row in range(WORD_ROWS):
        stored = words[row::WORD_ROWS]
        for column, slot in enumerate(SLOTS):
            packed[:, column::COLUMNS] |= (stored >> (BITS * slot) & 0xF) << (BITS * row)
    return packed


def zeros_in_order(words: Array) -> Array:
    """Reorder zero points, uint32 [G, N / 8], to the order of columns of GPTQ's `qzeros`."""
    import numpy as np

    ordered = np.zeros_like(words)
    for column, slot in enumerate(SLOTS):
        ordered |= (words >> (BITS * slot) & 0xF) << (BITS * column)
    return ordered
