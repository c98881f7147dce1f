"""A load takes what was planned, to the byte; a load that fails frees everything."""

from __future__ import annotations

import gc
import os
import secrets
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import exl_loader
from exl_loader.backends import BACKENDS
from exl_loader.backends.base import Capacity
from exl_loader.backends.cpu.backend import CpuBackend
from exl_loader.checkpoint import Checkpoint
from exl_loader.memory import buffers as memory
from exl_loader.utils.errors import (
    ExlLoaderError,
    InsufficientMemory,
    InvalidCheckpoint,
    InvalidTokenizer,
    KernelBuildError,
    ModelUnloaded,
)
from exl_loader.utils.progress import NullProgress
from support.makers import write_quantized_model
from support.tiny import CONFIG, write_tiny_model

CTX = 600
IDS = [1, 50, 99, 7, 200, 31]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def reference_operations(monkeypatch):
    """Use the reference operations, because compiling takes long."""
    monkeypatch.setenv("EXL_LOADER_REFERENCE", "1")


@pytest.fixture
def nothing_left():
    """Check that a test leaves no buffer and no open file behind."""
    gc.collect()
    bytes_before, files_before = memory.live_bytes(), open_files()
    yield
    gc.collect()
    assert memory.live_bytes() == bytes_before
    assert open_files() == files_before


def open_files() -> list[str]:
    """Return the files of model folders that this process has open."""
    folder = "/proc/self/fd"
    links = []
    for name in os.listdir(folder):
        try:
            links.append(os.readlink(f"{folder}/{name}"))
        except OSError:
            continue
    return sorted(link for link in links if ".safetensors" in link or "tokenizer" in link)


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Recorder(NullProgress):
    """A progress that adds up what it gets."""

    def __init__(self) -> None:
        self.totals: dict[str, tuple[int | None, str]] = {}
        self.done: dict[str, int] = {}
        self.finished: list[str] = []

    def start(self, task, total, unit):
        self.totals[task], self.done[task] = (total, unit), 0

    def advance(self, task, n=1):
        self.done[task] += n

    def finish(self, task):
        self.finished.append(task)


def check_kept(model, folder, **options) -> None:
    """Check that planned, allocated and existing bytes are the same number."""
    total = exl_loader.plan(folder, ctx_size=CTX, **options).total_bytes
    assert model.allocated_bytes() == total == model.reservation.total_bytes
    assert memory.live_bytes() == total


@pytest.mark.parametrize("cache_type", ["fp16", "q8", "q6", "q4", "q3", "q8_q4", "fp32"])
def test_dense_model_takes_what_was_planned(tiny_model_dir, nothing_left, cache_type):
    options = {"cache_type": cache_type}
    with exl_loader.load(tiny_model_dir, ctx_size=CTX, **options) as model:
        check_kept(model, tiny_model_dir, **options)
        assert "".join(model.generate("def f", {"max_new_tokens": 9, "seed": 1})) is not None
        model.prompt_logits(IDS * 15)
        check_kept(model, tiny_model_dir, **options)
    assert model.allocated_bytes() == 0


@pytest.mark.parametrize("format", ["exl2", "gptq", "dense"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_format_takes_what_was_planned(tmp_path, nothing_left, format, tied):
    folder, config = tmp_path / "m", {"tie_word_embeddings": tied}
    if format == "dense":
        write_tiny_model(folder, seed=3, **config)
    else:
        write_quantized_model(folder, format, seed=3, config=config)
    with exl_loader.load(folder, ctx_size=CTX, chunk_size=40, max_batch_size=3) as model:
        check_kept(model, folder, chunk_size=40, max_batch_size=3)
        assert model.prompt_logits(IDS).isfinite().all()


@pytest.mark.parametrize("format", ["exl2", "gptq", "dense"])
def test_any_number_of_threads_loads_the_same_bytes(tmp_path, monkeypatch, nothing_left, format):
    folder, weights = tmp_path / "m", []
    config, seed = {"num_hidden_layers": 3}, secrets.randbelow(1 << 30)
    if format == "dense":
        write_tiny_model(folder, seed=seed, **config)
    else:
        write_quantized_model(folder, format, seed=seed, config=config)
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("EXL_LOADER_THREADS", threads)
        with exl_loader.load(folder, ctx_size=CTX) as model:
            weights.append(model._buffers.whole("weights", "cpu").clone())
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2]), seed


def test_fixtures_take_what_was_planned(fixtures_dir, nothing_left):
    for folder in sorted(p for p in fixtures_dir.iterdir() if p.is_dir()):
        with exl_loader.load(folder, ctx_size=CTX, cache_type="q4") as model:
            check_kept(model, folder, cache_type="q4")


