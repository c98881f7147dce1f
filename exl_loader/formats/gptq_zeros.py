"""GPTQ's zero points as they are stored, and back: the one definition of reading them.

A group has a zero point of b bits for every output column, packed along the columns into
32-bit words, least significant bit first. There are two layouts:

    gptq_v2   the zero points themselves
    gptq      every zero point less 1

Writers of `gptq` subtract in two ways. GPTQModel packs first and then subtracts 1 from every
field by one subtraction a word (0x11111111 for 4 bits), and auto-round before 0.16 sums fields
less 1 into a word, which is the same. AutoGPTQ subtracts before it packs. The two agree unless a
zero point is 0: then whole-word subtraction borrows from the next field. Addition to the whole
word, which is how GPTQModel reads the layout, gives back every zero point of the first kind of
writer, and the zero point 0 of the second kind. (auto-round 0.16 writes 1 in place of 0.)

With 3 bits fields 10 and 21 of each 32 lie in two words, and three writers differ:

    fields    one field at a time: AutoGPTQ, auto-round, GPTQModel from 6.1 on
    words     one subtraction a word, carries between words lost
    swapped   the same with the constants of the first and the third word exchanged:
              GPTQModel before 6.1 (`convert_gptq_v2_to_v1_format`)

A folder does not name its writer, so all are tried, and the one is taken under which
the layer's zero points spread least: a wrong reading shifts some columns against the others.

With symmetric quantization every zero point is 2^(b - 1), which leaves one reading of what is
stored. Some writers label one layout and store the other; then the values decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .layer import unpack_stream

Array = np.ndarray[Any, Any]

# 1 in every field of a word. For 3 bits, of three words.
_ONES = {2: (0x55555555,), 4: (0x11111111,), 8: (0x01010101,)}
_ONES_3 = {
    "words": (0x49249249, 0x92492492, 0x24924924),
    "swapped": (0x24924924, 0x92492492, 0x49249249),
}
# Share of zero points that must be 2^(b - 1) for a layer to count as symmetric.
_SYMMETRIC_SHARE = 0.5
# Bits by which another reading of 3-bit zero points must be shorter to write down than that of
# `fields`, the usual one: eight bits are odds of 256 to 1.
_BITS_SAVED = 8


def read_zero_points(
    words: Array, bits: int, columns: int, layout: str, sym: bool | None
) -> tuple[Array, str]:
    """Give a layer's zero points.

    Args:
        words: uint32 [G, ceil(columns * bits / 32)], `qzeros` as on disk.
        bits: width of the codes.
        columns: output columns.
        layout: `gptq` or `gptq_v2`, as labelled.
        sym: True for symmetric quantization, None where that is not known.

    Returns:
        uint8 [G, columns], and what contradicts the label or the symmetry, in words for a
        warning; empty where nothing does.
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
    # Where symmetry is only supposed, nothing less than every zero point proves it.
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
    """Yield every layout's name with the zero points under it."""
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
    """Bits that it takes to write 3-bit zero points down, given how often each occurs."""
    counts = np.bincount(zeros.ravel(), minlength=8)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / zeros.size)).sum())
