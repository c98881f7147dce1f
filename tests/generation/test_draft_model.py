"""A draft model: the same text in fewer passes, and its memory in the reservation."""

from __future__ import annotations

import gc
import json
from types import SimpleNamespace

import pytest

import exl_loader
from exl_loader.cache.layout import PAGE_LEN, CacheLayer, CacheType, pages_for
from exl_loader.cache.paging import PagedCache
from exl_loader.commands import cli
from exl_loader.commands.model_options import DEMO_MODEL
from exl_loader.engine import LoadedModel
from exl_loader.generation.draft_model import DraftModel
from exl_loader.memory import buffers as memory
from exl_loader.utils.errors import InsufficientMemory, InvalidCheckpoint, InvalidSettings
from support import in_threads
from support.fake_model import FakeModel, fake_engine
from support.full_drafts import draft_fully
from support.tiny import write_tiny_model

CTX = 600


def script(text: list[int]) -> int:
    """Does not repeat within a few hundred tokens, so only a model can guess it."""
    return 3 + (len(text) * len(text) * 7 + text[0]) % 251


def sloppy(text: list[int]) -> int:
    """Follows the script except for every fifth token."""
    return script(text) if len(text) % 5 else 299


def drafted_engine(guess, draft_max=4, draft_ctx=1024, **sizes):
    """Build a scripted model with a scripted draft; return it, both models and caches."""
    ctx_size = 1024
    model = FakeModel(script, 300, pages_for(ctx_size), **sizes)
    draft = FakeModel(guess, 300, pages_for(draft_ctx), **sizes)
    caches = [
        PagedCache([CacheLayer(m.stored, None, m.stored, None, CacheType(32, 32))], len(m.stored))
        for m in (model, draft)
    ]
    draft_model = DraftModel(draft, caches[1], draft_max, 300)
    engine = LoadedModel(
        model, caches[0], None, SimpleNamespace(ctx_size=ctx_size),  # type: ignore[arg-type]
        SimpleNamespace(release=lambda: None), draft_model,  # type: ignore[arg-type]
    )
    return draft_fully(engine), model, draft, caches


def plain_text(prompt, options):
    generation = fake_engine(script, 300, ctx_size=1024)[0].generate_ids(prompt, options)
    return list(generation), generation.finish_reason


@pytest.mark.parametrize("guess", [script, sloppy, lambda text: 5])
@pytest.mark.parametrize("options", [
    {"max_new_tokens": 200}, {"max_new_tokens": 1}, {"max_new_tokens": 5000},
    {"stop_token_ids": [139]}, {"temperature": 1.5, "seed": 4, "max_new_tokens": 100},
    {"logprobs": 2}, {"prompt_lookup_num_tokens": 3},
])
def test_the_text_is_the_same_in_fewer_passes(guess, options):
    options = {"temperature": 0, "ban_eos_token": True} | options
    expected, reason = plain_text([7, 8, 9, 10], options)
    engine, model, _, caches = drafted_engine(guess)
    generation = engine.generate_ids([7, 8, 9, 10], options)
    assert (list(generation), generation.finish_reason) == (expected, reason)
    assert [cache.num_free_pages for cache in caches] == [cache.num_pages for cache in caches]
    accepted = generation.stats.accepted_tokens
    assert len(model.calls) + accepted == generation.stats.new_tokens
    if guess is script and len(expected) > 50:
        # Sampled tokens that leave the script cannot be guessed.
        assert accepted > (0.7 if options["temperature"] == 0 else 0.5) * len(expected)


def test_accepted_tokens_are_not_evaluated_again():
    engine, _, draft, _ = drafted_engine(script)
    assert len(list(engine.generate_ids([7, 8], {"temperature": 0, "max_new_tokens": 101}))) == 101
    # One token of the prompt's pass, then five a pass: four guessed by four draft steps, of
    # which the first also reads the token that no step had run.
    assert draft.calls == [[3], [1], [1], [1]] + [[2], [1], [1], [1]] * 19


