"""`python -m exl_loader bench`: its arithmetic, its output, what it refuses, its end."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from exl_loader.backends import BACKENDS
from exl_loader.cache.layout import PAGE_LEN, CacheType
from exl_loader.commands import bench
from exl_loader.commands.bench import HEADINGS
from exl_loader.commands.cli import EXIT_INTERRUPTED, main
from exl_loader.commands.model_options import DEMO_MODEL
from exl_loader.commands.speed import (
    WARM_UP_TOKENS,
    ReadBuffers,
    SpeedResult,
    SpeedTest,
    StepBytes,
    TimedText,
    measure,
    random_ids,
    run,
)
from exl_loader.memory.buffers import live_bytes
from exl_loader.memory.reservation import LoadOptions, planned
from exl_loader.utils.errors import InsufficientMemory
from exl_loader.utils.progress import PlainProgress
from support.emulated_cuda import emulated_ops, install
from support.golden_models import write_model

VOCAB_SIZE = 50


class Clock:
    """Seconds that only a pass advances."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedModel:
    """A model whose passes take a second a sequence and a tenth for each of its tokens."""

    chunk_size = 100

    def __init__(self, clock: Clock) -> None:
        self.clock, self.passes = clock, []

    def rope_class(self, rope_len):
        return 0

    def forward(self, entries, logits="last"):
        ((sequence, ids),) = entries
        assert 0 < len(ids) <= self.chunk_size and all(0 <= i < VOCAB_SIZE for i in ids)
        self.passes.append((sequence.past_len, len(ids), logits))
        sequence.past_len += len(ids)
        self.clock.now += 1 + len(ids) / 10
        return torch.zeros(1 if logits == "last" else 0, VOCAB_SIZE)

    def forward_rows(self, entries):
        self.forward(entries)
        return [SimpleNamespace(argmax=lambda vocab_size: 0)]


class Cache:
    """A cache that lends one sequence at a time."""

    def __init__(self, pages: int) -> None:
        codes = torch.arange(pages * 4.0).view(pages, 4)
        self.layers = [SimpleNamespace(k_codes=codes, k_scales=None, v_codes=codes.clone(),
                                       v_scales=None)]
        self.held = 0

    def acquire(self, num_tokens, ids, rope_class):
        self.held += 1
        return SimpleNamespace(pages=[*range(len(self.layers[0].k_codes))], past_len=0)

    def release(self, sequence):
        self.held -= 1


def timed_text(pages: int = 4) -> tuple[TimedText, TimedModel, Cache]:
    clock = Clock()
    model, cache = TimedModel(clock), Cache(pages)
    return TimedText(model, cache, pages * PAGE_LEN, VOCAB_SIZE, clock), model, cache


def test_a_context_is_filled_with_copies_of_its_first_page():
    text, model, cache = timed_text()
    assert run(text.generate(700, 3)) == pytest.approx(3 * 1.1)
    computed = [(0, 100, "none"), (100, 100, "none"), (200, 56, "last")]
    assert model.passes == [*computed, (700, 1, "last"), (701, 1, "last"), (702, 1, "last")]
    for part in (cache.layers[0].k_codes, cache.layers[0].v_codes):
        assert torch.equal(part, part[:1].expand_as(part))
    # The second time nothing is computed but what is timed.
    assert run(text.read(300, 250)) == pytest.approx(3 + 25)
    assert model.passes[6:] == [(300, 100, "none"), (400, 100, "none"), (500, 50, "last")]
    text.release()
    text.release()
    assert cache.held == 0


def test_the_clock_does_not_run_between_passes():
    text, model, _ = timed_text()
    steps, seconds = text.read(0, 200), None
    while seconds is None:
        try:
            next(steps)
            model.clock.now += 1000
        except StopIteration as end:
            seconds = end.value
    assert seconds == pytest.approx(2 + 20)


def test_random_ids_are_no_special_tokens():
    assert set(random_ids(2000, 50, seed=1)) == set(range(3, 50))
    assert set(random_ids(5, 2)) == {1}


def parts(layers, head=1000, devices=("a", "b")):
    """Parts of layers on devices: (device, window, bytes)."""
    made = [
        SimpleNamespace(
            device=device, mlp=None, specs=lambda nbytes=nbytes: [SimpleNamespace(nbytes=nbytes)],
            attention=SimpleNamespace(shape=SimpleNamespace(sliding_window=window)),
        )
        for device, window, nbytes in layers
    ]
    return SimpleNamespace(
        config=SimpleNamespace(num_key_value_heads=2, head_dim=64), layers=made,
        device_map=SimpleNamespace(devices=devices, head=devices[-1]),
        head=SimpleNamespace(specs=lambda: [SimpleNamespace(nbytes=head)]),
    )


