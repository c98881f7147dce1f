"""A scripted model over several machines, whose passes are in flight until they are waited for."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from exl_loader.cache.layout import PAGE_LEN, pages_for
from exl_loader.cache.paging import PagedCache, PagedSequence
from exl_loader.engine import LoadedModel
from exl_loader.generation.forward_model import LogitsRow
from exl_loader.utils.errors import MachineLost
from support.fake_model import FakeBuffers

NOTHING = -1


class Started(NamedTuple):
    """A pass that was started.

    Attributes:
        counts: number of ids by sequence.
        logits: which rows it computes.
        sequences: in the same order.
    """

    counts: list[int]
    logits: str
    sequences: list[PagedSequence]


@dataclass(frozen=True)
class Sent:
    """What a machine is told of one sequence in a pass."""

    ids: list[int]
    past_len: int
    pages: tuple[int, ...]
    open_page: int | None
    missing_first: int | None


class Storage:
    """One machine's cache: a page holds the ids themselves, and so does an open page."""

    def __init__(self, num_pages: int, num_open_pages: int) -> None:
        self.num_open_pages = num_open_pages
        self.pages = np.full((num_pages, PAGE_LEN), NOTHING)
        self.open_pages = np.full((num_open_pages, PAGE_LEN), NOTHING)
        self.firsts = np.full(num_open_pages, NOTHING)

    def copy_tokens(self, source: int, target: int, count: int) -> None:
        self.pages[target, :count] = self.pages[source, :count]

    def copy_open_page(self, source: int, target: int, count: int) -> None:
        self.open_pages[target, :count] = self.open_pages[source, :count]
        self.firsts[target] = self.firsts[source]

    def run(self, sent: Sent, logits: str) -> list[list[int]]:
        """Store the ids; return the text up to each row of logits, as the machine has stored it."""
        end, page = sent.past_len + len(sent.ids), sent.open_page
        for position, token_id in enumerate(sent.ids, sent.past_len):
            index, row = divmod(position, PAGE_LEN)
            self.pages[sent.pages[index], row] = token_id
            if page is not None:
                self.open_pages[page, row] = token_id
                if position == 0:
                    self.firsts[page] = token_id
        text = self.pages[list(sent.pages)].reshape(-1)[:end]
        if page is not None:
            first = (end - 1) // PAGE_LEN * PAGE_LEN
            # The rows of a pass lie in one page.
            assert sent.past_len >= first
            text[first:] = self.open_pages[page, : end - first]
            if sent.missing_first is not None:
                self.firsts[page] = sent.missing_first
            text[0] = self.firsts[page]
        starts = {"none": end, "last": end - 1, "all": sent.past_len}
        return [text[: position + 1].tolist() for position in range(starts[logits], end)]


class FakeFlight:
    """A pass of a `PipelineModel`."""

    def __init__(self, model: PipelineModel, sent: list[Sent], logits: str) -> None:
        self.model, self.sent, self.logits = model, sent, logits
        self.number = model.num_started
        self.texts: list[list[int]] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        """Run the other machines' layers."""
        self.error = self.model.fails_in_flight(self.number)
        if self.error is not None:
            return
        for sent in self.sent:
            self.texts += self.model.others.run(sent, self.logits)

    def rows(self) -> list[LogitsRow]:
        model = self.model
        model.check_connection()
        assert model.open, "waited for twice"
        assert model.open[0] is self, "not the oldest one"
        model.open_at_landing.append(len(model.open))
        model.open.popleft()
        while self.run in model.ring:
            model.ring.popleft()()
        if self.error is not None:
            raise self.error
        return model.new_rows(self.texts)


