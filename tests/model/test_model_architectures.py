"""Every architecture against transformers, and every way of feeding a model against one pass.

Bounds: with the reference operations and float32 keys and values, what is left is the
rounding of transformers' own float32 sums (measured: 2e-6, bound 2e-5; a wrong epsilon or
activation is beyond 2e-4). Compiled operations round activations to a few bits in front of
quantised matrices.
"""

import os
import random

import pytest
import torch
from safetensors.torch import load_file

from exl_loader.backends import get_ops
from exl_loader.backends.reference.ops import ReferenceOps
from exl_loader.utils.errors import CacheFull, InvalidSettings
from support.exhaustive import rotated, some_of
from support.hf_models import (
    MODELS,
    expected_logits,
    make_model,
    relative_error,
    to_old_layout,
)
from support.model_builder import build_model, run_chunks

pytestmark = pytest.mark.usefixtures("one_thread")

REFERENCE_BOUND = 2e-5
COMPILED_BOUND = 2e-2
# More than any window (24) and any original length (32) of the models.
NUM_IDS = 44
# Saved dtype, shards, and config layout: each seed takes another combination.
VARIANTS = {0: ("float32", 1, "new"), 1: ("bfloat16", 3, "old"), 2: ("float16", 2, "new")}


@pytest.fixture(scope="module")
def compiled():
    ops = get_ops()
    if ops.name == "reference":
        pytest.skip("no compiler")
    return ops


def random_ids(seed, count=NUM_IDS, vocab_size=331):
    return [random.Random(seed + i).randrange(vocab_size) for i in range(count)]


@pytest.mark.parametrize(("name", "seed"), rotated(sorted(MODELS), list(VARIANTS)))
def test_logits_equal_transformers(name, seed, tmp_path):
    dtype, shards, layout = VARIANTS[seed]
    hf = make_model(name, seed, tmp_path / "m", dtype, shards)
    if layout == "old":
        to_old_layout(tmp_path / "m")
    assert (len(list((tmp_path / "m").glob("*.safetensors"))) > 1) == (shards > 1)
    ids = random_ids(seed)
    model, cache = build_model(tmp_path / "m", ReferenceOps())
    error = relative_error(run_chunks(model, cache, ids, NUM_IDS), expected_logits(hf, ids))
    assert error <= REFERENCE_BOUND


def test_fresh_seed(tmp_path):
    seed = int.from_bytes(os.urandom(3), "little")
    name = random.Random(seed).choice(sorted(MODELS))
    hf = make_model(name, seed, tmp_path / "m")
    ids = random_ids(seed)
    model, cache = build_model(tmp_path / "m", ReferenceOps())
    error = relative_error(run_chunks(model, cache, ids, NUM_IDS), expected_logits(hf, ids))
    assert error <= REFERENCE_BOUND, (name, seed)


@pytest.mark.parametrize("name", some_of(sorted(MODELS), 6))
def test_compiled_logits_equal_transformers(name, tmp_path, compiled):
    hf = make_model(name, 3, tmp_path / "m", "float16")
    ids = random_ids(3)
    model, cache = build_model(tmp_path / "m", compiled, cache_type="fp16")
    whole = run_chunks(model, cache, ids, NUM_IDS)
    assert relative_error(whole, expected_logits(hf, ids)) <= COMPILED_BOUND
    # Attention sums a row's keys in the order of its own chunk, the rest row by row.
    assert relative_error(run_chunks(model, cache, ids, 7), whole) <= 1e-5
    single = run_chunks(model, cache, ids[:12], 1, total=NUM_IDS)
    assert relative_error(single, whole[:12]) <= 1e-5


def feed_together(model, cache, texts, chunks):
    """Feed several texts in the same calls, `chunks[i]` ids of text i a call, until all end."""
    sequences = [cache.acquire(len(ids)) for ids in texts]
    rows = [[] for _ in texts]
    while any(s.past_len < len(ids) for s, ids in zip(sequences, texts, strict=True)):
        entries, owners = [], []
        for i, (sequence, ids) in enumerate(zip(sequences, texts, strict=True)):
            piece = ids[sequence.past_len : sequence.past_len + chunks[i]]
            if piece:
                entries.append((sequence, piece))
                owners.append(i)
        out, first = model.forward(entries, "all").clone(), 0
        for (_, piece), owner in zip(entries, owners, strict=True):
            rows[owner].append(out[first : first + len(piece)])
            first += len(piece)
    for sequence in sequences:
        cache.release(sequence)
    return [torch.cat(r) for r in rows]


@pytest.mark.parametrize("name", some_of(sorted(MODELS), 6))
def test_every_way_of_feeding_agrees(name, tmp_path):
    """Texts at once, in chunks, and token by token; side by side, and each alone."""
    make_model(name, 5, tmp_path / "m")
    texts = [random_ids(50), random_ids(60, 36), random_ids(70, 9)]
    model, cache = build_model(tmp_path / "m", ReferenceOps(), sequences=3)
    alone = [run_chunks(model, cache, ids, len(ids)) for ids in texts]
    together = feed_together(model, cache, texts, chunks=[19, 1, 5])
    for actual, expected in zip(together, alone, strict=True):
        assert relative_error(actual, expected) <= 1e-6


