"""A model whose next tokens follow a script, to test generation without weights."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace

import torch

from exl_loader.cache.layout import PAGE_LEN, CacheLayer, CacheType, pages_for
from exl_loader.cache.paging import PagedCache
from exl_loader.engine import LoadedModel
from exl_loader.generation.forward_model import LogitsRow
from exl_loader.text.tokenizer import Tokenizer


class FakeModel:
    """A model in which `script(ids so far)` has the largest logit, 10; all others are 0.

    Args:
        script: all ids of a sequence -> the next id, or the logits after them.
        vocab_size: size of the vocabulary.
        num_pages: number of pages of the cache.
        sizes: chunk_size, max_batch_size, logits_rows, decode_rows.
    """

    def __init__(
        self, script: Callable[[list[int]], int | torch.Tensor], vocab_size: int,
        num_pages: int, **sizes: int,
    ) -> None:
        self.config = SimpleNamespace(
            vocab_size=vocab_size, bos_token_id=None, eos_token_ids=(0,)
        )
        self.chunk_size = sizes.get("chunk_size", 16)
        self.max_batch_size = sizes.get("max_batch_size", 4)
        self.logits_rows = sizes.get("logits_rows", 8)
        self.decode_rows = sizes.get("decode_rows", self.chunk_size)
        self.most_in_flight = self.decoding_in_flight = 1
        self.loras = ()
        self.script = script
        self.calls: list[list[int]] = []
        self.fail_at: int | None = None
        self.error: BaseException = RuntimeError("injected")
        self.before_call: Callable[[], None] = lambda: None
        # A page holds the ids themselves.
        shape = (num_pages, 1, PAGE_LEN, 1)
        self.stored = torch.full(shape, -1, dtype=torch.int32)
        self._inside = threading.Lock()

    def forward(self, entries, logits="last"):
        assert self._inside.acquire(blocking=False), "two forward passes at once"
        try:
            return self._forward(entries, logits)
        finally:
            self._inside.release()

    def forward_rows(self, entries, logits="last"):
        rows = self.forward(entries, logits)
        return [] if rows is None else [LogitsRow(row) for row in rows.numpy()]

    def _forward(self, entries, logits):
        assert 0 < len(entries) <= self.max_batch_size
        assert sum(len(ids) for _, ids in entries) <= self.chunk_size
        self.calls.append([len(ids) for _, ids in entries])
        self.before_call()
        if self.fail_at is not None and len(self.calls) > self.fail_at:
            raise self.error
        rows = []
        for sequence, ids in entries:
            assert ids and sequence.past_len + len(ids) <= sequence.capacity
            for token_id in ids:
                index, row = divmod(sequence.past_len, PAGE_LEN)
                self.stored[sequence.pages[index], 0, row, 0] = token_id
                sequence.past_len += 1
                rows.append(self._row(self.read(sequence)))
            if logits == "last":
                rows[-len(ids) :] = rows[-1:]
        return torch.stack(rows if logits != "none" else []) if logits != "none" else None

    def read(self, sequence) -> list[int]:
        """Return the ids that the sequence's pages hold."""
        return self.stored[sequence.pages].flatten().tolist()[: sequence.past_len]

    def rope_class(self, rope_len: int) -> int:
        return 0

    def _row(self, text: list[int]) -> torch.Tensor:
        found = self.script(text)
        if isinstance(found, torch.Tensor):
            return found
        row = torch.zeros(self.config.vocab_size)
        row[found] = 10.0
        return row


class FakeBuffers:
    """Stands for a model's buffers."""

    def __init__(self) -> None:
        self.nbytes = 1000

    def allocated_bytes(self, device: str | None = None, segment: str | None = None) -> int:
        return self.nbytes

    def release(self) -> None:
        self.nbytes = 0


def fake_engine(script, vocab_size=300, tokenizer=None, ctx_size=PAGE_LEN, pages=None, **sizes):
    """Build a LoadedModel around a FakeModel; return it, the model and the cache."""
    num_pages = pages or pages_for(ctx_size)
    model = FakeModel(script, vocab_size, num_pages, **sizes)
    layer = CacheLayer(model.stored, None, model.stored, None, CacheType(32, 32))
    cache = PagedCache([layer], num_pages)
    reservation = SimpleNamespace(ctx_size=ctx_size)
    engine = LoadedModel(model, cache, tokenizer, reservation, FakeBuffers())  # type: ignore[arg-type]
    return engine, model, cache


def settle(engine: LoadedModel) -> None:
    """Return when the model's thread has handled all messages so far."""
    assert list(engine.run_alone(lambda model, cache: iter(()))) == []


def count_up(text: list[int]) -> int:
    """A script: each token is the last one plus one."""
    return text[-1] + 1


def endless(text: list[int]) -> int:
    """A script: always the same token."""
    return 7


def spell(tokenizer: Tokenizer, answer: str) -> Callable[[list[int]], int]:
    """Make a script that answers any prompt of one token with this text and an end token."""
    ids = [*tokenizer.encode(answer, add_bos=False), tokenizer.eos_token_ids[0]]

    def script(text: list[int]) -> int:
        return ids[min(len(text) - 1, len(ids) - 1)]

    return script
