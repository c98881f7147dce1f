"""What only a CPU has of products: threads, processes, scratch, and instruction sets.

What every backend's products have in common is in operations/test_linear.py and
operations/test_linear_dense.py.
"""

from __future__ import annotations

import os

import pytest
import torch

from backends.operations.test_linear import LAYOUTS, LONG, MIXED_GROUPS
from exl_loader.backends.cpu.linear import linear_scratch_bytes
from exl_loader.backends.cpu.threads import default_threads
from support.kernel_cases import dense_linear, packed_linear, random_rows
from support.linear_cases import (
    MAX_THREADS,
    assert_exact,
    equal_from_threads,
    product,
    scratch_for,
)
from support.targets import AVX512, CPUS, OTHER_CPUS, target


@pytest.fixture
def ops():
    ops = target("native", None, threads=2)
    yield ops
    ops.ops.set_threads(default_threads())


@pytest.mark.parametrize("kind", ["packed", "dense"])
def test_rows_do_not_depend_on_company_or_threads(ops, kind):
    if kind == "packed":
        w = packed_linear(MIXED_GROUPS, 140, zeros=True, perm=True)
    else:
        w = dense_linear(552, 140, torch.float16, bias=True)
    x = random_rows(300, w.in_features)
    ops.ops.set_threads(1)
    whole = product(ops, x, w)
    for threads in range(1, MAX_THREADS + 1):
        assert ops.ops.set_threads(threads) == threads
        assert torch.equal(product(ops, x, w), whole)
        for first, end in ((0, 1), (7, 9), (20, 23), (30, 35), (100, 108), (111, 130), (9, 57)):
            assert torch.equal(product(ops, x[first:end].clone(), w), whole[first:end])


def test_scratch_that_is_too_short_is_refused(ops):
    for rows in (1, 8, 20, 60):
        for w in (packed_linear([(4, 256)], 32), dense_linear(256, 32, torch.float32)):
            if rows == 1 and w.__class__.__name__ == "DenseLinear":
                continue
            out = torch.full((rows, 32), 7.0)
            with pytest.raises(AssertionError, match="scratch"):
                ops.linear(random_rows(rows, 256), w, out, torch.empty(100, dtype=torch.uint8))
            assert (out == 7.0).all()


def test_more_threads_than_scratch_has_room_for(ops, monkeypatch):
    """Another model that is loaded meanwhile may ask for more threads."""
    w, x = packed_linear([(4, 128)] * 4, 256), random_rows(60, 512)
    ops.ops.set_threads(MAX_THREADS)
    expected = product(ops, x, w)
    monkeypatch.setenv("EXL_LOADER_THREADS", "1")
    nbytes, out = linear_scratch_bytes(60, 512), torch.empty(60, 256)
    memory = torch.full((nbytes + MAX_THREADS * nbytes,), 77, dtype=torch.uint8)
    for _ in range(10):
        ops.linear(x, w, out, memory[:nbytes])
        assert torch.equal(out, expected) and (memory[nbytes:] == 77).all()


def test_scratch_grows_with_rows_and_stops(monkeypatch):
    monkeypatch.setenv("EXL_LOADER_THREADS", "2")
    sizes = [linear_scratch_bytes(rows, 4096) for rows in (1, 2, 64, 256, 512, 4096)]
    assert sizes == sorted(sizes) and sizes[-1] == sizes[-2] == sizes[-3]


def test_calls_from_several_threads(ops):
    layers = [packed_linear([(4, 128)] * 4, 256, seed=s, perm=True) for s in range(4)]
    x = random_rows(20, 512)
    expected = [product(ops, x, w) for w in layers]
    assert equal_from_threads(lambda w: product(ops, x, w), layers, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_its_own_threads(ops):
    w, x = packed_linear([(4, 128)] * 4, 256), random_rows(20, 512)
    scratch, out = scratch_for(20, w, "cpu"), torch.empty(20, 256)
    expected = product(ops, x, w)
    child = os.fork()
    if child == 0:
        ops.linear(x, w, out, scratch)
        os._exit(0 if torch.equal(out, expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(product(ops, x, w), expected)


@pytest.mark.parametrize("march", [*CPUS, pytest.param(AVX512, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_no_sum_of_the_largest_codes_and_activations_overflows(march, bits):
    ops = target(march, None, threads=2)
    w = packed_linear([(bits, 128)] * 2, 50)
    w.codes.fill_(255)
    # 127 and 0, then 127 and -64: the largest values of both planes.
    x = torch.full((2, w.in_features), (127 << 7) - 64.0)
    x[:, ::128] = 127 << 7
    x[1] *= -1
    for rows in (1, 2):
        assert_exact(ops, x[:rows], w)


@pytest.mark.slow
@pytest.mark.parametrize("march", [AVX512, *OTHER_CPUS])
def test_other_instruction_sets_agree(ops, march):
    other = target(march, None, threads=2)
    for groups in LAYOUTS.values():
        w = packed_linear(groups or LONG["cpu"], 50, zeros=True, perm=True, bias=True)
        for rows in (1, 4, 7, 30):
            x = random_rows(rows, w.in_features)
            # Without fused multiply-add a term has one rounding more.
            assert_exact(other, x, w, roundings_of_a_term=3)
            if march != "x86-64":
                assert torch.equal(product(other, x, w), product(ops, x, w))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        w, x = dense_linear(100, 50, dtype), random_rows(9, 100)
        torch.testing.assert_close(product(other, x, w), product(ops, x, w), rtol=1e-5, atol=1e-5)
