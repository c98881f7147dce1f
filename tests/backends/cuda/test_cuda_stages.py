"""Models on two and three cards, emulated: the bits of one card, and memory as planned on each."""

from __future__ import annotations

import pytest
import torch
from test_cuda_model import BOUND, CTX, GREEDY, IDS, relative_error, write_mixture

import exl_loader
from exl_loader.memory import buffers as memory
from exl_loader.utils.errors import DeviceError, InsufficientMemory
from exl_loader.utils.table import DeviceMap
from support import in_threads
from support.emulated_cuda import EmulatedAccess, EmulatedCards
from support.hf_models import make_model
from support.makers import write_quantized_model
from support.model_builder import build_model, run_chunks, split, together

GIB = 1 << 30
TWO = "cuda:0,cuda:1"
THREE_LAYERS = {"num_hidden_layers": 3}


@pytest.fixture
def cards(monkeypatch):
    made = EmulatedCards(3)
    made.install(monkeypatch)
    return made


@pytest.fixture
def nothing_left(no_other_model):
    yield
    assert memory.live_bytes() == 0


def gpu_split(folder, first_layers, **options):
    """Return the web UI's field for this number of layers on the first of two cards."""
    total = exl_loader.plan(folder, ctx_size=CTX, device="cuda:0", **options).total_bytes
    for part in range(95, 0, -4):
        text = f"{total * part / 100 / GIB:.9f},24"
        devices = exl_loader.plan(folder, ctx_size=CTX, gpu_split=text, **options).devices
        if devices[0].device == "cuda:0" and devices[0].end_layer == first_layers:
            return text
    raise AssertionError("no such split")


def run(folder, ids=IDS, **options):
    """Return a text's logits and its greedy continuation, and check memory of each device."""
    planned = exl_loader.plan(folder, ctx_size=CTX, **options)
    with exl_loader.load(folder, ctx_size=CTX, **options) as model:
        for device in planned.devices:
            assert memory.live_bytes(device.device) == device.total_bytes
            assert model._buffers.allocated_bytes(device.device) == device.total_bytes
        logits = model.prompt_logits(ids)
        answer = list(model.generate_ids(ids, GREEDY))
        assert model.allocated_bytes() == planned.total_bytes
    assert memory.live_bytes() == 0
    return logits, answer


def texts_of(model, cache, ids):
    """Return rows of prompts in chunks, of decoding, and of texts side by side."""
    return [
        run_chunks(model, cache, ids[:12], 9), run_chunks(model, cache, ids[:4], 1, total=44),
        together(model, cache, [ids, ids[2:]], steps=3),
    ]


@pytest.mark.parametrize(("name", "counts", "cache_type"), [
    ("llama-tied", (2, 1), "fp16"), ("gemma2", (1, 2), "q4"), ("mixtral", (1, 1, 1), "q8"),
    ("phi3-longrope", (1, 1, 1), "fp16"), ("qwen2", (2, 1), "q4"),
])  # fmt: skip
def test_a_split_model_gives_the_bits_of_one_card(cards, tmp_path, name, counts, cache_type):
    make_model(name, 3, tmp_path / "m", "float16")
    ids = [(7 * i * i + 3) % 331 for i in range(12)]
    whole, parts = (
        texts_of(*build_model(tmp_path / "m", cards.ops, device=devices, sequences=3,
                              cache_type=cache_type), ids)
        for devices in (DeviceMap.single("cuda:0", 3), split(*counts, kind="cuda"))
    )
    assert all(map(torch.equal, parts, whole))


@pytest.mark.parametrize("first_layers", [1, 2])
def test_loading_over_two_cards(cards, tmp_path, nothing_left, first_layers):
    write_quantized_model(tmp_path / "m", "exl2", config=THREE_LAYERS)
    field = gpu_split(tmp_path / "m", first_layers)
    expected = run(tmp_path / "m", device="cuda:0")
    logits, answer = run(tmp_path / "m", gpu_split=field)
    assert torch.equal(logits, expected[0]) and answer == expected[1]
    assert all(access.replays > 0 for access in cards.accesses()[:2])


