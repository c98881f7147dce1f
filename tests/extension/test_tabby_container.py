"""The backend's container, called as TabbyAPI calls it, in a double of TabbyAPI."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest

import exl_loader
from exl_loader import InsufficientMemory, InvalidSettings, ModelUnloaded
from exl_loader.memory.buffers import live_bytes
from exl_loader.utils.progress import task
from extension.tabby import loading
from extension.tabby.container import ExlLoaderContainer
from support.host_server import DEMO, PROMPT, copy_demo
from support.lora_folders import write_adapter
from support.tabby_double import (
    ContextLengthExceededError,
    DisconnectHandler,
    HFModel,
    enter_tabby,
    params,
)

CTX_SIZE = 512
VALUES = {"max_seq_len": CTX_SIZE, "cache_mode": "Q8", "chunk_size": 256,
          "prompt_template": "chatml"}
LOADED = {"ctx_size": CTX_SIZE, "cache_type": "q8", "chunk_size": 256}
GREEDY = {"temperature": 0, "max_tokens": 12}
WHOLE_BAR = [(i, loading.STEPS) for i in range(loading.STEPS + 1)]

pytestmark = pytest.mark.skipif(not (DEMO / "config.json").is_file(), reason="no demo model")


@pytest.fixture
def tabby(monkeypatch):
    return enter_tabby(monkeypatch)


@pytest.fixture(scope="module")
def own():
    """The engine itself, with the container's options."""
    with exl_loader.load(DEMO, **LOADED) as model:
        yield model


@pytest.fixture
def drafts(tmp_path):
    """The options of TabbyAPI for a draft model, which is the demo model."""
    copy_demo(tmp_path, "draft")
    return {"draft_model": {"draft_model_dir": str(tmp_path), "draft_model_name": "draft"}}


def create(**values):
    return ExlLoaderContainer.create(DEMO, HFModel(), **VALUES | values)


@asynccontextmanager
async def loaded(**values):
    container = await create(**values)
    try:
        await container.load()
        yield container
    finally:
        await container.unload(shutdown=True)


def answer(container, prompt=PROMPT, handler=None, request_id="1", **fields):
    return container.stream_generate(request_id, prompt, params(**GREEDY | fields), handler, None)


async def text_of(chunks) -> str:
    return "".join([chunk.get("text", "") async for chunk in chunks])


def assert_all_pages_are_free(container) -> None:
    (counts,) = container.model.run_alone(
        lambda model, cache: iter([(cache.num_free_pages, cache.num_pages)]))
    assert counts[0] == counts[1]


# ---- Life cycle ----


def test_a_load_takes_the_planned_bytes_and_an_unload_gives_them_back(tabby):
    async def run():
        before = live_bytes("cpu")
        container = await create()
        assert live_bytes("cpu") == before and not container.loaded and container.model is None
        assert [step async for step in container.load_gen(None)] == WHOLE_BAR
        assert container.loaded
        planned = exl_loader.plan(DEMO, **LOADED).total_bytes
        assert container.model.allocated_bytes() == planned == live_bytes("cpu") - before
        said = [line for level, line in tabby.lines if level == "info"]
        assert any(f"{planned:,} bytes reserved (weights" in line for line in said)
        await container.unload()
        assert live_bytes("cpu") == before and not container.loaded
        with pytest.raises(ModelUnloaded):
            await text_of(answer(container))

    asyncio.run(run())


def test_a_model_that_does_not_fit_is_refused_in_create(tabby):
    with pytest.raises(InsufficientMemory, match="does not fit.*iB missing"):
        asyncio.run(create(max_seq_len=1 << 26, rope_alpha=1.0))


def test_a_load_that_is_given_up_frees_its_memory(tabby):
    async def run():
        before = live_bytes("cpu")
        container = await create()
        steps = container.load_gen(None)
        assert await anext(steps) == (0, loading.STEPS)
        assert await anext(steps) == (1, loading.STEPS)
        await steps.aclose()
        assert live_bytes("cpu") == before
        assert container.model is None and not container.load_lock.locked()

    asyncio.run(run())


