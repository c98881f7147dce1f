"""What TabbyAPI calls a container: one model, how it is loaded, and its answers.

Nothing here blocks the event loop for longer than a moment: loads, unloads, plans, prompts and
grammars have threads of the container's own, and generations need none.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from exl_loader import ModelUnloaded

from . import answers, loading, loras, options, parsing, problems, request
from .contract import say
from .stream import TokenStream

if TYPE_CHECKING:
    from exl_loader import LoadedModel, Reservation

T = TypeVar("T")

# Loads, plans, prompts and grammars at once. Generations need no thread.
MAX_THREADS = 8


class ExlLoaderContainer:
    """A model of this backend. TabbyAPI makes it with `create`.

    TabbyAPI reads and sets attributes of a container; those about templates, reasoning and tools
    are described in its configuration.

    Attributes:
        model_dir: the model's folder.
        draft_model_dir: the draft model's folder; None without one.
        model: the loaded model; None before the load and after `unload`.
        loaded: True while requests are accepted.
        hf_model: what TabbyAPI has read of the folder.
        active_job_ids: id of a request -> its running generation, None until it has one.
        load_lock, load_condition: held while the model changes; requests wait for the condition.
    """

    use_vision = False
    warmup_enabled = False
    generator = None

    # Set by `parsing.settings`, one by one.
    prompt_template: Any = None
    tool_format: str | None = None
    harmony = False
    muse_glimmer = False

    def __init__(
        self, model_dir: Path, hf_model: Any, choice: options.Choice, values: Mapping[str, Any],
        planned: Reservation, threads: ThreadPoolExecutor,
    ) -> None:
        self.model_dir = model_dir
        draft = choice.load.get("model_draft")
        self.draft_model_dir = Path(draft) if draft else None
        self.hf_model = hf_model
        self.model: LoadedModel | None = None
        self.loaded = False
        self.active_job_ids: dict[str, TokenStream | None] = {}
        self.load_lock = asyncio.Lock()
        self.load_condition = asyncio.Condition()
        self.choice = choice
        self._values = dict(values)
        self._planned = planned
        self._requests = 0
        self._streams: set[TokenStream] = set()
        self._reported: set[str] = set()
        self.threads = threads

    @classmethod
    async def create(
        cls, model_directory: Path, hf_model: Any, **values: Any
    ) -> ExlLoaderContainer:
        """Plan a load and refuse it if it does not fit; nothing is allocated.

        Args:
            model_directory: the model's folder.
            hf_model: what TabbyAPI has read of it.
            values: the configuration, merged by TabbyAPI.

        Raises:
            InsufficientMemory: the model does not fit; the message has the numbers.
            ExlLoaderError: the folder or an option is wrong.
        """
        folder = Path(model_directory)
        choice = options.choose(folder, values)
        for line in choice.notices:
            say(line, level="warning")
        # Not in the event loop's own threads, which TabbyAPI reads files with.
        threads = ThreadPoolExecutor(MAX_THREADS, "exl_loader")
        try:
            loop = asyncio.get_running_loop()
            planned = await loop.run_in_executor(threads, loading.plan, folder, choice)
        except BaseException:
            threads.shutdown(wait=False)
            raise
        container = cls(folder, hf_model, choice, values, planned, threads)
        container.prompt_template = await parsing.find_template(
            values.get("prompt_template"), folder)
        return container

    @property
    def use_draft_model(self) -> bool:
        """True with a draft model: TabbyAPI then expects its bar before the model's."""
        return self.draft_model_dir is not None

    @property
    def max_seq_len(self) -> int:
        """Tokens that prompt and answer of one request may have together."""
        return self._planned.ctx_size if self.model is None else self.model.ctx_size

    # ---- Life cycle ----

    async def load(self, progress_callback: Any = None, **values: Any) -> None:
        """Load the model; see `load_gen`."""
        async for _ in self.load_gen(progress_callback, **values):
            pass

    async def load_gen(
        self, progress_callback: Any = None, **values: Any
    ) -> AsyncGenerator[tuple[int, int], None]:
        """Load the model.

        Args:
            progress_callback: not used; the yielded steps are the progress.
            values: `skip_wait` cancels running requests.

        Yields:
            steps done and steps in all, from (0, N) to (N, N), for the draft model if there is
            one, and then for the model.

        Raises:
            ExlLoaderError: what is wrong; nothing stays allocated.
        """
        async with self.changing():
            await self.wait_for_jobs(values.get("skip_wait"))
            try:
                async with aclosing(self._load(self.choice.load)) as steps:
                    async for step in steps:
                        yield step, loading.STEPS
                for line in self._opened():
                    say(line)
                # The last step says that the model can be used.
                yield loading.STEPS, loading.STEPS
            except BaseException:
                # TabbyAPI does not know the container yet, so nobody else would free it.
                await self._unload()
                raise

    async def _load(self, load_options: dict[str, Any]) -> AsyncGenerator[int, None]:
        """Load the model with the given options; yield the steps except the last one."""
        loads = loading.load(self.model_dir, load_options, self.threads)
        async with aclosing(loads) as steps:
            async for step in steps:
                if isinstance(step, int):
                    yield step
                else:
                    self.model = step

    def _opened(self) -> list[str]:
        """Accept requests from now on; return what to say of the model."""
        loaded = self.model
        assert loaded is not None
        has_token = (lambda text: loaded.tokenizer.token_id(text) is not None
                     ) if loaded.has_tokenizer else (lambda text: False)
        for name, value in parsing.settings(self._values, has_token).items():
            setattr(self, name, value)
        if loaded.has_tokenizer:
            # TabbyAPI strips a BOS token from what a template wrote if the backend adds one, and
            # guesses that it does where the folder does not say so.
            adds_bos = loaded.tokenizer.add_bos_token
            self.hf_model.add_bos_token = lambda: adds_bos
        self.loaded = True
        lines = [*loading.describe(self.model_dir, loaded), loading.measured(loaded)]
        if not self.choice.is_length_chosen:
            lines.append(
                f"max_seq_len is not set: {loaded.ctx_size:,} tokens, the most that fits, at most "
                f"the model's own {loaded.reservation.stretched_length:,}")
        return lines

    async def unload(
        self, loras_only: bool = False, *, skip_wait: bool | None = None,
        shutdown: bool | None = None, **later: Any,
    ) -> None:
        """Free the model's memory, or unload its LoRAs only.

        Args:
            loras_only: the model stays.
            skip_wait: cancel running requests instead of waiting for them.
            shutdown: the server ends; nothing is waited for.
        """
        if loras_only:
            await loras.unload(self, bool(skip_wait))
            return
        if shutdown:
            await self._unload()
            return
        async with self.changing():
            self.loaded = False
            await self.wait_for_jobs(skip_wait)
            await self._unload()

    async def _unload(self) -> None:
        self.loaded = False
        loaded, self.model = self.model, None
        if loaded is not None:
            await self.in_thread(loaded.unload)
            say(f"{self.model_dir.name} was unloaded")
        self.threads.shutdown(wait=False)

    async def reload(self, load_options: dict[str, Any]) -> None:
        """Load the model again with other options, inside of `changing`.

        Raises:
            ExlLoaderError: what is wrong. The model is loaded as it was, or, where that fails as
                well, no model is loaded.
        """
        assert self.model is not None
        before = self.choice.load | {
            "ctx_size": self.model.ctx_size,
            "loras": [(lora.path, lora.scaling) for lora in self.model.loras],
        }
        self.loaded = False
        loaded, self.model = self.model, None
        await self.in_thread(loaded.unload)
        try:
            await self._load_all(load_options)
        except Exception:
            await self._load_all(before)
            raise

    async def _load_all(self, load_options: dict[str, Any]) -> None:
        async for _ in self._load(load_options):
            pass
        for line in self._opened():
            say(line)

    @asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """Hold the lock of loads; requests that arrive meanwhile wait."""
        try:
            async with self.load_lock:
                yield
        finally:
            async with self.load_condition:
                self.load_condition.notify_all()

    async def wait_for_jobs(self, skip_wait: bool | None = False) -> None:
        """Wait until no request runs.

        Args:
            skip_wait: cancel the running ones; their clients are told why.
        """
        if skip_wait:
            for stream in list(self._streams):
                await stream.cancel(self.unloaded_error())
        while self._requests:
            await asyncio.sleep(0.01)

    def unloaded_error(self) -> ModelUnloaded:
        """Return the error for a request to a model that is not loaded."""
        return ModelUnloaded(
            self.model_dir.name, expected="a loaded model", actual="it is being unloaded",
            remedy="Load a model and send the request again",
        )

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Run a function that blocks."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, functools.partial(function, *args))

    # ---- What TabbyAPI asks of the model ----

    def model_info(self) -> Any:
        """Return TabbyAPI's card of the model."""
        types = importlib.import_module("endpoints.core.types.model")
        found = self._planned if self.model is None else self.model.reservation
        parameters = types.ModelCardParameters(
            max_seq_len=self.max_seq_len,
            cache_size=found.cache_size,
            cache_mode=self._values.get("cache_mode") or "FP16",
            rope_scale=found.compress_pos_emb,
            rope_alpha=found.alpha_value,
            max_batch_size=found.max_batch_size,
            chunk_size=found.chunk_size,
            use_vision=False,
        )
        if self.prompt_template is not None:
            parameters.prompt_template = self.prompt_template.name
            parameters.prompt_template_content = self.prompt_template.raw_template
        if self.draft_model_dir is not None:
            parameters.draft = types.ModelCard(id=self.draft_model_dir.name)
        return types.ModelCard(id=self.model_dir.name, parameters=parameters)

    def encode_tokens(self, text: str, **how: Any) -> list[int]:
        """Convert text to token ids.

        Args:
            text: any string.
            how: `add_bos_token` and `encode_special_tokens`.
        """
        special = how.get("encode_special_tokens")
        tokenizer = self._tokenizer()
        if special is False:
            return tokenizer.encode(text, how.get("add_bos_token"), special=False)
        return tokenizer.prompt_ids(text, how.get("add_bos_token"))

    def decode_tokens(self, ids: Sequence[int], **how: Any) -> str:
        """Convert token ids to text.

        Args:
            ids: token ids.
            how: `decode_special_tokens`, True by default.
        """
        return self._tokenizer().decode(ids, how.get("decode_special_tokens") is False)

    def get_special_tokens(
        self, add_bos_token: bool = True, ban_eos_token: bool = False, **later: Any
    ) -> dict[str, str]:
        """Return the tokens that templates may write, empty texts for those that there are not."""
        found = self._tokenizer().special_tokens
        tokens = {name: found.get(name, "") for name in (
            "bos_token", "eos_token", "pad_token", "unk_token")}
        if not add_bos_token:
            tokens["bos_token"] = ""
        if ban_eos_token:
            tokens["eos_token"] = ""
        return tokens

    def validate_context_length(
        self, prompt: str, params: Any, mm_embeddings: Any = None
    ) -> None:
        """Check that a prompt leaves room for an answer.

        Raises:
            ContextLengthExceededError: TabbyAPI's own error; it does not.
        """
        # No token has less than a byte, so most prompts need not be tokenised for this.
        if len(prompt.encode("utf-8", "replace")) + 8 < self.max_seq_len:
            return
        ids = self._tokenizer().prompt_ids(prompt, params.add_bos_token)
        if len(ids) >= self.max_seq_len:
            raise problems.context_exceeded(len(ids), self.max_seq_len)

    def constrain_generation_output(self, request_id: str, text: str) -> bool:
        """Return False: the engine has ended the reasoning, at the token that was asked for."""
        return False

    def get_loras(self) -> list[Any]:
        """Return the loaded LoRAs, with the attributes that TabbyAPI reads of them."""
        return loras.listed(self.model)

    async def load_loras(self, lora_directory: Path, **values: Any) -> dict[str, list[str]]:
        """Load LoRAs; see `loras.load`."""
        return await loras.load(
            self, Path(lora_directory), values.get("loras") or [], bool(values.get("skip_wait")))

    # ---- Answers ----

    async def generate(
        self, request_id: str, prompt: str, params: Any, disconnect_handler: Any = None,
        mm_embeddings: Any = None, **later: Any,
    ) -> dict[str, Any]:
        """Return the whole answer to a prompt; see `stream_generate`."""
        chunks = [chunk async for chunk in self.stream_generate(
            request_id, prompt, params, disconnect_handler, mm_embeddings, **later)]
        return answers.joined(chunks)

    async def stream_generate(
        self, request_id: str, prompt: str, params: Any, disconnect_handler: Any = None,
        mm_embeddings: Any = None, filter_trigger: str | None = None, *,
        abort_event: asyncio.Event | None = None, **later: Any,
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Answer a prompt.

        Args:
            request_id: TabbyAPI's id of the request.
            prompt: text.
            params: the request, a `BaseSamplerRequest`.
            disconnect_handler: knows whether the client is still there; None if nobody asks it.
            mm_embeddings: not used.
            filter_trigger: the token after which a grammar is to begin.
            abort_event: set when the request is to end.
            later: what later versions of TabbyAPI pass.

        Yields:
            pieces of the answer and, last, its end; see `answers`.

        Raises:
            ContextLengthExceededError: the prompt leaves no room for an answer.
            ExlLoaderError: what is wrong.
        """
        async with self.load_condition:
            await self.load_condition.wait_for(lambda: not self.load_lock.locked())
        if not self.loaded:
            raise self.unloaded_error()
        self._requests += 1
        self.active_job_ids[request_id] = None
        try:
            client = _Client(disconnect_handler, abort_event)
            parts = self._answer(request_id, prompt, params, client, filter_trigger)
            # Closed before this request counts as ended.
            async with aclosing(parts) as chunks:
                async for chunk in chunks:
                    yield chunk
        except _Gone:
            say(f"request {request_id} was ended by its client")
        except Exception as error:
            if not problems.is_harmless(error):
                await problems.note_unhealthy(error)
            raise
        finally:
            self._requests -= 1
            self.active_job_ids.pop(request_id, None)

    async def _answer(
        self, request_id: str, prompt: str, params: Any, client: _Client,
        filter_trigger: str | None,
    ) -> AsyncGenerator[dict[str, Any], None]:
        loaded = self.model
        assert loaded is not None
        began_s = time.monotonic()
        tokenizer = self._tokenizer()
        prompt_ids = await self.in_thread(tokenizer.prompt_ids, prompt, params.add_bos_token)
        room = self.max_seq_len - len(prompt_ids)
        if room < 1:
            raise problems.context_exceeded(len(prompt_ids), self.max_seq_len)
        asked = request.read(
            params, room, self.hf_model.eos_tokens(), self.choice.lookup_tokens, filter_trigger,
            self)
        for line in asked.notices:
            self._report(line)
        answers.log_prompt(request_id, prompt)
        # In a thread, because a grammar may take long to read.
        generation = await self.in_thread(loaded.agenerate_ids, prompt_ids, asked.settings)
        stream = TokenStream(generation)
        answer = answers.Answer(request_id, loaded, stream, prompt_ids, asked, params, began_s)
        self._streams.add(stream)
        self.active_job_ids[request_id] = stream
        try:
            await client.watch(stream)
            while ids := await stream.next(client.look):
                await client.look()
                chunk = answer.push(ids)
                if chunk is not None:
                    yield chunk
            if stream.was_cancelled:
                raise _Gone
            last = answer.rest()
            if last is not None:
                yield last
            end = answer.end()
            if generation.stats.skipped_drafts:
                say(f"request {request_id}: {generation.stats.draft_summary}")
            yield end
            answers.log_end(request_id, end, prompt, params, self.max_seq_len)
        finally:
            self._streams.discard(stream)
            await client.leave(stream)
            await stream.close()

    def _tokenizer(self) -> Any:
        if self.model is None:
            raise self.unloaded_error()
        return self.model.tokenizer

    def _report(self, line: str) -> None:
        """Report what a request asks for and does not get, once for each model."""
        if line not in self._reported:
            self._reported.add(line)
            say(line, level="warning")


class _Gone(Exception):
    """The client does not want the answer any more."""


class _Client:
    """The client of one request: is it still there?

    Args:
        handler: TabbyAPI's `DisconnectHandler`; None if nobody asks it.
        abort: set when the request is to end; None for never.
    """

    def __init__(self, handler: Any, abort: asyncio.Event | None) -> None:
        # The branch exl2-checkpoint documents an event in the handler's place.
        if isinstance(handler, asyncio.Event):
            handler, abort = None, handler
        self._handler = handler
        self._abort = abort

    async def watch(self, stream: TokenStream) -> None:
        """Let TabbyAPI cancel the generation when the client has gone."""
        if self._handler is not None:
            await self._handler.add_cleanup_task(id(stream), stream.cancel, ())

    async def look(self) -> None:
        """Look after the client.

        Raises:
            _Gone: it has gone.
        """
        if self._abort is not None and self._abort.is_set():
            raise _Gone
        if self._handler is not None:
            try:
                await self._handler.poll()
            except asyncio.CancelledError:
                # Not a cancelled task: this is how the handler says that the client has gone.
                if self._handler.disconnected:
                    raise _Gone from None
                raise

    async def leave(self, stream: TokenStream) -> None:
        """Let TabbyAPI forget the generation."""
        if self._handler is not None and id(stream) in self._handler.cleanup_tasks:
            await self._handler.finish(id(stream))