def test_progress_counts_every_byte(tiny_model_dir, nothing_left):
    recorder = Recorder()
    with exl_loader.load(tiny_model_dir, ctx_size=CTX, progress=recorder) as model:
        total = model.reservation.total_bytes
    assert recorder.totals["reserving memory"] == (total, "bytes")
    assert recorder.done["reserving memory"] == total
    read, unit = recorder.totals["loading weights"]
    assert unit == "bytes" and recorder.done["loading weights"] == read > 0
    assert {"reserving memory", "loading weights"} <= set(recorder.finished)


def test_progress_has_the_draft_model_whole_before_the_model(tiny_model, nothing_left):
    folder, calls = tiny_model(num_hidden_layers=3), []
    draft = tiny_model("draft", num_hidden_layers=2, hidden_size=32)

    class Ordered(Recorder):
        def start(self, task, total, unit):
            super().start(task, total, unit)
            calls.append(("start", task))

        def finish(self, task):
            super().finish(task)
            calls.append(("finish", task))

    recorder, options = Ordered(), {"cache_type": "q4", "model_draft": draft}
    with exl_loader.load(folder, ctx_size=CTX, progress=recorder, **options) as model:
        check_kept(model, folder, **options)
    names = ["loading draft weights", "sampling draft keys", "loading weights", "sampling keys"]
    reported = [(what, task) for what, task in calls if task in names]
    assert reported == [(what, task) for task in names for what in ("start", "finish")]
    for name, path in (("loading draft weights", draft), ("loading weights", folder)):
        alone = Recorder()
        exl_loader.load(path, ctx_size=CTX, cache_type="q4", progress=alone).unload()
        assert recorder.totals[name] == alone.totals["loading weights"]
        assert recorder.totals[name] == (recorder.done[name], "bytes")
    assert 0 < recorder.done["loading draft weights"] < recorder.done["loading weights"]


@pytest.mark.parametrize(("options", "draft", "tasks"), [
    ({"cache_type": "q4"}, True, {"sampling keys": 3, "sampling draft keys": 2}),
    ({"cache_type": "q8_q4"}, False, {}),
    # The sample has 64 ids and runs in several steps.
    ({"cache_type": "q6", "chunk_size": 24, "max_batch_size": 2}, False,
     {"sampling keys": 3}),
    ({"cache_type": "fp16"}, True, {}),
])
def test_progress_counts_the_layers_whose_keys_are_sampled(
    tiny_model, nothing_left, options, draft, tasks
):
    folder, recorder = tiny_model(num_hidden_layers=3), Recorder()
    if draft:
        options = options | {"model_draft": tiny_model("draft", num_hidden_layers=2)}
    with exl_loader.load(folder, ctx_size=CTX, progress=recorder, **options):
        pass
    counted = {name: total for name, total in recorder.totals.items() if "sampling" in name}
    assert counted == {name: (layers, "layers") for name, layers in tasks.items()}
    assert {name: recorder.done[name] for name in tasks} == tasks
    assert set(tasks) <= set(recorder.finished)


def test_a_folder_without_tokenizer_runs_on_ids(tiny_model, nothing_left):
    folder = tiny_model(tokenizer=False)
    settings = {"max_new_tokens": 3, "temperature": 0, "ban_eos_token": True}
    with exl_loader.load(folder, ctx_size=CTX) as model:
        ids = list(model.generate_ids(IDS, settings))
        logits = model.prompt_logits([*IDS, *ids])[len(IDS) - 1 : -1]
        logits[:, CONFIG["eos_token_id"]] = -torch.inf
        assert ids == logits.argmax(dim=1).tolist() and len(ids) == 3
        with pytest.raises(InvalidTokenizer, match="tokenizer.json"):
            model.encode("text")


def test_two_models_at_once_and_each_alone(tiny_model, nothing_left):
    folder = tiny_model()
    with exl_loader.load(folder, ctx_size=CTX) as one:
        alone = one.prompt_logits(IDS)
        with exl_loader.load(folder, ctx_size=CTX, cache_type="q8") as two:
            assert memory.live_bytes() == one.allocated_bytes() + two.allocated_bytes()
            two.prompt_logits(IDS)
            assert one.prompt_logits(IDS).equal(alone)
        assert one.prompt_logits(IDS).equal(alone)


def test_two_loads_at_once_keep_the_limit_together(tiny_model_dir, monkeypatch, nothing_left):
    from exl_loader import loader

    total = exl_loader.plan(tiny_model_dir, ctx_size=CTX).total_bytes
    monkeypatch.setenv("EXL_LOADER_MEMORY_LIMIT", str(2 * total - 1))
    both_planned, allocate = threading.Barrier(2, timeout=300), loader.allocate

    def wait_and_allocate(*arguments):
        both_planned.wait()
        return allocate(*arguments)

    monkeypatch.setattr(loader, "allocate", wait_and_allocate)

    def load(_):
        try:
            return exl_loader.load(tiny_model_dir, ctx_size=CTX)
        except InsufficientMemory as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(load, range(2)))
    (refused,) = (one for one in found if isinstance(one, str))
    (model,) = (one for one in found if not isinstance(one, str))
    assert memory.live_bytes() == model.allocated_bytes() == total
    assert f"{total} bytes" in refused and f"{total - 1} bytes left" in refused
    model.unload()


