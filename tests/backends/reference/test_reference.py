"""The reference operations equal PyTorch's own functions, or a loop."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from exl_loader.backends.base import AttentionShape, Routing
from exl_loader.backends.kernel_structs import ACTIVATIONS
from exl_loader.backends.layouts import TILE_COLUMNS, DenseLinear
from exl_loader.backends.reference.ops import ReferenceOps, dense_weight
from support.cache_layers import make_batch, make_layer

OPS = ReferenceOps()
NO_SCRATCH = torch.empty(0, dtype=torch.uint8)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(weight, bias=None):
    """Return a layer with the weight [out_features, in_features] of a checkpoint."""
    out_features, in_features = weight.shape
    tiles = -(-out_features // TILE_COLUMNS)
    full = weight.new_zeros(tiles * TILE_COLUMNS, in_features)
    full[:out_features] = weight
    tiled = full.view(tiles, TILE_COLUMNS, in_features).transpose(1, 2).contiguous()
    return DenseLinear(in_features, out_features, tiled, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_embed_from_a_table_and_from_a_tied_head(dtype):
    table = randn(37, 20).to(dtype)
    ids = torch.tensor([0, 36, 15, 16, 36], dtype=torch.int32)
    expected = table[ids.long()].float() * 2.5
    for source in (table, dense(table)):
        out = torch.empty(5, 20)
        OPS.embed(ids, source, 2.5, out)
        assert torch.equal(out, expected)


def test_rms_norm_in_place():
    x, weight = randn(7, 50) * 30, randn(50, seed=1)
    expected = F.rms_norm(x, (50,), weight, 1e-5)
    OPS.rms_norm(x, weight, 1e-5, x)
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("has_bias", [True, False])
def test_layer_norm_in_place(has_bias):
    x, weight, bias = randn(7, 50) * 30, randn(1, 50, seed=1), randn(1, 50, seed=2)
    expected = F.layer_norm(x, (50,), weight[0], bias[0] if has_bias else None, 1e-5)
    OPS.layer_norm(x, weight, bias if has_bias else None, 1e-5, x)
    torch.testing.assert_close(x, expected)


def test_layer_norm_with_weights_of_each_head():
    x, weight, bias = randn(4, 3, 16), randn(3, 16, seed=1), randn(3, 16, seed=2)
    expected = F.layer_norm(x, (16,), eps=1e-5) * weight + bias
    out = torch.empty(12, 16)
    OPS.layer_norm(x.view(12, 16), weight, bias, 1e-5, out)
    torch.testing.assert_close(out.view(4, 3, 16), expected)


@pytest.mark.parametrize("out_features", [16, 37])
def test_linear_writes_its_columns_and_adds(out_features):
    weight, bias, x = randn(out_features, 24), randn(out_features, seed=1), randn(5, 24, seed=2)
    layer, expected = dense(weight, bias), F.linear(x, weight, bias)
    assert torch.equal(dense_weight(layer), weight.t())
    out = torch.full((5, out_features + 3), 7.0)
    OPS.linear(x, layer, out, NO_SCRATCH)
    torch.testing.assert_close(out[:, :out_features], expected)
    OPS.linear(x, layer, out, NO_SCRATCH, True)
    torch.testing.assert_close(out[:, :out_features], 2 * expected)
    assert (out[:, out_features:] == 7).all()


@pytest.mark.parametrize("position", [0, 1, 1000, 131071, 2**31 - 1])
def test_rope_angles_are_exact_at_large_positions(position):
    frequencies = torch.tensor([1.0, 0.3, 1e-5])
    out = torch.empty(1, 2, 3)
    OPS.rope_table(torch.tensor([position], dtype=torch.int32), frequencies, 1.25, out)
    for i, frequency in enumerate(frequencies.tolist()):
        angle = math.fmod(position * frequency, 2 * math.pi)
        assert out[0, 0, i].item() == pytest.approx(1.25 * math.cos(angle), abs=3e-7)
        assert out[0, 1, i].item() == pytest.approx(1.25 * math.sin(angle), abs=3e-7)


def test_rope_rotates_pairs_and_keeps_other_elements():
    x, half = randn(3, 2, 10), 4
    angles = randn(3, half, seed=1)
    table = torch.stack([angles.cos(), angles.sin()], dim=1)
    before = x.clone()
    OPS.rope(x, table)
    pairs = torch.complex(before[..., :half], before[..., half : 2 * half])
    rotated = pairs * torch.exp(1j * angles)[:, None]
    torch.testing.assert_close(x[..., :half], rotated.real)
    torch.testing.assert_close(x[..., half : 2 * half], rotated.imag)
    assert torch.equal(x[..., 2 * half :], before[..., 2 * half :])


def test_interleaved_rope_rotates_neighbours():
    x, half = randn(3, 2, 10), 4
    angles = randn(3, half, seed=1)
    table = torch.stack([angles.cos(), angles.sin()], dim=1)
    before = x.clone()
    OPS.rope(x, table, True)
    pairs = torch.view_as_complex(before[..., : 2 * half].unflatten(-1, (half, 2)))
    rotated = torch.view_as_real(pairs * torch.exp(1j * angles)[:, None]).flatten(-2)
    torch.testing.assert_close(x[..., : 2 * half], rotated)
    assert torch.equal(x[..., 2 * half :], before[..., 2 * half :])


FUNCTIONS = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu, "relu2": lambda x: F.relu(x) ** 2,
    "quick_gelu": lambda x: x / (1 + (-1.702 * x).exp()),
}


def test_every_activation_is_tested():
    assert FUNCTIONS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize(("activation", "function"), FUNCTIONS.items())
def test_activate_may_overwrite_its_input(activation, function):
    x = randn(4, 9) * 4
    expected = function(x)
    OPS.activate(x, activation, x)
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize(("activation", "function"), FUNCTIONS.items())
def test_gate_may_overwrite_its_input(activation, function):
    gate, up = randn(4, 9) * 4, randn(4, 9, seed=1)
    expected = function(gate) * up
    OPS.gate(gate, up, activation, gate)
    torch.testing.assert_close(gate, expected)


def test_clamped_swiglu():
    gate, up = randn(4, 9) * 9, randn(4, 9, seed=1) * 9
    clamped, factor = gate.clamp(max=7), up.clamp(-7, 7) + 1
    expected = factor * clamped * torch.sigmoid(1.702 * clamped)
    OPS.gate(gate, up, "clamped_swiglu", up)
    torch.testing.assert_close(up, expected)


def test_add_multiplies_by_a_factor():
    x, y = randn(3, 5), randn(3, 5, seed=1)
    total, scaled = x.clone(), x.clone()
    OPS.add(total, y)
    OPS.add(scaled, y, 0.25)
    assert torch.equal(total, x + y)
    assert torch.equal(scaled, x + 0.25 * y)


def test_clamp():
    x = torch.tensor([[0.5, -300.0, 7.0, math.inf]])
    OPS.clamp(x, 7.0)
    assert x.tolist() == [[0.5, -7.0, 7.0, 7.0]]


def test_add_gated_rows():
    x, y = randn(3, 5), randn(3, 5, seed=1)
    total = x.clone()
    OPS.add_gated_rows(total, y, torch.tensor([0.0, 100.0, -100.0]))
    torch.testing.assert_close(total, torch.stack([x[0] + y[0] / 2, x[1] + y[1], x[2]]))


def test_softcap():
    x = torch.tensor([[0.0, 1.0, -300.0]])
    OPS.softcap(x, 30.0)
    torch.testing.assert_close(x, torch.tensor([[0.0, 30 * math.tanh(1 / 30), -30.0]]))


@pytest.mark.parametrize("normalize", [True, False])
def test_moe_route(normalize):
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [-1e9, 5.0, 1e9, 0.0]])
    weights, experts = torch.empty(3, 2), torch.empty(3, 2, dtype=torch.int32)
    OPS.moe_route(logits, Routing(2, normalize=normalize), weights, experts)
    assert experts.tolist() == [[1, 2], [0, 1], [2, 1]]
    expected = logits.softmax(-1).gather(1, experts.long())
    if normalize:
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_moe_route_by_sigmoids_with_a_correction(normalize):
    logits = torch.tensor([[0.0, 2.0, -1.0, 1.0]])
    correction = torch.tensor([0.0, -0.5, 1.0, 0.0])
    weights, experts = torch.empty(1, 2), torch.empty(1, 2, dtype=torch.int32)
    OPS.moe_route(logits, Routing(2, "sigmoid", normalize, 2.5, correction), weights, experts)
    assert experts.tolist() == [[2, 3]]  # 0.5, 0.38, 1.27, 0.73
    scores = torch.tensor([[1 / (1 + math.e), 1 / (1 + 1 / math.e)]])
    torch.testing.assert_close(weights, 2.5 * (scores / scores.sum() if normalize else scores))


def test_moe_route_by_saturated_sigmoids_follows_the_logits():
    logits = torch.tensor([[900.0, 1000.0, 950.0]])
    weights, experts = torch.empty(1, 2), torch.empty(1, 2, dtype=torch.int32)
    OPS.moe_route(logits, Routing(2, "sigmoid", False), weights, experts)
    assert experts.tolist() == [[1, 2]]
    assert weights.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("window", [0, 3])
def test_sinks_are_keys_without_a_value(window):
    """As a key of logit `sink` and value 0 that every row of the head sees."""
    shape = AttentionShape(4, 2, 8, 0.3, sliding_window=window)
    layer, batch, nothing = make_layer("fp32", 1, 2, 8), make_batch([0], [6]), NO_SCRATCH
    q, k, v = randn(6, 4, 8), randn(6, 2, 8, seed=1), randn(6, 2, 8, seed=2)
    sinks, out = torch.tensor([-3.0, 0.0, 2.0, 9.0]), torch.empty(6, 4, 8)
    OPS.write_cache(k, v, layer, batch, nothing)
    OPS.attention(q.clone(), layer, batch, shape, out, nothing, sinks)
    for head, row in itertools.product(range(4), range(6)):
        seen = slice(max(0, row + 1 - window) if window else 0, row + 1)
        logits = 0.3 * k[seen, head // 2] @ q[row, head]
        weights = torch.cat([logits, sinks[head : head + 1]]).softmax(0)[:-1]
        torch.testing.assert_close(out[row, head], weights @ v[seen, head // 2])


def test_rows_are_gathered_and_added_back():
    x = randn(6, 5)
    rows, weights = torch.tensor([4, 0, 5], dtype=torch.int32), torch.tensor([2.0, -1.0, 0.5])
    picked, out = torch.empty(3, 5), torch.ones(6, 5)
    OPS.gather_rows(x, rows, picked)
    assert torch.equal(picked, x[[4, 0, 5]])
    OPS.scatter_add_rows(picked, rows, weights, out)
    expected = torch.ones(6, 5)
    for row, weight in zip(rows.tolist(), weights.tolist(), strict=True):
        expected[row] += weight * x[row]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("rows", [1, 2, 9, 64])
def test_a_row_does_not_depend_on_other_rows(rows):
    x, layer = randn(64, 96), dense(randn(70, 96, seed=1))
    whole, part = torch.empty(64, 70), torch.empty(rows, 70)
    OPS.linear(x, layer, whole, NO_SCRATCH)
    OPS.linear(x[:rows], layer, part, NO_SCRATCH)
    assert torch.equal(part, whole[:rows])
