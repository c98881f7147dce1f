"""Numbers that the kernels and the Python code around them both have: each pair is equal."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from exl_loader.backends import top_logits as result
from exl_loader.backends.cuda import attention, layout, linear, linear_dense, moe, pack, rows
from exl_loader.backends.cuda import top_logits as top
from exl_loader.backends.kernel_structs import GATES
from exl_loader.backends.reference import feedback
from exl_loader.cache.layout import GROUP, MAX_BIAS_PAIRS, PAGE_LEN
from exl_loader.formats.layer import BLOCK_ROWS
from support import REPO

CSRC = REPO / "csrc"
FLOAT_BYTES, HALF_BYTES = 4, 2

# File of csrc, an expression of its constants, and the number in Python.
PAIRS = [
    ("cache_codec.h", "kPageLen", PAGE_LEN),
    ("cache_codec.h", "kGroup", GROUP),
    ("cache_codec.h", "kMaxBiasPairs", MAX_BIAS_PAIRS),
    ("cuda/linear_layout.cuh", "kStreamColumns", layout.TILE_COLUMNS),
    ("cuda/linear_layout.cuh", "kStreamBlockRows", BLOCK_ROWS),
    ("cuda/linear_layout.cuh", "kStreamBitBytes", layout.BLOCK_BIT_BYTES),
    ("cuda/linear_layout.cuh", "kScaleBytes", layout.SCALE_BYTES),
    ("cuda/linear_layout.cuh", "kLevelBytes", layout.LEVEL_BYTES),
    ("cuda/linear_layout.cuh", "kBlocksPerRowBlock", layout.ROW_BLOCK_BLOCKS),
    ("cuda/linear_layout.cuh", "kRowBlockRows", layout.ROW_BLOCK_ROWS),
    ("cuda/linear_layout.cuh", "kMaxRowSplits", layout.MAX_ROW_SPLITS),
    ("cuda/linear_layout.cuh", "kBlockCodeBytes", linear.BLOCK_CODE_BYTES),
    # ActivationScale: a float, a sum, a sum for each block, and two words of padding.
    ("cuda/linear_layout.cuh", "4 * (2 + kBlocksPerRowBlock + 2)", linear.ACTIVATION_SCALE_BYTES),
    ("cuda/linear_quantize.cu", "kQuantizeThreads", linear.QUANTIZE_THREADS),
    ("cuda/linear_stream.cuh", "kChunkBytes", linear._CHUNK_BYTES),
    ("cuda/linear_stream.cuh", "kShallowChunks * kChunkBytes", linear.RING_BYTES),
    ("cuda/linear_stream.cuh", "kDeepChunks * kChunkBytes", linear._DEEP_RING_BYTES),
    ("cuda/linear_decode.cu", "kMaxLayers", linear.MAX_LAYERS),
    ("cuda/linear_decode.cu", "4 * kNormWarps", linear._NORM_PART_BYTES),
    ("cuda/linear_prefill.cu", "kPrefillThreads", linear._PREFILL_THREADS),
    ("cuda/linear_prefill.cu", "kBlockTiles", linear._PREFILL_TILES),
    ("cuda/linear_prefill.cu", "kRowBlockCodeBytes + 32", linear._PREFILL_ROW_BYTES),
    ("cuda/linear_dense.cuh", "kTileColumns", linear_dense.TILE_COLUMNS),
    ("cuda/linear_dense.cuh", "kSliceK", linear_dense._SLICE_FEATURES),
    ("cuda/linear_dense.cuh", "kPartK", linear_dense._PART_FEATURES),
    ("cuda/linear_dense.cuh", "kFragmentRows", linear_dense._FRAGMENT_ROWS),
    ("cuda/linear_dense_decode.cu", "kRingBytes", linear_dense._RING_BYTES),
    ("cuda/linear_dense_decode.cu", "kRingBytes + 4 * kPassOutputs",
     linear_dense._DECODE_WARP_BYTES),
    ("cuda/linear_dense_decode.cu", "kMaxDecodeThreads / 32", linear_dense._MOST_DECODE_WARPS),
    ("cuda/linear_dense_prefill.cu", "kPrepareThreads", linear_dense._PREPARE_THREADS),
    ("cuda/linear_dense_prefill.cu", "32 * kPrefillWarps", linear_dense._PREFILL_THREADS),
    ("cuda/linear_dense_prefill.cu", "kPrefillRows", linear_dense._PREFILL_ROWS),
    ("cuda/linear_dense_prefill.cu", "kPrefillTiles", linear_dense._PREFILL_TILES),
    ("cuda/linear_dense_prefill.cu", "kPrefillBytes", linear_dense._PREFILL_BYTES),
    ("cuda/pack.cu", "kPackWarps", pack._PACK_WARPS),
    ("cuda/pack.cu", "4 * kPackWarps * kStreamColumns * kColumnStride", pack._PACK_SHARED_BYTES),
    ("cuda/attention.cuh", "kDecodeRows", attention.DECODE_ROWS),
    ("cuda/cache_tile.cuh", "kUnit", attention._UNIT),
    ("cuda/decode_rows.cuh", "kRows", attention._DECODE_BLOCK_ROWS),
    ("cuda/prefill_tile.cuh", "kWarpRows", attention._WARP_ROWS),
    ("cuda/prefill_tile.cuh", "kPadding", attention._ROW_PADDING),
    ("cuda/key_bias.cuh", "kStepPairs", attention._STEP_PAIRS),
    ("cuda/attention_generic.cu", "kGenericThreads", attention._GENERIC_THREADS),
    ("cuda/cache_write.cu", "kWriteThreads / 32", attention._WRITE_WARPS),
    ("cuda/cache_grid.cuh", "kCodebookFloats", attention._CODEBOOK_FLOATS),
    ("cache_codec.h", "kFeedbackBlock", feedback.BLOCK),
    ("cuda/key_feedback.cuh", "kFeedbackRows", attention._FEEDBACK_ROWS),
    ("cuda/key_feedback.cuh", "kFeedbackSlots", attention._FEEDBACK_SLOTS),
    ("cuda/key_feedback.cuh", "kAllFeedbackSlots", attention._ALL_FEEDBACK_SLOTS),
    ("cuda/key_feedback.cuh", "kMaxFeedbackRegisters", attention._MOST_FEEDBACK_REGISTERS),
    ("cuda/key_feedback.cuh", "kShortFeedbackGroups", attention._SHORT_FEEDBACK_GROUPS),
    ("cuda/norm.cu", "kRowThreads", rows._NORM_THREADS),
    ("cuda/norm.cu", "kHeadThreads", rows._HEAD_THREADS),
    ("cuda/rope.cu", "kThreads", rows._ROPE_THREADS),
    ("cuda/elementwise.cu", "kThreads", rows._ELEMENT_THREADS),
    ("cuda/rows.cu", "kThreads", rows._ROW_THREADS),
    ("cuda/moe.cu", "kSumThreads", rows._ROW_THREADS),
    ("cuda/moe.cu", "kRouteThreads", moe._ROUTE_THREADS),
    ("cuda/sampling.cu", "kThreads", top._THREADS),
    ("cuda/sampling.cu", "kTile", top._TILE_LOGITS),
    ("cuda/sampling.cu", "kBins", result.NUM_BINS),
    ("cuda/sampling.cu", "kScratchWords", top._FIXED_WORDS),
    ("cuda/sampling.cu", "kHeaderWords", result.HEADER_WORDS),
    ("cuda/sampling.cu", "kMaxTaken", result.MOST_TAKEN),
    ("cuda/sampling.cu", "kHeaderWords + 2 * kMaxTaken", result.RESULT_WORDS),
]


@cache
def constants_of(path: Path) -> dict[str, int]:
    """Return the integer constants of a file at namespace scope, with those that it includes."""
    text = path.read_text()
    values: dict[str, int] = {}
    for name in re.findall(r'^#include "([^"]+)"', text, re.MULTILINE):
        if (CSRC / name).is_file():
            values.update(constants_of(CSRC / name))
    for name, expression in re.findall(
        r"^constexpr (?:int|int32_t) (k\w+) = ([^;]+);", text, re.MULTILINE
    ):
        try:
            values[name] = evaluate(expression, values)
        except (NameError, SyntaxError):
            continue  # sizes of structs and results of functions
    return values


def evaluate(expression: str, values: dict[str, int]) -> int:
    return eval(expression.replace("/", "//"), {"__builtins__": {}}, values)


@pytest.mark.parametrize(
    ("file", "expression", "number"), PAIRS, ids=[f"{file}-{text}" for file, text, _ in PAIRS]
)
def test_a_constant_of_the_kernels_is_that_of_python(file, expression, number):
    assert evaluate(expression, constants_of(CSRC / file)) == number


def test_activations_have_the_numbers_of_the_kernels():
    (body,) = re.findall(r"enum Activation : int32_t \{(.*?)\};", (CSRC / "common.h").read_text(),
                         re.DOTALL)
    numbers = {
        re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(): int(number)
        for name, number in re.findall(r"k(\w+) = (\d+)", body)
    }
    assert numbers == GATES
