"""Every architecture on emulated cards: unquantised, EXL2 and GPTQ folders.

A normal run takes the models of `PARTS` and a sample of the other cases.
"""

from __future__ import annotations

import os
import random

import pytest
import torch

import exl_loader
from exl_loader.backends import get_ops
from exl_loader.backends.cuda import fusion
from exl_loader.memory import buffers as memory
from support.emulated_cuda import EmulatedCards
from support.hf_models import (
    COMMON,
    MODELS,
    expected_logits,
    logits_error,
    make_model,
    relative_error,
)
from support.model_builder import build_model, run_chunks
from support.quantized_folder import make_quantized_model

pytestmark = pytest.mark.usefixtures("one_thread")

# Attention multiplies float16, activations have 15 bits, and groups of channels are the card's.
BOUND = 2e-2
# Keys and values that differ in their last bits are now and then rounded to other codes.
CACHE_BOUNDS = {"q8": 2e-2, "q6": 4e-2, "q8_q4": 1e-1, "q4": 1e-1, "q3": 2e-1}
CTX = 512
GIB = 1 << 30
# More than any sliding window (24) and any original length (32) of the models.
NUM_IDS = 44
# Rows that are decoded, in one step or in several; a step of more than 32 rows is a prompt.
DECODED = 28
FUSIONS = ("_norm_linears", "_gated_linear", "_linears", "_rope_write_cache")
FORMATS = ("float16", "exl2", "gptq")

# Part that Llama lacks -> a model that has it, and the format in which every run tests it.
PARTS = {
    "LayerNorm, learned positions, a plain MLP, fused Conv1D": ("gpt2-inner", "exl2"),
    "LayerNorm without bias, parallel layers, interleaved RoPE, two windows": ("cohere2", "gptq"),
    "LayerNorm of heads with weights for each": ("cohere-norms", "float16"),
    "two norms in front of parallel layers, fused rows by key head": ("falcon-new", "exl2"),
    "a key head for all query heads": ("bigcode", "float16"),
    "two RoPEs, RMS norms of heads and behind blocks": ("gemma3", "exl2"),
    "RMS norm of a whole projection": ("olmo3", "float16"),
    "layers without RoPE": ("smollm3-window", "gptq"),
    "clipped queries, keys and values, experts in one tensor": ("dbrx", "exl2"),
    "a shared expert, layers without experts": ("qwen2moe", "gptq"),
    "experts that the CPU chooses": ("qwen3moe", "float16"),
    "a residual factor": ("granite", "gptq"),
    "partial RoPE, parallel layers with one norm": ("phi", "gptq"),
}  # fmt: skip
ALL = [(name, format) for name in sorted(MODELS) for format in FORMATS]
# Of the cases of no new part, a run takes one in so many.
ONE_IN = 40
CASES = [
    pytest.param(*case, marks=() if case in PARTS.values() or index % ONE_IN == 0
                 else pytest.mark.exhaustive)
    for index, case in enumerate(ALL)
]


@pytest.fixture
def cards(monkeypatch, no_other_model):
    """Two emulated cards."""
    made = EmulatedCards(2)
    made.install(monkeypatch)
    return made


def fresh_seed():
    return int.from_bytes(os.urandom(3), "little")


def write(name, format, seed, folder):
    """Write a model; returns its folder, a text, and what transformers makes of the text."""
    ids = [random.Random(seed + i).randrange(3, COMMON["vocab_size"]) for i in range(NUM_IDS)]
    if format == "float16":
        return folder, ids, expected_logits(make_model(name, seed, folder, format), ids)
    twin = make_quantized_model(name, format, seed, folder)
    return folder / "m", ids, expected_logits(twin, ids)


def split_in_two(folder):
    """Return a `gpu_split` by which both cards have layers, and the reservation."""
    total = exl_loader.plan(folder, ctx_size=CTX, device="cuda:0").total_bytes
    for percent in range(95, 0, -5):
        field = f"{total * percent / 100 / GIB:.9f},24"
        planned = exl_loader.plan(folder, ctx_size=CTX, gpu_split=field)
        if all(device.device != "cpu" and device.first_layer < device.end_layer
               for device in planned.devices[:2]):
            return field, planned
    raise AssertionError(f"{folder}: no split over two cards")