def test_a_split_that_one_card_holds_alone_uses_no_other(cards, tmp_path, nothing_left):
    write_quantized_model(tmp_path / "m", "gptq")
    with exl_loader.load(tmp_path / "m", ctx_size=CTX, gpu_split="20,24") as model:
        assert [device.device for device in model.reservation.devices] == ["cuda:0", "cpu"]
        list(model.generate_ids(IDS, GREEDY))
    assert cards.ops["cuda:1"].cpu_access._launcher.launches == 0


def test_the_web_uis_field_splits_layers_and_its_gauge_draws_both_cards(
    cards, tmp_path, nothing_left
):
    from extension.panel.gauge import gauge_html
    from extension.panel.panel import ModelChoice

    write_quantized_model(tmp_path / "m", "exl2")
    values = {"model_dir": str(tmp_path / "m"), "ctx_size": float(CTX), "cache_4bit": True}
    values["gpu_split"] = gpu_split(tmp_path / "m", 1, cache_type="q4")
    choice = ModelChoice.from_values(values)
    with exl_loader.load(choice.model_dir, **choice.for_load()) as model:
        page = gauge_html(model.reservation, measured_bytes=model.allocated_bytes())
        assert [d.device for d in model.reservation.devices] == [*TWO.split(","), "cpu"]
    assert "cuda:0, layers 0 to 0" in page and "cuda:1, layers 1 to 1" in page
    assert "main memory, the embedding" in page


def test_the_command_line_splits_layers(cards, tmp_path, capsys, nothing_left):
    from exl_loader.commands.cli import main

    write_quantized_model(tmp_path / "m", "exl2", tokenizer=True)
    options = ["--ctx-size", str(CTX), "--gpu-split", gpu_split(tmp_path / "m", 1)]
    assert main(["generate", str(tmp_path / "m"), "--prompt", "ab", *options,
                 "--max-new-tokens", "5", "--ban-eos-token"]) == 0
    assert [access.replays for access in cards.accesses()] == [3, 3, 0]


def test_experts_on_two_cards_are_chosen_on_their_own_card(cards, tmp_path, nothing_left):
    write_mixture(tmp_path / "m")
    expected = run(tmp_path / "m", device="cuda:0")
    logits, answer = run(tmp_path / "m", gpu_split=gpu_split(tmp_path / "m", 1))
    assert torch.equal(logits, expected[0]) and answer == expected[1]


def test_each_card_captures_its_own_graph(cards, tmp_path):
    write_quantized_model(tmp_path / "m", "exl2", config=THREE_LAYERS)
    accesses = cards.accesses()
    devices = split(1, 1, 1, kind="cuda")
    captured = run_chunks(*build_model(tmp_path / "m", cards.ops, device=devices), IDS, 1)
    counts = [(access.captures_made, access.replays) for access in accesses]
    assert counts == [(1, len(IDS) - 1)] * 3
    accesses[1].capture = lambda run: None
    refused = run_chunks(*build_model(tmp_path / "m", cards.ops, device=devices), IDS, 1)
    assert [access.captures_made for access in accesses] == [2, 1, 2]
    assert torch.equal(refused, captured)


# The cards that postpone their work until something waits for it.
LAZY = [(True, True), (False, True), (True, False)]


def chunks_then_tokens(model, cache):
    """Run steps whose results are not read, then decode; return the last rows."""
    sequence = cache.acquire(len(IDS))
    model.forward([(sequence, IDS[:3])], "none")
    model.forward([(sequence, IDS[3:6])], "none")
    model.forward([(sequence, IDS[6:8])], "none")
    rows = [model.forward([(sequence, [i])]).clone() for i in IDS[8:]]
    cache.release(sequence)
    return torch.cat(rows)


@pytest.mark.parametrize("lazy", LAZY)
def test_cards_wait_for_what_they_need(cards, tmp_path, lazy):
    write_quantized_model(tmp_path / "m", "exl2")
    devices = split(1, 1, kind="cuda")
    at_once = chunks_then_tokens(*build_model(tmp_path / "m", cards.ops, device=devices))
    model, cache = build_model(tmp_path / "m", cards.ops, device=devices)
    for access, holds_back in zip(cards.accesses(), lazy, strict=False):
        access.stream.lazy = holds_back
    assert torch.equal(chunks_then_tokens(model, cache), at_once)


