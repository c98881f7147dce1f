"""docs/vram.md: its figures are those of the script, and exllamav2's those of its formulas."""

from __future__ import annotations

import re

import pytest

from benchmarks import vram

LLAMA = vram.MODELS["7B (Llama 2)"]


def written(name, bits, ctx_size):
    """Return the cells of a row of the document."""
    section = vram.DOCUMENT.read_text().split(f"### {name}\n")[1].split("### ")[0]
    (row,) = re.findall(rf"^\| {bits} \| {ctx_size:,} \| (.*) \|$", section, re.MULTILINE)
    return row.split(" | ")


@pytest.mark.parametrize("bits", [2.4, 5.0])
def test_the_document_has_the_figures_of_the_script(tmp_path, bits):
    folder = vram.write_folder(tmp_path / "m", LLAMA, bits)
    for ctx_size in vram.CONTEXTS:
        own, theirs = vram.ours(folder, ctx_size), vram.exllamav2(LLAMA, bits, ctx_size)
        expected = []
        for kind in vram.CACHE_TYPES:
            both = own[kind], theirs[kind] + vram.RESERVE_BYTES
            assert both[0] < both[1]
            expected += [f"{nbytes / vram.GIB:.2f}" for nbytes in both]
        found = written("7B (Llama 2)", bits, ctx_size)
        assert found == expected, "run python -m benchmarks.vram --write"


def test_every_model_has_a_row_for_its_bits_and_contexts():
    for name in vram.MODELS:
        for bits in vram.BITS:
            for ctx_size in vram.CONTEXTS:
                assert len(written(name, bits, ctx_size)) == 2 * len(vram.CACHE_TYPES)


def test_exllamav2s_memory_of_llama_2_7b():
    """Its parts, computed by hand."""
    q4, fp16 = (vram.cache_bytes(LLAMA, 4096, kind) for kind in ("q4", "fp16"))
    assert fp16 == 4096 * 4096 * 2 * 2 * 32
    assert q4 == 4096 * 4096 * 2 * 32 * 4.5 / 8 + 4096 * 4096 * 2 * 2
    # The head's weights in float16 are larger than the MLP's buffers; not so in 70B.
    assert vram.scratch_bytes(LLAMA) == 2 * 4096 * 32000
    mlp = 2048 * 2 * (8192 + 2 * 28672) + 2 * 8192 * 28672
    assert vram.scratch_bytes(vram.MODELS["70B (Llama 2)"]) == mlp
    # 4-bit codes in groups of 128 rows: int32 words, 4-bit and float16 scales, group table,
    # permutations and group map.
    layer = 4096 * 4096 // 2 + 32 * 4096 // 2 + 2 * 32 + 4 * 32 + 4 * 4096 + 4 * 4096
    assert vram.linear_bytes(4096, 4096, 4, 128) == layer
    assert vram.rope_bytes(LLAMA, 4096) == 2 * 4096 * 128 * 2
