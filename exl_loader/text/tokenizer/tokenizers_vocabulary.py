"""`tokenizer.json`: vocabularies of the tokenizers library, used as the file defines them.

There is one exception, as in transformers 5: for a Llama folder that declares LlamaTokenizer or
CodeLlamaTokenizer, `legacy` and `add_prefix_space` of `tokenizer_config.json` define the space
before a text, because older conversions wrote another rule into `tokenizer.json`.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ...utils.errors import ExlLoaderError, InvalidTokenizer
from ...utils.json_keys import parse_json
from ...utils.untrusted_files import TOKENIZER_BYTES
from . import vocab_merges
from .sentencepiece_vocabulary import CODE_LLAMA, LLAMA_CLASSES, LLAMA_NAMED_TOKENS, piece_bytes
from .stream import decode_bytes
from .tokenizer_config import REMEDY, AddedToken, TokenizerConfig, read_vocabulary
from .vocabulary import SPACE_MARK


def _byte_level_alphabet() -> dict[str, int]:
    """Map characters of GPT-2's byte-level vocabularies to bytes.

    A printable Latin-1 character is its own byte. The other bytes, in order, are the characters
    from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update((chr(256 + i), byte) for i, byte in enumerate(others))
    return table


_BYTE_OF = _byte_level_alphabet()


_UPGRADE = f"{REMEDY}, or upgrade the tokenizers package"
# The beginning of the list of added tokens; the format has no other list of this name.
_ADDED_TOKENS = re.compile(rb'"added_tokens"\s*:\s*(\[)')
# How far an id may be beyond the other ids where the size of the vocabulary is not known.
_MAX_GAP = 4096
# A BPE model that marks continuing pieces. BERT's models do; those of language models do not.
_PREFIXED = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')


@contextmanager
def _typed(thing: str, expected: str, remedy: str = REMEDY) -> Iterator[None]:
    """Raise InvalidTokenizer for the exceptions of the tokenizers library."""
    try:
        yield
    except (ExlLoaderError, MemoryError):
        raise
    except BaseException as error:
        # The library raises a bare Exception for most errors. For the others its compiled code
        # panics, which raises a PanicException that is not a subclass of Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InvalidTokenizer(
            thing, expected=expected, actual=str(error)[:200] or type(error).__name__,
            remedy=remedy,
        ) from None


def _check_prefix(model: dict[str, Any]) -> None:
    """Refuse merges that lack the prefix which the model declares.

    tokenizers (0.23 at least) removes the prefix without a check, and aborts the process where
    the merge is shorter than the prefix.
    """
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model.get("merges") or []:
        right = merge.split(" ")[-1] if isinstance(merge, str) else merge[-1]
        if not right.startswith(prefix):
            raise ValueError(f"the merge {merge!r} lacks the prefix {prefix!r}")


def _read_json(data: bytes, placed: Mapping[str, int]) -> Any:
    """Build a tokenizer from a `tokenizer.json`, with the tokens of `placed` at their ids."""
    from tokenizers import Tokenizer

    if not placed and not _PREFIXED.search(data):
        return Tokenizer.from_buffer(data)
    content = parse_json(data)
    _check_prefix(content["model"])
    if not placed:
        return Tokenizer.from_buffer(data)
    vocab = content["model"].get("vocab")
    if not isinstance(vocab, dict):
        raise ValueError("a vocabulary whose tokens cannot be given ids")
    vocab.update(placed)
    return Tokenizer.from_str(json.dumps(content))


def _json_ids(data: bytes) -> dict[str, int]:
    """Return text -> id of `added_tokens` in a `tokenizer.json`.

    They are read here because the library numbers these tokens itself and ignores the file's ids.
    """
    found = _ADDED_TOKENS.search(data)
    if found is None:
        return {}
    text = data[found.start(1) :].decode("utf-8")
    tokens, _ = json.JSONDecoder().raw_decode(text)
    return {token["content"]: token["id"] for token in tokens}


