"""Pages of the key/value cache: which sequences hold them, and how texts share them. No PyTorch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
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
class PagedSequence:
    """The pages of one text, and how much of the text the cache holds.

    Args:
        pages: page numbers in the order of the text.
        past_len: number of tokens that the cache holds; the forward pass advances it.
        rope_len: the length that the text may reach, in tokens; it selects RoPE's frequencies.
        keys: the root key, then the key of each full page that other sequences can find.
    """

    pages: list[int] = field(default_factory=list)
    past_len: int = 0
    rope_len: int = 0
    keys: list[Key] = field(default_factory=list)

    @property
    def capacity(self) -> int:
        """Number of tokens that the sequence's pages can hold."""
        return len(self.pages) * PAGE_LEN


class PagedCache:
    """Lends pages of the cache to sequences. Not thread-safe: only the model's thread calls it.

    Full pages are shared by content: sequences with the same beginning hold the same pages, and
    each page counts its holders. A released page keeps its content and can be found by it until
    the page is lent again. Empty pages are lent first, then the least recently used ones. If a
    page agrees only in part, or is still being written, its agreeing tokens are copied.
    Therefore no sequence ever writes to a page that another sequence holds.

    Args:
        layers: the cache of each decoder layer.
        num_pages: number of pages of each layer.
    """

    def __init__(self, layers: Sequence[CacheLayer], num_pages: int) -> None:
        self.layers = list(layers)
        self.num_pages = num_pages
        self._holders = [0] * num_pages
        # In the order in which the pages will be lent.
        self._free = OrderedDict.fromkeys(range(num_pages))
        self._index = PageIndex(PAGE_LEN)

    @classmethod
    def from_views(
        cls, views: Mapping[str, torch.Tensor], prefix: str, cache_type: CacheType,
        num_layers: int, ctx_size: int,
    ) -> PagedCache:
        """Make a cache from the tensors that `layout.cache_specs` plans.

        Args:
            views: the tensors by name.
            prefix: the first part of their names, such as `cache`.
            cache_type: how keys and values are stored.
            num_layers: number of decoder layers.
            ctx_size: number of tokens that the tensors have pages for.
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
        """Number of pages that no sequence holds."""
        return len(self._free)

    def acquire(
        self, num_tokens: int, prompt_ids: Sequence[int] = (), rope_class: int = 0
    ) -> PagedSequence:
        """Start a sequence with room for `num_tokens` tokens, which becomes its rope_len.

        Args:
            num_tokens: number of tokens that the text may reach.
            prompt_ids: the beginning of the text. Tokens that the cache already holds are
                reused, and past_len starts after them. The last id is never reused, because
                its logits have to be computed.
            rope_class: `RopeConfig.length_class` of num_tokens.

        Returns:
            The sequence, which holds its pages until `release`.

        Raises:
            CacheFull: too few pages are free; no page has been taken.
        """
        assert len(prompt_ids) <= num_tokens, (len(prompt_ids), num_tokens)
        ids, root = as_ids(prompt_ids[:-1]), root_key(rope_class)
        shared, keys = self._index.full_pages(root, ids)
        for page in shared:
            self._hold(page)
        sequence = PagedSequence(shared, len(shared) * PAGE_LEN, num_tokens, [root, *keys])
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
        self, sequence: PagedSequence, prompt_ids: Sequence[int] | npt.NDArray[np.int64]
    ) -> None:
        """Reuse tokens that other sequences have stored since this one was acquired.

        Args:
            sequence: all of its full pages are committed.
            prompt_ids: the text; the last id is never reused, because its logits have to be
                computed.
        """
        first = (len(sequence.keys) - 1) * PAGE_LEN
        assert first == sequence.past_len // PAGE_LEN * PAGE_LEN, "not committed"
        ids = as_ids(prompt_ids[first:-1])
        shared, keys = self._index.full_pages(sequence.keys[-1], ids)
        for page, key in zip(shared, keys, strict=True):
            self._exchange(sequence, len(sequence.keys) - 1, page)
            sequence.keys.append(key)
        sequence.past_len = max(sequence.past_len, first + len(shared) * PAGE_LEN)
        remaining = ids[len(shared) * PAGE_LEN :]
        self._copy(sequence, *self._index.nearest(sequence.keys[-1], remaining))

    def commit(self, sequence: PagedSequence, ids: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Let other sequences find the tokens that this one has stored.

        Args:
            sequence: holds the pages.
            ids: its text, at least past_len ids.
        """
        stored = as_ids(ids[: sequence.past_len])
        known_len = (len(sequence.keys) - 1) * PAGE_LEN
        for first in range(known_len, len(stored) - PAGE_LEN + 1, PAGE_LEN):
            page_ids = stored[first : first + PAGE_LEN]
            self._commit_page(sequence, first // PAGE_LEN, page_ids)
        remaining = stored[(len(sequence.keys) - 1) * PAGE_LEN :]
        if len(remaining):
            page = sequence.pages[len(sequence.keys) - 1]
            self._index.put(page, sequence.keys[-1], remaining)

    def release(self, sequence: PagedSequence) -> None:
        """Return the sequence's pages and empty it; a second call does nothing."""
        # The end of the text is lent again first, because it cannot be reused without its
        # beginning.
        for page in reversed(sequence.pages):
            self._drop_holder(page)
        sequence.pages = []
        sequence.keys = []
        sequence.past_len = 0

    def forget(self) -> None:
        """Forget what all pages hold, because the model has changed; no sequence holds a page."""
        assert len(self._free) == self.num_pages, "a sequence holds pages"
        self._index = PageIndex(PAGE_LEN)

    def _commit_page(self, sequence: PagedSequence, index: int, page_ids: Ids) -> None:
        page, parent = sequence.pages[index], sequence.keys[-1]
        key = next_key(parent, page_ids)
        known = self._index.find(key)
        if known is None:
            self._index.put(page, parent, page_ids)
        else:
            # Another sequence has stored the same tokens in the meantime.
            self._exchange(sequence, index, known)
        sequence.keys.append(key)

    def _exchange(self, sequence: PagedSequence, index: int, page: int) -> None:
        """Replace a page of the sequence by `page`, which has the same content, and free it."""
        self._hold(page)
        own, sequence.pages[index] = sequence.pages[index], page
        self._index.drop(own)
        self._drop_holder(own)

    def _copy(self, sequence: PagedSequence, source: int | None, count: int) -> None:
        """Copy `count` tokens of page `source` to the page that contains past_len."""
        index = sequence.past_len // PAGE_LEN
        if source is None or count <= sequence.past_len % PAGE_LEN:
            return
        target = sequence.pages[index]
        if target != source:
            for layer in self.layers:
                layer.copy_tokens(source, target, count)
        sequence.past_len = index * PAGE_LEN + count

    def _hold(self, page: int) -> None:
        self._free.pop(page, None)
        self._holders[page] += 1

    def _drop_holder(self, page: int) -> None:
        assert self._holders[page] > 0, f"page {page} is released twice"
        self._holders[page] -= 1
        if self._holders[page] == 0:
            self._free[page] = None
            if page not in self._index:
                self._free.move_to_end(page, last=False)

    def _take(
        self, count: int, num_tokens: int, source: int | None = None, source_len: int = 0
    ) -> list[int]:
        """Lend `count` free pages.

        Args:
            num_tokens: the length of the text, for the error message.
            source: a page whose first `source_len` tokens will be copied to the first lent
                page. If it is free and holds no further tokens, or if every free page is
                needed, it is itself the first lent page.

        Raises:
            CacheFull: fewer pages are free; no page has been taken.
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
