"""The converter: bits in the file, errors on correlated inputs, bit widths, whole folders."""

from __future__ import annotations

import itertools
import json
import os
import random

import numpy as np
import pytest
import torch

from exl_loader.backends.reference.ops import ReferenceOps
from exl_loader.convert.allocation import Option, allocate, efficient
from exl_loader.convert.calibration import calibration_rows
from exl_loader.convert.error_feedback import Hessian, PreparedHessian, quantize, sort_rows
from exl_loader.convert.mixes import Mix
from exl_loader.convert.packing import (
    QuantizedLinear,
    dequantize,
    exl2_tensors,
    pack_codes,
    pack_scales,
    padded_columns,
)
from exl_loader.convert.scales import choose_scales
from exl_loader.convert.writer import (
    ShardWriter,
    check_other_files,
    copy_other_files,
    new_folder,
    write_config,
)
from exl_loader.formats.exl2 import effective_scales
from exl_loader.text.tokenizer import Tokenizer
from exl_loader.utils.errors import InvalidSettings
from support import REPO
from support.special_files import SPECIAL_FILES

WIDTHS = (2, 3, 4, 5, 6, 8)
OPS = ReferenceOps()


def decode_exl2(tensors: dict[str, torch.Tensor], out_features: int) -> np.ndarray:
    """Decode a layer one code at a time with Python integers, sharing no code with the packer."""
    q_weight = tensors["q_weight"].numpy().view(np.uint32)
    q_scale = tensors["q_scale"].numpy().view(np.uint32)
    q_groups = tensors["q_groups"].tolist()
    scale_max = tensors["q_scale_max"].numpy()
    q_perm = np.argsort(tensors["q_invperm"].numpy())
    in_features, columns = len(q_perm), q_weight.shape[1]
    weight = np.zeros((in_features, columns), np.float16)
    widths, starts = q_groups[0::2], [*q_groups[1::2], q_weight.shape[0]]
    row = 0
    for g, bits in enumerate(widths):
        is_last = g == len(widths) - 1
        rows = in_features - row if is_last else (starts[g + 1] - starts[g]) * 32 // bits
        for n in range(columns):
            words = q_weight[starts[g] : starts[g + 1], n]
            stream = sum(int(word) << (32 * i) for i, word in enumerate(words))
            qs = (int(q_scale[g, n // 8]) >> (4 * (n % 8)) & 15) + 1
            scale = np.float16(qs * qs) * np.float16(scale_max[g] / np.float16(256))
            for r in range(rows):
                code = stream >> (r * bits) & (2**bits - 1)
                weight[q_perm[row + r], n] = np.float16(code - 2 ** (bits - 1)) * scale
        row += rows
    assert row == in_features
    return weight[:, :out_features]


def random_layer(seed: int, in_features: int, out_features: int, mix: Mix):
    generator = torch.Generator().manual_seed(seed)
    columns = padded_columns(out_features)
    groups = mix.groups(in_features)
    codes = [
        torch.randint(0, 2**group.bits, (group.rows, columns), generator=generator)
        for group in groups
    ]
    return QuantizedLinear(
        groups=groups,
        codes=torch.cat(codes).byte(),
        qs=torch.randint(1, 17, (len(groups), columns), generator=generator),
        scale_max=(torch.rand(len(groups), generator=generator) + 0.1).half(),
        perm=torch.randperm(in_features, generator=generator),
        out_features=out_features,
    )


def by_role(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items()}


def correlated_inputs(seed: int, rows: int, features: int) -> torch.Tensor:
    """Inputs whose channels are mixtures of few sources, of very different strength."""
    generator = torch.Generator().manual_seed(seed)
    sources = torch.randn(rows, features // 4, generator=generator)
    mixing = torch.randn(features // 4, features, generator=generator)
    strength = torch.exp(torch.randn(features, generator=generator))
    noise = 0.3 * torch.randn(rows, features, generator=generator)
    return (sources @ mixing + noise) * strength


def prepared(inputs: torch.Tensor) -> PreparedHessian:
    hessian = Hessian(inputs.shape[1])
    for rows in inputs.split(100):
        hessian.add(rows)
    return PreparedHessian(hessian)


def quantized(weight: torch.Tensor, hessian: PreparedHessian, mix: Mix) -> torch.Tensor:
    """Quantise a weight and decode it."""
    return dequantize(quantize(OPS, sort_rows(weight, hessian), weight.shape[1], hessian, mix))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("rows", [32, 128, 48, 7])
def test_pack_codes_is_one_bit_stream_a_column(bits, rows):
    codes = torch.randint(0, 2**bits, (rows, 5), generator=torch.Generator().manual_seed(bits))
    words = pack_codes(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (-(-rows * bits // 32), 5)
    for n in range(5):
        want = sum(int(code) << (r * bits) for r, code in enumerate(codes[:, n]))
        assert words[:, n].numpy().tobytes() == want.to_bytes(4 * words.shape[0], "little")


def test_pack_scales_stores_one_less_in_four_bits():
    qs = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 16]])
    assert pack_scales(qs).numpy().view(np.uint32).tolist() == [[0xF6543210]]


MIXED = (
    Mix((8, 4), (32, 64), (0.05, 0.95)),
    Mix((6, 3, 2), (32, 64, 64), (0.05, 0.2, 0.75)),
    Mix((5, 4), (128, 32), (0.1, 0.9)),
)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("mix", [*(Mix((bits,), (64,)) for bits in WIDTHS), *MIXED], ids=str)
@pytest.mark.parametrize("shape", [(128, 32), (176, 40), (96, 33)])
def test_layer_round_trip_is_exact(seed, mix, shape):
    in_features, out_features = shape
    layer = random_layer(seed, in_features, out_features, mix)
    tensors = by_role(exl2_tensors("p", layer), "p")
    decoded = decode_exl2(tensors, out_features)
    assert (decoded == dequantize(layer).numpy()).all()
    total_bits = sum(8 * t.numel() * t.element_size() for t in tensors.values())
    assert total_bits == mix.stored_bits(in_features, out_features)


def test_shares_are_rounded_up_to_whole_groups():
    groups = Mix((8, 4), (32, 128), (0.05, 0.95)).groups(576)
    assert groups == [(8, 32), (4, 128), (4, 128), (4, 128), (4, 128), (4, 32)]
    assert Mix((3, 2), (64, 64), (0.9, 0.1)).groups(64) == [(3, 64)]


@pytest.mark.parametrize("mix", MIXED, ids=str)
def test_a_mix_keeps_its_values_in_the_form_of_exllamav2(mix):
    values = json.loads(json.dumps(mix.as_dict()))
    assert values.keys() == {"bits", "bits_prop", "group_size", "scale_bits"}
    assert Mix.from_dict(values) == mix


def test_tensors_have_the_dtypes_of_the_format():
    layer = random_layer(3, 64, 40, Mix((4,), (32,)))
    layer.bias = torch.zeros(40)
    tensors = exl2_tensors("a.b", layer)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "a.b.q_weight": (torch.int32, (8, 64)),
        "a.b.q_groups": (torch.int16, (4,)),
        "a.b.q_scale": (torch.int32, (2, 8)),
        "a.b.q_scale_max": (torch.float16, (2,)),
        "a.b.q_invperm": (torch.int32, (64,)),
        "a.b.bias": (torch.float16, (40,)),
    }


@pytest.mark.parametrize("bits", WIDTHS)
def test_gptq_beats_rounding_on_correlated_inputs(bits):
    inputs = correlated_inputs(5, 600, 128)
    weight = 0.05 * torch.randn(128, 48, generator=torch.Generator().manual_seed(6))
    hessian, nothing = prepared(inputs), PreparedHessian(Hessian(128))
    with_feedback = quantized(weight, hessian, Mix((bits,), (32,)))
    rounded = quantized(weight, nothing, Mix((bits,), (32,)))

    def error(decoded: torch.Tensor) -> float:
        return ((inputs @ (weight - decoded.float())).norm() / (inputs @ weight).norm()).item()

    assert error(with_feedback) < 0.6 * error(rounded)


@pytest.mark.parametrize("groups", [(32,), (96,), (256,)], ids=str)
def test_errors_reach_every_row_after_them(groups):
    """The rounding of row i is that of GPTQ in float64, however groups and spans are cut."""
    inputs = correlated_inputs(3, 600, 320)
    weight = 0.05 * torch.randn(320, 40, generator=torch.Generator().manual_seed(4))
    hessian = prepared(inputs)
    layer = quantize(OPS, sort_rows(weight, hessian), 40, hessian, Mix((4,), groups))
    codes = layer.codes[:, :40].double() - 8
    exact, feedback = weight[hessian.perm].double(), hessian.feedback.double()
    scales = effective_scales(layer.qs, layer.scale_max[:, None])[:, :40].double()
    first = 0
    for group, scale in zip(layer.groups, scales, strict=True):
        for i in range(first, first + group.rows):
            position = (exact[i] / scale).clamp(-8, 7)
            assert (position - codes[i]).abs().max() < 0.501
            error = (exact[i] - codes[i] * scale) / feedback[i, i]
            exact[i + 1 :] -= feedback[i, i + 1 :, None] * error
        first += group.rows


@pytest.mark.parametrize("size", [5, 512, 513, 1100])
def test_the_feedback_is_the_factor_of_the_inverse(size):
    inputs = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(size))
    hessian = Hessian(size)
    for rows in inputs.split(700):
        hessian.add(rows)
    exact = inputs.double().T @ inputs.double() / len(inputs)
    torch.testing.assert_close(hessian.mean(), exact, rtol=1e-4, atol=1e-4)
    found = PreparedHessian(hessian)
    damped = exact[found.perm][:, found.perm]
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    feedback = found.feedback.double()
    assert torch.equal(feedback, feedback.triu())
    unit = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(feedback.T @ feedback @ damped, unit, rtol=0, atol=1e-3)


@pytest.mark.parametrize("bits", WIDTHS)
def test_plain_rounding_error_falls_fourfold_a_bit(bits):
    """Half a step of a grid over ±4 sigma bounds the error; searched scales must do better."""
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(8))
    nothing = PreparedHessian(Hessian(256))
    decoded = quantized(weight, nothing, Mix((bits,), (128,))).float()
    step = 8 / 2**bits
    assert (weight - decoded).square().mean() < step**2 / 12


def test_scales_of_zeros_and_of_one_wide_column():
    scale_max, levels = choose_scales(OPS, torch.zeros(32, 8), 4, torch.ones(32))
    assert scale_max > 0 and (scale_max / 256) > 0 and levels.min() >= 1
    rows = 0.01 * torch.randn(32, 100, generator=torch.Generator().manual_seed(1))
    rows[:, 77] *= 50
    scale_max, levels = choose_scales(OPS, rows, 4, torch.ones(32))
    assert levels[77] > 12 and levels.median() < 5


def test_degenerate_hessians_are_damped():
    weight = torch.randn(64, 32)
    one_direction = torch.ones(10, 64)
    one_direction[:, 5:] = 0
    for hessian in (prepared(one_direction), PreparedHessian(Hessian(64))):
        assert torch.isfinite(hessian.feedback).all()
        assert torch.isfinite(quantized(weight, hessian, Mix((4,), (32,)))).all()


def random_blocks(seed: int) -> tuple[list[list[Option]], int]:
    """Blocks with options of random sizes and errors, and a budget between the extremes."""
    rng = random.Random(seed)
    blocks = [
        [Option(rng.randint(1, 30), rng.random()) for _ in range(rng.randint(1, 5))]
        for _ in range(rng.randint(1, 5))
    ]
    least = sum(min(option.size for option in options) for options in blocks)
    most = sum(max(option.size for option in options) for options in blocks)
    return blocks, rng.randint(least, most)


@pytest.mark.parametrize("seed", range(60))
def test_allocation_is_the_best_of_all_choices(seed):
    blocks, budget = random_blocks(seed)
    chosen = [options[i] for options, i in zip(blocks, allocate(blocks, budget), strict=True)]
    fitting = [
        choice for choice in itertools.product(*blocks)
        if sum(option.size for option in choice) <= budget
    ]
    assert sum(option.size for option in chosen) <= budget
    best = min(sum(option.error for option in choice) for choice in fitting)
    assert sum(option.error for option in chosen) == pytest.approx(best, rel=1e-12)


def test_allocation_refuses_a_budget_below_the_smallest():
    with pytest.raises(InvalidSettings, match="at least 5"):
        allocate([[Option(2, 1.0), Option(9, 0.5)], [Option(3, 1.0)]], 4)


def test_efficient_options_leave_out_the_others():
    good = [Option(200, 10.0), Option(400, 1.0), Option(800, 0.1)]
    worse = [Option(390, 9.5), Option(500, 1.5)]
    assert efficient(good + worse) == [0, 1, 2]


def test_calibration_rows_are_cut_from_the_whole_file(tmp_path):
    tokenizer = Tokenizer.from_dir(REPO / "exl_loader" / "demo_model")
    text = "\n".join(f"line {i}" for i in range(2000))
    (tmp_path / "text").write_text(text)
    name, rows = calibration_rows(tokenizer, tmp_path / "text", 6, 50)
    assert name == "text" and [len(row) for row in rows] == [50] * 6
    prefix = tokenizer.prompt_ids("")
    assert all(row[: len(prefix)] == prefix for row in rows)
    # Numbers make every place of the text unique, but for the halves of lines at a row's ends.
    places = [text.find(tokenizer.decode(row[4:-4]).strip()) / len(text) for row in rows]
    # The first rows are from all over the text, and all rows reach from its beginning to its end.
    assert 0 <= min(places) < 0.02 and max(places) > 0.95
    assert max(places[:3]) - min(places[:3]) > 0.5


def test_default_calibration_has_every_kind_of_text_at_its_beginning():
    tokenizer = Tokenizer.from_dir(REPO / "exl_loader" / "demo_model")
    name, rows = calibration_rows(tokenizer, None, 16, 128)
    assert name == "(default)" and len(rows) == 16
    texts = [tokenizer.decode(row) for row in rows[:4]]
    assert "river" in texts[0] and "Python" not in texts[2]
    assert any("User:" in text or "Assistant:" in text for text in texts)
    assert len(set(map(tuple, rows))) == 16


def test_calibration_file_errors(tmp_path):
    tokenizer = Tokenizer.from_dir(REPO / "exl_loader" / "demo_model")
    with pytest.raises(InvalidSettings, match="missing.txt"):
        calibration_rows(tokenizer, tmp_path / "missing.txt", 4, 512)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidSettings, match="UTF-8"):
        calibration_rows(tokenizer, tmp_path / "binary", 4, 512)
    (tmp_path / "short").write_text("short")
    with pytest.raises(InvalidSettings, match="256 tokens"):
        calibration_rows(tokenizer, tmp_path / "short", 4, 512)


def test_shards_are_numbered_as_by_exllamav2(tmp_path):
    writer = ShardWriter(tmp_path, shard_bytes=1000)
    for i in range(5):
        writer.add({f"t{i}": torch.zeros(100)})
    writer.finish()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"output-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]


def test_failed_conversion_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(InvalidSettings, match="nothing is yet"), new_folder(tmp_path / "out"):
        pass


def test_weights_and_stale_settings_are_not_copied(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    for name in ("model.safetensors", "model.safetensors.index.json", "a.bin", "config.json",
                 "quantize_config.json", "tokenizer.model", "generation_config.json", ".lock"):
        (source / name).write_text("{}")
    (source / "folder").mkdir()
    copy_other_files(source, target)
    assert sorted(os.listdir(target)) == ["generation_config.json", "tokenizer.model"]
    assert json.loads((target / "generation_config.json").read_text()) == {}


@pytest.mark.parametrize("kind", SPECIAL_FILES)
def test_a_special_file_beside_the_weights_is_refused_before_the_work(tmp_path, kind, caplog):
    (tmp_path / "source").mkdir()
    SPECIAL_FILES[kind](tmp_path / "source" / "notes.txt")
    if kind == "folder":
        check_other_files(tmp_path / "source")
    elif kind == "sparse_file":
        # A complete file, but no tokenizer's: it is not copied, with a message.
        (tmp_path / "target").mkdir()
        check_other_files(tmp_path / "source")
        copy_other_files(tmp_path / "source", tmp_path / "target")
        assert not list((tmp_path / "target").iterdir())
        assert "notes.txt was not copied" in caplog.text
    else:
        with pytest.raises(InvalidSettings, match="notes.txt"):
            check_other_files(tmp_path / "source")


def test_a_config_with_a_lone_surrogate_is_written(tmp_path):
    config = {"_name_or_path": "caf\udce9", "model": "größe"}
    write_config(config, {"bits": 4}, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config.items() <= written.items()
