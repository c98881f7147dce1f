"""What the two tokenizer libraries have in common behind `Tokenizer`."""

from __future__ import annotations

from typing import Protocol

SPACE_MARK = "▁"


class Backend(Protocol):
    """A vocabulary and its rules. Safe to use from several threads.

    Attributes:
        vocab_size: one more than the largest token id.
        special_ids: ids that decoding leaves out where special tokens are skipped.
        prefix_ids, suffix_ids: what the vocabulary's own rules put around a text.
        strips_space: decoding drops one space from the start of the text.
        bytes_known: `token_bytes` answers, and decoded text is its bytes joined.
    """

    vocab_size: int
    special_ids: frozenset[int]
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    strips_space: bool
    bytes_known: bool

    def encode(self, text: str, special: bool) -> list[int]:
        """Encode without prefix and suffix; `special`: recognise special tokens in the text."""

    def decode(self, ids: list[int], skip_special: bool) -> str:
        """Decode; ids that stand for nothing are left out."""

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that one token stands for; empty for an id that stands for nothing."""

    def token_id(self, content: str) -> int | None:
        """Return the id of a token by its text."""
