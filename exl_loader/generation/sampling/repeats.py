"""Where the end of a text occurred before.

Both look for all places at once and go backwards from there, one token a round: places that
no longer match drop out, so that a round costs what is left, and few rounds are left for long.
"""

from __future__ import annotations

import numpy as np

from .values import Ids, Places

# Longer repeats count as this long. The web UI's limit: it keeps the penalty finite, and the
# rounds few in a text that says one thing over and over.
MAX_REPEAT = 50


def earlier_matches(ids: Ids, length: int) -> Places:
    """Places behind each earlier occurrence of the last `length` tokens, rising.

    Args:
        ids: int64 [n]; occurrences may overlap the end.
        length: 0 matches everywhere.
    """
    behind = np.arange(length, len(ids))
    for back in range(1, min(length, len(ids)) + 1):
        behind = behind[ids[behind - back] == ids[-back]]
    return behind


def longest_repeats(ids: Ids, breaker_ids: Ids) -> tuple[Ids, Ids]:
    """Tokens that came after an earlier occurrence of the text's end.

    Args:
        ids: int64 [n].
        breaker_ids: tokens that no repeat contains and that follow none.

    Returns:
        The tokens, each once and rising, and for each the length of the longest end of the
        text that it followed, 1 to `MAX_REPEAT`.
    """
    limit = _repeat_limit(ids, breaker_ids)
    if limit == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    behind = 1 + np.flatnonzero(ids[:-1] == ids[-1])
    behind = behind[~np.isin(ids[behind], breaker_ids)]
    lengths = np.ones(len(behind), np.int64)
    alive = np.arange(len(behind))
    for length in range(2, limit + 1):
        alive = alive[behind[alive] >= length]
        alive = alive[ids[behind[alive] - length] == ids[-length]]
        if len(alive) == 0:
            break
        lengths[alive] = length
    tokens, where = np.unique(ids[behind], return_inverse=True)
    longest = np.zeros(len(tokens), np.int64)
    np.maximum.at(longest, where, lengths)
    return tokens, longest


def _repeat_limit(ids: Ids, breaker_ids: Ids) -> int:
    """How many of the last tokens may belong to a repeat: none at or before a breaker."""
    end = ids[-MAX_REPEAT:]
    breakers = np.flatnonzero(np.isin(end, breaker_ids))
    return len(end) - 1 - int(breakers[-1]) if len(breakers) else len(end)
