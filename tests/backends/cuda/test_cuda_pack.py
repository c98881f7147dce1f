"""The CUDA layout: every width written out, round trips, and layers packed from checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exl_loader.backends.cuda import pack
from exl_loader.backends.cuda.layout import (
    StreamLinear,
    group_table,
    least_upload_bytes,
    row_block_table,
    row_splits_for,
)
from exl_loader.backends.layouts import BIT_PLANES
from exl_loader.checkpoint import Checkpoint
from exl_loader.formats import read_linear
from support.linear_cases import linear_ops
from support.makers import (
    allocate,
    linear_part,
    make_exl2_layer,
    make_gptq_layer,
    write_layer,
)
from support.targets import TARGETS, target

WIDTHS = sorted(BIT_PLANES)


def block_byte(codes: np.ndarray, bits: int, byte: int) -> int:
    """Compute one byte of a block from the words of layout.py.

    Args:
        codes: [32 rows, 32 columns]. byte: position within the block's 128 * bits bytes.
    """
    low_bits = bits
    for width in BIT_PLANES[bits]:
        low_bits -= width
        if byte < 128 * width:
            break
        byte -= 128 * width
    if width == 8:
        half, byte = divmod(byte, 512)
        lane, byte = divmod(byte, 16)
        word = 4 * half + byte // 4
    else:
        lane, byte = divmod(byte, 4 * width)
        word = byte // 4
    result = 0
    for i in range(8 // width):
        register = word + width * i
        column = 16 * (register // 4) + 8 * (register % 2) + lane // 4
        row = 8 * (lane % 4) + 4 * (register // 2 % 2) + byte % 4
        code = int(codes[row, column])
        result |= (code >> low_bits & (1 << width) - 1) << (i * width)
    return result


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_byte_is_where_the_layout_says(bits):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (32, 32)).astype(np.uint8)
    expected = [block_byte(codes, bits, i) for i in range(128 * bits)]
    assert pack.pack_block(codes, bits).tolist() == expected


def test_a_lane_written_out_by_hand():
    # Four bits; lane 5 has columns 1, 9, 17, 25 and rows 8..15. Word 0 is column 1, rows
    # 8..11, with column 17 in the high nibbles; word 3 column 9, rows 12..15, with column 25.
    codes = np.zeros((32, 32), np.uint8)
    codes[8:12, 1], codes[8:12, 17] = [1, 2, 3, 4], [5, 6, 7, 8]
    codes[12:16, 9], codes[12:16, 25] = [9, 10, 11, 12], [13, 14, 15, 1]
    lane = pack.pack_block(codes, 4)[16 * 5 : 16 * 6]
    assert lane.tolist() == [0x51, 0x62, 0x73, 0x84] + [0] * 8 + [0xD9, 0xEA, 0xFB, 0x1C]


@pytest.mark.parametrize("bits", WIDTHS)
def test_blocks_round_trip(bits):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (32, 32)).astype(np.uint8)
    assert (pack.unpack_block(pack.pack_block(codes, bits), bits) == codes).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_fields_of_a_header_round_trip(bits):
    values = np.random.default_rng(bits).integers(0, 1 << bits, 32).astype(np.uint8)
    fields = pack.pack_fields(values, bits)
    assert len(fields) == 4 * bits and (pack.unpack_fields(fields, bits) == values).all()


def test_a_lane_reads_its_four_levels_as_one_word():
    levels = np.arange(32, dtype=np.uint8) % 16
    words = pack.pack_fields(levels, 4).view(np.uint16)
    for column in range(8):
        fields = [int(words[column]) >> 4 * q & 15 for q in range(4)]
        assert fields == [levels[column + 8 * q] for q in range(4)]


def test_header_order_gives_a_lane_its_four_columns():
    ordered = pack.lane_order(np.arange(32))
    assert ordered[:8].tolist() == [0, 8, 16, 24, 1, 9, 17, 25]
    assert (pack.column_order(ordered) == np.arange(32)).all()


@given(
    st.lists(st.tuples(st.sampled_from(WIDTHS), st.integers(1, 12)), min_size=1, max_size=6),
    st.integers(0, 31), st.sampled_from([0, 4, 8]),
)  # fmt: skip
@settings(max_examples=60)
def test_row_blocks_say_where_to_start(groups, missing, zero_bits):
    """Walk a stream block by block, and compare at the start of each row block."""
    sizes = [(bits, 32 * blocks) for bits, blocks in groups]
    sizes[-1] = (sizes[-1][0], sizes[-1][1] - missing)
    table, header = group_table(sizes, zero_bits), {0: 16, 4: 80, 8: 96}[zero_bits]
    walked, place, count = [], 0, 0
    for group, (bits, blocks) in enumerate(groups):
        assert table[group][0] == bits and table[group][3] == place
        start = place
        place += header
        for block in range(blocks):
            if count % 4 == 0 and block == 0:
                walked.append((start, group, 0, start))
            elif count % 4 == 0:
                walked.append((place, group, bits | (blocks - block) << 8, start))
            place += 128 * bits
            count += 1
    assert row_block_table(table, zero_bits) == [*walked, (place, len(groups), 0, place)]


def test_row_splits():
    assert row_splits_for(4096, 4096) == 16  # 128 tiles
    assert row_splits_for(4096, 11008) == 8  # 344
    assert row_splits_for(4096, 32000) == 4  # 1000
    assert row_splits_for(4096, 128256) == 1  # 4008
    assert row_splits_for(256, 32) == 2 and row_splits_for(100, 32) == 1  # no more than windows


def load_layer_with(ops, folder, in_features, out_features, device=None, **options):
    """Plan a layer for a card and pack it there, with room for one tile at a time.

    Returns:
        the layer, its tensors on the host; its weight decoded from the checkpoint.
    """
    nbytes = least_upload_bytes(in_features)
    ops.upload_buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
    with Checkpoint.open(folder) as checkpoint:
        part = linear_part(checkpoint, "layer", in_features, out_features, device="cuda:0",
                           **options)
        tensors = {role: tensor.to(device or "cpu") for role, tensor in allocate(part).items()}
        stored = read_linear(part.spec, checkpoint)
        layer = ops.pack(stored, tensors)
        assert isinstance(layer, StreamLinear)
        for name in ("codes", "groups", "scale_units", "perm"):
            tensor = getattr(layer, name)
            setattr(layer, name, None if tensor is None else tensor.cpu())
        return layer, stored.weight()


def load_on_card(folder, in_features, out_features, order, **options):
    """Return a layer, its weight from the card's tensors, and from the checkpoint."""
    there = target(order, linear_ops)
    ops = there.ops if there.device is None else linear_ops(there.ops.launcher)
    layer, weight = load_layer_with(ops, folder, in_features, out_features, there.device,
                                    **options)
    return layer, pack.dequantize(layer), weight


