"""Prompts with the same beginning as earlier ones: only new tokens are evaluated."""

from __future__ import annotations

import pytest
import torch

import exl_loader
from exl_loader.backends import get_ops
from support import in_threads
from support.builds import Recorder
from support.fake_model import fake_engine
from support.model_builder import build_model
from support.tiny import write_tiny_model

GREEDY = {"temperature": 0, "ban_eos_token": True}


def next_of(text: list[int]) -> int:
    """A script that depends on the whole text in the pages."""
    return (sum(text) * 31 + len(text) * 7 + text[-1]) % 997 + 1


def continued(prompt: list[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(next_of(text))
    return text[len(prompt) :]


class Chat:
    """A scripted model; `ask` checks the answer and returns the number of evaluated tokens."""

    def __init__(self, **options) -> None:
        self.engine, self.model, self.cache = fake_engine(next_of, 1000, **options)

    def ask(self, prompt: list[int], count: int = 20) -> tuple[list[int], int]:
        self.model.calls.clear()
        generation = self.engine.generate_ids(prompt, GREEDY | {"max_new_tokens": count})
        answer = list(generation)
        assert answer == continued(prompt, count)
        evaluated = sum(map(sum, self.model.calls))
        # The answer's last token is never evaluated.
        in_prompt = evaluated - (count - 1)
        assert generation.stats.reused_tokens == len(prompt) - in_prompt
        return answer, in_prompt


def words(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(1, 999, (count,), generator=generator)).tolist()


@pytest.mark.parametrize("system_len", [10, 300, 1000])
def test_a_chat_evaluates_only_new_tokens(system_len):
    """Turns are shorter than a page and together longer, so reuse must not depend on pages."""
    chat = Chat(ctx_size=4096)
    prompt = words(system_len, 0)
    answer, evaluated = chat.ask(prompt)
    assert evaluated == system_len
    first_turn = prompt + answer
    message = words(50, 1)
    answer, evaluated = chat.ask(first_turn + message)
    # The answer's last token was drawn and never evaluated.
    assert evaluated == 1 + 50
    second_turn = first_turn + message + answer
    # Regenerated, from the same prompt.
    assert chat.ask(first_turn + message, 20)[1] == 1
    assert chat.ask(first_turn + message, 40)[1] == 1
    # The message edited at its tenth word.
    edited = first_turn + message[:10] + words(40, 2)
    assert chat.ask(edited)[1] == 40
    # Branches: the old message is continued, then the edited one.
    assert chat.ask(second_turn + words(30, 3))[1] <= 1 + 30
    assert chat.ask(edited)[1] == 1
    # Another chat with the same system prompt.
    other = prompt + words(30, 4)
    assert chat.ask(other)[1] == 30


def test_the_tokens_of_a_stopped_answer_are_reused():
    chat = Chat(ctx_size=1024)
    prompt = words(300, 0)
    generation = chat.engine.generate_ids(prompt, GREEDY | {"max_new_tokens": 100})
    answer = [next(generation) for _ in range(10)]
    generation.close()
    assert chat.ask(prompt + answer + [5])[1] == 2


def test_a_cache_of_one_page_reuses_tokens():
    chat = Chat(ctx_size=256)
    prompt = words(100, 0)
    answer, _ = chat.ask(prompt)
    assert chat.ask(prompt)[1] == 1
    assert chat.ask(prompt + answer + [3, 4])[1] == 3


def test_evicted_tokens_are_evaluated_again():
    chat = Chat(ctx_size=1024)
    first, second = words(900, 0), words(900, 1)
    chat.ask(first)
    assert chat.ask(second)[1] == 900
    assert chat.ask(first)[1] == 900


def test_concurrent_requests_share_a_prompt_that_is_still_evaluated():
    chat = Chat(ctx_size=4096, max_batch_size=4)
    prompt = words(1000, 0)
    texts = [prompt + [i + 1] * 5 for i in range(4)]
    settings = GREEDY | {"max_new_tokens": 10}
    answers = in_threads(lambda text: list(chat.engine.generate_ids(text, settings)), texts)
    assert answers == [continued(text, 10) for text in texts]
    assert sum(map(sum, chat.model.calls)) - 4 * 9 == 1000 + 4 * 5
    assert chat.cache.num_free_pages == 16


def test_prompt_logits_evaluate_everything():
    chat = Chat(ctx_size=512)
    prompt = words(300, 0)
    chat.ask(prompt)
    chat.model.calls.clear()
    assert chat.engine.prompt_logits(prompt).argmax(dim=1).tolist() == [
        next_of(prompt[: i + 1]) for i in range(300)
    ]
    assert sum(map(sum, chat.model.calls)) == 300


def test_progress_counts_reused_tokens():
    chat = Chat(ctx_size=512, chunk_size=64)
    prompt = words(100, 0)
    chat.ask(prompt)
    progress = Recorder()
    settings = GREEDY | {"max_new_tokens": 2}
    list(chat.engine.generate_ids([*prompt[:90], *words(80, 5)], settings, progress=progress))
    assert progress.calls == [
        ("start", "prompt", 170, "tokens"), *(("advance", "prompt", n) for n in (90, 64, 16)),
        ("finish", "prompt"),
    ]


# On the compiled kernels


@pytest.mark.parametrize("cache_type", ["fp16", "q4"])
@pytest.mark.parametrize("stored", [1, 100, 256, 300])
def test_logits_after_reused_tokens_are_bit_identical(cache_type, stored, tiny_model_dir):
    model, cache = build_model(
        tiny_model_dir, get_ops("cpu"), cache_type=cache_type, sequences=2, chunk_size=256
    )
    generator = torch.Generator().manual_seed(stored)
    ids = torch.randint(3, 250, (330,), generator=generator).tolist()

    def last_rows(text: list[int], reuse: bool) -> torch.Tensor:
        sequence = cache.acquire(len(text), text if reuse else ())
        assert (sequence.past_len > 0) == reuse
        while sequence.past_len < 310:
            chunk = text[sequence.past_len : min(310, sequence.past_len + 256)]
            model.forward([(sequence, chunk)], "none")
            cache.commit(sequence, text)
        rows = [model.forward([(sequence, [i])]).clone() for i in text[310:]]
        cache.commit(sequence, text)
        cache.release(sequence)
        return torch.cat(rows)

    alone = last_rows(ids, reuse=False)
    # Another end of the chunk, and tokens that were evaluated one by one.
    other = [*ids[:stored], *(i + 1 for i in ids[stored:])]
    cache.release(cache.acquire(512 * 2))
    last_rows(other, reuse=False)
    assert torch.equal(last_rows(ids, reuse=True), alone)


def test_texts_are_the_same_with_and_without_reuse(tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    settings = {"temperature": 0.9, "seed": 3, "max_new_tokens": 30, "ban_eos_token": True}
    prompts = [words(400, 0)[:length] for length in (50, 400, 200, 399, 260)]
    prompts = [[i % 250 + 3 for i in prompt] for prompt in prompts]
    with exl_loader.load(folder, ctx_size=512, cache_type="q8") as model:
        fresh = []
        for prompt in prompts:
            # This evaluation takes every page, so no token can be reused.
            model.prompt_logits([5] * 512)
            generation = model.generate_ids(prompt, settings)
            fresh.append(list(generation))
            assert generation.stats.reused_tokens == 0
        for prompt, text in zip(prompts, fresh, strict=True):
            list(model.generate_ids(prompt[:-7], settings | {"max_new_tokens": 1}))
            generation = model.generate_ids(prompt, settings)
            assert list(generation) == text
            assert generation.stats.reused_tokens >= len(prompt) - 7


def test_texts_with_different_dynamic_rope_frequencies_share_nothing(tmp_path):
    """The frequencies depend on the length that a text may reach."""
    folder = write_tiny_model(
        tmp_path / "model", max_position_embeddings=128,
        rope_scaling={"rope_type": "dynamic", "factor": 2.0},
    )
    prompt = [i % 250 + 3 for i in words(100, 0)]
    with exl_loader.load(folder, ctx_size=512) as model:
        def reused(max_new_tokens: int) -> int:
            settings = GREEDY | {"max_new_tokens": max_new_tokens}
            generation = model.generate_ids(prompt, settings)
            list(generation)
            return generation.stats.reused_tokens

        assert reused(1) == 0
        assert reused(28) == 99, "128 tokens are within the model's own length"
        assert reused(29) == 0
        assert reused(29) == 99
        assert reused(60) == 0