def test_the_emulation_notices_a_copy_that_is_not_waited_for(cards, tmp_path, monkeypatch):
    def receive(self, source, target):
        self._stream_of(source).add(lambda: target.copy_(source))

    write_quantized_model(tmp_path / "m", "exl2")
    devices = split(1, 1, kind="cuda")
    at_once = chunks_then_tokens(*build_model(tmp_path / "m", cards.ops, device=devices))
    monkeypatch.setattr(EmulatedAccess, "receive", receive)
    for lazy in LAZY[:2]:
        model, cache = build_model(tmp_path / "m", cards.ops, device=devices)
        for access, holds_back in zip(cards.accesses(), lazy, strict=False):
            access.stream.lazy = holds_back
        assert not torch.equal(chunks_then_tokens(model, cache), at_once)
        for access in cards.accesses():
            access.stream.lazy = False


def test_the_emulation_notices_memory_of_another_card(cards, tmp_path):
    write_quantized_model(tmp_path / "m", "exl2")
    both = dict.fromkeys(("cuda:0", "cuda:1"), cards.ops["cuda:0"])
    with pytest.raises(AssertionError, match="on cuda:0 is given memory of cuda:1"):
        model, cache = build_model(tmp_path / "m", both, device=split(1, 1, kind="cuda"))
        run_chunks(model, cache, IDS, 4)


def test_texts_side_by_side_prefixes_and_a_draft(cards, tmp_path, nothing_left):
    write_quantized_model(tmp_path / "m", "exl2")
    write_quantized_model(tmp_path / "d", "exl2", seed=1, config={"num_hidden_layers": 1})
    prompts = [IDS, IDS[3:] + IDS[:3], IDS[:9] + [4, 5]]
    with exl_loader.load(tmp_path / "m", ctx_size=CTX, device="cuda:0", cache_type="q4") as one:
        alone = [list(one.generate_ids(prompt, GREEDY)) for prompt in prompts]
    options = {"cache_type": "q4", "model_draft": tmp_path / "d", "max_batch_size": 4}
    field = gpu_split(tmp_path / "m", 1, **options)
    with exl_loader.load(tmp_path / "m", ctx_size=2 * CTX, gpu_split=field, **options) as model:
        assert [d.draft_bytes > 0 for d in model.reservation.devices] == [True, False, True]
        together = in_threads(lambda prompt: list(model.generate_ids(prompt, GREEDY)), prompts)
        assert together == alone
        again = model.generate_ids(IDS[:10] + [7, 8, 9], GREEDY)
        list(again)
        assert again.stats.reused_tokens == 10


def test_two_models_on_the_same_two_cards(cards, tmp_path, nothing_left):
    write_quantized_model(tmp_path / "a", "exl2", config=THREE_LAYERS)
    write_quantized_model(tmp_path / "b", "gptq", seed=1)
    splits = {name: gpu_split(tmp_path / name, 1) for name in "ab"}
    alone = {name: run(tmp_path / name, gpu_split=splits[name])[1] for name in "ab"}
    with (
        exl_loader.load(tmp_path / "a", ctx_size=CTX, gpu_split=splits["a"]) as one,
        exl_loader.load(tmp_path / "b", ctx_size=CTX, gpu_split=splits["b"]) as two,
    ):
        streams = [model.generate_ids(IDS, GREEDY) for model in (one, two)]
        ids = list(zip(*streams, strict=True))
        assert [list(answer) for answer in zip(*ids, strict=True)] == [alone["a"], alone["b"]]
        two.unload()
        assert list(one.generate_ids(IDS, GREEDY)) == alone["a"]


@pytest.mark.parametrize("device", ["cuda:0,cpu", "cpu,cuda:0"])
def test_a_card_and_main_memory(cards, tmp_path, nothing_left, device):
    write_quantized_model(tmp_path / "m", "exl2")
    expected, _ = run(tmp_path / "m", device="cpu")
    total = exl_loader.plan(tmp_path / "m", ctx_size=CTX, device="cuda:0").total_bytes
    limits = [0.8 * total / GIB, 24]
    planned = exl_loader.plan(tmp_path / "m", ctx_size=CTX, device=device, gpu_split=limits)
    (main_memory,) = (d for d in planned.devices if d.device == "cpu")
    assert main_memory.overhead_bytes > 3 * 4096  # what is read on its way, not pages alone
    logits, answer = run(tmp_path / "m", device=device, gpu_split=limits)
    assert relative_error(logits, expected) <= BOUND
    assert len(answer) == GREEDY["max_new_tokens"]


