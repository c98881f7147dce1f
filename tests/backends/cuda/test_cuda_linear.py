"""What only CUDA has of quantised products: row splits, launches of several, and scratch.

What every backend's products have in common is in operations/test_linear.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from backends.operations import test_linear, test_linear_dense, test_pack
from exl_loader.backends.cuda import layout, linear, linear_dense
from exl_loader.backends.cuda.launcher import COUNTER_BYTES
from exl_loader.backends.cuda.linear import PASS_ROWS, linear_scratch_bytes
from exl_loader.backends.cuda.moe import ExpertLayers, MoeOps, expert_table_shape
from exl_loader.backends.kernel_structs import GATES
from exl_loader.backends.layouts import DenseLinear
from support.cuda_emulation import EmulatedLauncher
from support.cuda_emulation.launcher import FOLDER, REPO, emulation_spec, sanitized
from support.cuda_emulation.sanitized import compiles_all, run_sanitized, runtimes
from support.kernel_cases import dense_linear, random_rows
from support.linear_cases import (
    assert_exact,
    linear_ops,
    product,
    scratch_for,
    stream_linear,
)
from support.targets import EMULATED, TARGETS, Target, emulated_launcher, target


@pytest.fixture(params=TARGETS)
def ops(request):
    return target(request.param, linear_ops)


@pytest.fixture
def emulated():
    return target("forward", linear_ops)


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
@pytest.mark.parametrize("activation", GATES)
def test_gate_and_product_of_a_row_in_one_launch(order, activation):
    launcher = target(order, linear_ops).ops.launcher
    ops, rows = linear_ops(launcher), MoeOps(launcher)
    w = stream_linear(FUSED_GROUPS, 96, perm=True, bias=True)
    gate, up, gated = random_rows(1, 544) * 4, random_rows(1, 544, seed=3) * 4, torch.empty(1, 544)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_more_rows_than_a_pass_takes(emulated, monkeypatch, dtype):
    w, x = dense_linear(96, 40, dtype), random_rows(150, 96)
    whole = product(emulated, x, w)
    monkeypatch.setattr(linear_dense, "PASS_ROWS", 67)
    assert torch.equal(product(emulated, x, w), whole)


def test_blocks_of_any_number_of_warps_give_the_same_bits(emulated, monkeypatch):
    """4, 8 and 16 warps: parts in one round and in several, the last one short."""
    w, launcher = dense_linear(256 * 10 + 40, 20, torch.float16), emulated_launcher()
    x, results = random_rows(3, w.in_features), []
    monkeypatch.setattr(launcher, "shared_limit_bytes", 227 << 10)
    for multiprocessors, smallest in ((1000, 4), (1, 8), (1, 4)):
        monkeypatch.setattr(launcher, "multiprocessors", multiprocessors)
        monkeypatch.setattr(linear_dense, "_DECODE_WARPS", (smallest,))
        results.append(product(emulated, x, w))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.slow
def test_bfloat16_without_tensor_cores(tmp_path):
    """Compute capability 7.5 multiplies by fma in every type but float16."""
    shutil.copytree(REPO / "csrc", tmp_path / "csrc")
    shutil.copytree(REPO / FOLDER, tmp_path / FOLDER)
    names = tmp_path / FOLDER / "platform_names.h"
    text, has = names.read_text(), "constexpr bool kHasBf16Mma = "
    assert f"{has}true" in text
    names.write_text(text.replace(f"{has}true", f"{has}false"))
    sources = sorted((tmp_path / "csrc" / "cuda").glob("linear_dense_*.cu"))
    launcher = EmulatedLauncher(emulation_spec(sources, tmp_path), order="shuffled")
    ops = Target(linear_ops(launcher), None)
    for in_features, out_features in ((600, 50), (33, 160)):
        w = dense_linear(in_features, out_features, torch.bfloat16, bias=True)
        plain = DenseLinear(in_features, out_features, w.weight.float(), w.bias)
        x = random_rows(70, in_features)
        whole = product(ops, x, w)
        # The sums, and their order, are those of the same weights in float32.
        assert torch.equal(whole, product(ops, x, plain))
        assert torch.equal(product(ops, x[5:8].clone(), w), whole[5:8])


SANITIZED = (
    __file__, str(Path(__file__).with_name("test_cuda_pack.py")), test_linear.__file__,
    test_linear_dense.__file__, test_pack.__file__,
)


@pytest.mark.slow
@pytest.mark.skipif(sanitized() or not runtimes(), reason="needs gcc's sanitizers")
@compiles_all
def test_nothing_is_read_or_written_out_of_bounds():
    """The kernels under AddressSanitizer and UBSan, packing included."""
    chosen = "shuffled or splits or share or launch or chosen or columns"
    result = run_sanitized(
        *SANITIZED, "-k", f"({chosen}) and not forward and not gpu and not native", "-m",
        "not slow",
    )
    assert result.returncode == 0, result.stdout[-4000:]
