"""Pages of the key/value cache: which sequences hold them, and how texts share them. No PyTorch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from ..utils.errors import CacheFull
from .layout import PAGE_LEN, CacheLayer, CacheType, pages_for
from .open_pages import OpenPagePool
from .page_index import Ids, Key, PageIndex, as_ids, next_key, root_key

if TYPE_CHECKING:
    import torch


class PageCopier(Protocol):
    """Copies pages of one layer's cache, or of several; see `CacheLayer`."""

    def copy_tokens(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` stored tokens of a page to another page."""

    def copy_open_page(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` tokens of an open page, and its first token, to another one."""


@dataclass(eq=False)
class PagedSequence:
    """The pages of one text, and how much of the text the cache holds.

    Args:
        pages: page numbers in the order of the text.
        past_len: number of tokens that the cache holds; the forward pass advances it.
        rope_len: the length that the text may reach, in tokens; it selects RoPE's frequencies.
        open_page: number of its open page; None in a cache that has none.
        missing_first: the first id, if its key and value are not yet with the open page because
            the cache held the text's beginning; the next forward pass computes them first.
        keys: the root key, then the key of each full page that other sequences can find.
    """

    pages: list[int] = field(default_factory=list)
    past_len: int = 0
    rope_len: int = 0
    keys: list[Key] = field(default_factory=list)
    open_page: int | None = None
    missing_first: int | None = None

    @property
    def capacity(self) -> int:
        """Number of tokens that the sequence's pages can hold."""
        return len(self.pages) * PAGE_LEN

    def end_of_pass(self, start: int) -> int:
        """Return the length that the text may reach in passes that end with a commit.

        With an open page it is the end of the page that token `start` is in. The next page takes
        its place, so that tokens cannot be taken back to it, and others would find what is no
        longer there.
        """
        if self.open_page is None:
            return self.capacity
        return min(self.capacity, (start // PAGE_LEN + 1) * PAGE_LEN)


class PagedCache:
    """Lends pages of the cache to sequences. Not thread-safe: only the model's thread calls it.

    Full pages are shared by content: sequences with the same beginning hold the same pages, and
    each page counts its holders. A released page keeps its content and can be found by it until
    the page is lent again. Empty pages are lent first, then the least recently used ones. If a
    page agrees only in part, or is still being written, its agreeing tokens are copied.
    Therefore no sequence ever writes to a page that another sequence holds.

    Where the layers have open pages, each sequence holds one. A page of which only the beginning
    agrees is then copied only as far as some open page still has its tokens, because a row needs
    those of its own page in more bits than pages have.

    Args:
        layers: the cache of each decoder layer on this machine.
        num_pages: number of pages of each layer.
        elsewhere: copies pages of the layers on other machines; None where there are none.
    """

    def __init__(
        self, layers: Sequence[CacheLayer], num_pages: int, elsewhere: PageCopier | None = None
    ) -> None:
        self.layers = list(layers)
        self._copiers: list[PageCopier] = [*self.layers]
        if elsewhere is not None:
            self._copiers.append(elsewhere)
        self.num_pages = num_pages
        self._holders = [0] * num_pages
        # In the order in which the pages will be lent.
        self._free = OrderedDict.fromkeys(range(num_pages))
        self._index = PageIndex(PAGE_LEN)
        count = self.layers[0].num_open_pages if self.layers else 0
        self._open_pages = OpenPagePool(count) if count else None

    @classmethod
    def from_views(
        cls, views: Mapping[str, torch.Tensor], prefix: str, cache_type: CacheType,
        workspaces: Iterable[tuple[Mapping[str, torch.Tensor], int]], num_tokens: int,
        first_layer: int = 0,
        elsewhere: PageCopier | None = None,
    ) -> PagedCache:
        """Make a cache from the tensors that `layout.cache_specs` plans.

        Args:
            views: the tensors by name.
            prefix: the first part of their names, such as `cache`.
            cache_type: how keys and values are stored.
            workspaces: for each layer the tensors of its device's workspace by name, which have
                its open pages and what the sample finds, and its place on the device.
            num_tokens: number of tokens that the tensors have pages for.
            first_layer: the model's number of the first layer; see `DeviceMap`.
            elsewhere: as for the class.
        """
        layers = []
        for i, workspace in enumerate(workspaces, first_layer):
            layer = CacheLayer(
                k_codes=views[f"{prefix}.{i}.k_codes"],
                k_scales=views.get(f"{prefix}.{i}.k_scales"),
                v_codes=views[f"{prefix}.{i}.v_codes"],
                v_scales=views.get(f"{prefix}.{i}.v_scales"),
                cache_type=cache_type,
            )
            layer.take_open_pages(*workspace)
            layer.take_key_sample(*workspace)
            layers.append(layer)
        return cls(layers, pages_for(num_tokens), elsewhere)

    @property
    def num_free_pages(self) -> int:
        """Number of pages that no sequence holds."""
        return len(self._free)

    def acquire(
        self, num_tokens: int, prompt_ids: Sequence[int] | npt.NDArray[np.int64] = (),
        rope_class: int = 0, *, rope_len: int | None = None, headroom: int = 0,
    ) -> PagedSequence:
        """Start a sequence with room for `num_tokens` tokens; `grow` gives it more.

        Args:
            num_tokens: number of tokens to take pages for.
            prompt_ids: the beginning of the text. Tokens that the cache already holds are
                reused, and past_len starts after them. The last id is never reused, because
                its logits have to be computed.
            rope_class: `RopeConfig.length_class` of rope_len.
            rope_len: number of tokens that the text may reach; None for num_tokens.
            headroom: number of pages that have to stay free.

        Returns:
            The sequence, which holds its pages until `release`.

        Raises:
            CacheFull: too few pages are free, or no open page; no page has been taken.
        """
        rope_len = num_tokens if rope_len is None else rope_len
        assert len(prompt_ids) <= num_tokens <= rope_len, (len(prompt_ids), num_tokens, rope_len)
        if self._open_pages is not None and not self._open_pages.num_free:
            raise CacheFull(
                "the cache has no open page for another text",
                expected=f"fewer than {self._open_pages.count} texts at once",
                actual=self._open_pages.count,
                remedy="Load the model with a larger max_batch_size, or wait for other requests "
                "to end",
            )
        ids, root = as_ids(prompt_ids[:-1]), root_key(rope_class)
        shared, keys = self._index.full_pages(root, ids)
        for page in shared:
            self._hold(page)
        sequence = PagedSequence(shared, len(shared) * PAGE_LEN, rope_len, [root, *keys])
        source, open_source, count = self._nearest(sequence.keys[-1], ids[sequence.past_len :])
        lacking = pages_for(num_tokens) - len(shared)
        try:
            self._check_free(lacking + headroom, num_tokens)
            sequence.pages += self._take(lacking, num_tokens, source, count)
            self._copy(sequence, source, count)
            if self._open_pages is not None:
                sequence.open_page = self._open_pages.lend(open_source, count)
                self._fill_open_page(sequence, open_source, ids)
        except BaseException:
            # There are too few pages, or another machine with some of the layers is lost.
            self.release(sequence)
            raise
        return sequence

    def grow(self, sequence: PagedSequence, num_tokens: int) -> None:
        """Give a sequence room for `num_tokens` tokens; it keeps what it has.

        Raises:
            CacheFull: too few pages are free; no page has been taken.
        """
        assert num_tokens <= sequence.rope_len, (num_tokens, sequence.rope_len)
        sequence.pages += self._take(
            max(0, pages_for(num_tokens) - len(sequence.pages)), num_tokens
        )

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
        source, open_source, count = self._nearest(sequence.keys[-1], remaining)
        before = sequence.past_len
        self._copy(sequence, source, count)
        if sequence.open_page is not None and (shared or sequence.past_len > before):
            self._fill_open_page(sequence, open_source, as_ids(prompt_ids))

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
        if sequence.open_page is not None and len(stored) and sequence.missing_first is None:
            self._commit_open_page(sequence, stored, is_new=known_len < len(stored))

    def cut(self, sequence: PagedSequence, num_tokens: int) -> None:
        """Drop the tokens after the first `num_tokens`, so that the text can go on otherwise.

        The sequence gives up full pages that would lose tokens, because they can be found by
        their content. After `grow`, `advance` copies the remaining tokens of the first of them,
        as long as it has its content; otherwise they have to be computed again.
        """
        if sequence.past_len <= num_tokens:
            return
        num_full = min(len(sequence.keys) - 1, num_tokens // PAGE_LEN)
        if num_full < len(sequence.keys) - 1:
            for page in reversed(sequence.pages[num_full:]):
                self._drop_holder(page)
            del sequence.pages[num_full:], sequence.keys[num_full + 1 :]
            num_tokens = num_full * PAGE_LEN
        sequence.past_len = num_tokens
        held = num_tokens - num_full * PAGE_LEN
        if num_full < len(sequence.pages):
            self._index.cut(sequence.pages[num_full], held)
        if self._open_pages is not None and sequence.open_page is not None:
            self._open_pages.cut(sequence.open_page, sequence.keys[-1], held)

    def release(self, sequence: PagedSequence) -> None:
        """Return the sequence's pages and empty it; a second call does nothing."""
        # The end of the text is lent again first, because it cannot be reused without its
        # beginning.
        for page in reversed(sequence.pages):
            self._drop_holder(page)
        if self._open_pages is not None and sequence.open_page is not None:
            self._open_pages.give_back(sequence.open_page)
        sequence.pages = []
        sequence.keys = []
        sequence.past_len = 0
        sequence.open_page = sequence.missing_first = None

    def forget(self) -> None:
        """Forget what can be found in all pages: the model has changed, or a pass has failed.

        Sequences keep their pages, and what they commit from here on can be found. They must not
        be cut any more.
        """
        self._index = PageIndex(PAGE_LEN)
        if self._open_pages is not None:
            self._open_pages.forget()

    def _nearest(self, parent: Key, ids: Ids) -> tuple[int | None, int | None, int]:
        """Find where the longest common beginning of a page with `ids` can be copied from.

        Returns:
            The page and the open page to copy from, and the number of tokens that agree.
        """
        source, count = self._index.nearest(parent, ids)
        if self._open_pages is None or source is None:
            return source, None, count
        open_source, count = self._open_pages.nearest(parent, ids[:count])
        return (source, open_source, count) if count else (None, None, 0)

    def _fill_open_page(self, sequence: PagedSequence, source: int | None, ids: Ids) -> None:
        """Bring to the sequence's open page what it holds of the text.

        Args:
            source: the open page with the tokens of the sequence's last page; None for none.
            ids: the text.
        """
        pool, own = self._open_pages, sequence.open_page
        assert pool is not None and own is not None
        # Without tokens in its last page the first token can be computed in its place.
        count = sequence.past_len % PAGE_LEN
        assert source is not None or count == 0, count
        first = (sequence.keys[0], int(ids[0])) if sequence.past_len else None
        sequence.missing_first = None
        with_first = None if first is None else pool.with_first(first)
        if source is not None and source != own:
            self._copy_open_page(source, own, count)
        elif first is not None and pool.first_of(own) != first:
            if with_first is None:
                sequence.missing_first = first[1]
            else:
                self._copy_open_page(with_first, own, 0)
        known = None if sequence.missing_first is not None else first
        # Its tokens can be found when they are committed. A caller that does not commit may leave
        # the page, whose place the next one then takes.
        pool.put(own, sequence.keys[-1], ids[:0], known)

    def _commit_open_page(self, sequence: PagedSequence, stored: Ids, is_new: bool) -> None:
        """Let other sequences find the tokens of the open page.

        A page that has just been filled stays in its open page as long as possible, and the
        sequence goes on in another one. So the last pages of a text can be reused from any
        token on, for example where an answer is generated again.

        Args:
            stored: the text as far as it is stored.
            is_new: whether something was stored since the last call.
        """
        pool, own = self._open_pages, sequence.open_page
        assert pool is not None and own is not None
        first = sequence.keys[0], int(stored[0])
        held = stored[(len(sequence.keys) - 1) * PAGE_LEN :]
        if not len(held) and is_new and pool.num_free:
            filled, own = own, pool.lend(None, 0)
            self._copy_open_page(filled, own, 0)
            pool.put(filled, sequence.keys[-2], stored[-PAGE_LEN:], first)
            pool.give_back(filled)
            sequence.open_page = own
        pool.put(own, sequence.keys[-1], held, first)

    def _copy_open_page(self, source: int, target: int, count: int) -> None:
        for copier in self._copiers:
            copier.copy_open_page(source, target, count)

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
            for copier in self._copiers:
                copier.copy_tokens(source, target, count)
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
        self._check_free(count, num_tokens)
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

    def _check_free(self, count: int, num_tokens: int) -> None:
        """Raise CacheFull if fewer than `count` pages are free.

        Args:
            num_tokens: the length of the text, for the error message.
        """
        if count > len(self._free):
            raise CacheFull(
                f"the cache has no room for a text of {num_tokens} tokens",
                expected=f"{count} free pages of {PAGE_LEN} tokens",
                actual=f"{len(self._free)} of {self.num_pages}",
                remedy="Load the model with a larger cache_size, or wait for other requests to end",
            )
