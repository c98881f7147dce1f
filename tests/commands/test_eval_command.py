"""`python -m exl_loader eval`, and the divergence of cache types on the demo model."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from exl_loader import load
from exl_loader.cache.layout import MAX_BIAS_PAIRS, CacheType
from exl_loader.checkpoint.config import ModelConfig
from exl_loader.commands.cli import main
from exl_loader.commands.eval import HEADINGS, render
from exl_loader.commands.evaluation import (
    Divergence,
    cut_text,
    evaluate,
    mean_of_windows,
    run_lanes,
)
from exl_loader.commands.evaluation_plan import parse_cache_types, plan_evaluation
from exl_loader.commands.model_options import DEMO_MODEL
from exl_loader.memory.buffers import live_bytes
from exl_loader.utils.errors import InsufficientMemory, InvalidSettings, ModelUnloaded
from exl_loader.utils.progress import NullProgress
from support.tiny import write_tiny_model

CONFIG = ModelConfig.from_dir(DEMO_MODEL)
TEXT = "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n"


def planned(names, ctx_size=256, **options):
    return plan_evaluation(
        str(DEMO_MODEL), parse_cache_types(names), config=CONFIG, ctx_size=ctx_size, **options
    )


@pytest.fixture(scope="module")
def model():
    with load(DEMO_MODEL, ctx_size=256) as loaded:
        yield loaded


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.py"
    path.write_text(TEXT * 12, encoding="utf-8")
    return path


def test_results_equal_those_of_separately_loaded_models(model):
    ids = model.encode(TEXT * 5, add_bos=False)
    bos = model.tokenizer.bos_token_id
    results = evaluate(model, planned("q4"), [ids]).together
    assert [result.cache_type for result in results] == ["fp16", "q4"]
    nats, agreeing, losses = [], 0, {"fp16": [], "q4": []}
    with load(DEMO_MODEL, ctx_size=256, cache_type="q4") as other:
        for piece in cut_text(ids, [bos], 256):
            logs = {}
            for name, one in (("fp16", model), ("q4", other)):
                rows = one.prompt_logits(piece[:-1]).double()
                logs[name] = rows.log_softmax(dim=-1)
                losses[name] += (-logs[name][range(len(rows)), piece[1:]]).tolist()
            p, q = logs["fp16"], logs["q4"]
            nats += (p.exp() * (p - q)).sum(-1).tolist()
            agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
    assert len(nats) == len(ids)
    for result in results:
        expected = math.exp(sum(losses[result.cache_type]) / len(ids))
        assert result.perplexity == pytest.approx(expected, rel=1e-9)
    assert results[0].divergence is None
    found = results[1].divergence
    assert found.mean == pytest.approx(np.mean(nats), rel=1e-5)
    assert found.median == pytest.approx(np.median(nats), rel=1e-5)
    assert found.percentile_99_9 == pytest.approx(np.percentile(nats, 99.9), rel=1e-5)
    assert found.largest == pytest.approx(max(nats), rel=1e-5)
    assert found.top1_agreement == agreeing / len(ids)


def test_keys_are_rounded_as_in_a_model_of_their_type(model):
    found = {}

    def matrices(cache):
        return [layer.key_feedback for layer in cache.layers]

    def look(lanes):
        for lane in lanes:
            found[lane.name] = [m if m is None else m.clone() for m in matrices(lane.cache)]
        yield

    for _ in run_lanes(model, planned("q4,q6,q8"), look):
        pass
    assert found.pop("fp16") == found.pop("q8") == [None] * 5
    for name, of_lane in found.items():
        with load(DEMO_MODEL, ctx_size=256, cache_type=name) as other:
            def compare(_, cache, of_lane=of_lane):
                yield all(map(torch.equal, matrices(cache), of_lane))

            assert list(other.run_alone(compare)) == [True]
        assert all(m.any() for m in of_lane)


def test_more_bits_diverge_less():
    """On a text of three pages, because q6 and q8 store an open page in the same 16 bits."""
    with load(DEMO_MODEL, ctx_size=600) as model:
        ids = model.encode(TEXT * 30, add_bos=False)[:599]
        plan = planned("q4,q6,q8,fp32", ctx_size=600)
        results = evaluate(model, plan, [ids]).together[1:]
    means = [result.divergence.mean for result in results]
    assert means == sorted(means, reverse=True)
    assert 0 < means[-1] < 1e-7 and means[2] < 1e-4 and means[0] < 1e-2


def test_memory_equals_the_plan_and_is_freed(model):
    before = live_bytes()
    plan = planned("q8,q4")
    seen = []

    class Watching(NullProgress):
        def advance(self, *_):
            seen.append(live_bytes())

    evaluate(model, plan, [model.encode(TEXT, add_bos=False)], Watching())
    assert set(seen) == {before + plan.extra_bytes}
    # 256 tokens of each type, and an open page with its first token: 16 bits beside 8, 8 beside 4.
    per_token = sum(kind.bytes_per_token(2, 64) for kind in plan.others) * 5
    in_open_page = sum(CacheType.parse(name).bytes_per_token(2, 64) for name in ("fp16", "q8")) * 5
    # The scales of first keys, and those of first values, take 40 of 64 bytes.
    padding = 2 * 24
    # Of a key/value head: its matrix, its mean, and room for a bias.
    of_keys = 5 * 2 * (64 * 64 * 2 + 64 * 4 + 3 * MAX_BIAS_PAIRS * 4)
    assert plan.extra_bytes == per_token * 256 + in_open_page * 257 + padding + of_keys
    assert live_bytes() == before


def test_a_second_comparison_gives_the_same_with_dynamic_rope(tmp_path):
    """All lanes write each slot's frequencies to one workspace."""
    folder = write_tiny_model(
        tmp_path / "model", max_position_embeddings=64,
        rope_scaling={"rope_type": "dynamic", "factor": 2.0},
    )
    config = ModelConfig.from_dir(folder)
    plan = plan_evaluation(str(folder), parse_cache_types("q8"), config=config, ctx_size=256)
    ids = [7 * i % 250 + 3 for i in range(200)]
    with load(folder, ctx_size=256) as loaded:
        logits = loaded.prompt_logits(ids)
        first = evaluate(loaded, plan, [ids])
        assert evaluate(loaded, plan, [ids]) == first
        assert torch.equal(loaded.prompt_logits(ids), logits)


