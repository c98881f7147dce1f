"""Pages of the key/value cache: who holds them, and how texts share them. No PyTorch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..utils.errors import CacheFull
from .layout import PAGE_LEN, CacheLayer, CacheType, pages_for
from .page_index import Ids, Key, PageIndex, as_ids, next_key, root_key

if TYPE_CHECKING:
    import torch


@dataclass(eq=False)
class Sequence:
    """The pages and the progress of one text.

    Args:
        pages: page numbers in the order of the text.
        past_len: tokens that the cache holds; the forward pass advances it.
        rope_len: the length the text is meant to reach, which picks RoPE's frequencies.
        keys: RoPE's root key, then those of the full pages that can be found by content.
    """

    pages: list[int] = field(default_factory=list)
    past_len: int = 0
    rope_len: int = 0
    keys: list[Key] = field(default_factory=list)

    @property
    def capacity(self) -> int:
        """Tokens that the sequence's pages can hold."""
        return len(self.pages) * PAGE_LEN


class PagedCache:
    """Lends pages of the cache to sequences. Not thread-safe: one engine thread calls it.

    Full pages are shared by content: sequences that begin alike hold the same pages, and a
    page counts its holders. What a text has stored stays findable after it has ended, until
    its pages are needed: empty ones are lent first, then those used least recently. Of a
    page that agrees only in part, or is still being written, the tokens that agree are
    copied; so nobody ever writes to a page that another sequence holds.

    Args:
        layers: the cache of each decoder layer.
        num_pages: pages that each of these layers has.
    """

    def __init__(self, layers: SequenceOf[CacheLayer], num_pages: int) -> None:
        self.layers = list(layers)
        self.num_pages = num_pages
        self._holders = [0] * num_pages
        # In the order in which they will be lent.
        self._free = OrderedDict.fromkeys(range(num_pages))
        self._index = PageIndex(PAGE_LEN)

    @classmethod
    def of_views(
        cls, views: Mapping[str, torch.Tensor], prefix: str, cache_type: CacheType,
        num_layers: int, ctx_size: int,
    ) -> PagedCache:
        """Make a cache of the tensors that `cache.cache_specs` plans.

        Args:
            views: by name. prefix: what stands there for `cache`.
            ctx_size: tokens that the tensors have pages for.
        """
        layers = [
            CacheLayer(
                k_codes=views[f"{prefix}.{i}.k_codes"],
                k_scales=views.get(f"{prefix}.{i}.k_scales"),
                v_codes=views[f"{prefix}.{i}.v_codes"],
                v_scales=views.get(f"{prefix}.{i}.v_scales"),
                cache_type=cache_type,
            )
            for i in range(num_layers)
        ]
        return cls(layers, pages_for(ctx_size))

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def acquire(
        self, num_tokens: int, prompt_ids: SequenceOf[int] = (), rope_class: int = 0
    ) -> Sequence:
        """Start a sequence with room for `num_tokens` tokens in all, and that as rope_len.

        Args:
            num_tokens: tokens that the text may reach.
            prompt_ids: its beginning. What the cache holds of it is reused: past_len starts
                behind that. The last id is left in any case, for its logits.
            rope_class: `RopeConfig.length_class` of num_tokens.

        Raises:
            CacheFull: too few pages are free; nothing has been taken.
        """
        assert len(prompt_ids) <= num_tokens, (len(prompt_ids), num_tokens)
        ids, root = as_ids(prompt_ids[:-1]), root_key(rope_class)
        shared, keys = self._index.full_pages(root, ids)
        for page in shared:
            self._hold(page)
        sequence = Sequence(shared, len(shared) * PAGE_LEN, num_tokens, [root, *keys])
        source, count = self._index.nearest(sequence.keys[-1], ids[sequence.past_len :])
        try:
            fresh = self._take(pages_for(num_tokens) - len(shared), num_tokens, source, count)
        except CacheFull:
            self.release(sequence)
            raise
        sequence.pages = [*shared, *fresh]
        self._copy(sequence, source, count)
        return sequence

    def advance(
        self, sequence: Sequence, prompt_ids: SequenceOf[int] | npt.NDArray[np.int64]
    ) -> None:
        """Skip what others have stored since the sequence was acquired.

        Args:
            sequence: committed as far as it is.
            prompt_ids: its text; the last id is left for its logits.
        """
        first = (len(sequence.keys) - 1) * PAGE_LEN
        assert first == sequence.past_len // PAGE_LEN * PAGE_LEN, "not committed"
        ids = as_ids(prompt_ids[first:-1])
        shared, keys = self._index.full_pages(sequence.keys[-1], ids)
        for page, key in zip(shared, keys, strict=True):
            self._exchange(sequence, len(sequence.keys) - 1, page)
            sequence.keys.append(key)
        sequence.past_len = max(sequence.past_len, first + len(shared) * PAGE_LEN)
        rest = ids[len(shared) * PAGE_LEN :]
        self._copy(sequence, *self._index.nearest(sequence.keys[-1], rest))

    def commit(self, sequence: Sequence, ids: SequenceOf[int] | npt.NDArray[np.int64]) -> None:
        """Let others find what the sequence has stored.

        Args:
            ids: its text, at least past_len ids.
        """
        stored = as_ids(ids[: sequence.past_len])
        known_len = (len(sequence.keys) - 1) * PAGE_LEN
        for first in range(known_len, len(stored) - PAGE_LEN + 1, PAGE_LEN):
            page_ids = stored[first : first + PAGE_LEN]
            self._commit_page(sequence, first // PAGE_LEN, page_ids)
        rest = stored[(len(sequence.keys) - 1) * PAGE_LEN :]
        if len(rest):
            page = sequence.pages[len(sequence.keys) - 1]
            self._index.put(page, sequence.keys[-1], rest)

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Make room for `num_tokens` tokens in all; what is there already stays.

        Raises:
            CacheFull: too few pages are free; the sequence is as it was.
        """
        missing = pages_for(num_tokens) - len(sequence.pages)
        if missing > 0:
            sequence.pages += self._take(missing, num_tokens)

    def release(self, sequence: Sequence) -> None:
        """Give the sequence's pages back. It is empty afterwards; twice does no harm."""
        # A text's end goes first: without its beginning it would be of no use.
        for page in reversed(sequence.pages):
            self._drop_holder(page)
        sequence.pages = []
        sequence.keys = []
        sequence.past_len = 0

    def _commit_page(self, sequence: Sequence, place: int, page_ids: Ids) -> None:
        page, parent = sequence.pages[place], sequence.keys[-1]
        key = next_key(parent, page_ids)
        known = self._index.find(key)
        if known is None:
            self._index.put(page, parent, page_ids)
        else:
            # Another sequence has stored the same meanwhile.
            self._exchange(sequence, place, known)
        sequence.keys.append(key)

    def _exchange(self, sequence: Sequence, place: int, page: int) -> None:
        """Hold `page` in place of a page of the sequence's own, which becomes free."""
        self._hold(page)
        own, sequence.pages[place] = sequence.pages[place], page
        self._index.drop(own)
        self._drop_holder(own)

    def _copy(self, sequence: Sequence, source: int | None, count: int) -> None:
        """Start the page that past_len is in with `count` tokens of another page."""
        place = sequence.past_len // PAGE_LEN
        if source is None or count <= sequence.past_len % PAGE_LEN:
            return
        target = sequence.pages[place]
        if target != source:
            for layer in self.layers:
                layer.copy_tokens(source, target, count)
        sequence.past_len = place * PAGE_LEN + count

    def _hold(self, page: int) -> None:
        self._free.pop(page, None)
        self._holders[page] += 1

    def _drop_holder(self, page: int) -> None:
        assert self._holders[page] > 0, f"page {page} is given back twice"
        self._holders[page] -= 1
        if self._holders[page] == 0:
            self._free[page] = None
            if page not in self._index:
                self._free.move_to_end(page, last=False)

    def _take(
        self, count: int, num_tokens: int, source: int | None = None, source_len: int = 0
    ) -> list[int]:
        """Lend free pages.

        `source` is a page of which `source_len` tokens are about to be copied to the first of
        them. It is that page itself where it holds nothing more, or where all are needed.
        """
        if count > len(self._free):
            raise CacheFull(
                f"the cache has no room for a text of {num_tokens} tokens",
                expected=f"{count} free pages of {PAGE_LEN} tokens",
                actual=f"{len(self._free)} of {self.num_pages}",
                remedy="Load the model with a larger ctx_size, or wait for other requests to end",
            )
        if source is not None and source in self._free:
            more = self._index.num_tokens(source) > source_len
            self._free.move_to_end(source, last=more)
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        if source is not None and source in taken:
            taken.remove(source)
            taken.insert(0, source)
        for page in taken:
            self._holders[page] = 1
            self._index.drop(page)
        return taken