def test_a_model_for_more_threads_beside_one_for_fewer(tmp_path, monkeypatch, nothing_left):
    """Both models share the threads; each uses as many as its workspace has room for."""
    monkeypatch.delenv("EXL_LOADER_REFERENCE")
    folder, ids = tmp_path / "m", IDS * 15
    write_quantized_model(folder, "exl2", seed=3)
    monkeypatch.setenv("EXL_LOADER_THREADS", "1")
    with exl_loader.load(folder, ctx_size=CTX) as one:
        alone = one.prompt_logits(ids)
        monkeypatch.setenv("EXL_LOADER_THREADS", "3")
        with exl_loader.load(folder, ctx_size=CTX) as two:
            assert two.allocated_bytes() > one.allocated_bytes()
            assert one.prompt_logits(ids).equal(alone)
            assert two.prompt_logits(ids).equal(alone)


def test_unloading_frees_all_memory_and_ends_use(tiny_model_dir, nothing_left):
    model = exl_loader.load(tiny_model_dir, ctx_size=CTX)
    assert memory.live_bytes() > 0
    model.unload()
    # The object is still here, and so might be a host's reference to it.
    assert memory.live_bytes() == 0 and model.allocated_bytes() == 0
    model.unload()
    with pytest.raises(ModelUnloaded):
        model.prompt_logits(IDS)


def test_several_devices_run_as_planned(tiny_model_dir, nothing_left):
    with exl_loader.load(tiny_model_dir, ctx_size=CTX) as model:
        alone = model.prompt_logits(IDS)
        total = model.allocated_bytes()
    split = {"device": ["cpu:0", "cpu:1"], "gpu_split": [0.9 * total / 2**30, 1.0]}
    planned = exl_loader.plan(tiny_model_dir, ctx_size=CTX, **split)
    assert [(d.first_layer, d.end_layer) for d in planned.devices] == [(0, 1), (1, 2)]
    with exl_loader.load(tiny_model_dir, ctx_size=CTX, **split) as model:
        assert model.prompt_logits(IDS).equal(alone)
        for device in planned.devices:
            assert memory.live_bytes(device.device) == device.total_bytes
        assert model.allocated_bytes() == planned.total_bytes


# Injected failures. `fails` loads, expects the error, keeps it as a host would, and looks.


def fails(folder, error: type[BaseException], **options) -> BaseException:
    before = memory.live_bytes()
    with pytest.raises(error) as caught:
        exl_loader.load(folder, ctx_size=CTX, **options)
    assert memory.live_bytes() == before
    assert open_files() == []
    return caught.value


def loads(folder, expected=None):
    with exl_loader.load(folder, ctx_size=CTX) as model:
        logits = model.prompt_logits(IDS)
    assert expected is None or logits.equal(expected)
    return logits


class Failing(CpuBackend):
    """Main memory that fails in a chosen way at its n-th buffer."""

    def __init__(self, fail_at: int, how: str) -> None:
        super().__init__()
        self.taken, self.fail_at, self.how = 0, fail_at, how

    def _now(self, how: str) -> bool:
        return self.how == how and self.taken == self.fail_at

    def empty(self, name, nbytes):
        self.taken += 1
        if self._now("refuse"):
            raise MemoryError
        return super().empty(name, nbytes)

    def capacity(self, name):
        return Capacity(1 << 40, 0) if self._now("vanish") else super().capacity(name)

    def touch(self, buffer):
        if self._now("interrupt"):
            raise KeyboardInterrupt
        super().touch(buffer)


