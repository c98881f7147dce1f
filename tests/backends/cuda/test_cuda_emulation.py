"""The emulation itself: its wrappers against their definitions, and their cost."""

import ctypes
import re

import numpy as np
import pytest

from exl_loader.backends.build import toolchain
from support.cuda_emulation import EmulatedLauncher
from support.cuda_emulation.arrays import aligned, pointer, run
from support.cuda_emulation.launcher import FOLDER, REPO, emulation_spec, sanitized
from support.cuda_emulation.sanitized import run_sanitized, runtimes

pytestmark = pytest.mark.skipif(toolchain.find_compiler() is None, reason="needs g++ or clang++")

SAMPLES = REPO / FOLDER / "samples.cu"
ORDERS = [("forward", 0), ("reverse", 0), ("shuffled", 1), ("shuffled", 2)]


@pytest.fixture(scope="module")
def built():
    return EmulatedLauncher(emulation_spec([SAMPLES]))


@pytest.fixture(params=ORDERS, ids=lambda order: f"{order[0]}{order[1]}")
def launcher(built, request):
    built.set_order(*request.param)
    return built


@pytest.fixture
def rng():
    return np.random.default_rng()


def test_barrier_orders_threads(launcher):
    given = np.arange(512, dtype=np.float32)
    out = np.zeros_like(given)
    run(launcher, "reverse_kernel", given, out, grid=(2, 1, 1), block=256, shared=1024)
    assert np.array_equal(out, given.reshape(2, 256)[:, ::-1].ravel())


def test_missing_barrier_shows(launcher):
    given = np.arange(512, dtype=np.float32)
    out = np.zeros_like(given)
    run(launcher, "racing_kernel", given, out, grid=(2, 1, 1), block=256, shared=1024)
    assert np.isnan(out).any()


def test_lanes_exchange_values(launcher, rng):
    given = rng.integers(-1000, 1000, 64, dtype=np.int32)
    out = np.zeros((7, 64), dtype=np.int32)
    run(launcher, "lanes_kernel", given, out, block=64)
    warps, lane = given.reshape(2, 32), np.arange(32)
    votes = [int(sum(1 << i for i in lane if warp[i] % 2)) for warp in warps]
    expected = [
        warps[:, ::-1],
        warps[:, lane ^ 5],
        warps[:, np.where(lane + 3 < 32, lane + 3, lane)],
        warps[:, np.where(lane - 3 >= 0, lane - 3, lane)],
        np.array(votes, dtype=np.uint32).view(np.int32)[:, None].repeat(32, 1),
        warps.max(axis=1)[:, None].repeat(32, 1),
        np.arange(2)[:, None] * 100 + lane,
    ]
    assert np.array_equal(out, np.stack(expected).reshape(7, 64))


def test_grid_has_three_dimensions(launcher):
    out = np.full(2 * 3 * 5, -1, dtype=np.int32)
    run(launcher, "grid_kernel", out, grid=(5, 3, 2))
    assert np.array_equal(out, np.arange(30))


def test_last_block_adds_in_order(launcher):
    partial, counter = np.zeros(50, dtype=np.float32), np.zeros(1, dtype=np.uint32)
    sums = []
    for _ in range(2):
        out = np.zeros(1, dtype=np.float32)
        run(launcher, "last_block_kernel", partial, counter, out, grid=(50, 1, 1), shared=4)
        sums.append(out[0])
    expected = np.float32(0)
    for i in range(50):
        expected += np.float32(1) / np.float32(i + 1)
    assert sums == [expected, expected] and counter[0] == 0


def test_arguments_of_every_type(built):
    class Pair(ctypes.Structure):
        _fields_ = [("values", ctypes.c_void_p), ("count", ctypes.c_int32)]

    values, out = np.array([1, 2.5], dtype=np.float32), np.zeros(4)
    big = ctypes.c_int64(-(2**40))
    pair = Pair(values.ctypes.data, 2)
    launch = built.prepare("arguments_kernel", (1, 1, 1), 32, 0, pointer(out), big,
                           ctypes.c_int32(-7), ctypes.c_float(0.25), pair)
    launch()
    assert out.tolist() == [-(2.0**40), -7, 0.25, 2.5]
    big.value = 3
    launch()
    assert out[0] == 3


