"""Draws the tokens of one request from rows of logits."""

from __future__ import annotations

import copy
import math
import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from ...utils.errors import InvalidCheckpoint, InvalidSettings
from ..forward_model import LogitsRow, TopLogits
from ..settings import MAX_SEED, SamplingSettings
from . import penalties
from .candidates import Candidates, draw
from .feedback import chosen_feedback
from .numerics import Floats, Ids
from .penalties import Past
from .pipeline import NoTokenLeft, Step, chosen_samplers, run_samplers
from .tail import Undecided, top_logits_may_suffice

if TYPE_CHECKING:
    from ...text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenRoles:
    """Tokens that are special to the samplers of one request.

    Args:
        vocab_size: ids from here on are padding and never drawn; None if there is no padding.
        banned_ids: tokens that are never drawn.
        end_ids: tokens that end a text, which are not drawn before `min_new_tokens`.
        prompt_ids: tokens that `encoder_repetition_penalty` applies to.
        spared_ids: tokens that XTC never removes.
        breaker_ids: tokens that end a repeat for DRY.
    """

    vocab_size: int | None = None
    banned_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()
    prompt_ids: Sequence[int] = ()
    spared_ids: frozenset[int] = frozenset()
    breaker_ids: frozenset[int] = frozenset()

    @classmethod
    def from_request(
        cls, settings: SamplingSettings, tokenizer: Tokenizer | None, *,
        vocab_size: int, eos_ids: Iterable[int], prompt_ids: Sequence[int],
    ) -> TokenRoles:
        """Look up the tokens of a request.

        Args:
            settings: the request's settings.
            tokenizer: None if the model has none.
            vocab_size: number of ids that have a token.
            eos_ids: the model's end tokens.
            prompt_ids: the prompt.

        Raises:
            InvalidSettings: DRY has breakers, which are text, and the model has no tokenizer.
        """
        eos_ids = tuple(eos_ids)
        banned = set(settings.custom_token_bans)
        if settings.ban_eos_token:
            banned.update(eos_ids)
        breakers: Iterable[int] = ()
        if settings.dry_multiplier > 0 and settings.dry_sequence_breakers:
            breakers = _breaker_ids(settings.dry_sequence_breakers, tokenizer)
        spared = set(eos_ids)
        if settings.xtc_probability > 0 and tokenizer is not None:
            spared.update(tokenizer.encode("\n", add_bos=False)[-1:])
        return cls(
            vocab_size=vocab_size,
            banned_ids=tuple(sorted(banned)),
            end_ids=tuple(sorted({*eos_ids, *settings.stop_token_ids})),
            prompt_ids=prompt_ids if settings.encoder_repetition_penalty != 1 else (),
            spared_ids=frozenset(spared),
            breaker_ids=frozenset(breakers),
        )


class Constraint(Protocol):
    """Restricts the tokens of a text step by step, as a grammar does."""

    @property
    def forced_id(self) -> int | None:
        """The token that comes next, whatever the samplers say; None if one is to be drawn."""

    @property
    def allowed_ids(self) -> Ids | None:
        """The tokens that may come next, int64, rising: at least one unless `complete`.

        None for all.
        """

    @property
    def complete(self) -> bool:
        """True if the text cannot be continued."""

    def accept(self, token_id: int) -> None:
        """Advance by a drawn token."""

    def copy(self) -> Constraint:
        """Return a constraint that continues from here on its own."""


