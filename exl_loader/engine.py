"""The loaded model: what every host, from the command line to the web UI, talks to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from .errors import InvalidSettings, ModelUnloaded
from .generation import IdGeneration, TextGeneration
from .generator import Generator
from .grammar import Grammars
from .jobs import Job, NegativeText
from .logprobs import TokenLogprobs, token_logprobs
from .paging import PagedCache
from .progress import NullProgress, Progress
from .prompts import Prompt, PromptReader
from .sampling import Sampler, TokenRoles
from .settings import SamplingSettings
from .text_stream import TextStream

if TYPE_CHECKING:
    from .config import ModelConfig
    from .draft_model import DraftModel
    from .memory import Buffers
    from .model import Model
    from .reservation import Reservation
    from .tokenizer import Tokenizer

Settings = SamplingSettings | Mapping[str, Any] | None


class LoadedModel:
    """A model in memory, ready to generate. Made by `exl_loader.load()`.

    Every method may be called from any thread; generations of several threads share their
    forward passes, and each gives the text that it would give alone.

    Args:
        model: the forward pass.
        cache: its key/value cache.
        tokenizer: None where the folder has none; then ids work, and text does not.
        reservation: what was planned, and what it takes.
        buffers: all memory of the model.
        drafter: a smaller model that guesses ahead; None for none.

    Attributes:
        config: the model's configuration.
        ctx_size: tokens that prompt and answer may have together.
        eos_token_ids: ids that end a text.
    """

    def __init__(
        self,
        model: Model,
        cache: PagedCache,
        tokenizer: Tokenizer | None,
        reservation: Reservation,
        buffers: Buffers,
        drafter: DraftModel | None = None,
    ) -> None:
        self.config: ModelConfig = model.config
        self.reservation = reservation
        self.ctx_size: int = reservation.ctx_size
        self._generator = Generator(model, cache, drafter)
        self._max_batch_size: int = model.max_batch_size
        self._tokenizer = tokenizer
        self._prompts = PromptReader(self.config, tokenizer, self.ctx_size)
        self._buffers = buffers
        self._unloaded = False
        ids = set(self.config.eos_token_ids)
        if tokenizer is not None:
            ids.update(i for i in tokenizer.eos_token_ids if i < self.config.vocab_size)
        self.eos_token_ids = tuple(sorted(ids))
        self._grammars = Grammars(tokenizer, self._sampled_vocab_size(), self.eos_token_ids)

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unload()

    @property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer.

        Raises:
            InvalidTokenizer: the folder has none.
        """
        return self._prompts.tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """False where only token ids can be used."""
        return self._tokenizer is not None

    def encode(self, text: str, add_bos: bool | None = None, special: bool = True) -> list[int]:
        """Turn text into token ids; see `Tokenizer.encode`."""
        return self.tokenizer.encode(text, add_bos, special)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Turn token ids into text; see `Tokenizer.decode`."""
        return self.tokenizer.decode(ids, skip_special)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> str:
        """Write a conversation as a prompt; see `Tokenizer.apply_chat_template`."""
        return self.tokenizer.apply_chat_template(messages, **options)

    def chat_ids(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation written as a prompt, for `generate`."""
        return self.encode(self.apply_chat_template(messages, **options), add_bos=False)

    def generate(
        self, prompt: Prompt, settings: Settings = None, *, progress: Progress | None = None
    ) -> TextGeneration:
        """Continue a prompt.

        Args:
            prompt: text (encoded as the folder says, without an end token) or token ids.
            settings: `SamplingSettings`, or a dict with the web UI's names.
            progress: told about the prompt's tokens.

        Returns:
            An iterator of pieces of text, with `stop()`, `close()`, `stats`.

        Raises:
            InvalidSettings: a setting or a token id makes no sense, or the prompt is empty
                and the model has no BOS token to begin with.
            PromptTooLong: prompt and one new token exceed `ctx_size`.
            InvalidTokenizer: the model has no tokenizer.
            ModelUnloaded: after `unload`.
        """
        tokenizer = self.tokenizer
        chosen = SamplingSettings.from_dict(settings)
        stream = tokenizer.stream(chosen.skip_special_tokens)
        job = self._job(prompt, chosen, TextStream(stream, chosen.stop_strings), progress)
        return TextGeneration(self._generator, job)

    def generate_ids(
        self, prompt: Prompt, settings: Settings = None, *, progress: Progress | None = None
    ) -> IdGeneration:
        """Continue a prompt with token ids; like `generate`, and works without a tokenizer.

        Stop strings need one; the ids that made up a found one are given out.
        """
        chosen = SamplingSettings.from_dict(settings)
        text = None
        if chosen.stop_strings:
            stream = self.tokenizer.stream(chosen.skip_special_tokens)
            text = TextStream(stream, chosen.stop_strings)
        return IdGeneration(self._generator, self._job(prompt, chosen, text, progress))

    def stop(self) -> None:
        """End all running generations after the step that is running. Does not wait."""
        self._generator.cancel_all()

    def prompt_logits(self, ids: Iterable[int]) -> torch.Tensor:
        """Compute the logits behind every token of a prompt.

        Args:
            ids: 1 to `ctx_size` token ids, used as they are: no BOS token is added.

        Returns:
            float32 [T, vocab_size] on the CPU, memory of the caller's own.

        Raises:
            InvalidSettings: no ids, or an id outside the vocabulary.
            PromptTooLong: more than `ctx_size` ids.
            CacheFull: running generations leave too few pages.
            ModelUnloaded: after `unload`.
        """
        prompt_ids = self._whole_prompt(ids)
        result = torch.empty(len(prompt_ids), self.config.vocab_size)

        def keep(first: int, rows: torch.Tensor) -> None:
            result[first : first + len(rows)] = rows

        self._generator.evaluate(prompt_ids, len(prompt_ids), "all", keep)
        return result

    def next_logits(self, ids: Iterable[int], rope_len: int | None = None) -> torch.Tensor:
        """Compute the logits behind the last token of a text, for samplers of the host's own.

        What the cache holds of the text is reused, so a text that grows token by token costs
        a step each.

        Args:
            ids: 1 to `ctx_size` token ids, used as they are.
            rope_len: the length that the text is meant to reach; its own where None.

        Returns:
            float32 [vocab_size] on the CPU, memory of the caller's own.

        Raises:
            As `prompt_logits`.
        """
        prompt_ids = self._whole_prompt(ids)
        reach = min(max(len(prompt_ids), rope_len or 0), self.ctx_size)
        result = torch.empty(self.config.vocab_size)

        def keep(first: int, rows: torch.Tensor) -> None:
            result.copy_(rows[0])

        self._generator.evaluate(prompt_ids, reach, "last", keep)
        return result

    def prompt_logprobs(self, ids: Iterable[int], count: int = 0) -> list[TokenLogprobs | None]:
        """Compute how likely each token of a prompt was behind those before it.

        Args:
            ids: 1 to `ctx_size` token ids, used as they are.
            count: how many of the likeliest tokens to list for each place.

        Returns:
            One for each id; None for the first, which nothing comes before.

        Raises:
            As `prompt_logits`; no more than a few rows of logits exist at a time.
        """
        prompt_ids = self._whole_prompt(ids)
        if not isinstance(count, int) or count < 0:
            raise InvalidSettings("count", expected="0 or more tokens", actual=repr(count))
        vocab_size = self._sampled_vocab_size()
        result: list[TokenLogprobs | None] = [None]

        def note(first: int, rows: torch.Tensor) -> None:
            followers = prompt_ids[first + 1 : first + 1 + len(rows)]
            for row, token_id in zip(rows.numpy(), followers, strict=False):
                real = row if token_id >= vocab_size else row[:vocab_size]
                result.append(token_logprobs(real, token_id, count))

        self._generator.evaluate(prompt_ids, len(prompt_ids), "all", note)
        return result

    def _whole_prompt(self, ids: Iterable[int]) -> list[int]:
        self._check_loaded()
        prompt_ids = self._prompts.checked(ids)
        self._prompts.check_length(len(prompt_ids), len(prompt_ids))
        return prompt_ids

    def allocated_bytes(self) -> int:
        """Sum of the buffers that exist; equals the reservation's total while loaded."""
        return self._buffers.allocated_bytes()

    def unload(self) -> None:
        """End all generations and give the memory back. Twice does no harm.

        Waits for the step that is running. Generations that had not ended raise
        `ModelUnloaded`, as does every later use.
        """
        self._unloaded = True
        self._generator.close()
        self._buffers.release()

    def _check_loaded(self) -> None:
        if self._unloaded:
            raise ModelUnloaded("the model", actual="unloaded", remedy="Load it again")

    def _job(
        self, prompt: Prompt, settings: SamplingSettings, text: TextStream | None,
        progress: Progress | None,
    ) -> Job:
        self._check_loaded()
        prompt_ids = self._prompts.ids(prompt)
        self._prompts.check_length(len(prompt_ids), len(prompt_ids) + 1)
        self._prompts.check_range(settings.stop_token_ids, "stop_token_ids")
        self._prompts.check_range(settings.custom_token_bans, "custom_token_bans")
        self._prompts.check_range([token for token, _ in settings.logit_bias], "logit_bias")
        negative = self._negative_text(settings)
        longest = max(len(prompt_ids), len(negative.ids) if negative is not None else 0)
        new_tokens = min(settings.max_new_tokens, self.ctx_size - longest)
        if negative is not None:
            negative.max_tokens += new_tokens
        roles = TokenRoles.of_request(
            settings, self._tokenizer, vocab_size=self._sampled_vocab_size(),
            eos_ids=self.eos_token_ids, prompt_ids=prompt_ids,
        )
        return Job(
            prompt_ids=prompt_ids,
            settings=settings,
            sampler=Sampler(settings, roles=roles, constraint=self._grammars.matcher(settings)),
            eos_ids=frozenset(() if settings.ban_eos_token else self.eos_token_ids),
            max_tokens=len(prompt_ids) + new_tokens,
            text=text,
            progress=progress or NullProgress(),
            vocab_size=self._sampled_vocab_size(),
            negative=negative,
        )

    def _negative_text(self, settings: SamplingSettings) -> NegativeText | None:
        """Return what guidance needs besides the prompt; None without guidance."""
        if settings.guidance_scale == 1:
            return None
        if self._max_batch_size < 2:
            raise InvalidSettings(
                "guidance_scale", expected="1, because a pass has room for one sequence",
                actual=repr(settings.guidance_scale),
                remedy="Load the model with a max_batch_size of 2 or more",
            )
        ids = self._prompts.ids(settings.negative_prompt or [])
        self._prompts.check_length(len(ids), len(ids) + 1)
        return NegativeText(ids, max_tokens=len(ids))

    def _sampled_vocab_size(self) -> int:
        """Ids from here on stand for nothing: many models pad their vocabulary."""
        size = self.config.vocab_size
        return size if self._tokenizer is None else min(size, self._tokenizer.vocab_size)