class PipelineModel:
    """A model whose first machine runs its part of a pass at once, and the others later.

    `script(ids so far)` is the likeliest next id, where the ids are those that the other machines
    have stored. These do their part in the order of the ring, at random times before the flight
    is waited for.

    Args:
        script: all ids of a sequence -> the next id.
        vocab_size: size of the vocabulary.
        num_pages: number of pages of the cache.
        has_open_pages: as caches of few bits.
        sizes: chunk_size, max_batch_size, logits_rows, decode_rows, most_in_flight,
            decoding_in_flight.

    Attributes:
        passes: those that were started.
        open_at_landing: number of open flights, with the one that is waited for, at each wait.
        fails_at_start, fails_in_flight: number of a pass -> its error, or None.
        lost: the connection is lost.
    """

    def __init__(
        self, script: Callable[[list[int]], int], vocab_size: int, num_pages: int,
        has_open_pages: bool = False, **sizes: int,
    ) -> None:
        self.config = SimpleNamespace(
            vocab_size=vocab_size, bos_token_id=1, eos_token_ids=(0,)
        )
        self.chunk_size = sizes.get("chunk_size", 16)
        self.max_batch_size = sizes.get("max_batch_size", 8)
        self.logits_rows = sizes.get("logits_rows", 16)
        self.decode_rows = sizes.get("decode_rows", self.chunk_size)
        self.most_in_flight = sizes.get("most_in_flight", 4)
        self.decoding_in_flight = sizes.get("decoding_in_flight", 2)
        self.loras = ()
        self.script = script
        self.passes: list[Started] = []
        self.open_at_landing: list[int] = []
        self.fails_at_start: Callable[[int], BaseException | None] = lambda number: None
        self.fails_in_flight: Callable[[int], BaseException | None] = lambda number: None
        self.lost = False
        self.num_started = 0
        num_open_pages = self.max_batch_size + 2 if has_open_pages else 0
        self.first = Storage(num_pages, num_open_pages)
        self.others = Storage(num_pages, num_open_pages)
        self.ring: deque[Callable[[], None]] = deque()
        self.open: deque[FakeFlight] = deque()
        self._rng = random.Random(0)
        self._valid: list[np.ndarray] = []

    def check_connection(self) -> None:
        if self.lost:
            self.open.clear()
            raise MachineLost("machine 1", actual="gone", remedy="Start it again")

    def start_rows(self, entries, logits="last") -> FakeFlight:
        assert len(self.open) < self.most_in_flight, "too many flights"
        assert 0 < len(entries) <= self.max_batch_size
        assert 0 < sum(len(ids) for _, ids in entries) <= self.chunk_size
        self.check_connection()
        self.num_started += 1
        error = self.fails_at_start(self.num_started)
        if error is not None:
            raise error
        self.passes.append(Started(
            [len(ids) for _, ids in entries], logits, [sequence for sequence, _ in entries]))
        flight = FakeFlight(self, [self._sent(*entry) for entry in entries], logits)
        for (sequence, ids), sent in zip(entries, flight.sent, strict=True):
            self.first.run(sent, logits)
            sequence.past_len += len(ids)
            sequence.missing_first = None
        self.open.append(flight)
        self.ring.append(flight.run)
        for _ in range(self._rng.randrange(3)):
            if self.ring:
                self.ring.popleft()()
        return flight

    def forward_rows(self, entries, logits="last") -> list[LogitsRow]:
        assert not self.open, "a pass is in flight"
        before = [(sequence.past_len, sequence.missing_first) for sequence, _ in entries]
        try:
            rows = self.start_rows(entries, logits).rows()
        except Exception:
            for (sequence, _), state in zip(entries, before, strict=True):
                sequence.past_len, sequence.missing_first = state
            raise
        # It was not in flight.
        self.open_at_landing.pop()
        return rows

    def forward(self, entries, logits="last") -> torch.Tensor:
        rows = self.forward_rows(entries, logits)
        return torch.tensor(np.array([row.values for row in rows])).reshape(
            -1, self.config.vocab_size)

    def rope_class(self, rope_len: int) -> int:
        return 0

    def new_rows(self, texts: Sequence[list[int]]) -> list[LogitsRow]:
        """Return rows, and make those before them unusable."""
        for values in self._valid:
            values[:] = np.nan
        self._valid = [np.zeros(self.config.vocab_size, np.float32) for _ in texts]
        for values, text in zip(self._valid, texts, strict=True):
            found = self.script(text)
            values[found] = 10
            values[(found + 1) % self.config.vocab_size] = 9
        return [LogitsRow(values) for values in self._valid]

    def _sent(self, sequence: PagedSequence, ids: list[int]) -> Sent:
        assert ids and sequence.past_len + len(ids) <= sequence.end_of_pass(sequence.past_len)
        return Sent(
            list(ids), sequence.past_len, tuple(sequence.pages), sequence.open_page,
            sequence.missing_first,
        )


@dataclass
class OtherMachines:
    """The cache of the other machines' layers: copies wait in the ring behind passes."""

    model: PipelineModel
    num_open_pages: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_open_pages = self.model.others.num_open_pages

    def copy_tokens(self, *arguments: int) -> None:
        self.model.check_connection()
        self.model.ring.append(lambda: self.model.others.copy_tokens(*arguments))

    def copy_open_page(self, *arguments: int) -> None:
        self.model.check_connection()
        self.model.ring.append(lambda: self.model.others.copy_open_page(*arguments))


def pipeline_engine(
    script: Callable[[list[int]], int], vocab_size: int = 300, tokenizer: Any = None,
    ctx_size: int = PAGE_LEN, pages: int | None = None, has_open_pages: bool = False,
    **sizes: int,
) -> tuple[LoadedModel, PipelineModel, PagedCache]:
    """Build a LoadedModel around a PipelineModel; return it, the model and the cache."""
    num_pages = pages or pages_for(ctx_size)
    model = PipelineModel(script, vocab_size, num_pages, has_open_pages, **sizes)
    layers: Any = [model.first, OtherMachines(model)]
    cache = PagedCache(layers, num_pages)
    reservation: Any = SimpleNamespace(ctx_size=ctx_size)
    buffers: Any = FakeBuffers()
    engine = LoadedModel(model, cache, tokenizer, reservation, buffers)  # type: ignore[arg-type]
    return engine, model, cache