def test_an_unloaded_model_frees_the_caches():
    with load(DEMO_MODEL, ctx_size=256) as loaded:
        ids = loaded.encode(TEXT, add_bos=False)
    before = live_bytes()
    with pytest.raises(ModelUnloaded):
        evaluate(loaded, planned("q4"), [ids])
    assert live_bytes() == before


def test_caches_that_do_not_fit_are_refused_before_anything_is_taken():
    alone = planned("fp16").reservation.devices[0].total_bytes
    extra = planned("q4").extra_bytes
    exact = alone + -(-extra // 4096) * 4096
    assert planned("q4", memory_limit=str(exact)).extra_bytes == extra
    with pytest.raises(InsufficientMemory, match="1 bytes fewer"):
        planned("q4", memory_limit=str(exact - 1))


@pytest.mark.parametrize("bos", [[], [1]])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 16, 17])
def test_every_token_is_predicted_once(bos, count):
    ids = list(range(10, 10 + count))
    pieces = list(cut_text(ids, bos, 8))
    targets = [target for piece in pieces for target in piece[1:]]
    assert targets == ids[0 if bos else 1 :]
    for piece in pieces:
        assert 2 <= len(piece) <= 9
        assert piece[: len(bos)] == bos


def test_divergence_of_known_numbers():
    found = Divergence.from_nats([np.array([0.0, 1.0]), np.array([2.0, 5.0])], [1, 2])
    assert (found.mean, found.median, found.largest) == (2.0, 1.5, 5.0)
    assert found.top1_agreement == 0.75
    # Of equal windows the error is that of the mean of their means: 0.5 and 3.5, 0.5 and 1.
    assert found.standard_error == pytest.approx(np.std([0.5, 3.5], ddof=1) / 2**0.5)
    assert found.top1_error == pytest.approx(np.std([0.5, 1], ddof=1) / 2**0.5)
    assert found.percentile_99_9 == pytest.approx(4.991)


def test_one_window_has_no_standard_error():
    assert mean_of_windows([6.0], [4]) == (1.5, None)
    found = Divergence.from_nats([np.array([0.0, 1.0])], [1])
    assert found.standard_error is None and found.top1_error is None


def test_the_standard_error_is_what_resampled_texts_show():
    """Tokens of a window are alike, so their number says little about the confidence."""
    rng = np.random.default_rng()
    means, errors = [], []
    for _ in range(400):
        counts = rng.integers(50, 100, 12)
        levels = rng.exponential(1.0, 12)
        sums = [float((level + rng.normal(0, 0.1, count)).sum())
                for level, count in zip(levels, counts, strict=True)]
        mean, error = mean_of_windows(sums, counts.tolist())
        means.append(mean)
        errors.append(error)
    # 1 / sqrt(12) is 0.29; tokens taken for independent would give 0.04.
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.25)


