"""Finds pages of the cache by content, so that texts with one beginning share them. No PyTorch.

A full page has a key: a hash of the key of the page before it (its parent) and of its own token
ids. The key therefore represents the whole text up to the end of the page. The parent of the
first page is a root key. There is one root key for each class of RoPE frequencies, because the
same ids have different keys and values under different frequencies. A page that is not full has
a parent but no key; its tokens can be copied.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Key = bytes
Ids = npt.NDArray[np.int32]

# Long enough that two texts never have the same key; contents are not compared.
_KEY_BYTES = 32


def root_key(rope_class: int) -> Key:
    """Return the parent of the first page of a text."""
    return hashlib.blake2b(f"rope {rope_class}".encode(), digest_size=_KEY_BYTES).digest()


def next_key(key: Key, ids: Ids) -> Key:
    """Return the key of a full page with these ids whose parent is `key`."""
    return hashlib.blake2b(key + ids.tobytes(), digest_size=_KEY_BYTES).digest()


def as_ids(ids: npt.ArrayLike | Sequence[int]) -> Ids:
    """Convert token ids to int32, contiguous: the form that is hashed."""
    return np.ascontiguousarray(ids, np.int32)


@dataclass(frozen=True)
class PageContent:
    """The content of a page.

    Args:
        parent: the key of the page before it, or a root key.
        ids: its tokens, int32 [1 to page_len].
        key: its own key; None if it is not full.
    """

    parent: Key
    ids: Ids
    key: Key | None


class PageIndex:
    """Finds pages by content.

    Args:
        page_len: number of tokens of a full page.
    """

    def __init__(self, page_len: int) -> None:
        self._page_len = page_len
        self._contents: dict[int, PageContent] = {}
        self._full: dict[Key, int] = {}
        # Parent -> pages, insertion-ordered, so that the search among equal pages is
        # deterministic.
        self._children: dict[Key, dict[int, None]] = {}

    def __contains__(self, page: int) -> bool:
        return page in self._contents

    def put(self, page: int, parent: Key, ids: Ids) -> None:
        """Replace the recorded content of a page."""
        assert 0 < len(ids) <= self._page_len
        self.drop(page)
        key = next_key(parent, ids) if len(ids) == self._page_len else None
        self._contents[page] = PageContent(parent, ids.copy(), key)
        self._children.setdefault(parent, {})[page] = None
        if key is not None:
            assert key not in self._full, "two pages with the same content"
            self._full[key] = page

    def drop(self, page: int) -> None:
        """Remove the recorded content of a page, if there is any."""
        content = self._contents.pop(page, None)
        if content is None:
            return
        siblings = self._children[content.parent]
        del siblings[page]
        if not siblings:
            del self._children[content.parent]
        if content.key is not None:
            del self._full[content.key]

    def cut(self, page: int, count: int) -> None:
        """Remove all but the first `count` tokens from the recorded content of a page."""
        content = self._contents.get(page)
        if content is None or len(content.ids) <= count:
            return
        self.drop(page)
        if count:
            self.put(page, content.parent, content.ids[:count])

    def find(self, key: Key) -> int | None:
        """Return the full page with this key, or None."""
        return self._full.get(key)

    def full_pages(self, key: Key, ids: Ids) -> tuple[list[int], list[Key]]:
        """Return the full pages that hold the beginning of `ids` after `key`, and their keys."""
        pages, keys = [], []
        for first in range(0, len(ids) - self._page_len + 1, self._page_len):
            key = next_key(key, ids[first : first + self._page_len])
            page = self._full.get(key)
            if page is None:
                break
            pages.append(page)
            keys.append(key)
        return pages, keys

    def nearest(self, key: Key, ids: Ids) -> tuple[int | None, int]:
        """Find the page with parent `key` that has the longest common beginning with `ids`.

        Returns:
            The page (None if no page agrees) and the number of tokens that agree.
        """
        best, longest = None, 0
        for page in self._children.get(key, ()):
            common = common_len(self._contents[page].ids, ids)
            if common > longest:
                best, longest = page, common
        return best, longest

    def num_tokens(self, page: int) -> int:
        """Return the number of tokens recorded for a page."""
        content = self._contents.get(page)
        return 0 if content is None else len(content.ids)


def common_len(a: Ids, b: Ids) -> int:
    """Return the length of the common beginning of two texts."""
    count = min(len(a), len(b))
    differ = a[:count] != b[:count]
    return int(differ.argmax()) if differ.any() else count
