"""Writing the cache against the reference: bytes, faults, and untouched memory."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from exl_loader.backends.cuda.attention import AttentionOps
from exl_loader.backends.reference import fp16 as reference_fp16
from exl_loader.backends.reference.codec import dequantize
from exl_loader.backends.reference.ops import ReferenceOps
from exl_loader.cache.layout import PAGE_LEN
from support.cache_layers import make_batch, make_layer, random_rows, write
from support.targets import ALL_CPUS, TARGETS, sizes, target

REFERENCE = ReferenceOps()
# CUDA writes the reference's bytes. A CPU may write the same values as negated codes with a
# negated scale, so tests that compare bytes of quantised values leave it out.
BYTES_OF_THE_REFERENCE = pytest.mark.parametrize("ops", TARGETS, indirect=True)
TENSORS = ("k_codes", "k_scales", "v_codes", "v_scales")


@pytest.fixture(params=[*ALL_CPUS, *TARGETS])
def ops(request):
    return target(request.param, AttentionOps)


def written(writer, cache_type, k, v, batch):
    layer = make_layer(cache_type, int(batch.page_table.max()) + 1, *k.shape[1:])
    write(writer, k, v, layer, batch)
    return layer


def bytes_of(layer, name):
    tensor = getattr(layer, name)
    return None if tensor is None else tensor.view(torch.uint8)


def assert_same_bytes(ours, theirs):
    for name in TENSORS:
        a, b = bytes_of(ours, name), bytes_of(theirs, name)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b), name


@pytest.mark.parametrize("cache_type", ["fp32", "fp16", "fp32_fp16"])
@pytest.mark.parametrize("head_dim", [1, 8, 15, 16, 20, 64, 72, 80, 128, 300])
def test_unquantised_types_are_written_bit_for_bit(ops, cache_type, head_dim):
    batch = make_batch([3, 250], [9, 12])
    k, v = (random_rows(21, 2, head_dim, seed) for seed in (1, 2))
    layers = [written(writer, cache_type, k, v, batch) for writer in (ops, REFERENCE)]
    assert_same_bytes(*layers)


@lru_cache
def written_by_the_reference(cache_type, head_dim, *new):
    """Return a batch with so many new rows, its keys and values, and a layer of them.

    They are made once for all targets.
    """
    batch = make_batch([0, 250], list(new))
    k, v = (random_rows(sum(new), 2, head_dim, seed) for seed in (1, 2))
    return batch, k, v, written(REFERENCE, cache_type, k, v, batch)


@pytest.mark.parametrize("cache_type", ["q8", "q6", "q4", "q3"])
@sizes("head_dim", cpus=ALL_CPUS, cpu=[20, 64, 80],
       cuda=[1, 16, 20, 64, 72, 80, 96, 112, 128, 256, 300])
def test_quantised_writing_equals_the_reference(ops, cache_type, head_dim):
    """The rotation's sums differ in the last bit, so that a tie may fall differently: what is
    compared is nearly all of the bytes, and all of the values."""
    new, least_same = {"cpu": ([150, 100], 0.995), "cuda": ([30, 10], 0.98)}[ops.kind]
    batch, k, v, theirs = written_by_the_reference(cache_type, head_dim, *new)
    ours = written(ops, cache_type, k, v, batch)
    bits = int(cache_type[1:])
    values = []
    for layer in (ours, theirs):
        codes, scales = layer.k_codes.flatten(0, 2), layer.k_scales.flatten(0, 2)
        stored = scales.isfinite().all(dim=1)
        assert stored.sum() == 2 * sum(new)
        values.append(dequantize(codes[stored], scales[stored], head_dim, bits))
    same = (values[0] == values[1]).all(dim=1).float().mean()
    assert same >= least_same
    assert (values[0] - values[1]).norm() <= 0.01 * values[1].norm()


@pytest.mark.parametrize("cache_type", ["q8_q4", "q4_fp16", "fp16_q6", "q6_fp32", "q4_q3"])
@BYTES_OF_THE_REFERENCE
def test_keys_and_values_of_different_types(ops, cache_type):
    batch = make_batch([255, 0, 7], [2, 5, 1])
    k, v = (random_rows(8, 3, 64, seed) for seed in (3, 4))
    layers = [written(writer, cache_type, k, v, batch) for writer in (ops, REFERENCE)]
    assert_same_bytes(*layers)


@pytest.mark.parametrize("cache_type", ["fp16", "q8", "q6", "q4", "q3"])
@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1e3, 6e4])
@BYTES_OF_THE_REFERENCE
def test_sizes(ops, cache_type, magnitude):
    batch = make_batch([0], [20])
    x = random_rows(20, 2, 64, 5)
    x *= magnitude / x.abs().max()
    layers = [written(writer, cache_type, x, x, batch) for writer in (ops, REFERENCE)]
    differ = (bytes_of(layers[0], "k_codes") != bytes_of(layers[1], "k_codes")).any(dim=-1)
    assert differ.sum() <= 2


def test_a_row_has_the_same_bytes_alone_and_among_others(ops):
    batch = make_batch([100, 30, 250], [1, 4, 8])
    k, v = (random_rows(13, 2, 80, seed) for seed in (6, 7))
    together = written(ops, "q4", k, v, batch)
    single = make_batch([100], [1])
    single.page_table = batch.page_table[:1].contiguous()
    alone = make_layer("q4", int(batch.page_table.max()) + 1, 2, 80)
    write(ops, k[:1].contiguous(), v[:1].contiguous(), alone, single)
    page = int(batch.page_table[0, 0])
    for name in TENSORS:
        assert torch.equal(getattr(alone, name)[page, :, 100].view(torch.uint8),
                           getattr(together, name)[page, :, 100].view(torch.uint8))


@pytest.mark.parametrize("cache_type", ["fp32", "fp16", "q6", "q4", "q3"])
def test_writing_touches_nothing_else(ops, cache_type):
    batch = make_batch([250], [20])
    k = random_rows(20, 2, 80, 1)
    layer = written(ops, cache_type, k, k, batch)
    pages = batch.page_table[0].tolist()
    expected = {(pages[p // PAGE_LEN], p % PAGE_LEN) for p in range(250, 270)}
    for name in TENSORS:
        data = bytes_of(layer, name)
        if data is not None:
            changed = (data != 0xFF).any(dim=-1).any(dim=1).nonzero()
            assert {tuple(place) for place in changed.tolist()} == expected


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("cache_type", ["q8", "q6", "q4", "q3"])
def test_a_fault_shows_in_its_own_group_only(ops, cache_type, value):
    k = random_rows(4, 1, 96, 2)
    k[1, 0, 40] = value
    layer = written(ops, cache_type, k, k, make_batch([0], [4]))
    # A block of the rotation has 32 elements at this head size, as a group has.
    faulty = layer.k_scales[0, 0, :4].isnan()
    assert faulty.tolist() == [[False] * 3, [False, True, False], [False] * 3, [False] * 3]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_fault_shows_in_16_bits_too(ops, value):
    k = random_rows(3, 1, 80, 2)
    k[1, 0, 70] = value
    layer = written(ops, "fp16", k, k, make_batch([0], [3]))
    back = reference_fp16.decode(layer.v_codes[0, 0, :3])
    assert back[1, 64:].isnan().all()
    assert back[[0, 2]].isfinite().all() and back[1, :64].isfinite().all()


def test_zeros_stay_zeros(ops):
    k = torch.zeros(2, 1, 64)
    for cache_type in ("fp16", "q8", "q6", "q4", "q3"):
        ours, theirs = (written(w, cache_type, k, k, make_batch([0], [2]))
                        for w in (ops, REFERENCE))
        assert torch.equal(bytes_of(ours, "k_codes")[0, 0, :2],
                           bytes_of(theirs, "k_codes")[0, 0, :2])
        if ours.k_scales is not None:
            assert not ours.k_scales[0, 0, :2].any()
