"""Ctrl-C at any instruction of a caller: no deadlock, no lost page, and unload always returns."""

from __future__ import annotations

import _thread
import contextlib
import dis
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import exl_loader
from exl_loader import engine as engine_module
from exl_loader.generation import exchange
from exl_loader.generation import generator as generator_module
from exl_loader.memory.buffers import live_bytes
from exl_loader.utils.errors import InsufficientMemory, InvalidCall, ModelUnloaded
from exl_loader.utils.progress import NullProgress
from support import REPO, wait_for
from support.fake_model import count_up, fake_engine, settle

posix = pytest.mark.skipif(os.name == "nt", reason="signals and forks of POSIX")

# Instructions of these files are interrupted: the engine's code in a caller's thread.
CALLERS_CODE = (
    str(Path(generator_module.__file__).parent), engine_module.__file__, __file__,
)

GREEDY = {"temperature": 0, "max_new_tokens": 4}


class Interrupter:
    """Raises KeyboardInterrupt before the n-th instruction of callers' code, in this thread.

    Args:
        at: which instruction, from 1; 0 for none.
    """

    def __init__(self, at: int) -> None:
        self.at = at
        self.count = 0
        self.usual = sys.gettrace()

    def __enter__(self) -> Interrupter:
        sys.settrace(self._enter_frame)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.usual)

    def _enter_frame(self, frame, event, _):
        inner = frame.f_code is Interrupter.__exit__.__code__
        if inner or not frame.f_code.co_filename.startswith(CALLERS_CODE):
            return None
        frame.f_trace_opcodes = True
        return self._step

    def _step(self, frame, event, _):
        if event == "opcode":
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
        return self._step


def generate(engine):
    for _ in engine.generate_ids(range(1, 20), GREEDY):
        pass


def generate_and_close(engine):
    with engine.generate_ids([5], GREEDY | {"max_new_tokens": 50}) as generation:
        next(generation)
        next(generation)


def generate_and_drop(engine):
    next(engine.generate_ids([5], GREEDY | {"max_new_tokens": 50}))


def stop(engine):
    generation = engine.generate_ids([5], GREEDY | {"max_new_tokens": 50})
    next(generation)
    engine.stop()
    list(generation)


def all_logits(engine):
    engine.prompt_logits(range(1, 20))


def last_logits(engine):
    engine.next_logits(range(1, 20))


def logprobs(engine):
    engine.prompt_logprobs(range(1, 12), 2)


def run_alone(engine):
    def steps(model, cache):
        sequence = cache.acquire(100)
        try:
            for token_id in (5, 6, 7):
                model.forward([(sequence, [token_id])])
                yield token_id
        finally:
            cache.release(sequence)

    assert list(engine.run_alone(steps)) == [5, 6, 7]


OPERATIONS = [generate, generate_and_close, generate_and_drop, stop, all_logits, last_logits,
              logprobs, run_alone]


def places(operation: Callable, engine, stride: int) -> range:
    """Every `stride`-th instruction of an operation, from a random first one."""
    with Interrupter(0) as counter:
        operation(engine)
    assert counter.count > 50
    return range(random.randrange(1, stride + 1), counter.count + 1, stride)


def interrupted_at(operation: Callable, engine, at: int) -> bool:
    """Run an operation with an interrupt; return False if it had ended before."""
    try:
        with Interrupter(at):
            operation(engine)
    except KeyboardInterrupt:
        return True
    return False


def within(seconds: float, work: Callable[[], object]) -> bool:
    """Return whether some work ends within a time much longer than it needs."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


@pytest.mark.parametrize("stride", [
    11, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.exhaustive])
])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_interrupt_at_any_instruction_loses_no_page(operation, stride):
    engine, _, cache = fake_engine(count_up)
    hits, chosen = 0, places(operation, engine, stride)
    for at in chosen:
        hits += interrupted_at(operation, engine, at)
        settle(engine)
        assert cache.num_free_pages == cache.num_pages, at
        assert list(engine.generate_ids([7], GREEDY)) == [8, 9, 10, 11], at
    assert hits > 0.8 * len(chosen)
    assert within(60, engine.unload)
    assert engine.allocated_bytes() == 0


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_model_works_after_an_interrupt_of_its_first_use(operation):
    """The first use also starts the model's thread."""
    chosen = places(operation, fake_engine(count_up)[0], 29)
    for at in chosen:
        engine, _, cache = fake_engine(count_up)
        interrupted_at(operation, engine, at)
        settle(engine)
        assert cache.num_free_pages == cache.num_pages, at
        assert within(60, engine.unload), at


