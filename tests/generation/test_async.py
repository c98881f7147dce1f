"""Generation in an event loop: the same texts, cancellation in every way, no waiting thread."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest

import exl_loader
from exl_loader.utils.errors import InvalidSettings, ModelUnloaded
from support.fake_model import count_up, endless, fake_engine, settle
from support.tiny import write_tiny_model

GREEDY = {"temperature": 0, "ban_eos_token": True}
LONG = GREEDY | {"max_new_tokens": 200}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("async") / "model")
    with exl_loader.load(folder, ctx_size=2048, max_batch_size=8) as loaded:
        yield loaded


async def text_of(generation) -> str:
    return "".join([piece async for piece in generation])


def test_many_at_once_have_the_texts_of_threads_and_use_none(model):
    options = {"temperature": 0.8, "max_new_tokens": 30, "ban_eos_token": True}
    requests = [(f"request {i} " * (1 + i % 5), options | {"seed": i}) for i in range(32)]
    expected = ["".join(model.generate(*request)) for request in requests]
    threads = set(threading.enumerate())

    async def main():
        generations = [model.agenerate(*request) for request in requests]
        found = await asyncio.gather(*map(text_of, generations))
        assert [generation.finish_reason for generation in generations] == ["length"] * 32
        assert set(threading.enumerate()) == threads
        assert asyncio.get_running_loop()._default_executor is None
        return found

    assert asyncio.run(main()) == expected


def test_ids_stats_and_logprobs(model):
    options = GREEDY | {"max_new_tokens": 9, "logprobs": 2}

    async def main():
        async with model.agenerate_ids([5, 6, 7], options) as generation:
            ids = [i async for i in generation]
            assert generation.token_ids == ids and len(generation.logprobs) == 9
            assert generation.stats.new_tokens == 9 and generation.prompt_ids == [5, 6, 7]
            assert [i async for i in generation] == []
        return ids

    assert asyncio.run(main()) == list(model.generate_ids([5, 6, 7], options))


def pages_after(engine) -> int:
    gc.collect()
    settle(engine)
    return engine._generator._scheduler.cache.num_free_pages


@pytest.mark.parametrize("way", ["aclose", "with", "drop", "stop", "task", "timeout"])
def test_every_way_to_leave_releases_the_pages(way):
    engine, _, cache = fake_engine(endless, pages=2)

    async def leave():
        generation = engine.agenerate_ids([5], LONG)
        if way == "with":
            async with generation:
                await anext(generation)
            return generation.finish_reason
        assert await anext(generation) == 7
        if way == "aclose":
            await generation.aclose()
            assert [i async for i in generation] == []
        elif way == "stop":
            generation.stop()
            assert len([i async for i in generation]) < 199
        elif way == "drop":
            del generation
            return "cancelled"
        else:
            async def read_slowly():
                async for _ in generation:
                    await asyncio.sleep(0.001)

            task = asyncio.create_task(read_slowly())
            if way == "task":
                await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(task, 0.01)
            await generation.aclose()
        return generation.finish_reason

    assert asyncio.run(leave()) == "cancelled"
    assert pages_after(engine) == 2
    assert list(engine.generate_ids([5], LONG)) == [7] * 200


def hold_calls(model) -> tuple[threading.Event, threading.Event]:
    """Make calls wait; return what says that one has begun, and what lets them go on."""
    inside, leave = threading.Event(), threading.Event()

    def hold():
        inside.set()
        assert leave.wait(300)

    model.before_call = hold
    return inside, leave


def test_a_task_that_is_cancelled_while_it_waits_ends_the_generation():
    engine, model, _ = fake_engine(count_up, pages=2)
    inside, leave = hold_calls(model)

    async def main():
        generation = engine.agenerate_ids([5], LONG)
        task = asyncio.create_task(anext(generation))
        while not inside.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert generation._job.cancelled
        leave.set()
        await generation.aclose()
        return generation.finish_reason

    assert asyncio.run(main()) == "cancelled"
    assert pages_after(engine) == 2


def test_a_loop_that_ends_does_not_disturb_the_model():
    """The model's thread wakes a coroutine whose loop was closed."""
    engine, model, _ = fake_engine(endless, pages=2)
    inside, leave = hold_calls(model)
    loop = asyncio.new_event_loop()
    generation = engine.agenerate_ids([5], LONG)
    waiting = loop.create_task(anext(generation))
    while not inside.is_set():
        loop.run_until_complete(asyncio.sleep(0.001))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(waiting)
    loop.close()
    leave.set()
    assert list(engine.generate_ids([5], LONG)) == [7] * 200
    del generation, waiting
    assert pages_after(engine) == 2


def test_other_tasks_run_while_pieces_are_taken():
    """Also where all pieces are there before the first one is taken."""
    engine, _, _ = fake_engine(endless)
    turns = []

    async def main():
        first = engine.agenerate_ids([5], GREEDY | {"max_new_tokens": 100})
        await anext(first)
        # There is one page: while this request waits, the first one is computed to its end.
        assert len([i async for i in engine.agenerate_ids([5], LONG)]) == 200
        assert len(first._job.output) == 99

        async def count():
            while True:
                turns.append(len(first._job.output))
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        assert [i async for i in first] == [7] * 99
        counting.cancel()

    asyncio.run(main())
    assert len(set(turns)) > 90


def test_errors_reach_the_task():
    engine, model, _ = fake_engine(endless, pages=2)

    async def main():
        with pytest.raises(InvalidSettings, match="temperature"):
            engine.agenerate_ids([5], {"temperature": -1})
        model.fail_at = len(model.calls) + 5
        taken = []
        with pytest.raises(RuntimeError, match="injected"):
            async for i in engine.agenerate_ids([5], LONG):
                taken.append(i)
        model.fail_at = None
        assert taken == [7] * len(taken) and len(taken) <= 5
        generation = engine.agenerate_ids([5], LONG)
        await anext(generation)
        await asyncio.to_thread(engine.unload)
        with pytest.raises(ModelUnloaded):
            async for _ in generation:
                pass
        with pytest.raises(ModelUnloaded):
            engine.agenerate_ids([5], LONG)

    asyncio.run(main())
