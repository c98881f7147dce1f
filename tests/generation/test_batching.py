"""Several requests at once: order, fairness, and independence."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

import exl_loader
from exl_loader.generation.scheduler import MAX_AHEAD
from exl_loader.utils.errors import CacheFull
from support import in_threads
from support.fake_model import count_up, endless, fake_engine

GREEDY = {"temperature": 0, "ban_eos_token": True}
LONG = {"temperature": 0, "max_new_tokens": 200}
UP_TO_20 = {"temperature": 0, "max_new_tokens": 20}


def next_of(text: list[int]) -> int:
    return (text[-1] + 1) % 900 + 1


def run_all(*works: Callable[[], object]) -> list:
    """Run each in its own thread; an error in one of them is raised here."""
    return in_threads(lambda work: work(), works)


def ids(engine, prompt, count):
    return engine.generate_ids(prompt, GREEDY | {"max_new_tokens": count})


def until_all_are_there(engine, count: int) -> Callable[[], None]:
    """Make a callback that holds the first pass until all requests have arrived."""
    scheduler, began = engine._generator._scheduler, []
    inbox = engine._generator._inbox

    def sent() -> int:
        return len(scheduler.waiting) + len(scheduler.active) + inbox.qsize()

    def wait() -> None:
        deadline = time.monotonic() + 300
        while not began and sent() < count:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        began.append(True)

    return wait


def test_requests_that_do_not_fit_wait_in_order():
    """A later request that fits does not overtake an earlier one that does not."""
    engine, model, cache = fake_engine(next_of, 1000, ctx_size=1024)
    running = ids(engine, [5] * 400, 100)
    next(running)
    large, small = ids(engine, [300] * 600, 50), ids(engine, [700], 5)
    for generation in (large, small):
        generation._started = True
        engine._generator._send(generation._job)
    # 2 pages are held; the large request needs 3, the small one 1.
    for _ in range(5):
        next(running)
    assert large.stats.new_tokens == 0 and small.stats.new_tokens == 0
    running.close()
    assert len(list(small)) == 5 and large._job.sequence is not None
    assert len(list(large)) == 50
    assert cache.num_free_pages == 4


def test_more_requests_than_a_batch_holds():
    engine, model, cache = fake_engine(next_of, 1000, ctx_size=4096, max_batch_size=2)
    model.before_call = until_all_are_there(engine, 7)
    results = in_threads(lambda first: list(ids(engine, [first], 20)), range(1, 351, 50))
    assert results == [list(range(50 * i + 3, 50 * i + 43, 2)) for i in range(7)]
    assert max(map(len, model.calls)) == 2
    assert cache.num_free_pages == 16


def test_a_request_larger_than_the_cache_is_refused_while_others_run():
    engine, model, cache = fake_engine(next_of, 1000, ctx_size=1024, pages=2)
    running = ids(engine, [5], 100)
    next(running)
    with pytest.raises(CacheFull, match="room for a text of 900 tokens.*larger cache_size"):
        list(ids(engine, [7], 899))
    assert len(list(running)) == 99


def test_a_stream_continues_between_the_chunks_of_a_prompt():
    engine, model, cache = fake_engine(next_of, 1000, ctx_size=4096)
    stream = ids(engine, [5], 200)
    next(stream)
    model.calls.clear()
    arrived, unread = threading.Event(), []
    model.before_call = lambda: unread.append(
        MAX_AHEAD if stream._job.finished else len(stream._job.output)
    )

    def read():
        for _ in stream:
            arrived.set()

    def ask():
        assert arrived.wait(300)
        assert len(list(ids(engine, [9] * 640, 10))) == 10

    run_all(read, ask)
    chunks = [i for i, call in enumerate(model.calls) if call[0] > 1]
    assert len(chunks) == 40
    for first, second in zip(chunks, chunks[1:]):  # noqa: B905
        # Except if the reader thread did not run; then it has unread tokens.
        assert second - first == 2 or unread[second] >= MAX_AHEAD


def test_a_short_prompt_does_not_wait_for_a_long_one():
    engine, model, cache = fake_engine(next_of, 1000, ctx_size=8192)
    long, short = ids(engine, [9] * 3200, 2), ids(engine, [700] * 20, 2)
    done = []
    began = threading.Event()
    model.before_call = began.set

    def ask_short():
        assert began.wait(300)
        list(short)
        done.append(("short", sum(map(sum, model.calls))))

    def ask_long():
        list(long)
        done.append(("long", sum(map(sum, model.calls))))

    run_all(ask_long, ask_short)
    assert [name for name, _ in done] == ["short", "long"]


def test_stopping_one_generation_does_not_stop_another():
    engine, model, cache = fake_engine(next_of, 1000, ctx_size=2048)
    one, two = ids(engine, [5], 60), ids(engine, [300], 60)
    for _ in range(3):
        next(one)
        next(two)
    one.stop()
    assert len(list(two)) == 57
    assert list(one)[2:] == [] and one.finish_reason == "cancelled"
    assert two.finish_reason == "length"
    assert cache.num_free_pages == 8


def test_an_error_ends_only_its_own_request():
    """A batch that fails is run again, each request in its own pass."""
    engine, model, cache = fake_engine(next_of, 1000, ctx_size=2048)
    whole = model._forward

    def damaged(entries, logits):
        for sequence, _ in entries:
            if model.read(sequence)[:1] == [300] and sequence.past_len > 5:
                raise RuntimeError("this one")
        return whole(entries, logits)

    model._forward = damaged
    good, bad = ids(engine, [5], 40), ids(engine, [300], 40)

    def read_bad():
        with pytest.raises(RuntimeError, match="this one"):
            list(bad)

    assert run_all(lambda: list(good), read_bad)[0] == list(range(7, 87, 2))
    assert len(bad.token_ids) == 6 and bad.finish_reason == "failed"
    assert cache.num_free_pages == 8


SAMPLED = {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.1, "max_new_tokens": 40,
           "ban_eos_token": True}


@pytest.mark.parametrize("cache_type", ["fp16", "q4"])
def test_the_same_seed_gives_the_same_text_alone_and_in_a_batch(tiny_model_dir, cache_type):
    """On the compiled kernels, with other chunk sizes and eight requests in a pass."""
    requests = [
        ([(7 * i + j * j) % 250 + 3 for j in range(5 + 37 * i)], SAMPLED | {"seed": i})
        for i in range(12)
    ]
    options = {"ctx_size": 8192, "cache_type": cache_type, "max_batch_size": 8}
    with exl_loader.load(tiny_model_dir, **options) as model:
        alone = [list(model.generate_ids(*request)) for request in requests]
        model.prompt_logits([5] * 8192)
        passes = []
        wait, forward = until_all_are_there(model, 12), model._generator._scheduler.model.forward

        def counted(entries, logits="last"):
            wait()
            passes.append(len(entries))
            return forward(entries, logits)

        model._generator._scheduler.model.forward = counted
        together = in_threads(lambda request: list(model.generate_ids(*request)), requests)
        # The wrapped method would keep the model and its buffers until the next garbage collection.
        del model._generator._scheduler.model.forward
        assert together == alone
        assert max(passes) == 8
        assert model.allocated_bytes() == model.reservation.total_bytes


def test_a_stream_continues_between_the_chunks_of_an_evaluation():
    engine, model, cache = fake_engine(next_of, 1000, ctx_size=4096)
    stream = ids(engine, [5], 300)
    next(stream)
    model.calls.clear()
    unread = []
    model.before_call = lambda: unread.append(
        MAX_AHEAD if stream._job.finished else len(stream._job.output)
    )
    logits, streamed, other = run_all(
        lambda: engine.prompt_logits([7] * 800), lambda: list(stream),
        lambda: list(ids(engine, [9] * 320, 5)),
    )
    assert logits.argmax(dim=1).tolist() == [9] * 800
    assert len(streamed) == 299 and len(other) == 5
    chunks = [i for i, call in enumerate(model.calls) if max(call) > 1]
    assert len(chunks) == 100 + 20
    for first, second in zip(chunks, chunks[1:]):  # noqa: B905
        assert second > first + 1 or unread[second] >= MAX_AHEAD
    assert cache.num_free_pages == 16


# Pages, and how far ahead of its reader a text is computed


def test_interleaved_generations_share_forward_passes():
    engine, model, cache = fake_engine(count_up, pages=4)
    first = engine.generate_ids([10], UP_TO_20)
    second = engine.generate_ids([50], UP_TO_20)
    pairs = list(zip(first, second, strict=True))
    assert pairs == [(11 + i, 51 + i) for i in range(20)]
    assert [1, 1] in model.calls
    assert len(model.calls) < 40
    assert cache.num_free_pages == 4


def test_a_request_waits_for_pages():
    """One page: the second request starts when the first one, which is not read, has ended."""
    engine, model, cache = fake_engine(count_up)
    first = engine.generate_ids([10], {"temperature": 0, "max_new_tokens": 50})
    assert next(first) == 11
    second = engine.generate_ids([60], UP_TO_20)
    assert list(second) == list(range(61, 81))
    assert list(first) == list(range(12, 61))


def test_tokens_are_not_computed_far_ahead_of_the_reader():
    engine, model, cache = fake_engine(count_up, pages=4)
    idle = engine.generate_ids([10], {"temperature": 0, "max_new_tokens": 100})
    next(idle)
    assert len(list(engine.generate_ids([50], {"temperature": 0, "max_new_tokens": 60}))) == 60
    assert idle.stats.new_tokens < 30
    assert list(idle) == list(range(12, 111))


def test_prompt_logits_during_a_generation():
    engine, model, cache = fake_engine(count_up, pages=2)
    generation = engine.generate_ids([10], UP_TO_20)
    next(generation)
    assert engine.prompt_logits([3, 4]).argmax(dim=1).tolist() == [4, 5]
    other = engine.generate_ids([20], UP_TO_20)
    next(other)
    # It waits for a page, so that a text is computed to its end although nobody reads it.
    assert engine.prompt_logits([3]).argmax(dim=1).tolist() == [4]
    assert generation.finish_reason == "length"
    assert list(generation) == list(range(12, 31))


def test_a_request_waits_for_the_pages_of_an_evaluation():
    """While it waits, every step runs a chunk of the evaluation."""
    engine, model, cache = fake_engine(endless)
    answers: list[list[int]] = []
    worker = threading.Thread(target=lambda: answers.append(list(engine.generate_ids([5], LONG))))
    scheduler = engine._generator._scheduler
    steps, decode = [], scheduler.decode

    def counted():
        steps.append(len(model.calls))
        return decode()

    def begin_another():
        if len(model.calls) == 1:
            scheduler.decode = counted
            worker.start()
            while engine._generator._inbox.empty():
                worker.join(0.001)
        if 1 < len(model.calls) < 20:
            assert scheduler.waiting and not scheduler.active

    model.before_call = begin_another
    assert len(engine.prompt_logits([5] * 200)) == 200
    worker.join(300)
    assert answers == [[7] * 200]
    assert len([calls for calls in steps if calls < 25]) <= 25
    assert cache.num_free_pages == cache.num_pages and not scheduler.evaluations