def test_two_interrupts_in_a_row_lose_no_page():
    """The second interrupt arrives during the clean-up after the first."""
    engine, _, cache = fake_engine(count_up)
    rng = random.Random()
    for _ in range(150):
        first, second = rng.randrange(1, 1200), rng.randrange(1, 40)

        def twice(engine, first=first, second=second):
            try:
                generate_and_close(engine)
            except KeyboardInterrupt:
                with Interrupter(second):
                    engine.stop()
                    list(engine.generate_ids([5], GREEDY))
                raise

        interrupted_at(twice, engine, first)
        settle(engine)
        assert cache.num_free_pages == cache.num_pages, (first, second)
    assert within(60, engine.unload)


def test_a_generation_continues_or_ends_after_an_interrupt():
    """A caller that catches the interrupt gets the next token or the end, and never blocks."""
    engine, _, cache = fake_engine(count_up)
    for at in places(generate, engine, 23):
        generation = engine.generate_ids(range(1, 20), GREEDY)
        ids: list[int] = []
        interrupted_at(lambda _, ids=ids, generation=generation: ids.extend(generation),
                       engine, at)
        assert within(60, lambda ids=ids, generation=generation: ids.extend(generation)), at
        # One token may be lost; none is repeated or out of order.
        assert ids == sorted(set(ids)) and set(ids) <= {20, 21, 22, 23}, at
        generation.close()
        assert generation.finish_reason in ("length", "cancelled")
        assert cache.num_free_pages == cache.num_pages, at


def test_a_model_can_be_unloaded_after_an_interrupt_of_unload():
    """If the interrupt arrives after unload has begun, the model is unloaded anyway."""
    def unload(engine):
        engine.unload()

    chosen = places(unload, fake_engine(count_up)[0], 1)
    for at in chosen:
        engine, _, cache = fake_engine(count_up)
        running = engine.generate_ids([5], GREEDY | {"max_new_tokens": 100})
        next(running)
        interrupted_at(unload, engine, at)
        assert within(60, engine.unload), at
        assert engine.allocated_bytes() == 0 and cache.num_free_pages == cache.num_pages, at
        with pytest.raises(ModelUnloaded):
            list(running)


def test_no_thread_is_left_after_an_interrupt_of_a_with_block():
    def block(engine):
        with engine:
            list(engine.generate_ids([5], GREEDY))

    chosen = places(block, fake_engine(count_up)[0], 17)
    threads = _thread._count()
    for at in chosen:
        interrupted_at(block, fake_engine(count_up)[0], at)
    gc.collect()
    wait_for(lambda: _thread._count() <= threads)


# Real signals and real kernels


@posix
@pytest.mark.parametrize("operation", ["gen", "logits", "next"])
def test_signals_at_random_moments_lose_no_page(operation, tiny_model_dir):
    rng = random.Random()
    with exl_loader.load(tiny_model_dir, ctx_size=1024) as model:
        texts = [[rng.randrange(3, 250) for _ in range(rng.randrange(2, 400))] for _ in range(20)]
        expected = list(model.generate_ids(texts[0], GREEDY))
        cache = model._generator._scheduler.cache

        def ask():
            ids = rng.choice(texts)
            if operation == "gen":
                list(model.generate_ids(ids, {"max_new_tokens": rng.choice([1, 5, 20])}))
            elif operation == "logits":
                model.prompt_logits(ids)
            else:
                model.next_logits(ids)

        usual = signal.signal(signal.SIGALRM, signal.default_int_handler)
        hits = 0
        try:
            for _ in range(60):
                try:
                    delay_s = 1e-4 + rng.random() * rng.choice([0.002, 0.01, 0.05])
                    signal.setitimer(signal.ITIMER_REAL, delay_s)
                    ask()
                    while True:
                        time.sleep(0.001)
                except KeyboardInterrupt:
                    hits += 1
        finally:
            signal.signal(signal.SIGALRM, usual)
        assert hits == 60
        settle(model)
        assert cache.num_free_pages == cache.num_pages
        assert list(model.generate_ids(texts[0], GREEDY)) == expected
        assert within(60, model.unload)


