"""Unquantised layers are packed into tiles without changing a bit."""

from __future__ import annotations

import pytest
import torch

from exl_loader.backends import layouts
from exl_loader.checkpoint import Checkpoint
from exl_loader.formats import has_linear, linear_spec
from exl_loader.utils.errors import InvalidCheckpoint, UnsupportedFormat
from support.makers import linear_part, load_layer, write_layer

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def untile(layer):
    """Return the weight [N, K] of a layer's tiles [tiles, K, 16]."""
    return layer.weight.transpose(1, 2).reshape(-1, layer.in_features)[: layer.out_features]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_features", [1, 16, 40, 250])
@pytest.mark.parametrize("piece_bytes", [1, 5000, 16 << 20])
def test_weights_keep_every_bit(tmp_path, monkeypatch, dtype, out_features, piece_bytes):
    monkeypatch.setattr(layouts, "PIECE_BYTES", piece_bytes)
    weight = torch.randn(out_features, 48).to(dtype)
    folder = write_layer(tmp_path / "m", {"weight": weight})
    part, layer, decoded = load_layer(folder, 48, out_features)
    tiles = -(-out_features // 16)
    assert part.tensors["weight"].shape == (tiles, 48, 16)
    assert torch.equal(untile(layer), weight)
    assert torch.equal(decoded, weight.float().t())
    assert not layer.weight.transpose(1, 2).reshape(-1, 48)[out_features:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_fused_source_and_its_bias(tmp_path, dtype):
    tensors = {"weight": torch.randn(96, 48).to(dtype), "bias": torch.randn(96).to(dtype)}
    folder = write_layer(tmp_path / "m", tensors, "qkv_proj")
    part, layer, decoded = load_layer(
        folder, 48, 40, "k_proj", source="qkv_proj", rows=(range(24, 64),), bias=True
    )
    assert part.tensors["weight"].name == "k_proj.weight"
    assert torch.equal(untile(layer), tensors["weight"][24:64])
    assert torch.equal(decoded, tensors["weight"][24:64].float().t())
    assert torch.equal(layer.bias, tensors["bias"][24:64].float())


def test_specs_have_the_device_of_their_layer(tmp_path):
    folder = write_layer(tmp_path / "m", {"weight": torch.randn(8, 8)})
    with Checkpoint.open(folder) as checkpoint:
        part = linear_part(checkpoint, "layer", 8, 8, device="cuda:1")
        assert part.tensors["weight"].device == "cuda:1"
        assert has_linear(checkpoint, "layer") and not has_linear(checkpoint, "other")
        with pytest.raises(InvalidCheckpoint, match="other"):
            linear_spec(checkpoint, "other", 8, 8)


@pytest.mark.parametrize(("in_features", "out_features"), [(8, 9), (9, 8), (8, 7)])
def test_dimensions_must_be_those_of_the_model(tmp_path, in_features, out_features):
    folder = write_layer(tmp_path / "m", {"weight": torch.randn(8, 8)})
    with pytest.raises(InvalidCheckpoint, match=r"layer\.weight"):
        load_layer(folder, in_features, out_features)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_values_must_be_finite(tmp_path, value, dtype):
    weight = torch.zeros(8, 8, dtype=dtype)
    weight[7, 3] = value
    folder = write_layer(tmp_path / "m", {"weight": weight})
    with pytest.raises(InvalidCheckpoint, match=r"layer\.weight.*finite numbers, found 1 that"):
        load_layer(folder, 8, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_and_smallest_values_are_finite(tmp_path, dtype):
    info = torch.finfo(dtype)
    values = [info.max, info.min, info.tiny, info.smallest_normal / 2, -0.0, 0.0]
    weight = torch.tensor([values], dtype=dtype)
    folder = write_layer(tmp_path / "m", {"weight": weight})
    assert torch.equal(untile(load_layer(folder, 6, 1)[1]), weight)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_the_error_names_other_dtypes(tmp_path, dtype):
    folder = write_layer(tmp_path / "m", {"weight": torch.zeros(8, 8).to(dtype)})
    with pytest.raises(UnsupportedFormat, match=str(dtype).removeprefix("torch.")):
        load_layer(folder, 8, 8)
