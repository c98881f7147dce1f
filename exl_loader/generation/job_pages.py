"""The pages of a job's texts: taken for the prompt, more as the answer grows, given back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..cache.layout import PAGE_LEN, pages_for
from ..cache.paging import PagedCache, PagedSequence
from ..utils.errors import CacheFull
from .forward_model import ForwardModel
from .jobs import Job


def reaches(job: Job) -> list[int]:
    """Return the length that each of a job's texts may reach."""
    return [reach for _, reach in _wanted(job)]


def reach_error(lengths: Sequence[int], cache: PagedCache) -> CacheFull | None:
    """Return the error of a request whose texts, if they share no page, exceed the empty cache."""
    needed = sum(map(pages_for, lengths))
    if needed <= cache.num_pages:
        return None
    return CacheFull(
        f"the cache has no room for a text of {' and one of '.join(map(str, lengths))} tokens",
        expected=f"at most {cache.num_pages} pages of {PAGE_LEN} tokens", actual=needed,
        remedy="Ask for fewer tokens, or load the model with a larger cache_size",
    )


def acquire_pages(
    job: Job, model: ForwardModel, cache: PagedCache, headroom: int
) -> list[PagedSequence]:
    """Take pages for what a job's texts have so far and for the next token of each.

    Args:
        headroom: number of pages that have to stay free, besides one for each of the job's
            texts that may need it later.

    Returns:
        The sequences, for `Job.begin`.

    Raises:
        CacheFull: too few pages are free, or no open page; no page has been taken.
    """
    wanted = _wanted(job)
    headroom += sum(pages_for(len(ids) + 1) < pages_for(reach) for ids, reach in wanted)
    taken: list[PagedSequence] = []
    try:
        for ids, reach in wanted:
            rope_class = model.rope_class(reach)
            taken.append(cache.acquire(
                len(ids) + 1, ids, rope_class, rope_len=reach, headroom=headroom
            ))
    except BaseException:
        for sequence in taken:
            cache.release(sequence)
        raise
    return taken


def _wanted(job: Job) -> list[tuple[Sequence[int] | npt.NDArray[np.int64], int]]:
    """Return the ids of each of a job's texts so far, and the length that it may reach."""
    wanted: list[tuple[Sequence[int] | npt.NDArray[np.int64], int]]
    wanted = [(job.history, job.max_tokens)]
    if job.negative is not None:
        wanted.append((job.negative.ids, job.negative.max_tokens))
    return wanted


def num_growing(job: Job) -> int:
    """Return how many texts of an active job may need another page."""
    return sum(len(text.pages) < pages_for(text.rope_len) for text, _ in job.texts)


def grow_pages(job: Job, cache: PagedCache) -> None:
    """Take the pages that a job's texts need for their newest tokens.

    Raises:
        CacheFull: too few pages are free; call again when there are more.
    """
    for sequence, ids in job.texts:
        if sequence.capacity < len(ids):
            cache.grow(sequence, len(ids))


def return_pages(job: Job, cache: PagedCache) -> None:
    """Give a job's pages back; they can be found by their content until they are lent again."""
    try:
        for sequence, ids in job.texts:
            try:
                cache.commit(sequence, ids)
            finally:
                cache.release(sequence)
    finally:
        job.drop_sequences()
