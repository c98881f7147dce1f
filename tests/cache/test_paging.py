"""Pages lent, shared by content, copied and evicted: what a sequence holds is its own text."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from exl_loader.cache.layout import PAGE_LEN, CacheLayer, CacheType, pages_for
from exl_loader.cache.page_index import as_ids, root_key
from exl_loader.cache.paging import PagedCache, Sequence
from exl_loader.utils.errors import CacheFull


class Store:
    """A cache whose pages hold token ids, so that what is read can be compared."""

    def __init__(self, num_pages: int) -> None:
        self.ids = torch.full((num_pages, 1, PAGE_LEN, 1), -1, dtype=torch.int32)
        layer = CacheLayer(self.ids, None, self.ids, None, CacheType(32, 32))
        self.cache = PagedCache([layer], num_pages)

    def write(self, sequence: Sequence, ids: list[int]) -> None:
        for token_id in ids:
            place, token = divmod(sequence.past_len, PAGE_LEN)
            self.ids[sequence.pages[place], 0, token, 0] = token_id
            sequence.past_len += 1

    def read(self, sequence: Sequence) -> list[int]:
        return self.ids[sequence.pages].flatten().tolist()[: sequence.past_len]

    def run(self, text: list[int], room: int = 0, rope_class: int = 0) -> tuple[Sequence, int]:
        """Acquire, evaluate what is missing and commit; also says how much was reused."""
        sequence = self.cache.acquire(len(text) + room, text, rope_class)
        reused = sequence.past_len
        self.write(sequence, text[reused:])
        self.cache.commit(sequence, text)
        assert self.read(sequence) == text
        return sequence, reused

    def told(self, text: list[int], **options) -> int:
        """Like `run`, and the text ends."""
        sequence, reused = self.run(text, **options)
        self.cache.release(sequence)
        return reused


def numbers(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1000, (count,), generator=generator).tolist()


def test_a_full_cache_says_what_is_missing_and_takes_nothing():
    cache = PagedCache([], 3)
    held = cache.acquire(2 * PAGE_LEN)
    with pytest.raises(CacheFull, match=re.escape("2 free pages of 256 tokens, found 1 of 3")):
        cache.acquire(PAGE_LEN + 1)
    with pytest.raises(CacheFull):
        cache.extend(held, 5 * PAGE_LEN)
    assert cache.num_free_pages == 1 and len(held.pages) == 2


def test_a_full_cache_lets_go_of_what_it_found():
    store = Store(3)
    text = numbers(2 * PAGE_LEN)
    store.told(text)
    held = store.cache.acquire(PAGE_LEN)
    with pytest.raises(CacheFull):
        store.cache.acquire(4 * PAGE_LEN, text)
    assert store.cache.num_free_pages == 2
    store.cache.release(held)
    assert store.told(text) == 2 * PAGE_LEN - 1


def test_extending_keeps_what_is_there():
    cache = PagedCache([], 4)
    sequence = cache.acquire(10)
    sequence.past_len = 10
    before = list(sequence.pages)
    cache.extend(sequence, PAGE_LEN)
    assert sequence.pages == before
    cache.extend(sequence, PAGE_LEN + 1)
    assert sequence.pages[:1] == before and sequence.capacity == 2 * PAGE_LEN
    assert (sequence.past_len, sequence.rope_len) == (10, 10)


@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 512, 600])
def test_a_text_told_again_leaves_one_token(length):
    store = Store(4)
    text = numbers(length)
    assert store.told(text) == 0
    for _ in range(3):
        assert store.told(text) == length - 1


@pytest.mark.parametrize("kept", [1, 100, 255, 256, 257, 511, 512, 513, 599])
def test_an_edited_text_keeps_all_before_the_edit(kept):
    store = Store(8)
    text = numbers(600)
    store.told(text)
    edited = [*text[:kept], *(i + 1000 for i in text[kept:])]
    assert store.told(edited) == kept
    assert store.told(text) == 599 and store.told(edited) == 599


def test_running_texts_share_full_pages_and_copy_the_rest():
    store = Store(8)
    text = numbers(600)
    first, _ = store.run(text)
    second, reused = store.run(text)
    assert reused == 599
    assert second.pages[:2] == first.pages[:2] and second.pages[2] != first.pages[2]
    assert store.cache.num_free_pages == 8 - 4
    store.cache.release(first)
    assert store.read(second) == text


def test_texts_that_run_side_by_side_store_their_beginning_once():
    """Neither found anything when it was acquired."""
    store = Store(8)
    text = numbers(700)
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


def test_the_same_page_written_twice_is_kept_once():
    store = Store(4)
    text = numbers(300)
    first, second = (store.cache.acquire(300, text) for _ in range(2))
    for sequence in (first, second):
        store.write(sequence, text)
    for sequence in (first, second):
        store.cache.commit(sequence, text)
    assert first.pages[0] == second.pages[0] and store.cache.num_free_pages == 1
    assert store.read(second) == text


def test_other_rope_frequencies_share_nothing():
    store = Store(4)
    text = numbers(300)
    assert store.told(text, rope_class=0) == 0
    assert store.told(text, rope_class=1) == 0
    assert store.told(text, rope_class=0) == 299


def test_the_least_recently_used_text_goes_first_and_from_its_end():
    store = Store(6)
    texts = [numbers(2 * PAGE_LEN, seed) for seed in range(3)]
    for text in texts:
        store.told(text)

    def pages_kept() -> list[int]:
        index = store.cache._index
        return [len(index.full_pages(root_key(0), as_ids(text))[0]) for text in texts]

    assert pages_kept() == [2, 2, 2]
    # One page more for the copy that takes the last token.
    assert store.told(texts[0]) == 2 * PAGE_LEN - 1
    assert pages_kept() == [2, 1, 2]
    store.told(numbers(PAGE_LEN + 1, 3))
    assert pages_kept() == [2, 0, 2]
    store.told(numbers(PAGE_LEN + 1, 4))
    assert pages_kept() == [2, 0, 0]


def test_a_text_goes_on_in_its_own_page_even_where_no_other_is_left():
    store = Store(1)
    text = numbers(200)
    assert store.told(text[:50]) == 0
    assert store.told(text[:120]) == 50
    assert store.told(text) == 120
    assert store.told([*text[:30], 7, 8, 9]) == 30
    assert store.told(text) == 30


def test_importing_pages_does_not_import_torch():
    code = "import sys, exl_loader.cache.paging; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 900)), min_size=2, max_size=12))
def test_whatever_was_told_a_text_finds_what_it_shares(calls):
    """With room for all, what is reused is the longest beginning told before."""
    store, told = Store(64), []
    base = numbers(900)
    for variant, length in calls:
        text = [*base[: 200 * variant], *(i + 1000 * variant for i in base[200 * variant :])]
        text = text[:length]
        best = max((common(text[:-1], other) for other in told), default=0)
        assert store.told(text) == best
        told.append(text)


def common(a: list[int], b: list[int]) -> int:
    count = 0
    for x, y in zip(a, b):  # noqa: B905
        if x != y:
            break
        count += 1
    return count


class PageLending(RuleBasedStateMachine):
    """Whatever is asked for, in whatever order: every text reads as it was written."""

    def __init__(self):
        super().__init__()
        self.store = Store(10)
        self.cache = self.store.cache
        self.running: list[tuple[Sequence, list[int]]] = []

    @rule(
        variant=st.integers(0, 2), fork=st.integers(0, 700), length=st.integers(1, 900),
        room=st.integers(0, 300), rope_class=st.integers(0, 1),
    )
    def acquire(self, variant, fork, length, room, rope_class):
        base = numbers(900)
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
    @rule(data=st.data(), more=st.lists(st.integers(0, 9), min_size=1, max_size=300))
    def extend(self, data, more):
        sequence, text = data.draw(st.sampled_from(self.running))
        before, free = list(sequence.pages), self.cache.num_free_pages
        try:
            self.cache.extend(sequence, len(text) + len(more))
        except CacheFull:
            assert (sequence.pages, self.cache.num_free_pages) == (before, free)
            return
        assert sequence.pages[: len(before)] == before
        text += more

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
    def every_text_reads_as_written(self):
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
    def only_full_pages_that_nobody_writes_are_shared(self):
        for sequence, _ in self.running:
            for page in sequence.pages[sequence.past_len // PAGE_LEN :]:
                assert self.cache._holders[page] == 1

    @invariant()
    def the_index_says_what_pages_hold(self):
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
