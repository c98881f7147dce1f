"""Compare exl_loader with llama.cpp on this machine: `python -m benchmarks.cpu.speed [--quick]`.

Makes a random Llama of 1.1 B geometry as EXL2 at 4.5 bits a weight and the same weights as
GGUF in Q4_0 and Q4_K_M. Both engines run in processes of their own, with as many threads, and
take turns within each round, the order reversed in every second one: a ratio is the median
over rounds of pairs that ran right after each other. They must agree on a prompt's logits
before anything is timed. Both engines fill a context with copies of its first 256 tokens' cache,
because the content of a cache does not change the time.

llama.cpp comes with llama-cpp-python, built natively, in an environment of its own:

    python -m venv llama && CMAKE_ARGS=-DGGML_NATIVE=ON llama/bin/pip install \\
        --no-binary llama-cpp-python llama-cpp-python==0.3.36 gguf numpy
    python -m benchmarks.cpu.speed --llama-python llama/bin/python

Of several interpreters the first whose llama.cpp computes a prompt is used: a build for a
machine's own instruction set may end by SIGILL in a virtual machine, and a build without AMX
runs. What ends by itself is left out from then on, and a table says so.

Parts, caches and depths can be measured one at a time: results are merged into one JSON file,
from which table and picture are made.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import REPO
from benchmarks.cpu import speed_models
from benchmarks.cpu.contestants import Contestant, ContestantEnded, Worker
from benchmarks.cpu.plot import write_picture
from benchmarks.cpu.read_bandwidth import Bandwidth
from benchmarks.cpu.report import (
    SKIPPED,
    Results,
    nearest,
    picture_name,
    read_machines,
    tables,
    update_document,
)
from benchmarks.cpu.worker import random_ids
from exl_loader.backends.cpu.threads import default_threads
from exl_loader.utils.system.processors import cpu_name

DOCS = REPO / "docs"
PARTS = ("load", "speed", "batch", "curve")
CACHES = ("fp16", "q8", "q4")
DEPTHS = (0, 2048, 8192)
CURVE_DEPTHS = (0, 1024, 2048, 4096, 6144, 8192)
CURVE_CACHES = ("fp16", "q4")
DECODE_TOKENS = 24
PROMPT_TOKENS = 256
# llama.cpp reads some 20 tokens a second where the cache is quantised and long.
LONG_DEPTH, LONG_PROMPT_TOKENS = 4096, 64
FIRST_TOKEN_PROMPT = 512
# Requests at once, tokens that each generates, and the context that they share.
BATCHES = (1, 8)
BATCH_TOKENS, BATCH_CTX_SIZE = 48, 4096
# Context beyond the largest depth, for the tokens that are timed.
TIMED_TOKENS = 1024
# Weights and cache in the record of an interpreter whose llama.cpp does not run.
EVERY = "all"
# Cosine of two engines' logits for random weights quantised twice to 4 bits: about 0.9 if right.
LEAST_COSINE = 0.7


class Bench:
    """The models, their sizes, the bandwidth and the results that all measurements share.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace):
        self.threads: int = args.threads
        self.llama_python: str | None = None
        self.rounds: int = args.rounds
        config = json.loads(args.config.read_text()) if args.config else None
        self.models = {"EXL2": speed_models.write_exl2(args.work / "exl2", config)}
        self.vocab_size = json.loads((self.models["EXL2"] / "config.json").read_text())[
            "vocab_size"
        ]
        self.results = Results.read(args.json, args.machine)
        if args.llama_python:
            self.results.drop(what=SKIPPED, engine="llama.cpp", weights=EVERY)
        for python in args.llama_python:
            if self._use_llama(python, args.work / "gguf"):
                break
        self.bytes_per_token = {
            name: speed_models.bytes_per_token(path, self.llama_python)
            for name, path in self.models.items()
        }
        self.cache_bytes = speed_models.cache_bytes_per_token(self.models["EXL2"])
        self.bandwidth = Bandwidth(self.threads)
        # Those that ended by themselves, which are not started again.
        self.ended: set[Contestant] = set()

    def _use_llama(self, python: str, folder: Path) -> bool:
        """Use an interpreter's llama.cpp if it computes a prompt; otherwise record why not."""
        build, everyone = "", Contestant("llama.cpp", EVERY, EVERY)
        try:
            try:
                models = speed_models.write_gguf(folder, self.models["EXL2"], python)
            except subprocess.CalledProcessError as error:
                raise ContestantEnded(everyone, "quantising", error.returncode) from error
            name, path = next(iter(models.items()))
            contestant = Contestant("llama.cpp", name, "fp16")
            with Worker(contestant, path, TIMED_TOKENS, self.threads, python) as worker:
                build = worker.build
                worker.do("logits", ids=random_ids(64, self.vocab_size, seed=1))
        except ContestantEnded as error:
            self.skip(everyone, str(error), build)
            return False
        self.llama_python = python
        self.models |= models
        return True

    def skip(self, contestant: Contestant, reason: str, build: str, **labels: Any) -> None:
        """Record that a contestant is left out."""
        print(f"skipped: {contestant}: {reason}", file=sys.stderr, flush=True)
        self.results.put({
            "what": SKIPPED, "engine": contestant.engine, "weights": contestant.weights,
            "cache": contestant.cache, **labels, "build": build, "reason": reason,
        })  # fmt: skip

    def contestants(self, cache: str) -> list[Contestant]:
        """List who runs with a cache type; with a quantised one also our own float16."""
        ours = [Contestant("exl_loader", "EXL2", cache)]
        if cache != "fp16":
            ours.append(Contestant("exl_loader", "EXL2", "fp16"))
        theirs = [name for name in self.models if name != "EXL2"]
        everyone = ours + [Contestant("llama.cpp", name, cache) for name in theirs]
        return [contestant for contestant in everyone if contestant not in self.ended]

    def worker(self, contestant: Contestant, ctx_size: int, requests: int = 1) -> Worker:
        model = self.models[contestant.weights]
        return Worker(contestant, model, ctx_size, self.threads, self.llama_python, requests)

    def end(self, error: ContestantEnded, build: str, **labels: Any) -> None:
        """Leave a contestant out from now on."""
        self.ended.add(error.contestant)
        self.skip(error.contestant, str(error), build, **labels)

    def workers(
        self, stack: ExitStack, contestants: list[Contestant], ctx_size: int, requests: int = 1
    ) -> list[Worker]:
        """Start workers and check that they agree on the logits of a prompt."""
        ids = random_ids(64, self.vocab_size, seed=1)
        workers, rows = [], []
        for contestant in contestants:
            build = ""
            try:
                worker = stack.enter_context(self.worker(contestant, ctx_size, requests))
                build = worker.build
                rows.append(worker.do("logits", ids=ids))
            except ContestantEnded as error:
                self.end(error, build)
            else:
                workers.append(worker)
        for worker, row in zip(workers[1:], rows[1:], strict=True):
            if cosine(rows[0], row) < LEAST_COSINE:
                raise SystemExit(f"{worker.contestant} computes something else")
        return workers

    def take_turns(
        self, workers: list[Worker], task: str, rounds: int, labels: dict, **arguments: Any
    ) -> None:
        """Time a task in all workers, round by round, and keep the results.

        The memory bandwidth is measured before each turn, because on a shared machine it changes.
        """
        times: dict[Contestant, list[float]] = {w.contestant: [] for w in workers}
        speeds: dict[Contestant, list[float]] = {w.contestant: [] for w in workers}
        for i in range(rounds):
            for worker in list(workers) if i % 2 == 0 else workers[::-1]:
                speeds[worker.contestant].append(self.bandwidth.measure())
                try:
                    times[worker.contestant].append(worker.do(task, **arguments))
                except ContestantEnded as error:
                    self.end(error, worker.build, **labels)
                    workers.remove(worker)
        for worker in workers:
            self.keep(worker, task, labels, seconds=times[worker.contestant],
                      read_bytes_per_s=speeds[worker.contestant])

    def keep(self, worker: Worker, what: str, labels: dict, **figures: Any) -> None:
        c = worker.contestant
        self.results.put({
            "what": what, "engine": c.engine, "weights": c.weights, "cache": c.cache, **labels,
            "version": worker.version, "build": worker.build, "threads": self.threads,
            "weight_bytes_per_token": self.bytes_per_token[c.weights],
            "cache_bytes_per_token": self.cache_bytes[c.cache],
            "load_average": os.getloadavg()[0],
            "at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
            **figures,
        })  # fmt: skip


