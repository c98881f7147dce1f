"""Keys of quantization configs: read, ignored, warned about, or refused by name."""

from __future__ import annotations

import json

import pytest
import torch

from exl_loader.checkpoint import Checkpoint
from exl_loader.utils.errors import InvalidConfig, UnsupportedFormat
from support.makers import quantization_config, write_folder

ABSENT = object()


def settings_of(tmp_path, settings, format="gptq"):
    """Open a folder with one tensor of the format and these settings."""
    tensor = "a.q_weight" if format == "exl2" else "a.qweight"
    config = quantization_config(format) | settings
    config = {key: value for key, value in config.items() if value is not ABSENT}
    write_folder(tmp_path / "m", {tensor: torch.zeros(1)}, {"quantization_config": config})
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        return checkpoint.quantization


@pytest.mark.parametrize("key", ["format", "checkpoint_format"])
@pytest.mark.parametrize(
    ("value", "layout"),
    [("gptq", "gptq"), ("GPTQ", "gptq"), ("gptq_v2", "gptq_v2"), ("GPTQ_V2", "gptq_v2"),
     ("Gptq-v2", "gptq_v2"), (" gptq_v2 ", "gptq_v2"), (None, "gptq")],
)
def test_both_keys_of_the_layout_in_any_case(tmp_path, key, value, layout):
    assert settings_of(tmp_path, {key: value}).layout == layout
    assert settings_of(tmp_path, {key.upper(): value}).layout == layout


@pytest.mark.parametrize("key", ["format", "checkpoint_format"])
@pytest.mark.parametrize(
    "value", ["gptq_p", "marlin", "bitblas", "gemm", "exllama", "GPTQ_P", 2, []]
)
def test_other_layouts_are_refused_by_name(tmp_path, key, value):
    with pytest.raises(UnsupportedFormat) as caught:
        settings_of(tmp_path, {key: value})
    assert str(caught.value).startswith(f"{key} in") and repr(value) in str(caught.value)


def test_the_current_key_wins_over_the_older_one(tmp_path, caplog):
    both = {"format": "gptq_v2", "checkpoint_format": "gptq"}
    assert settings_of(tmp_path, both).layout == "gptq_v2"
    assert "format says gptq_v2, the older key checkpoint_format says gptq" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rotation", "hadamard"), ("rotation", "random"), ("Rotation", "hadamard"),
        ("rotation_config", {"block_size": 32}), ("adapter", {"path": "x", "rank": 64}),
        ("act_bits", 8), ("act_bits", "8"), ("act_bits", 4.0), ("pack_dtype", "int16"),
        ("data_type", "mx_fp"), ("data_type", "int_asym_float_zp"), ("super_bits", 6),
        ("kv_cache_scheme", {"num_bits": 8}), ("activation_scheme", "dynamic"),
        ("static_kv_dtype", "fp8"), ("transform_config", {"R1": {}}),
    ],
)
@pytest.mark.parametrize("format", ["gptq", "exl2"])
def test_keys_that_change_the_arithmetic_are_refused_by_name(tmp_path, format, key, value):
    with pytest.raises(UnsupportedFormat, match=f"^{key.lower()} in the quantization config"):
        settings_of(tmp_path, {key: value}, format)


@pytest.mark.parametrize("where", ["dynamic", "extra_config"])
def test_a_single_layer_cannot_change_the_arithmetic_either(tmp_path, where):
    own = {"model.layers.3.mlp.down_proj": {"bits": 8, "act_bits": 8}}
    with pytest.raises(UnsupportedFormat, match=f"^{where} of 'model.*: act_bits in"):
        settings_of(tmp_path, {where: own})
    own = {"-:lm_head": {}, "+:.*down.*": {"bits": 8, "sym": True}, "k": False}
    assert settings_of(tmp_path, {where: own}).per_layer


def test_a_single_layer_cannot_have_its_own_layout(tmp_path):
    own = {"+:.*up.*": {"format": "gptq_v2"}}
    with pytest.raises(UnsupportedFormat, match=r"^dynamic of '\+:.*format in.*'gptq_v2'"):
        settings_of(tmp_path, {"dynamic": own})
    assert settings_of(tmp_path, {"dynamic": own, "format": "gptq_v2"}).layout == "gptq_v2"


def test_data_type_of_an_unquantised_layer_is_ignored(tmp_path):
    settings_of(tmp_path, {"extra_config": {"lm_head": {"bits": 16, "data_type": "float"}}})
    with pytest.raises(UnsupportedFormat, match="data_type"):
        settings_of(tmp_path, {"extra_config": {"lm_head": {"bits": 8, "data_type": "fp"}}})


@pytest.mark.parametrize(
    "settings",
    [
        {"rotation": None, "adapter": None, "act_bits": None, "pack_dtype": "int32"},
        {"rotation": "", "adapter": {}, "act_bits": 16, "pack_dtype": "torch.int32"},
        {"act_bits": 32, "data_type": "int", "super_bits": None, "act_dynamic": True},
        {"damp_percent": 0.01, "true_sequential": True, "static_groups": False, "meta": {"a": 1}},
        {"model_seqlen": 4096, "use_exllama": True, "dataset": None, "backend": "auto"},
        {"autoround_version": "0.16.1", "iters": 200, "enable_quanted_input": True},
    ],
)
@pytest.mark.parametrize("format", ["gptq", "exl2"])
def test_neutral_and_harmless_keys_are_ignored(tmp_path, caplog, format, settings):
    settings_of(tmp_path, settings, format)
    assert not caplog.records