class TokenizersVocabulary:
    """A tokenizer of the tokenizers library: a `tokenizer.json`, or `vocab.json` and `merges.txt`.

    Args:
        where: the file or folder, for errors.
        config: the folder's settings.
        build: builds the tokenizer, given text -> id of further tokens for its vocabulary.
        file_ids: text -> id of added tokens, from the file itself.

    Raises:
        InvalidTokenizer: the file cannot be read, or an added token gets another id than
            the folder says.
    """

    def __init__(
        self, where: Path, config: TokenizerConfig,
        build: Callable[[Mapping[str, int]], Any], file_ids: Mapping[str, int],
    ) -> None:
        self._where = where
        self._default_named_tokens: dict[str, str] = {}
        with self._typed("a tokenizer the tokenizers library reads"):
            self._tokenizer = self._build(config, build, file_ids)
            # `encode_special_tokens` is a setting of the whole tokenizer, not of one call.
            self._lock = threading.Lock()
            self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
            added = self._tokenizer.get_added_tokens_decoder()
            self.special_ids = frozenset(i for i, token in added.items() if token.special)
            self.prefix_ids, self.suffix_ids = _frame(self._tokenizer)
            # A tokenizer that cannot encode fails here, and not in the first request.
            self._tokenizer.encode("a b", add_special_tokens=False)
            types = _decoder_types(self._tokenizer)
            sentencepiece_like = _is_sentencepiece_decoder(self._tokenizer)
            self.cleans_up = _cleans_up(self._tokenizer, config)
        self._byte_level = types == ["ByteLevel"]
        self.bytes_known = self._byte_level or sentencepiece_like
        self.has_byte_tokens = not self._byte_level and "ByteFallback" in types
        self.strips_space = sentencepiece_like and "Strip" in types
        self.has_post_processor = True
        self.adds_bos = False

    @classmethod
    def from_json(cls, path: Path, config: TokenizerConfig) -> TokenizersVocabulary:
        """Read a `tokenizer.json`."""
        data = read_vocabulary(path, TOKENIZER_BYTES)
        with _typed(str(path), "a tokenizer the tokenizers library reads", _UPGRADE):
            file_ids = _json_ids(data)
        return cls(path, config, partial(_read_json, data), file_ids)

    @classmethod
    def from_vocab_and_merges(cls, folder: Path, config: TokenizerConfig) -> TokenizersVocabulary:
        """Read `vocab.json` and `merges.txt`."""
        vocabulary = cls(folder, config, partial(vocab_merges.build, folder, config), {})
        vocabulary._default_named_tokens = vocab_merges.default_named_tokens(config)
        vocabulary.has_post_processor = False
        return vocabulary

    def default_named_tokens(self) -> dict[str, str]:
        return self._default_named_tokens

    def encode(self, text: str, special: bool) -> list[int]:
        with self._typed("a tokenizer that encodes this text"), self._lock:
            self._tokenizer.encode_special_tokens = not special
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special: bool) -> str:
        if self.has_byte_tokens and self.bytes_known:
            return decode_bytes(self, ids, skip_special)
        with self._typed("a tokenizer that decodes these ids"):
            known = [i for i in ids if self.has_token(i)]
            return self._tokenizer.decode(known, skip_special_tokens=skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        token = self.content(token_id)
        if not self._byte_level:
            return piece_bytes(token)
        if all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        return token.encode("utf-8", "replace")

    def content(self, token_id: int) -> str:
        return (self._tokenizer.id_to_token(token_id) or "") if self.has_token(token_id) else ""

    def has_token(self, token_id: int) -> bool:
        return 0 <= token_id < self.vocab_size

    def token_id(self, content: str) -> int | None:
        return self._tokenizer.token_to_id(content)

    def _typed(self, expected: str) -> AbstractContextManager[None]:
        return _typed(str(self._where), expected, _UPGRADE)

    def _build(
        self, config: TokenizerConfig, build: Callable[[Mapping[str, int]], Any],
        file_ids: Mapping[str, int],
    ) -> Any:
        """Build the tokenizer with every added token at the id that the folder's files have."""
        declared = {token.content: i for i, token in config.added_tokens.items() if token.content}
        for content, token_id in file_ids.items():
            if declared.setdefault(content, token_id) != token_id:
                raise self._wrong_id(content, declared[content], token_id)
        self._tokenizer = self._complete(build({}), config)
        wrong = self._misplaced(declared)
        if not wrong:
            return self._tokenizer
        # The library gives new tokens the next free ids, but a token of the vocabulary keeps its
        # id there. So the tokens that got a wrong id are put into the vocabulary.
        most = config.model.vocab_size or len(self._tokenizer.get_vocab()) + _MAX_GAP
        hopeless = {
            content: actual for content, actual in wrong.items()
            if declared[content] >= most or self._is_taken(declared[content], declared)
        }
        if not hopeless:
            self._tokenizer = self._complete(build(declared), config)
            hopeless = self._misplaced(declared)
        for content, actual in hopeless.items():
            raise self._wrong_id(content, declared[content], actual)
        return self._tokenizer

    def _misplaced(self, declared: Mapping[str, int]) -> dict[str, int | None]:
        """Return text -> actual id of tokens whose id is not that of the folder's files.

        Tokens that share their id with another token of the vocabulary are included.
        """
        wrong = {}
        for content, token_id in declared.items():
            actual = self.token_id(content)
            at_id = self._tokenizer.model.id_to_token(token_id)
            if actual != token_id or at_id not in (None, content):
                wrong[content] = actual
        return wrong

    def _is_taken(self, token_id: int, declared: Mapping[str, int]) -> bool:
        """Return whether an id belongs to a token of the vocabulary that keeps its id."""
        content = self._tokenizer.model.id_to_token(token_id)
        return content is not None and content not in declared

    def _wrong_id(self, content: str, expected: int, actual: int | None) -> InvalidTokenizer:
        return InvalidTokenizer(
            f"token {content!r} of {self._where}", expected=f"id {expected}",
            actual=f"id {actual}" if actual != expected else "an id of two tokens",
            remedy=REMEDY,
        )

    def _complete(self, tokenizer: Any, config: TokenizerConfig) -> Any:
        """Apply the folder's settings to a newly built tokenizer."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if _follows_llama_class(config) and "ByteLevel" not in _state(tokenizer.decoder):
            _apply_llama_rule(tokenizer, config)
            self._default_named_tokens = dict(LLAMA_NAMED_TOKENS)
        self._tokenizer = tokenizer
        self._add_tokens(config)
        return tokenizer

    def _add_tokens(self, config: TokenizerConfig) -> None:
        """Add the tokens that the folder declares; their flags override those in the file."""
        known = {
            token.content: _parse(token)
            for token in self._tokenizer.get_added_tokens_decoder().values()
        }
        named = [replace(token, special=True) for token in config.named_tokens.values()]
        for _, token in sorted(config.added_tokens.items()):
            if token.content and known.get(token.content) != token:
                self._add(token)
                known[token.content] = token
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
    """Convert a token of the tokenizers library."""
    return AddedToken(
        token.content, token.special, token.lstrip, token.rstrip, token.single_word,
        token.normalized,
    )


def _state(component: Any) -> str:
    """Return a part of the tokenizer as JSON; empty where the tokenizer lacks it."""
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
    """Return whether decoding is: `▁` to space, byte fallback, join, perhaps drop a first space."""
    steps = _decoder_steps(tokenizer)
    if [step["type"] for step in steps[:3]] != ["Replace", "ByteFallback", "Fuse"]:
        return False
    replace = steps[0]
    if replace.get("pattern") != {"String": SPACE_MARK} or replace.get("content") != " ":
        return False
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return steps[3:] in ([], [strip])


def _follows_llama_class(config: TokenizerConfig) -> bool:
    return config.tokenizer_class in LLAMA_CLASSES and config.model.model_type in ("", "llama")


def _apply_llama_rule(tokenizer: Any, config: TokenizerConfig) -> None:
    from tokenizers import decoders, normalizers, pre_tokenizers

    prefix = config.add_prefix_space is not False
    is_code_llama = config.tokenizer_class == CODE_LLAMA
    everywhere = config.legacy and not is_code_llama
    scheme = ("always" if everywhere else "first") if prefix else "never"
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=SPACE_MARK, prepend_scheme=scheme, split=False
    )
    steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix or is_code_llama:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)


def _frame(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the file's post-processor puts before and after a text."""
    text = _state(tokenizer.post_processor)
    state = json.loads(text) if text else {}
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    for step in state.get("processors", [state]):
        first, last = _frame_of_step(step)
        before, after = (*first, *before), (*after, *last)
    return before, after


def _frame_of_step(step: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    if step.get("type") in ("BertProcessing", "RobertaProcessing"):
        return [step["cls"][1]], [step["sep"][1]]
    before: list[int] = []
    after: list[int] = []
    side = before
    for part in step.get("single", ()) if step.get("type") == "TemplateProcessing" else ():
        if "Sequence" in part:
            side = after
        else:
            side += step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    return before, after


def _cleans_up(tokenizer: Any, config: TokenizerConfig) -> bool:
    """Return whether transformers 5 cleans up decoded text; for BPE it does not by default."""
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    is_bpe = type(tokenizer.model).__name__ == "BPE"
    return config.clean_up_tokenization_spaces and (not is_bpe or bool(config.values.get(forced)))