def cosine(a: list[float], b: list[float]) -> float:
    products = sum(x * y for x, y in zip(a, b, strict=True))
    squares = sum(x * x for x in a) * sum(y * y for y in b)
    return float(products / squares**0.5)


def measure_load(bench: Bench) -> None:
    """Start every engine several times, in turns, its file in the page cache."""
    contestants = bench.contestants("fp16")
    loads: dict[Contestant, list[float]] = {c: [] for c in contestants}
    tasks: dict[Contestant, list[dict[str, float]]] = {c: [] for c in contestants}
    peaks: dict[Contestant, list[int]] = {c: [] for c in contestants}
    last = {}
    for i in range(bench.rounds + 1):
        for contestant in list(contestants) if i % 2 == 0 else contestants[::-1]:
            try:
                with bench.worker(contestant, TIMED_TOKENS) as worker:
                    worker.do("prefill", depth=0, count=PROMPT_TOKENS)
                    if i:  # the first may have read from the disk
                        loads[contestant].append(worker.load_s)
                        tasks[contestant].append(worker.load_tasks)
                        peaks[contestant].append(worker.do("peak"))
                last[contestant] = worker
            except ContestantEnded as error:
                bench.end(error, "")
                contestants.remove(contestant)
    for contestant in contestants:
        bench.keep(last[contestant], "load", {}, seconds=loads[contestant],
                   tasks=tasks[contestant], peak_bytes=max(peaks[contestant]),
                   file_bytes=speed_models.file_bytes(bench.models[contestant.weights]))


