"""benchmarks/cpu/speed.py on a tiny model, without llama.cpp: its models, its runs, its report."""

from __future__ import annotations

import json
import math
import signal
from types import SimpleNamespace
from xml.dom import minidom

import pytest
import torch

from benchmarks.cpu import (
    speed,
    speed_models,
)
from benchmarks.cpu.contestants import Contestant, ContestantEnded, Worker
from benchmarks.cpu.plot import nice_step, write_picture
from benchmarks.cpu.report import (
    Results,
    nearest,
    picture_name,
    read_machines,
    read_share,
    speed_ratio,
    step_bytes,
    straight_line,
    tables,
    update_document,
)

TINY = speed_models.GEOMETRY | {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096,
}  # fmt: skip


def test_the_model_has_4_5_to_4_9_bits():
    # A layer, and the head's share of one in 22.
    config = speed_models.GEOMETRY | {"num_hidden_layers": 1, "vocab_size": 32000 // 22 // 32 * 32}
    tensors = speed_models.exl2_tensors(config, torch.Generator().manual_seed(0))
    assert 4.5 <= speed_models.bits_per_weight(tensors) <= 4.9


def test_decoded_weights_are_the_models(tmp_path):
    folder = speed_models.write_exl2(tmp_path / "exl2", TINY)
    decoded = dict(speed_models.decoded_tensors(folder))
    assert decoded["model.layers.0.mlp.down_proj.weight"].shape == (128, 256)
    assert decoded["lm_head.weight"].shape == (320, 128)
    assert len(decoded) == 2 + 2 + 7 + 1
    for name, weight in decoded.items():
        assert weight.dtype == torch.float16 and weight.isfinite().all(), name
    # Activations keep their size: weights of about 1 / sqrt(in_features).
    assert 0.5 < decoded["model.layers.0.mlp.up_proj.weight"].float().std() * 128**0.5 < 2


def test_measures_merges_and_reports(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(TINY))
    results = tmp_path / "results.json"
    common = ["--config", str(config), "--work", str(tmp_path), "--json", str(results),
              "--pictures", str(tmp_path), "--rounds", "1", "--machine", "A B (c)",
              "--document", str(tmp_path / "none.md")]  # fmt: skip
    speed.main([*common, "--part", "speed", "--cache", "q4", "--depth", "300"])
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nkill -ILL $$\n")
    broken.chmod(0o755)
    speed.main([*common, "--part", "load", "batch", "--cache", "q4", "--llama-python", str(broken)])
    (machine, records), = json.loads(results.read_text()).items()
    assert machine == "A B (c)"
    skipped = [r for r in records if r["what"] == "skipped"]
    records = [r for r in records if r["what"] != "skipped"]
    assert [r["engine"] for r in skipped] == ["llama.cpp"] and "SIGILL" in skipped[0]["reason"]
    assert {(r["what"], r["cache"], r.get("depth"), r.get("requests")) for r in records} == {
        ("decode", "q4", 300, None), ("decode", "fp16", 300, None), ("prefill", "q4", 300, None),
        ("prefill", "fp16", 300, None), ("load", "fp16", None, None), ("batch", "q4", None, 1),
        ("batch", "q4", None, 8),
    }  # fmt: skip
    assert all(min(r["seconds"]) > 0 for r in records)
    (load,) = [r for r in records if r["what"] == "load"]
    for seconds, tasks in zip(load["seconds"], load["tasks"], strict=True):
        assert set(tasks) == {"reserving memory", "loading weights"}
        assert 0 < sum(tasks.values()) < seconds
    printed = capsys.readouterr().out
    assert "Our quantised caches beside our own fp16" in printed
    assert "reading and repacking alone" in printed
    assert "**Skipped**" in printed and "SIGILL" in printed


def test_a_contestant_whose_process_ends_is_named(tmp_path):
    contestant = Contestant("exl_loader", "EXL2", "q4")
    with pytest.raises(ContestantEnded, match="^ended by exit code 1 at loading$") as caught:
        Worker(contestant, tmp_path / "none", 256, 1, None)
    assert caught.value.contestant == contestant
    assert "SIGILL at logits" in str(ContestantEnded(contestant, "logits", -signal.SIGILL))


class Ending:
    """A worker that ends at its n-th task; each task takes a second."""

    version = build = ""

    def __init__(self, weights: str, tasks: float):
        self.contestant = Contestant("llama.cpp", weights, "q4")
        self._left = tasks

    def do(self, task: str, **_) -> float:
        self._left -= 1
        if self._left < 0:
            raise ContestantEnded(self.contestant, task, -signal.SIGSEGV)
        return 1.0


def test_a_contestant_that_ends_is_left_out_and_the_others_go_on(tmp_path):
    bench = speed.Bench.__new__(speed.Bench)
    bench.results, bench.ended, bench.threads = Results(tmp_path / "r.json", "m"), set(), 1
    bench.bandwidth = SimpleNamespace(measure=lambda: 1.0)
    bench.bytes_per_token = dict.fromkeys(("A", "B", "C"), 1)
    bench.cache_bytes, bench.models = {"q4": 1.0}, {"EXL2": None, "A": None, "B": None}
    workers = [Ending("A", math.inf), Ending("B", 1), Ending("C", math.inf)]
    bench.take_turns(workers, "decode", 3, {"depth": 0, "tokens": 1})
    found = {r["weights"]: len(r["seconds"]) for r in bench.results.select(what="decode")}
    assert found == {"A": 3, "C": 3}
    (skipped,) = bench.results.select(what="skipped")
    assert (skipped["weights"], skipped["reason"]) == ("B", "ended by SIGSEGV at decode")
    assert [c.weights for c in bench.contestants("q4")] == ["EXL2", "EXL2", "A"]
    # A later measurement of the same takes the place of the failure.
    bench.take_turns([Ending("B", math.inf)], "decode", 1, {"depth": 0, "tokens": 1})
    assert not bench.results.select(what="skipped")


def test_machines_are_kept_apart(tmp_path):
    path, document = tmp_path / "r.json", tmp_path / "d.md"
    for machine, seconds in (("One", 1.0), ("Two", 2.0), ("One", 4.0)):
        results = Results.read(path, machine)
        results.put(record("exl_loader", "EXL2", [seconds]))
        results.put(record("llama.cpp", "Q4_0", [8.0]))
        results.write()
    machines = read_machines(path)
    assert [found.machine for found in machines] == ["One", "Two"]
    assert [found.select(engine="exl_loader")[0]["seconds"] for found in machines] == [[4.0], [2.0]]
    document.write_text("a\n<!-- cpu -->\n<!-- end cpu -->\nb\n")
    assert picture_name("Two (x), 2") == "benchmarks-cpu-two-x-2.svg"
    (tmp_path / "images").mkdir()
    write_picture(machines[1], tmp_path / "images" / picture_name("Two"))
    update_document(machines, document)
    text = document.read_text()
    assert text.index("### One") < text.index("2.00 (2.00") < text.index("### Two")
    assert text.index("### Two") < text.index("4.00 (4.00")
    assert "(images/benchmarks-cpu-two.svg)" in text and "cpu-one.svg" not in text


def record(engine: str, weights: str, seconds: list[float], **fields) -> dict:
    return {
        "what": "decode", "engine": engine, "weights": weights, "cache": "q4", "depth": 100,
        "beside": "q4", "tokens": 10, "seconds": seconds,
        "read_bytes_per_s": [5000.0] * len(seconds),
        "weight_bytes_per_token": 500, "cache_bytes_per_token": 2.0, **fields,
    }  # fmt: skip


def test_ratios_are_of_pairs(tmp_path):
    ours = record("exl_loader", "EXL2", [1.0, 2.0, 4.0])
    theirs = record("llama.cpp", "Q4_0", [2.0, 8.0, 4.0])
    assert speed_ratio(ours, theirs) == (2.0, 1.0, 4.0)
    assert step_bytes(ours) == 500 + 2 * 105
    assert read_share(ours) == pytest.approx(710 * 10 / 2 / 5000)


def test_the_nearest_size_is_compared():
    assert nearest({"EXL2": 600, "Q4_0": 590, "Q4_K_M": 640}) == "Q4_0"
    assert nearest({"EXL2": 630, "Q4_0": 590, "Q4_K_M": 640}) == "Q4_K_M"
    assert nearest({"EXL2": 600}) is None


def test_a_new_result_takes_the_old_ones_place(tmp_path):
    path = tmp_path / "r.json"
    results = Results(path, "m")
    results.put(record("exl_loader", "EXL2", [1.0]))
    results.put(record("exl_loader", "EXL2", [2.0]))
    results.put(record("exl_loader", "EXL2", [3.0], depth=200))
    results.write()
    read = Results.read(path, "m")
    assert [r["seconds"] for r in read.select(engine="exl_loader")] == [[2.0], [3.0]]


def test_table_and_picture(tmp_path):
    results = Results(tmp_path / "r.json", "m")
    for beside in ("q4", "curve"):
        for depth in (0, 2048):
            ours = record("exl_loader", "EXL2", [1.0, 1.0], depth=depth, beside=beside)
            results.put(ours)
            results.put(record("llama.cpp", "Q4_0", [3.0, 3.0], depth=depth, beside=beside))
    document = tmp_path / "d.md"
    document.write_text("before\n<!-- cpu -->\nold\n<!-- end cpu -->\nafter\n")
    update_document([results], document)
    before, after = document.read_text().split(tables(results))
    assert before == "before\n<!-- cpu -->\n### m\n\n"
    assert after == "\n<!-- end cpu -->\nafter\n"
    assert "| q4 | 2,048 | 10.0 | Q4_0 3.3 | 3.00 (3.00 to 3.00) | ≥ 2.5 |" in tables(results)
    picture = tmp_path / "p.svg"
    write_picture(results, picture)
    drawn = minidom.parse(str(picture))
    assert len(drawn.getElementsByTagName("polyline")) == 2
    assert len(drawn.getElementsByTagName("rect")) == 1 + 2


def test_distance_from_a_straight_line():
    assert straight_line({0: 20.0, 1000: 22.0, 3000: 26.0}) == pytest.approx((0.002, 20.0, 0.0))
    assert straight_line({0: 10.0, 1000: 10.0, 2000: 40.0})[2] > 0.3


@pytest.mark.parametrize("largest, steps, step", [(42, 5, 10), (9.9, 5, 2), (1.0, 5, 0.2)])
def test_axis_steps(largest, steps, step):
    assert nice_step(largest, steps) == pytest.approx(step)