def test_the_bytes_of_a_token_are_weights_and_the_cache_that_its_row_sees():
    of_token = CacheType.parse("fp16").bytes_per_token(2, 64)
    assert of_token == 2 * 2 * 64 * 2
    found = StepBytes.from_parts(
        parts([("a", 0, 10), ("a", 100, 20), ("b", 0, 30)]), CacheType.parse("fp16")
    )
    assert found.at(0) == {"a": 30, "b": 1030}
    assert found.at(500) == {"a": 30 + 600 * of_token, "b": 1030 + 500 * of_token}
    test = SpeedTest("generate", 10, 495)
    speeds = {"a": 1e6, "b": 2e6}
    expected = 10 * (found.at(500)["a"] / 1e6 + found.at(500)["b"] / 2e6)
    assert found.seconds(test, speeds) == pytest.approx(expected)


def test_the_bytes_of_a_real_model_are_its_weights_without_the_embedding():
    with planned(DEMO_MODEL, LoadOptions()) as model:
        found = StepBytes.from_parts(model.model.parts, CacheType.parse("fp16"))
        specs = [spec.nbytes for spec in model.model.parts.specs()
                 if "embed" not in spec.name]
    assert found.weights == {"cpu": sum(specs)}


def test_of_a_mixture_a_token_reads_its_experts_only(tmp_path):
    write_model(tmp_path, "Mixtral", "gptq", seed=1)
    with planned(tmp_path, LoadOptions()) as model:
        layers = model.model.parts.layers
        found = StepBytes.from_parts(model.model.parts, CacheType.parse("fp16"))
        all_bytes = sum(s.nbytes for s in model.model.parts.specs() if "embed" not in s.name)
        experts = [layer.mlp.experts for layer in layers]
        unread = sum(
            spec.nbytes for layer, each in zip(layers, experts, strict=True)
            for expert in each[layer.mlp.top_k:] for w in expert.weights() for spec in w.specs()
        )
    assert unread > 0 and found.weights["cpu"] == all_bytes - unread


def test_a_result_has_median_spread_and_share():
    result = SpeedResult(SpeedTest("generate", 100, 0), [2.0, 1.0, 4.0], [1.0, 0.9, 1.0])
    assert result.tokens_per_s == 50 and result.spread == (25, 100)
    assert result.bandwidth_share == pytest.approx(0.5)
    assert SpeedResult(SpeedTest("prompt", 100, 0), [2.0]).bandwidth_share is None


def test_tests_run_in_order_with_the_bandwidth_before_each_repetition():
    clock = Clock()
    model, cache = TimedModel(clock), Cache(4)

    class Ops:
        def read_through(self, buffer):
            clock.now += 2.0
            return 1000

    step_bytes, buffers = StepBytes({"a": 50}, ()), ReadBuffers(clock)
    buffers._buffers["a"] = None, None
    tests = [SpeedTest("prompt", 20, 0), SpeedTest("generate", 5, 0), SpeedTest("prompt", 20, 512)]
    steps = measure(
        model, cache, tests=tests, repetitions=2, ctx_size=4 * PAGE_LEN, vocab_size=VOCAB_SIZE,
        ops={"a": Ops()}, step_bytes=step_bytes, buffers=buffers, clock=clock,
    )
    seen = [found for found in steps if found is not None]
    assert [len(tests), cache.held] == [3, 0] and len(seen) == 6
    prompt, generated, deep = seen[1::2]
    assert [found.test for found in (prompt, generated, deep)] == tests
    assert prompt.seconds == pytest.approx([3, 3]) and prompt.bandwidths == []
    assert generated.seconds == pytest.approx([5.5, 5.5])
    assert generated.bandwidths == [{"a": 500.0}] * 2
    assert generated.memory_seconds == pytest.approx([5 * 50 / 500] * 2)
    warm = [passed for passed in model.passes if passed[1] == 1][:WARM_UP_TOKENS]
    assert warm == [(i, 1, "last") for i in range(WARM_UP_TOKENS)]
    # The shape of the prompt has run, so it is not warmed up again at another depth.
    assert [passed for passed in model.passes if passed[0] >= 512] == [(512, 20, "last")] * 2


# The command


@pytest.fixture
def reference_operations(monkeypatch):
    """Use the reference operations, and a buffer that they read in little time."""
    monkeypatch.setenv("EXL_LOADER_REFERENCE", "1")
    monkeypatch.setattr(BACKENDS["cpu"], "read_buffer_bytes", 1 << 20, raising=False)


