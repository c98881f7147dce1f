"""Read the zero points of GPTQ layers from `qzeros`, in all layouts that quantisers write.

A group has a zero point of b bits for every output column, packed along the columns into
32-bit words, least significant bit first. There are two layouts:

    gptq_v2   the zero points
    gptq      every zero point minus 1

Quantisers subtract the 1 of `gptq` in two ways:

    by words    GPTQModel packs first and then subtracts one constant from every word
                (0x11111111 for 4 bits). auto-round before 0.16 adds up the fields minus 1 in a
                word, which gives the same words.
    by fields   AutoGPTQ subtracts before it packs.

The words are equal unless a zero point is 0: then subtraction by words borrows from the next
field. `qzeros` is read as GPTQModel reads it, by adding the constant to every word. This restores
every zero point that was written by words. It also restores a zero point 0 that was written by
fields. (auto-round 0.16 writes 1 in place of 0.)

With 3 bits, fields 10 and 21 of each 32 fields cross a word boundary, and there are three ways:

    fields    one field at a time: AutoGPTQ, auto-round, GPTQModel from 6.1 on
    words     one subtraction a word; a borrow from the next word is lost
    swapped   as `words`, but the constants of the first and the third word are exchanged:
              GPTQModel before 6.1 (`convert_gptq_v2_to_v1_format`)

No file of a model folder names the way, so `qzeros` is read in all three ways. The reading whose
zero points have the least entropy is used, because a wrong reading shifts some columns against
the others.

With symmetric quantization every zero point is 2^(b - 1), so only one reading can be right. Some
quantisers label one layout and store the other. Then the values decide, not the label.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .layer import unpack_stream

Array = np.ndarray[Any, Any]

# Words with 1 in every field: one word, and for 3 bits three words.
_ONES = {2: (0x55555555,), 4: (0x11111111,), 8: (0x01010101,)}
_ONES_3 = {
    "words": (0x49249249, 0x92492492, 0x24924924),
    "swapped": (0x24924924, 0x92492492, 0x49249249),
}
# A layer that is labelled symmetric is read as symmetric if at least this share of its zero points
# is 2^(b - 1).
_SYMMETRIC_SHARE = 0.5
# Another reading of 3-bit zero points replaces that of `fields`, the usual one, if its entropy code
# is at least this many bits shorter. Eight bits are odds of 256 to 1.
_BITS_SAVED = 8


def read_zero_points(
    words: Array, bits: int, columns: int, layout: str, sym: bool | None
) -> tuple[Array, str]:
    """Read a layer's zero points.

    Args:
        words: uint32 [G, ceil(columns * bits / 32)], `qzeros` as on disk.
        bits: bits of a code.
        columns: output columns.
        layout: `gptq` or `gptq_v2`, the label of the folder.
        sym: whether the quantization is symmetric; None if that is unknown.

    Returns:
        The zero points, uint8 [G, columns], and a text for a warning if the values contradict
        `layout` or `sym`; otherwise "".
    """
    labelled = _by_label(words, bits, columns, layout)
    if sym is False or not labelled.size:
        return labelled, ""
    middle = 1 << (bits - 1)
    best, name, best_share = labelled, layout, _share(labelled, middle)
    for other, zeros in _readings(words, bits, columns):
        share = _share(zeros, middle)
        if share > best_share:
            best, name, best_share = zeros, other, share
    # If `sym` is unknown, the layer is symmetric only if every zero point is 2^(b - 1).
    if best_share < (_SYMMETRIC_SHARE if sym else 1.0):
        return labelled, "sym is true, but zero points differ from each other" if sym else ""
    if name == layout:
        return best, ""
    return best, f"zero points are stored as in {name}, though the label is {layout}"


def _share(zeros: Array, value: int) -> float:
    return float(np.mean(zeros == value))


def _by_label(words: Array, bits: int, columns: int, layout: str) -> Array:
    if layout == "gptq_v2":
        return _fields(words, bits, columns)
    readings = [zeros for name, zeros in _readings(words, bits, columns) if name != "gptq_v2"]
    best = readings[0]
    for zeros in readings[1:]:
        margin = _BITS_SAVED if best is readings[0] else 0
        if _code_length(zeros) < _code_length(best) - margin:
            best = zeros
    return best


def _readings(words: Array, bits: int, columns: int) -> Iterator[tuple[str, Array]]:
    """Yield every possible reading: the name of its layout, and uint8 [G, columns]."""
    if bits == 3:
        yield "gptq", (_fields(words, bits, columns) + np.uint8(1)) & np.uint8(7)
        for ones in _ONES_3.values():
            yield "gptq", _fields(_add(words, ones), bits, columns)
    else:
        yield "gptq", _fields(_add(words, _ONES[bits]), bits, columns)
    yield "gptq_v2", _fields(words, bits, columns)


def _fields(words: Array, bits: int, columns: int) -> Array:
    return np.ascontiguousarray(unpack_stream(words.T, bits, columns).T)


def _add(words: Array, constants: tuple[int, ...]) -> Array:
    """Add constants to the words of each row in turn, modulo 2^32."""
    repeated = np.resize(np.array(constants, np.uint32), words.shape[1])
    return words + repeated


def _code_length(zeros: Array) -> float:
    """Return the length of the zero points' entropy code in bits: N times their entropy."""
    counts = np.bincount(zeros.ravel(), minlength=8)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / zeros.size)).sum())