class LoadInterrupter(Interrupter):
    """Interrupts where Python does: after a call, and at the start of a function or a loop."""

    CHECKED = {op for name, op in dis.opmap.items()
               if name.startswith(("CALL", "RESUME", "JUMP_BACKWARD"))}
    PACKAGE = str(Path(engine_module.__file__).parent)

    def __init__(self, at: int) -> None:
        super().__init__(at)
        self.last: dict[int, int] = {}

    def _enter_frame(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(self.PACKAGE):
            return None
        frame.f_trace_opcodes = True
        return self._step

    def _step(self, frame, event, _):
        if event == "return":
            self.last.pop(id(frame), None)
        if event != "opcode":
            return self._step
        before = self.last.get(id(frame))
        self.last[id(frame)] = frame.f_code.co_code[frame.f_lasti]
        return super()._step(frame, event, _) if before in self.CHECKED else self._step


@pytest.mark.parametrize("count", [
    6, pytest.param(150, marks=[pytest.mark.slow, pytest.mark.exhaustive])
])
def test_an_interrupt_of_a_load_frees_all_memory(count, tiny_model_dir):
    def load():
        with exl_loader.load(tiny_model_dir, ctx_size=512, cache_type="q8"):
            pass

    load()
    gc.collect()
    before = live_bytes()
    with LoadInterrupter(0) as counter:
        load()
    for _ in range(count):
        with (
            contextlib.suppress(KeyboardInterrupt),
            LoadInterrupter(random.randrange(1, counter.count + 1)),
        ):
            load()
        gc.collect()
        wait_for(lambda: live_bytes() == before)
    # No lock is held that the next load needs.
    assert within(120, load)


# Calls that would wait for themselves


class CallingProgress(NullProgress):
    """Makes a call in the model's thread, as a faulty host may do."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call

    def start(self, *_):
        self.call()


@pytest.mark.parametrize("call", [
    lambda engine: list(engine.generate_ids([5], GREEDY)),
    lambda engine: engine.prompt_logits([5]),
])
def test_a_request_made_in_a_callback_is_refused(call):
    engine, _, cache = fake_engine(count_up)
    progress = CallingProgress(lambda: call(engine))
    with pytest.raises(InvalidCall, match="own thread.*after the callback"):
        list(engine.generate_ids([5], GREEDY, progress=progress))
    assert cache.num_free_pages == cache.num_pages


def test_unload_in_a_callback_unloads_after_the_step():
    engine, _, cache = fake_engine(count_up)
    with pytest.raises(ModelUnloaded):
        list(engine.generate_ids([5], GREEDY, progress=CallingProgress(engine.unload)))
    assert within(60, engine.unload)
    assert engine.allocated_bytes() == 0


@pytest.mark.parametrize("method", ["start", "advance", "finish"])
def test_an_error_of_a_callback_ends_only_its_own_request(method):
    class Failing(CallingProgress):
        pass

    def fail(*_):
        raise OSError("the terminal is gone")

    setattr(Failing, method, fail)
    engine, _, cache = fake_engine(count_up, pages=4)
    other = engine.generate_ids([10], GREEDY)
    first = next(other)
    with pytest.raises(OSError, match="terminal"):
        list(engine.generate_ids([5], GREEDY, progress=Failing(lambda: None)))
    assert [first, *other] == [11, 12, 13, 14]
    assert cache.num_free_pages == cache.num_pages


# Waiting


def test_a_wait_that_polls_lasts_as_long_as_the_step(monkeypatch):
    """On Windows callers poll, because Ctrl-C does not interrupt a wait for a lock."""
    monkeypatch.setattr(exchange, "INTERRUPT_POLL_S", 0.001)
    engine, model, _ = fake_engine(count_up)
    model.before_call = lambda: time.sleep(0.02)
    assert list(engine.generate_ids([5], GREEDY)) == [6, 7, 8, 9]
    assert within(60, engine.unload)


def test_a_refused_thread_is_an_error(monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    engine, _, cache = fake_engine(count_up)
    generation = engine.generate_ids([5], GREEDY)
    with monkeypatch.context() as patched:
        patched.setattr(_thread, "start_new_thread", refuse)
        with pytest.raises(InsufficientMemory, match="thread.*refused it"):
            next(generation)
        other, _, _ = fake_engine(count_up)
        other.unload()
        assert other.allocated_bytes() == 0
    del generation
    assert list(engine.generate_ids([5], GREEDY)) == [6, 7, 8, 9]
    assert cache.num_free_pages == cache.num_pages


def test_an_error_of_the_scheduler_itself_ends_all_waits(monkeypatch):
    """Every caller gets an error that names it, and unload returns."""
    engine, _, _ = fake_engine(count_up)
    next(engine.generate_ids([5], GREEDY))

    def fail():
        raise AssertionError("a page is given back twice")

    monkeypatch.setattr(engine._generator._scheduler, "step", fail)
    for _ in range(2):
        with pytest.raises(ModelUnloaded, match="AssertionError: a page is given back twice"):
            list(engine.generate_ids([5], GREEDY))
    assert within(60, engine.unload)
    assert engine.allocated_bytes() == 0


def test_all_waiting_callers_of_one_request_are_woken():
    """One thread reads, two close: none waits for a message that another one took."""
    engine, model, cache = fake_engine(count_up)
    inside, go_on = threading.Event(), threading.Event()

    def pause():
        inside.set()
        assert go_on.wait(300)

    model.before_call = pause
    generation = engine.generate_ids([5], GREEDY)
    works = [lambda: list(generation), generation.close, generation.close]
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    threads[0].start()
    assert inside.wait(300)
    for thread in threads[1:]:
        thread.start()
    while len(generation._job._waiters) < 3:
        time.sleep(0.001)
    go_on.set()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()
    assert cache.num_free_pages == cache.num_pages


# Other processes and the process's end


def run_script(script: str, *args: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new process that can import the tests' modules."""
    return subprocess.run(
        [sys.executable, "-c",
         f"import sys\nsys.path[:0] = ['tests', 'tests/generation']\n{script}", *args],
        cwd=REPO, capture_output=True, text=True, timeout=timeout,
    )


FORK = """
import contextlib, os, threading, time
import exl_loader
from exl_loader.utils.errors import ModelForked, ModelUnloaded

model = exl_loader.load(sys.argv[1], ctx_size=4096)
settings = {"temperature": 0, "max_new_tokens": 3000, "ban_eos_token": True}
expected = list(model.generate_ids([5, 6], settings | {"max_new_tokens": 20}))
reading = model.generate_ids([7], settings)
next(reading)

def read():
    with contextlib.suppress(ModelUnloaded):
        list(model.generate_ids([9], settings))

threading.Thread(target=read, daemon=True).start()
time.sleep(0.05)
child = os.fork()
if child == 0:
    for call in (
        lambda: next(reading),
        lambda: model.generate("hi", settings),
        lambda: model.generate_ids([5], settings),
        lambda: model.prompt_logits([5]),
        lambda: model.next_logits([5]),
        lambda: model.prompt_logprobs([5, 6]),
        lambda: list(model.run_alone(lambda model, cache: iter(()))),
        model.stop,
    ):
        try:
            call()
        except ModelForked as error:
            assert "forked" in str(error) and "spawn" in str(error)
        else:
            raise SystemExit("no error")
    reading.stop()
    reading.close()
    model.unload()
    model.unload()
    del model, reading
    sys.exit(7)  # the interpreter's whole end, and not os._exit
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7, status
reading.close()
assert list(model.generate_ids([5, 6], settings | {"max_new_tokens": 20})) == expected
model.unload()
print("parent done")
"""


@posix
def test_a_forked_child_gets_an_error_and_can_exit(tiny_model_dir):
    ended = run_script(FORK, str(tiny_model_dir))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "parent done\n", "")


