"""The converter: bits in the file, errors on correlated inputs, bit widths, whole folders."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

from exl_loader.convert.allocation import Option, allocate, efficient_options
from exl_loader.convert.calibration import calibration_rows, calibration_text
from exl_loader.convert.error_feedback import Hessian, PreparedHessian, quantize, relative_error
from exl_loader.convert.packing import (
    QuantizedLinear,
    dequantize,
    exl2_tensors,
    pack_codes,
    pack_scales,
    stored_bits,
)
from exl_loader.convert.scales import choose_scales
from exl_loader.convert.writer import (
    ShardWriter,
    check_other_files,
    copy_other_files,
    new_folder,
    write_config,
)
from exl_loader.utils.errors import InvalidSettings
from support.special_files import SPECIAL_FILES

WIDTHS = (2, 3, 4, 5, 6, 8)


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


def random_layer(seed: int, in_features: int, out_features: int, bits: int, group_size: int):
    generator = torch.Generator().manual_seed(seed)
    columns = -(-out_features // 32) * 32
    groups = -(-in_features // group_size)
    return QuantizedLinear(
        bits=bits,
        group_size=group_size,
        codes=torch.randint(0, 2**bits, (in_features, columns), generator=generator).byte(),
        qs=torch.randint(1, 17, (groups, columns), generator=generator),
        scale_max=(torch.rand(groups, generator=generator) + 0.1).half(),
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


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(128, 32, 32), (176, 40, 128), (96, 33, 64)])
def test_layer_round_trip_is_exact(seed, bits, shape):
    in_features, out_features, group_size = shape
    layer = random_layer(seed, in_features, out_features, bits, group_size)
    tensors = by_role(exl2_tensors("p", layer), "p")
    decoded = decode_exl2(tensors, out_features)
    assert (decoded == dequantize(layer).numpy()).all()
    total_bits = sum(8 * t.numel() * t.element_size() for t in tensors.values())
    assert total_bits == stored_bits(in_features, out_features, bits, group_size)


def test_tensors_have_the_dtypes_of_the_format():
    layer = random_layer(3, 64, 40, 4, 32)
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
    with_feedback = dequantize(quantize(weight, hessian, bits, 32))
    rounded = dequantize(quantize(weight, nothing, bits, 32))

    def error(decoded: torch.Tensor) -> float:
        return ((inputs @ (weight - decoded.float())).norm() / (inputs @ weight).norm()).item()

    assert error(with_feedback) < 0.6 * error(rounded)
    assert relative_error(weight, with_feedback, hessian) == pytest.approx(
        error(with_feedback) ** 2, rel=1e-3
    )


@pytest.mark.parametrize("bits", WIDTHS)
def test_plain_rounding_error_falls_fourfold_a_bit(bits):
    """Half a step of a grid over ±4 sigma bounds the error; searched scales must do better."""
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(8))
    decoded = dequantize(quantize(weight, PreparedHessian(Hessian(256)), bits, 128)).float()
    step = 8 / 2**bits
    assert (weight - decoded).square().mean() < step**2 / 12


def test_scales_of_zeros_and_of_one_wide_column():
    scale_max, levels = choose_scales(torch.zeros(32, 8), 4, torch.ones(32))
    assert scale_max > 0 and (scale_max / 256) > 0 and levels.min() >= 1
    rows = 0.01 * torch.randn(32, 100, generator=torch.Generator().manual_seed(1))
    rows[:, 77] *= 50
    scale_max, levels = choose_scales(rows, 4, torch.ones(32))
    assert levels[77] > 12 and levels.median() < 5


def test_degenerate_hessians_are_damped():
    weight = torch.randn(64, 32)
    one_direction = torch.ones(10, 64)
    one_direction[:, 5:] = 0
    for hessian in (prepared(one_direction), PreparedHessian(Hessian(64))):
        assert torch.isfinite(hessian.feedback).all()
        assert torch.isfinite(dequantize(quantize(weight, hessian, 4, 32))).all()


def test_allocation_meets_the_budget_and_prefers_large_gains():
    def options(weight: float) -> list[Option]:
        return [Option(b, 128, b * 1000, weight * 4.0**-b) for b in WIDTHS]

    measured = {"fragile": options(100.0), "robust": options(1.0), "plain": options(10.0)}
    chosen = allocate(measured, 3000, 4.5)
    assert sum(option.stored_bits for option in chosen.values()) <= 4.5 * 3000
    assert chosen["fragile"].bits > chosen["plain"].bits >= chosen["robust"].bits
    assert {option.bits for option in allocate(measured, 3000, 8).values()} == {8}
    assert {option.bits for option in allocate(measured, 3000, 2).values()} == {2}
    with pytest.raises(InvalidSettings, match=r"at least 2\.00"):
        allocate(measured, 3000, 1.9)


def test_efficient_options_leave_out_the_others():
    good = [Option(2, 128, 200, 10.0), Option(4, 128, 400, 1.0), Option(8, 128, 800, 0.1)]
    worse = [Option(3, 32, 390, 9.5), Option(5, 32, 500, 1.5)]
    assert efficient_options(good + worse) == good


def test_calibration_rows_are_evenly_spaced_and_begin_with_the_prefix():
    def encode(text: str) -> list[int]:
        return [1, *text.encode()]

    rows = calibration_rows(encode, "abcdefghij" * 100, 4, 51)
    assert [len(row) for row in rows] == [51] * 4 and all(row[0] == 1 for row in rows)
    assert bytes(rows[-1][1:]) == b"abcdefghij" * 5
    with pytest.raises(InvalidSettings, match="256 tokens"):
        calibration_rows(encode, "short", 4, 512)


def test_calibration_file_errors(tmp_path):
    name, text = calibration_text(None)
    assert name == "(default)" and len(text) > 100_000
    with pytest.raises(InvalidSettings, match="missing.txt"):
        calibration_text(tmp_path / "missing.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidSettings, match="UTF-8"):
        calibration_text(tmp_path / "binary")


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
