"""CUDA operations on rows: fused launches, mutations, and sanitizers.

What every backend's operations have in common is in operations/test_elementwise.py,
test_layer_norm.py and test_moe_route.py.
"""

from __future__ import annotations

import pytest
import torch

from backends.operations import test_elementwise as common
from backends.operations import test_layer_norm as layer_norm
from backends.operations import test_moe_route as moe_route
from exl_loader.backends.cpu_access import InPlaceAccess
from exl_loader.backends.cuda.launcher import KernelOps
from exl_loader.backends.cuda.moe import MoeOps
from exl_loader.backends.cuda.ops import CudaOps
from exl_loader.backends.recorder import Recorder
from support.cache_layers import make_batch, make_layer
from support.cuda_emulation.mutation import assert_noticed, built_from
from support.cuda_emulation.sanitized import compiles_all, run_sanitized, runtimes
from support.exhaustive import some_of
from support.kernel_cases import random_rows
from support.targets import TARGETS, Target, target


@pytest.fixture(params=TARGETS)
def ops(request):
    return target(request.param, lambda launcher: CudaOps(launcher, InPlaceAccess()))


@pytest.mark.parametrize("cache_type", ["fp32", "fp16", "q4"])
@pytest.mark.parametrize(("head_dim", "heads"), [(16, 5), (80, 5), (128, 1), (256, 9)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("less_mean", [False, True])
def test_norms_rope_and_cache_in_one_launch(ops, cache_type, head_dim, heads, normed, interleaved,
                                            less_mean):
    """Norms, RoPE and writing in one launch give the bits of separate launches."""
    batch = make_batch([5, 254], [3, 4])
    table = random_rows(7, head_dim - 8).reshape(7, 2, head_dim // 2 - 4)
    q = random_rows(7, heads * head_dim).reshape(7, heads, head_dim)
    k, v = (random_rows(7, 2 * head_dim, seed=s).reshape(7, 2, head_dim) for s in (3, 6))
    weights = [random_rows(1, head_dim, seed=s)[0] if normed else None for s in (4, 5)]
    mean = random_rows(2, head_dim, seed=7) if less_mean else None
    apart, at_once = (make_layer(cache_type, 3, 2, head_dim) for _ in range(2))
    turned = [q.clone(), k.clone()]
    for x, weight in zip(turned, weights, strict=True):
        if weight is not None:
            rows = x.view(-1, head_dim)
            ops.rms_norm(rows, weight, 1e-6, rows)
        ops.rope(x, table, interleaved, mean if x is turned[1] else None)
    ops.write_cache(turned[1], v, apart, batch, torch.empty(0))
    ops.rope_write_cache(q, k, v, table, at_once, batch, *weights, 1e-6, interleaved, mean)
    assert torch.equal(q, turned[0])
    for name in ("k_codes", "k_scales", "v_codes", "v_scales"):
        a, b = getattr(apart, name), getattr(at_once, name)
        assert a is b is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("norm", "launches"), [("none", 1), ("head", 1), ("projection", 3)])
def test_a_recorded_step_fuses_norms_of_heads_only(norm, launches, interleaved):
    """A norm over a token's whole projection starts at the same address as one of its heads."""
    ops = target("forward", lambda launcher: CudaOps(launcher, InPlaceAccess())).ops
    heads, head_dim, batch = 3, 32, make_batch([2], [2])
    q, k, v = (random_rows(2, heads * head_dim, seed) for seed in (1, 2, 3))
    size = heads * head_dim if norm == "projection" else head_dim
    weights = [random_rows(1, size, seed)[0] for seed in (4, 5)]
    mean = random_rows(heads, head_dim, 6)
    table, layers = random_rows(2, 32).view(2, 2, 16), []
    for run_at_once in (True, False):
        step, layer = Recorder(), make_layer("fp32", 2, heads, head_dim)
        turned = [q.clone(), k.clone()]
        for x, weight in zip(turned, weights, strict=True):
            if norm != "none":
                rows = x.view(-1, size)
                step.rms_norm(rows, weight, 1e-6, rows)
        queries, keys, values = (x.view(2, heads, head_dim) for x in (*turned, v))
        step.rope(queries, table, interleaved)
        step.rope(keys, table, interleaved, mean)
        step.write_cache(keys, values, layer, batch, torch.empty(0))
        if run_at_once:
            prepared = ops.prepare(step.calls)
            assert len(prepared) == launches
            for launch in prepared:
                launch()
        else:
            for call in step.calls:
                call.run(ops)
        layers.append([x.view(torch.int32) for x in (queries, layer.k_codes, layer.v_codes)])
    assert all(map(torch.equal, *layers))


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
    ("row_functions.cuh", "x[b] = fmaf", "x[half] = fmaf"),
    ("row_functions.cuh", "step = interleaved ? 2 : 1", "step = 1"),
    ("row_functions.cuh", "relu * relu : relu", "relu : relu * relu"),
    ("row_functions.cuh", "if (activation == kQuickGelu)", "if (activation == kRelu)"),
    ("norm.cu", "(x - shift) - remainder", "x - shift"),
    ("norm.cu", "fmaf(deviation, deviation, part)", "fmaf(x[i], x[i], part)"),
    ("norm.cu", "partials + sum * (kRowThreads / 32)", "partials"),
    ("norm.cu", "add_rn(result, bias[i])", "result"),
    ("rope.cu", "const float* cos = table + row * 2 * half;", "const float* cos = table;"),
    ("rows.cu", "id / lanes * lanes * size + id % lanes", "id / lanes * lanes * size + id"),
    ("rows.cu", "const int64_t source = rows[blockIdx.x];", "const int64_t source = blockIdx.x;"),
    ("rows.cu", "fmaf(weights[blockIdx.x], value, *target)", "weights[blockIdx.x] * value"),
    ("moe.cu", "b.value && a.expert < b.expert", "b.value && a.expert > b.expert"),
    ("moe.cu", "e < call.experts; e += 32) total", "e < 32; e += 32) total"),
    ("moe.cu", "    warp_sync();  // what lane 0 wrote is read below\n", ""),
    ("moe.cu", "experts[k] > last && experts[k] < lowest", "experts[k] > last"),
    ("moe.cu", "undivided(expert) / total + correction", "undivided(expert) + correction"),
    ("moe.cu", "if (correction == nullptr) return logits[expert];",
     "if (correction == nullptr) return undivided(expert);"),
    ("moe.cu", "mul_rn(weights[k] / divisor, call.factor)", "weights[k] / divisor"),
    ("rows.cu", "expf(-logits[blockIdx.x])", "expf(-logits[0])"),
    ("elementwise.cu", "fmaf(y[i], factor, x[i])", "fmaf(y[0], factor, x[i])"),
    ("elementwise.cu", "if (x[i] < -limit) x[i] = -limit;", ""),
    ("elementwise.cu", "out[i] = exl::activated(x[i], activation)", "out[i] = x[i]"),
    ("elementwise.cu", "if (i < elements) out[i] = exl::gated(gate",
     "if (i + 1 < elements) out[i] = exl::gated(gate"),
    ("row_functions.cuh", "if (gate > kSwigluLimit) gate = kSwigluLimit;", ""),
    ("row_functions.cuh", "if (up < -kSwigluLimit) up = -kSwigluLimit;", ""),
    ("row_functions.cuh", "add_rn(up, 1.0f)", "up"),
]  # fmt: skip


def everything(ops):
    """Run every kernel of this file once."""
    common.test_embed(ops, torch.float16, 70)
    for size in (33, 1300):
        common.test_rms_norm(ops, size)
    for size in (33, 1300):
        layer_norm.test_layer_norm(ops, size, True)
        layer_norm.test_heads_have_weights_of_their_own(ops, 3, size)
        layer_norm.test_a_mean_far_above_the_deviations(ops, size)
    for interleaved in (False, True):
        common.test_rope(ops, 40, interleaved)
    for turn in range(8):
        common.test_angles_of_every_quarter_turn(ops, turn)
    for activation in common.GATES:
        common.test_gate(ops, activation, 31)
    for activation in common.ACTIVATIONS:
        common.test_activate(ops, activation, 31)
    common.test_clamped_swiglu_clamps_the_gate_above_and_the_other_factor_on_both_sides(ops)
    common.test_add_and_softcap(ops, 31)
    common.test_add_with_a_factor(ops, 31)
    common.test_clamp(ops, 31)
    common.test_add_gated_rows(ops, 31)
    for score in ("softmax", "sigmoid"):
        for normalize in (False, True):
            moe_route.test_moe_route(ops, score, normalize, 64, 8)
        moe_route.test_scores_and_correction_are_added(ops, score)
        moe_route.test_equal_sums_choose_the_lower_expert(ops, score)
    test_the_sum_of_experts_equals_adding_one_after_the_other(ops)
    common.test_gather_and_scatter(ops)


@pytest.mark.slow
@pytest.mark.parametrize("change", some_of([None, *MUTATIONS], 8),
                         ids=lambda change: change[1][:40] if change else "none")
def test_a_mistake_in_a_kernel_is_noticed(tmp_path, change):
    launcher = built_from(tmp_path, ("norm", "rope", "elementwise", "rows", "moe"), change)
    assert_noticed(launcher, change is not None, lambda it: everything(Target(MoeOps(it), None)))


@pytest.mark.slow
@pytest.mark.skipif(not runtimes(), reason="needs gcc's sanitizers")
@compiles_all
def test_under_sanitizers():
    files = (__file__, common.__file__, layer_norm.__file__, moe_route.__file__)
    result = run_sanitized(*files, "-k", "forward", "-m", "not slow and not gpu")
    assert result.returncode == 0, result.stdout[-4000:]