FORK_IN_CALLBACK = """
import os
from test_interrupts import GREEDY, CallingProgress, count_up, fake_engine

children = []
engine, _, _ = fake_engine(count_up)
progress = CallingProgress(lambda: children.append(os.fork()))
assert list(engine.generate_ids([5], GREEDY, progress=progress)) == [6, 7, 8, 9]
_, status = os.waitpid(children[0], 0)
print(os.waitstatus_to_exitcode(status))
"""


@posix
def test_a_child_forked_in_a_callback_ends():
    """The child has only the model's thread, whose callers exist in the parent."""
    ended = run_script(FORK_IN_CALLBACK)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "0\n", "")


END = """
import threading, time
import exl_loader

model = exl_loader.load(sys.argv[1], ctx_size=32768)
settings = {"temperature": 0, "max_new_tokens": 15000, "ban_eos_token": True}
began = threading.Event()

def read():
    for _ in model.generate_ids([5], settings):
        began.set()

threading.Thread(target=read, daemon=True).start()
assert began.wait(300)
print("end", flush=True)
"""


@pytest.mark.parametrize("how", ["", "generation = model.generate_ids([7], settings)\n"
                                 "next(generation)\nsys.exit()"])
def test_a_process_that_ends_while_it_generates_ends_cleanly(how, tiny_model_dir):
    ended = run_script(f"{END}\n{how}", str(tiny_model_dir))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "end\n", "")