def test_a_draft_model_has_a_whole_bar_before_the_models(tabby, drafts):
    async def run():
        before = live_bytes("cpu")
        container = await create(**drafts)
        assert container.use_draft_model
        steps = []
        async for step in container.load_gen(None):
            steps.append(step)
            # The last step says that the model can be used.
            assert container.loaded == (len(steps) == 2 * len(WHOLE_BAR))
        assert steps == WHOLE_BAR * 2
        planned = exl_loader.plan(DEMO, **LOADED, model_draft=container.draft_model_dir)
        assert live_bytes("cpu") - before == planned.total_bytes
        await container.unload()
        assert live_bytes("cpu") == before
        assert not (await create()).use_draft_model

    asyncio.run(run())


def test_bars_follow_the_bytes_that_were_read_of_each_model(tabby, drafts, monkeypatch):
    """The load goes on when a step was seen, so that no step can come from the end of the load."""
    turns = [threading.Event() for _ in range(4)]

    def load(model_dir, *, progress, **options):
        def seen(turn):
            assert turns[turn].wait(60)

        with task(progress, "reserving memory", 100, "bytes") as advance:
            advance(100)
        with task(progress, "loading draft weights", 10, "bytes") as advance:
            advance(3)
            seen(0)
            advance(7)
            seen(1)
        with task(progress, "sampling draft keys", 2, "layers") as advance:
            advance(2)
        with task(progress, "loading weights", 1000, "bytes") as advance:
            seen(2)
            advance(555)
            seen(3)
            advance(445)
        raise InvalidSettings("a file that has changed since the plan")

    async def run():
        container = await create(**drafts)
        monkeypatch.setattr(exl_loader, "load", load)
        steps = container.load_gen(None)
        for turn, (first, last) in enumerate([(0, 30), (31, 99), (100, 100), (1, 55)]):
            for step in range(first, last + 1):
                assert await anext(steps) == (step, loading.STEPS)
            if last == loading.STEPS:
                assert await anext(steps) == (0, loading.STEPS)
            turns[turn].set()
        for step in range(56, loading.STEPS):
            assert await anext(steps) == (step, loading.STEPS)
        # The last step never comes without a model.
        with pytest.raises(InvalidSettings, match="has changed"):
            await anext(steps)
        assert not container.loaded

    asyncio.run(run())
    said = [line for _, line in tabby.lines]
    assert "exl_loader: sampling draft keys ..." in said
    assert not any("loading weights" in line for line in said)


@pytest.mark.parametrize("steps_before", [1, 50, 101, 150])
def test_a_load_of_two_models_that_is_given_up_frees_both(tabby, drafts, steps_before):
    async def run():
        before = live_bytes("cpu")
        container = await create(**drafts)
        steps = container.load_gen(None)
        for i in range(steps_before):
            assert await anext(steps) == (WHOLE_BAR * 2)[i]
        await steps.aclose()
        assert live_bytes("cpu") == before
        assert container.model is None and not container.load_lock.locked()

    asyncio.run(run())


def test_a_load_that_fails_frees_its_memory_and_its_lock(tabby, monkeypatch):
    def fail(model_dir, *, progress, **options):
        raise InvalidSettings("a file that has changed since the plan")

    async def run():
        container = await create()
        monkeypatch.setattr(exl_loader, "load", fail)
        with pytest.raises(InvalidSettings, match="has changed"):
            await container.load()
        assert not container.loaded and not container.load_lock.locked()

    asyncio.run(run())


def test_the_card_has_the_numbers_before_and_after_the_load(tabby):
    async def run():
        async with loaded(cache_size=1024) as container:
            found = container.model_info().parameters
            assert (found.max_seq_len, found.cache_size) == (CTX_SIZE, 1024)
            assert (found.cache_mode, found.chunk_size) == ("Q8", 256)
            assert found.prompt_template == "chatml"
            assert container.model_info().id == DEMO.name
        planned = await create()
        assert planned.model_info().parameters.cache_size == CTX_SIZE

    asyncio.run(run())