def test_the_table_and_the_json_have_every_test(tiny_model_dir, reference_operations, capsys):
    arguments = ["bench", str(tiny_model_dir), "-p", "8,300", "-n", "3", "-d", "0,40", "-r", "2",
                 "--cache-type", "fp16,q4,FP16"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["devices"] == ["cpu"] and report["repetitions"] == 2
    assert report["ctx_size"] == 340
    rows = [(r["cache_type"], r["test"], r["tokens"], r["depth"]) for r in report["results"]]
    assert rows == [
        (cache, test, tokens, depth) for cache in ("fp16", "q4") for depth in (0, 40)
        for test, tokens in (("prompt", 8), ("prompt", 300), ("generate", 3))
    ]
    for result in report["results"]:
        assert len(result["seconds"]) == 2 and min(result["seconds"]) > 0
        slowest, fastest = (result[f"{n}_tokens_per_s"] for n in ("slowest", "fastest"))
        assert 0 < slowest <= result["tokens_per_s"] <= fastest
        generated = result["test"] == "generate"
        assert (result["bandwidth_share"] is not None) == generated
        assert list(result["bandwidth_bytes_per_s"]) == (["cpu"] if generated else [])
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    headings = lines.index(next(line for line in lines if line.split() == [*HEADINGS]))
    cells = [line.split() for line in lines[headings + 1:]]
    assert [(c[0], c[1], int(c[2]), int(c[3])) for c in cells] == rows
    assert [c[-1].endswith("%") for c in cells] == [row[1] == "generate" for row in rows]
    assert live_bytes() == 0


def test_the_same_code_runs_on_a_card(tiny_model_dir, monkeypatch, capsys):
    """An emulated one: its memory is main memory."""
    install(monkeypatch, emulated_ops())
    monkeypatch.setattr(BACKENDS["cuda"], "read_buffer_bytes", 1 << 20, raising=False)
    assert main(["bench", str(tiny_model_dir), "--device", "cuda:0", "-p", "8", "-n", "2", "-r",
                 "1", "--cache-type", "q4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["devices"][0] == "cuda:0"
    assert report["results"][1]["bandwidth_bytes_per_s"]["cuda:0"] > 0


@pytest.mark.parametrize(("arguments", "words"), [
    (["-p", "0", "-n", "0"], "--n-prompt and --n-gen: expected at least one"),
    (["-p", "x"], "--n-prompt: expected numbers of tokens"),
    (["-p", "-3"], "--n-prompt: expected numbers of tokens"),
    (["-n", "1,,2"], "--n-gen: expected numbers of tokens"),
    (["-d", "99999999999"], "--n-depth: expected numbers of tokens up to"),
    (["-r", "0"], "--repetitions: expected 1 to"),
    (["--cache-type", "fp16,q5"], "cache_type"),
    (["--ctx-size", "256", "-d", "512"], "--ctx-size: expected at least 1024 tokens"),
    (["--memory-limit", "1KiB"], "does not fit"),
    (["--device", "cpu:x"], "device"),
    (["--machines", "tcp://192.0.2.1:29500"], "generate --stats"),
])
def test_errors_are_one_line_before_anything_is_timed(
    arguments, words, tiny_model_dir, reference_operations, monkeypatch, capsys
):
    def refuse(*_, **__):
        raise AssertionError("timed")

    monkeypatch.setattr(bench, "_run_tests", refuse)
    # argparse takes "-3" for an option unless it is joined.
    joined = [arguments[0] + arguments[1], *arguments[2:]] if arguments[1] == "-3" else arguments
    assert main(["bench", str(tiny_model_dir), *joined]) == 1
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.startswith("error: "), captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_a_cache_type_that_does_not_fit_is_refused_before_the_first_is_timed(
    tiny_model_dir, reference_operations, monkeypatch, capsys
):
    sizes = [
        bench._planned(str(tiny_model_dir), name, {"ctx_size": 2048})[0].total_bytes
        for name in ("q4", "fp16")
    ]
    assert sizes[0] < sizes[1]
    monkeypatch.setattr(bench, "_run_tests", lambda *_: pytest.fail("timed"))
    assert main(["bench", str(tiny_model_dir), "--ctx-size", "2048", "--cache-type", "q4,fp16",
                 "--memory-limit", str(sizes[1] - 1)]) == 1
    assert "does not fit" in capsys.readouterr().err


def test_no_room_for_the_read_buffer_is_said(monkeypatch):
    monkeypatch.setattr(BACKENDS["cpu"], "read_buffer_bytes", 1 << 60, raising=False)
    with pytest.raises(InsufficientMemory, match="no memory to measure the bandwidth with"):
        ReadBuffers().take("cpu")


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_ctrl_c_leaves_no_half_result(
    form, tiny_model_dir, reference_operations, monkeypatch, capsys
):
    class Interrupting(PlainProgress):
        times = 0

        def advance(self, task, n=1):
            if task.startswith("fp16: generate"):
                self.times += 1
                if self.times == 2:
                    raise KeyboardInterrupt

    monkeypatch.setattr(bench, "default_progress", Interrupting)
    assert main(["bench", str(tiny_model_dir), "-p", "8", "-n", "3", "-r", "3", *form]) == (
        EXIT_INTERRUPTED
    )
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fp16")]
    assert len(rows) == (0 if form else 1)
    assert all(len(row.split()) == 7 for row in rows)
    assert live_bytes() == 0
