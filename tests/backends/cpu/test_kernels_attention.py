"""Cache writing and attention of the CPU kernels, held against the reference operations."""

from __future__ import annotations

import platform

import pytest
import torch

from exl_loader.backends import get_ops
from exl_loader.backends.base import AttentionShape
from exl_loader.backends.cpu.attention import attention_scratch_bytes
from exl_loader.backends.cpu.threads import default_threads
from exl_loader.backends.reference.ops import ReferenceOps
from support.cache_layers import attend, make_batch, make_layer, one_of, part, random_rows, write
from support.kernel_cases import compiled_ops

REFERENCE = ReferenceOps()
# A score's error is that of a float32 sum of head_dim products, some 2^-24 * |q| * |k| * scale
# (about 100 with the rows used here), and passes into its weight as it is.
TOLERANCE = 2e-5
MIXED = ("q8_q4", "fp16_q6", "q4_fp16")


@pytest.fixture(scope="module")
def ops():
    found = get_ops()
    if found.name == "reference":
        pytest.skip("no C++ compiler")
    return found


@pytest.fixture(
    scope="module",
    params=["native", "x86-64-v3", "x86-64"],
)
def every_ops(request, ops):
    """The kernels for this machine, for AVX2, and in plain C++."""
    if request.param == "native":
        return ops
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("instruction sets of x86-64")
    return compiled_ops(request.param)


def shape_of(heads, kv_heads, head_dim, *, softcap=0.0, window=0):
    return AttentionShape(heads, kv_heads, head_dim, head_dim**-0.5, softcap, window)


def filled(writer, cache_type, shape, batch, seed=0):
    """Return a layer that holds everything before and in the batch's rows."""
    past = batch.past_len.tolist()
    q_lens = batch.q_start.diff().tolist()
    whole = part(batch, [0] * len(past), [p + q for p, q in zip(past, q_lens, strict=True)])
    num_pages = int(batch.page_table.max()) + 1
    layer = make_layer(cache_type, num_pages, shape.num_kv_heads, shape.head_dim)
    rows = whole.num_rows
    k = random_rows(rows, shape.num_kv_heads, shape.head_dim, seed)
    v = random_rows(rows, shape.num_kv_heads, shape.head_dim, seed + 1)
    write(writer, k, v, layer, whole)
    return layer


def assert_like_reference(ops, layer, batch, shape, seed=7):
    q = random_rows(batch.num_rows, shape.num_heads, shape.head_dim, seed)
    expected = attend(REFERENCE, q, layer, batch, shape)
    actual = attend(ops, q, layer, batch, shape)
    assert expected.isfinite().all()
    worst = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert worst.max() <= TOLERANCE, worst.max()


@pytest.mark.parametrize("cache_type", ["fp32", "fp16", "q8", "q6", "q4", *MIXED])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_attention_is_the_reference_s(every_ops, cache_type, head_dim):
    batch = make_batch([70, 0, 300], [1, 90, 3])
    shape = shape_of(8, 2, head_dim)
    assert_like_reference(every_ops, filled(every_ops, cache_type, shape, batch), batch, shape)


@pytest.mark.parametrize("cache_type", ["fp16", "q6", "q4_q8"])
@pytest.mark.parametrize("head_dim", [8, 20, 48, 72, 96, 112, 192, 256])
def test_other_head_sizes(ops, cache_type, head_dim):
    batch = make_batch([40, 0], [1, 70])
    shape = shape_of(4, 1, head_dim)
    assert_like_reference(ops, filled(ops, cache_type, shape, batch), batch, shape)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 1), (6, 2), (9, 3), (71, 1)])
def test_shared_key_value_heads(ops, heads, kv_heads):
    batch = make_batch([200, 0], [1, 150])
    shape = shape_of(heads, kv_heads, 64)
    assert_like_reference(ops, filled(ops, "q4", shape, batch), batch, shape)


@pytest.mark.parametrize("window", [1, 63, 64, 200, 700])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_windows_and_soft_caps(every_ops, window, softcap):
    batch = make_batch([1100, 500], [1, 120])
    shape = shape_of(4, 2, 64, softcap=softcap, window=window)
    assert_like_reference(every_ops, filled(every_ops, "q8", shape, batch), batch, shape)


@pytest.mark.parametrize("total", [1, 15, 16, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1025])
def test_lengths_around_tiles_pages_and_splits(ops, total):
    shape = shape_of(4, 2, 64)
    batch = make_batch([total - 1], [1])
    assert_like_reference(ops, filled(ops, "q4", shape, batch), batch, shape)


def test_random_batches(ops):
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    print("seed", generator.initial_seed())
    for _ in range(6):
        draw = torch.randint(0, 900, (4,), generator=generator).tolist()
        q_lens = [1 + n % 40 if n % 2 else 1 for n in draw]
        batch = make_batch(draw, q_lens, seed=draw[0])
        shape = shape_of(6, 3, 32 * (1 + draw[0] % 4), window=[0, 150][draw[1] % 2])
        kind = ("q4", "q6", "q8", "fp16")[draw[2] % 4]
        assert_like_reference(ops, filled(ops, kind, shape, batch), batch, shape)


