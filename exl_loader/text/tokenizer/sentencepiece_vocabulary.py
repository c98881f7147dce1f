"""`tokenizer.model`: vocabularies of the sentencepiece library.

Added and control tokens are searched for in the text first. The stretches between them are
encoded by the sentencepiece library, with its own normalisation, BPE and unigram models and byte
fallback.

**The space before a text.** A model with `add_dummy_prefix` puts a space before every text that
sentencepiece reads, also before one that begins with a space; `add_prefix_space` of
`tokenizer_config.json` overrides this. With `legacy: true` that happens to every stretch between
added tokens, otherwise only at the beginning of the text. sentencepiece, the LlamaTokenizer of
transformers 4, exllamav2 and llama.cpp encode in this way. Only transformers 5 puts no space
before a text that begins with one. Decoding removes the space.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...utils.errors import InvalidTokenizer
from ...utils.untrusted_files import SENTENCEPIECE_BYTES
from .stream import decode_bytes
from .tokenizer_config import REMEDY, AddedToken, TokenizerConfig, read_vocabulary
from .vocabulary import SPACE_MARK

# Appended to a serialised ModelProto: {normalizer_spec (3): {add_dummy_prefix (3): on or off}}.
# protobuf merges repeated fields of a message, and the last value wins.
_DUMMY_PREFIX_FIELD = b"\x1a\x02\x18"
CODE_LLAMA = "CodeLlamaTokenizer"
LLAMA_CLASSES = ("LlamaTokenizer", CODE_LLAMA)
# The default names of transformers' classes for Llama.
LLAMA_NAMED_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Unicode's White_Space, which the tokenizers library strips beside added tokens. str.strip()
# would also strip the four separators U+001C to U+001F.
_WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006"
    "\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)


@contextmanager
def _typed(thing: str, expected: str) -> Iterator[None]:
    """Raise InvalidTokenizer for the exceptions of the sentencepiece library."""
    try:
        yield
    # Its compiled code raises RuntimeError, and IndexError for unknown pieces. Its messages and
    # pieces may hold bytes that are not UTF-8.
    except (RuntimeError, LookupError, ValueError, TypeError, OSError) as error:
        raise InvalidTokenizer(
            thing, expected=expected, actual=str(error)[:200] or type(error).__name__,
            remedy=REMEDY,
        ) from None
    except (ImportError, AttributeError) as error:
        raise InvalidTokenizer(
            thing, expected="the package sentencepiece, 0.2 or newer, which reads this file",
            actual=str(error)[:200], remedy="Install it: pip install --upgrade sentencepiece",
        ) from error


def _open(data: bytes, path: Path) -> Any:
    with _typed(str(path), "a sentencepiece model"):
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=data)


def _pieces(model: Any, path: Path) -> dict[int, str]:
    with _typed(str(path), "pieces in UTF-8"):
        return {i: model.id_to_piece(i) for i in range(len(model))}


class SentencePieceVocabulary:
    """A `tokenizer.model`.

    Raises:
        InvalidTokenizer: the file cannot be read or is no sentencepiece model.
    """

    bytes_known = True
    cleans_up = False
    has_post_processor = False
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        data = read_vocabulary(path, SENTENCEPIECE_BYTES)
        # The library reads an empty file as an empty model and then writes to stderr.
        if not data:
            raise InvalidTokenizer(str(path), expected="a sentencepiece model",
                                   actual="an empty file", remedy=REMEDY)
        self._path = path
        # A folder with this file alone is a Llama of 2023.
        self.adds_bos = not config.declared or config.tokenizer_class == CODE_LLAMA
        self._names_as_llama = config.tokenizer_class in LLAMA_CLASSES
        self._plain = _open(data + _DUMMY_PREFIX_FIELD + b"\x00", path)
        self._prefixed = _open(data + _DUMMY_PREFIX_FIELD + b"\x01", path)
        with _typed(str(path), "a sentencepiece model that encodes text"):
            has_dummy_prefix = _open(data, path).normalize("a") != self._plain.normalize("a")
        self._prefix_scheme = _prefix_scheme(config, has_dummy_prefix)
        self.strips_space = self._prefix_scheme != "never"
        self._contents = _pieces(self._plain, path)
        self._added = self._collect_added(config)
        self._contents.update((i, token.content) for i, token in self._added.items())
        self._ids = {token.content: i for i, token in self._added.items()}
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self._patterns = {
            special: _alternation(self._added.values(), special) for special in (True, False)
        }
        with _typed(str(path), "a sentencepiece model that encodes text"):
            symbols = [token for i, token in self._added.items() if self._is_symbol(i, token)]
        self._symbols = _alternation(symbols, True)
        self.has_byte_tokens = any(map(_BYTE_PIECE.fullmatch, self._contents.values()))
        self.vocab_size = max(self._contents, default=-1) + 1

    def default_named_tokens(self) -> dict[str, str]:
        """Return the names in the model file, and LlamaTokenizer's for that class."""
        model = self._plain
        ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(),
               "unk_token": model.unk_id(), "pad_token": model.pad_id()}
        own = {name: self._contents[i] for name, i in ids.items() if i in self._contents}
        return (LLAMA_NAMED_TOKENS if self._names_as_llama else {}) | own

    def encode(self, text: str, special: bool) -> list[int]:
        with _typed(str(self._path), "a sentencepiece model that encodes this text"):
            return self._encode(text, special)

    def _encode(self, text: str, special: bool) -> list[int]:
        ids: list[int] = []
        position = 0
        for start, end, content in self._find_added(text, special):
            self._encode_stretch(text[position:start], position == 0, ids, special)
            ids.append(self._ids[content])
            position = end
        self._encode_stretch(text[position:], position == 0, ids, special)
        return ids

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return decode_bytes(self, ids, skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        return piece_bytes(self._contents.get(token_id, ""))

    def content(self, token_id: int) -> str:
        return self._contents.get(token_id, "")

    def has_token(self, token_id: int) -> bool:
        return token_id in self._contents

    def token_id(self, content: str) -> int | None:
        if content in self._ids:
            return self._ids[content]
        token_id = self._plain.piece_to_id(content)
        return token_id if self._contents.get(token_id) == content else None

    def _collect_added(self, config: TokenizerConfig) -> dict[int, AddedToken]:
        model = self._plain
        added = {
            i: AddedToken(self._contents[i], special=True, normalized=False)
            for i in range(len(model))
            if model.is_control(i) or model.is_unknown(i)
        }
        added.update(config.added_tokens)
        ids = {self._contents.get(i, ""): i for i in self._contents}
        ids.update((token.content, i) for i, token in added.items())
        next_id = max([*self._contents, *added], default=-1) + 1
        for token in (*config.named_tokens.values(), *config.extra_special_tokens):
            if token.content not in ids:
                ids[token.content] = next_id
                next_id += 1
            declared = added.get(ids[token.content], token)
            added[ids[token.content]] = AddedToken(
                token.content, True, declared.lstrip, declared.rstrip, declared.single_word, False
            )
        return {i: token for i, token in added.items() if token.content}

    def _is_symbol(self, token_id: int, token: AddedToken) -> bool:
        """Return whether sentencepiece finds a special token in text by itself."""
        content = token.content
        is_piece = token_id < len(self._plain) and self._plain.id_to_piece(token_id) == content
        return token.special and is_piece and self._plain.encode(content) == [token_id]

    def _find_added(self, text: str, special: bool) -> list[tuple[int, int, str]]:
        pattern = self._patterns[special]
        if pattern is None:
            return []
        found: list[tuple[int, int, str]] = []
        last_end = 0
        for match in pattern.finditer(text):
            start, end = match.span()
            token = self._added[self._ids[match[0]]]
            if start < last_end or (token.single_word and _touches_word(text, start, end)):
                continue
            if token.lstrip:
                start = last_end + len(text[last_end:start].rstrip(_WHITE_SPACE))
            if token.rstrip:
                end = len(text) - len(text[end:].lstrip(_WHITE_SPACE))
            found.append((start, end, token.content))
            last_end = end
        return found

    def _encode_stretch(self, text: str, at_start: bool, ids: list[int], special: bool) -> None:
        if not text:
            return
        wants_space = self._prefix_scheme == "always" or (
            self._prefix_scheme == "first" and at_start
        )
        model = self._prefixed if wants_space else self._plain
        # sentencepiece finds user-defined symbols by itself. Where special tokens are plain text,
        # the text is cut inside them to prevent that.
        cuts = [] if special or self._symbols is None else [
            match.start() + 1 for match in self._symbols.finditer(text)
        ]
        for start, end in pairwise([0, *cuts, len(text)]):
            ids.extend(model.encode(text[start:end]))
            model = self._plain


def piece_bytes(piece: str) -> bytes:
    """Return the bytes of a sentencepiece piece: `<0x0A>` is one byte, `▁` is a space."""
    byte = _BYTE_PIECE.fullmatch(piece)
    if byte:
        return bytes([int(byte[1], 16)])
    return piece.replace(SPACE_MARK, " ").encode("utf-8", "replace")


def _prefix_scheme(config: TokenizerConfig, has_dummy_prefix: bool) -> str:
    """Return before which stretches of text a space is put: `never`, `first` or `always`."""
    wants_space = has_dummy_prefix if config.add_prefix_space is None else config.add_prefix_space
    if not wants_space:
        return "never"
    return "always" if config.legacy else "first"


def _alternation(tokens: Any, special: bool) -> re.Pattern[str] | None:
    contents = {token.content for token in tokens if special or not token.special}
    # The longest first, so that a token wins over a prefix of it that is also a token.
    longest_first = sorted(contents, key=lambda content: (-len(content), content))
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _touches_word(text: str, start: int, end: int) -> bool:
    sides = (text[start - 1 : start], text[end : end + 1])
    return any(side.isalnum() or side == "_" for side in sides)
