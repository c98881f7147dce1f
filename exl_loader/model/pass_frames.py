"""What machines tell each other of a pass: its sequences as numbers, and the kinds of frames."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..cache.layout import PAGE_LEN
from ..cache.paging import PagedSequence
from ..machines.frames import InvalidFrame, room
from .local_layers import Entry

# A pass, or a step of the sample of `key_sample`; and copies between pages of all layers.
PASS, SAMPLE = "pass", "sample"
COPY_TOKENS, COPY_OPEN_PAGE = "copy tokens", "copy open page"

# The field of all these frames that says to which load of a model they belong.
LOAD_NUMBER = "load"

# Numbers of an entry before its pages: ids, past_len, rope_len, open page (-1 for none), pages.
ENTRY_NUMBERS = 5


def most_in_flight(num_machines: int) -> int:
    """Return how many passes may be under way, so that no machine waits for another one."""
    return 2 * num_machines


def reserved_frames(hidden_size: int, chunk_size: int, num_machines: int) -> tuple[int, int]:
    """Return the buffers that a machine needs for passes under way: how many, and their bytes."""
    # Each may be received and, after the layers of the machine, sent on.
    return 2 * most_in_flight(num_machines), room(4 * hidden_size * chunk_size)


def pack_entries(entries: Sequence[Entry]) -> npt.NDArray[np.int32]:
    """Return what layers need to know of the sequences of a pass, as one row of numbers."""
    numbers: list[int] = []
    for sequence, ids in entries:
        open_page = -1 if sequence.open_page is None else sequence.open_page
        numbers += (len(ids), sequence.past_len, sequence.rope_len, open_page,
                    len(sequence.pages), *sequence.pages)
    return np.array(numbers, np.int32)


def unpack_entries(numbers: npt.NDArray[np.int32]) -> list[Entry]:
    """Read what `pack_entries` wrote. Layers see no ids, so each id is 0.

    Raises:
        InvalidFrame: these are no entries.
    """
    entries: list[Entry] = []
    values, first = numbers.tolist(), 0
    while first < len(values):
        head = values[first : first + ENTRY_NUMBERS]
        if len(head) < ENTRY_NUMBERS:
            raise InvalidFrame(f"an entry of {len(head)} numbers")
        count, past_len, rope_len, open_page, num_pages = head
        first += ENTRY_NUMBERS
        pages = values[first : first + num_pages]
        first += num_pages
        if not (0 < count <= len(pages) * PAGE_LEN - past_len and num_pages == len(pages)
                and past_len >= 0 and rope_len > 0 and open_page >= -1):
            raise InvalidFrame(f"an entry of {head} with {len(pages)} pages")
        sequence = PagedSequence(
            pages, past_len, rope_len, open_page=None if open_page < 0 else open_page
        )
        entries.append((sequence, [0] * count))
    return entries
