"""docs/reservation.md: its worked example is recomputed, row by row.

Where a kernel's scratch changes, `python tests/memory/test_reservation_doc.py` writes the
new numbers.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import pytest

from exl_loader.cache.layout import MAX_BIAS_PAIRS
from exl_loader.memory.reservation import LoadOptions, plan, planned
from support import REPO
from support.sparse import LLAMA_2_7B, write_sparse_exl2

DOCUMENT = REPO / "docs" / "reservation.md"
CTX = 18432
LAYERS, HIDDEN, INNER, VOCAB = 32, 4096, 11008, 32000
# Two texts: one for each 8,192 tokens.
ROWS, SEQUENCES, LOGITS_ROWS = 256, 2, 32
# (inputs, outputs) of a layer's seven linears.
LINEARS = [(HIDDEN, HIDDEN)] * 4 + [(HIDDEN, INNER)] * 2 + [(INNER, HIDDEN)]


def written_rows() -> dict[str, int]:
    rows = re.findall(r"^\| ([^|]+) \| ([\d,]+) \| [^|]+ \|$", DOCUMENT.read_text(), re.MULTILINE)
    return {name.strip("* "): int(number.replace(",", "")) for name, number in rows}


def derived_rows(scratch_bytes: int) -> dict[str, int]:
    """Recompute the example from the document's formulas, without the engine's code."""

    def tiles(n: int) -> int:
        return -(-n // 16)

    def codes(k: int, n: int, bits: int) -> int:
        return 64 * tiles(n) * (k * bits // 32)

    def aligned(n: int) -> int:
        return -(-n // 64) * 64

    heads = [(HIDDEN, VOCAB)]
    every = LINEARS * LAYERS + heads
    groups = [k // 128 for k, _ in every]
    elements = CTX * LAYERS * HIDDEN
    rows = {
        "codes of the layers": LAYERS * sum(codes(k, n, 4) for k, n in LINEARS),
        "codes of the head": codes(HIDDEN, VOCAB, 6),
        "scales": sum(8 * tiles(n) * g for (_, n), g in zip(every, groups, strict=True)),
        "units of scales": sum(aligned(2 * g) for g in groups),
        "group tables": sum(aligned(16 * g) for g in groups),
        "permutations": sum(4 * k for k, _ in every),
        "norms": 4 * HIDDEN * (2 * LAYERS + 1),
        "embedding": 2 * VOCAB * HIDDEN,
        "hidden state, its norm": 2 * 4 * ROWS * HIDDEN,
        "rotary angles": 4 * ROWS * 128,
        "memory of the blocks": max(
            4 * 4 * ROWS * HIDDEN, 2 * 4 * ROWS * INNER, 4 * LOGITS_ROWS * (VOCAB + HIDDEN)
        ),
        "ids, positions, page tables, rows with logits": 4 * (
            2 * ROWS + 72 * SEQUENCES + 64 * SEQUENCES + LOGITS_ROWS
        )
        + aligned(4 * (SEQUENCES + 1))
        + 2 * aligned(4 * SEQUENCES),
        "scratch": scratch_bytes,
    }
    names = list(rows)
    rows["weights"] = sum(rows[name] for name in names[:8])
    rows["workspace"] = sum(rows[name] for name in names[8:])
    in_open_pages = SEQUENCES * 257 * LAYERS * HIDDEN
    rows["key feedback beside 4 bits"] = LAYERS * HIDDEN * (128 * 2 + 4) + (
        LAYERS * HIDDEN // 128 * 3 * MAX_BIAS_PAIRS * 4
    )
    for bits, opened in ((4, in_open_pages * 17 // 8), (8, in_open_pages * 32 // 8)):
        feedback = rows["key feedback beside 4 bits"] if bits == 4 else 0
        rows[f"cache in {bits} bits"] = elements * (2 * bits + 1) // 8
        rows[f"open pages beside {bits} bits"] = opened
        rows[f"total in {bits} bits"] = (
            rows["weights"] + rows["workspace"] + rows[f"cache in {bits} bits"] + opened
            + feedback
        )
    return rows


@pytest.fixture
def seven_b(tmp_path, monkeypatch):
    monkeypatch.setenv("EXL_LOADER_THREADS", "8")
    return write_sparse_exl2(tmp_path / "7b", **LLAMA_2_7B)


def scratch_of(folder: Path) -> int:
    with planned(folder, LoadOptions(ctx_size=CTX, cache_type="q4", device="cpu")) as model:
        (found,) = (
            tensor.spec.nbytes
            for segment in model.segments
            for tensor in segment.offsets
            if tensor.spec.name == "scratch"
        )
    return found


def test_the_document_has_the_numbers_of_its_formulas(seven_b):
    assert written_rows() == derived_rows(scratch_of(seven_b))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_plan_has_the_numbers_of_the_document(seven_b, bits):
    written, found = written_rows(), plan(seven_b, ctx_size=CTX, cache_type=f"q{bits}")
    assert found.weights_bytes == written["weights"]
    assert found.cache_bytes == written[f"cache in {bits} bits"]
    (device,) = found.devices
    assert device.open_page_bytes == written[f"open pages beside {bits} bits"]
    assert device.key_feedback_bytes == written.get(f"key feedback beside {bits} bits", 0)
    assert found.workspace_bytes == (
        written["workspace"] + device.open_page_bytes + device.key_feedback_bytes
    )
    assert found.total_bytes == written[f"total in {bits} bits"]


def test_the_difference_in_the_text(seven_b):
    written = written_rows()
    difference = written["total in 8 bits"] - written["total in 4 bits"]
    assert f"{difference:,} bytes" in DOCUMENT.read_text()


def rewrite() -> None:
    """Write the current numbers into the document."""
    os.environ["EXL_LOADER_THREADS"] = "8"
    with tempfile.TemporaryDirectory() as temporary:
        scratch_bytes = scratch_of(write_sparse_exl2(Path(temporary) / "7b", **LLAMA_2_7B))
    text = DOCUMENT.read_text()
    for name, number in derived_rows(scratch_bytes).items():
        row = rf"^(\| \**{re.escape(name)}\** \| )[\d,]+ \|"
        text = re.sub(row, rf"\g<1>{number:,} |", text, flags=re.MULTILINE)
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    rewrite()
