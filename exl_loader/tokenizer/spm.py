"""`tokenizer.model`: vocabularies of the sentencepiece library.

sentencepiece itself cuts text into pieces, so its normalisation, its BPE and unigram models
and its byte fallback are what they are. Around it stand two rules of transformers'
LlamaTokenizer, which chat formats depend on: added and control tokens are found in the text
first, and a space is put before the text only where it begins (`legacy: false`) or before
every stretch between such tokens (`legacy: true`), never where a space stands already.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import InvalidTokenizer
from ..untrusted_files import SENTENCEPIECE_BYTES, read_bytes
from .backend import SPACE_MARK
from .files import REMEDY, AddedToken, TokenizerConfig

# A serialised ModelProto followed by {normalizer_spec (3): {add_dummy_prefix (3): on or off}}:
# protobuf merges repeated fields of a message, the last value wins.
_DUMMY_PREFIX_FIELD = b"\x1a\x02\x18"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Unicode's White_Space, which the tokenizers library strips beside added tokens. str.strip()
# would take the four separators U+001C to U+001F as well.
_WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006"
    "\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)


def _open(data: bytes, path: Path) -> Any:
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    except (RuntimeError, UnicodeDecodeError) as error:  # its words may quote broken bytes
        raise InvalidTokenizer(
            str(path), expected="a sentencepiece model", actual=str(error), remedy=REMEDY
        ) from None
    return processor


def _pieces(model: Any, path: Path) -> dict[int, str]:
    try:
        return {i: model.id_to_piece(i) for i in range(len(model))}
    except UnicodeDecodeError as error:
        raise InvalidTokenizer(
            str(path), expected="pieces in UTF-8", actual=str(error), remedy=REMEDY
        ) from None


class SentencePieceBackend:
    """A `tokenizer.model`.

    Raises:
        InvalidTokenizer: the file cannot be read or is no sentencepiece model.
    """

    bytes_known = True

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        data = read_bytes(path, SENTENCEPIECE_BYTES, error=InvalidTokenizer,
                          missing=InvalidTokenizer, remedy=REMEDY)
        # The library takes an empty file for an empty model and then writes to stderr.
        if not data:
            raise InvalidTokenizer(str(path), expected="a sentencepiece model",
                                   actual="an empty file", remedy=REMEDY)
        self._plain = _open(data + _DUMMY_PREFIX_FIELD + b"\x00", path)
        self._prefixed = _open(data + _DUMMY_PREFIX_FIELD + b"\x01", path)
        self._prefix_scheme = _prefix_scheme(config, _open(data, path), self._plain)
        self.strips_space = self._prefix_scheme != "never"
        self._contents = _pieces(self._plain, path)
        self._added = self._collect_added(config)
        self._contents.update((i, token.content) for i, token in self._added.items())
        self._ids = {token.content: i for i, token in self._added.items()}
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self._patterns = {
            special: _alternation(self._added.values(), special) for special in (True, False)
        }
        self.vocab_size = max(self._contents, default=-1) + 1
        self.prefix_ids: tuple[int, ...] = ()
        self.suffix_ids: tuple[int, ...] = ()

    def default_named_tokens(self) -> dict[str, str]:
        """Special tokens as the sentencepiece model itself names them."""
        model = self._plain
        ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(),
               "unk_token": model.unk_id(), "pad_token": model.pad_id()}
        return {name: self._contents[i] for name, i in ids.items() if i in self._contents}

    def encode(self, text: str, special: bool) -> list[int]:
        ids: list[int] = []
        position = 0
        for start, end, content in self._find_added(text, special):
            self._encode_stretch(text[position:start], position == 0, ids)
            ids.append(self._ids[content])
            position = end
        self._encode_stretch(text[position:], position == 0, ids)
        return ids

    def decode(self, ids: list[int], skip_special: bool) -> str:
        parts: list[str] = []
        run = bytearray()
        for token_id in ids:
            if token_id not in self._contents or (skip_special and token_id in self.special_ids):
                continue
            content = self._contents[token_id]
            byte = _BYTE_PIECE.fullmatch(content)
            if byte:
                run.append(int(byte[1], 16))
                continue
            parts.append(_decode_run(run))
            run.clear()
            parts.append(content.replace(SPACE_MARK, " "))
        parts.append(_decode_run(run))
        text = "".join(parts)
        return text[1:] if self.strips_space and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        return piece_bytes(self._contents.get(token_id, ""))

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

    def _encode_stretch(self, text: str, at_start: bool, ids: list[int]) -> None:
        if not text:
            return
        wants_space = self._prefix_scheme == "always" or (
            self._prefix_scheme == "first" and at_start
        )
        has_space = text.startswith((" ", SPACE_MARK))
        model = self._prefixed if wants_space and not has_space else self._plain
        ids.extend(model.encode(text))


def piece_bytes(piece: str) -> bytes:
    """Bytes of a sentencepiece piece: `<0x0A>` is one byte, the space mark a space."""
    byte = _BYTE_PIECE.fullmatch(piece)
    if byte:
        return bytes([int(byte[1], 16)])
    return piece.replace(SPACE_MARK, " ").encode("utf-8", "replace")


def _prefix_scheme(config: TokenizerConfig, own: Any, plain: Any) -> str:
    """`never`, `first` or `always`: where a space is put before text."""
    if config.tokenizer_class == "GemmaTokenizer" or config.add_prefix_space is False:
        return "never"
    named = config.tokenizer_class == "LlamaTokenizer" or config.add_prefix_space is not None
    if not named and own.encode("a") == plain.encode("a"):
        return "never"
    return "always" if config.legacy else "first"


def _alternation(tokens: Any, special: bool) -> re.Pattern[str] | None:
    contents = {token.content for token in tokens if special or not token.special}
    # The longest first, so that a token wins over one that it begins with.
    longest_first = sorted(contents, key=lambda content: (-len(content), content))
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _touches_word(text: str, start: int, end: int) -> bool:
    sides = (text[start - 1 : start], text[end : end + 1])
    return any(side.isalnum() or side == "_" for side in sides)


def _decode_run(run: bytearray) -> str:
    """Decode neighbouring byte pieces; where they are no UTF-8, one mark for each byte."""
    try:
        return run.decode("utf-8")
    except UnicodeDecodeError:
        return "\N{REPLACEMENT CHARACTER}" * len(run)
