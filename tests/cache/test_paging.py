"""Tests of the paged cache: pages are lent, shared by content, copied and evicted."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from exl_loader.cache.layout import PAGE_LEN, CacheLayer, CacheType, pages_for
from exl_loader.cache.page_index import as_ids, root_key
from exl_loader.cache.paging import PagedCache, PagedSequence
from exl_loader.utils.errors import CacheFull
from support import run_python


class Store:
    """A cache whose pages hold token ids instead of keys and values."""

    def __init__(self, num_pages: int) -> None:
        self.ids = torch.full((num_pages, 1, PAGE_LEN, 1), -1, dtype=torch.int32)
        layer = CacheLayer(self.ids, None, self.ids, None, CacheType(32, 32))
        self.cache = PagedCache([layer], num_pages)

    def write(self, sequence: PagedSequence, ids: list[int]) -> None:
        for token_id in ids:
            index, row = divmod(sequence.past_len, PAGE_LEN)
            self.ids[sequence.pages[index], 0, row, 0] = token_id
            sequence.past_len += 1

    def read(self, sequence: PagedSequence) -> list[int]:
        return self.ids[sequence.pages].flatten().tolist()[: sequence.past_len]

    def run(self, text: list[int], room: int = 0, rope_class: int = 0) -> tuple[PagedSequence, int]:
        """Acquire, write the missing tokens and commit; return the number of reused tokens too."""
        sequence = self.cache.acquire(len(text) + room, text, rope_class)
        reused = sequence.past_len
        self.write(sequence, text[reused:])
        self.cache.commit(sequence, text)
        assert self.read(sequence) == text
        return sequence, reused

    def run_and_release(self, text: list[int], **options) -> int:
        """Do the same, then release the sequence; return the number of reused tokens."""
        sequence, reused = self.run(text, **options)
        self.cache.release(sequence)
        return reused


def random_ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1000, (count,), generator=generator).tolist()


def test_acquire_from_a_full_cache_names_the_missing_pages_and_takes_none():
    cache = PagedCache([], 3)
    held = cache.acquire(2 * PAGE_LEN)
    with pytest.raises(CacheFull, match=re.escape("2 free pages of 256 tokens, found 1 of 3")):
        cache.acquire(PAGE_LEN + 1)
    assert cache.num_free_pages == 1 and len(held.pages) == 2


def test_a_failed_acquire_releases_the_pages_that_it_found():
    store = Store(3)
    text = random_ids(2 * PAGE_LEN)
    store.run_and_release(text)
    held = store.cache.acquire(PAGE_LEN)
    with pytest.raises(CacheFull):
        store.cache.acquire(4 * PAGE_LEN, text)
    assert store.cache.num_free_pages == 2
    store.cache.release(held)
    assert store.run_and_release(text) == 2 * PAGE_LEN - 1


@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 512, 600])
def test_a_repeated_text_is_reused_except_its_last_token(length):
    store = Store(4)
    text = random_ids(length)
    assert store.run_and_release(text) == 0
    for _ in range(3):
        assert store.run_and_release(text) == length - 1


@pytest.mark.parametrize("kept", [1, 100, 255, 256, 257, 511, 512, 513, 599])
def test_an_edited_text_reuses_all_tokens_before_the_edit(kept):
    store = Store(8)
    text = random_ids(600)
    store.run_and_release(text)
    edited = [*text[:kept], *(i + 1000 for i in text[kept:])]
    assert store.run_and_release(edited) == kept
    assert store.run_and_release(text) == 599 and store.run_and_release(edited) == 599


def test_running_texts_share_full_pages_and_copy_the_last_one():
    store = Store(8)
    text = random_ids(600)
    first, _ = store.run(text)
    second, reused = store.run(text)
    assert reused == 599
    assert second.pages[:2] == first.pages[:2] and second.pages[2] != first.pages[2]
    assert store.cache.num_free_pages == 8 - 4
    store.cache.release(first)
    assert store.read(second) == text


def test_equal_texts_acquired_together_store_their_beginning_once():
    """The cache was empty when both were acquired."""
    store = Store(8)
    text = random_ids(700)
    first, second = (store.cache.acquire(700, text) for _ in range(2))
    assert store.cache.num_free_pages == 2
    evaluated = 0
    for end in (256, 512, 700):
        for sequence in (first, second):
            store.cache.advance(sequence, text)
            evaluated += len(text[sequence.past_len : end])
            store.write(sequence, text[sequence.past_len : end])
            store.cache.commit(sequence, text)
    assert evaluated == 701
    assert first.pages[:2] == second.pages[:2] and store.cache.num_free_pages == 4
    assert store.read(first) == store.read(second) == text


def test_a_page_that_two_sequences_wrote_is_kept_once():
    store = Store(4)
    text = random_ids(300)
    first, second = (store.cache.acquire(300, text) for _ in range(2))
    for sequence in (first, second):
        store.write(sequence, text)
    for sequence in (first, second):
        store.cache.commit(sequence, text)
    assert first.pages[0] == second.pages[0] and store.cache.num_free_pages == 1
    assert store.read(second) == text


def test_texts_of_different_rope_classes_share_no_page():
    store = Store(4)
    text = random_ids(300)
    assert store.run_and_release(text, rope_class=0) == 0
    assert store.run_and_release(text, rope_class=1) == 0
    assert store.run_and_release(text, rope_class=0) == 299


def test_the_least_recently_used_text_is_evicted_first_from_its_end():
    store = Store(6)
    texts = [random_ids(2 * PAGE_LEN, seed) for seed in range(3)]
    for text in texts:
        store.run_and_release(text)

    def pages_kept() -> list[int]:
        index = store.cache._index
        return [len(index.full_pages(root_key(0), as_ids(text))[0]) for text in texts]

    assert pages_kept() == [2, 2, 2]
    # The copied last page takes one page more.
    assert store.run_and_release(texts[0]) == 2 * PAGE_LEN - 1
    assert pages_kept() == [2, 1, 2]
    store.run_and_release(random_ids(PAGE_LEN + 1, 3))
    assert pages_kept() == [2, 0, 2]
    store.run_and_release(random_ids(PAGE_LEN + 1, 4))
    assert pages_kept() == [2, 0, 0]


def test_a_text_continues_in_its_own_page_if_no_other_page_is_free():
    store = Store(1)
    text = random_ids(200)
    assert store.run_and_release(text[:50]) == 0
    assert store.run_and_release(text[:120]) == 50
    assert store.run_and_release(text) == 120
    assert store.run_and_release([*text[:30], 7, 8, 9]) == 30
    assert store.run_and_release(text) == 30


def test_importing_pages_does_not_import_torch():
    run_python("import sys, exl_loader.cache.paging; assert 'torch' not in sys.modules")


@pytest.mark.parametrize("kept", [0, 1, 255, 256, 257, 511, 512, 513, 600])
@pytest.mark.parametrize("shared", [False, True])
def test_a_text_that_is_cut_goes_on_from_there(kept, shared):
    store = Store(8)
    text = random_ids(600)
    other = store.run(text)[0] if shared else None
    sequence, _ = store.run(text, room=100)
    store.cache.cut(sequence, kept)
    edited = [*text[:kept], *(i + 1000 for i in text[kept:]), 5000]
    store.cache.grow(sequence, len(edited))
    store.cache.advance(sequence, edited)
    assert sequence.past_len == kept
    store.write(sequence, edited[kept:])
    store.cache.commit(sequence, edited)
    assert store.read(sequence) == edited
    if other is not None:
        assert store.read(other) == text
        store.cache.release(other)
    store.cache.release(sequence)
    assert store.cache.num_free_pages == 8
    # Only the page that was still written has lost its content.
    lost = 512 if kept >= 512 and not shared else 599
    assert store.run_and_release(text) == max(lost, min(kept, 599))
    assert store.run_and_release(edited) == len(edited) - 1


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 900)), min_size=2, max_size=12))
def test_a_text_reuses_the_longest_beginning_that_was_stored(calls):
    """The cache has room for all texts."""
    store, stored = Store(64), []
    base = random_ids(900)
    for variant, length in calls:
        text = [*base[: 200 * variant], *(i + 1000 * variant for i in base[200 * variant :])]
        text = text[:length]
        best = max((common_len(text[:-1], other) for other in stored), default=0)
        assert store.run_and_release(text) == best
        stored.append(text)


def common_len(a: list[int], b: list[int]) -> int:
    count = 0
    for x, y in zip(a, b):  # noqa: B905
        if x != y:
            break
        count += 1
    return count


class PageLending(RuleBasedStateMachine):
    """Calls in any order: the pages of every sequence hold its own text."""

    def __init__(self):
        super().__init__()
        self.store = Store(10)
        self.cache = self.store.cache
        self.running: list[tuple[PagedSequence, list[int]]] = []

    @rule(
        variant=st.integers(0, 2), fork=st.integers(0, 700), length=st.integers(1, 900),
        room=st.integers(0, 300), rope_class=st.integers(0, 1),
    )
    def acquire(self, variant, fork, length, room, rope_class):
        base = random_ids(900)
        text = [*base[:fork], *(i + 1000 * variant for i in base[fork:])][:length]
        free = self.cache.num_free_pages
        try:
            sequence = self.cache.acquire(length + room, text, rope_class)
        except CacheFull:
            assert free == self.cache.num_free_pages < pages_for(length + room)
            return
        assert len(sequence.pages) == pages_for(length + room)
        assert sequence.past_len < length
        self.running.append((sequence, text))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(1, 300), commit=st.booleans())
    def write(self, data, count, commit):
        sequence, text = data.draw(st.sampled_from(self.running))
        self.cache.commit(sequence, text)
        if sequence.past_len < len(text):
            self.cache.advance(sequence, text)
            assert sequence.past_len < len(text)
        self.store.write(sequence, text[sequence.past_len : sequence.past_len + count])
        if commit:
            self.cache.commit(sequence, text)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), share=st.floats(0, 1), variant=st.integers(3, 4))
    def cut(self, data, share, variant):
        """The text goes on otherwise from some token on."""
        entry = data.draw(st.sampled_from(self.running))
        sequence, text = entry
        count = round(share * sequence.past_len)
        self.cache.cut(sequence, count)
        whole = (count // PAGE_LEN) * PAGE_LEN
        assert sequence.past_len in (count, whole)
        assert len(sequence.keys) - 1 <= sequence.past_len // PAGE_LEN
        text[count:] = (i % 1000 + 1000 * variant for i in text[count:])
        try:
            self.cache.grow(sequence, len(text))
        except CacheFull:
            self.cache.release(sequence)
            self.running.remove(entry)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), commit=st.booleans(), twice=st.booleans())
    def release(self, data, commit, twice):
        entry = data.draw(st.sampled_from(self.running))
        sequence, text = entry
        self.running.remove(entry)
        if commit:
            self.cache.commit(sequence, text)
        self.cache.release(sequence)
        if twice:
            self.cache.release(sequence)
        assert (sequence.pages, sequence.past_len) == ([], 0)

    @invariant()
    def every_sequence_holds_its_own_text(self):
        for sequence, text in self.running:
            assert self.store.read(sequence) == text[: sequence.past_len]

    @invariant()
    def every_page_is_held_or_free(self):
        held = [page for sequence, _ in self.running for page in sequence.pages]
        assert self.cache.num_free_pages == self.cache.num_pages - len(set(held))
        assert not set(held) & set(self.cache._free)
        for page in range(self.cache.num_pages):
            assert self.cache._holders[page] == held.count(page)
        for sequence, _ in self.running:
            assert len(set(sequence.pages)) == len(sequence.pages)

    @invariant()
    def a_page_that_is_still_written_has_one_holder(self):
        for sequence, _ in self.running:
            for page in sequence.pages[sequence.past_len // PAGE_LEN :]:
                assert self.cache._holders[page] == 1

    @invariant()
    def the_index_agrees_with_the_pages(self):
        index = self.cache._index
        for page, content in index._contents.items():
            stored = self.store.ids[page].flatten()[: len(content.ids)]
            assert stored.tolist() == content.ids.tolist()
            assert page in index._children[content.parent]
            assert (len(content.ids) == PAGE_LEN) == (content.key is not None)
        keys = {c.key: page for page, c in index._contents.items() if c.key is not None}
        assert index._full == keys
        assert sum(map(len, index._children.values())) == len(index._contents)


TestPageLending = PageLending.TestCase
TestPageLending.settings = settings(max_examples=40, stateful_step_count=30)
