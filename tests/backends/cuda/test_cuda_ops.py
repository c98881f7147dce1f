"""The small CUDA operations against the reference, which computes in float64.

The kernels' own code runs, on the CPU by emulation and on a card where there is one. Sizes are
below, at and above a warp and a block.
"""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from exl_loader.backends.cpu_access import InPlaceAccess
from exl_loader.backends.cuda.launcher import KernelOps
from exl_loader.backends.cuda.moe import MoeOps
from exl_loader.backends.cuda.ops import CudaOps
from support.cache_layers import make_batch, make_layer
from support.cuda_emulation import EmulatedLauncher
from support.cuda_emulation.launcher import FOLDER, REPO, emulation_spec
from support.cuda_emulation.sanitized import run_sanitized, runtimes
from support.cuda_targets import TARGETS, Target, target
from support.elementwise_cases import (
    REFERENCE,
    ULP,
    assert_close,
    check_add_and_softcap,
    check_gate_at_the_extremes,
    check_moe_route_survives_nan,
)
from support.exhaustive import some_of
from support.kernel_cases import dense_linear, random_rows

SIZES = [1, 31, 32, 33, 100, 512, 513, 1300]


@pytest.fixture(params=TARGETS)
def ops(request):
    return target(request.param, MoeOps)


@pytest.fixture(params=TARGETS)
def all_ops(request):
    return target(request.param, lambda launcher: CudaOps(launcher, InPlaceAccess()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [70, 256, 300])
def test_embed(ops, dtype, size):
    ids = torch.tensor([3, 0, 49, 17, 3], dtype=torch.int32)
    for table in (random_rows(50, size).to(dtype), dense_linear(size, 50, dtype)):
        out, expected = torch.empty(5, size), torch.empty(5, size)
        ops.embed(ids, table, 1.5, out)
        REFERENCE.embed(ids, table, 1.5, expected)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(ops, size):
    x, weight = random_rows(9, size), random_rows(1, size, seed=2)[0]
    out, expected = torch.empty_like(x), torch.empty_like(x)
    ops.rms_norm(x, weight, 1e-5, out)
    REFERENCE.rms_norm(x, weight, 1e-5, expected)
    assert_close(out, expected, ulps=6 + size / 128)
    alone = torch.empty(1, size)
    ops.rms_norm(x[5:6], weight, 1e-5, alone)
    assert torch.equal(alone[0], out[5])
    ops.rms_norm(x, weight, 1e-5, x)
    assert torch.equal(x, out)


@pytest.mark.parametrize("half", [4, 32, 40, 64])
def test_rope(ops, half):
    positions = torch.tensor([0, 1, 4095, 131071, 999_999, 2**31 - 1], dtype=torch.int32)
    inv_freq = (10000.0 ** (-torch.arange(half) / half)).float()
    table, expected = torch.empty(6, 2, half), torch.empty(6, 2, half)
    ops.rope_table(positions, inv_freq, 1.25, table)
    REFERENCE.rope_table(positions, inv_freq, 1.25, expected)
    assert_close(table, expected, ulps=2, atol=ULP)
    for head_dim in (2 * half, 2 * half + 24):
        x = random_rows(6, 3 * head_dim).reshape(6, 3, head_dim)
        rotated, reference = x.clone(), x.clone()
        ops.rope(rotated, expected)
        REFERENCE.rope(reference, expected)
        assert_close(rotated, reference, ulps=2, atol=4 * ULP * float(x.abs().max()))
        assert torch.equal(rotated[..., 2 * half :], x[..., 2 * half :])


@pytest.mark.parametrize("turn", range(8))
def test_angles_of_every_quarter_turn(ops, turn):
    """Positions that end in each quarter and at its borders, with both signs of both results."""
    angles = (turn * math.pi / 4 + torch.linspace(-0.02, 0.02, 65)).clamp(min=0).float()
    table, expected = torch.empty(1, 2, 65), torch.empty(1, 2, 65)
    ops.rope_table(torch.ones(1, dtype=torch.int32), angles, 1.0, table)
    REFERENCE.rope_table(torch.ones(1, dtype=torch.int32), angles, 1.0, expected)
    assert_close(table, expected, ulps=2, atol=ULP)


@pytest.mark.parametrize("cache_type", ["fp32", "fp16", "q4"])
@pytest.mark.parametrize(("head_dim", "heads"), [(16, 5), (80, 5), (128, 1), (256, 9)])
@pytest.mark.parametrize("normed", [False, True])
def test_norms_rope_and_cache_in_one_launch(all_ops, cache_type, head_dim, heads, normed):
    """Norms, RoPE and writing in one launch give the bits of separate launches."""
    batch = make_batch([5, 254], [3, 4])
    table = random_rows(7, head_dim - 8).reshape(7, 2, head_dim // 2 - 4)
    q = random_rows(7, heads * head_dim).reshape(7, heads, head_dim)
    k, v = (random_rows(7, 2 * head_dim, seed=s).reshape(7, 2, head_dim) for s in (3, 6))
    weights = [random_rows(1, head_dim, seed=s)[0] if normed else None for s in (4, 5)]
    apart, at_once = (make_layer(cache_type, 3, 2, head_dim) for _ in range(2))
    turned = [q.clone(), k.clone()]
    for x, weight in zip(turned, weights, strict=True):
        if weight is not None:
            rows = x.view(-1, head_dim)
            all_ops.rms_norm(rows, weight, 1e-6, rows)
        all_ops.rope(x, table)
    all_ops.write_cache(turned[1], v, apart, batch, torch.empty(0))
    all_ops.rope_write_cache(q, k, v, table, at_once, batch, *weights, 1e-6)
    assert torch.equal(q, turned[0])
    for name in ("k_codes", "k_scales", "v_codes", "v_scales"):
        a, b = getattr(apart, name), getattr(at_once, name)
        assert a is b is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("size", [1, 31, 257])
def test_gate(ops, activation, size):
    gate, up = random_rows(9, size) * 4, random_rows(9, size, seed=3)
    out, expected = torch.empty_like(gate), torch.empty_like(gate)
    ops.gate(gate, up, activation, out)
    REFERENCE.gate(gate, up, activation, expected)
    assert_close(out, expected, ulps=32, atol=1e-7)
    ops.gate(gate, up, activation, gate)
    assert torch.equal(gate, out)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_gate_at_the_extremes(ops, activation):
    check_gate_at_the_extremes(ops, activation)


@pytest.mark.parametrize("size", [1, 31, 257])
def test_add_and_softcap(ops, size):
    check_add_and_softcap(ops, size)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (64, 8), (33, 33), (3, 3), (1, 1)])
