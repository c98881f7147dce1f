"""Tokens that play a part in sampling, found out once a request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...utils.errors import InvalidSettings
from ..settings import SamplingSettings

if TYPE_CHECKING:
    from ...text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenRoles:
    """What a sampler must know of the vocabulary and the request.

    Args:
        vocab_size: tokens from this id on are padding and never drawn; None where all are
            real.
        banned_ids: tokens that are never drawn.
        prompt_ids: what `encoder_repetition_penalty` looks at.
        spared_ids: tokens that XTC leaves alone.
        breaker_ids: tokens that end a repeat for DRY.
    """

    vocab_size: int | None = None
    banned_ids: tuple[int, ...] = ()
    prompt_ids: Sequence[int] = ()
    spared_ids: frozenset[int] = frozenset()
    breaker_ids: frozenset[int] = frozenset()

    @classmethod
    def of_request(
        cls, settings: SamplingSettings, tokenizer: Tokenizer | None, *,
        vocab_size: int, eos_ids: Iterable[int], prompt_ids: Sequence[int],
    ) -> TokenRoles:
        """Look the tokens up.

        Args:
            eos_ids: the model's end tokens.

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
            prompt_ids=prompt_ids if settings.encoder_repetition_penalty != 1 else (),
            spared_ids=frozenset(spared),
            breaker_ids=frozenset(breakers),
        )


def _breaker_ids(texts: Iterable[str], tokenizer: Tokenizer | None) -> set[int]:
    if tokenizer is None:
        raise InvalidSettings(
            "dry_sequence_breakers", expected="none, because the model has no tokenizer",
            actual="text", remedy="Set dry_sequence_breakers to an empty list",
        )
    # Behind a letter, because that is where breakers stand in a text: many vocabularies have
    # other tokens for a text's beginning. Of several tokens the last one counts.
    return {tokenizer.encode("a" + text, add_bos=False)[-1] for text in texts}