def measure_speed(bench: Bench, cache: str, depth: int) -> None:
    """Time decoding and prefill at a depth; at depth 0 the first token as well."""
    prompt = LONG_PROMPT_TOKENS if depth >= LONG_DEPTH else PROMPT_TOKENS
    prompt_rounds = max(2, bench.rounds // 2)
    with ExitStack() as stack:
        workers = bench.workers(stack, bench.contestants(cache), depth + TIMED_TOKENS)
        labels = {"depth": depth, "beside": cache}
        bench.take_turns(workers, "decode", bench.rounds, labels | {"tokens": DECODE_TOKENS},
                         depth=depth, count=DECODE_TOKENS)
        bench.take_turns(workers, "prefill", prompt_rounds, labels | {"tokens": prompt},
                         depth=depth, count=prompt)
        if depth == 0:
            bench.take_turns(workers, "first_token", prompt_rounds,
                             labels | {"tokens": FIRST_TOKEN_PROMPT}, count=FIRST_TOKEN_PROMPT)


def measure_batch(bench: Bench, cache: str) -> None:
    """Time greedy generation of several requests at once, the scheduler included.

    llama.cpp runs a token of every sequence by one `llama_decode`, as llama-server does.
    """
    contestants = [c for c in bench.contestants(cache) if c.cache == cache]
    for requests in BATCHES:
        with ExitStack() as stack:
            workers = bench.workers(stack, contestants, BATCH_CTX_SIZE, requests)
            labels = {"requests": requests, "tokens": requests * BATCH_TOKENS}
            bench.take_turns(workers, "batch", bench.rounds, labels, count=BATCH_TOKENS)


def measure_curve(bench: Bench) -> None:
    """Time decoding at many depths: our own cache types, and llama.cpp's at the nearest size."""
    rival = nearest(bench.bytes_per_token)
    everyone = dict.fromkeys(c for cache in CURVE_CACHES for c in bench.contestants(cache))
    contestants = [c for c in everyone if c.ours or c.weights == rival]
    with ExitStack() as stack:
        workers = bench.workers(stack, contestants, max(CURVE_DEPTHS) + TIMED_TOKENS)
        for depth in CURVE_DEPTHS:
            labels = {"depth": depth, "tokens": DECODE_TOKENS // 2}
            bench.take_turns(workers, "decode", bench.rounds, labels | {"beside": "curve"},
                             depth=depth, count=DECODE_TOKENS // 2)


def requested_tasks(args: argparse.Namespace) -> Iterator[tuple]:
    if "load" in args.part:
        yield (measure_load,)
    if "speed" in args.part:
        for cache in args.cache:
            for depth in args.depth:
                yield measure_speed, cache, depth
    if "batch" in args.part:
        for cache in args.cache:
            yield measure_batch, cache
    if "curve" in args.part:
        yield (measure_curve,)


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cache", nargs="+", choices=CACHES, default=list(CACHES))
    parser.add_argument("--depth", nargs="+", type=int, default=list(DEPTHS))
    parser.add_argument("--quick", action="store_true",
                        help="speed and batch alone, fp16 and q4, depths 0 and 2048, three "
                        "rounds")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--llama-python", nargs="+", default=[], metavar="PYTHON",
                        help="interpreters with llama-cpp-python and gguf, of which the first that "
                        "runs here is used; without one exl_loader is measured alone")
    parser.add_argument("--machine", default=cpu_name(),
                        help="this machine's name in results and tables (default %(default)s)")
    parser.add_argument("--work", type=Path, help="folder for the models (3 GB)",
                        default=Path.home() / ".cache" / "exl_loader" / "benchmark")
    parser.add_argument("--config", type=Path, help="another geometry: a config.json")
    parser.add_argument("--json", type=Path, default=DOCS / "benchmarks-cpu.json",
                        help="results are merged into this file")
    parser.add_argument("--pictures", type=Path, default=DOCS / "images",
                        help="folder of a picture for each machine")
    parser.add_argument("--document", type=Path, default=DOCS / "benchmarks.md",
                        help="tables are put between its marks")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    args = parser.parse_args(argv)
    if args.quick:
        args.part, args.rounds = ["speed", "batch"], 3
        args.cache, args.depth = ["fp16", "q4"], [0, 2048]
    return args


def main(argv: list[str] | None = None) -> None:
    args = read_arguments(argv)
    if not args.report:
        bench = Bench(args)
        results = bench.results
        for function, *arguments in requested_tasks(args):
            function(bench, *arguments)
            results.write()
            name = function.__name__.removeprefix("measure_")
            print("measured:", name, *arguments, file=sys.stderr, flush=True)
    machines = read_machines(args.json)
    for found in machines:
        if args.report or found.machine == args.machine:
            print(f"{found.machine}\n\n{tables(found)}")
        write_picture(found, args.pictures / picture_name(found.machine))
    if args.document.exists():
        update_document(machines, args.document)


if __name__ == "__main__":
    main()
