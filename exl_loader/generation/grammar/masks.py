"""Matches a request's text with a grammar, by the optional package llguidance.

The package is imported when the first request has a grammar. The grammar describes the shown
text. If decoding drops the space of the first token, the grammar is extended by a space there.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...utils.errors import ExlLoaderError, InvalidSettings
from ..settings import GRAMMARS, SamplingSettings
from .gbnf import GbnfError, gbnf_to_lark
from .reach import schema_problem

if TYPE_CHECKING:
    from ...text.tokenizer import Tokenizer

# The space between JSON's tokens, as in llama.cpp. It is limited, because an unsure model could
# otherwise write spaces until max_new_tokens.
_JSON_SPACE = r" |\n{1,2}[ \t]{0,20}"

# Defines a rule in GBNF, and has no meaning in Lark. TabbyAPI tells them apart by it as well.
_GBNF_SIGN = "::="

# The library panics for tokens of more than 1024 bytes.
_LONGEST_TOKEN_BYTES = 1000

# If lexemes.py chooses lexemes of one character, a mask visits far more items than the library's
# own limits allow.
_MAX_ITEMS_IN_ROW = 20_000
_MAX_ITEMS_IN_STEP = 1_000_000
_STEP_LEXER_FUEL = 10_000_000


class Grammars:
    """Makes the matchers of one model. Every method may be called from any thread.

    Args:
        tokenizer: None if the model has none; then a grammar is an error.
        vocab_size: ids from here on are never drawn.
        eos_ids: ids that end a text.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, vocab_size: int, eos_ids: Iterable[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = tuple(i for i in eos_ids if i < vocab_size)
        self._lock = threading.Lock()
        self._table: Any = None

    def constraint(
        self, settings: SamplingSettings, continues_text: bool = False, before: str = ""
    ) -> GrammarMatcher | TriggeredGrammar | None:
        """Return the matcher of a request's grammar, which may wait for a token.

        Args, raises: as `matcher`. InvalidSettings: `grammar_trigger` is not one token.
        """
        if not settings.grammar_trigger:
            return self.matcher(settings, continues_text, before)
        # The grammar continues what was written before the token.
        matcher = self.matcher(settings, continues_text=True)
        if matcher is None:
            return None
        assert self._tokenizer is not None
        ids = self._tokenizer.encode(settings.grammar_trigger, add_bos=False)
        if len(ids) != 1 or ids[0] >= self._vocab_size:
            raise InvalidSettings(
                "grammar_trigger", expected="the text of one token of the model",
                actual=f"{len(ids)} tokens", remedy="Choose a special token such as </think>",
            )
        return TriggeredGrammar(matcher, ids[0])

    def matcher(
        self, settings: SamplingSettings, continues_text: bool = False, before: str = ""
    ) -> GrammarMatcher | None:
        """Return the matcher of a request's grammar; None if it has no grammar.

        Args:
            continues_text: the text continues a prompt, so its first space is shown.
            before: text of the prompt that the tokens spell before that of the grammar.

        Raises:
            InvalidSettings: the grammar is invalid (`details` has the library's message), or
                llguidance is missing or cannot be used with this model.
        """
        name = next((name for name in GRAMMARS if getattr(settings, name)), None)
        if name is None:
            return None
        text: str = getattr(settings, name)
        llguidance = _import_library(name)
        table = self._token_table(llguidance, name)
        assert self._tokenizer is not None
        opening = _Opening(before, self._tokenizer.strips_space and not continues_text)
        try:
            with _typed(name):
                if name == "regex_pattern":
                    grammar = llguidance.LLMatcher.grammar_from_regex(opening.regex(text))
                else:
                    grammar = llguidance.LLMatcher.grammar_from_lark(opening.lark(name, text))
        except GbnfError as error:
            raise _bad_grammar(name, str(error), str(error)) from None
        except RecursionError:
            raise _bad_grammar(name, "nested too deeply", "") from None
        with _typed(name):
            # For an invalid grammar it returns a matcher in an error state.
            matcher = llguidance.LLMatcher(
                table, grammar, log_level=0,
                limits=llguidance.LLParserLimits(
                    max_items_in_row=_MAX_ITEMS_IN_ROW, step_max_items=_MAX_ITEMS_IN_STEP,
                    step_lexer_fuel=_STEP_LEXER_FUEL,
                ),
            )
        if matcher.is_error():
            message = str(matcher.get_error())
            raise _bad_grammar(name, message.splitlines()[0][:200], message)
        eos_ids = () if settings.ban_eos_token else self._eos_ids
        return GrammarMatcher(name, matcher, self._vocab_size, eos_ids)

    def _token_table(self, llguidance: Any, name: str) -> Any:
        """Return the library's form of the vocabulary; made once, because it takes a second."""
        if self._tokenizer is None or not self._tokenizer.bytes_known:
            raise InvalidSettings(
                name, expected="a model whose tokens are known byte by byte",
                actual="no tokenizer" if self._tokenizer is None else "another kind of tokenizer",
                remedy=f"Leave {name} empty for this model",
            )
        with self._lock:
            if self._table is None:
                vocabulary = _Vocabulary(self._tokenizer, self._vocab_size, self._eos_ids)
                with _typed(name):
                    self._table = llguidance.LLTokenizer(
                        llguidance.TokenizerWrapper(vocabulary), n_vocab=self._vocab_size + 1,
                        eos_token=self._vocab_size,
                    )
            return self._table


class GrammarMatcher:
    """The state of one text in its grammar. Only one thread at a time may use it.

    Args:
        name: the setting's name, for errors.
        matcher: llguidance's matcher, in its first state.
        vocab_size: only ids below may be drawn.
        eos_ids: ids that are allowed where the grammar may end; empty if they are banned.

    Attributes:
        allowed_ids: int64, rising: the tokens that may come next; at least one unless
            `complete`.
        complete: True if the text cannot be continued.

    Raises:
        InvalidSettings: no token of the vocabulary can begin the text.
    """

    has_begun = True

    def __init__(
        self, name: str, matcher: Any, vocab_size: int, eos_ids: Iterable[int]
    ) -> None:
        self._name = name
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_ids = np.array(list(eos_ids), np.int64)
        self.complete = False
        self.allowed_ids = self._next_ids()
        if not len(self.allowed_ids):
            raise _bad_grammar(name, "it allows no text", "")

    def accept(self, token_id: int) -> None:
        """Advance by a token of `allowed_ids`.

        Raises:
            InvalidSettings: the grammar exceeds the library's limits, or no token of the
                vocabulary can continue the text.
        """
        if token_id in self._eos_ids:
            self.complete = True
            return
        with _typed(self._name):
            taken = self._matcher.consume_token(token_id)
        if not taken:
            raise self._lost()
        self.allowed_ids = self._next_ids()

    def copy(self) -> GrammarMatcher:
        """Return a matcher that continues from here on its own."""
        other = copy.copy(self)
        with _typed(self._name):
            other._matcher = self._matcher.deep_copy()
        return other

    def _next_ids(self) -> npt.NDArray[np.int64]:
        with _typed(self._name):
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")
        if self._matcher.is_error():
            raise self._lost()
        may_end, allowed = bool(allowed[self._vocab_size]), allowed[: self._vocab_size]
        self.complete = may_end and not allowed.any()
        if may_end:
            allowed[self._eos_ids] = 1
        elif not allowed.any():
            raise self._lost()
        return np.flatnonzero(allowed)

    def _lost(self) -> InvalidSettings:
        message = str(self._matcher.get_error())
        if not message:
            return _bad_grammar(self._name, "no token of the model can continue the text", "")
        return _bad_grammar(self._name, message.splitlines()[0][:200], message)


class TriggeredGrammar:
    """A grammar that begins after a token; before it everything is allowed.

    Args:
        matcher: the grammar.
        trigger_id: the token.

    Attributes:
        has_begun: True after the token.
    """

    def __init__(self, matcher: GrammarMatcher, trigger_id: int) -> None:
        self._matcher = matcher
        self._trigger_id = trigger_id
        self.has_begun = False

    @property
    def allowed_ids(self) -> npt.NDArray[np.int64] | None:
        """The tokens that may come next, int64, rising; None for all."""
        return self._matcher.allowed_ids if self.has_begun else None

    @property
    def complete(self) -> bool:
        """True if the text cannot be continued."""
        return self.has_begun and self._matcher.complete

    def accept(self, token_id: int) -> None:
        """Advance by a token; see `GrammarMatcher.accept`."""
        if self.has_begun:
            self._matcher.accept(token_id)
        else:
            self.has_begun = token_id == self._trigger_id

    def copy(self) -> TriggeredGrammar:
        """Return a grammar that continues from here on its own."""
        other = copy.copy(self)
        other._matcher = self._matcher.copy()
        return other


class _Vocabulary:
    """A tokenizer in the form that llguidance needs: bytes by id, and one end token.

    The end token follows the vocabulary, because a model may have several end tokens or none.
    Special tokens have no bytes, because they are not text, and no grammar allows them. The same
    holds for tokens that are too long for the library.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Iterable[int]) -> None:
        hidden = tokenizer.special_ids | frozenset(eos_ids)
        tokens = [b"" if i in hidden else tokenizer.token_bytes(i) for i in range(vocab_size)]
        self.tokens = [b"" if len(token) > _LONGEST_TOKEN_BYTES else token for token in tokens]
        self.tokens.append(b"<end>")
        self.eos_token_id = vocab_size
        self.special_token_ids = [vocab_size]
        self._tokenizer = tokenizer
        self._ids = {token: i for i, token in enumerate(self.tokens[:-1]) if token}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str) -> list[int]:
        """Encode text that continues another text.

        If a grammar leaves no choice, the library allows only these tokens. They must have
        exactly the text's bytes, without a space before it.
        """
        ids = self._tokenizer.continuation_ids(text, special=False)
        return self._greedy(text.encode("utf-8", "replace")) if ids is None else ids

    def _greedy(self, text: bytes) -> list[int]:
        """Encode by the longest tokens, for tokenizers that change the text."""
        ids, start = [], 0
        while start < len(text):
            lengths = range(min(self._longest, len(text) - start), 0, -1)
            length = next((n for n in lengths if text[start : start + n] in self._ids), 0)
            if not length:
                break
            ids.append(self._ids[text[start : start + length]])
            start += length
        return ids


def _import_library(name: str) -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise InvalidSettings(
            name, expected="the package llguidance", actual="none that can be imported",
            remedy="Install it: pip install llguidance", details=str(error),
        ) from None
    return llguidance


@contextmanager
def _typed(name: str) -> Iterator[None]:
    """Convert errors of the library about a setting's grammar to InvalidSettings.

    A panic of its compiled code raises PanicException, which is not a subclass of Exception. An
    older release lacks functions and arguments.
    """
    try:
        yield
    except (ExlLoaderError, MemoryError):
        raise
    except (AttributeError, TypeError) as error:
        raise InvalidSettings(
            name, expected="the package llguidance, 1.9 or newer",
            actual=f"one that lacks a function: {str(error)[:200]}",
            remedy="Upgrade it: pip install --upgrade llguidance", details=str(error),
        ) from error
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        message = str(error) or type(error).__name__
        raise _bad_grammar(name, message.splitlines()[0][:200], message) from error


@dataclass(frozen=True)
class _Opening:
    """What a text spells before its grammar begins: text, or an optional space, or nothing.

    Args:
        before: the text.
        may_space: allow one space; only without a text.
    """

    before: str
    may_space: bool

    def regex(self, text: str) -> str:
        """Put the opening before a regular expression."""
        if self.may_space:
            return f"( )?({text})"
        literal = "".join(f"\\x{{{ord(character):x}}}" for character in self.before)
        return f"{literal}({text})" if literal else text

    def lark(self, name: str, text: str) -> str:
        """Write a JSON schema or a grammar in Lark, with the opening before it."""
        if name == "json_schema":
            return f"%llguidance {{}}\nstart: {self._symbol} value\nvalue: %json {_schema(text)}\n"
        if _GBNF_SIGN in text:
            text = gbnf_to_lark(text, self.may_space)
            if not self.before:
                return text
        elif not self._symbol:
            return text
        return f"start: {self._symbol} inner\ninner: %lark {{\n{text}\n}}\n"

    @property
    def _symbol(self) -> str:
        return '" "?' if self.may_space else json.dumps(self.before) if self.before else ""


def _schema(text: str) -> str:
    """Check a JSON schema, and add the library's options to it."""
    value = json.loads(text)
    problem = schema_problem(value)
    if problem is not None:
        raise _bad_grammar("json_schema", problem, "")
    # Options of the library, which a schema may contain.
    options = value.setdefault("x-guidance", {})
    if isinstance(options, dict) and "whitespace_flexible" not in options:
        options.setdefault("whitespace_pattern", _JSON_SPACE)
    return json.dumps(value)


def _bad_grammar(name: str, problem: str, details: str) -> InvalidSettings:
    wanted = {"grammar_string": "a grammar in GBNF or Lark", "json_schema": "a JSON schema",
              "regex_pattern": "a regular expression"}[name]
    return InvalidSettings(
        name, expected=f"{wanted} that can be followed", actual=problem,
        remedy="Correct it, or leave it empty", details=details,
    )
