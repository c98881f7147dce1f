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
from exl_loader.commands.speed import TimedText, run

assert FILL_TOKENS == PAGE_LEN, "TimedText computes one page, the others are copies of it"


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
    """A loaded model, and one text that is set to the requested depth."""

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
        self.vocab_size = self.loaded.config.vocab_size
        self.text = TimedText(
            scheduler.model, scheduler.cache, config["ctx_size"], self.vocab_size
        )

    def decode(self, depth: int, count: int) -> float:
        run(self.text.generate(depth, 1))
        return run(self.text.generate(depth + 1, count))

    def prefill(self, depth: int, count: int) -> float:
        return run(self.text.read(depth, count))

    def first_token(self, count: int) -> float:
        self.text.release()
        ids = random_ids(count, self.vocab_size)
        settings = {"temperature": 0, "max_new_tokens": 1, "ban_eos_token": True}
        start = time.perf_counter()
        next(iter(self.loaded.generate_ids(ids, settings)))
        return time.perf_counter() - start

    def batch(self, count: int) -> float:
        """Time the scheduler from the moment when every sequence has its first token."""
        self.text.release()
        prompts = [random_ids(BATCH_PROMPT, self.vocab_size) for _ in range(self.requests)]
        rate = decode(self.loaded, prompts, count)[1]
        return count * self.requests / rate

    def logits(self, ids: list[int]) -> list[float]:
        row: list[float] = run(self.text.logits(ids)).tolist()
        return row


if __name__ == "__main__":
    get_ops("cpu")  # compiled before the clock of loading runs
    serve(Engine)