@pytest.mark.parametrize("cache_type", ["fp16", "q8", "q4"])
def test_a_row_is_the_same_bits_alone_or_among_others(every_ops, cache_type):
    shape = shape_of(8, 2, 64)
    batch = make_batch([600, 0, 1300, 37], [1, 45, 1, 20])
    layer = filled(every_ops, cache_type, shape, batch)
    q = random_rows(batch.num_rows, 8, 64, 3)
    together = attend(every_ops, q, layer, batch, shape)
    for s in range(batch.num_sequences):
        first, end = batch.q_start[s : s + 2].tolist()
        alone = attend(every_ops, q[first:end].contiguous(), layer, one_of(batch, s), shape)
        assert torch.equal(alone, together[first:end])


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("cache_type", ["fp16", "q4"])
def test_chunks_and_single_tokens_agree_bit_for_bit(every_ops, cache_type, window):
    shape = shape_of(4, 2, 96, window=window)
    total = 570
    batch = make_batch([0], [total])
    layer = filled(every_ops, cache_type, shape, batch)
    q = random_rows(total, 4, 96, 11)
    at_once = attend(every_ops, q, layer, batch, shape)
    for past, rows in [(0, 100), (100, 400), (500, 70), *((t, 1) for t in range(505, total, 9))]:
        chunk = part(batch, [past], [rows])
        rows_of = slice(past, past + rows)
        assert torch.equal(attend(every_ops, q[rows_of], layer, chunk, shape), at_once[rows_of])


@pytest.mark.parametrize("cache_type", ["fp16", "q8_q4"])
def test_the_number_of_threads_changes_no_bit(ops, cache_type, monkeypatch):
    shape = shape_of(8, 2, 64)
    batch = make_batch([1700, 0, 5], [1, 200, 1])
    q = random_rows(batch.num_rows, 8, 64, 5)
    results, layers = [], []
    try:
        for threads in (1, 2, 3, 4):
            monkeypatch.setenv("EXL_LOADER_THREADS", str(threads))
            ops.set_threads(threads)
            layers.append(filled(ops, cache_type, shape, batch))
            results.append(attend(ops, q, layers[-1], batch, shape))
    finally:
        monkeypatch.undo()
        ops.set_threads(default_threads())
    for other, layer in zip(results[1:], layers[1:], strict=True):
        assert torch.equal(other, results[0])
        for name in ("k_codes", "v_codes"):
            ours, first = (getattr(one, name).view(torch.uint8) for one in (layer, layers[0]))
            assert torch.equal(ours, first)


def test_more_threads_than_scratch_has_room_for(ops, monkeypatch):
    """Another model that is loaded meanwhile may ask for more threads."""
    shape = shape_of(8, 2, 64)
    batch = make_batch([1700, 0, 5], [1, 200, 1])
    layer, q = filled(ops, "q4", shape, batch), random_rows(batch.num_rows, 8, 64, 5)
    expected = attend(ops, q, layer, batch, shape)
    monkeypatch.setenv("EXL_LOADER_THREADS", "1")
    nbytes = attention_scratch_bytes(3, 1701, shape)
    memory, out = torch.full((5 * nbytes,), 77, dtype=torch.uint8), torch.empty_like(q)
    try:
        ops.set_threads(4)
        for _ in range(10):
            ops.attention(q, layer, batch, shape, out, memory[:nbytes])
            assert torch.equal(out, expected) and (memory[nbytes:] == 77).all()
    finally:
        monkeypatch.undo()
        ops.set_threads(default_threads())


def test_more_sequences_than_there_are_slots_take_turns(ops):
    """Sequences that share their pages need more partial results than scratch has room for."""
    shape = shape_of(4, 2, 64)
    alone = make_batch([1500], [1])
    layer = filled(ops, "q4", shape, alone)
    count = 9
    batch = part(alone, [1500 - 100 * s for s in range(count)], [1] * count)
    batch.page_table = alone.page_table.repeat(count, 1)
    assert_like_reference(ops, layer, batch, shape)


def test_scratch_that_is_too_small_is_noticed(ops):
    shape = shape_of(4, 2, 64)
    batch = make_batch([10], [1])
    layer = filled(ops, "q4", shape, batch)
    q = random_rows(1, 4, 64, 0)
    with pytest.raises(AssertionError, match="scratch"):
        ops.attention(q, layer, batch, shape, torch.empty_like(q), torch.empty(64).byte())


def test_one_overwhelming_key_takes_all_the_weight(ops):
    shape = AttentionShape(2, 2, 64, 1.0)
    batch = make_batch([700], [1])
    layer = filled(ops, "fp32", shape, batch)
    q = random_rows(1, 2, 64, 3) * 1e4
    out = attend(ops, q, layer, batch, shape)
    keys, values = (x[batch.page_table[0].long()] for x in (layer.k_codes, layer.v_codes))
    for head in range(2):
        scores = keys[:, head].flatten(0, 1)[:701] @ q[0, head]
        winner = values[:, head].flatten(0, 1)[scores.argmax()]
        assert torch.allclose(out[0, head], winner, rtol=1e-6)
