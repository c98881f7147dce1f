"""The engines that speed.py compares, and the process that each of them runs in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import REPO


@dataclass(frozen=True)
class Contestant:
    """An engine with the weights and the cache that it runs with."""

    engine: str  # exl_loader or llama.cpp
    weights: str  # EXL2, Q4_0 or Q4_K_M
    cache: str

    @property
    def ours(self) -> bool:
        return self.engine == "exl_loader"


class ContestantEnded(Exception):
    """The process of a contestant ended by itself. The text says how and at which task."""

    def __init__(self, contestant: Contestant, task: str, status: int) -> None:
        how = f"exit code {status}"
        if status < 0:
            try:
                how = signal.Signals(-status).name
            except ValueError:
                how = f"signal {-status}"
        super().__init__(f"ended by {how} at {task}")
        self.contestant = contestant


class Worker:
    """Run a contestant in a process of its own and send it tasks.

    Args:
        contestant: the engine, its weights and its cache type.
        model: an EXL2 folder or a GGUF file.
        ctx_size: tokens of its cache.
        threads: number of threads it computes with.
        llama_python: interpreter that has llama-cpp-python, for llama.cpp.
        requests: sequences that it runs at once.

    Raises:
        ContestantEnded: the process ended; its own message is on standard error.
    """

    def __init__(
        self, contestant: Contestant, model: Path, ctx_size: int, threads: int,
        llama_python: str | None, requests: int = 1,
    ):
        self.contestant = contestant
        config = {
            "model": str(model),
            "ctx_size": ctx_size,
            "cache": contestant.cache,
            "threads": threads,
            "requests": requests,
            "flash_attention": True,
        }
        script = "worker_exl" if contestant.ours else "worker_llama"
        python = sys.executable if contestant.ours else llama_python
        assert python is not None
        environment = os.environ | {"EXL_LOADER_THREADS": str(threads)}
        # Threads that wait asleep would slow llama.cpp down by a third.
        environment.pop("OMP_WAIT_POLICY", None)
        self._process = subprocess.Popen(
            [python, "-m", f"benchmarks.cpu.{script}"], text=True, bufsize=1, env=environment,
            cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        answer = self._ask(config, "loading")
        self.load_s: float = answer["load_s"]
        self.load_tasks: dict[str, float] = answer["load_tasks"]
        self.version: str = answer["version"]
        self.build: str = answer["build"]

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it ended before it read everything
        self._process.stdout.close()
        self._process.wait()

    def do(self, task: str, **arguments: Any) -> Any:
        """Run one task of worker.py in the process and return its result."""
        return self._ask({"do": task, **arguments}, task)["value"]

    def _ask(self, command: dict, task: str) -> dict:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ContestantEnded(self.contestant, task, self._process.wait())
        answer: dict = json.loads(line)
        return answer
