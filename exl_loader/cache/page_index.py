"""What the cache's pages hold, so that texts that begin alike share them. No PyTorch.

A full page has a key: a hash of the key of the page before it and of its own token ids, hence
of the whole text up to its end. The first page follows a root key, one for each variant of
RoPE, because the same ids have other keys and values under other frequencies. A page that is
not full yet has no key, only the one that it follows; its tokens can be copied.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Key = bytes
Ids = npt.NDArray[np.int32]

# Long enough that two texts with one key need not be thought of: no content is compared.
_KEY_BYTES = 32


def root_key(rope_class: int) -> Key:
    """Return the key that the first page of a text follows."""
    return hashlib.blake2b(f"rope {rope_class}".encode(), digest_size=_KEY_BYTES).digest()


def next_key(key: Key, ids: Ids) -> Key:
    """Return the key of a full page with these ids behind the page with this key."""
    return hashlib.blake2b(key + ids.tobytes(), digest_size=_KEY_BYTES).digest()


def as_ids(ids: npt.ArrayLike | Sequence[int]) -> Ids:
    """Return token ids in the one form that is hashed."""
    return np.ascontiguousarray(ids, np.int32)


@dataclass(frozen=True)
class PageContent:
    """What a page holds.

    Args:
        parent: the key it follows.
        ids: its tokens, int32 [1 to page_len].
        key: its own, None where it is not full.
    """

    parent: Key
    ids: Ids
    key: Key | None


class PageIndex:
    """Finds pages by content.

    Args:
        page_len: tokens of a full page.
    """

    def __init__(self, page_len: int) -> None:
        self._page_len = page_len
        self._contents: dict[int, PageContent] = {}
        self._full: dict[Key, int] = {}
        # Insertion-ordered, so that which of several equal pages is found does not vary.
        self._children: dict[Key, dict[int, None]] = {}

    def __contains__(self, page: int) -> bool:
        return page in self._contents

    def put(self, page: int, parent: Key, ids: Ids) -> None:
        """Note what a page holds, in place of what it held."""
        assert 0 < len(ids) <= self._page_len
        self.drop(page)
        key = next_key(parent, ids) if len(ids) == self._page_len else None
        self._contents[page] = PageContent(parent, ids.copy(), key)
        self._children.setdefault(parent, {})[page] = None
        if key is not None:
            assert key not in self._full, "one content on two pages"
            self._full[key] = page

    def drop(self, page: int) -> None:
        """Forget what a page holds, if it holds anything."""
        content = self._contents.pop(page, None)
        if content is None:
            return
        siblings = self._children[content.parent]
        del siblings[page]
        if not siblings:
            del self._children[content.parent]
        if content.key is not None:
            del self._full[content.key]

    def find(self, key: Key) -> int | None:
        """Return the full page with this key."""
        return self._full.get(key)

    def full_pages(self, key: Key, ids: Ids) -> tuple[list[int], list[Key]]:
        """Return the pages that hold the beginning of `ids` behind `key`, and their keys."""
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
        """Find the page behind `key` that begins like `ids` for longest.

        Returns:
            The page, None where there is none, and how many tokens agree.
        """
        best, longest = None, 0
        for page in self._children.get(key, ()):
            common = _common_len(self._contents[page].ids, ids)
            if common > longest:
                best, longest = page, common
        return best, longest

    def num_tokens(self, page: int) -> int:
        """Return how many tokens a page is known to hold."""
        content = self._contents.get(page)
        return 0 if content is None else len(content.ids)


def _common_len(a: Ids, b: Ids) -> int:
    count = min(len(a), len(b))
    differ = a[:count] != b[:count]
    return int(differ.argmax()) if differ.any() else count
