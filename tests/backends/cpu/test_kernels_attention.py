"""What only a CPU has of attention: threads, and sequences that take turns in scratch.

What every backend's attention has in common is in operations/test_attention.py.
"""

from __future__ import annotations

import pytest
import torch

from backends.operations.test_attention import assert_close
from exl_loader.backends.cpu.attention import attention_scratch_bytes
from exl_loader.backends.cpu.threads import default_threads
from support.attention_cases import attend, expected_of, filled_layer, shape_of
from support.cache_layers import make_batch, part, random_rows
from support.targets import target

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture
def ops():
    ops = target("native", None, threads=2)
    yield ops
    ops.ops.set_threads(default_threads())


@pytest.mark.parametrize("cache_type", ["fp16", "q8_q4"])
def test_the_number_of_threads_changes_no_bit(ops, cache_type, monkeypatch):
    shape = shape_of(8, 2, 64)
    batch = make_batch([1700, 0, 5], [1, 200, 1])
    q = random_rows(batch.num_rows, 8, 64, 5)
    results, layers = [], []
    try:
        for threads in (1, 2, 3, 4):
            monkeypatch.setenv("EXL_LOADER_THREADS", str(threads))
            ops.ops.set_threads(threads)
            layers.append(filled_layer(ops, cache_type, batch, shape))
            results.append(attend(ops, q, layers[-1], batch, shape))
    finally:
        monkeypatch.undo()
        ops.ops.set_threads(default_threads())
    for other, layer in zip(results[1:], layers[1:], strict=True):
        assert torch.equal(other, results[0])
        for name in ("k_codes", "v_codes"):
            ours, first = (getattr(one, name).view(torch.uint8) for one in (layer, layers[0]))
            assert torch.equal(ours, first)


def test_more_threads_than_scratch_has_room_for(ops, monkeypatch):
    """Another model that is loaded meanwhile may ask for more threads."""
    shape = shape_of(8, 2, 64)
    batch = make_batch([1700, 0, 5], [1, 200, 1])
    layer, q = filled_layer(ops, "q4", batch, shape), random_rows(batch.num_rows, 8, 64, 5)
    expected = attend(ops, q, layer, batch, shape)
    monkeypatch.setenv("EXL_LOADER_THREADS", "1")
    nbytes = attention_scratch_bytes(3, 1701, shape)
    memory, out = torch.full((5 * nbytes,), 77, dtype=torch.uint8), torch.empty_like(q)
    try:
        ops.ops.set_threads(4)
        for _ in range(10):
            ops.attention(q, layer, batch, shape, out, memory[:nbytes])
            assert torch.equal(out, expected) and (memory[nbytes:] == 77).all()
    finally:
        monkeypatch.undo()
        ops.ops.set_threads(default_threads())


def test_more_sequences_than_there_are_slots_take_turns(ops):
    """Sequences that share their pages need more partial results than scratch has room for."""
    shape = shape_of(4, 2, 64)
    alone = make_batch([1500], [1])
    layer = filled_layer(ops, "q4", alone, shape)
    count = 9
    batch = part(alone, [1500 - 100 * s for s in range(count)], [1] * count)
    batch.page_table = alone.page_table.repeat(count, 1)
    q = random_rows(batch.num_rows, 4, 64, 7)
    actual, expected = attend(ops, q, layer, batch, shape), expected_of(q, layer, batch, shape)
    assert_close(ops, actual, expected, batch, 0.0)


def test_one_overwhelming_key_takes_all_the_weight(ops):
    shape = shape_of(2, 2, 64, scale=1.0)
    batch = make_batch([700], [1])
    layer = filled_layer(ops, "fp32", batch, shape)
    q = random_rows(1, 2, 64, 3) * 1e4
    out = attend(ops, q, layer, batch, shape)
    keys, values = (x[batch.page_table[0].long()] for x in (layer.k_codes, layer.v_codes))
    for head in range(2):
        scores = keys[:, head].flatten(0, 1)[:701] @ q[0, head]
        winner = values[:, head].flatten(0, 1)[scores.argmax()]
        assert torch.allclose(out[0, head], winner, rtol=1e-6)
