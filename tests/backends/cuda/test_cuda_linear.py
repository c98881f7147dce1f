"""CUDA matrix products against their definitions, emulated, and on a card where there is one.

As for the CPU's kernels: with the exact value of what the kernels define (activations in 15
bits), within float32's summation error; with the unquantised product, within what 15 bits
cost; and with themselves: a row's result is the same bits whatever rows go with it.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from exl_loader.backends.cuda import layout, linear
from exl_loader.backends.cuda.launcher import COUNTER_BYTES
from exl_loader.backends.cuda.linear import PASS_ROWS, linear_scratch_bytes
from exl_loader.backends.cuda.moe import ExpertLayers, MoeOps, expert_table_shape
from exl_loader.backends.cuda.pack import dequantize
from support.cuda_emulation.launcher import sanitized
from support.cuda_emulation.sanitized import run_sanitized, runtimes
from support.cuda_linear_cases import (
    linear_ops,
    product,
    quantised_product,
    scratch_for,
    stream_linear,
)
from support.kernel_cases import random_rows
from support.targets import EMULATED, TARGETS, emulated_launcher, target

ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 32, 33, 40, 130]
HALF_ULP = 2.0**-24

LAYOUTS = {
    **{f"{bits}bit": [(bits, 128), (bits, 128)] for bits in (2, 3, 4, 5, 6, 8)},
    "groups of 32": [(4, 32)] * 5,
    "falling widths": [(8, 32), (6, 64), (5, 128), (4, 160), (3, 64), (2, 32)],
    "ragged last group": [(6, 64), (4, 100)],
    "one long group": [(4, 1000)],
    "several windows a split": [(3, 2048), (2, 512)],
    "tiny": [(8, 5)],
}


@pytest.fixture(params=TARGETS)
def ops(request):
    return target(request.param, linear_ops)


@pytest.fixture
def emulated():
    return target("forward", linear_ops)


def assert_exact(ops, x, w):
    """Compare with the definition.

    A term is rounded as scale * x_scale, as the integer turned into a float32, and in each of
    the sums after it; every rounding is at most half an ulp of the magnitudes' sum.
    """
    exact, magnitude = quantised_product(x, w)
    spans = layout.row_blocks_for(w.in_features) + len(w.groups)
    bound = (spans + layout.MAX_ROW_SPLITS + 3) * HALF_ULP * magnitude + 1e-30
    difference = np.abs(product(ops, x, w).double().numpy() - exact)
    assert (difference <= bound).all(), (difference / bound).max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", ROWS)
def test_quantised_product_equals_its_definition(ops, layout, rows):
    plain = stream_linear(LAYOUTS[layout], 50)
    assert_exact(ops, random_rows(rows, plain.in_features), plain)
    full = stream_linear(LAYOUTS[layout], 80, zeros=True, perm=True, bias=True, seed=rows)
    assert_exact(ops, random_rows(rows, full.in_features), full)


@pytest.mark.parametrize("warps_wanted", [1, 3, 10000])
@pytest.mark.parametrize("zeros", [False, True])
def test_any_number_of_row_splits(ops, monkeypatch, warps_wanted, zeros):
    """One warp reads everything; several tiles share a block; the most row_splits."""
    monkeypatch.setattr(layout, "_WARPS_WANTED", warps_wanted)
    layouts = [[(8, 96), (6, 64), (5, 2016), (4, 1024), (3, 480), (2, 96)], [(4, 32)] * 40]
    for groups in [*layouts, [(8, 1111)]]:
        w = stream_linear(groups, 100, zeros=zeros, seed=warps_wanted)
        for rows in (1, 7, 12, 35):
            assert_exact(ops, random_rows(rows, w.in_features), w)


@pytest.mark.parametrize("out_features", [1, 31, 32, 33, 64, 129, 300])
def test_every_number_of_columns(ops, out_features):
    w = stream_linear([(4, 64)], out_features, bias=True)
    for rows in (1, 6, 40):
        assert_exact(ops, random_rows(rows, 64), w)
        product(ops, random_rows(rows, 64), w, columns=3)


def test_fresh_data(ops):
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    rng = np.random.default_rng(seed)
    widths = np.sort(rng.choice([2, 3, 4, 5, 6, 8], size=6))[::-1]
    groups = [(int(b), int(rng.choice([32, 64, 96, 128]))) for b in widths]
    groups.append((int(widths[-1]), int(rng.integers(1, 128))))
    w = stream_linear(groups, int(rng.integers(1, 300)), seed=seed, zeros=True, perm=True)
    assert_exact(ops, random_rows(int(rng.integers(1, 90)), w.in_features, seed), w)


@pytest.mark.parametrize("rows", [3, 40])
def test_quantised_activations_lose_little_accuracy(ops, rows):
    # As for the CPU's kernels, 15 bits lose 5e-5. GPTQ's weights are not rounded otherwise. EXL2's
    # are rounded to float16 by definition, which the exact product leaves out.
    x = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(5))
    for zeros, bound in ((True, 7e-5), (False, 5e-4)):
        w = stream_linear([(4, 128)] * 8, 200, perm=True, zeros=zeros)
        exact = x.double() @ dequantize(w).double()
        assert (product(ops, x, w) - exact).norm() / exact.norm() < bound


@pytest.mark.parametrize("rows", [3, 40])
def test_add(ops, rows):
    w = stream_linear([(5, 96)], 40, bias=True)
    x, before = random_rows(rows, 96), random_rows(rows, 40, seed=9)
    assert torch.equal(product(ops, x, w, add_to=before), before + product(ops, x, w))


def test_no_rows(emulated):
    w = stream_linear([(4, 64)], 32)
    assert product(emulated, torch.empty(0, 64), w).shape == (0, 32)


def test_rows_do_not_depend_on_other_rows(ops):
    w = stream_linear([(8, 64), (5, 128), (3, 320), (2, 40)], 140, zeros=True, perm=True)
    x = random_rows(130, w.in_features)
    whole = product(ops, x, w)
    for first, end in ((0, 1), (7, 9), (20, 28), (30, 39), (60, 100), (64, 130), (3, 35)):
        assert torch.equal(product(ops, x[first:end].clone(), w), whole[first:end])


def test_both_sizes_of_prefill_give_the_same_bits(emulated, monkeypatch):
    w = stream_linear([(8, 64), (5, 128), (3, 320)], 140, zeros=True, perm=True)
    x, results = random_rows(70, w.in_features), []
    for multiprocessors in (1, 1000):
        monkeypatch.setattr(emulated_launcher(), "multiprocessors", multiprocessors)
        results.append(product(emulated, x, w))
    assert torch.equal(*results)


@pytest.mark.parametrize("kilobytes", [64, 100, 227])
def test_cards_with_more_shared_memory_give_the_same_bits(emulated, monkeypatch, kilobytes):
    """Rings of both depths, with a row that fits beside them and one that does not."""
    groups = [(8, 160), (6, 1024), (5, 896), (4, 2048), (3, 512), (2, 64)]
    w = stream_linear(groups, 70, zeros=True, perm=True)
    x = random_rows(20, w.in_features)
    whole = product(emulated, x, w)
    launcher = emulated_launcher()
    monkeypatch.setattr(launcher, "shared_limit_bytes", kilobytes << 10)
    started = launched_kernels(monkeypatch, launcher)
    for rows in (1, 3, 7, 16, 20):
        assert torch.equal(product(emulated, x[:rows].clone(), w), whole[:rows])
    assert {f"linear_decode_{n}_kernel" for n in (4, 8)} <= started.keys()
    assert ("linear_decode_1_kernel" in started) == (kilobytes > 64)
    threads, shared_bytes = started["linear_decode_8_kernel"]
    assert shared_bytes == threads // 32 * (8192 if kilobytes == 227 else 4096)


def launched_kernels(monkeypatch, launcher):
    """Return threads and shared memory of a block of the kernels prepared from now on, by name."""
    names, prepare = {}, launcher.prepare

    def noting(name, grid, block, shared_bytes, *arguments):
        names[name] = block, shared_bytes
        return prepare(name, grid, block, shared_bytes, *arguments)

    monkeypatch.setattr(launcher, "prepare", noting)
    return names


def test_blocks_that_make_a_row_are_large_if_there_are_many(emulated, monkeypatch):
    w, launcher = stream_linear([(4, 640)], 300, perm=True), emulated_launcher()
    x, results = random_rows(1, 640), []
    monkeypatch.setattr(launcher, "shared_limit_bytes", 100 << 10)
    for multiprocessors, threads in ((1, 512), (4, 256)):
        monkeypatch.setattr(launcher, "multiprocessors", multiprocessors)
        started = launched_kernels(monkeypatch, launcher)
        results.append(product(emulated, x, w))
        assert [block for block, _ in started.values()] == [threads]
    assert torch.equal(*results)


def test_more_rows_than_scratch_holds(emulated, monkeypatch):
    w, x = stream_linear([(5, 96)], 40, perm=True), random_rows(100, 96)
    whole = product(emulated, x, w)
    monkeypatch.setattr(linear, "PASS_ROWS", 37)
    assert torch.equal(product(emulated, x, w), whole)


@pytest.mark.parametrize("order", EMULATED)
@pytest.mark.parametrize("rows", [1, 20, 50])
def test_layers_of_one_input_share_a_launch(monkeypatch, order, rows):
    ops = target(order, linear_ops).ops
    layers = [stream_linear([(4, 128), (3, 300)], 96, seed=1, bias=True),
              stream_linear([(5, 64), (2, 364)], 200, seed=2)]
    monkeypatch.setattr(layout, "_WARPS_WANTED", 2)
    layers.append(stream_linear([(6, 428)], 40, seed=3))
    x = random_rows(rows, 428)
    outs = [torch.full((rows, w.out_features + 3), 7.0) for w in layers]
    scratch = scratch_for(rows, layers[0])
    ops.linears(x, layers, [out[:, :-3] for out in outs], scratch)
    for w, out in zip(layers, outs, strict=True):
        assert (out[:, -3:] == 7.0).all()
        assert torch.equal(out[:, :-3], product(target(order, linear_ops), x, w))


FUSED_GROUPS = [(4, 128), (3, 416)]


@pytest.mark.parametrize("order", EMULATED)
@pytest.mark.parametrize("warps_wanted", [1, 10000])
@pytest.mark.parametrize("perm", [True, False])
def test_norm_and_products_of_a_row_in_one_launch(monkeypatch, order, warps_wanted, perm):
    monkeypatch.setattr(layout, "_WARPS_WANTED", warps_wanted)
    launcher = target(order, linear_ops).ops.launcher
    ops, rows = linear_ops(launcher), MoeOps(launcher)
    layers = [stream_linear(FUSED_GROUPS, n, seed=n, perm=perm) for n in (96, 40)]
    layers[1].perm = layers[0].perm
    x, weight = random_rows(1, 544), random_rows(1, 544, seed=3)[0]
    normed, fused = torch.empty(1, 544), torch.empty(1, 544)
    rows.rms_norm(x, weight, 1e-6, normed)
    expected, outs = ([torch.full((1, w.out_features), 2.0) for w in layers] for _ in range(2))
    scratch = scratch_for(1, layers[0])
    ops.linears(normed, layers, expected, scratch, True)
    assert ops.normed_linears(x, weight, 1e-6, fused, layers, outs, True)
    assert torch.equal(fused, normed)
    assert all(map(torch.equal, outs, expected))


@pytest.mark.parametrize("order", EMULATED)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_gate_and_product_of_a_row_in_one_launch(order, activation):
    launcher = target(order, linear_ops).ops.launcher
    ops, rows = linear_ops(launcher), MoeOps(launcher)
    w = stream_linear(FUSED_GROUPS, 96, perm=True, bias=True)
    gate, up, gated = random_rows(1, 544), random_rows(1, 544, seed=3), torch.empty(1, 544)
    rows.gate(gate, up, activation, gated)
    expected, out = torch.full((1, 96), 2.0), torch.full((1, 96), 2.0)
    scratch = scratch_for(1, w)
    ops.linear(gated, w, expected, scratch, True)
    assert ops.gated_linear(gate, up, activation, w, out, True)
    assert torch.equal(out, expected)


def test_calls_that_cannot_be_one_launch_launch_nothing(monkeypatch):
    launcher = emulated_launcher()
    ops = linear_ops(launcher)
    narrow, wide = stream_linear([(4, 512)], 32), stream_linear(FUSED_GROUPS, 32)
    out, one, two = torch.empty(2, 32), torch.ones(1, 544), torch.ones(2, 544)
    h, small = torch.empty(2, 544), torch.ones(1, 512)
    before = out.fill_(7.0).clone()
    normed = h[:1, :512].clone()
    assert not ops.normed_linears(small, small[0], 1e-6, normed, [narrow], [out[:1]])
    assert not ops.normed_linears(two, two[0], 1e-6, h, [wide], [out])
    assert not ops.normed_linears(one, two[0], 1e-6, one, [wide], [out[:1]])
    assert not ops.gated_linear(two, two, "silu", wide, out)
    assert torch.equal(out, before)
    assert ops.gated_linear(one, one, "silu", wide, out[:1])
    monkeypatch.setattr(launcher, "shared_limit_bytes", 33 << 10)
    assert not ops.gated_linear(one, one, "silu", wide, out[:1])


@pytest.mark.parametrize("order", EMULATED)
@pytest.mark.parametrize("share", [True, False])
def test_experts_chosen_on_the_device(order, share):
    ops = MoeOps(target(order, linear_ops).ops.launcher)
    experts = [stream_linear(groups, 72, seed=seed, perm=seed != 1, zeros=seed == 2)
               for seed, groups in enumerate([[(4, 200)], [(5, 128), (3, 72)], [(2, 200)]])]
    for w in experts[:2]:
        w.bias = torch.randn(72)
    table = torch.empty(expert_table_shape(1, 3)[2], dtype=torch.uint8)
    layers = ExpertLayers(experts, table)
    chosen = torch.tensor([[2, 0], [1, 2], [0, 1], [1, 1]], dtype=torch.int32)
    x = random_rows(4 if share else 8, 200)
    out, scratch = torch.empty(8, 72), scratch_for(8, experts[0])
    ops.linear_pairs(x, layers, chosen, out, scratch)
    for pair, expert in enumerate(chosen.flatten().tolist()):
        row = pair // 2 if share else pair
        single = product(target(order, linear_ops), x[row : row + 1].clone(), experts[expert])
        assert torch.equal(out[pair], single[0])


def test_faulty_activations_show_in_their_own_row_only(ops):
    w = stream_linear([(4, 128), (4, 128)], 32)
    x = random_rows(40, 256)
    whole = product(ops, x, w)
    x[3, 200], x[11, 5], x[12, 6] = float("nan"), float("inf"), float("-inf")
    for rows in (slice(0, 40), slice(3, 4), slice(11, 13)):
        out = product(ops, x[rows].clone(), w)
        bad = ~x[rows].isfinite().all(dim=1)
        assert out[bad].isnan().all() and torch.equal(out[~bad], whole[rows][~bad])


def test_zero_and_tiny_activations(ops):
    w = stream_linear([(4, 128), (4, 128)], 32)
    x = torch.zeros(4, 256)
    x[1, :128], x[2, 3], x[3, 200] = 1e-38, 1e-30, 3e38
    out = product(ops, x, w)
    assert (out[:2] == 0).all() and out[2].isfinite().all()
    assert_exact(ops, x[:3].clone(), w)


def test_scratch_that_is_too_short_is_refused(emulated):
    w, out = stream_linear([(4, 256)], 32), torch.empty(8, 32)
    short = scratch_for(8, w)[:-1]
    with pytest.raises(AssertionError):
        emulated.linear(random_rows(8, 256), w, out, short)


def test_counters_in_scratch_are_left_alone(emulated):
    w = stream_linear([(4, 256)], 32)
    for rows in (1, 40):
        scratch = scratch_for(rows, w)
        emulated.linear(random_rows(rows, 256), w, torch.empty(rows, 32), scratch)
        assert (scratch[:COUNTER_BYTES] == 0x7B).all()


def test_scratch_grows_with_rows_and_stops():
    sizes = [linear_scratch_bytes(rows, 4096) for rows in (1, 8, 256, PASS_ROWS, 9999)]
    assert sizes == sorted(sizes) and sizes[-1] == sizes[-2]
    assert linear_scratch_bytes(1, 4096) == COUNTER_BYTES + 128 * 64 + 32 * 32


MORE_SANITIZED = ("test_cuda_dense.py", "test_cuda_pack.py")


@pytest.mark.slow
@pytest.mark.skipif(sanitized() or not runtimes(), reason="needs gcc's sanitizers")
def test_nothing_is_read_or_written_out_of_bounds():
    """The kernels under AddressSanitizer and UBSan, packing included."""
    chosen = "shuffled or splits or share or launch or chosen or columns or kernel_is"
    result = run_sanitized(
        __file__, *(str(Path(__file__).with_name(name)) for name in MORE_SANITIZED), "-k",
        f"({chosen}) and not forward and not gpu", "-m", "not slow",
    )
    assert result.returncode == 0, result.stdout[-4000:]
