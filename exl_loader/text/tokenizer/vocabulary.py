"""The interface through which `Tokenizer` uses either tokenizer library."""

from __future__ import annotations

from typing import Protocol

SPACE_MARK = "▁"


class Vocabulary(Protocol):
    """Tokens and the rules that find them. Several threads may use it at the same time.

    Attributes:
        vocab_size: one more than the largest token id.
        special_ids: ids that decoding leaves out where special tokens are skipped.
        prefix_ids, suffix_ids: ids that the vocabulary file's own rules put around a text.
        has_post_processor: True where the vocabulary file defines the suffix, so that
            `add_eos_token` has no effect.
        adds_bos: True where a text begins with a BOS token if no file of the folder decides it.
        strips_space: True where decoding drops one space from the start of the text.
        bytes_known: True where decoded text is the joined `token_bytes` of its tokens.
        has_byte_tokens: True where tokens such as `<0x0A>` are single bytes. A replacement
            character is then one byte that is not UTF-8.
        cleans_up: True where decoded text goes through `stream.clean_up`.
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
        """Return `bos_token`, ... -> text, for names that the folder's settings leave out."""

    def encode(self, text: str, special: bool) -> list[int]:
        """Encode without prefix and suffix; `special` recognises special tokens in the text."""

    def decode(self, ids: list[int], skip_special: bool) -> str:
        """Decode ids together; ids without a token are left out."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token; empty for an id without a token."""

    def content(self, token_id: int) -> str:
        """Return the text of one token as the file spells it; empty for an id without a token."""

    def has_token(self, token_id: int) -> bool:
        """Return whether an id has a token."""

    def token_id(self, content: str) -> int | None:
        """Return the id of a token by its text, or None."""
