"""The largest logits of rows, found on a card: kernels against numpy's definition of them.

The kernels' own code runs, on the CPU by emulation and on a card where there is one. Widths are
below, at and above what is taken, a block's tile, and what all blocks read at once.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exl_loader.backends.cuda.launcher import COUNTER_BYTES
from exl_loader.backends.cuda.top_logits import TopLogitsOps, top_logits_scratch_bytes
from exl_loader.backends.top_logits import (
    HEADER_WORDS,
    MOST_TAKEN,
    RESULT_WORDS,
    take_largest,
)
from exl_loader.model.top_logits_reader import read_result
from support.cuda_emulation.mutation import assert_noticed, built_from
from support.cuda_emulation.sanitized import compiles_all, run_sanitized, runtimes
from support.exhaustive import some_of
from support.targets import TARGETS, Target, target

WIDTHS = [1, 2, 31, 33, 1023, 1024, 1025, 4095, 4097, 9001, 32_000]


@pytest.fixture(params=TARGETS)
def ops(request):
    return target(request.param, TopLogitsOps)


def run(ops, logits, vocab_size=None):
    """Return the results of rows, int32 [T, RESULT_WORDS]; buffers have old contents before."""
    rows, width = logits.shape
    vocab_size = vocab_size or width
    out = torch.full((rows, RESULT_WORDS), -1, dtype=torch.int32)
    nbytes = top_logits_scratch_bytes(rows, vocab_size)
    scratch = torch.full((nbytes,), 0xA5, dtype=torch.uint8)
    scratch[:COUNTER_BYTES] = 0
    ops.top_logits(logits, vocab_size, out, scratch)
    assert not scratch[:COUNTER_BYTES].any()
    return out.numpy()


def parts(words):
    """all_finite, largest, weight_sum, ids, logits."""
    taken = words[1]
    ids = words[HEADER_WORDS : HEADER_WORDS + taken]
    logits = words[HEADER_WORDS + MOST_TAKEN :].view(np.float32)[:taken]
    return bool(words[0]), *words[2:4].view(np.float32), ids, logits


def assert_defined(words, row):
    finite, largest, weight_sum, ids, logits = parts(words)
    expected, expected_sum = take_largest(row)
    assert finite and largest == row.max()
    assert np.array_equal(ids, expected) and np.array_equal(logits, row[expected])
    assert weight_sum == pytest.approx(expected_sum, rel=5e-6, abs=1e-30)


def random_rows(rows, width, scale=3.0, seed=0):
    rng = np.random.default_rng([seed, width])
    return torch.from_numpy((rng.standard_t(4, (rows, width)) * scale).astype(np.float32))


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_of_rows(ops, width):
    logits = random_rows(2, width)
    for words, row in zip(run(ops, logits), logits.numpy(), strict=True):
        assert_defined(words, row)


@pytest.mark.parametrize("width", [152_064, pytest.param(270_001, marks=pytest.mark.exhaustive)])
def test_a_whole_vocabulary(ops, width):
    """More tiles than blocks are allowed, for a vocabulary larger than any known."""
    logits = torch.from_numpy(np.random.default_rng(1).normal(0, 2, (1, width)).astype("f4"))
    (words,) = run(ops, logits)
    assert_defined(words, logits.numpy()[0])
    top = read_result(words, width)
    assert top.vocab_size == width
    assert 900 < len(top.ids) <= MOST_TAKEN


@pytest.mark.parametrize("scale", [1e-4, 0.1, 30.0, 1e30])
def test_any_scale(ops, scale):
    """All logits in the first bins, or most beyond the last; differences that overflow."""
    logits = random_rows(1, 5000, scale)
    (words,) = run(ops, logits)
    assert_defined(words, logits.numpy()[0])


def test_ties_are_taken_by_id_and_together(ops):
    logits = torch.round(random_rows(2, 6000) * 4) / 4
    logits[1, :] = 0.0
    logits[1, 1500::2] = -0.0
    first, equal = run(ops, logits)
    assert_defined(first, logits.numpy()[0])
    assert 0 < first[1] < MOST_TAKEN
    assert equal[1] == 0 and read_result(equal, 6000) is None
    (few,) = run(ops, logits[1:, 1000:2000].contiguous())
    assert parts(few)[3].tolist() == list(range(1000))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_with_nan_or_infinity_are_reported(ops, value):
    logits = random_rows(3, 5000)
    logits[1, 4990] = value
    before, damaged, after = run(ops, logits)
    assert damaged[:2].tolist() == [0, 0] and read_result(damaged, 5000) is None
    for words, row in ((before, 0), (after, 2)):
        assert_defined(words, logits.numpy()[row])


def test_padding_does_not_count(ops):
    logits = random_rows(2, 2500)
    logits[:, 2400:] = torch.tensor([100.0, np.nan])[:, None]
    for words, row in zip(run(ops, logits, 2400), logits.numpy(), strict=True):
        assert_defined(words, row[:2400])


def test_a_row_is_the_same_bits_beside_others(ops):
    logits = random_rows(5, 9000)
    together = run(ops, logits)
    for row in (0, 3):
        (alone,) = run(ops, logits[row : row + 1].clone())
        assert np.array_equal(alone, together[row])
    assert run(ops, logits[:0]).shape == (0, RESULT_WORDS)


# Text that sampling.cu has once, and a mistake that replaces it.
MUTATIONS = [
    ("    block_sync();  // all are 0 before any is counted\n", ""),
    ("    block_sync();  // words are read before keys take their place\n", ""),
    ("            block_sync();  // each step reads what others wrote in the one before\n", ""),
    ("end + counts[bins] <= kMost", "end + counts[bins] < kMost"),
    ("if (lane_id() >= delta) before += lower;", "before += lower;"),
    ("tile < size; tile += gridDim.x * kTile", "tile < size; tile += size"),
    ("bits & 0x80000000u ? bits : ~bits", "bits & 0x80000000u ? ~bits : bits"),
    ("float_bits(logit + 0.0f)", "float_bits(logit)"),
    ("finite ? logit : infinity()", "logit"),
    ("<< 32 | static_cast<uint32_t>(id)", "<< 32 | static_cast<uint32_t>(~id)"),
    ("(largest - logit) * kBinsPerUnit", "(largest - logit)"),
    ("while (width < taken) width <<= 1;", "while (2 * width < taken) width <<= 1;"),
    ("place + 1 < taken ?", "place < taken ?"),
    ("(2 * blocks + 3) / 4 * 4", "2 * blocks"),
    ("blockIdx.y) * row_words", "blockIdx.y) * kScratchWords"),
    ("block < static_cast<int>(gridDim.x); ++block", "block < 1; ++block"),
    ("words[kWarps] != static_cast<int>(gridDim.x) - 1", "words[kWarps] != 0"),
]  # fmt: skip


def everything(ops):
    """Run every case of the kernels once."""
    for width in (1, 33, 1025, 9001):
        test_every_width_of_rows(ops, width)
    test_any_scale(ops, 30.0)
    test_ties_are_taken_by_id_and_together(ops)
    test_rows_with_nan_or_infinity_are_reported(ops, np.nan)
    test_rows_with_nan_or_infinity_are_reported(ops, -np.inf)
    test_padding_does_not_count(ops)
    test_a_whole_vocabulary(ops, 270_001)


@pytest.mark.slow
@pytest.mark.parametrize("change", some_of([None, *MUTATIONS], 7),
                         ids=lambda change: change[0].strip()[:40] if change else "none")
def test_a_mistake_in_a_kernel_is_noticed(tmp_path, change):
    mistake = None if change is None else ("sampling.cu", *change)
    launcher = built_from(tmp_path, ("sampling",), mistake)
    assert_noticed(
        launcher, change is not None, lambda it: everything(Target(TopLogitsOps(it), None))
    )


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.skipif(not runtimes(), reason="needs gcc's sanitizers")
@compiles_all
def test_under_sanitizers():
    result = run_sanitized(__file__, "-k", "forward", "-m", "not slow and not gpu")
    assert result.returncode == 0, result.stdout[-4000:]