def test_a_card_that_is_too_small_is_named(tmp_path, monkeypatch, nothing_left):
    write_quantized_model(tmp_path / "m", "exl2", config=THREE_LAYERS)

    def load(sizes, device=TWO):
        cards = EmulatedCards(2, dict(zip(("cuda:0", "cuda:1"), sizes, strict=True)))
        cards.memory.granularity_bytes = 4096  # or a page of a card would hold the whole model
        cards.install(monkeypatch)
        exl_loader.load(tmp_path / "m", ctx_size=CTX, device=device).unload()
        devices = exl_loader.plan(tmp_path / "m", ctx_size=CTX, device=device).devices
        return [device for device in devices if device.has_layers]

    (whole,) = load([GIB, 0])
    first, second = load([whole.needed_bytes - 1, GIB])
    assert (first.end_layer, second.end_layer) == (2, 3)
    monkeypatch.setattr(
        "exl_loader.backends.cuda.cards.auto_cards", lambda: tuple(TWO.split(","))
    )
    assert [d.end_layer for d in load([whole.needed_bytes - 1, GIB], "auto")] == [2, 3]
    assert len(load([whole.needed_bytes, GIB], "auto")) == 1
    load([first.needed_bytes, second.needed_bytes])
    with pytest.raises(InsufficientMemory, match=r"^cuda:1: a context of 512 tokens"):
        load([first.needed_bytes, second.needed_bytes - 1])
    assert memory.live_bytes() == 0


def refuse_memory(cards, monkeypatch):
    """Refuse the second card's second buffer."""
    taken, empty = [], cards.memory.empty

    def refusing(name, nbytes):
        taken.append(name)
        if taken.count("cuda:1") == 2:
            raise MemoryError
        return empty(name, nbytes)

    monkeypatch.setattr(cards.memory, "empty", refusing)


def refuse_opening(cards, monkeypatch):
    """Let opening the second card fail."""
    monkeypatch.delitem(cards.ops, "cuda:1")


def refuse_packing(cards, monkeypatch):
    """Let the second card fail while weights are packed on it."""
    def refuse(*arguments):
        raise DeviceError("graphics card, launch of pack on cuda:1", actual="illegal address")

    monkeypatch.setattr(cards.ops["cuda:1"].cpu_access._launcher, "prepare", refuse)


@pytest.mark.parametrize(("refuse", "error", "message"), [
    (refuse_memory, InsufficientMemory, r"^cuda:1: no memory for the \w+ buffer"),
    (refuse_opening, DeviceError, r"^cuda:1: graphics card, cuDeviceGet"),
    (refuse_packing, DeviceError, r"launch of pack on cuda:1"),
])  # fmt: skip
def test_a_failure_on_the_second_card_releases_everything(
    cards, tmp_path, monkeypatch, nothing_left, refuse, error, message
):
    write_quantized_model(tmp_path / "m", "exl2")
    field = gpu_split(tmp_path / "m", 1)
    with monkeypatch.context() as patched:
        refuse(cards, patched)
        with pytest.raises(error, match=message):
            exl_loader.load(tmp_path / "m", ctx_size=CTX, gpu_split=field)
    assert memory.live_bytes() == 0
    assert all(ops.upload_buffer is None for ops in cards.ops.values())
    exl_loader.load(tmp_path / "m", ctx_size=CTX, gpu_split=field).unload()


@pytest.mark.gpu
def test_two_real_cards(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("no two CUDA devices")
    write_quantized_model(tmp_path / "m", "exl2", config=THREE_LAYERS)
    expected = run(tmp_path / "m", device="cuda:0")
    logits, answer = run(tmp_path / "m", gpu_split=gpu_split(tmp_path / "m", 2))
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert torch.equal(logits, expected[0]) and answer == expected[1]
    assert relative_error(logits, expected[0]) <= BOUND
