"""Turns what a caller asks for into a job: checks prompt and settings against the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..text.tokenizer import no_tokenizer
from ..utils.errors import InvalidSettings, PromptTooLong, shown
from ..utils.progress import Progress, checked_progress
from ..utils.setting_values import whole_numbers
from .forward_model import LogitsRow
from .grammar.masks import Grammars
from .healing import HealedToken, TokenHealing
from .jobs import Job, NegativeText
from .reasoning import ReasoningBudget
from .rewind import Rewind
from .sampling import Sampler, TokenRoles
from .settings import SamplingSettings
from .text_rules import TextRules
from .text_stream import TextStream, spellings

if TYPE_CHECKING:
    from ..checkpoint.config import ModelConfig
    from ..text.tokenizer import Tokenizer

Prompt = str | Iterable[int]


class RequestReader:
    """Makes the jobs of one model. Every method may be called from any thread.

    Args:
        config: the model's configuration.
        tokenizer: None if the folder has none; then ids can be used and text cannot.
        ctx_size: number of tokens that prompt and answer may have together.
        max_batch_size: most sequences in one pass.

    Attributes:
        eos_token_ids: ids that end a text.
        sampled_vocab_size: ids from here on are padding, which many models have.
    """

    def __init__(
        self, config: ModelConfig, tokenizer: Tokenizer | None, ctx_size: int, max_batch_size: int
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._ctx_size = ctx_size
        self._max_batch_size = max_batch_size
        self.sampled_vocab_size: int = config.vocab_size
        ids = set(config.eos_token_ids)
        if tokenizer is not None:
            ids = {i for i in tokenizer.stop_ids(ids) if i < config.vocab_size}
            self.sampled_vocab_size = min(config.vocab_size, tokenizer.vocab_size)
        self.eos_token_ids = tuple(sorted(ids))
        self._grammars = Grammars(tokenizer, self.sampled_vocab_size, self.eos_token_ids)
        self._healing = TokenHealing(tokenizer, self.sampled_vocab_size, self.eos_token_ids)

    @property
    def has_tokenizer(self) -> bool:
        """False if only token ids can be used."""
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            InvalidTokenizer: it has none.
        """
        if self._tokenizer is None:
            raise no_tokenizer("the model's tokenizer")
        return self._tokenizer

    def whole_prompt(self, ids: Iterable[int]) -> list[int]:
        """Check ids that will be evaluated and not continued.

        Raises:
            InvalidSettings: there are none, or one is outside the vocabulary.
            PromptTooLong: they do not fit into the context.
        """
        prompt_ids = self._checked(ids)
        self._check_length(len(prompt_ids), len(prompt_ids))
        return prompt_ids

    def filtered(
        self, values: npt.NDArray[np.float32], prompt_ids: Sequence[int],
        settings: SamplingSettings,
    ) -> npt.NDArray[np.float32]:
        """Apply the samplers of a request to a row of logits, without its grammar.

        Strings do not count either: neither `stop_strings` nor `banned_strings`.

        Args:
            values: float32 [vocab_size], which are not changed.
            prompt_ids: the text so far.
            settings: the request's settings.

        Returns:
            float32 [vocab_size], a new array; -inf for tokens that cannot be drawn.

        Raises:
            InvalidSettings: bans leave no token, or DRY has breakers, which are text, and the
                model has no tokenizer.
        """
        sampler = Sampler(settings, roles=self._roles(settings, prompt_ids))
        left = sampler.candidates(LogitsRow(values), prompt_ids)
        result = np.full_like(values, -np.inf)
        result[left.ids] = left.logits
        return result

    def job(
        self, prompt: Prompt, settings: SamplingSettings, progress: Progress | None,
        as_text: bool,
    ) -> Job:
        """Make a job that continues a prompt.

        Args:
            prompt: text or token ids.
            settings: how to continue it.
            progress: reports the number of evaluated prompt tokens; None for no reports.
            as_text: decode the new tokens; stop strings and banned strings always need that.

        Raises:
            As `engine.LoadedModel.generate`.
        """
        as_text = as_text or bool(settings.stop_strings or settings.banned_strings)
        tokenizer = self.tokenizer if as_text else None
        prompt_ids = self._ids(prompt)
        self._check_length(len(prompt_ids), len(prompt_ids) + 1)
        self._check_range(settings.stop_token_ids, "stop_token_ids")
        self._check_range(settings.allowed_tokens, "allowed_tokens")
        self._check_range(settings.custom_token_bans, "custom_token_bans")
        self._check_range([token for token, _ in settings.logit_bias], "logit_bias")
        # The answer continues a prompt that is text, and one whose last token is healed. After
        # other ids, as from a chat template, it is a text of its own.
        healed = self._healing.find(prompt_ids) if settings.token_healing else None
        continued_ids = prompt_ids if isinstance(prompt, str) or healed is not None else ()
        text = rewind = None
        if tokenizer is not None:
            stream = tokenizer.stream(
                settings.skip_special_tokens, continued_ids, _num_bytes(healed))
            text = TextStream(stream, settings.stop_strings)
            if settings.banned_strings:
                rewind = Rewind(spellings(stream, settings.banned_strings))
        rules = self._rules(settings, prompt_ids, healed, bool(continued_ids))
        if healed is not None:
            prompt_ids = prompt_ids[:-1]
            settings = replace(
                settings, max_new_tokens=settings.max_new_tokens + 1,
                min_new_tokens=settings.min_new_tokens + 1,
            )
        negative = self._negative_text(settings)
        longest = max(len(prompt_ids), len(negative.ids) if negative is not None else 0)
        new_tokens = min(settings.max_new_tokens, self._ctx_size - longest)
        if negative is not None:
            negative.max_tokens += new_tokens
        return Job(
            prompt_ids=prompt_ids,
            settings=settings,
            sampler=Sampler(
                settings, roles=self._roles(settings, prompt_ids), constraint=rules,
            ),
            eos_ids=frozenset(() if settings.ban_eos_token else self.eos_token_ids),
            max_tokens=len(prompt_ids) + new_tokens,
            text=text,
            rewind=rewind,
            progress=checked_progress(progress),
            vocab_size=self.sampled_vocab_size,
            negative=negative,
        )

    def text_stream(
        self, prompt_ids: Sequence[int], stop_strings: Sequence[str], skip_special: bool,
        token_healing: bool,
    ) -> TextStream:
        """Make a decoder of an answer; see `engine.LoadedModel.text_stream`."""
        healed = self._healing.find(prompt_ids) if token_healing and prompt_ids else None
        stream = self.tokenizer.stream(skip_special, prompt_ids, _num_bytes(healed))
        return TextStream(stream, stop_strings)

    def _rules(
        self, settings: SamplingSettings, prompt_ids: Sequence[int], healed: HealedToken | None,
        continues_text: bool,
    ) -> TextRules | None:
        """Return what restricts the tokens of an answer; None for nothing."""
        before = "" if healed is None else healed.text
        grammar = self._grammars.constraint(settings, continues_text, before)
        budget = None
        if settings.reasoning_budget_tokens >= 0:
            budget = ReasoningBudget(settings, self.tokenizer, prompt_ids)
        if healed is None and budget is None and grammar is None:
            return None
        return TextRules(healed, budget, grammar)

    def _roles(self, settings: SamplingSettings, prompt_ids: Sequence[int]) -> TokenRoles:
        return TokenRoles.from_request(
            settings, self._tokenizer, vocab_size=self.sampled_vocab_size,
            eos_ids=self.eos_token_ids, prompt_ids=prompt_ids,
        )

    def _negative_text(self, settings: SamplingSettings) -> NegativeText | None:
        """Return the negative prompt of guidance; None without guidance."""
        if settings.guidance_scale == 1:
            return None
        if self._max_batch_size < 2:
            raise InvalidSettings(
                "guidance_scale", expected="1, because a pass has room for one sequence",
                actual=settings.guidance_scale,
                remedy="Load the model with a max_batch_size of 2 or more",
            )
        ids = self._ids(settings.negative_prompt or [])
        self._check_length(len(ids), len(ids) + 1, "negative_prompt")
        return NegativeText(ids, max_tokens=len(ids))

    def _ids(self, prompt: Prompt) -> list[int]:
        """Encode a prompt, or check its ids; an empty one becomes the BOS token.

        Raises:
            InvalidSettings: a token id is invalid, or there are none and the model has no BOS
                token.
            InvalidTokenizer: the prompt is text, and the model has no tokenizer.
        """
        if isinstance(prompt, str):
            tokenizer = self.tokenizer
            ids = tokenizer.prompt_ids(prompt)
            bos_id = tokenizer.bos_token_id
        else:
            ids = whole_numbers("prompt", prompt, "text or token ids")
            bos_id = None
        if bos_id is None:
            bos_id = self._config.bos_token_id
        if not ids and bos_id is not None:
            ids = [bos_id]
        return self._checked(ids)

    def _checked(self, ids: Iterable[int]) -> list[int]:
        """Convert integers, numpy's and PyTorch's included, to a list of valid token ids.

        Raises:
            InvalidSettings: there are none, or one is invalid.
        """
        checked = whole_numbers("prompt", ids, "text or token ids")
        if not checked:
            raise InvalidSettings("prompt", expected="at least one token", actual="none",
                                  remedy="Write something to continue")
        self._check_range(checked, "token ids")
        return checked

    def _check_range(self, ids: Sequence[int], name: str) -> None:
        """Raise InvalidSettings with this name if an id is outside the vocabulary."""
        if ids and not (min(ids) >= 0 and max(ids) < self._config.vocab_size):
            raise InvalidSettings(
                name, expected=f"0 to {self._config.vocab_size - 1}",
                actual=f"{shown(min(ids))} to {shown(max(ids))}",
                remedy="They may come from another model's tokenizer",
            )

    def _check_length(self, prompt_len: int, needed: int, name: str = "the prompt") -> None:
        """Raise PromptTooLong with this name if `needed` tokens exceed the context."""
        if needed > self._ctx_size:
            new_tokens = needed - prompt_len
            room = " and a new one" if new_tokens else ""
            raise PromptTooLong(
                name, expected=f"at most {self._ctx_size - new_tokens} tokens{room} in a "
                f"ctx_size of {self._ctx_size}",
                actual=f"{prompt_len} tokens",
                remedy="Shorten it, or load the model with a larger ctx_size",
            )


def _num_bytes(healed: HealedToken | None) -> int:
    return 0 if healed is None else healed.num_bytes