def test_moe_route(ops, normalize, num_experts, top_k):
    logits = random_rows(10, num_experts) * 3
    logits[0] = 1.0
    logits[1, num_experts // 2] = logits[1, 0]
    logits[2] += 1e4
    weights, experts = torch.empty(10, top_k), torch.empty(10, top_k, dtype=torch.int32)
    expected = torch.empty_like(weights), torch.empty_like(experts)
    ops.moe_route(logits, top_k, normalize, weights, experts)
    REFERENCE.moe_route(logits, top_k, normalize, *expected)
    assert torch.equal(experts, expected[1])
    # A logit 30 below the largest: the difference itself is rounded by 8 ulp.
    assert_close(weights, expected[0], ulps=20)


def test_moe_route_survives_nan(ops):
    check_moe_route_survives_nan(ops)


def test_the_sum_of_experts_equals_adding_one_after_the_other(ops):
    made, size = random_rows(4 * 3, 300), 300
    experts = torch.tensor([[5, 0, 2], [1, 7, 3], [0, 1, 2], [6, 4, 5]], dtype=torch.int32)
    weights = random_rows(4, 3, seed=6).abs()
    out, expected = random_rows(4, size, seed=7), random_rows(4, size, seed=7)
    for expert in range(8):
        rows, places = (experts == expert).nonzero(as_tuple=True)
        if len(rows):
            ops.scatter_add_rows(made[rows * 3 + places], rows.int(), weights[rows, places],
                                 expected)
    ops.moe_sum(made, weights, experts, out)
    assert torch.equal(out, expected)


def test_gather_and_scatter(ops):
    x, rows = random_rows(20, 270), torch.tensor([3, 19, 0, 7], dtype=torch.int32)
    out = torch.empty(4, 270)
    ops.gather_rows(x, rows, out)
    assert torch.equal(out, x[rows.long()])
    weights = torch.tensor([0.5, 2.0, -1.0, 0.25])
    target_rows = random_rows(20, 270, seed=8)
    expected = target_rows.clone()
    ops.scatter_add_rows(out, rows, weights, target_rows)
    REFERENCE.scatter_add_rows(out, rows, weights, expected)
    assert_close(target_rows, expected, ulps=1, atol=ULP * float(out.abs().max()) * 2)


def test_no_rows_need_no_launch(ops):
    empty = torch.empty(0, 40)
    ops.rms_norm(empty, torch.ones(40), 1e-5, empty)
    ops.add(empty, empty)
    ops.gather_rows(empty, torch.empty(0, dtype=torch.int32), empty)


def test_no_part_of_the_operations_overrides_another():
    """`CudaOps` inherits from several classes: one name in two of them would hide a method."""
    names = [
        name for cls in CudaOps.__mro__ if issubclass(cls, KernelOps) for name in vars(cls)
        if not name.startswith("__")
    ]
    assert len(names) == len(set(names))


# A file of csrc/cuda, text that it has once, and a mistake that replaces it.
MUTATIONS = [
    ("row_functions.cuh", "for (int i = thread; i < size;", "for (int i = thread + 1; i < size;"),
    ("row_functions.cuh", "sum_of_squares / static_cast<float>(size) + eps",
     "sum_of_squares + eps"),
    ("norm.cu", "    block_sync();  // partials are read by all\n", ""),
    ("norm.cu", "warp < static_cast<int>(blockDim.x) / 32", "warp < 15"),
    ("norm.cu", "(int i = lane_id(); i < size; i += 32)", "(int i = lane_id(); i < 32; i += 32)"),
    ("angles.cuh", "if (turns & 2)", "if (turns & 4)"),
    ("angles.cuh", "        cosine = -sine;", "        cosine = sine;"),
    ("row_functions.cuh", "mul_rn(first, sin[i])", "mul_rn(first, sin[0])"),
    ("row_functions.cuh", "x[half + i] = fmaf", "x[half] = fmaf"),
    ("rope.cu", "const float* cos = table + row * 2 * half;", "const float* cos = table;"),
    ("rows.cu", "id / lanes * lanes * size + id % lanes", "id / lanes * lanes * size + id"),
    ("rows.cu", "const int64_t source = rows[blockIdx.x];", "const int64_t source = blockIdx.x;"),
    ("rows.cu", "fmaf(weights[blockIdx.x], value, *target)", "weights[blockIdx.x] * value"),
    ("moe.cu", "b.logit && a.expert < b.expert", "b.logit && a.expert > b.expert"),
    ("moe.cu", "e < experts; e += 32) total", "e < 32; e += 32) total"),
    ("moe.cu", "    warp_sync();  // what lane 0 wrote is read below\n", ""),
    ("moe.cu", "experts[k] > last && experts[k] < lowest", "experts[k] > last"),
    ("elementwise.cu", "x[i] += y[i]", "x[i] += y[0]"),
    ("elementwise.cu", "if (i < elements) out[i]", "if (i + 1 < elements) out[i]"),
]  # fmt: skip


def everything(ops):
    """Run every kernel of this file once."""
    test_embed(ops, torch.float16, 70)
    for size in (33, 1300):
        test_rms_norm(ops, size)
    test_rope(ops, 40)
    for turn in range(8):
        test_angles_of_every_quarter_turn(ops, turn)
    test_gate(ops, "silu", 31)
    test_add_and_softcap(ops, 31)
    for normalize in (False, True):
        test_moe_route(ops, normalize, 64, 8)
    test_the_sum_of_experts_equals_adding_one_after_the_other(ops)
    test_gather_and_scatter(ops)


@pytest.mark.slow
@pytest.mark.parametrize("change", some_of([None, *MUTATIONS], 8),
                         ids=lambda change: change[1][:40] if change else "none")
def test_a_mistake_in_a_kernel_is_noticed(tmp_path, change):
    for name in ("csrc", FOLDER):
        shutil.copytree(REPO / name, tmp_path / name,
                        ignore=shutil.ignore_patterns("__pycache__", "cpu"))
    folder = tmp_path / "csrc" / "cuda"
    if change is not None:
        file, old, new = change
        text = (folder / file).read_text()
        assert text.count(old) == 1, (file, old)
        (folder / file).write_text(text.replace(old, new))
    sources = [folder / f"{name}.cu" for name in ("norm", "rope", "elementwise", "rows", "moe")]
    launcher = EmulatedLauncher(emulation_spec(sources, root=tmp_path))

    def run():
        for order, seed in (("forward", 0), ("reverse", 0), ("shuffled", 5)):
            launcher.set_order(order, seed)
            everything(Target(MoeOps(launcher), None))

    if change is None:
        run()
    else:
        with pytest.raises(Exception):  # noqa: B017, PT011 - a comparison, or the emulation's own
            run()


@pytest.mark.slow
@pytest.mark.skipif(not runtimes(), reason="needs gcc's sanitizers")
def test_under_sanitizers():
    result = run_sanitized(__file__, "-k", "forward", "-m", "not slow and not gpu")
    assert result.returncode == 0, result.stdout[-4000:]
