"""Numbers that csrc/cpu and the Python code around it both have: each pair is equal."""

from __future__ import annotations

import re

import pytest

from exl_loader.backends.cpu import attention, linear
from exl_loader.checkpoint.config import MAX_EXPERTS
from support import REPO

CPU = REPO / "csrc" / "cpu"

# File, constant, number in Python. Of a constant that differs between instruction sets the
# largest counts, because scratch is planned for all of them.
PAIRS = [
    ("linear.h", "kPassRows", linear.PASS_ROWS),
    ("linear.h", "kChunkRows", linear.CHUNK_ROWS),
    ("../packed.h", "kLevels", linear.LEVELS),
    ("linear.h", "kPlanes", linear.PLANES),
    ("linear.h", "kDirectRows", linear.DIRECT_ROWS),
    ("linear_dense.cpp", "kDensePassRows", linear.DENSE_PASS_ROWS),
    ("scratch.h", "kAlignment", linear.CUT_ALIGNMENT),
    ("attention.h", "kTileTokens", attention.TILE_TOKENS),
    ("attention.h", "kKvSplitTokens", attention.KV_SPLIT_TOKENS),
    ("attention.h", "kTaskRows", attention.TASK_ROWS),
    ("simd.h", "kLanes", attention.LANES),
    ("rows.cpp", "kMaxExperts", MAX_EXPERTS),
]


def source(file: str) -> str:
    return (CPU / file).read_text(encoding="utf-8")


def largest(file: str, name: str) -> int:
    found = re.findall(rf"constexpr \w+ {name} = (\d+);", source(file))
    assert found, f"{file} has no {name}"
    return max(map(int, found))


@pytest.mark.parametrize(("file", "name", "number"), PAIRS, ids=[name for _, name, _ in PAIRS])
def test_a_constant_is_the_same_in_c_and_in_python(file, name, number):
    assert largest(file, name) == number


def test_a_panel_is_whole_tiles():
    columns = largest("linear.h", "kPanelTiles") * linear.TILE_COLUMNS
    assert columns == linear.MOST_PANEL_COLUMNS


def test_a_span_has_as_many_bytes_as_its_fields():
    (body,) = re.findall(r"struct Span \{(.*?)\};", source("linear.h"), re.S)
    assert 4 * len(re.findall(r"int32_t \w+;", body)) == linear.SPAN_BYTES