@pytest.mark.parametrize("name", ["llama-dynamic", "phi3-longrope"])
@pytest.mark.parametrize("count", [20, 32, 33])
def test_short_and_long_texts_have_their_own_frequencies(name, count, tmp_path):
    hf = make_model(name, 6, tmp_path / "m")
    ids, long_ids = random_ids(6, count), random_ids(7)
    model, cache = build_model(tmp_path / "m", ReferenceOps(), sequences=2)
    together = feed_together(model, cache, [long_ids, ids], chunks=[11, 11])
    assert relative_error(together[1], expected_logits(hf, ids)) <= REFERENCE_BOUND
    assert relative_error(together[0], expected_logits(hf, long_ids)) <= REFERENCE_BOUND


def test_frequencies_belong_to_the_text_and_not_to_what_came_so_far(tmp_path):
    """The first tokens of a text that will be long have the long frequencies already."""
    make_model("phi3-longrope", 6, tmp_path / "m")
    model, cache = build_model(tmp_path / "m", ReferenceOps(), sequences=2)
    ids = random_ids(6, 10)
    short, long = cache.acquire(32), cache.acquire(33)
    first = model.forward([(short, ids)], "all").clone()
    assert relative_error(model.forward([(long, ids)], "all"), first) > 1e-3


@pytest.mark.parametrize("option", ["alpha_value", "compress_pos_emb"])
def test_rope_options_equal_transformers(option, tmp_path):
    """The web UI's options are what transformers calls another theta or linear scaling."""
    from support.hf_models import load_model

    make_model("llama", 8, tmp_path / "m")
    hf = load_model(tmp_path / "m")
    head_dim = hf.config.head_dim
    rope = {"rope_type": "default", "rope_theta": 10000.0 * 2.5 ** (head_dim / (head_dim - 2))}
    if option == "compress_pos_emb":
        rope = {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}
    hf.config.rope_parameters = rope
    hf.model.rotary_emb = type(hf.model.rotary_emb)(hf.config)
    ids = random_ids(8)
    model, cache = build_model(tmp_path / "m", ReferenceOps(), **{option: 2.5})
    error = relative_error(run_chunks(model, cache, ids, NUM_IDS), expected_logits(hf, ids))
    assert error <= REFERENCE_BOUND


FIXTURES = ["llama-low", "llama-mid"]


def fixture_error(folder, name, ops, cache_type, chunk):
    reference = load_file(folder / f"{name}.reference.safetensors")
    model, cache = build_model(folder / name, ops, cache_type=cache_type)
    actual = run_chunks(model, cache, reference["input_ids"].tolist(), chunk)
    return relative_error(actual, reference["logits"])


@pytest.mark.parametrize("name", FIXTURES)
def test_exl2_fixtures(name, fixtures_dir):
    assert fixture_error(fixtures_dir, name, ReferenceOps(), "fp32", 128) <= REFERENCE_BOUND


@pytest.mark.parametrize("name", FIXTURES)
def test_exl2_fixtures_with_float16_keys_and_values(name, fixtures_dir):
    """Rounding keys and values to float16 alone moves these logits by 4e-4 (measured)."""
    assert fixture_error(fixtures_dir, name, ReferenceOps(), "fp16", 128) <= 6e-4


@pytest.mark.parametrize("chunk", [128, 1])
@pytest.mark.parametrize("name", FIXTURES)
def test_exl2_fixtures_compiled(name, chunk, fixtures_dir, compiled):
    assert fixture_error(fixtures_dir, name, compiled, "fp16", chunk) <= COMPILED_BOUND


@pytest.fixture
def small(tmp_path):
    make_model("llama", 9, tmp_path / "m")
    return build_model(tmp_path / "m", ReferenceOps(), sequences=2, chunk_size=48, logits_rows=16)


def test_last_is_the_last_row_of_each_text(small):
    model, cache = small
    texts = [random_ids(1, 11), random_ids(2, 5)]
    expected = [run_chunks(model, cache, ids, 16)[-1] for ids in texts]
    sequences = [cache.acquire(20) for _ in texts]
    last = model.forward(list(zip(sequences, texts, strict=True))).clone()
    assert torch.allclose(last, torch.stack(expected), atol=1e-5)
    assert last.shape == (2, 331)
    following = model.forward([(s, [5]) for s in sequences])
    assert following.shape == (2, 331) and [s.past_len for s in sequences] == [12, 6]


def test_none_fills_the_cache(small):
    model, cache = small
    ids = random_ids(3, 40)
    expected = run_chunks(model, cache, ids, 10)[-1]
    sequence = cache.acquire(40)
    assert model.forward([(sequence, ids[:39])], "none").shape == (0, 331)
    assert torch.allclose(model.forward([(sequence, ids[39:])])[0], expected, atol=1e-5)


def test_recorded_steps_do_not_pile_up(small):
    model, cache = small
    sequence = cache.acquire(512)
    for count in range(1, 49):
        sequence.past_len = 0
        model.forward([(sequence, [7] * count)], "none")
    assert len(model._local.steps) <= 32


@pytest.mark.parametrize("ids", [[], [331], [-1], [3, 10**6]])
def test_impossible_ids_are_refused(small, ids):
    model, cache = small
    sequence = cache.acquire(10)
    with pytest.raises(InvalidSettings, match="token ids"):
        model.forward([(sequence, ids)])
    assert sequence.past_len == 0


def test_no_row_is_written_beyond_a_texts_pages(small):
    model, cache = small
    sequence = cache.acquire(256)
    sequence.past_len = 250
    with pytest.raises(CacheFull, match="257"):
        model.forward([(sequence, [1] * 7)])
    assert model.forward([(sequence, [1] * 6)]).shape == (1, 331)