def test_the_draft_evaluates_a_long_prompt_in_chunks_while_other_texts_continue():
    engine, model, draft, _ = drafted_engine(script)
    options = {"temperature": 0, "max_new_tokens": 60, "ban_eos_token": True}
    prompts = [[7] * 100, [8, 9]]
    generations = [engine.generate_ids(prompt, options) for prompt in prompts]
    texts = [[], []]
    for ids in zip(*generations, strict=True):
        for text, token_id in zip(texts, ids, strict=True):
            text.append(token_id)
    assert texts == [plain_text(prompt, options)[0] for prompt in prompts]
    assert max(map(sum, draft.calls)) == draft.chunk_size
    assert max(map(sum, model.calls)) <= model.chunk_size
    assert max(map(len, draft.calls)) == 2
    assert all(generation.stats.accepted_tokens > 30 for generation in generations)


def test_a_pass_that_failed_with_its_guesses_is_run_again():
    """The draft model has read the whole text, which has not grown since."""
    engine, model, _, caches = drafted_engine(script)
    options = {"temperature": 0, "max_new_tokens": 60, "ban_eos_token": True}
    prompts = [[7, 8], [8, 9]]
    failed = []

    def fail_once() -> None:
        if len(model.calls[-1]) == 2 and max(model.calls[-1]) > 1 and len(failed) < 3:
            failed.append(len(model.calls))
            raise RuntimeError("injected")

    model.before_call = fail_once
    generations = [engine.generate_ids(prompt, options) for prompt in prompts]
    texts = [list(ids) for ids in zip(*zip(*generations, strict=True), strict=True)]
    assert texts == [plain_text(prompt, options)[0] for prompt in prompts]
    assert len(failed) == 3
    assert [cache.num_free_pages for cache in caches] == [cache.num_pages for cache in caches]


def test_a_draft_with_less_context_guesses_up_to_its_end():
    engine, _, draft, caches = drafted_engine(script, draft_ctx=PAGE_LEN)
    options = {"temperature": 0, "max_new_tokens": 400, "ban_eos_token": True}
    generation = engine.generate_ids([7, 8], options)
    assert list(generation) == plain_text([7, 8], options)[0]
    assert 150 < generation.stats.accepted_tokens < PAGE_LEN
    draft.calls.clear()
    long = [7] * (PAGE_LEN + 1)
    assert list(engine.generate_ids(long, options)) == plain_text(long, options)[0]
    assert not draft.calls
    assert caches[1].num_free_pages == caches[1].num_pages


def test_texts_with_ids_unknown_to_the_draft_get_no_guesses():
    engine, _, draft, caches = drafted_engine(script)
    engine._generator._scheduler.drafts.draft_model._vocab_size = 200
    options = {"temperature": 0, "max_new_tokens": 100, "ban_eos_token": True}
    assert list(engine.generate_ids([7, 8], options)) == plain_text([7, 8], options)[0]
    assert list(engine.generate_ids([7, 250], options)) == plain_text([7, 250], options)[0]
    assert caches[1].num_free_pages == caches[1].num_pages


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_failing_draft_releases_its_pages(kind):
    engine, _, draft, caches = drafted_engine(script)
    draft.fail_at, draft.error = 6, kind("injected")
    with pytest.raises(kind):
        list(engine.generate_ids([7, 8], {"temperature": 0}))
    assert [cache.num_free_pages for cache in caches] == [cache.num_pages for cache in caches]
    draft.fail_at = None
    options = {"temperature": 0, "max_new_tokens": 50}
    assert list(engine.generate_ids([7, 8], options)) == plain_text([7, 8], options)[0]


def test_a_stopped_request_releases_the_drafts_pages():
    engine, _, _, caches = drafted_engine(script)
    generation = engine.generate_ids([7, 8], {"temperature": 0})
    next(generation), next(generation), next(generation)
    assert caches[1].num_free_pages < caches[1].num_pages
    generation.close()
    assert [cache.num_free_pages for cache in caches] == [cache.num_pages for cache in caches]


@pytest.fixture(scope="module")
def draft_dir(tmp_path_factory):
    """A smaller model with the vocabulary of `tiny_model_dir`."""
    return write_tiny_model(
        tmp_path_factory.mktemp("draft") / "model", seed=9, hidden_size=32, num_hidden_layers=1,
        intermediate_size=64,
    )


