"""EXL2 layers equal those of an independent writer bit for bit, and give the reference logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exl_loader.backends.cpu.layout import read_tiles
from exl_loader.backends.reference.ops import ReferenceOps
from exl_loader.backends.reference.planes import dequantize
from exl_loader.checkpoint import Checkpoint
from exl_loader.formats import linear_spec, read_linear
from exl_loader.utils.errors import InvalidCheckpoint, UnsupportedFormat
from support.makers import (
    allocate,
    linear_part,
    load_layer,
    make_exl2_layer,
    pack_stream,
    write_layer,
    write_quantized_model,
)


def layer_folder(tmp_path, in_features=256, out_features=64, groups=None, *, seed=0, **options):
    tensors, weight = make_exl2_layer(
        np.random.default_rng(seed), in_features, out_features, groups, **options
    )
    return write_layer(tmp_path / "m", tensors), tensors, weight


def check(folder, in_features, out_features, weight):
    part, layer, decoded = load_layer(folder, in_features, out_features)
    assert torch.equal(decoded, weight)
    assert torch.equal(dequantize(layer), weight)
    return part, layer


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_layers_of_every_width_and_group_size(tmp_path, bits, group_size):
    groups = [(bits, group_size)] * (256 // group_size)
    folder, _, weight = layer_folder(tmp_path, groups=groups, seed=bits)
    check(folder, 256, 64, weight)


@pytest.mark.parametrize("seed", range(8))
def test_mixed_widths_sizes_and_odd_dimensions(tmp_path, seed):
    rng = np.random.default_rng()
    in_features, out_features = int(rng.integers(1, 500)), int(rng.integers(1, 200))
    folder, _, weight = layer_folder(
        tmp_path, in_features, out_features, seed=int(rng.integers(1 << 30)), bias=bool(seed % 2)
    )
    check(folder, in_features, out_features, weight)


@pytest.mark.parametrize("tail_rows", [1, 16, 31, 33, 48])
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_last_groups_of_any_length(tmp_path, bits, tail_rows):
    groups = [(4, 64), (bits, tail_rows)]
    folder, _, weight = layer_folder(tmp_path, 64 + tail_rows, 40, groups)
    check(folder, 64 + tail_rows, 40, weight)


def test_a_group_longer_than_128_rows(tmp_path):
    folder, _, weight = layer_folder(tmp_path, 512, 32, [(5, 512)])
    check(folder, 512, 32, weight)


def test_sizes_follow_from_the_headers(tmp_path):
    folder, tensors, weight = layer_folder(tmp_path, 200, 50, [(4, 128), (3, 72)], bias=True)
    words = tensors["q_weight"].shape[0]
    part, layer = check(folder, 200, 50, weight)
    assert {role: (spec.dtype, spec.shape) for role, spec in part.tensors.items()} == {
        "codes": ("uint8", (4, 64 * (words + 7))),
        "scales": ("uint8", (4, 2, 8)),
        "scale_units": ("float16", (2,)),
        "groups": ("int32", (2, 4)),
        "perm": ("int32", (200,)),
        "bias": ("float32", (50,)),
    }
    assert part.tensors["codes"].name == "layer.codes"
    assert {spec.segment for spec in part.tensors.values()} == {"weights"}
    assert torch.equal(layer.bias, tensors["bias"].float())
    assert not read_tiles(layer.scales)[:, 50:].any(), "levels of padding columns are zero"


def test_a_device_keeps_the_bits_of_the_file_s_scales(tmp_path):
    folder, tensors, _ = layer_folder(tmp_path, 96, 45, [(4, 64), (3, 32)])
    _, layer, _ = load_layer(folder, 96, 45)
    words = tensors["q_scale"].numpy().view(np.uint32)
    fields = words[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
    assert (read_tiles(layer.scales)[:, :45].numpy() == fields.reshape(2, -1)[:, :45]).all()
    assert torch.equal(layer.scale_units, tensors["q_scale_max"] / 256)


def test_layers_of_whole_blocks_reserve_no_extra_words(tmp_path):
    folder, tensors, _ = layer_folder(tmp_path, 256, 48)
    part, _, _ = load_layer(folder, 256, 48)
    assert part.tensors["codes"].nbytes == 3 * 64 * tensors["q_weight"].shape[0]


def test_an_identity_permutation_is_dropped(tmp_path):
    folder, _, weight = layer_folder(tmp_path, permuted=False)
    _, layer = check(folder, 256, 64, weight)
    assert layer.perm is None


def test_a_sixteen_bit_permutation_is_unsigned(tmp_path):
    in_features = 32800  # more than a signed 16-bit number can hold
    folder, tensors, weight = layer_folder(
        tmp_path, in_features, 16, [(2, in_features)], invperm_dtype=torch.int16
    )
    assert tensors["q_invperm"].dtype == torch.int16 and tensors["q_invperm"].min() < 0
    check(folder, in_features, 16, weight)


def test_columns_of_a_fused_source(tmp_path):
    folder, _, weight = layer_folder(tmp_path, 128, 96)
    _, layer, decoded = load_layer(folder, 128, 40, source="layer", rows=(range(24, 64),))
    assert torch.equal(decoded, weight[:, 24:64])
    assert torch.equal(dequantize(layer), weight[:, 24:64])


def test_bias_may_be_required_or_left_out(tmp_path):
    folder, _, _ = layer_folder(tmp_path, bias=True)
    assert load_layer(folder, 256, 64, bias=False)[1].bias is None
    bare, _, _ = layer_folder(tmp_path / "bare")
    with pytest.raises(InvalidCheckpoint, match=r"layer\.bias"):
        load_layer(bare, 256, 64, bias=True)


@pytest.mark.parametrize("name", ["llama-low", "llama-mid"])
def test_fixtures_decode_to_the_reference_logits(fixtures_dir, name):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    config = transformers.LlamaConfig.from_pretrained(fixtures_dir / name)
    model = transformers.LlamaForCausalLM(config).float().eval()
    state = {}
    with Checkpoint.open(fixtures_dir / name) as checkpoint:
        assert checkpoint.format == "exl2"
        for key, value in model.state_dict().items():
            if key in checkpoint.headers:
                state[key] = checkpoint.read(key).float()
                continue
            out_features, in_features = value.shape
            layer = key.removesuffix(".weight")
            spec = linear_spec(checkpoint, layer, in_features, out_features)
            state[key] = read_linear(spec, checkpoint).weight().t()
    model.load_state_dict(state)
    expected = load_file(fixtures_dir / f"{name}.reference.safetensors")
    with torch.no_grad():
        logits = model(expected["input_ids"][None].long()).logits[0]
    # Decoding is exact. The order of float32 sums differs between machines.
    error = (logits - expected["logits"]).norm() / expected["logits"].norm()
    assert error <= 1e-5


@pytest.mark.parametrize("name", ["llama-low", "llama-mid"])
def test_packed_fixtures_decode_to_the_stored_weights(fixtures_dir, name):
    layers = 0
    with Checkpoint.open(fixtures_dir / name) as checkpoint:
        for key in checkpoint.headers:
            if not key.endswith(".q_weight"):
                continue
            layer = key.removesuffix(".q_weight")
            in_features = checkpoint.headers[f"{layer}.q_invperm"].shape[0]
            out_features = 500 if layer == "lm_head" else checkpoint.headers[key].shape[1]
            part = linear_part(checkpoint, layer, in_features, out_features)
            stored = read_linear(part.spec, checkpoint)
            packed = ReferenceOps().pack(stored, allocate(part))
            assert torch.equal(dequantize(packed), stored.weight())
            layers += 1
    assert layers == 22


def test_a_whole_model_folder(tmp_path):
    state = write_quantized_model(tmp_path / "m", "exl2", seed=3, shards=2)
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        for name, value in state.items():
            if value.dim() == 1 or "embed" in name:
                assert torch.equal(checkpoint.read(name).float(), value)
                continue
            spec = linear_spec(checkpoint, name.removesuffix(".weight"), *value.t().shape)
            assert torch.equal(read_linear(spec, checkpoint).weight(), value.t())


def change(name, make):
    """Return a test case: a tensor's name, and a function that damages the tensor."""
    return pytest.param(name, make, id=f"{name}-{make.__name__}")


