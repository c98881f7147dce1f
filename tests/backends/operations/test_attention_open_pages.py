"""Open pages: what is written to them, and attention that reads the newest page from them."""

from __future__ import annotations

import copy
import random
from functools import lru_cache

import pytest
import torch

from exl_loader.backends.cuda.attention import AttentionOps
from exl_loader.backends.reference.ops import ReferenceOps
from exl_loader.cache.layout import PAGE_LEN, CacheLayer
from support.attention_cases import attend, expected_of, shape_of
from support.cache_layers import make_batch, make_layer, one_of, part, random_rows, write
from support.targets import ALL_CPUS, TARGETS, sizes, target

pytestmark = pytest.mark.usefixtures("two_threads")

REFERENCE = ReferenceOps()
# As in test_attention.py.
TOLERANCE = {"cpu": 2e-5, "cuda": 2e-3}
QUANTISED = ("q8", "q6", "q4", "q3", "q8_q4", "fp16_q4", "q6_fp16")


@pytest.fixture(params=[*ALL_CPUS, *TARGETS])
def ops(request):
    return target(request.param, AttentionOps, threads=2)


def tensors_of(layer: CacheLayer):
    for opened in (layer.k_open, layer.v_open):
        for stored in () if opened is None else (opened.tokens, opened.first):
            for tensor in (stored.codes, stored.scales):
                if tensor is not None:
                    yield tensor


def filled(writer, cache_type, past, new, heads, head_dim, seed=0):
    """Write sequences page by page, as a model does; return the layer and the last pages' rows.

    Returns:
        The layer, and a batch of the last `new` rows of each sequence.
    """
    batch = make_batch(past, new, seed)
    totals = [p + n for p, n in zip(past, new, strict=True)]
    pages = int(batch.page_table.max()) + 1
    layer = make_layer(cache_type, pages, heads, head_dim, len(past))
    for page in range((max(totals) - 1) // PAGE_LEN + 1):
        for s, total in enumerate(totals):
            first, end = page * PAGE_LEN, min(total, (page + 1) * PAGE_LEN)
            if first < end:
                k, v = (random_rows(end - first, heads, head_dim, seed + page + 100 * s + i)
                        for i in (1, 2))
                own = one_of(part(batch, [first] * len(past), [end - first] * len(past)), s)
                write(writer, k, v, layer, own)
    return layer, batch


@lru_cache
def filled_once(cache_type, past, new, head_dim, seed=0):
    """Return a layer of two heads and its batch, written by this machine's CPU in milliseconds.

    The target and the reference read the same layer, so its writer is not what is tested.
    """
    writer = target("native", None, threads=2)
    return filled(writer, cache_type, past, new, 2, head_dim, seed)


# Two texts, the second of which begins a page.
WRITTEN = [0, 250], [40, 6], 2


@lru_cache
def written_by_the_reference(cache_type, head_dim):
    """Return the tensors of open pages, once for all targets."""
    return list(tensors_of(filled(REFERENCE, cache_type, *WRITTEN, head_dim)[0]))


@pytest.mark.parametrize("cache_type", QUANTISED)
@sizes("head_dim", cpus=ALL_CPUS, cpu=[20, 64, 80], cuda=[8, 64, 80, 128])
def test_writing_equals_the_reference(ops, cache_type, head_dim):
    """Rotations differ in the last bit, so that a code may differ by one."""
    layer = filled(ops, cache_type, *WRITTEN, head_dim)[0]
    expected = written_by_the_reference(cache_type, head_dim)
    for ours, theirs in zip(tensors_of(layer), expected, strict=True):
        assert ours.dtype == theirs.dtype and len(ours) == 2
        a, b = (x.float().nan_to_num(0.0) for x in (ours, theirs))
        assert (a != b).float().mean() <= 0.06
        assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("cache_type", QUANTISED)
@sizes("head_dim", cpus=ALL_CPUS, cpu=[8, 64, 80], cuda=[8, 64, 80, 128])
def test_attention_equals_the_reference(ops, cache_type, head_dim):
    """A token in the first page, one after a page, a draft, a prompt's chunk and a new page."""
    past, new = (70, 300, 520, 256, 512), (1, 1, 3, 40, 1)
    layer, batch = filled_once(cache_type, past, new, head_dim)
    for window in (0, 100):
        shape = shape_of(4, 2, head_dim, window=window, softcap=3.0 if window else 0.0)
        q = random_rows(batch.num_rows, 4, head_dim, 7)
        actual, expected = attend(ops, q, layer, batch, shape), expected_of(q, layer, batch, shape)
        assert expected.isfinite().all()
        error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
        worst = error.max() if ops.kind == "cpu" else error.square().mean().sqrt()
        assert worst <= TOLERANCE[ops.kind], worst


@pytest.mark.parametrize("cache_type", ["q8", "q4"])
def test_rows_do_not_depend_on_what_runs_beside_them(ops, cache_type):
    """Alone, in a batch, one by one and as a chunk, with fresh data."""
    seed = random.SystemRandom().randrange(1000)
    layer, batch = filled_once(cache_type, (300, 10), (4, 1), 64, seed)
    shape = shape_of(4, 2, 64)
    q = random_rows(5, 4, 64, seed)
    together = attend(ops, q, layer, batch, shape)
    draft = attend(ops, q[:4].contiguous(), layer, one_of(batch, 0), shape)
    assert torch.equal(together[:4], draft)
    for row in range(4):
        own = one_of(part(batch, [300 + row, 10], [1, 1]), 0)
        alone = attend(ops, q[row : row + 1].contiguous(), layer, own, shape)
        assert torch.equal(together[row : row + 1], alone), row


@pytest.mark.parametrize("cache_type", ["q8", "q4"])
def test_only_the_own_page_and_the_first_token_are_read_from_open_pages(ops, cache_type):
    """What lies behind the other positions of an open page changes nothing."""
    layer, batch = copy.deepcopy(filled_once(cache_type, (300,), (1,), 64))
    shape, q = shape_of(4, 2, 64), random_rows(1, 4, 64, 3)
    before = attend(ops, q, layer, batch, shape)
    for opened in (layer.k_open, layer.v_open):
        opened.tokens.codes.view(torch.uint8)[:, :, 301 % PAGE_LEN :] = 0xFF
    assert torch.equal(before, attend(ops, q, layer, batch, shape))
    # Codes of the own page and of position 0 are not read.
    layer.k_scales[batch.page_table[0, 1].long()] = torch.nan
    layer.k_scales[batch.page_table[0, 0].long(), :, 0] = torch.nan
    assert torch.equal(before, attend(ops, q, layer, batch, shape))
    layer.k_scales[batch.page_table[0, 0].long(), :, 1] = torch.nan
    assert not torch.equal(before, attend(ops, q, layer, batch, shape))
