"""The CPU's elementwise operations: refused indices, threads, and prepared calls.

What every backend's operations have in common is in operations/test_elementwise.py.
"""

from __future__ import annotations

import ctypes
import os
import weakref

import pytest
import torch

from exl_loader.backends.cpu.threads import default_threads
from exl_loader.backends.recorder import Add, Clamp, Embed, Function, LayerNorm, Product, RmsNorm
from exl_loader.utils.errors import InvalidSettings
from support.kernel_cases import dense_linear, random_rows
from support.targets import CPUS, target


@pytest.fixture(params=CPUS)
def ops(request):
    return target(request.param, None).ops


def test_embed_refuses_ids_beyond_the_table(ops):
    out = torch.full((2, 8), 7.0)
    for table in (random_rows(50, 8), dense_linear(8, 50, torch.float16)):
        for wrong in (50, -1):
            with pytest.raises(AssertionError, match="token id"):
                ops.embed(torch.tensor([1, wrong], dtype=torch.int32), table, 1.0, out)
    assert (out == 7.0).all()


def test_every_half_is_read_as_torch_reads_it(ops):
    halves = torch.arange(65536).to(torch.int32).short().view(torch.float16).reshape(256, 256)
    out = torch.empty(256, 256)
    ops.embed(torch.arange(256).int(), halves, 1.0, out)
    expected = halves.float()
    assert torch.equal(out.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


@pytest.mark.parametrize("wrong", [20, -1])
def test_rows_beyond_the_tensor_are_refused(ops, wrong):
    x, out, weights = random_rows(20, 70), torch.zeros(4, 70), torch.ones(4)
    rows = torch.tensor([0, 0, 0, wrong], dtype=torch.int32)
    with pytest.raises(AssertionError, match="row beyond"):
        ops.gather_rows(x, rows, out)
    with pytest.raises(AssertionError, match="row beyond"):
        ops.scatter_add_rows(out, rows, weights, x)


def test_threads_setting(monkeypatch):
    monkeypatch.setenv("EXL_LOADER_THREADS", "3")
    assert default_threads() == 3
    for wrong in ("0", "many", "-1", "100000"):
        monkeypatch.setenv("EXL_LOADER_THREADS", wrong)
        with pytest.raises(InvalidSettings, match="EXL_LOADER_THREADS"):
            default_threads()
    monkeypatch.delenv("EXL_LOADER_THREADS")
    assert default_threads() >= 1


def test_a_prepared_call_reads_the_values_of_its_replay(ops):
    x, weight, out = random_rows(2, 64), torch.ones(64), torch.empty(2, 64)
    (call,) = ops.prepare([RmsNorm(x, weight, 1e-5, out)])
    for seed in (5, 6):
        x.copy_(random_rows(2, 64, seed))
        call()
        expected = torch.empty(2, 64)
        ops.rms_norm(x, weight, 1e-5, expected)
        assert torch.equal(out, expected)


def test_a_prepared_call_keeps_its_tensors_alive(ops):
    w, x, out = dense_linear(32, 48, torch.float32), random_rows(1, 32), torch.empty(1, 48)
    expected = torch.empty(1, 48)
    ops.linear(x, w, expected, torch.empty(4096, dtype=torch.uint8))
    scratch = torch.empty(4096, dtype=torch.uint8)
    alive = [weakref.ref(tensor) for tensor in (w.weight, x, scratch)]
    (call,) = ops.prepare([Product(x, w, out, scratch, False)])
    del w, x, scratch
    assert all(tensor() is not None for tensor in alive)
    call()
    assert torch.equal(out, expected)
    del call
    assert all(tensor() is None for tensor in alive)


def test_a_prepared_call_that_fails_raises(ops):
    ids, table, out = torch.tensor([3], dtype=torch.int32), random_rows(4, 8), torch.empty(1, 8)
    (call,) = ops.prepare([Embed(ids, table, 1.0, out)])
    call()
    ids.fill_(4)
    with pytest.raises(AssertionError, match="token id"):
        call()


@pytest.mark.parametrize("count", [4, 50])
def test_consecutive_calls_are_joined_and_run_in_order(ops, count):
    seed = int.from_bytes(os.urandom(3), "little")
    x, weight, out = random_rows(3, 70, seed), random_rows(1, 70), torch.empty(3, 70)
    calls = [LayerNorm(x, weight, None, 1e-3, out), Add(x, out, -0.75), Clamp(x, 1.25)]
    calls = [calls[i % 3] for i in range(count)]
    expected = x.clone()
    for call in calls:
        call.run(ops)
    expected, x[:] = x.clone(), expected
    prepared = ops.prepare(calls)
    assert len(prepared) < count / 3
    for replay in prepared:
        replay()
    assert torch.equal(x, expected), seed


def test_a_function_runs_between_the_calls_before_and_after_it(ops):
    x, y, seen = torch.ones(1, 8), torch.ones(1, 8), []
    calls = [Add(x, y, 1.0), Function(lambda _: seen.append(x.clone())), Add(x, y, 2.0)]
    for replay in ops.prepare(calls):
        replay()
    assert torch.equal(seen[0], torch.full((1, 8), 2.0))
    assert torch.equal(x, torch.full((1, 8), 4.0))


def test_joined_calls_end_at_the_one_that_fails(ops):
    ids, table, out = torch.tensor([9], dtype=torch.int32), random_rows(4, 8), torch.empty(1, 8)
    x, y = torch.ones(1, 8), torch.ones(1, 8)
    (replay,) = ops.prepare([Add(x, y, 1.0), Embed(ids, table, 1.0, out), Add(x, y, 1.0)])
    with pytest.raises(AssertionError, match="token id"):
        replay()
    assert torch.equal(x, torch.full((1, 8), 2.0))


@pytest.mark.parametrize("count", [0, 1, 1000, 65536, 3 * 65536 + 77])
def test_a_buffer_is_read_from_its_first_to_its_last_byte(ops, count):
    generator = torch.Generator().manual_seed(count)
    words = torch.randint(-(1 << 31), 1 << 31, (count,), dtype=torch.int32, generator=generator)
    out = ctypes.c_int32()
    ops._call("read_sum", words.data_ptr(), count, ctypes.byref(out))
    assert out.value % (1 << 32) == int(words.long().sum()) % (1 << 32)
    assert ops.read_through(words.view(torch.uint8)) == words.nbytes