# ---- Answers ----


def test_an_answer_has_the_engines_tokens_in_pieces_and_an_end(tabby, own):
    async def run():
        async with loaded() as container:
            chunks = [chunk async for chunk in answer(container, logprobs=1, top_logprobs=2)]
            assert_all_pages_are_free(container)
            return chunks, await container.generate(
                "2", PROMPT, params(**GREEDY, logprobs=1, top_logprobs=2), None, None)

    (*pieces, end), whole = asyncio.run(run())
    generation = own.generate_ids(PROMPT, temperature=0, max_new_tokens=12, logprobs=2)
    ids = list(generation)
    assert [token for piece in pieces for token in piece["token_ids"]] == ids
    text = "".join(own.generate(PROMPT, temperature=0, max_new_tokens=12))
    assert "".join(piece["text"] for piece in pieces) == text == end["full_text"]
    logprobs = [entry for piece in pieces for entry in piece["logprobs_content"]]
    assert [entry.logprob for entry in logprobs] == [e.logprob for e in generation.logprobs]
    assert "".join(entry.token for entry in logprobs) == text
    assert (end["prompt_tokens"], end["gen_tokens"]) == (len(own.encode(PROMPT)), 12)
    assert (end["finish_reason"], end["eos_reason"]) == ("length", "max_new_tokens")
    assert [piece["offset"] for piece in pieces][-1] == len(text)
    assert whole["text"] == text and whole["finish_reason"] == "length"
    assert whole["generated_tokens"] == 12


def test_a_stop_string_and_a_stop_token_are_told_apart(tabby, own):
    text = "".join(own.generate(PROMPT, temperature=0, max_new_tokens=12))
    stop = text[4:9]
    ids = list(own.generate_ids(PROMPT, temperature=0, max_new_tokens=12))

    async def end_of(container, **fields):
        (*pieces, end) = [chunk async for chunk in answer(container, **fields)]
        return "".join(piece["text"] for piece in pieces), end

    async def run():
        async with loaded() as container:
            shown, end = await end_of(container, stop=["nowhere", stop])
            assert shown == text[:4] and end["stop_str"] == stop
            assert (end["finish_reason"], end["eos_reason"]) == ("stop", "stop_string")
            _, end = await end_of(container, stop=[ids[5]])
            assert (end["finish_reason"], end["eos_reason"]) == ("stop", "stop_token")

    asyncio.run(run())


def test_lengths_are_checked_against_max_seq_len_not_the_cache(tabby):
    async def run():
        async with loaded(max_seq_len=256, cache_size=1024) as container:
            asked = params(**GREEDY)
            long = "import os\n" * 100
            with pytest.raises(ContextLengthExceededError, match="256 tokens"):
                container.validate_context_length(long, asked)
            with pytest.raises(ContextLengthExceededError, match="256 tokens"):
                await text_of(answer(container, long))
            container.validate_context_length(PROMPT, asked)
            (*_, end) = [chunk async for chunk in answer(
                container, max_tokens=0, ban_eos_token=True)]
            assert end["prompt_tokens"] + end["gen_tokens"] == 256
            assert tabby.unhealthy == []

    asyncio.run(run())


def test_a_refused_request_leaves_the_server_healthy(tabby, own):
    async def run():
        async with loaded() as container:
            with pytest.raises(InvalidSettings, match="mirostat_mode"):
                await text_of(answer(container, mirostat_mode=1))
            with pytest.raises(InvalidSettings, match="grammar"):
                await text_of(answer(container, grammar_string="no grammar"))
            assert container.active_job_ids == {} and tabby.unhealthy == []
            assert len(await text_of(answer(container))) > 0

    asyncio.run(run())