def odd_width(groups):
    return torch.tensor([7, 0, 4, 32], dtype=torch.int16)


def late_start(groups):
    return groups + torch.tensor([0, 1, 0, 0], dtype=torch.int16)


def falling_starts(groups):
    return torch.tensor([4, 0, 4, -5], dtype=torch.int16)


def start_after_the_end(groups):
    return torch.tensor([4, 0, 4, 900], dtype=torch.int16)


def too_many_rows(groups):
    return torch.tensor([2, 0, 4, 31], dtype=torch.int16)


def too_few_rows(groups):
    return torch.tensor([4, 0, 8, 16], dtype=torch.int16)


def part_of_a_row(groups):
    return torch.tensor([5, 0, 4, 16], dtype=torch.int16)


def repeated_channel(invperm):
    invperm[0] = invperm[1]
    return invperm


def negative_channel(invperm):
    invperm[0] = -1
    return invperm


def nan(scale_max):
    scale_max[1] = float("nan")
    return scale_max


def infinite(scale_max):
    scale_max[0] = float("inf")
    return scale_max


def overflowing(scale_max):
    scale_max[0] = 60000
    return scale_max


def shorter(tensor):
    return tensor[:-1].clone()


def longer(tensor):
    return torch.cat([tensor, tensor])


def wider_dtype(tensor):
    return tensor.double()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        *(
            change("q_groups", f)
            for f in (
                odd_width,
                late_start,
                falling_starts,
                start_after_the_end,
                too_many_rows,
                too_few_rows,
                part_of_a_row,
                shorter,
                longer,
                wider_dtype,
            )
        ),
        *(
            change("q_invperm", f)
            for f in (repeated_channel, negative_channel, shorter, longer, wider_dtype)
        ),
        *(
            change("q_scale_max", f)
            for f in (nan, infinite, overflowing, shorter, longer, wider_dtype)
        ),
        *(change("q_scale", f) for f in (shorter, longer, wider_dtype)),
        *(change("q_weight", f) for f in (shorter, longer, wider_dtype)),
    ],
)
def test_impossible_tensors_are_refused_by_name(tmp_path, name, make):
    tensors, _ = make_exl2_layer(np.random.default_rng(0), 256, 64, [(4, 128), (4, 128)])
    tensors[name] = make(tensors[name].clone())
    folder = write_layer(tmp_path / "m", tensors)
    with pytest.raises((InvalidCheckpoint, UnsupportedFormat), match="layer"):
        load_layer(folder, 256, 64)


