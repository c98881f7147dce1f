"""Thousands of requests from many threads: no lost page, wrong text or growing memory."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from pathlib import Path

import pytest

import exl_loader
from exl_loader.cache.paging import PagedSequence
from exl_loader.engine import LoadedModel
from exl_loader.generation.jobs import Job
from exl_loader.utils.errors import InvalidSettings, PromptTooLong
from support import exhaustive

pytestmark = pytest.mark.usefixtures("two_threads")

NUM_REQUESTS = 5000 if os.environ.get(exhaustive.ENV) else 1000
NUM_THREADS = 16
NUM_TEXTS = 60
CTX_SIZE = 4096
SHIPPED_MODEL = Path(exl_loader.__file__).parent / "demo_model"
Request = tuple[list[int], dict]


def make_request(rng: random.Random, base: list[int]) -> Request:
    """Return a prompt that shares a beginning of any length with others, and settings."""
    fork, length = rng.randrange(len(base)), rng.randint(1, len(base))
    prompt = [*base[:fork], *(rng.randint(3, 250) for _ in base)][:length]
    settings: dict = {"seed": rng.randrange(1000), "max_new_tokens": rng.randint(1, 30)}
    settings["temperature"] = rng.choice([0, 0.7, 1.5])
    extras: list[dict] = [
        {}, {"top_k": 20}, {"top_p": 0.8, "min_p": 0.02}, {"repetition_penalty": 1.3},
        {"stop_strings": ["e", "th"]}, {"logprobs": 3}, {"ban_eos_token": True},
        {"prompt_lookup_num_tokens": 4}, {"xtc_probability": 0.5}, {"dry_multiplier": 0.8},
        {"guidance_scale": 1.7, "negative_prompt": "not this"},
        {"mirostat_mode": 2}, {"banned_strings": ["e", "th", "in"]},
        {"banned_strings": ["a", "\n  "], "repetition_penalty": 1.3, "logprobs": 1},
    ]
    return prompt, settings | rng.choice(extras)


class Worker(threading.Thread):
    """Sends requests until none is left, and compares each text with the one generated alone."""

    def __init__(self, seed: int, model: LoadedModel, texts: list[tuple[Request, list[int]]],
                 left: list[None]) -> None:
        super().__init__(daemon=True)
        self.rng = random.Random(seed)
        self.model, self.texts, self.left = model, texts, left
        self.counts = dict.fromkeys(("whole", "cancelled", "failed", "refused"), 0)
        self.wrong: list[object] = []

    def run(self) -> None:
        try:
            while self.left:
                self.left.pop()
                self.request()
        except IndexError:
            return
        except BaseException as error:
            self.wrong.append(error)

    def request(self) -> None:
        (prompt, settings), expected = self.rng.choice(self.texts)
        kind = self.rng.choices(["whole", "cancelled", "refused"], [75, 20, 5])[0]
        if kind == "refused":
            self.refused(prompt)
            return
        generation = self.model.generate_ids(prompt, settings)
        end = self.rng.randrange(30) if kind == "cancelled" else 1000
        try:
            ids = self.read(generation, end)
        except RuntimeError as error:
            assert str(error) == "injected"
            kind, ids = "failed", generation.token_ids
        whole = kind == "whole"
        if (ids != expected) if whole else (ids != expected[: len(ids)]):
            self.wrong.append((prompt, settings, ids, expected))
        self.counts[kind] += 1

    def refused(self, prompt: list[int]) -> None:
        if self.rng.random() < 0.5:
            with pytest.raises(PromptTooLong):
                self.model.generate_ids([*prompt, *[5] * CTX_SIZE])
        else:
            with pytest.raises(InvalidSettings):
                self.model.generate_ids(prompt, {"temperature": -1})
        self.counts["refused"] += 1

    def read(self, generation, end: int) -> list[int]:
        ids = []
        for token_id in generation:
            ids.append(token_id)
            if len(ids) > end:
                how = self.rng.randrange(4)
                if how == 0:
                    generation.close()
                elif how == 1:
                    generation.stop()
                    ids += list(generation)
                elif how == 2:
                    threading.Thread(target=generation.stop).start()
                    ids += list(generation)
                # Else it is dropped as it is.
                break
        return ids


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def alive(kind: type) -> int:
    gc.collect()
    return sum(type(thing) is kind for thing in gc.get_objects())


def inject_errors(model: LoadedModel, rng: random.Random) -> None:
    """Let some passes fail; a failed batch is run again request by request."""
    inner = model._generator._scheduler.model
    forward = inner.forward

    def failing(entries, logits="last"):
        if rng.random() < 0.04:
            raise RuntimeError("injected")
        return forward(entries, logits)

    inner.forward = failing  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "longest"), [
    ("tiny", 700), pytest.param("shipped", 300, marks=pytest.mark.exhaustive),
])
def test_thousands_of_requests_from_sixteen_threads(name, longest, tiny_model_dir):
    rng = random.Random(20)
    base = [rng.randint(3, 250) for _ in range(longest)]
    requests = [make_request(rng, base) for _ in range(NUM_TEXTS)]
    folder = tiny_model_dir if name == "tiny" else SHIPPED_MODEL
    with exl_loader.load(folder, ctx_size=CTX_SIZE, cache_type="q4") as model:
        texts = []
        scheduler = model._generator._scheduler
        cache = scheduler.cache
        for request in requests:
            # Whoever takes all pages leaves nothing to be reused: each text is made alone.
            cache.release(cache.acquire(CTX_SIZE))
            texts.append((request, list(model.generate_ids(*request))))
        inject_errors(model, rng)
        workers = soak(model, texts)
        assert cache.num_free_pages == cache.num_pages == CTX_SIZE // 256
        assert not scheduler.active and not scheduler.waiting
        assert model.allocated_bytes() == model.reservation.total_bytes
    counts = {kind: sum(w.counts[kind] for w in workers) for kind in workers[0].counts}
    assert sum(counts.values()) == NUM_REQUESTS
    assert min(counts.values()) >= 20, counts
    assert alive(Job) == 0 and alive(PagedSequence) == 0


def soak(model: LoadedModel, texts: list[tuple[Request, list[int]]]) -> list[Worker]:
    """Run the requests; memory must not grow in the second half."""
    left: list[None] = [None] * NUM_REQUESTS
    workers = [Worker(seed, model, texts, left) for seed in range(NUM_THREADS)]
    began = time.monotonic()
    for worker in workers:
        worker.start()
    half_bytes = 0
    while any(worker.is_alive() for worker in workers):
        assert time.monotonic() - began < 500, "deadlock"
        if len(left) < NUM_REQUESTS // 2 and not half_bytes:
            half_bytes = resident_bytes()
        time.sleep(0.05)
    assert not [wrong for worker in workers for wrong in worker.wrong]
    assert resident_bytes() - half_bytes < 8 << 20
    return workers
