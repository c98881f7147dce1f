"""From what a caller asks to a job: prompt, settings and what they mean for this model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..utils.errors import InvalidSettings
from ..utils.progress import Progress, checked_progress
from .grammar.masks import Grammars
from .jobs import Job, NegativeText
from .prompts import Prompt, PromptReader
from .sampling import Sampler, TokenRoles
from .settings import SamplingSettings
from .text_stream import TextStream

if TYPE_CHECKING:
    from ..checkpoint.config import ModelConfig
    from ..text.tokenizer import Tokenizer


class RequestReader:
    """Makes the jobs of one model. Every method may be called from any thread.

    Args:
        config: the model's.
        tokenizer: None where the folder has none; then ids work, and text does not.
        ctx_size: tokens that prompt and answer may have together.
        max_batch_size: sequences that a pass has room for.

    Attributes:
        eos_token_ids: ids that end a text.
        sampled_vocab_size: ids from here on stand for nothing: many models pad their vocabulary.
    """

    def __init__(
        self, config: ModelConfig, tokenizer: Tokenizer | None, ctx_size: int, max_batch_size: int
    ) -> None:
        self._ctx_size = ctx_size
        self._max_batch_size = max_batch_size
        self._tokenizer = tokenizer
        self._prompts = PromptReader(config, tokenizer, ctx_size)
        self.sampled_vocab_size: int = config.vocab_size
        ids = set(config.eos_token_ids)
        if tokenizer is not None:
            ids = {i for i in tokenizer.stop_ids(ids) if i < config.vocab_size}
            self.sampled_vocab_size = min(config.vocab_size, tokenizer.vocab_size)
        self.eos_token_ids = tuple(sorted(ids))
        self._grammars = Grammars(tokenizer, self.sampled_vocab_size, self.eos_token_ids)

    @property
    def has_tokenizer(self) -> bool:
        """False where only token ids can be used."""
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            InvalidTokenizer: it has none.
        """
        return self._prompts.tokenizer

    def whole_prompt(self, ids: Iterable[int]) -> list[int]:
        """Check ids that are to be evaluated and not continued.

        Raises:
            InvalidSettings: there are none, or one is outside the vocabulary.
            PromptTooLong: they do not fit into the context.
        """
        prompt_ids = self._prompts.checked(ids)
        self._prompts.check_length(len(prompt_ids), len(prompt_ids))
        return prompt_ids

    def sampler(self, prompt_ids: Sequence[int], settings: SamplingSettings) -> Sampler:
        """Make the sampler of a text, without a grammar.

        Raises:
            InvalidSettings: DRY has breakers, which are text, and the model has no tokenizer.
        """
        roles = TokenRoles.of_request(
            settings, self._tokenizer, vocab_size=self.sampled_vocab_size,
            eos_ids=self.eos_token_ids, prompt_ids=prompt_ids,
        )
        return Sampler(settings, roles=roles)

    def job(
        self, prompt: Prompt, settings: SamplingSettings, progress: Progress | None,
        as_text: bool,
    ) -> Job:
        """Make a job that continues a prompt.

        Args:
            as_text: decode what is drawn; stop strings have it decoded in any case.

        Raises:
            As `engine.LoadedModel.generate`.
        """
        tokenizer = self.tokenizer if as_text or settings.stop_strings else None
        prompt_ids = self._prompts.ids(prompt)
        self._prompts.check_length(len(prompt_ids), len(prompt_ids) + 1)
        self._prompts.check_range(settings.stop_token_ids, "stop_token_ids")
        self._prompts.check_range(settings.custom_token_bans, "custom_token_bans")
        self._prompts.check_range([token for token, _ in settings.logit_bias], "logit_bias")
        # Behind a text the answer goes on from its last character; behind ids, as a template
        # writes them, it is a text of its own.
        behind = prompt_ids if isinstance(prompt, str) else ()
        text = None
        if tokenizer is not None:
            stream = tokenizer.stream(settings.skip_special_tokens, behind)
            text = TextStream(stream, settings.stop_strings)
        negative = self._negative_text(settings)
        longest = max(len(prompt_ids), len(negative.ids) if negative is not None else 0)
        new_tokens = min(settings.max_new_tokens, self._ctx_size - longest)
        if negative is not None:
            negative.max_tokens += new_tokens
        roles = TokenRoles.from_request(
            settings, self._tokenizer, vocab_size=self.sampled_vocab_size,
            eos_ids=self.eos_token_ids, prompt_ids=prompt_ids,
        )
        return Job(
            prompt_ids=prompt_ids,
            settings=settings,
            sampler=Sampler(
                settings, roles=roles,
                constraint=self._grammars.matcher(settings, goes_on=bool(behind)),
            ),
            eos_ids=frozenset(() if settings.ban_eos_token else self.eos_token_ids),
            max_tokens=len(prompt_ids) + new_tokens,
            text=text,
            progress=checked_progress(progress),
            vocab_size=self.sampled_vocab_size,
            negative=negative,
        )

    def _negative_text(self, settings: SamplingSettings) -> NegativeText | None:
        """Return what guidance needs besides the prompt; None without guidance."""
        if settings.guidance_scale == 1:
            return None
        if self._max_batch_size < 2:
            raise InvalidSettings(
                "guidance_scale", expected="1, because a pass has room for one sequence",
                actual=settings.guidance_scale,
                remedy="Load the model with a max_batch_size of 2 or more",
            )
        ids = self._prompts.ids(settings.negative_prompt or [])
        self._prompts.check_length(len(ids), len(ids) + 1, "negative_prompt")
        return NegativeText(ids, max_tokens=len(ids))
