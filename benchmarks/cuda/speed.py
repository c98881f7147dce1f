"""Measure tokens a second on a CUDA device, their share of the bandwidth, and exllamav2's.

    python -m benchmarks.cuda.speed                      # everything, under 10 minutes on an H200
    python -m benchmarks.cuda.speed --models 7B --depths 0,16384 --cache-types q4,fp16

Random EXL2 models are made on the spot (speed_models.py). A decode step reads all weights and
the cache up to its depth once; the share is that of the measured copy bandwidth (a copy's
reads and writes together). Contexts are not filled first: what a cache holds does not change
how long it takes to read it. Where exllamav2 is installed the two engines take turns, and the
better of each one's rounds counts. The cache type `fp16` is float16 in exllamav2, and 16 bits with
a shared scale in exl_loader.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

import exl_loader
from benchmarks.cuda import exllamav2
from benchmarks.cuda.speed_models import GEOMETRIES, write_model
from exl_loader.cache.layout import CacheType
from exl_loader.checkpoint import Checkpoint
from exl_loader.checkpoint.config import ModelConfig
from exl_loader.commands.evaluation import Lane, run_lanes
from exl_loader.commands.evaluation_plan import plan_evaluation

CACHE_TYPES = ("fp16", "q8", "q6", "q4")
DEPTHS = (0, 4096, 16384, 32768)
PROMPT = 4096
STEPS = 64
# A step's shape is recorded at its first run, captured at its second.
WARM_UP = 4


class Ours:
    """One model of ours with one cache type, with the methods of `exllamav2.Peer`."""

    def __init__(self, model: Any, cache: Any, ctx_size: int):
        self._model, self._cache, self._ctx_size = model, cache, ctx_size

    def decode(self, depth: int, steps: int) -> None:
        sequence, token = self._cache.acquire(self._ctx_size), 5
        sequence.past_len = depth
        for _ in range(steps):
            (row,) = self._model.forward_rows([(sequence, [token])])
            token = row.argmax(self._model.config.vocab_size)
        self._cache.release(sequence)

    def prefill(self, tokens: int) -> None:
        sequence = self._cache.acquire(self._ctx_size)
        vocab_size, chunk = self._model.config.vocab_size, self._model.chunk_size
        ids = [i % (vocab_size - 3) + 3 for i in range(tokens)]
        for first in range(0, tokens, chunk):
            part = ids[first : first + chunk]
            last = first + chunk >= tokens
            logits = self._model.forward([(sequence, part)], "last" if last else "none")
        int(logits[0].argmax())
        self._cache.release(sequence)


def copy_bandwidth(nbytes: int = 2 << 30, repeats: int = 20) -> float:
    """Measure bytes a second of a large copy, read and written together."""
    source = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            target.copy_(source)
        torch.cuda.synchronize()
        best = max(best, 2 * nbytes * repeats / (time.perf_counter() - start))
    return best


def weight_bytes(folder: Path) -> int:
    """Return the bytes on disk that a decode step reads: all but the embedding."""
    with Checkpoint.open(folder) as checkpoint:
        return sum(
            header.nbytes for name, header in checkpoint.headers.items()
            if not name.startswith("model.embed_tokens")
        )


def timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(engines: dict[str, Any], depths: list[int], prompt: int, steps: int,
            rounds: int) -> dict[str, dict[str, float]]:
    """Time every engine in turns.

    Returns:
        engine -> {`prefill`: tokens/s, depth as text: tokens/s}.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in engines}
    for engine in engines.values():
        engine.prefill(prompt)
    for _ in range(rounds):
        for name, engine in engines.items():
            rate = prompt / timed(lambda engine=engine: engine.prefill(prompt))
            found[name]["prefill"] = max(rate, found[name].get("prefill", 0.0))
    for depth in depths:
        for engine in engines.values():
            engine.decode(depth, WARM_UP)
        for _ in range(rounds):
            for name, engine in engines.items():
                run = timed(lambda engine=engine, depth=depth: engine.decode(depth, steps))
                rate = steps / run
                found[name][str(depth)] = max(rate, found[name].get(str(depth), 0.0))
    return found


def lend(lanes: list[Lane]) -> Iterator[list[Lane]]:
    """Yield the lanes, so that the caller's own thread uses them until it asks for more."""
    yield lanes


