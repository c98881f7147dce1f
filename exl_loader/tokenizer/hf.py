"""`tokenizer.json`: vocabularies of the tokenizers library, used as the file says.

One exception follows transformers 5: for a Llama folder that declares LlamaTokenizer, the
rule for the space before text comes from `tokenizer_config.json` (`legacy`,
`add_prefix_space`), whatever older conversion wrote into the file.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import InvalidTokenizer
from ..json_keys import parse_json
from ..untrusted_files import TOKENIZER_BYTES, read_bytes
from .backend import SPACE_MARK
from .files import REMEDY, AddedToken, TokenizerConfig
from .spm import piece_bytes


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level vocabularies.

    Printable Latin-1 characters stand for themselves, all other bytes, in order, for the
    characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update((chr(256 + i), byte) for i, byte in enumerate(others))
    return table


_BYTE_OF = _byte_level_alphabet()


# A BPE model that marks continuing pieces, as BERT's do and no language model's.
_PREFIXED = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')


def _open(path: Path) -> Any:
    from tokenizers import Tokenizer

    data = read_bytes(path, TOKENIZER_BYTES, error=InvalidTokenizer, missing=InvalidTokenizer,
                      remedy=REMEDY)
    try:
        if _PREFIXED.search(data):
            _check_prefix(parse_json(data)["model"])
        return Tokenizer.from_buffer(data)
    except BaseException as error:
        # The library raises a bare Exception for most that can be wrong with the file, and
        # for the rest its compiled code panics, which arrives as no Exception at all.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InvalidTokenizer(
            str(path), expected="a tokenizer the tokenizers library reads",
            actual=str(error) or type(error).__name__,
            remedy=f"{REMEDY}, or upgrade the tokenizers package",
        ) from None


def _check_prefix(model: dict[str, Any]) -> None:
    """Refuse merges without the prefix that the model says they have.

    tokenizers (0.23 at least) cuts the prefix off unseen, and where there is less to cut it
    does not raise but aborts the process.
    """
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model.get("merges") or []:
        right = merge.split(" ")[-1] if isinstance(merge, str) else merge[-1]
        if not right.startswith(prefix):
            raise ValueError(f"the merge {merge!r} lacks the prefix {prefix!r}")


class TokenizersBackend:
    """A `tokenizer.json`.

    Raises:
        InvalidTokenizer: the file cannot be read, or an added token gets another id than
            the folder says.
    """

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        self._tokenizer = _open(path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if _follows_llama_class(config) and "ByteLevel" not in _state(self._tokenizer.decoder):
            _apply_llama_rule(self._tokenizer, config)
        self._add_tokens(config, path)
        # `encode_special_tokens` is a switch of the whole tokenizer, not of one call.
        self._lock = threading.Lock()
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.prefix_ids, self.suffix_ids = _frame(self._tokenizer)
        self._byte_level = _decoder_types(self._tokenizer) == ["ByteLevel"]
        sentencepiece_like = _is_sentencepiece_decoder(self._tokenizer)
        self.bytes_known = self._byte_level or sentencepiece_like
        self.strips_space = sentencepiece_like and "Strip" in _decoder_types(self._tokenizer)

    def encode(self, text: str, special: bool) -> list[int]:
        with self._lock:
            self._tokenizer.encode_special_tokens = not special
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if not self._byte_level:
            return piece_bytes(token)
        if all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        return token.encode("utf-8", "replace")

    def token_id(self, content: str) -> int | None:
        return self._tokenizer.token_to_id(content)

    def _add_tokens(self, config: TokenizerConfig, path: Path) -> None:
        """Add what the folder declares beside the file; its flags win over the file's."""
        known = {
            token.content: _parse(token)
            for token in self._tokenizer.get_added_tokens_decoder().values()
        }
        named = [replace(token, special=True) for token in config.named_tokens.values()]
        for token_id, token in sorted(config.added_tokens.items()):
            if not token.content or known.get(token.content) == token:
                continue
            self._add(token)
            known[token.content] = token
            actual = self._tokenizer.token_to_id(token.content)
            if actual != token_id:
                raise InvalidTokenizer(
                    f"token {token.content!r} of {path}", expected=f"id {token_id}",
                    actual=f"id {actual}", remedy=REMEDY,
                )
        for token in named:
            if token.content and not known.get(token.content, _PLAIN).special:
                self._add(replace(known.get(token.content, token), special=True))
        for token in config.extra_special_tokens:
            if token.content and token.content not in known:
                self._add(token)

    def _add(self, token: AddedToken) -> None:
        import tokenizers

        add = self._tokenizer.add_special_tokens if token.special else self._tokenizer.add_tokens
        add([tokenizers.AddedToken(
            token.content, lstrip=token.lstrip, rstrip=token.rstrip,
            single_word=token.single_word, normalized=token.normalized, special=token.special,
        )])


_PLAIN = AddedToken("")


def _parse(token: Any) -> AddedToken:
    """Read a token of the tokenizers library."""
    return AddedToken(
        token.content, token.special, token.lstrip, token.rstrip, token.single_word,
        token.normalized,
    )


def _state(component: Any) -> str:
    """JSON of a part of the tokenizer; empty where it has none."""
    return component.__getstate__().decode("utf-8") if component is not None else ""


def _decoder_steps(tokenizer: Any) -> list[dict[str, Any]]:
    text = _state(tokenizer.decoder)
    if not text:
        return []
    state = json.loads(text)
    return state["decoders"] if state["type"] == "Sequence" else [state]


def _decoder_types(tokenizer: Any) -> list[str]:
    return [step["type"] for step in _decoder_steps(tokenizer)]


def _is_sentencepiece_decoder(tokenizer: Any) -> bool:
    """True for `▁` to space, byte fallback, join, and perhaps one space off the start."""
    steps = _decoder_steps(tokenizer)
    if [step["type"] for step in steps[:3]] != ["Replace", "ByteFallback", "Fuse"]:
        return False
    replace = steps[0]
    if replace.get("pattern") != {"String": SPACE_MARK} or replace.get("content") != " ":
        return False
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return steps[3:] in ([], [strip])


def _follows_llama_class(config: TokenizerConfig) -> bool:
    return config.tokenizer_class == "LlamaTokenizer" and config.model_type in ("", "llama")


def _apply_llama_rule(tokenizer: Any, config: TokenizerConfig) -> None:
    from tokenizers import decoders, normalizers, pre_tokenizers

    prefix = config.add_prefix_space is not False
    scheme = ("always" if config.legacy else "first") if prefix else "never"
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=SPACE_MARK, prepend_scheme=scheme, split=False
    )
    steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)


def _frame(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that the file's post-processor puts before and after a text."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    framed = tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return tuple(framed[:start]), tuple(framed[start + len(plain) :])
    return (), ()
