"""What the two tokenizer libraries have in common behind `Tokenizer`."""

from __future__ import annotations

from typing import Protocol

SPACE_MARK = "▁"


class Vocabulary(Protocol):
    """A vocabulary and its rules. Safe to use from several threads.

    Attributes:
        vocab_size: one more than the largest token id.
        special_ids: ids that decoding leaves out where special tokens are skipped.
        prefix_ids, suffix_ids: what the vocabulary's own rules put around a text.
        has_post_processor: the vocabulary's file says so itself, and `add_eos_token` does not.
        adds_bos: a BOS token is put in front of a text where the folder is silent.
        strips_space: decoding drops one space from the start of the text.
        bytes_known: `token_bytes` answers, and decoded text is its bytes joined.
        has_byte_tokens: tokens such as `<0x0A>` stand for single bytes; a replacement
            character then stands for one byte that is no UTF-8.
        cleans_up: decoded text goes through `stream.clean_up`.
    """

    vocab_size: int
    special_ids: frozenset[int]
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    has_post_processor: bool
    adds_bos: bool
    strips_space: bool
    bytes_known: bool
    has_byte_tokens: bool
    cleans_up: bool

    def default_named_tokens(self) -> dict[str, str]:
        """Special tokens as the vocabulary or its class names them where the folder is silent."""

    def encode(self, text: str, special: bool) -> list[int]:
        """Encode without prefix and suffix; `special`: recognise special tokens in the text."""

    def decode(self, ids: list[int], skip_special: bool) -> str:
        """Decode ids together; those that stand for nothing are left out."""

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that one token stands for; empty for an id that stands for nothing."""

    def content(self, token_id: int) -> str:
        """Text of one token as the vocabulary has it; empty for an id that stands for nothing."""

    def has_token(self, token_id: int) -> bool:
        """Return whether an id stands for something."""

    def token_id(self, content: str) -> int | None:
        """Return the id of a token by its text."""
