"""GPTQ layers equal those of a writer of our own bit for bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from exl_loader.backends.cuda.pack import PackOps
from exl_loader.backends.reference.planes import dequantize
from exl_loader.checkpoint import Checkpoint
from exl_loader.formats import linear_spec, read_linear
from exl_loader.utils.errors import InvalidCheckpoint, InvalidConfig, UnsupportedFormat
from support.makers import load_layer, make_gptq_layer, write_layer, write_quantized_model


def write(tmp_path, tensors, *, bits=4, group_size=128, v2=False, **settings):
    layout = "gptq_v2" if v2 else "gptq"
    return write_layer(
        tmp_path / "m",
        tensors,
        bits=bits,
        group_size=group_size,
        checkpoint_format=layout,
        **settings,
    )


def make(seed=0, in_features=256, out_features=64, **options):
    return make_gptq_layer(np.random.default_rng(seed), in_features, out_features, **options)


def check(folder, in_features, out_features, weight, **options):
    part, layer, decoded = load_layer(folder, in_features, out_features, **options)
    assert torch.equal(decoded, weight)
    assert torch.equal(dequantize(layer), weight)
    return part, layer


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_every_width_order_and_layout_of_zero_points(tmp_path, bits, act_order, v2, group_size):
    tensors, weight = make(bits=bits, act_order=act_order, v2=v2, group_size=group_size, bias=True)
    folder = write(tmp_path, tensors, bits=bits, group_size=group_size, v2=v2)
    _, layer = check(folder, 256, 64, weight)
    assert torch.equal(layer.bias, tensors["bias"].float())
    assert (layer.perm is not None) == (act_order and group_size != -1)


def test_no_permutation_is_reserved_without_a_group_index(tmp_path):
    tensors, weight = make(g_idx=False)
    part, _ = check(write(tmp_path, tensors), 256, 64, weight)
    assert "perm" not in part.tensors


def test_sizes_follow_from_the_headers(tmp_path):
    tensors, _ = make(in_features=224, out_features=96, bits=3, group_size=64)
    part, _, _ = load_layer(write(tmp_path, tensors, bits=3, group_size=64), 224, 96)
    assert {role: (spec.dtype, spec.shape) for role, spec in part.tensors.items()} == {
        "codes": ("uint8", (6, 7 * 3 * 64)),
        "scales": ("float16", (6, 4, 16)),
        "zeros": ("uint8", (6, 4, 8)),
        "groups": ("int32", (4, 4)),
        "perm": ("int32", (224,)),
    }


@pytest.mark.parametrize("act_order", [False, True])
def test_a_shorter_last_group(tmp_path, act_order):
    tensors, weight = make(in_features=200, bits=4, group_size=64, act_order=act_order)
    check(write(tmp_path, tensors, group_size=64), 200, 64, weight)


def test_a_group_index_of_zeros_is_ignored(tmp_path):
    tensors, weight = make(group_size=64)
    tensors["g_idx"].zero_()
    check(write(tmp_path, tensors, group_size=64), 256, 64, weight)


def test_settings_of_older_folders(tmp_path):
    tensors, weight = make(bits=2, group_size=32)
    folder = write(tmp_path, tensors)
    (folder / "config.json").write_text("{}")
    settings = {"bits": 2, "group_size": 32, "desc_act": False, "sym": True}
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    check(folder, 256, 64, weight)
    (folder / "quantize_config.json").unlink()
    check(folder, 256, 64, weight)


def test_layers_with_their_own_settings(tmp_path):
    tensors, weight = make(bits=8, group_size=64)
    folder = write(tmp_path, tensors, bits=4, group_size=128, dynamic={"+:layer": {"bits": 8}})
    check(folder, 256, 64, weight)


def test_columns_of_a_fused_source(tmp_path):
    tensors, weight = make(out_features=96, group_size=64, act_order=True, bias=True)
    folder = write(tmp_path, tensors, group_size=64)
    _, layer, decoded = load_layer(folder, 256, 40, source="layer", rows=(range(24, 64),))
    assert torch.equal(decoded, weight[:, 24:64])
    assert torch.equal(dequantize(layer), weight[:, 24:64])
    assert torch.equal(layer.bias, tensors["bias"][24:64].float())
    with pytest.raises(InvalidCheckpoint, match="at least 100"):
        load_layer(folder, 256, 40, source="layer", rows=(range(60, 100),))


@pytest.mark.parametrize("options", [{}, {"act_order": True, "v2": True, "bits": 3}])
def test_a_whole_model_folder(tmp_path, options):
    state = write_quantized_model(tmp_path / "m", "gptq", seed=4, group_size=32, **options)
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        assert checkpoint.format == "gptq"
        for name, value in state.items():
            if value.dim() == 2 and "embed" not in name:
                spec = linear_spec(checkpoint, name.removesuffix(".weight"), *value.t().shape)
                assert spec.format == ("dense" if "lm_head" in name else "gptq")
                assert torch.equal(read_linear(spec, checkpoint).weight(), value.t())


def nan_scale(tensors):
    tensors["scales"][0, 3] = float("nan")


def group_out_of_range(tensors):
    tensors["g_idx"][5] = 2


def negative_group(tensors):
    tensors["g_idx"][5] = -1


def empty_group(tensors):
    tensors["g_idx"][:] = 1


def group_that_is_not_whole_blocks(tensors):
    tensors["g_idx"][:5] = 1


def short_index(tensors):
    tensors["g_idx"] = tensors["g_idx"][:-1]


def float_index(tensors):
    tensors["g_idx"] = tensors["g_idx"].float()


def short_scales(tensors):
    tensors["scales"] = tensors["scales"][:1]


def whole_scales(tensors):
    tensors["scales"] = tensors["scales"].int()


def scales_beyond_float16(tensors):
    tensors["scales"] = tensors["scales"].float() + 1e6


def narrow_zeros(tensors):
    tensors["qzeros"] = tensors["qzeros"][:, :-1]


def short_weight(tensors):
    tensors["qweight"] = tensors["qweight"][:-1]


def five_bits(tensors):
    tensors["qweight"] = torch.zeros(40, 64, dtype=torch.int32)


def other_bits(tensors):
    tensors["qweight"] = tensors["qweight"].repeat(2, 1)


def infinite_bias(tensors):
    tensors["bias"] = torch.full((64,), float("inf"), dtype=torch.float16)


def long_bias(tensors):
    tensors["bias"] = torch.zeros(65, dtype=torch.float16)


@pytest.mark.parametrize(
    "spoil",
    [
        nan_scale,
        group_out_of_range,
        negative_group,
        empty_group,
        group_that_is_not_whole_blocks,
        short_index,
        float_index,
        short_scales,
        whole_scales,
        scales_beyond_float16,
        narrow_zeros,
        short_weight,
        five_bits,
        other_bits,
        infinite_bias,
        long_bias,
    ],
)
def test_impossible_tensors_are_refused_by_name(tmp_path, spoil):
    tensors, _ = make()
    spoil(tensors)
    with pytest.raises((InvalidCheckpoint, UnsupportedFormat), match=r"^layer"):
        load_layer(write(tmp_path, tensors), 256, 64)


@pytest.mark.parametrize("name", ["scales", "qzeros"])
def test_a_missing_tensor_is_named(tmp_path, name):
    tensors, _ = make()
    del tensors[name]
    with pytest.raises(InvalidCheckpoint, match=f"layer.{name}"):
        load_layer(write(tmp_path, tensors), 256, 64)


@pytest.mark.parametrize(
    "settings", [{"bits": "four"}, {"bits": True}, {"group_size": 0}, {"group_size": -2}]
)
def test_meaningless_settings_are_refused(tmp_path, settings):
    tensors, _ = make()
    with pytest.raises((InvalidCheckpoint, InvalidConfig), match=next(iter(settings))):
        load_layer(write(tmp_path, tensors, **settings), 256, 64)


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({"bits": 8}, "says 8 bits, but the shape of some layers is that of 4 bits"),
        ({"group_size": 64}, "says group_size 64, but the shape of some layers is that of 128"),
        ({"bits": "4", "group_size": "128"}, None),
        ({"bits": 4.0}, None),
        ({"bits": None, "group_size": None}, None),
        ({"bits": 2, "dynamic": {"+:layer": {"bits": 4}}}, None),
        ({"group_size": 32, "extra_config": {"layer": {"group_size": 128}}}, None),
    ],
)
def test_shapes_decide_width_and_group_size(tmp_path, caplog, settings, warning):
    tensors, weight = make(seed=int(np.random.default_rng().integers(1 << 30)))
    check(write(tmp_path, tensors, **settings), 256, 64, weight)
    assert [warning in record.message for record in caplog.records] == [True] * bool(warning)


@pytest.mark.parametrize("group_size", [16, 48, 80])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_groups_that_are_not_whole_blocks(tmp_path, group_size, act_order, bits):
    """The CPU layout fills up every group. A CUDA device keeps float16 weights."""
    tensors, weight = make(group_size=group_size, act_order=act_order, bits=bits, bias=True)
    folder = write(tmp_path, tensors, bits=bits, group_size=group_size)
    part, layer = check(folder, 256, 64, weight)
    groups = -(-256 // group_size)
    blocks = (groups - 1) * -(-group_size // 32) + -(-(256 - (groups - 1) * group_size) // 32)
    assert layer.codes.shape == (4, blocks * bits * 64)
    assert part.stored_rows == 32 * blocks

    part, layer, _ = load_layer(folder, 256, 64, device="cuda:0", ops=PackOps(None))
    assert part.tensors["weight"].dtype == "float16" and part.stored_rows == 256
    dense = layer.weight.transpose(1, 2).reshape(64, 256)
    assert torch.equal(dense, weight.half().t())
    assert torch.equal(layer.bias, tensors["bias"].float())


@pytest.mark.parametrize("settings", [{}, {"group_size": None}, {"group_size": 32}])
def test_a_wrong_or_missing_group_size(tmp_path, settings):
    tensors, weight = make(group_size=16, g_idx=False)
    check(write(tmp_path, tensors, **settings), 256, 64, weight)


def test_a_shorter_last_group_without_a_declared_size(tmp_path):
    tensors, weight = make(in_features=200, group_size=64, g_idx=False)
    check(write(tmp_path, tensors, group_size=None), 200, 64, weight)
    tensors["scales"], tensors["qzeros"] = tensors["scales"][:3], tensors["qzeros"][:3]
    with pytest.raises(InvalidCheckpoint, match="layer.scales: groups of 200 input features"):
        load_layer(write(tmp_path, tensors, group_size=None), 200, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_dtypes(tmp_path, dtype, caplog):
    tensors, weight = make(seed=3)
    folder = write(tmp_path, tensors)
    if dtype == torch.float32:
        tensors["scales"] = tensors["scales"].float()
        check(write(tmp_path, tensors), 256, 64, weight)
        return
    tensors["scales"] = tensors["scales"].bfloat16()
    _, layer, decoded = load_layer(write(tmp_path, tensors), 256, 64)
    scales = tensors["scales"].float().repeat_interleave(128, 0)
    own = make_gptq_layer(np.random.default_rng(3), 256, 64)[0]["scales"].float()
    expected = weight / own.repeat_interleave(128, 0) * scales
    torch.testing.assert_close(decoded, expected, rtol=1e-6, atol=0)
    assert torch.equal(dequantize(layer), decoded) and folder and not caplog.records


def test_scales_below_the_range_of_float16_are_reported(tmp_path, caplog):
    tensors, _ = make()
    tensors["scales"] = torch.full((2, 64), 1.37e-7, dtype=torch.bfloat16)
    load_layer(write(tmp_path, tensors), 256, 64)
    assert "too small for float16" in caplog.text


def test_act_order_without_its_index_is_refused(tmp_path):
    tensors, _ = make(act_order=True)
    folder = write(tmp_path, tensors, desc_act=True)
    tensors["g_idx"].zero_()
    with pytest.raises(InvalidCheckpoint, match="layer.g_idx"):
        load_layer(write(tmp_path, tensors, desc_act=True), 256, 64)
    del tensors["g_idx"]
    with pytest.raises(InvalidCheckpoint, match="layer.g_idx.*desc_act"):
        load_layer(write(tmp_path, tensors, desc_act=True), 256, 64)
    assert folder


def test_the_error_names_awq_packing(tmp_path):
    tensors, _ = make()
    tensors["qweight"] = torch.zeros(256, 8, dtype=torch.int32)
    with pytest.raises(UnsupportedFormat, match="layer.qweight: packed .* as AWQ does"):
        load_layer(write(tmp_path, tensors), 256, 64)


def awq_packed(codes: np.ndarray) -> torch.Tensor:
    """Pack 4-bit codes [rows, N] along the columns, in AutoAWQ's GEMM layout."""
    slots = codes.reshape(len(codes), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].astype(np.uint64)
    words = (slots << (4 * np.arange(8, dtype=np.uint64))).sum(axis=2)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


