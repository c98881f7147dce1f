"""Running tasks on several threads: order, counts, errors and interrupts."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from exl_loader.utils.parallel import run_tasks

WAIT_S = 30.0


def exl_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "exl_loader task" in thread.name]


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("count", [0, 1, 5, 40])
def test_each_task_runs_once_and_counts_arrive_on_the_calling_thread(threads, count):
    ran, counted, where = [], [], []

    def work(number, advance):
        ran.append(number)
        advance(number)

    def advance(number):
        counted.append(number)
        where.append(threading.current_thread())

    run_tasks([partial(work, number) for number in range(count)], threads, advance)
    assert sorted(ran) == sorted(counted) == list(range(count))
    assert set(where) <= {threading.current_thread()}
    assert not exl_threads()


def test_tasks_run_at_once():
    met = threading.Barrier(3)
    run_tasks([lambda advance: met.wait(WAIT_S) and None] * 3, 3)
    assert not met.broken


def test_the_error_of_the_first_failing_task_is_raised_and_no_further_task_starts():
    met, started = threading.Barrier(2), []

    def fail(number, advance):
        started.append(number)
        met.wait(WAIT_S)
        raise ValueError(number)

    tasks = [partial(fail, number) for number in range(10)]
    with pytest.raises(ValueError, match="^0$"):
        run_tasks(tasks, 2)
    assert sorted(started) == [0, 1]
    assert not exl_threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_of_the_caller_ends_the_threads_first(error):
    running, go_on, ended = threading.Event(), threading.Event(), []

    def work(advance):
        advance(1)
        running.set()
        go_on.wait(WAIT_S)
        ended.append(None)

    def advance(count):
        running.wait(WAIT_S)
        go_on.set()
        raise error

    with pytest.raises(error):
        run_tasks([work] * 4, 2, advance)
    # Tasks that had begun have ended, and the others never began.
    assert 1 <= len(ended) <= 2
    assert not exl_threads()


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_a_system_that_starts_few_threads_runs_all_tasks(monkeypatch, allowed):
    start, started, ran, counts = threading.Thread.start, [], [], []

    def limited(thread):
        if len(started) == allowed:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    def work(number, advance):
        ran.append(number)
        advance(1)

    monkeypatch.setattr(threading.Thread, "start", limited)
    run_tasks([partial(work, number) for number in range(20)], 8, counts.append)
    assert sorted(ran) == list(range(20)) and len(counts) == 20 and len(started) == allowed