def test_texts_are_reported_alone_and_together(model):
    texts = [model.encode(TEXT * count, add_bos=False) for count in (2, 11, 6)]
    texts[1] = texts[1][::-1]
    found = evaluate(model, planned("q4"), texts)
    alone = [evaluate(model, planned("q4"), [ids]) for ids in texts]
    assert found.texts == [one.together for one in alone]
    assert found.windows == [-(-len(ids) // 256) for ids in texts] and max(found.windows) > 1
    counts = [len(ids) for ids in texts]
    for kind in range(2):
        losses = [math.log(results[kind].perplexity) for results in found.texts]
        expected = math.exp(np.average(losses, weights=counts))
        assert found.together[kind].perplexity == pytest.approx(expected)
        assert found.together[kind].perplexity_error > 0
    means = [results[1].divergence.mean for results in found.texts]
    assert found.together[1].divergence.mean == pytest.approx(np.average(means, weights=counts))
    largest = max(results[1].divergence.largest for results in found.texts)
    assert found.together[1].divergence.largest == largest


def test_cache_types_are_read_as_the_engine_reads_them():
    assert [str(kind) for kind in parse_cache_types("q4,Q8_q4,fp16,q4")] == ["q4", "q8_q4"]
    with pytest.raises(InvalidSettings, match="cache_type"):
        parse_cache_types("q4,q5")


def test_a_type_that_needs_more_workspace_is_refused(monkeypatch):
    def plan(model_dir, ctx_size, cache_type, **_):
        nbytes = 100 + (str(cache_type) == "q4")
        device = SimpleNamespace(workspace_bytes=nbytes, key_feedback_bytes=0, device="cpu")
        return SimpleNamespace(devices=(device,), ctx_size=256)

    monkeypatch.setattr("exl_loader.commands.evaluation_plan.plan", plan)
    with pytest.raises(InvalidSettings, match="q4, which needs 101 bytes instead of 100"):
        planned("q4")


def test_several_machines_are_refused_with_what_to_do(text_file, capsys):
    address = "tcp://192.0.2.1:29500"
    assert main(["eval", "--text", str(text_file), "--machines", address]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --machines: expected nothing, because a comparison of caches")
    assert "evaluate where one machine holds the model" in error


def test_the_command_prints_json(text_file, capsys):
    arguments = ["eval", "--text", str(text_file), "--cache-type", "q4,q8_q4", "--json"]
    assert main([*arguments, "--ctx-size", "256", "--tokens", "300"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [result["cache_type"] for result in report["results"]] == ["fp16", "q4", "q8_q4"]
    assert (report["tokens"], report["windows"], report["ctx_size"]) == (300, 2, 256)
    (text,) = report["texts"]
    assert text == {"text": str(text_file), "tokens": 300, "windows": 2,
                    "results": report["results"]}
    means = [result["divergence"]["mean"] for result in report["results"][1:]]
    assert means[0] > means[1] > 0
    plan = planned("q4,q8_q4")
    assert report["other_caches_bytes"] == plan.extra_bytes
    assert report["reserved_bytes"] == plan.extra_bytes + plan.reservation.devices[0].total_bytes


def test_the_command_prints_a_table(text_file, capsys):
    arguments = ["eval", "--text", str(text_file), "--cache-type", "fp16", "--tokens", "64"]
    assert main([*arguments, "--ctx-size", "256"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "windows of 256 tokens" in lines[0] and lines[1] == "64 tokens in 1 window"
    assert lines[2].split()[:3] == ["cache", "perplexity", "+-"]
    name, perplexity, error, _ = lines[3].split()
    assert name == "fp16" and float(perplexity) > 1 and error == "?"
    assert len(lines) == 5


def test_the_command_prints_a_table_a_text_and_one_of_all(text_file, tmp_path, capsys):
    other = tmp_path / "other.py"
    other.write_text(TEXT * 12, encoding="utf-8")
    arguments = ["eval", "--text", str(text_file), "--text", str(other), "--cache-type", "q4"]
    assert main([*arguments, "--tokens", "300", "--ctx-size", "256"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [lines[1], lines[5], lines[9]]
    assert heads == [f"{text_file}: 300 tokens in 2 windows", f"{other}: 300 tokens in 2 windows",
                     "together: 600 tokens in 4 windows"]
    rows = [lines[i].split() for i in (4, 8, 12)]
    assert all(row[0] == "q4" and len(row) == len(HEADINGS) and "?" not in row for row in rows)
    assert len(lines) == 14


def test_columns_are_aligned():
    divergence = dict(mean=0.001, standard_error=1e-5, median=0.0005, percentile_99_9=0.01,
                      largest=0.1, top1_agreement=0.975, top1_error=0.0025)
    results = [
        {"cache_type": "fp16", "perplexity": 7.5, "perplexity_error": 0.5,
         "cache_bytes": 1 << 20, "divergence": None},
        {"cache_type": "q8_q4", "perplexity": 17.25, "perplexity_error": 1.25,
         "cache_bytes": 1 << 19, "divergence": divergence},
    ]
    text = render({"tokens": 5, "windows": 2, "ctx_size": 4, "texts": [{}], "results": results,
                   "reserved_bytes": 3 << 20, "other_caches_bytes": 1 << 19, "seconds": 1.5})
    table = text.splitlines()[2:5]
    assert len({len(line) for line in table}) == 1
    assert "97.50%" in table[2] and "1.00e-03" in table[2] and "0.25%" in table[2]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--cache-type", "q5"], "cache_type"),
        (["--tokens", "1"], "--tokens"),
        (["--memory-limit", "1KiB"], "cpu"),
        (["--ctx-size", "0"], "ctx_size"),
    ],
)
def test_errors_are_one_readable_line(text_file, capsys, options, named):
    assert main(["eval", "--text", str(text_file), *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ")
    assert named in captured.err and len(captured.err.splitlines()) == 1


def test_a_text_without_tokens_or_file_is_named(tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    for path, named in ((empty, "the text"), (tmp_path / "none.txt", "--text")):
        assert main(["eval", "--text", str(path), "--ctx-size", "256"]) == 1
        assert named in capsys.readouterr().err