@pytest.mark.parametrize("fail_at", [1, 2, 3])
@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("refuse", InsufficientMemory),
        ("vanish", InsufficientMemory),
        ("interrupt", KeyboardInterrupt),
    ],
)
def test_a_failure_at_each_allocation(
    tiny_model_dir, monkeypatch, nothing_left, fail_at, how, error
):
    expected = loads(tiny_model_dir)
    with monkeypatch.context() as patch:
        patch.setitem(BACKENDS, "cpu", Failing(fail_at, how))
        caught = fails(tiny_model_dir, error)
    if error is InsufficientMemory:
        assert "All memory was given back" in str(caught)
        assert f"for the {('weights', 'cache', 'workspace')[fail_at - 1]} buffer" in str(caught)
    loads(tiny_model_dir, expected)


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_failure_at_each_read_of_each_shard(
    tiny_model, monkeypatch, nothing_left, error, drafted
):
    folder, options = tiny_model(shards=3), {}
    if drafted:
        # In a cache of 4 bits the draft model has run before the model is read.
        options = {"model_draft": tiny_model("draft", shards=2), "cache_type": "q4"}
    expected, fill, calls = loads(folder), Checkpoint._fill, 0

    def failing_at(n: int):
        def read(self, header, offset, target):
            nonlocal calls
            calls += 1
            if calls != n:
                return fill(self, header, offset, target)
            target[: len(target) // 2] = bytes(len(target) // 2)
            if isinstance(error, OSError):
                raise InvalidCheckpoint(header.path.name) from error
            raise error

        return read

    reads = 0
    while True:
        calls, reads = 0, reads + 1
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "_fill", failing_at(reads))
            try:
                exl_loader.load(folder, ctx_size=CTX, **options).unload()
            except (InvalidCheckpoint, KeyboardInterrupt):
                assert memory.live_bytes() == 0 and open_files() == []
            else:
                break
    assert reads > (40 if drafted else 20) and reads == calls + 1
    loads(folder, expected)


@pytest.mark.parametrize("how", ["numpy", "torch"])
def test_memory_that_runs_out_while_weights_are_read(
    tiny_model_dir, monkeypatch, nothing_left, how
):
    def hungry(*_):
        if how == "torch":
            torch.empty(1 << 60, dtype=torch.uint8)
        raise MemoryError

    expected = loads(tiny_model_dir)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "_fill", hungry)
        caught = fails(tiny_model_dir, InsufficientMemory)
    assert "All memory was given back" in str(caught)
    loads(tiny_model_dir, expected)


def test_a_shard_that_shrinks_after_planning(tiny_model, monkeypatch, nothing_left):
    folder = tiny_model(shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    expected = loads(folder)

    def shrink_then_allocate(*arguments):
        shard.write_bytes(whole[:-100])
        return allocate(*arguments)

    from exl_loader import loader

    allocate = loader.allocate
    monkeypatch.setattr(loader, "allocate", shrink_then_allocate)
    caught = fails(folder, InvalidCheckpoint)
    assert shard.name in str(caught)
    monkeypatch.undo()
    monkeypatch.setenv("EXL_LOADER_REFERENCE", "1")
    shard.write_bytes(whole)
    loads(folder, expected)


def test_kernels_that_do_not_build(tiny_model_dir, monkeypatch, nothing_left):
    def broken(*_):
        raise KernelBuildError("the compiler", actual="it says no")

    with monkeypatch.context() as patch:
        patch.setattr("exl_loader.loader.get_ops", broken)
        fails(tiny_model_dir, KernelBuildError)
    loads(tiny_model_dir)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {"type": "BPE"}}', b"\xff\xfe"])
def test_a_broken_tokenizer(tiny_model, nothing_left, content):
    folder = tiny_model()
    good = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(content)
    fails(folder, InvalidTokenizer)
    (folder / "tokenizer.json").write_bytes(good)
    loads(folder)


@pytest.mark.parametrize(
    "step", ["exl_loader.model.forward.Model", "exl_loader.engine.LoadedModel"]
)
def test_a_failure_after_the_weights_are_read(tiny_model_dir, monkeypatch, nothing_left, step):
    def broken(*arguments, **options):
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(step, broken)
        fails(tiny_model_dir, RuntimeError)
    loads(tiny_model_dir)


def test_an_option_that_only_the_model_can_check(tiny_model_dir, nothing_left):
    fails(tiny_model_dir, ExlLoaderError, alpha_value=-1.0)
    loads(tiny_model_dir)


def test_an_error_keeps_no_buffer_alive_through_its_cause(tiny_model, nothing_left):
    folder = tiny_model()
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2:] = b"\x00\x7e"  # a float16 NaN in the last tensor of the file
    path.write_bytes(data)
    error = fails(folder, InvalidCheckpoint)
    assert "finite" in str(error)
    assert memory.live_bytes() == 0


def test_fifty_reloads_leave_no_growth(tiny_model_dir, nothing_left, monkeypatch):
    monkeypatch.delenv("EXL_LOADER_REFERENCE")
    settings = [("fp16", 300), ("q4", 3000), ("q8_q4", 1000), ("q6", 257), ("q3", 2000)]
    models = weakref.WeakSet()
    for i in range(50):
        cache_type, ctx_size = settings[i % len(settings)]
        model = exl_loader.load(tiny_model_dir, ctx_size=ctx_size, cache_type=cache_type)
        models.add(model)
        list(model.generate_ids(IDS, {"max_new_tokens": 2}))
        model.unload()
        assert memory.live_bytes() == 0
        if i == 9:
            gc.collect()
            after_ten = resident_bytes()
    del model
    gc.collect()
    assert not models
    assert resident_bytes() - after_ten < 8 * MIB
