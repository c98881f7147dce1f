"""Zero points of GPTQ are read back from every layout, also with a wrong label."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exl_loader import load
from exl_loader.backends.cpu.layout import read_tiles
from exl_loader.formats.gptq_zeros import read_zero_points
from support.makers import (
    load_layer,
    make_gptq_layer,
    pack_stream,
    warnings_of_weights,
    write_layer,
    write_quantized_model,
)

WIDTHS = (2, 3, 4, 8)
# Words with 1 in every field, packed from the fields: one word, and for 3 bits three words.
ONES = {bits: pack_stream(np.ones((32, 1), int), bits).view(np.uint32).ravel() for bits in WIDTHS}


def packed(zeros: np.ndarray, bits: int) -> np.ndarray:
    """Pack zero points [G, N] to uint32 [G, N * bits / 32], without an offset."""
    return pack_stream(zeros.T, bits).T.copy().view(np.uint32)


def by_words(zeros: np.ndarray, bits: int) -> np.ndarray:
    """Pack, then subtract 1 from every field by words, as GPTQModel does for 2, 4 and 8 bits."""
    words = packed(zeros, bits)
    return words - np.resize(ONES[bits], words.shape[1])


def by_fields(zeros: np.ndarray, bits: int) -> np.ndarray:
    """Subtract 1 before packing; 0 wraps to the largest value."""
    return packed((zeros - 1) % (1 << bits), bits)


def by_swapped_words(zeros: np.ndarray, bits: int) -> np.ndarray:
    """Subtract as GPTQModel before 6.1 for 3 bits, with the first and third constant exchanged."""
    words = packed(zeros, bits)
    return words - np.resize(ONES[3][::-1], words.shape[1])


def drawn(bits: int, zero_share: float = 0.02, shape=(8, 96)) -> np.ndarray:
    """Return random zero points around the middle, as quantisers choose them, and some zeros."""
    rng = np.random.default_rng()
    middle = 1 << (bits - 1)
    spread = max(1, middle // 2)
    zeros = rng.integers(middle - spread + (bits == 2), middle + spread, shape)
    zeros[rng.random(shape) < zero_share] = 0
    return zeros


def test_the_constants_are_those_of_the_writers():
    assert [hex(word) for word in ONES[4][:1]] == ["0x11111111"]
    assert [hex(word) for word in ONES[3]] == ["0x49249249", "0x92492492", "0x24924924"]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", [32, 40, 96, 8])
def test_zero_points_without_an_offset(bits, columns):
    zeros = drawn(bits, shape=(3, columns))
    found, contradiction = read_zero_points(packed(zeros, bits), bits, columns, "gptq_v2", False)
    assert np.array_equal(found, zeros) and not contradiction


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero_share", [0, 0.01, 0.5, 1])
@pytest.mark.parametrize("columns", [32, 40, 96])
def test_subtraction_by_words_is_undone(bits, zero_share, columns):
    zeros = drawn(bits, zero_share, (5, columns))
    found, _ = read_zero_points(by_words(zeros, bits), bits, columns, "gptq", False)
    assert np.array_equal(found, zeros)


@pytest.mark.parametrize("bits", WIDTHS)
def test_all_writers_agree_where_no_zero_point_is_0(bits):
    zeros = np.random.default_rng().integers(1, 1 << bits, (4, 64))
    found, _ = read_zero_points(by_fields(zeros, bits), bits, 64, "gptq", False)
    assert np.array_equal(found, zeros)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_zero_point_of_0_that_wrapped_is_restored(bits):
    """The next zero point may be wrong by one, because no file names the writer."""
    zeros = np.full((1, 64), 2)
    zeros[0, [5, 63]] = 0
    found, _ = read_zero_points(by_fields(zeros, bits), bits, 64, "gptq", False)
    assert found[0, 5] == found[0, 63] == 0
    assert (found != zeros).sum() <= 1


@pytest.mark.parametrize("write", [by_fields, by_words, by_swapped_words])
@pytest.mark.parametrize("zero_share", [0, 0.03])
def test_three_bit_zero_points_of_every_writer(write, zero_share):
    zeros = drawn(3, zero_share, (16, 128))
    found, _ = read_zero_points(write(zeros, 3), 3, 128, "gptq", False)
    assert np.array_equal(found, zeros)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("sym", [True, None])
@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
def test_symmetric_values_decide_against_the_label(bits, sym, label):
    middle = np.full((3, 64), 1 << (bits - 1))
    writers = {"gptq": [by_fields, by_words], "gptq_v2": [packed]}
    if bits == 3:
        writers["gptq"].append(by_swapped_words)
    for layout, functions in writers.items():
        for write in functions:
            found, contradiction = read_zero_points(write(middle, bits), bits, 64, label, sym)
            assert np.array_equal(found, middle)
            assert bool(contradiction) == (layout != label)


def test_a_symmetric_layer_with_a_few_other_zero_points():
    zeros = np.full((4, 64), 8)
    zeros[0, :5] = (3, 4, 11, 12, 9)
    for label in ("gptq", "gptq_v2"):
        found, contradiction = read_zero_points(packed(zeros, 4), 4, 64, label, True)
        assert np.array_equal(found, zeros) and bool(contradiction) == (label == "gptq")
        # If symmetry is not declared, these zero points prove that the layer is asymmetric.
        labelled, contradiction = read_zero_points(packed(zeros, 4), 4, 64, label, None)
        assert np.array_equal(labelled, zeros + (label == "gptq")) and not contradiction


def test_zero_points_that_are_not_symmetric_follow_the_label():
    zeros = drawn(4, 0)
    zeros[zeros == 8] = 7
    found, contradiction = read_zero_points(by_words(zeros, 4), 4, 96, "gptq", True)
    assert np.array_equal(found, zeros) and "differ from each other" in contradiction


def test_an_asymmetric_label_is_followed_whatever_the_values():
    eights = packed(np.full((2, 64), 8), 4)
    assert (read_zero_points(eights, 4, 64, "gptq", False)[0] == 9).all()
    assert (read_zero_points(eights, 4, 64, "gptq_v2", False)[0] == 8).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_resident_layer_and_definition_read_the_same(tmp_path, bits):
    """Packing for the CPU, for a card and the slow definition take one set of zero points."""
    tensors, weight = make_gptq_layer(np.random.default_rng(), 256, 64, bits=bits)
    zeros = drawn(bits, 0.1, (2, 64))
    scales = tensors["scales"].float().repeat_interleave(128, 0)
    right = weight.clone()
    own = read_zero_points(tensors["qzeros"].numpy().view(np.uint32), bits, 64, "gptq", False)[0]
    right += scales * torch.from_numpy(own.astype(np.float32) - zeros).repeat_interleave(128, 0)
    tensors["qzeros"] = torch.from_numpy(by_words(zeros, bits).view(np.int32))
    folder = write_layer(tmp_path / "m", tensors, bits=bits)
    _, layer, decoded = load_layer(folder, 256, 64)
    torch.testing.assert_close(decoded, right, rtol=1e-5, atol=1e-6)
    assert torch.equal(read_tiles(layer.zeros), torch.from_numpy(zeros.astype(np.uint8)))


def logits(folder):
    with load(folder, ctx_size=256, cache_type="fp32", device="cpu") as model:
        return model.prompt_logits([1, 5, 9, 200, 17, 3])


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_model_of_either_layout_has_the_same_logits(tmp_path, bits, caplog):
    sizes = dict(hidden_size=64, intermediate_size=128)
    folder = tmp_path / "m"
    write_quantized_model(folder, "gptq", config=sizes, group_size=32, bits=bits, v2=True)
    path, config_path = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(path)
    zeros = {
        name: drawn(bits, 0 if bits == 3 else 0.02, (len(tensor), tensor.shape[1] * 32 // bits))
        for name, tensor in tensors.items() if name.endswith("qzeros")
    }

    def logits_as(write, layout):
        stored = {name: write(points, bits).view(np.int32) for name, points in zeros.items()}
        save_file(tensors | {name: torch.from_numpy(w) for name, w in stored.items()}, path)
        config = json.loads(config_path.read_text())
        config["quantization_config"]["checkpoint_format"] = layout
        config_path.write_text(json.dumps(config))
        return logits(folder)

    right = logits_as(packed, "gptq_v2")
    assert torch.equal(logits_as(by_fields if bits == 3 else by_words, "gptq"), right)
    assert warnings_of_weights(caplog) == []


def test_a_wrong_label_is_reported_once(tmp_path, caplog):
    folder = tmp_path / "m"
    sizes = dict(hidden_size=64, intermediate_size=128)
    write_quantized_model(folder, "gptq", config=sizes, group_size=32, v2=True)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("qzeros"):
            tensors[name] = torch.full_like(tensor, np.int64(0x88888888).astype(np.int32).item())
    save_file(tensors, path)
    right = logits(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {"checkpoint_format": "gptq", "sym": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(folder), right)
    warnings = warnings_of_weights(caplog)
    assert len(warnings) == 1 and "stored as in gptq_v2, though the label is gptq" in warnings[0]