@pytest.mark.parametrize("order", TARGETS)
@pytest.mark.parametrize("seed", range(6))
def test_exl2_layers_from_a_checkpoint(tmp_path, seed, order):
    rng = np.random.default_rng()
    in_features, out_features = int(rng.integers(1, 500)), int(rng.integers(1, 200))
    print(in_features, out_features)
    tensors, weight = make_exl2_layer(rng, in_features, out_features, bias=bool(seed % 2))
    folder = write_layer(tmp_path / "m", tensors)
    layer, decoded, reference = load_on_card(folder, in_features, out_features, order)
    assert torch.equal(decoded, weight) and torch.equal(reference, weight)
    assert (layer.bias is not None) == bool(seed % 2)


@pytest.mark.parametrize("order", TARGETS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [64, -1])
def test_gptq_layers_from_a_checkpoint(tmp_path, bits, act_order, group_size, order):
    tensors, weight = make_gptq_layer(
        np.random.default_rng(bits), 320, 72, bits=bits, group_size=group_size,
        act_order=act_order,
    )
    folder = write_layer(tmp_path / "m", tensors, bits=bits, group_size=group_size,
                         desc_act=act_order)
    layer, decoded, reference = load_on_card(folder, 320, 72, order)
    assert torch.equal(decoded, weight) and torch.equal(reference, weight)
    assert (layer.perm is not None) == (act_order and group_size != -1)


def test_part_of_a_fused_tensor(tmp_path):
    tensors, weight = make_gptq_layer(np.random.default_rng(3), 128, 96, group_size=64)
    folder = write_layer(tmp_path / "m", tensors, group_size=64)
    _, decoded, _ = load_on_card(folder, 128, 40, "forward", rows=(range(24, 64),))
    assert torch.equal(decoded, weight[:, 24:64])


def test_the_plan_follows_from_the_header(tmp_path):
    tensors, _ = make_exl2_layer(np.random.default_rng(0), 200, 50, [(4, 128), (3, 72)],
                                 bias=True)
    with Checkpoint.open(write_layer(tmp_path / "m", tensors)) as checkpoint:
        part = linear_part(checkpoint, "layer", 200, 50, device="cuda:1")
    words = tensors["q_weight"].shape[0]
    assert {role: (spec.dtype, spec.shape) for role, spec in part.tensors.items()} == {
        "codes": ("uint8", (2, 128 * (words + 7) + 2 * 16)),
        "groups": ("int32", (2, 4)),
        "row_blocks": ("int32", (3, 4)),
        "scale_units": ("float16", (2,)),
        "perm": ("int32", (200,)),
        "bias": ("float32", (50,)),
    }
    assert {spec.device for spec in part.tensors.values()} == {"cuda:1"}


def test_plan_of_gptq_counts_zero_points(tmp_path):
    tensors, _ = make_gptq_layer(np.random.default_rng(0), 200, 50, group_size=64, g_idx=False)
    with Checkpoint.open(write_layer(tmp_path / "m", tensors, group_size=64)) as checkpoint:
        part = linear_part(checkpoint, "layer", 200, 50, device="cuda:0")
    assert {role: spec.shape for role, spec in part.tensors.items()} == {
        "codes": (2, 128 * 7 * 4 + 4 * 80), "groups": (4, 4), "row_blocks": (3, 4),
    }  # fmt: skip


def test_packing_needs_room_for_one_tile(tmp_path):
    tensors, _ = make_exl2_layer(np.random.default_rng(0), 256, 64, [(8, 256)])
    ops = target("forward", linear_ops).ops
    with Checkpoint.open(write_layer(tmp_path / "m", tensors)) as checkpoint:
        part = linear_part(checkpoint, "layer", 256, 64, device="cuda:0")
        ops.upload_buffer = torch.empty(least_upload_bytes(256) // 2, dtype=torch.uint8)
        with pytest.raises(AssertionError):
            ops.pack(read_linear(part.spec, checkpoint), allocate(part))
