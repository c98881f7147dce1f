"""What the quantised cache keeps of its vectors, beside exllamav2's scheme."""

from __future__ import annotations

import sys

import pytest
import torch

from exl_loader.backends.reference import fp16 as reference_fp16
from exl_loader.backends.reference.codec import (
    CODEBOOKS,
    dequantize,
    levels,
    pack_codes,
    quantize,
    rotate,
    rotate_back,
    rotation_block,
    unpack_codes,
)
from exl_loader.backends.reference.ops import cache_round_trip
from support import REPO

sys.path.insert(0, str(REPO / "tools"))

import fit_codebooks
from benchmarks.cpu import exllamav2_cache
from benchmarks.cpu.cache_quality import normal, relative_squared_error, with_outliers

BITS = {"q8": 8, "q6": 6, "q4": 4, "q3": 3}


def error(x, cache_type):
    return relative_squared_error(cache_round_trip(x, cache_type), x)


def peer_error(x, bits):
    return relative_squared_error(exllamav2_cache.round_trip(x, bits), x)


def uniform_error(x, bits=4):
    """Error of uniform codes with a full-head rotation, signed maximum and search."""
    half = 2 ** (bits - 1)
    groups = rotate(x.double()).float().unflatten(1, (-1, 32))
    place = groups.abs().argmax(dim=-1, keepdim=True)
    largest = groups.gather(-1, place)
    best, errors = torch.zeros_like(groups), torch.full_like(largest, torch.inf)
    for factor in torch.linspace(0.72, 1.1, 24):
        # Codes reach from -half to half - 1: the largest magnitude gets the side with one more.
        scales = (-largest * factor / half).half().float()
        tried = (groups / scales).round().clamp(-half, half - 1) * scales
        error_of = (tried - groups).square().sum(dim=-1, keepdim=True)
        best = torch.where(error_of < errors, tried, best)
        errors = errors.minimum(error_of)
    return relative_squared_error(rotate_back(best.flatten(1).double()), x)


def test_the_data_give_other_schemes_the_figures_that_are_quoted():
    assert peer_error(normal(0), 4) == pytest.approx(0.00875, rel=0.03)
    assert peer_error(with_outliers(), 4) == pytest.approx(0.0059, rel=0.03)
    assert uniform_error(normal(0)) == pytest.approx(0.0066, rel=0.03)
    assert uniform_error(with_outliers()) == pytest.approx(0.0040, rel=0.03)


@pytest.mark.parametrize("seed", range(3))
def test_four_bits_on_normal_data(seed):
    assert error(normal(seed), "q4") <= 0.0053


def test_four_bits_on_data_with_outlier_channels():
    assert error(with_outliers(), "q4") <= 0.0039


def test_three_bits_beat_one_uniform_grid():
    for x, most, share in ((normal(0), 0.0223, 0.84), (with_outliers(), 0.0161, 0.9)):
        assert error(x, "q3") <= min(most, share * uniform_error(x, 3))


MORE = pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("channels", "factor"),
    [(1, 20), (8, 50), *(pytest.param(*case, marks=MORE)
                         for case in ((2, 25), (4, 16), (8, 10), (8, 20), (16, 10)))],
)
def test_the_peer_is_beaten_however_many_channels_stand_out(channels, factor):
    x = with_outliers(channels, factor, seeds=12, rows=100)
    assert error(x, "q4") <= 0.73 * peer_error(x, 4)
    # Worst with eight huge channels: mixing half of them at a time, as the peer does, leaves
    # its groups fewer peaks.
    assert error(x, "q6") <= 0.86 * peer_error(x, 6)
    assert error(x, "q8") <= 0.82 * peer_error(x, 8)


@pytest.mark.parametrize(("name", "share"), [("q6", 0.73), ("q8", 0.68)])
@pytest.mark.parametrize("make", [lambda: normal(5), with_outliers])
def test_six_and_eight_bits_beat_a_uniform_grid_of_the_maximum(name, share, make):
    x = make()
    assert error(x, name) <= share * peer_error(x, BITS[name])


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256])
def test_head_sizes_cost_no_quality(head_dim):
    x = normal(head_dim, rows=500, head_dim=head_dim)
    assert error(x, "q3") <= 0.0225
    assert error(x, "q4") <= 0.0054
    assert error(x, "q6") <= 0.00043
    assert error(x, "q8") <= 2.7e-5


def test_fp32_keeps_everything():
    x = normal(1, rows=10)
    assert torch.equal(cache_round_trip(x, "fp32"), x)


@pytest.mark.parametrize("head_dim", [16, 20, 64, 72, 80, 128])
@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1.0, 1e4])
def test_fp16_loses_a_fifth_of_what_float16_loses(head_dim, magnitude):
    x = normal(1, head_dim=head_dim) * magnitude
    float16_error = relative_squared_error(x.half().float(), x)
    assert error(x, "fp16") <= min(float16_error / 25, 1.5e-9)
    codes = reference_fp16.encode(x)
    assert codes.dtype == torch.int16 and codes.shape == x.shape


def test_fp16_bounds_faults_and_small_heads():
    x = torch.zeros(4, 64)
    x[1, 3], x[1, 40] = 7e4, -1e5
    x[2, 3], x[3, 3] = torch.nan, torch.inf
    y = cache_round_trip(x, "fp16")
    assert torch.equal(y[0], x[0])
    # Beyond float16's range values end there, as large as the scale.
    assert y[1, [3, 40]].tolist() == pytest.approx([65504, -65504], rel=1e-3)
    assert y[2:, :32].isnan().all() and torch.equal(y[2:, 32:], x[2:, 32:])
    small = normal(3, rows=5, head_dim=8)
    assert torch.equal(cache_round_trip(small, "fp16"), small.half().float())