@pytest.mark.parametrize("valid", [0, 5, 32, 50, 64])
def test_copies_arrive_when_waited_for(launcher, rng, valid):
    given = aligned(rng.integers(0, 2**32, (64, 4), dtype=np.uint32))
    out = aligned(np.zeros_like(given))
    run(launcher, "copy_kernel", given, out, ctypes.c_int32(valid), shared=1024)
    expected = given.copy()
    expected[valid:] = 0
    assert np.array_equal(out, expected)


def test_copy_that_is_not_waited_for_shows(launcher, rng):
    given = aligned(rng.integers(0, 2**31, (32, 4), dtype=np.uint32))
    out = aligned(np.zeros_like(given))
    run(launcher, "hasty_copy_kernel", given, out, shared=512)
    assert (out == 0xFFFFFFFF).all()


def test_loads(built, rng):
    given = aligned(rng.integers(0, 2**32, 12, dtype=np.uint32))
    out = np.zeros(11, dtype=np.uint32)
    run(built, "loads_kernel", given, out)
    assert np.array_equal(out, given[:11])


def fragments(matrix, per_word, rows):
    """Words of PTX's fragment of a [16 or 8, depth] matrix, by the ISA's formulas."""
    words = matrix.shape[1] // (4 * per_word) * rows // 8
    out = np.zeros((32, words, per_word), dtype=matrix.dtype)
    for lane in range(32):
        for i in range(words):
            row = lane // 4 + (8 * (i % 2) if rows == 16 else 0)
            block = i // 2 if rows == 16 else i
            first = lane % 4 * per_word + 4 * per_word * block
            out[lane, i] = matrix[row, first : first + per_word]
    return aligned(out.view(np.uint32).reshape(32, words))


def unpack_sum(d):
    matrix = np.zeros((16, 8), dtype=d.dtype)
    for lane in range(32):
        for i in range(4):
            matrix[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2] = d[lane, i]
    return matrix


@pytest.mark.parametrize("name", ["u8s8", "s8s8"])
def test_integer_products(launcher, rng, name):
    first = np.uint8 if name == "u8s8" else np.int8
    a = rng.integers(np.iinfo(first).min, np.iinfo(first).max + 1, (16, 32), dtype=first)
    b = rng.integers(-128, 128, (8, 32), dtype=np.int8)
    d = np.full((32, 4), 11, dtype=np.int32)
    run(launcher, f"mma_{name}_kernel", fragments(a, 4, 16), fragments(b, 4, 8), d)
    assert np.array_equal(unpack_sum(d), a.astype(int) @ b.astype(int).T + 11)


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_float_products(launcher, rng, name):
    a, b = (rng.standard_normal((n, 16)).astype(np.float32) for n in (16, 8))
    if name == "f16":
        bits = [x.astype(np.float16).view(np.uint16) for x in (a, b)]
        values = [x.view(np.float16).astype(np.float64) for x in bits]
    else:
        bits = [(x.view(np.uint32) >> 16).astype(np.uint16) for x in (a, b)]
        values = [(x.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for x in bits]
    d = np.full((32, 4), 0.5, dtype=np.float32)
    run(launcher, f"mma_{name}_kernel", fragments(bits[0], 2, 16), fragments(bits[1], 2, 8), d)
    np.testing.assert_allclose(unpack_sum(d), values[0] @ values[1].T + 0.5, rtol=1e-6)


def test_matrices_are_loaded(launcher, rng):
    given = aligned(rng.integers(0, 2**16, (4, 8, 8), dtype=np.uint16))
    out = np.zeros((2, 32, 4), dtype=np.uint32)
    run(launcher, "load_matrix_kernel", given, out, shared=512)
    for i, matrices in enumerate((given, given.transpose(0, 2, 1))):
        expected = np.ascontiguousarray(matrices).reshape(4, 32, 2).view(np.uint32)[..., 0].T
        assert np.array_equal(out[i], expected)


def test_integer_instructions(built, rng):
    a, b = (rng.integers(0, 2**32, 300, dtype=np.uint32) for _ in range(2))
    a[:3] = 0, 0xFFFFFFFF, 0x80808080
    out = np.zeros((7, 300), dtype=np.uint32)
    run(built, "integers_kernel", a, b, out, ctypes.c_int32(300), grid=(2, 1, 1), block=256)
    b8 = b.view(np.int8).reshape(-1, 4).astype(int)
    unsigned = (a.view(np.uint8).reshape(-1, 4) * b8).sum(1) + 7
    signed = (a.view(np.int8).reshape(-1, 4) * b8).sum(1) - 7
    pool = np.concatenate([a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)], 1)
    nibbles = b[:, None] >> (8 + 4 * np.arange(4, dtype=np.uint32)) & 15
    chosen = np.take_along_axis(pool, (nibbles & 7).astype(int), 1)
    sign = np.where(chosen & 0x80, 255, 0)
    permuted = np.where(nibbles & 8, sign, chosen).astype(np.uint8).view(np.uint32)[:, 0]
    both = b.astype(np.uint64) << np.uint64(32) | a
    funnel = (both >> (a >> 7 & 31).astype(np.uint64)).astype(np.uint32)
    ones = [int(x).bit_count() for x in a]
    zeros = [32 - int(x).bit_length() for x in a >> (b & 31)]
    expected = [unsigned.astype(np.int32).view(np.uint32), signed.astype(np.int32).view(np.uint32),
                permuted, funnel, ones, zeros, a]
    for row, wanted in zip(out, expected, strict=True):
        assert np.array_equal(row, wanted)


