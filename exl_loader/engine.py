"""The loaded model, which command line, page and web UI use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .backends import backend_of
from .cache.paging import PagedCache
from .checkpoint.adapter import Adapter
from .generation.generator import (
    AsyncIdGeneration,
    AsyncTextGeneration,
    Generator,
    IdGeneration,
    TextGeneration,
)
from .generation.logprobs import TokenLogprobs, token_logprobs
from .generation.request import Prompt, RequestReader
from .generation.settings import SamplingSettings
from .generation.text_stream import TextStream
from .memory.reservation.options import MAX_SCALING
from .model.forward import Model
from .text.chat.fitting import FittedMessages, context_notice, fit_messages
from .utils.errors import InsufficientMemory, InvalidCall, is_out_of_memory
from .utils.progress import Progress
from .utils.setting_values import check_integer, check_number, check_path, plain
from .utils.table import MAIN_MEMORY

if TYPE_CHECKING:
    from .checkpoint.config import ModelConfig
    from .generation.draft_model import DraftModel
    from .generation.forward_model import ForwardModel
    from .generation.jobs import Job
    from .memory.buffers import Buffers
    from .memory.reservation import Reservation
    from .model.adapters import LoadedLora
    from .other_machines import OtherMachines
    from .text.tokenizer import Tokenizer

Settings = SamplingSettings | Mapping[str, Any] | None
T = TypeVar("T")


def _release(buffers: Buffers, others: OtherMachines | None) -> None:
    buffers.release()
    if others is not None:
        others.unload()


class LoadedModel:
    """A model in memory, ready to generate. Made by `exl_loader.load()`.

    Every method may be called from any thread. Generations of several threads share forward
    passes, and each one yields the same text as it would alone.

    Args:
        model: the forward pass.
        cache: its key/value cache.
        tokenizer: None if the folder has none; then ids can be used and text cannot.
        reservation: the planned memory.
        buffers: the allocated memory.
        draft_model: None for none.
        others: the machines that have the layers after those of `model`; None for none.

    Attributes:
        config: the model's configuration.
        reservation: the planned memory.
        ctx_size: number of tokens that prompt and answer may have together.
        eos_token_ids: ids that end a text.
    """

    def __init__(
        self,
        model: Model,
        cache: PagedCache,
        tokenizer: Tokenizer | None,
        reservation: Reservation,
        buffers: Buffers,
        draft_model: DraftModel | None = None,
        others: OtherMachines | None = None,
    ) -> None:
        self.config: ModelConfig = model.config
        self.reservation = reservation
        self.ctx_size: int = reservation.ctx_size
        self._generator = Generator(
            model, cache, draft_model, partial(_release, buffers, others)
        )
        self._requests = RequestReader(
            self.config, tokenizer, self.ctx_size, model.max_batch_size
        )
        self.eos_token_ids: tuple[int, ...] = self._requests.eos_token_ids
        model.sampled_vocab_size = self._requests.sampled_vocab_size
        self._buffers, self._others = buffers, others
        self._loras = model.loras

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
        return self._requests.tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """False if only token ids can be used."""
        return self._requests.has_tokenizer

    @property
    def tokenizer_warning(self) -> str:
        """The warning to show for a model without a tokenizer; empty if it has one."""
        if self.has_tokenizer:
            return ""
        return (
            "This model has no tokenizer files, so it cannot read or write text. Copy the "
            "tokenizer files of the original model into its folder, and load it again."
        )

    def encode(self, text: str, add_bos: bool | None = None, special: bool = True) -> list[int]:
        """Encode text to token ids; see `Tokenizer.encode`."""
        return self.tokenizer.encode(text, add_bos, special)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Decode token ids to text; see `Tokenizer.decode`."""
        return self.tokenizer.decode(ids, skip_special)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> str:
        """Format a conversation as a prompt; see `Tokenizer.apply_chat_template`."""
        return self.tokenizer.apply_chat_template(messages, **options)

    def chat_ids(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Format a conversation as a prompt and return its token ids, for `generate`."""
        text = self.apply_chat_template(messages, **options)
        return self.tokenizer.prompt_ids(text, add_bos=False)

    def fit_messages(
        self, messages: Sequence[Mapping[str, str]], max_new_tokens: int, *, system: str = "",
        continue_final_message: bool = False,
    ) -> FittedMessages:
        """Format a conversation as a prompt that leaves room for an answer.

        If the context is too short for all messages, the oldest ones are left out.

        Args:
            messages: questions and answers in turn, a question last.
            max_new_tokens: most tokens of the answer.
            system: the system message, which always stays; empty for none.
            continue_final_message: an answer is last, and the model continues it.

        Returns:
            The prompt's ids, the number of omitted messages, and a notice about them.
        """
        first = [{"role": "system", "content": system}] if system else []

        def prompt_ids(some: Sequence[Mapping[str, str]]) -> list[int]:
            return self.chat_ids(
                [*first, *some], continue_final_message=continue_final_message)

        kept = 2 if continue_final_message else 1
        return fit_messages(messages, prompt_ids, self.ctx_size, max_new_tokens, kept)

    def context_notice(self, new_tokens: int, ctx_size: int | None = None) -> str:
        """Return the notice that an answer ended because the context is full.

        Args:
            new_tokens: number of tokens of the answer.
            ctx_size: number of tokens that prompt and answer could have together; None for the
                whole context.
        """
        return context_notice(self.ctx_size if ctx_size is None else ctx_size, new_tokens)

    def text_stream(
        self, prompt_ids: Sequence[int] = (), *, stop_strings: Sequence[str] = (),
        skip_special_tokens: bool = True, token_healing: bool = False,
    ) -> TextStream:
        """Make a decoder for ids that arrive one by one, as from `generate_ids`.

        Args:
            prompt_ids: the ids that the text continues; empty for a text of its own.
            stop_strings: texts that end the text.
            skip_special_tokens: do not show special tokens.
            token_healing: the first id takes the place of the last one of `prompt_ids`, which
                are those of the request, and only the text that it adds is shown.

        Raises:
            InvalidTokenizer: the model has no tokenizer.
            InvalidSettings: its tokens cannot be healed.
        """
        return self._requests.text_stream(
            prompt_ids, stop_strings, skip_special_tokens, token_healing)

    def generate(
        self, prompt: Prompt, settings: Settings = None, *, progress: Progress | None = None,
        **more_settings: Any,
    ) -> TextGeneration:
        """Continue a prompt.

        Args:
            prompt: text, which is encoded by the folder's tokenizer, or token ids.
            settings: `SamplingSettings`, or a dict with the web UI's names.
            progress: reports the number of evaluated prompt tokens, in the model's thread.
            more_settings: settings by name, such as `max_new_tokens=5`; they override
                `settings`.

        Returns:
            An iterator of pieces of text, with `stop()`, `close()`, `stats`. The pieces continue
            a prompt that is text. After ids they are a text of their own, without the space
            that some tokenizers put before every text.

        Raises:
            InvalidSettings: a setting or a token id is invalid, or the prompt is empty and the
                model has no BOS token.
            PromptTooLong: prompt and one new token exceed `ctx_size`.
            InvalidTokenizer: the model has no tokenizer.
            ModelUnloaded: after `unload`, or (ModelForked) in a process that was forked from
                the one that loaded the model.
        """
        job = self._job(prompt, settings, progress, more_settings, as_text=True)
        return TextGeneration(self._generator, job)

    def generate_ids(
        self, prompt: Prompt, settings: Settings = None, *, progress: Progress | None = None,
        **more_settings: Any,
    ) -> IdGeneration:
        """Continue a prompt with token ids; as `generate`, but without a tokenizer.

        Stop strings and banned strings need a tokenizer. The ids of a stop string that was found
        are yielded.
        """
        job = self._job(prompt, settings, progress, more_settings, as_text=False)
        return IdGeneration(self._generator, job)

    def agenerate(
        self, prompt: Prompt, settings: Settings = None, *, progress: Progress | None = None,
        **more_settings: Any,
    ) -> AsyncTextGeneration:
        """Continue a prompt in an event loop: `async for piece in model.agenerate(...)`.

        As `generate`, but no thread waits for the pieces. The call itself encodes the prompt; a
        long one can be encoded elsewhere and given as ids.

        Returns:
            An asynchronous iterator of pieces of text, with `stop()`, `aclose()`, `stats`. It
            ends when it is closed or dropped, and when a task that waits for a piece is
            cancelled.
        """
        job = self._job(prompt, settings, progress, more_settings, as_text=True)
        return AsyncTextGeneration(self._generator, job)

    def agenerate_ids(
        self, prompt: Prompt, settings: Settings = None, *, progress: Progress | None = None,
        **more_settings: Any,
    ) -> AsyncIdGeneration:
        """Continue a prompt with token ids in an event loop; as `agenerate` and `generate_ids`."""
        job = self._job(prompt, settings, progress, more_settings, as_text=False)
        return AsyncIdGeneration(self._generator, job)

    def _job(
        self, prompt: Prompt, settings: Settings, progress: Progress | None,
        more_settings: Mapping[str, Any], as_text: bool,
    ) -> Job:
        self._generator.check()
        chosen = SamplingSettings.from_dict(settings, **more_settings)
        return self._requests.job(prompt, chosen, progress, as_text)

    def stop(self) -> None:
        """End all generations after the running step. Does not wait."""
        self._generator.cancel_all()

    def prompt_logits(self, ids: Iterable[int]) -> torch.Tensor:
        """Compute the logits after every token of a prompt.

        Args:
            ids: 1 to `ctx_size` token ids, used as they are: no BOS token is added.

        Returns:
            float32 [T, vocab_size] on the CPU, a new tensor.

        Raises:
            InvalidSettings: no ids, or an id outside the vocabulary.
            PromptTooLong: more than `ctx_size` ids.
            InsufficientMemory: the logits do not fit into the free main memory.
            CacheFull: the prompt needs more pages than the cache has.
            ModelUnloaded: after `unload`.
        """
        prompt_ids = self._whole_prompt(ids)
        result = self._empty_rows(len(prompt_ids))

        def keep(first: int, rows: torch.Tensor) -> None:
            result[first : first + len(rows)] = rows

        self._generator.evaluate(prompt_ids, len(prompt_ids), "all", keep)
        return result

    def next_logits(self, ids: Iterable[int], rope_len: int | None = None) -> torch.Tensor:
        """Compute the logits after the last token of a text, for samplers of the web UI.

        Tokens that the cache holds are reused, so a text that grows by one token costs one step.

        Args:
            ids: 1 to `ctx_size` token ids, used as they are.
            rope_len: the length that the text may reach; None for its own length.

        Returns:
            float32 [vocab_size] on the CPU, a new tensor.

        Raises:
            As `prompt_logits`.
        """
        prompt_ids = self._whole_prompt(ids)
        rope_len = plain(rope_len)
        if rope_len is not None:
            check_integer("rope_len", rope_len, 0)
        reach = min(max(len(prompt_ids), rope_len or 0), self.ctx_size)
        (result,) = self._empty_rows(1)

        def keep(first: int, rows: torch.Tensor) -> None:
            result.copy_(rows[0])

        self._generator.evaluate(prompt_ids, reach, "last", keep)
        return result

    def filtered_logits(self, ids: Iterable[int], settings: Settings = None) -> torch.Tensor:
        """Compute the logits after the last token of a text, and apply the samplers to them.

        Args:
            ids: 1 to `ctx_size` token ids, used as they are.
            settings: `SamplingSettings`, or a dict with the web UI's names.

        Returns:
            float32 [vocab_size] on the CPU, a new tensor; -inf for tokens that
            cannot be drawn. The softmax is the distribution that `generate` draws from, apart
            from a grammar and from draws that replace the beginning of a banned string.

        Raises:
            As `next_logits`. InvalidSettings: a setting is invalid.
        """
        prompt_ids = self._whole_prompt(ids)
        chosen = SamplingSettings.from_dict(settings)
        values = self.next_logits(prompt_ids).numpy()
        return torch.from_numpy(self._requests.filtered(values, prompt_ids, chosen))

    def prompt_logprobs(self, ids: Iterable[int], count: int = 0) -> list[TokenLogprobs | None]:
        """Compute the log probability of each token of a prompt, given the tokens before it.

        Args:
            ids: 1 to `ctx_size` token ids, used as they are.
            count: number of likeliest tokens to list at each position.

        Returns:
            One entry per id; None for the first id.

        Raises:
            As `prompt_logits`; but only a few rows of logits exist at a time.
        """
        prompt_ids = self._whole_prompt(ids)
        count = plain(count)
        check_integer("count", count, 0)
        vocab_size = self._requests.sampled_vocab_size
        result: list[TokenLogprobs | None] = [None]

        def append(first: int, rows: torch.Tensor) -> None:
            followers = prompt_ids[first + 1 : first + 1 + len(rows)]
            for row, token_id in zip(rows.numpy(), followers, strict=False):
                real = row if token_id >= vocab_size else row[:vocab_size]
                result.append(token_logprobs(real, token_id, count))

        self._generator.evaluate(prompt_ids, len(prompt_ids), "all", append)
        return result

    def _whole_prompt(self, ids: Iterable[int]) -> list[int]:
        self._generator.check()
        return self._requests.whole_prompt(ids)

    def _empty_rows(self, count: int) -> torch.Tensor:
        """Allocate rows of logits, float32 [count, vocab_size].

        Raises:
            InsufficientMemory: they do not fit into the free main memory.
        """
        nbytes = 4 * count * self.config.vocab_size
        free_bytes = backend_of(MAIN_MEMORY).capacity(MAIN_MEMORY).free_bytes
        try:
            # Linux allocates more memory than exists, and kills a process that uses it.
            if nbytes <= free_bytes:
                return torch.empty(count, self.config.vocab_size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        raise InsufficientMemory(
            f"the logits of {count} tokens",
            expected=f"{nbytes} bytes of free main memory",
            actual=f"{free_bytes} bytes free",
            remedy="Evaluate a part of the text, or call prompt_logprobs, which keeps a few rows",
        )

    @property
    def loras(self) -> tuple[LoadedLora, ...]:
        """The LoRA adapters that are loaded, in the order of loading."""
        return self._loras

    def load_lora(
        self, lora_dir: str | os.PathLike[str], scaling: float = 1.0
    ) -> LoadedLora:
        """Load a LoRA adapter into the room that was reserved with the model.

        It changes every text that begins afterwards. Prompts are evaluated anew, because the
        cache holds keys and values of the model without it.

        Args:
            lora_dir: folder with adapter_config.json and adapter_model.safetensors, as PEFT
                saves them.
            scaling: a factor on the adapter's own scale.

        Raises:
            InvalidCall: a text is being generated or evaluated. It would go on with other
                weights than it began with.
            InsufficientMemory: the room is too small; see `LoadOptions.max_lora_bytes`.
            InvalidCheckpoint, InvalidConfig, UnsupportedFormat, ModelNotFound: the adapter is
                damaged, another model's, or of a kind that cannot be used; see `Adapter.open`
                and `Adapters.load`. In every case the loaded adapters stay as they were.
            InvalidSettings: the adapter is loaded already, or `scaling` is no number.
            ModelUnloaded: after `unload`.
        """
        self._generator.check()
        check_path("lora_dir", lora_dir, "folder")
        scaling = plain(scaling)
        check_number("scaling", scaling, -MAX_SCALING, MAX_SCALING)
        with Adapter.open(lora_dir) as adapter:
            self._change_loras(lambda model: model.load_lora(adapter, float(scaling)))
        return self._loras[-1]

    def unload_loras(self) -> None:
        """Unload all LoRA adapters; later texts have the bits of the model alone.

        Raises:
            InvalidCall: as `load_lora`. ModelUnloaded: after `unload`.
        """
        self._generator.check()
        self._change_loras(lambda model: model.unload_loras())

    def _change_loras(self, change: Callable[[Model], None]) -> None:
        """Change the adapters between two steps, if no text is being generated."""

        def steps(model: ForwardModel, cache: PagedCache) -> Iterator[None]:
            held = cache.num_pages - cache.num_free_pages
            if held:
                raise InvalidCall(
                    "the LoRAs of a model", expected="no text that is being generated",
                    actual=f"texts that hold {held} pages of the cache",
                    remedy="Wait for their end, or stop them",
                )
            assert isinstance(model, Model)
            change(model)
            self._loras = model.loras
            cache.forget()
            yield None

        for _ in self._generator.run_alone(steps):
            pass

    def run_alone(
        self, steps: Callable[[ForwardModel, PagedCache], Iterator[T | None]]
    ) -> Iterator[T]:
        """Use the forward pass and its cache directly, for measurements; generations wait.

        Args:
            steps: called in the model's thread with both. The model's thread advances the
                iterator that it returns whenever the caller waits for a value. It releases the
                pages that it acquires, best in the `finally` block of a generator.

        Returns:
            An iterator over the values that `steps` yields, except None.

        Raises:
            ModelUnloaded: after `unload`, when the first value is asked for.
        """
        return self._generator.run_alone(steps)

    def allocated_bytes(self, device: str | None = None, segment: str | None = None) -> int:
        """Return the sum of the allocated buffers; equals the reservation's total while loaded.

        Args:
            device: count the buffers of this device of this machine alone.
            segment: count those of this kind on this machine alone: `weights`, `cache`,
                `workspace`, `embedding` or `loras`.
        """
        found = self._buffers.allocated_bytes(device, segment)
        if device is None and segment is None and self._others is not None:
            found += sum(self._others.allocated_bytes().values())
        return found

    def allocated_on_machines(self) -> dict[tuple[int, str], int]:
        """Return the bytes of the buffers on each device of other machines.

        Returns:
            (place of the machine, device) -> bytes; empty for a model on this machine alone.
        """
        return {} if self._others is None else self._others.allocated_bytes()

    def unload(self) -> None:
        """End all generations and free the memory. A second call does nothing.

        Waits for the running step. Generations that had not ended raise `ModelUnloaded`, as does
        every later call. If Ctrl-C ends the wait, the model is still unloaded.
        """
        self._generator.close()
