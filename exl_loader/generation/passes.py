"""What one forward pass runs: a chunk of a prompt, or the next tokens of decoding jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..cache.layout import PAGE_LEN
from ..cache.paging import PagedSequence
from .forward_model import ForwardModel, LogitsMode
from .jobs import Job

Ids = Sequence[int] | npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Pass:
    """A forward pass of one or several jobs.

    Args:
        jobs: one for a chunk of a prompt.
        entries: sequences, each with the ids that follow its `past_len` tokens.
        logits: which rows it computes. Tokens are drawn from them.
        drafts: the ids that may follow the last one of each job; none for a chunk.
        chunk_of: the text whose chunk it is; None for a pass over decoding jobs.
    """

    jobs: list[Job]
    entries: list[tuple[PagedSequence, list[int]]]
    logits: LogitsMode
    drafts: list[list[int]]
    chunk_of: Ids | None = None

    @property
    def num_rows(self) -> int:
        """Number of ids of all entries."""
        return sum(len(ids) for _, ids in self.entries)


def prompt_pass(job: Job, model: ForwardModel) -> Pass:
    """Return the next chunk of the prompt or, after that, of the negative prompt.

    An answer whose pages were lent to others is run again in passes that compute what its
    decoding has computed, bit for bit.
    """
    for sequence, text in job.texts:
        pending = _missing(sequence, text)
        if job.negative is not None:
            pending = pending[:-1]
        if pending:
            break
    assert pending, "the prompt is already prefilled"
    count, most = len(pending), model.chunk_size
    of_prompt = len(text) - job.num_answered - sequence.past_len
    if of_prompt <= 0:
        most = model.decode_rows
    elif model.decode_rows < most:
        count = min(count, of_prompt)
    ids = pending[: _chunk_end(sequence, count, most) - sequence.past_len]
    last = len(ids) == len(pending) and job.negative is None
    return Pass([job], [(sequence, ids)], "last" if last else "none", [[]], text)


def decoding_pass(jobs: list[Job], drafts: list[list[int]]) -> Pass:
    """Return a pass over the last token of each job and its draft, the tokens that may follow."""
    entries = [
        (sequence, [*_missing(sequence, ids), *draft])
        for job, draft in zip(jobs, drafts, strict=True)
        for sequence, ids in job.texts
    ]
    return Pass(jobs, entries, "all" if any(drafts) else "last", drafts)


def _chunk_end(sequence: PagedSequence, count: int, most: int) -> int:
    """Return where the next chunk of `count` missing tokens ends, after `most` at the latest.

    If possible it is the end of a page, because only full pages are shared without a copy.
    """
    past_len = sequence.past_len
    if count <= most:
        return min(past_len + count, sequence.end_of_pass(past_len))
    end = min(past_len + most, sequence.end_of_pass(past_len))
    page_end = end // PAGE_LEN * PAGE_LEN
    return page_end if page_end > past_len else end


def _missing(sequence: PagedSequence, ids: Ids) -> list[int]:
    """Return the ids of a text that the cache does not hold yet."""
    return [int(i) for i in ids[sequence.past_len :]]
