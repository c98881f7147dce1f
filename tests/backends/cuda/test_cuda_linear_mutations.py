"""Kernels of matrix products with one wrong expression each: the comparisons must notice."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from exl_loader.backends.cuda.pack import dequantize
from exl_loader.backends.reference.ops import dense_weight
from support.cuda_emulation import EmulatedLauncher, EmulationError
from support.cuda_emulation.launcher import FOLDER, REPO, emulation_spec
from support.exhaustive import some_of
from support.kernel_cases import dense_linear, random_rows
from support.linear_cases import linear_ops, quantised_product, scratch_for, stream_linear
from support.makers import make_exl2_layer, make_gptq_layer, write_layer

pytestmark = pytest.mark.slow

GROUPS = [(8, 96), (6, 64), (5, 128), (4, 288), (3, 64), (2, 40)]


def error(ops, w, rows):
    """Relative distance of a product from its definition."""
    x, out = random_rows(rows, w.in_features), torch.zeros(rows, w.out_features)
    scratch = scratch_for(rows, w)
    ops.linear(x, w, out, scratch)
    if hasattr(w, "codes"):
        exact = quantised_product(x, w)[0]
    else:
        exact = (x.double() @ dense_weight(w).double()).numpy()
    return np.linalg.norm(out.numpy() - exact) / np.linalg.norm(exact)


def decoded_right(ops, tmp_path):
    w = stream_linear(GROUPS, 70, zeros=True, perm=True)
    return all(error(ops, w, rows) < 1e-5 for rows in (1, 3, 7, 14))


def scaled_right(ops, tmp_path):
    """Check scales and zero points of 4 bits, with row splits that begin within a group."""
    layers = [stream_linear([(5, 96), (3, 416)], 70), stream_linear([(4, 416)] * 2, 70, zeros=True)]
    return all(error(ops, w, rows) < 1e-5 for w in layers for rows in (1, 7))


def made_right(ops, tmp_path):
    """Check a row that is normalised or gated in the kernel that multiplies it."""
    w = stream_linear([(4, 128), (3, 416)], 96, perm=True)
    x, other = random_rows(1, 544), random_rows(1, 544, seed=3)
    normed, outs = torch.empty(1, 544), [torch.zeros(1, 96) for _ in range(2)]
    ops.normed_linears(x, other[0], 1e-6, normed, [w], outs[:1])
    ops.gated_linear(x, other, "gelu", w, outs[1])
    rows = [x / x.square().mean().add(1e-6).sqrt() * other, torch.nn.functional.gelu(x) * other]
    if not torch.allclose(normed, rows[0], rtol=1e-5):
        return False
    exact = [quantised_product(row, w)[0] for row in rows]
    return all(
        np.linalg.norm(out.numpy() - e) < 1e-4 * np.linalg.norm(e)
        for out, e in zip(outs, exact, strict=True)
    )


def prefilled_right(ops, tmp_path):
    w = stream_linear(GROUPS, 170, zeros=True, perm=True)
    return all(error(ops, w, rows) < 1e-5 for rows in (40, 70))


def dense_right(ops, tmp_path):
    # Rows that are not aligned, and more parts than a block has warps.
    layers = [dense_linear(k, 50, torch.float16) for k in (302, 2600)]
    for layer in layers:
        # What is read behind the weight is no number, and so is a product with it.
        behind = torch.full((4096,), torch.nan, dtype=torch.float16)
        stored = torch.cat([layer.weight.flatten(), behind])
        layer.weight = stored[: layer.weight.numel()].view(layer.weight.shape)
    return all(error(ops, w, rows) < 1e-5 for w in layers for rows in (1, 6, 70))


def packed_right(ops, tmp_path):
    from test_cuda_pack import load_layer_with

    rng = np.random.default_rng(0)
    for name, (tensors, weight), options in (
        ("exl2", make_exl2_layer(rng, 392, 70, [(8, 96), (5, 128), (3, 128), (2, 40)]), {}),
        ("gptq", make_gptq_layer(rng, 384, 70, group_size=64, act_order=True),
         {"group_size": 64, "desc_act": True}),
    ):  # fmt: skip
        folder = write_layer(tmp_path / name, tensors, **options)
        layer, _ = load_layer_with(ops, folder, len(weight), 70)
        if not torch.equal(dequantize(layer), weight):
            return False
    return True


MUTATIONS = [
    (decoded_right, "linear_stream.cuh", "offset & mask_", "offset & (mask_ / 2)"),
    (decoded_right, "linear_stream.cuh", "kReadChunks = 2", "kReadChunks = 1"),
    (decoded_right, "linear_stream.cuh", "lane_start + 512 < length_",
     "lane_start + 544 < length_"),
    (decoded_right, "linear_stream.cuh", "* (minus[n] * (1 << shift))", "* minus[n]"),
    (decoded_right, "linear_stream.cuh", "(left > 0 ? 1 : 0)", "0"),
    (decoded_right, "linear_stream.cuh", "if (count == kBlocksPerRowBlock) continue;", "continue;"),
    (decoded_right, "linear_layout.cuh", "Bits == 6 ? 2", "Bits == 6 ? 3"),
    (decoded_right, "linear_decode.cu", "for (int s = 1; s <", "for (int s = 2; s <"),
    (decoded_right, "linear_decode.cu", "+ 4 * n + t, x.rows", "+ n + t, x.rows"),
    (decoded_right, "linear_decode.cu", "8 * q + lane / 4", "8 * q + lane % 8"),
    (decoded_right, "linear_quantize.cuh", "block < blocks", "block + 1 < blocks"),
    (decoded_right, "linear_quantize.cuh", "perm[stored] : stored", "stored : stored"),
    (decoded_right, "linear_decode.cu", "    block_sync();  // the row is quantised\n", ""),
    (scaled_right, "linear_stream.cuh", "levels >> 8 | levels << 4", "levels >> 8 | levels << 8"),
    (scaled_right, "linear_stream.cuh", "0x63FE63FEu", "0x64006400u"),
    (scaled_right, "linear_stream.cuh", "w.scale_units[start.group]", "w.scale_units[0]"),
    (scaled_right, "linear_stream.cuh", "next_unit = w.scale_units[index]",
     "next_unit = w.scale_units[0]"),
    (scaled_right, "linear_stream.cuh", "(pairs | pairs << 4)", "(pairs | pairs << 8)"),
    (made_right, "linear_decode.cu", "warp * 32 + lane_id()", "warp_id() * 32 + lane_id()"),
    (made_right, "linear_decode.cu", "source.kind - kGatedRow", "kSilu"),
    (made_right, "linear_decode.cu", "store = blockIdx.x == 0", "store = blockIdx.x == 9"),
    (made_right, "linear_decode.cu",
     "    block_sync();  // all partial sums are read by all threads\n", ""),
    (prefilled_right, "linear_prefill.cu", "const int block = piece / kBlockPieces",
     "const int block = (piece / kBlockPieces) ^ (row & 1)"),
    (prefilled_right, "linear_prefill.cu", "row_block % 2 * buffer_bytes",
     "row_block * 0 * buffer_bytes"),
    (prefilled_right, "linear_prefill.cu", "= 0.0f;\n            }\n            ++row_split",
     "*= 1.0f;\n            }\n            ++row_split"),
    (prefilled_right, "linear_prefill.cu", "const int row = 4 * half * kRowTiles + g / 2",
     "const int row = 4 * half + g / 2"),
    (dense_right, "linear_dense.cuh", "k / 4 * 2 + k % 2", "k / 4 * 2 + k / 2 % 2"),
    (dense_right, "linear_dense.cuh", "valid && row < in_features", "valid"),
    (dense_right, "linear_dense.cuh", "v.z = row[k + 2]", "v.z = row[k + 1]"),
    (dense_right, "linear_dense.cuh", "Type::multiply(sums[tile][n], a, low)", ""),
    (dense_right, "linear_dense_decode.cu", "next_k_ += skipped_k_",
     "next_k_ += skipped_k_ - kPartK"),
    (dense_right, "linear_dense_decode.cu", "+ 1 == kSlots ? 0", "+ 2 == kSlots ? 0"),
    (dense_right, "linear_dense_decode.cu", "(slice + 1) * kSliceBlocks + i", "slice + 1 + i"),
    (dense_right, "linear_dense_decode.cu", "min(warps, parts - round)", "warps"),
    (dense_right, "linear_dense_decode.cu",
     "        block_sync();  // the parts have been read and may be overwritten\n", ""),
    (dense_right, "linear_dense_prefill.cu", "chunk ^ (row % 2 * 4))", "chunk ^ (row % 2 * 8))"),
    (dense_right, "linear_dense_prefill.cu", "slice / kPartSlices];", "0];"),
    (dense_right, "linear_dense_prefill.cu", "copy(slice + kSlots - 1)", "copy(slice + kSlots)"),
    (dense_right, "linear_dense_prefill.cu", "sum = 0.0f;", ""),
    (packed_right, "pack.cu", "shift + Bits > 32 ?", "shift + Bits > 33 ?"),
    (packed_right, "pack.cu", "2 * (lane_id() % 4) + j / 2 % 2", "2 * (lane_id() % 4) + j % 2"),
    (packed_right, "pack.cu", "target.index * header", "(target.index + 1) * header"),
    (packed_right, "pack.cu", "4 * (lane_id() % 8) + lane_id() / 8", "lane_id()"),
    (packed_right, "pack.cu", "field << (4 * (lane_id() / 8))", "field << (4 * (lane_id() % 4))"),
    (packed_right, "pack.cu", "perm[stored] : stored", "stored : stored"),
]
SOURCES = {
    made_right: ("linear_decode",),
    decoded_right: ("linear_decode", "linear_quantize"),
    scaled_right: ("linear_decode", "linear_quantize"),
    prefilled_right: ("linear_prefill", "linear_quantize"),
    dense_right: ("linear_dense_decode", "linear_dense_prefill"),
    packed_right: ("pack",),
}


def launcher(folder, sources, order="forward"):
    paths = [folder / "csrc" / "cuda" / f"{name}.cu" for name in sources]
    return EmulatedLauncher(emulation_spec(paths, folder), order=order)


@pytest.mark.parametrize("change", some_of(MUTATIONS, 9), ids=lambda change: change[2][:40])
def test_a_wrong_expression_is_noticed(tmp_path, change):
    check, file, old, new = change
    copy = tmp_path / "copy"
    shutil.copytree(REPO / "csrc", copy / "csrc")
    shutil.copytree(REPO / FOLDER, copy / FOLDER)
    path = copy / "csrc" / "cuda" / file
    text = path.read_text()
    assert text.count(old) >= 1, "the kernel changed; so must this test"
    path.write_text(text.replace(old, new))
    noticed = False
    for order in ("forward", "reverse"):
        try:
            ops = linear_ops(launcher(copy, SOURCES[check], order))
            noticed |= not check(ops, tmp_path / order)
        except EmulationError:
            noticed = True
    assert noticed


@pytest.mark.parametrize("check", SOURCES)
def test_without_a_change_the_checks_pass(tmp_path, check):
    assert check(linear_ops(launcher(REPO, SOURCES[check])), tmp_path)