def assert_same_bits(model, cache, ids, expected):
    """Decode in steps of several rows and of one, and compare with rows of a single step."""
    for count, chunk in ((DECODED, 9), (6, 1)):
        rows = run_chunks(model, cache, ids[:count], chunk, total=NUM_IDS)
        assert torch.equal(rows, expected[:count]), chunk


def run_on_one_card(folder, ops, ids, expected, monkeypatch):
    """Return logits of a text of decoded rows, after comparing others with transformers'."""
    model, cache = build_model(folder, ops, device="cuda:0", cache_type="fp16")
    prompt = run_chunks(model, cache, ids, NUM_IDS)
    assert logits_error(model, prompt, expected) <= BOUND
    decoded = run_chunks(model, cache, ids[:DECODED], DECODED, total=NUM_IDS)
    assert logits_error(model, decoded, expected[:DECODED]) <= BOUND
    assert_same_bits(model, cache, ids, decoded)
    (step,) = (step for (rows, *_), step in model._local.steps.items() if rows == 1)
    assert (ops.cpu_access.replays > 0) == all(stage.capturable for stage in step.stages)
    # Launches of single operations that no graph replays have the same bits.
    model._local.steps.clear()
    with monkeypatch.context() as patch:
        patch.setattr(ops.cpu_access, "captures", False)
        for fused in FUSIONS:
            patch.setattr(fusion, fused, lambda ops, calls: 0)
        assert_same_bits(model, cache, ids, decoded)
    return run_chunks(model, cache, ids[:DECODED], DECODED)


@pytest.mark.parametrize(("name", "format"), CASES)
def test_logits_equal_transformers(name, format, tmp_path, cards, monkeypatch):
    """On one card, and on two the same bits in memory that is planned to the byte."""
    seed = fresh_seed()
    print("seed", seed)
    folder, ids, expected = write(name, format, seed, tmp_path)
    on_one = run_on_one_card(folder, cards.ops["cuda:0"], ids, expected, monkeypatch)
    field, planned = split_in_two(folder)
    with exl_loader.load(folder, ctx_size=CTX, gpu_split=field) as loaded:
        for device in planned.devices:
            assert memory.live_bytes(device.device) == device.total_bytes
        assert torch.equal(loaded.prompt_logits(ids[:DECODED]), on_one)


@pytest.mark.parametrize(("name", "format"), CASES)
def test_quantized_caches(name, format, tmp_path, cards):
    """Rows have the same bits in any steps, and are those of the CPU with the same cache.

    In a mixture one rounded value of the cache may choose another expert, after which all later
    rows differ, so that only the bits are compared.
    """
    seed = fresh_seed()
    folder, ids, _ = write(name, format, seed, tmp_path)
    cache_type = random.Random(seed).choice(sorted(CACHE_BOUNDS))
    on_card = build_model(folder, cards.ops["cuda:0"], device="cuda:0", cache_type=cache_type)
    decoded = run_chunks(*on_card, ids[:DECODED], DECODED, total=NUM_IDS)
    rows = run_chunks(*on_card, ids[:6], 1, total=NUM_IDS)
    assert torch.equal(rows, decoded[:6]), (seed, cache_type)
    prompt = run_chunks(*on_card, ids, NUM_IDS)
    assert prompt.isfinite().all()
    if on_card[0].config.experts is not None:
        return
    on_cpu = build_model(folder, get_ops(), cache_type=cache_type)
    expected = run_chunks(*on_cpu, ids[:DECODED], DECODED, total=NUM_IDS)
    assert relative_error(decoded, expected) <= CACHE_BOUNDS[cache_type], (seed, cache_type)
    expected = run_chunks(*on_cpu, ids, NUM_IDS)
    assert relative_error(prompt, expected) <= CACHE_BOUNDS[cache_type], (seed, cache_type)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_real_card(name, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    folder, ids, expected = write(name, "float16", fresh_seed(), tmp_path)
    model, cache = build_model(folder, get_ops("cuda:0"), device="cuda:0", cache_type="fp16")
    assert logits_error(model, run_chunks(model, cache, ids, NUM_IDS), expected) <= BOUND
    by_token = run_chunks(model, cache, ids[:DECODED], 1, total=NUM_IDS)
    assert logits_error(model, by_token, expected[:DECODED]) <= BOUND