@pytest.mark.parametrize("options", [
    {"temperature": 0}, {"temperature": 0.8, "top_k": 3, "seed": 5, "repetition_penalty": 1.2},
    {"temperature": 0, "guidance_scale": 1.5, "negative_prompt": "def"},
])
@pytest.mark.parametrize("own", [True, False])
def test_on_the_compiled_kernels_the_text_is_the_same(tiny_model_dir, draft_dir, options, own):
    """Alone and in a batch, with good and with bad guesses."""
    options = options | {"max_new_tokens": 60, "ban_eos_token": True}
    prompts = [[40, 50 + i, 60] * (5 + 40 * i) for i in range(3)]
    sizes = {"ctx_size": 2048, "cache_type": "q8", "chunk_size": 64, "max_batch_size": 8}
    with exl_loader.load(tiny_model_dir, **sizes) as model:
        plain = [list(model.generate_ids(prompt, options)) for prompt in prompts]
    folder = tiny_model_dir if own else draft_dir
    with draft_fully(exl_loader.load(tiny_model_dir, model_draft=folder, **sizes)) as model:
        generation = model.generate_ids(prompts[0], options)
        assert list(generation) == plain[0]
        assert generation.stats.accepted_tokens > (10 if own else -1)
        assert in_threads(lambda prompt: list(model.generate_ids(prompt, options)),
                          prompts) == plain


def test_the_demo_model_as_its_own_draft():
    options = {"temperature": 0, "max_new_tokens": 64}
    with exl_loader.load(DEMO_MODEL, ctx_size=512) as model:
        text = "".join(model.generate("def read(path):", options))
    drafted = {"model_draft": DEMO_MODEL, "draft_max": 3}
    with draft_fully(exl_loader.load(DEMO_MODEL, ctx_size=512, **drafted)) as model:
        generation = model.generate("def read(path):", options)
        assert "".join(generation) == text
        # Three of four tokens, less what the end of the text cuts off.
        assert generation.stats.accepted_tokens > 0.7 * generation.stats.new_tokens


@pytest.fixture
def nothing_left():
    gc.collect()
    before = memory.live_bytes()
    yield
    gc.collect()
    assert memory.live_bytes() == before


@pytest.mark.parametrize("ctx_size_draft", [0, 300])
@pytest.mark.parametrize("cache_type", ["fp16", "q4"])
def test_the_drafts_memory_is_in_the_reservation(
    tiny_model_dir, draft_dir, nothing_left, ctx_size_draft, cache_type
):
    options = {"cache_type": cache_type, "model_draft": draft_dir, "ctx_size_draft": ctx_size_draft}
    plan = exl_loader.plan(tiny_model_dir, ctx_size=CTX, **options)
    alone = exl_loader.plan(tiny_model_dir, ctx_size=CTX, cache_type=cache_type)
    draft = exl_loader.plan(draft_dir, ctx_size=ctx_size_draft or CTX, cache_type=cache_type)
    for part in ("weights_bytes", "cache_bytes", "workspace_bytes", "total_bytes"):
        assert getattr(plan, part) == getattr(alone, part) + getattr(draft, part)
    assert plan.devices[0].draft_bytes == draft.total_bytes
    assert (plan.model_draft, plan.ctx_size_draft) == (str(draft_dir), ctx_size_draft or CTX)
    assert alone.model_draft is None and alone.devices[0].draft_bytes == 0
    with exl_loader.load(tiny_model_dir, ctx_size=CTX, **options) as model:
        assert model.allocated_bytes() == memory.live_bytes() == plan.total_bytes
        list(model.generate_ids([1, 50, 99], {"max_new_tokens": 30, "seed": 1}))
        assert model.allocated_bytes() == memory.live_bytes() == plan.total_bytes