@pytest.mark.parametrize("format", ["gptq", "exl2"])
def test_an_unknown_key_is_warned_about_once(tmp_path, caplog, format):
    for _ in range(2):
        settings_of(tmp_path, {"quantum_foam": True, "zeta": 1}, format)
    (record,) = caplog.records
    assert "does not know ['quantum_foam', 'zeta']" in record.message
    assert str(tmp_path) in record.message


def test_exl2_beside_the_settings_of_its_source_is_reported(tmp_path, caplog):
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    assert settings_of(tmp_path, settings, "exl2").values == {}
    assert "declares fp8, but the weights are EXL2" in caplog.text


@pytest.mark.parametrize("method", ["auto-round", "auto_round", "intel/auto-round", "AutoRound"])
@pytest.mark.parametrize(
    ("key", "packing", "layout"),
    [
        ("packing_format", "auto_round:auto_gptq", "gptq"),
        ("packing_format", "auto_round:gptq", "gptq"),
        ("packing_format", "auto_round:gptqmodel", "gptq_v2"),
        ("packing_format", "auto_round", "gptq_v2"),
        ("packing_format", "auto_round:exllamav2", "gptq_v2"),
        ("backend", "auto_round:auto_gptq:exllamav2", "gptq"),
        ("backend", "gptq:exllamav2", "gptq"),
        ("backend", "auto", "gptq"),
        ("packing_format", None, "gptq"),
        ("packing_format", "auto_round:auto_awq", "gptq_v2"),
        ("packing_format", "auto_round:awq", "gptq_v2"),
    ],
)
def test_packings_of_auto_round(tmp_path, method, key, packing, layout):
    settings = {"quant_method": method, key: packing, "desc_act": ABSENT}
    found = settings_of(tmp_path, settings)
    assert found.layout == layout and found.packs_columns == ("awq" in (packing or ""))


@pytest.mark.parametrize(
    "packing", ["auto_round:auto_gguf", "auto_round:llm_compressor", "auto_round:fp8_static", "mlx",
                "auto_round:marlin", 7]
)
def test_other_packings_are_refused_by_name(tmp_path, packing):
    settings = {"quant_method": "auto-round", "packing_format": packing}
    with pytest.raises(UnsupportedFormat, match="^packing_format in") as caught:
        settings_of(tmp_path, settings)
    assert repr(packing) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"bits": "4"}, (4, 128, False)),
        ({"bits": ABSENT, "wbits": 3, "group_size": ABSENT, "groupsize": "64"}, (3, 64, False)),
        ({"bits": ABSENT, "w_bit": 8, "sym": ABSENT, "zero_point": False}, (8, 128, True)),
        ({"bits": 4.0, "group_size": "-1", "sym": "true"}, (4, -1, True)),
        ({"sym": None}, (4, 128, None)),
        ({"sym": True, "extra_config": {"a": {"bits": 8}}}, (4, 128, None)),
    ],
)
def test_numbers_and_flags_in_several_spellings(tmp_path, settings, expected):
    found = settings_of(tmp_path, settings)
    assert (found.bits, found.group_size, found.sym) == expected


@pytest.mark.parametrize(
    "settings",
    [{"bits": "four"}, {"bits": [4]}, {"bits": 1e300}, {"bits": 4.5}, {"group_size": "x" * 5000},
     {"sym": 3}, {"desc_act": "maybe"}, {"dynamic": [1]}, {"extra_config": "x"}, {"bits": True},
     {"bits": "9" * 4000}],
)
def test_settings_of_the_wrong_type_are_refused(tmp_path, settings):
    with pytest.raises(InvalidConfig, match=f"^{next(iter(settings))} in the quantization config"):
        settings_of(tmp_path, settings)


def test_settings_in_a_separate_file_are_checked_as_well(tmp_path):
    write_folder(tmp_path / "m", {"a.qweight": torch.zeros(1)}, {})
    (tmp_path / "m/quantize_config.json").write_text(json.dumps({"bits": 4, "rotation": "x"}))
    with pytest.raises(UnsupportedFormat, match="^rotation in"):
        Checkpoint.open(tmp_path / "m")


def test_settings_of_auto_rounds_own_file(tmp_path):
    write_folder(tmp_path / "m", {"a.qweight": torch.zeros(1)}, {})
    settings = {"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel", "bits": 2}
    (tmp_path / "m/quantization_config.json").write_text(json.dumps(settings))
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        assert (checkpoint.quantization.layout, checkpoint.quantization.bits) == ("gptq_v2", 2)
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        assert (checkpoint.quantization.method, checkpoint.quantization.bits) == ("gptq", 4)


def test_the_layout_in_config_json_wins_over_a_separate_file(tmp_path):
    own = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 4}
    write_folder(tmp_path / "m", {"a.qweight": torch.zeros(1)}, {"quantization_config": own})
    (tmp_path / "m/quantize_config.json").write_text('{"format": "gptq", "group_size": 64}')
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        assert checkpoint.quantization.layout == "gptq_v2"
        assert checkpoint.quantization.group_size == 64


def test_a_file_of_another_method_is_ignored(tmp_path):
    own = {"quant_method": "exl2", "bits": 4.5}
    write_folder(tmp_path / "m", {"a.q_weight": torch.zeros(1)}, {"quantization_config": own})
    (tmp_path / "m/quantize_config.json").write_text('{"bits": 4, "rotation": "hadamard"}')
    with Checkpoint.open(tmp_path / "m") as checkpoint:
        assert checkpoint.quantization.values == own
