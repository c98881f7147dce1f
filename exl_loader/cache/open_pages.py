"""Which sequence holds which open page, and what open pages hold. No PyTorch.

`layout.py` says what an open page is. A released open page keeps its tokens until it is lent
again, so that a text whose beginning it holds can go on from there.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from .page_index import Ids, Key, common_len

# The root key of a text and its first id: texts with both in common have the same first token.
First = tuple[Key, int]


@dataclass(frozen=True)
class OpenContent:
    """The tokens of an open page.

    Args:
        parent: the key of the page before it, or a root key.
        ids: its tokens, int32; there may be none.
    """

    parent: Key
    ids: Ids


class OpenPagePool:
    """Lends open pages and finds them by content.

    Args:
        count: number of open pages.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        # In the order in which they will be lent.
        self._free = OrderedDict.fromkeys(range(count))
        self._contents: dict[int, OpenContent] = {}
        self._firsts: dict[int, First] = {}

    @property
    def num_free(self) -> int:
        """Number of open pages that no sequence holds."""
        return len(self._free)

    def nearest(self, parent: Key, ids: Ids) -> tuple[int | None, int]:
        """Find the open page after `parent` that has the longest common beginning with `ids`.

        Returns:
            The open page (None if none agrees) and the number of tokens that agree.
        """
        best, longest = None, 0
        for page, content in self._contents.items():
            common = common_len(content.ids, ids) if content.parent == parent else 0
            if common > longest:
                best, longest = page, common
        return best, longest

    def with_first(self, first: First) -> int | None:
        """Return an open page that has this first token."""
        return next((page for page, held in self._firsts.items() if held == first), None)

    def lend(self, source: int | None, count: int) -> int:
        """Lend a free open page, of which there must be one.

        Args:
            source: an open page whose first `count` tokens will be copied to the lent one. If it
                is free, and holds no further tokens or is the last free one, it is itself lent.
        """
        if source is not None and source in self._free:
            more = len(self._contents[source].ids) > count
            self._free.move_to_end(source, last=more)
        page, _ = self._free.popitem(last=False)
        return page

    def give_back(self, page: int) -> None:
        """Take an open page back; it keeps what it holds."""
        assert page not in self._free, f"open page {page} is released twice"
        self._free[page] = None

    def put(self, page: int, parent: Key, ids: Ids, first: First | None) -> None:
        """Replace what an open page holds; None for a first token that it lacks."""
        self._contents[page] = OpenContent(parent, ids.copy())
        if first is None:
            self._firsts.pop(page, None)
        else:
            self._firsts[page] = first

    def cut(self, page: int, parent: Key, count: int) -> None:
        """Replace what an open page holds by its first `count` tokens, after `parent`."""
        self._contents[page] = OpenContent(parent, self._contents[page].ids[:count])

    def first_of(self, page: int) -> First | None:
        """Return the first token that an open page has."""
        return self._firsts.get(page)

    def forget(self) -> None:
        """Forget what all open pages hold."""
        self._contents.clear()
        self._firsts.clear()
