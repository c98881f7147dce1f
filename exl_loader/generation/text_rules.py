"""What says which tokens an answer may have, before any sampler does: see `TextRules`."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np

from .healing import HealedToken
from .reasoning import ReasoningBudget
from .sampling.numerics import Ids

if TYPE_CHECKING:
    from .grammar.masks import GrammarMatcher, TriggeredGrammar


class TextRules:
    """The state of one answer's rules; it implements `sampling.sampler.Constraint`.

    The first token may have to heal the prompt. A grammar that waits for a token ends the
    reasoning budget when it begins, because tags in its text are text.

    Args:
        healed: the token of the prompt that is drawn anew; None for none.
        budget: ends the reasoning; None for no limit.
        grammar: what the text follows; None for none. With a budget it waits for a token.
    """

    def __init__(
        self, healed: HealedToken | None, budget: ReasoningBudget | None,
        grammar: GrammarMatcher | TriggeredGrammar | None,
    ) -> None:
        self._healed = healed
        self._budget = budget
        self._grammar = grammar

    @property
    def forced_id(self) -> int | None:
        """The token that comes next, whatever the samplers say; None if one is to be drawn."""
        if self._healed is not None or self._budget is None:
            return None
        return self._budget.forced_id

    @property
    def allowed_ids(self) -> Ids | None:
        """The tokens that may come next, int64, rising; None for all."""
        by_grammar = None if self._grammar is None else self._grammar.allowed_ids
        if self._healed is None:
            return by_grammar
        if by_grammar is None:
            return self._healed.allowed_ids
        both = np.intersect1d(self._healed.allowed_ids, by_grammar, assume_unique=True)
        # Where a grammar leaves no choice, llguidance allows one of the tokens that spell it,
        # which may be shorter than the healed one.
        return both if len(both) else np.array([self._healed.token_id], np.int64)

    @property
    def complete(self) -> bool:
        """True if the text cannot be continued."""
        return self._grammar is not None and self._grammar.complete

    def accept(self, token_id: int) -> None:
        """Advance by a token; see `GrammarMatcher.accept`."""
        if self._grammar is not None:
            self._grammar.accept(token_id)
        if self._budget is None:
            pass
        elif self._grammar is not None and self._grammar.has_begun:
            self._budget = None
        elif self.forced_id is not None:
            self._budget.take_forced()
        else:
            self._budget.observe(token_id)
        self._healed = None

    def copy(self) -> TextRules:
        """Return rules that continue from here on their own."""
        other = copy.copy(self)
        other._budget = copy.copy(self._budget)
        other._grammar = None if self._grammar is None else self._grammar.copy()
        return other