def test_mixed_types_treat_keys_and_values_apart():
    x = normal(2, rows=20)
    assert torch.equal(cache_round_trip(x, "q8_q4"), cache_round_trip(x, "q8"))
    assert torch.equal(cache_round_trip(x, "q8_q4", values=True), cache_round_trip(x, "q4"))


@pytest.mark.parametrize("head_dim", [2, 20, 64, 80, 112, 256])
def test_the_rotation_is_orthonormal_and_undone(head_dim):
    x = normal(3, rows=7, head_dim=head_dim).double()
    y = rotate(x)
    assert torch.allclose(y @ y.T, x @ x.T, atol=1e-9)
    assert torch.allclose(rotate_back(y), x, atol=1e-9)
    assert head_dim % rotation_block(head_dim) == 0


def test_one_large_channel_is_spread_over_its_block():
    x = torch.zeros(1, 128)
    x[0, 17] = 128.0
    assert torch.allclose(rotate(x.double()).abs(), torch.tensor(128.0**0.5).double(), atol=1e-9)


@pytest.mark.parametrize("bits", [8, 6, 4, 3])
@pytest.mark.parametrize("magnitude", [1e-5, 1e-2, 1.0, 1e3, 6e4])
def test_size_does_not_matter_within_what_float16_scales_hold(bits, magnitude):
    y = normal(4, rows=200, head_dim=64)
    y *= magnitude / y.abs().max()
    codes, scales = quantize(y, bits)
    back = dequantize(codes, scales, 64, bits)
    # float16 has six bits left for a scale of 4e-6, so eight bits lose a little there.
    limit = {8: 3e-5, 6: 4.4e-4, 4: 5.5e-3, 3: 2.25e-2}[bits] * (2 if magnitude < 1e-4 else 1)
    assert relative_squared_error(back, y) <= limit


@pytest.mark.parametrize("bits", [8, 6, 4, 3])
@pytest.mark.parametrize("elements", [1, 8, 15, 16, 20, 31, 32])
def test_every_code_survives_packing(bits, elements):
    generator = torch.Generator().manual_seed(elements)
    codes = torch.randint(2**bits, (300, elements), generator=generator, dtype=torch.uint8)
    data = pack_codes(codes, bits)
    assert data.shape == (300, -(-elements // 8) * bits)
    assert torch.equal(unpack_codes(data, elements, bits), codes.long())


def test_bytes_stand_as_documented():
    codes = torch.arange(32, dtype=torch.uint8)[None]
    assert pack_codes(codes, 8).tolist() == [list(range(32))]
    # Element i in the low half of byte i, element i + 16 in the high half.
    assert pack_codes(codes % 16, 4).tolist() == [[17 * i for i in range(16)]]
    # The low two bits of i, i + 8, i + 16 and i + 24 are the same: i % 4 four times.
    high = [(i >> 2) | (i + 16 >> 2) << 4 for i in range(16)]
    assert pack_codes(codes, 6).tolist() == [high + [0x55 * (i % 4) for i in range(8)]]
    # Codes 0, 1, ... 7 four times: byte i has the same two bits four times, 0, 0, 1, 1, ..., and
    # byte i of the plane of 1 bit the lowest bit of i, i + 4, ..., eight times the same.
    assert pack_codes(codes % 8, 3).tolist() == [
        [0x55 * (i >> 1) for i in range(8)] + [255 * (i % 2) for i in range(4)]
    ]


@pytest.mark.parametrize("bits", CODEBOOKS)
def test_levels_of_tables_follow_the_scale_s_sign_and_lowest_bit(bits):
    times = 32 // 2**bits
    codes = pack_codes(torch.arange(2**bits, dtype=torch.uint8).repeat(times)[None], bits)
    for table in (0, 1):
        for sign in (1, -1):
            scale = torch.tensor([[sign * 2.0]], dtype=torch.float16)
            scale = (scale.view(torch.int16) | table).view(torch.float16)
            levels_of_table = torch.tensor(CODEBOOKS[bits][table]) / 128
            expected = levels_of_table.repeat(times) * scale.float()
            assert torch.equal(dequantize(codes, scale, 32, bits), expected)


def test_zeros_stay_zeros_and_faults_show():
    x = torch.zeros(3, 64)
    x[1, 5] = torch.nan
    x[2, 40] = torch.inf
    for name in BITS:
        y = cache_round_trip(x, name)
        assert torch.equal(y[0], x[0])
        assert y[1].isnan().all() and y[2].isnan().all()


@pytest.mark.parametrize("bits", CODEBOOKS)
def test_the_codebooks_are_where_their_fit_ends(bits):
    kinds = [fit_codebooks.make_kind(*key, 0.004, 300) for key in ((0, 1), (3, 20), (8, 20))]
    fitted, before = fit_codebooks.fit_round(kinds, levels(bits), bits)
    assert (fitted - levels(bits)).abs().max() <= 2 / 128
    _, after = fit_codebooks.fit_round(kinds, fitted, bits)
    assert all(b >= 0.99 * a for a, b in zip(before, after, strict=True))
    # From equally wide levels a round goes down.
    even = torch.linspace(-1, 127 / 128, 2**bits).repeat(2, 1) * torch.tensor([[1.0], [0.9]])
    moved, errors = fit_codebooks.fit_round(kinds, even, bits)
    _, less = fit_codebooks.fit_round(kinds, moved, bits)
    assert all(b < 0.99 * a for a, b in zip(errors, less, strict=True))