@pytest.mark.parametrize("name", ["q_weight", "q_groups", "q_scale", "q_scale_max", "q_invperm"])
def test_a_missing_tensor_is_named(tmp_path, name):
    tensors, _ = make_exl2_layer(np.random.default_rng(0), 64, 32)
    other = {"other.q_weight": tensors["q_weight"].clone()}  # so that the folder is still EXL2
    del tensors[name]
    folder = write_layer(tmp_path / "m", tensors | other)
    with pytest.raises(InvalidCheckpoint, match=f"layer.{name}"):
        load_layer(folder, 64, 32)


@pytest.mark.parametrize(("in_features", "out_features"), [(255, 64), (256, 97), (256, 32)])
def test_dimensions_must_be_those_of_the_model(tmp_path, in_features, out_features):
    folder, _, _ = layer_folder(tmp_path)
    with pytest.raises(InvalidCheckpoint, match="layer"):
        load_layer(folder, in_features, out_features)


def test_groups_of_no_multiple_of_32_rows_are_unsupported(tmp_path):
    rng = np.random.default_rng(0)
    tensors, _ = make_exl2_layer(rng, 64, 32, [(4, 32), (4, 32)])
    codes = rng.integers(0, 16, (16, 32))
    rest = rng.integers(0, 16, (48, 32))
    tensors["q_weight"] = torch.from_numpy(
        np.concatenate([pack_stream(codes, 4), pack_stream(rest, 4)])
    )
    tensors["q_groups"] = torch.tensor([4, 0, 4, 2], dtype=torch.int16)
    folder = write_layer(tmp_path / "m", tensors)
    with pytest.raises(UnsupportedFormat, match="multiple of 32, found 16"):
        load_layer(folder, 64, 32)