def test_float_instructions(built, rng):
    values = rng.standard_normal(2000) * np.exp(rng.uniform(-25, 15, 2000))
    special = [0.0, -0.0, 0.5, 1.5, 2.5, 65519.9, 65520.0, 2**-24, 2**-25, 6e-5, np.inf, -np.inf]
    given = np.concatenate([values, special]).astype(np.float32)
    n = len(given)
    halves, floats = np.zeros((3, n), np.uint16), np.zeros((7, n), np.float32)
    run(built, "floats_kernel", given, halves, floats, ctypes.c_int32(n),
        grid=((n + 255) // 256, 1, 1), block=256)
    with np.errstate(all="ignore"):
        half = given.astype(np.float16)
        bits = given.view(np.uint32).astype(np.uint64)
        nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        assert np.array_equal(halves[0], half.view(np.uint16))
        assert np.array_equal(halves[1], nearest)
        assert np.array_equal(halves[2], halves[0])
        assert np.array_equal(floats[0], half.astype(np.float32))
        assert np.array_equal(floats[1].view(np.uint32), nearest.astype(np.uint32) << 16)
        powers = np.exp2(given)
        powers[powers < 2.0**-126] = 0
        np.testing.assert_allclose(floats[2], powers, rtol=3e-7)
        np.testing.assert_allclose(floats[3], 1 / given, rtol=3e-7)
        np.testing.assert_allclose(floats[4], 1 / np.sqrt(np.abs(given)), rtol=3e-7)
        rounded = np.rint(given.astype(np.float64)).clip(-(2**31), 2**31 - 1).astype(np.float32)
        assert np.array_equal(floats[5], rounded)
        np.testing.assert_allclose(floats[6], given * given + 1 + 1, rtol=3e-7)


def test_half_pairs_round_once(built, rng):
    a, b, c = (rng.standard_normal(1000).astype(np.float16) for _ in range(3))
    out = np.zeros((4, 1000), dtype=np.float16)
    run(built, "halves_kernel", a, b, c, out, ctypes.c_int32(500), grid=(2, 1, 1), block=256)
    wide = [x.astype(np.float64) for x in (a, b, c)]
    exact = [wide[0] * wide[1] + wide[2], wide[0] + wide[1], wide[0] - wide[1], wide[0] * wide[1]]
    for row, wanted in zip(out, exact, strict=True):
        assert np.array_equal(row, wanted.astype(np.float16))


def test_an_exchange_between_lanes_costs_one_switch_a_thread(launcher):
    given = np.ones(1024, dtype=np.float32)
    out = np.zeros_like(given)
    rounds, exchanges = 40, 5
    before = launcher.switches()
    run(launcher, "mean_kernel", given, out, ctypes.c_int32(rounds), block=1024)
    switches = launcher.switches() - before
    assert (out == 1).all()
    # A sum over a warp is five exchanges. Every thread ends with one more switch. A shuffled
    # order saves a switch where it draws the thread that runs already.
    most = 1024 * (rounds * exchanges + 1)
    assert most * 0.99 < switches <= most


@pytest.mark.skipif(sanitized() or not runtimes(), reason="needs gcc's sanitizers")
def test_sound_kernels_pass_under_sanitizers():
    result = run_sanitized(__file__, "-k", "not sanitizers")
    assert result.returncode == 0, result.stdout
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 20