def test_model_and_draft_must_fit_together(tiny_model_dir, draft_dir, nothing_left):
    total = exl_loader.plan(tiny_model_dir, ctx_size=CTX, model_draft=draft_dir).total_bytes
    options = {"ctx_size": CTX, "model_draft": draft_dir}
    with pytest.raises(InsufficientMemory) as caught:
        exl_loader.load(tiny_model_dir, memory_limit=total - 1, **options)
    assert caught.value.reservation.devices[0].missing_bytes == 1
    exl_loader.load(tiny_model_dir, memory_limit=total, **options).unload()
    alone = exl_loader.plan(tiny_model_dir, ctx_size="auto", memory_limit=total)
    both = exl_loader.plan(
        tiny_model_dir, ctx_size="auto", memory_limit=total, model_draft=draft_dir
    )
    assert both.fits and both.ctx_size < alone.ctx_size


def test_layers_are_split_over_devices_next_to_a_draft(tiny_model_dir, draft_dir):
    """The draft is on the first layer's device, and every device keeps its limit."""
    options = {"device": "cuda:0,cuda:1", "vram": "2GiB,2GiB", "model_draft": draft_dir}
    whole = exl_loader.plan(tiny_model_dir, ctx_size=CTX, **options)
    assert [d.device for d in whole.devices] == ["cuda:0", "cpu"]
    limit = whole.devices[0].total_bytes - 1
    split = exl_loader.plan(tiny_model_dir, ctx_size=CTX, memory_limit=limit, **options)
    assert split.fits and [d.end_layer for d in split.devices] == [1, 2, 2]
    assert [d.draft_bytes > 0 for d in split.devices] == [True, False, True]


def test_a_draft_with_another_vocabulary_is_refused(tiny_model_dir, tmp_path, nothing_left):
    bare = write_tiny_model(tmp_path / "bare", vocab_size=320, tokenizer=False)
    with pytest.raises(InvalidSettings, match="model_draft.*same vocabulary"):
        exl_loader.load(tiny_model_dir, ctx_size=CTX, model_draft=bare)
    other = write_tiny_model(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InvalidSettings, match="differs"):
        exl_loader.load(tiny_model_dir, ctx_size=CTX, model_draft=other)


def test_padding_of_the_vocabulary_makes_no_difference(tiny_model_dir, tmp_path):
    padded = write_tiny_model(tmp_path / "padded", vocab_size=320)
    for model_dir, draft_dir in ((tiny_model_dir, padded), (padded, tiny_model_dir)):
        options = {"max_new_tokens": 30, "temperature": 0, "ban_eos_token": True}
        with exl_loader.load(model_dir, ctx_size=CTX) as model:
            text = list(model.generate_ids([1, 50], options))
        with exl_loader.load(model_dir, ctx_size=CTX, model_draft=draft_dir) as model:
            assert list(model.generate_ids([1, 50], options)) == text


@pytest.mark.parametrize("options", [
    {"draft_max": 0}, {"draft_max": 32}, {"draft_max": "4"}, {"ctx_size_draft": -1},
])
def test_invalid_draft_options_are_refused(tiny_model_dir, draft_dir, options):
    (name,) = options
    with pytest.raises(InvalidSettings, match=name):
        exl_loader.load(tiny_model_dir, ctx_size=CTX, model_draft=draft_dir, **options)


def test_a_damaged_draft_frees_all_memory(tiny_model_dir, tmp_path, nothing_left):
    from safetensors.torch import load_file, save_file

    damaged = write_tiny_model(tmp_path / "damaged")
    file = damaged / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(InvalidCheckpoint):
        exl_loader.load(tiny_model_dir, ctx_size=CTX, model_draft=damaged)


def test_the_command_line_accepts_a_draft(tiny_model_dir, draft_dir, capsys):
    draft = ["--model-draft", str(draft_dir), "--ctx-size-draft", "300"]
    model = [str(tiny_model_dir), "--ctx-size", str(CTX)]
    assert cli.main(["plan", *model, *draft, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["ctx_size_draft"] == 300 and plan["devices"][0]["draft_bytes"] > 0
    assert cli.main(["plan", *model, *draft]) == 0
    assert "draft model" in capsys.readouterr().out
    arguments = ["generate", *model, "--prompt", "def", "--max-new-tokens", "8",
                 "--temperature", "0", "--json"]
    assert cli.main([*arguments, *draft, "--draft-max", "2"]) == 0
    drafted = json.loads(capsys.readouterr().out)
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["text"] == drafted["text"]
    assert drafted["allocated_bytes"] == plan["total_bytes"]
