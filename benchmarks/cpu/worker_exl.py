"""Run exl_loader as a worker of speed.py; see worker.py.

Configuration: `model` (an EXL2 folder), `ctx_size`, `cache`, `requests`.
"""

from __future__ import annotations

import time

import torch

import exl_loader
from benchmarks.cpu.batching import decode
from benchmarks.cpu.worker import BATCH_PROMPT, FILL_TOKENS, random_ids, serve
from exl_loader.backends import get_ops
from exl_loader.cache.layout import PAGE_LEN

assert FILL_TOKENS == PAGE_LEN, "one page is computed, the others are copies of it"


class TaskTimes:
    """Measure how long each task of a load takes; a `Progress` of utils/progress.py."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began: dict[str, float] = {}

    def start(self, task: str, total: int | None, unit: str) -> None:
        self._began[task] = time.perf_counter()

    def advance(self, task: str, n: int = 1) -> None:
        pass

    def finish(self, task: str) -> None:
        self.seconds[task] = time.perf_counter() - self._began[task]


class Engine:
    """A loaded model, and one sequence that is set to the requested depth."""

    version = f"exl_loader {exl_loader.__version__}"
    build = ""

    def __init__(self, config: dict):
        times = TaskTimes()
        self.loaded = exl_loader.load(
            config["model"], ctx_size=config["ctx_size"], cache_type=config["cache"],
            max_batch_size=config["requests"], progress=times,
        )
        self.requests: int = config["requests"]
        self.load_tasks = times.seconds
        torch.set_num_threads(1)
        # Steps are timed below the generator, because its scheduling is no part of them.
        scheduler = self.loaded._generator._scheduler
        self.model, self.cache = scheduler.model, scheduler.cache
        self.ctx_size = config["ctx_size"]
        self.vocab_size = self.model.config.vocab_size
        self.sequence = None

    def decode(self, depth: int, count: int) -> float:
        sequence = self._at(depth)
        ids = random_ids(count + 1, self.vocab_size)
        self.model.forward([(sequence, ids[:1])])
        start = time.perf_counter()
        for token in ids[1:]:
            self.model.forward([(sequence, [token])])
        return time.perf_counter() - start

    def prefill(self, depth: int, count: int) -> float:
        sequence = self._at(depth)
        ids = random_ids(count, self.vocab_size)
        start = time.perf_counter()
        self._read(sequence, ids)
        return time.perf_counter() - start

    def first_token(self, count: int) -> float:
        self._drop()
        ids = random_ids(count, self.vocab_size)
        settings = {"temperature": 0, "max_new_tokens": 1, "ban_eos_token": True}
        start = time.perf_counter()
        next(iter(self.loaded.generate_ids(ids, settings)))
        return time.perf_counter() - start

    def batch(self, count: int) -> float:
        """Time the scheduler from the moment when every sequence has its first token."""
        self._drop()
        prompts = [random_ids(BATCH_PROMPT, self.vocab_size) for _ in range(self.requests)]
        rate = decode(self.loaded, prompts, count)[1]
        return count * self.requests / rate

    def logits(self, ids: list[int]) -> list[float]:
        row: list[float] = self._read(self._at(0), ids)[0].tolist()
        return row

    def _read(self, sequence, ids: list[int]) -> torch.Tensor:
        chunk = self.model.chunk_size
        for first in range(0, len(ids) - chunk, chunk):
            self.model.forward([(sequence, ids[first : first + chunk])], "none")
        return self.model.forward([(sequence, ids[(len(ids) - 1) // chunk * chunk :])])

    def _at(self, depth: int):
        """Return the sequence with `depth` tokens: one computed page and copies of it."""
        if self.sequence is None:
            self.sequence = self.cache.acquire(self.ctx_size)
            self._read(self.sequence, random_ids(PAGE_LEN, self.vocab_size, seed=0))
            first, *others = self.sequence.pages
            for layer in self.cache.layers:
                for part in (layer.k_codes, layer.k_scales, layer.v_codes, layer.v_scales):
                    if part is not None:
                        part[others] = part[first].clone()
        self.sequence.past_len = depth
        return self.sequence

    def _drop(self) -> None:
        if self.sequence is not None:
            self.cache.release(self.sequence)
            self.sequence = None


if __name__ == "__main__":
    get_ops("cpu")  # compiled before the clock of loading runs
    serve(Engine)
