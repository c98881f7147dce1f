"""The benchmark of conversions: one width everywhere, stored bits, divergences, tables."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks.cpu import conversion_time
from benchmarks.cpu.conversion import (
    Result,
    divergences,
    file_types,
    interpolated,
    one_width,
    stored_bits,
    tables,
)
from benchmarks.cpu.conversion_plot import write_picture
from benchmarks.cpu.ggml_types import FILE_TYPES, IMPORTANCE_FILE_TYPES, stored_type
from exl_loader.convert import conversion, convert, measurement
from exl_loader.convert.mixes import Mix
from exl_loader.convert.source import Source


@pytest.mark.usefixtures("one_thread")
def test_one_width_everywhere_is_a_measurement(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("EXL_LOADER_REFERENCE", "1")
    monkeypatch.setattr(conversion, "MOST_BITS", 16)
    folder = tiny_model()
    source = Source(folder)
    path = tmp_path / "one-width.json"
    path.write_text(json.dumps(one_width(source, Mix((5,), (32,)))))
    result = convert(folder, tmp_path / "exl2", bits=12, measurement=path, calibration_rows=2,
                     calibration_row_len=32)
    assert {mix.bits for mix in result.layers.values()} == {(5,)}
    assert stored_bits(source, tmp_path / "exl2") == pytest.approx(result.bits_per_weight)
    source.close()


def test_divergences_are_means_over_the_windows_of_a_text():
    same = torch.log_softmax(torch.zeros(4, 2), -1)
    other = torch.log(torch.tensor([[0.25, 0.75]])).expand(4, 2)
    expected = [("a", same), ("a", same), ("b", same)]
    found = divergences(expected, [("a", same), ("a", other), ("b", other)])
    nats = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert found == {"a": pytest.approx(nats / 2), "b": pytest.approx(nats)}


def test_half_of_the_layers_get_more_bits_in_a_medium_file_type():
    rule = FILE_TYPES["Q4_K_M"]
    names = [rule("down_proj", layer, 32) for layer in range(32)]
    # The first and the last eighth, and every third layer between them.
    assert [layer for layer, name in enumerate(names) if name == "Q6_K"] == [
        *range(4), 6, 9, 12, 15, 18, 21, 24, 27, *range(28, 32)
    ]
    assert set(names) == {"Q4_K", "Q6_K"} and rule("up_proj", 0, 32) == "Q4_K"


def test_early_layers_get_other_types_with_an_importance_matrix():
    plain, weighted = FILE_TYPES, IMPORTANCE_FILE_TYPES
    for name, early, without in (("IQ4_NL", "IQ4_NL", "Q5_K"), ("Q4_0", "Q4_1", "Q4_0")):
        assert weighted[name]("down_proj", 3, 32) == early
        assert plain[name]("down_proj", 3, 32) == without
        assert weighted[name]("down_proj", 4, 32) == plain[name]("down_proj", 4, 32) == name
    assert weighted["Q4_K_M"]("v_proj", 0, 32) == "Q6_K"


def test_rows_that_do_not_fit_large_blocks_get_another_type():
    assert stored_type("Q4_K", 576) == "Q5_0" and stored_type("Q4_K", 1536) == "Q4_K"
    assert stored_type("Q4_0", 576) == "Q4_0"


def test_results_between_two_sizes_are_interpolated_by_their_logarithms():
    results = [Result(bits, {"a": 10.0**-bits}) for bits in (4.0, 3.0, 6.0)]
    for bits in (3.0, 3.1, 4.5, 6.0, 6.1):
        assert interpolated(results, bits) == pytest.approx(10.0**-bits)
    assert interpolated(results, 6.2) is None


def test_tables_compare_at_the_bits_of_one_width():
    chosen = [Result(bits, {"prose": 0.4**bits, "code": 0.4**bits}) for bits in (3.0, 4.0)]
    other = Result(4.1, {"prose": 2 * 0.4**4.1, "code": 2 * 0.4**4.1})
    found = tables(chosen, {"4": other}, {})
    assert found.keys() == {"sizes", "one width"}
    assert found["sizes"].splitlines()[2] == "| 3.000 | 0.0640 | 0.0640 | 0.0640 |"
    assert found["one width"].splitlines()[-1].endswith("| 0.50 |")
    types = {one: other for one in file_types() if one.name == "Q4_0"}
    found = tables(chosen, {"4": other}, types)
    for key in ("llama.cpp", "importance"):
        (row,) = found[key].splitlines()[2:]
        assert row.startswith("| Q4_0 | 4.100 |") and row.endswith("| 0.50 |")


def test_the_picture_has_a_ring_for_each_type_with_an_importance_matrix(tmp_path):
    chosen = [Result(bits, {"prose": 0.4**bits}) for bits in (3.0, 6.0)]
    types = {one: Result(4 + i / 20, {"prose": 0.1}) for i, one in enumerate(file_types())}
    write_picture(chosen, {"3": chosen[0], "6": chosen[1]}, types, tmp_path / "p.svg")
    drawn = (tmp_path / "p.svg").read_text()
    assert drawn.count('r="3.5" fill="none"') == len(FILE_TYPES)
    assert all(f">{name}</text>" in drawn for name in FILE_TYPES)


@pytest.mark.usefixtures("one_thread")
def test_the_layers_of_a_conversion_are_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measurement, "MIXES", [measurement.PROBE])
    small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 2048, "num_hidden_layers": 2,
             "max_position_embeddings": 64}
    conversion_time.write_model(tmp_path / "m", conversion_time.GEOMETRY | small)
    conversion_time.measure(tmp_path / "m", layers=2, rows=4)
    lines = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == [f"{step} layer {i}" for step in ("measuring", "quantising") for i in (0, 1)]
