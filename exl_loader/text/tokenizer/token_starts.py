"""Finds the tokens of a vocabulary that begin with given bytes."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate


class TokenStarts:
    """The tokens of a vocabulary, sorted by their bytes.

    They are kept in three buffers, because objects for 250,000 tokens would take 25 MB.

    Args:
        tokens: (bytes, id) of the tokens that can be found, in any order.
    """

    def __init__(self, tokens: Iterable[tuple[bytes, int]]) -> None:
        ordered = sorted(tokens)
        self._ids = array("q", (token_id for _, token_id in ordered))
        self._bytes = b"".join(token for token, _ in ordered)
        # Where each token begins and, last, where the last one ends.
        self._begins = array("q", accumulate((len(token) for token, _ in ordered), initial=0))

    def find(self, start: bytes) -> list[int]:
        """Return the ids, rising, of all tokens whose bytes begin with `start`."""
        indices = range(len(self._ids))
        # Of each token only as many bytes are compared as `start` has. They rise as well.
        first = bisect_left(indices, start, key=lambda index: self._head(index, len(start)))
        last = bisect_left(
            indices, True, first, key=lambda index: self._head(index, len(start)) != start
        )
        return sorted(self._ids[first:last])

    def _head(self, index: int, length: int) -> bytes:
        begin, end = self._begins[index], self._begins[index + 1]
        return self._bytes[begin : min(begin + length, end)]
