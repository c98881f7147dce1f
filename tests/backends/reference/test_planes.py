"""The packed layout: its bytes for every width, and round trips of whole layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exl_loader.backends.cpu.layout import PackedLinear, fill_tiles, group_table, read_tiles
from exl_loader.backends.layouts import BIT_PLANES
from exl_loader.backends.reference import planes
from exl_loader.formats.layer import unpack_stream
from support.makers import make_exl2_layer, pack_stream

WIDTHS = sorted(BIT_PLANES)


def tile_byte(codes: np.ndarray, bits: int, block: int, byte: int) -> int:
    """Compute one byte of a block of a tile, from the description in cpu/layout.py.

    Args:
        codes: [rows, 16] of the tile.
        byte: index in the block's 64 * bits bytes.
    """
    vector, position = divmod(byte, 64)
    column, row_in_register = divmod(position, 4)
    low_bits = bits
    for width in BIT_PLANES[bits]:
        low_bits -= width
        if vector < width:
            break
        vector -= width
    result = 0
    for i in range(8 // width):
        register = vector * (8 // width) + i
        code = int(codes[block * 32 + register * 4 + row_in_register, column])
        result |= (code >> low_bits & (1 << width) - 1) << (i * width)
    return result


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_byte_is_where_the_layout_defines_it(bits):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (64, 32))
    groups = torch.tensor(group_table([(bits, 64)]), dtype=torch.int32)
    packed = torch.empty(2, 64 * bits * 2, dtype=torch.uint8)
    planes.pack_words(torch.from_numpy(pack_stream(codes, bits)), 0, groups, packed)
    for tile in range(2):
        tile_codes = codes[:, 16 * tile : 16 * tile + 16]
        expected = [tile_byte(tile_codes, bits, b, i) for b in range(2) for i in range(64 * bits)]
        assert packed[tile].tolist() == expected


def test_a_block_written_out_by_hand():
    # Two bits. Column 0 is 0 1 2 3 0 1 2 3 ..., and other columns are 0. So register j has the
    # bytes 0 1 2 3 in column 0, and a byte of a vector holds the fields of four registers.
    codes = np.zeros((32, 16), np.int64)
    codes[:, 0] = np.arange(32) % 4
    packed = torch.empty(1, 128, dtype=torch.uint8)
    groups = torch.tensor([[2, 0, 32, 0]], dtype=torch.int32)
    planes.pack_words(torch.from_numpy(pack_stream(codes, 2)), 0, groups, packed)
    expected = [0x00, 0x55, 0xAA, 0xFF] + [0] * 60
    assert packed[0].tolist() == expected * 2


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("rows", [1, 4, 31, 32, 33, 96])
def test_streams_are_read_bit_for_bit(bits, rows):
    codes = np.random.default_rng(rows).integers(0, 1 << bits, (rows, 5))
    words = pack_stream(codes, bits).view(np.uint32)
    assert (unpack_stream(words, bits, rows) == codes).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_joined_planes_are_the_codes_before_splitting(bits):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (96, 48)).astype(np.uint8)
    assert (planes.join_planes(planes.split_planes(codes, bits), bits) == codes).all()


def test_group_table_counts_whole_blocks():
    table = group_table([(6, 64), (3, 32), (2, 20)])
    assert table == [(6, 0, 64, 0), (3, 64, 32, 768), (2, 96, 20, 960)]


@pytest.mark.parametrize("chunk_words", [1, 1 << 15])
@pytest.mark.parametrize("columns", [8, 32, 40, 96])
def test_mixed_groups_with_a_tail_round_trip(monkeypatch, columns, chunk_words):
    monkeypatch.setattr(planes, "CHUNK_WORDS", chunk_words)
    rng = np.random.default_rng(columns)
    layout = [(8, 128), (6, 32), (5, 64), (4, 32), (3, 96), (2, 32), (3, 19)]
    codes = [rng.integers(0, 1 << bits, (rows, columns)) for bits, rows in layout]
    words = [pack_stream(part, layout[i][0]) for i, part in enumerate(codes)]
    groups = np.array(group_table(layout), dtype=np.int32)
    tiles, used = 4, int(groups[-1, 3]) + 64 * 3
    packed = torch.full((tiles, used + 64), 0xA5, dtype=torch.uint8)
    planes.pack_words(torch.from_numpy(np.concatenate(words)), 0, torch.from_numpy(groups), packed)
    layer = PackedLinear(403, 64, packed, None, torch.from_numpy(groups))
    unpacked = planes.unpack_codes(layer)
    seen = min(columns, 64)
    assert (unpacked[:, :seen] == np.concatenate(codes)[:, :seen]).all()
    assert not unpacked[:384, seen:].any(), "columns beyond the layer are zero"
    assert not packed[:, used:].any(), "bytes after the last block are zero"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("with_perm", [False, True])
def test_gptq_rows_are_in_the_order_of_the_permutation(bits, with_perm):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (160, 24))
    perm = torch.from_numpy(rng.permutation(160).astype(np.int32)) if with_perm else None
    groups = torch.tensor(group_table([(bits, 64), (bits, 64), (bits, 32)]), dtype=torch.int32)
    packed = torch.full((2, 5 * 64 * bits), 0xA5, dtype=torch.uint8)
    planes.pack_gptq(torch.from_numpy(pack_stream(codes, bits)), bits, perm, groups, packed)
    unpacked = planes.unpack_codes(PackedLinear(160, 24, packed, None, groups))
    order = np.arange(160) if perm is None else perm.numpy()
    assert (unpacked[:, :24] == codes[order]).all()


def test_fields_of_four_bits_are_where_the_layout_defines_them():
    values = torch.randint(0, 16, (5, 45), dtype=torch.uint8)
    target = torch.full((3, 5, 8), 0xA5, dtype=torch.uint8)
    fill_tiles(values, target)
    words = target.numpy().view(np.uint32)
    for column in range(48):
        tile, c = divmod(column, 16)
        field = words[tile, :, c % 2] >> 4 * (c // 2) & 15
        expected = values[:, column].tolist() if column < 45 else [0] * 5
        assert field.tolist() == expected
    assert torch.equal(read_tiles(target)[:, :45], values)


def test_fill_rows_hold_the_zero_point():
    tensors, _ = make_exl2_layer(np.random.default_rng(0), 40, 16, [(4, 40)])
    packed = torch.empty(1, 64 * 4 * 2, dtype=torch.uint8)
    groups = torch.tensor([[4, 0, 40, 0]], dtype=torch.int32)
    planes.pack_words(tensors["q_weight"][:, :16].contiguous(), 0, groups, packed)
    whole = torch.tensor([[4, 0, 64, 0]], dtype=torch.int32)
    codes = planes.unpack_codes(PackedLinear(64, 16, packed, None, whole))
    assert (codes[40:] == 8).all()


def test_decoding_is_exact_at_the_ends_of_the_range():
    # 8 bits, zero points 255 and 0, and a float16 scale with all mantissa bits set.
    codes = np.tile(np.array([[0], [255]]), (16, 16))
    packed = torch.empty(1, 512, dtype=torch.uint8)
    groups = torch.tensor([[8, 0, 32, 0]], dtype=torch.int32)
    planes.pack_gptq(torch.from_numpy(pack_stream(codes, 8)), 8, None, groups, packed)
    scales = torch.full((1, 1, 16), 2047 / 2048, dtype=torch.float16)
    zeros = torch.tensor([255, 0] * 8, dtype=torch.uint8).view(1, 1, 16)
    weight = planes.dequantize(PackedLinear(32, 16, packed, scales, groups, zeros=zeros))
    exact = (codes - np.array([255, 0] * 8)) * (2047 / 2048)
    assert (weight.double().numpy() == exact).all()