@pytest.mark.parametrize("group_size", [16, 128])
@pytest.mark.parametrize("rows", [None, (range(24, 64),), (range(1, 96, 2),)])
def test_auto_rounds_packing_along_the_columns(tmp_path, group_size, rows):
    rng = np.random.default_rng()
    codes, zeros = rng.integers(0, 16, (256, 96)), rng.integers(0, 16, (256 // group_size, 96))
    scales = rng.uniform(0.001, 0.01, zeros.shape).astype(np.float16)
    tensors = {
        "qweight": awq_packed(codes), "qzeros": awq_packed(zeros),
        "scales": torch.from_numpy(scales),
    }
    index = np.arange(256) // group_size
    weight = torch.from_numpy(scales.astype(np.float32)[index] * (codes - zeros[index])).float()
    settings = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}
    folder = write(tmp_path, tensors, group_size=group_size, **settings)
    (columns,) = rows or (range(96),)
    check(folder, 256, len(columns), weight[:, list(columns)], source="layer", rows=rows)


@pytest.mark.parametrize("tensor", ["qweight", "qzeros", "scales"])
def test_tensors_that_contradict_the_packing_along_the_columns_are_refused(tmp_path, tensor):
    tensors, _ = make(g_idx=False)
    tensors["qweight"] = torch.zeros(256, 8, dtype=torch.int32)
    tensors[tensor] = tensors[tensor][:, :-1].contiguous()
    settings = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}
    with pytest.raises(InvalidCheckpoint, match="^layer"):
        load_layer(write(tmp_path, tensors, **settings), 256, 64)