@contextmanager
def opened(folder: Path, ctx_size: int, chunk_size: int, cache_types: list[str]
           ) -> Iterator[tuple[Any, dict[str, Ours]]]:
    """Load our engine once, with a cache of each type."""
    others = [CacheType.parse(name) for name in cache_types if name != "fp16"]
    config = ModelConfig.from_dir(folder)
    planned = plan_evaluation(str(folder), others, config=config, ctx_size=ctx_size)
    with (
        exl_loader.load(folder, ctx_size=ctx_size, cache_type="fp16", chunk_size=chunk_size,
                        max_batch_size=1) as loaded,
        closing(run_lanes(loaded, planned, lend)) as lent,
    ):
        yield loaded, {
            lane.name: Ours(lane.model, lane.cache, ctx_size) for lane in next(lent)
            if lane.name in cache_types
        }


def measure_model(name: str, folder: Path, arguments: argparse.Namespace, bandwidth: float
            ) -> Iterator[dict[str, Any]]:
    """Measure one model; yield a row for each engine and cache type."""
    config = ModelConfig.from_dir(folder)
    ctx_size = max(*arguments.depths, arguments.prompt) + 256
    base = weight_bytes(folder)
    peer = None
    start = time.perf_counter()
    with opened(folder, ctx_size, arguments.chunk_size, arguments.cache_types) as (loaded, ours):
        load_s = time.perf_counter() - start
        if arguments.peer and exllamav2.installed():
            peer = exllamav2.Peer(folder, ctx_size, arguments.chunk_size)
        for cache_type, engine in ours.items():
            engines = {"exl_loader": engine}
            if peer is not None and peer.use_cache(cache_type):
                engines["exllamav2"] = peer
            rates = measure(engines, arguments.depths, arguments.prompt, arguments.steps,
                            arguments.rounds)
            token_bytes = CacheType.parse(cache_type).bytes_per_token(
                config.num_key_value_heads, config.head_dim
            ) * config.num_hidden_layers
            for engine_name, found in rates.items():
                decode = {depth: rate for depth, rate in found.items() if depth != "prefill"}
                yield {
                    "model": name, "engine": engine_name, "cache_type": cache_type,
                    "prefill": found["prefill"], "decode": decode,
                    "share": {
                        depth: rate * (base + token_bytes * int(depth)) / bandwidth
                        for depth, rate in decode.items()
                    },
                    "reserved_bytes": loaded.reservation.total_bytes, "load_s": load_s,
                }
        if peer is not None:
            peer.unload()


def header(depths: list[int]) -> str:
    cells = "".join(f"{f'at {depth}':>18}" for depth in depths)
    return f"{'model':6}{'engine':12}{'cache':7}{'prompt t/s':>11}{cells}"


def line(row: dict[str, Any]) -> str:
    cells = "".join(
        f"{rate:>9.1f} t/s {row['share'][depth]:>4.0%}" for depth, rate in row["decode"].items()
    )
    return (f"{row['model']:6}{row['engine']:12}{row['cache_type']:7}"
            f"{row['prefill']:>11.0f}{cells}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=names, default=["1B", "7B", "13B"])
    parser.add_argument("--cache-types", type=names, default=list(CACHE_TYPES))
    parser.add_argument("--depths", type=numbers, default=list(DEPTHS))
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=STEPS, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--chunk-size", type=int, default=2048)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/exl_loader_gpu_benchmark"))
    parser.add_argument("--no-peer", dest="peer", action="store_false")
    parser.add_argument("--bandwidth", type=float, help="bytes/s, instead of measuring it")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--dry", action="store_true", help="a tiny model and few tokens")
    chosen = parser.parse_args(arguments)
    if chosen.dry:
        chosen.models, chosen.depths, chosen.prompt = ["dry"], [0, 300], 96
        chosen.steps, chosen.rounds, chosen.chunk_size = 3, 1, 48
    return chosen


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print and return the rows."""
    chosen = parse(arguments)
    bandwidth = chosen.bandwidth or copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s\n{header(chosen.depths)}", flush=True)
    rows = []
    for name in chosen.models:
        folder = write_model(chosen.folder / name, GEOMETRIES[name])
        for row in measure_model(name, folder, chosen, bandwidth):
            rows.append(row)
            print(line(row), flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps({"bandwidth": bandwidth, "rows": rows}, indent=2))
    return rows


if __name__ == "__main__":
    main()