class Sampler:
    """Draws the tokens of one request, with its own random generator and state.

    Args:
        settings: the request's settings.
        seed: seed of the generator; None takes the settings' seed, and -1 a random one.
        roles: the request's special tokens.
        constraint: restricts the tokens that may be drawn; None for no restriction.

    Attributes:
        seed: the seed in use; with it the same text is drawn again.
    """

    def __init__(
        self, settings: SamplingSettings, seed: int | None = None,
        roles: TokenRoles | None = None, constraint: Constraint | None = None,
    ) -> None:
        wanted = settings.seed if seed is None else seed
        self.seed = secrets.randbelow(MAX_SEED) if wanted < 0 else wanted
        self._settings = settings
        self._roles = roles = roles or TokenRoles()
        self._constraint = constraint
        self._banned_ids = np.array(roles.banned_ids, np.int64)
        self._early_bans = np.union1d(self._banned_ids, np.array(roles.end_ids, np.int64))
        self._allowed_ids = np.array(sorted(set(settings.allowed_tokens)), np.int64)
        self._num_drawn = 0
        self._breaker_ids = np.array(sorted(roles.breaker_ids), np.int64)
        self._prompt_ids = np.unique(np.array(roles.prompt_ids, np.int64))
        self._samplers = chosen_samplers(settings)
        self._feedback = chosen_feedback(settings)
        self._may_use_top_logits = (
            not settings.allowed_tokens and top_logits_may_suffice(settings, self._samplers)
        )
        # Philox gives the same numbers for the same seed on every machine and numpy version.
        self._random = np.random.Generator(np.random.Philox(self.seed))

    def copy(self) -> Sampler:
        """Return a sampler that continues from here, with the same random generator.

        A token that is drawn again must come from a new random number. The old one is known to
        lie in the interval of the token that was taken back, which would favour its neighbours.
        """
        other = copy.copy(self)
        other._feedback = tuple(map(copy.copy, self._feedback))
        if self._constraint is not None:
            other._constraint = self._constraint.copy()
        return other

    def sample(
        self, row: LogitsRow, history: npt.ArrayLike, excluded: Collection[int] = ()
    ) -> int:
        """Draw one token, unless the constraint forces one.

        Args:
            row: the logits, which are not changed. Its values are read only if its top logits
                do not determine the token.
            history: token ids so far, prompt included.
            excluded: ids that are not drawn this time.

        Returns:
            The token's id.

        Raises:
            InvalidCheckpoint: logits are NaN or infinite.
            NoTokenLeft: bans leave no token; the sampler has not changed.
            InvalidSettings: a grammar cannot be followed.
        """
        forced_id = None if self._constraint is None else self._constraint.forced_id
        if forced_id is None:
            token_id = self._draw(row, history, excluded)
        elif forced_id in excluded:
            raise NoTokenLeft("a token that is forced", expected="no ban", actual="a ban of it")
        else:
            token_id = forced_id
        if self._constraint is not None:
            self._constraint.accept(token_id)
        self._num_drawn += 1
        return token_id

    def _draw(
        self, row: LogitsRow, history: npt.ArrayLike, excluded: Collection[int]
    ) -> int:
        left = self.candidates(row, history, excluded)
        if self._settings.greedy:
            return int(left.ids[left.logits.argmax()])
        token_id = draw(left, self._random.random(), self._settings.skew)
        for feedback in self._feedback:
            feedback.observe(token_id)
        return token_id

    @property
    def is_forced(self) -> bool:
        """True if the constraint forces the next token."""
        return self._constraint is not None and self._constraint.forced_id is not None

    @property
    def complete(self) -> bool:
        """True if the constraint allows no further token."""
        return self._constraint is not None and self._constraint.complete

    def candidates(
        self, row: LogitsRow, history: npt.ArrayLike, excluded: Collection[int] = ()
    ) -> Candidates:
        """Return the candidates that `sample` draws from; XTC takes a random number in each call.

        Returns:
            Candidates, the softmax of whose logits is the distribution. For greedy settings,
            the token with the largest logit is taken. They may share memory with the row.
        """
        settings = self._settings
        past = Past(
            np.asarray(history, np.int64), settings.repetition_penalty_range,
            settings.repetition_decay, settings.dry_range,
        )
        if row.top_logits is not None and self._may_use(row.top_logits):
            try:
                return self._run(Candidates.from_top_logits(row.top_logits), past, excluded)
            except Undecided:
                pass
        values = row.values[: self._roles.vocab_size]
        _check_finite(values)
        candidates = Candidates.from_row(values)
        allowed = self._next_ids(len(values))
        if allowed is not None:
            candidates = candidates.take(allowed)
        return self._run(candidates, past, excluded)

    def _next_ids(self, vocab_size: int) -> Ids | None:
        """Return the tokens that grammar and `allowed_tokens` allow, rising; None for all.

        Raises:
            InvalidSettings: there is none.
        """
        by_grammar = self._ids_by_constraint()
        if not len(self._allowed_ids):
            return by_grammar
        allowed = self._allowed_ids[self._allowed_ids < vocab_size]
        if by_grammar is not None:
            allowed = np.intersect1d(allowed, by_grammar, assume_unique=True)
        if not len(allowed):
            raise InvalidSettings(
                "allowed_tokens", expected="a token that may come next", actual="none",
                remedy="Allow more tokens, or leave the grammar out",
            )
        return allowed

    def _ids_by_constraint(self) -> Ids | None:
        return None if self._constraint is None else self._constraint.allowed_ids

    def _may_use(self, top: TopLogits) -> bool:
        return (
            self._may_use_top_logits and top.vocab_size == self._roles.vocab_size
            and self._ids_by_constraint() is None
        )

    def _run(
        self, candidates: Candidates, past: Past, excluded: Collection[int]
    ) -> Candidates:
        """Apply all enabled samplers.

        Raises:
            Undecided: the candidates' tail matters; no state has changed.
        """
        settings = self._settings
        candidates = penalties.add_bias(candidates, settings.logit_bias)
        is_early = self._num_drawn < settings.min_new_tokens
        candidates = penalties.ban(candidates, self._early_bans if is_early else self._banned_ids)
        if excluded:
            candidates = penalties.ban(candidates, sorted(excluded))
        left = run_samplers(candidates, self._samplers, Step(
            settings, past, self._prompt_ids, self._breaker_ids, self._roles.spared_ids,
            self._random.random,
        ))
        for feedback in self._feedback:
            left = feedback.apply(left)
        return left.keep_from(math.inf) if left.tail is not None else left


def _check_finite(row: Floats) -> None:
    # max and min propagate NaN, so two passes without a copy find every bad value.
    if not (np.isfinite(row.max()) and np.isfinite(row.min())):
        raise InvalidCheckpoint(
            "logits", expected="finite numbers", actual="NaN or infinity",
            remedy="The weights are damaged, or overflow in float16: download them again",
        )


def _breaker_ids(texts: Iterable[str], tokenizer: Tokenizer | None) -> set[int]:
    if tokenizer is None:
        raise InvalidSettings(
            "dry_sequence_breakers", expected="none, because the model has no tokenizer",
            actual="text", remedy="Set dry_sequence_breakers to an empty list",
        )
    # Encoded after a letter, because many vocabularies have different tokens for the beginning
    # of a text. Of several tokens the last one counts.
    return {tokenizer.encode("a" + text, add_bos=False)[-1] for text in texts}