def test_an_unexpected_error_is_in_the_health_report(tabby, monkeypatch):
    async def run():
        async with loaded() as container:
            def fail(*args):
                raise RuntimeError("a defect")

            monkeypatch.setattr(container.model, "agenerate_ids", fail)
            with pytest.raises(RuntimeError, match="a defect"):
                await text_of(answer(container))
            assert [str(error) for error in tabby.unhealthy] == ["a defect"]

    asyncio.run(run())


def test_what_does_nothing_is_reported_once(tabby):
    async def run():
        async with loaded() as container:
            for _ in range(2):
                await text_of(answer(container, reasoning_budget_tokens=3))

    asyncio.run(run())
    warnings = [line for level, line in tabby.lines if level == "warning"]
    assert [line for line in warnings if "budget" in line] == [
        "exl_loader: a reasoning budget does nothing, because no reasoning is configured"]


def test_a_prompt_is_healed_and_what_follows_it_is_shown(tabby, own):
    prompt = "import os\nimport s"
    healed = own.generate(prompt, token_healing=True, temperature=0, max_new_tokens=12)
    expected = "".join(healed)

    async def run():
        async with loaded() as container:
            chunks = [chunk async for chunk in answer(
                container, prompt, token_healing=True, logprobs=1)]
            stopped = await container.generate("2", prompt, params(
                **GREEDY, token_healing=True, stop=[expected[3:6], "import"]))
        *pieces, end = chunks
        assert "".join(piece["text"] for piece in pieces) == expected == end["full_text"]
        ids = [token_id for piece in pieces for token_id in piece["token_ids"]]
        assert ids == healed.token_ids
        assert [entry.token_id for piece in pieces for entry in piece["logprobs_content"]] == ids
        assert end["prompt_tokens"] + end["gen_tokens"] == len(own.encode(prompt)) + 12
        # A stop string in the prompt is none.
        assert stopped["text"] == expected[: expected.index(expected[3:6])]
        assert stopped["stop_str"] == expected[3:6]

    asyncio.run(run())


def test_a_reasoning_budget_is_kept_to_the_token(tabby, own):
    async def run():
        async with loaded(reasoning=True, reasoning_budget_message="Enough.") as container:
            text = await text_of(container.stream_generate(
                "1", PROMPT, params(temperature=0, max_tokens=30, reasoning_budget_tokens=4), None,
                None, "</think>"))
            # TabbyAPI asks for the same when it has counted as many tokens.
            assert container.constrain_generation_output("1", "Enough.</think>") is False
        return text

    text = asyncio.run(run())
    four = "".join(own.generate(PROMPT, temperature=0, max_new_tokens=4))
    assert text.startswith(four + "Enough.</think>")


ENDLESS = {"max_tokens": 0, "ban_eos_token": True}


