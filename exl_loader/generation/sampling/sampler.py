"""Draws the tokens of one request."""

from __future__ import annotations

import math
import secrets
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...utils.errors import InvalidCheckpoint
from ..settings import MAX_SEED, SamplingSettings
from . import penalties
from .candidates import Candidates, draw
from .feedback import feedback_of
from .penalties import Past
from .pipeline import Step, chosen_stages, may_do_without_rest, run_stages
from .rest import Undecided
from .tokens import TokenRoles
from .values import Floats, Ids


class Constraint(Protocol):
    """Says from step to step which tokens may come, as a grammar does.

    Attributes:
        allowed_ids: int64, rising; at least one before the end.
        complete: nothing can be added.
    """

    allowed_ids: Ids
    complete: bool

    def accept(self, token_id: int) -> None:
        """Go on with a token that was drawn."""


class Sampler:
    """Draws the tokens of one request, with a generator and a state of its own.

    Args:
        settings: how to draw.
        seed: of the generator; where None, the settings' one, or a random one for -1.
        roles: what must be known of the vocabulary and the prompt.
        constraint: what alone may be drawn; None for everything.

    Attributes:
        seed: the seed in use, for drawing the same text again.
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
        self._breaker_ids = np.array(sorted(roles.breaker_ids), np.int64)
        self._prompt_ids = np.unique(np.array(roles.prompt_ids, np.int64))
        self._stages = chosen_stages(settings)
        self._feedback = feedback_of(settings)
        self._may_do_without_rest = (
            constraint is None and may_do_without_rest(settings, self._stages)
        )
        # Philox: the same numbers for the same seed on every machine and numpy version.
        self._random = np.random.Generator(np.random.Philox(self.seed))

    def sample(self, logits: npt.ArrayLike, history: npt.ArrayLike) -> int:
        """Draw one token.

        Args:
            logits: float32 [vocab_size] on the CPU, left as it is; or a `LazyRow`, which is
                looked at only where its likeliest tokens do not decide. The token is the same.
            history: token ids so far, prompt included.

        Raises:
            InvalidCheckpoint: logits are NaN or infinite.
            InvalidSettings: bans leave no token, or a grammar cannot be followed.
        """
        left = self.candidates(logits, history)
        if self._settings.greedy:
            token_id = int(left.ids[left.logits.argmax()])
        else:
            token_id = draw(left, self._random.random())
            for feedback in self._feedback:
                feedback.observe(token_id)
        if self._constraint is not None:
            self._constraint.accept(token_id)
        return token_id

    @property
    def complete(self) -> bool:
        """True where the constraint lets nothing more be drawn."""
        return self._constraint is not None and self._constraint.complete

    def candidates(self, logits: npt.ArrayLike, history: npt.ArrayLike) -> Candidates:
        """What `sample` draws from; each call may take a random number (XTC).

        Returns:
            Candidates whose logits' softmax is the distribution; for greedy settings, those
            whose largest logit is taken. They may share memory with `logits`.
        """
        past = Past(np.asarray(history, np.int64), self._settings.repetition_penalty_range)
        likeliest = getattr(logits, "likeliest", None)
        if likeliest is not None and self._suits(likeliest):
            try:
                return self._run(likeliest, past)
            except Undecided:
                pass
        row = np.asarray(logits, dtype=np.float32)[: self._roles.vocab_size]
        _check_finite(row)
        candidates = Candidates.of_row(row)
        if self._constraint is not None:
            candidates = candidates.take(self._constraint.allowed_ids)
        return self._run(candidates, past)

    def _suits(self, likeliest: Candidates) -> bool:
        return self._may_do_without_rest and likeliest.num_tokens == self._roles.vocab_size

    def _run(self, candidates: Candidates, past: Past) -> Candidates:
        """Apply everything that the settings ask for.

        Raises:
            Undecided: the rest of the candidates matters; nothing has changed.
        """
        settings = self._settings
        candidates = penalties.add_bias(candidates, settings.logit_bias)
        candidates = penalties.ban(candidates, self._banned_ids)
        left = run_stages(candidates, self._stages, Step(
            settings, past, self._prompt_ids, self._breaker_ids, self._roles.spared_ids,
            self._random.random,
        ))
        for feedback in self._feedback:
            left = feedback.apply(left)
        return left.keep_from(math.inf) if left.rest is not None else left


def _check_finite(row: Floats) -> None:
    # NaN is the largest and the smallest of all, so two passes without a copy find everything.
    if not (np.isfinite(row.max()) and np.isfinite(row.min())):
        raise InvalidCheckpoint(
            "logits", expected="finite numbers", actual="NaN or infinity",
            remedy="The weights are damaged, or overflow in float16: download them again",
        )
