"""Whether a text follows a grammar, token by token; for tests that need llguidance."""

from __future__ import annotations

import functools

from exl_loader.generation.grammar import Grammars
from exl_loader.settings import SamplingSettings


@functools.cache
def grammars_of(tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)


def matcher_of(tokenizer, **settings):
    return grammars_of(tokenizer).matcher(SamplingSettings.from_dict(settings))


def follows(tokenizer, text: str, **settings) -> bool:
    """Whether a text, one token a byte, is one of the grammar's from beginning to end."""
    matcher = matcher_of(tokenizer, **settings)
    for token_id in tokenizer.encode(text, add_bos=False):
        if matcher.complete or token_id not in matcher.allowed_ids:
            return False
        matcher.accept(token_id)
    return matcher.complete or tokenizer.eos_token_id in matcher.allowed_ids