def test_clients_that_leave_release_their_pages(tabby):
    async def leave(container, number):
        handler = DisconnectHandler()
        chunks = answer(container, handler=handler, request_id=str(number), **ENDLESS)
        await anext(chunks)
        handler.leave()
        # It ends without an error, and without an end.
        rest = [chunk async for chunk in chunks]
        assert all("finish_reason" not in chunk for chunk in rest)
        assert handler.cleanup_tasks == {}

    async def abort(container):
        event = asyncio.Event()
        chunks = container.stream_generate(
            request_id="aborted", prompt=PROMPT, params=params(**ENDLESS), abort_event=event)
        await anext(chunks)
        event.set()
        assert len([chunk async for chunk in chunks]) < CTX_SIZE // 2

    async def cancel(container):
        begun = asyncio.Event()

        async def read():
            async for _ in answer(container, request_id="task", **ENDLESS):
                begun.set()

        task = asyncio.ensure_future(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def close(container):
        chunks = answer(container, request_id="closed", **ENDLESS)
        await anext(chunks)
        await chunks.aclose()

    async def run():
        async with loaded() as container:
            await asyncio.gather(
                *(leave(container, i) for i in range(4)), abort(container), cancel(container),
                close(container))
            assert container.active_job_ids == {}
            assert_all_pages_are_free(container)

    asyncio.run(run())


def test_an_unload_waits_for_answers_or_ends_them_with_a_reason(tabby, own):
    async def unload(skip_wait):
        async with loaded() as container:
            chunks = answer(container, max_tokens=60, ban_eos_token=True)
            first = (await anext(chunks))["text"]
            task = asyncio.ensure_future(container.unload(skip_wait=skip_wait))
            await asyncio.sleep(0)
            try:
                return first + await text_of(chunks)
            finally:
                await task
                assert container.model is None

    expected = "".join(own.generate(
        PROMPT, temperature=0, max_new_tokens=60, ban_eos_token=True))
    assert asyncio.run(unload(False)) == expected
    with pytest.raises(ModelUnloaded, match="being unloaded"):
        asyncio.run(unload(True))


def test_many_answers_at_once_are_those_of_each_alone(tabby, own):
    prompts = [f"class C{i}:\n" for i in range(70)]

    async def run():
        async with loaded() as container:
            texts = await asyncio.gather(*(
                text_of(answer(container, prompt, request_id=str(i)))
                for i, prompt in enumerate(prompts)))
            assert_all_pages_are_free(container)
            return texts

    # More than the container has threads.
    assert asyncio.run(run()) == [
        "".join(own.generate(prompt, temperature=0, max_new_tokens=12)) for prompt in prompts]


def test_the_event_loops_own_threads_are_not_used(tabby, own):
    async def run():
        release = threading.Event()
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, release.wait)
        try:
            async with loaded() as container:
                text = await text_of(answer(container))
        finally:
            release.set()
            await busy
        return text

    assert asyncio.run(run()) == "".join(own.generate(PROMPT, temperature=0, max_new_tokens=12))


# ---- Tokens ----


def test_tokens_and_special_tokens(tabby, own):
    async def run():
        async with loaded() as container:
            ids = container.encode_tokens(PROMPT, add_bos_token=None, encode_special_tokens=True)
            assert ids == own.encode(PROMPT)
            assert container.encode_tokens(PROMPT, add_bos_token=False) == own.encode(
                PROMPT, add_bos=False)
            plain = container.encode_tokens("<s>", encode_special_tokens=False,
                                            add_bos_token=False)
            assert plain == own.encode("<s>", add_bos=False, special=False)
            assert container.decode_tokens(ids) == own.decode(ids, skip_special=False)
            assert container.decode_tokens(ids, decode_special_tokens=False) == own.decode(ids)
            tokens = container.get_special_tokens()
            assert (tokens["bos_token"], tokens["eos_token"]) == ("<s>", "</s>")
            assert container.get_special_tokens(False, True)["bos_token"] == ""
            assert container.hf_model.add_bos_token() == own.tokenizer.add_bos_token

    asyncio.run(run())


# ---- LoRAs ----


def test_loras_get_their_room_and_failures_are_reported(tabby, own, tmp_path):
    write_adapter(tmp_path / "first", {
        f"model.layers.{layer}.mlp.up_proj": (704, 256) for layer in range(5)})
    with exl_loader.load(DEMO, **LOADED, loras=[(tmp_path / "first", 0.5)]) as model:
        expected = "".join(model.generate(PROMPT, temperature=0, max_new_tokens=12))
        reserved = model.reservation.total_bytes

    async def run():
        async with loaded() as container:
            before = await text_of(answer(container))
            result = await container.load_loras(tmp_path, loras=[
                {"name": "first", "scaling": 0.5}, {"name": "missing", "scaling": 1.0}])
            assert result == {"success": ["first"], "failure": ["missing"]}
            (lora,) = container.get_loras()
            assert lora.lora_path.parent.name == "first"
            assert lora.lora_scaling * lora.lora_r / lora.lora_alpha == 0.5
            assert await text_of(answer(container)) == expected
            assert container.model.allocated_bytes() == reserved
            await container.unload(loras_only=True)
            assert container.get_loras() == []
            assert await text_of(answer(container)) == before

    asyncio.run(run())
    assert any("missing" in line for level, line in tabby.lines if level == "error")
