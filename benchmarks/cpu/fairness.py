"""Measure fairness: `python -m benchmarks.cpu.fairness [--layers N] [--prompt N] [--json]`.

Seven texts decode while a long prompt arrives, and then a short one. Reported are the time between
two tokens of the seven (median and longest) before and while the long prompt is read, the same
with the time of one chunk of it and of one decoding pass, which is what a token may wait for, the
time to the first token of the short prompt, and how much longer the long prompt takes than alone.

The model is a Llama of 1.1 B geometry with random EXL2 weights; --layers makes it smaller.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import exl_loader
from benchmarks.cpu import speed_models

STREAMS = 7
SETTINGS = {"temperature": 0, "ban_eos_token": True, "max_new_tokens": 1 << 20}
BEFORE = 30  # tokens of each stream before the long prompt arrives
SHORT = 32  # tokens of the short prompt


class Passes:
    """The passes of a model: when each ended, how long it took, and its rows."""

    def __init__(self, model: Any) -> None:
        self.found: list[tuple[float, float, int]] = []
        inner = model._generator._scheduler.model
        forward = inner.forward_rows

        def timed(entries: Any, *args: Any) -> Any:
            began = time.perf_counter()
            rows = forward(entries, *args)
            now = time.perf_counter()
            self.found.append((now, now - began, sum(len(ids) for _, ids in entries)))
            return rows

        inner.forward_rows = timed

    def seconds(self, first: float, last: float, is_chunk: bool) -> list[float]:
        """Return the seconds of the chunks or of the other passes that ended in a time."""
        return [seconds for ended, seconds, rows in self.found
                if first <= ended <= last and (rows > 32) == is_chunk]


async def first_token(model: Any, prompt: list[int]) -> float:
    """Return the seconds to the first token of a prompt."""
    began = time.perf_counter()
    async with model.agenerate_ids(prompt, SETTINGS) as generation:
        await anext(generation)
        return time.perf_counter() - began


async def measure(model: Any, long_len: int) -> dict[str, float]:
    rng = random.Random(1)
    prompts = [[rng.randrange(3, 30000) for _ in range(40)] for _ in range(STREAMS)]
    long = [rng.randrange(3, 30000) for _ in range(long_len)]
    # The short prompt has other tokens in each measurement, because the cache keeps them.
    shorts = [[rng.randrange(3, 30000) for _ in range(SHORT)] for _ in range(2)]
    passes = Passes(model)
    times: list[list[float]] = [[] for _ in prompts]
    stop = asyncio.Event()

    async def read(i: int) -> None:
        async with model.agenerate_ids(prompts[i], SETTINGS) as generation:
            async for _ in generation:
                times[i].append(time.perf_counter())
                if stop.is_set():
                    return

    alone_s = await first_token(model, long)
    list(model.run_alone(lambda _, cache: iter([cache.forget()])))
    streams = [asyncio.create_task(read(i)) for i in range(STREAMS)]
    while min(map(len, times)) < BEFORE:
        await asyncio.sleep(0.01)
    began = time.perf_counter()
    short_before_s = await first_token(model, shorts[0])
    arrived = time.perf_counter()
    reading = asyncio.create_task(first_token(model, long))
    await asyncio.sleep(alone_s / 4)
    short_s = await first_token(model, shorts[1])
    long_s = await reading
    ended = arrived + long_s
    stop.set()
    await asyncio.gather(*streams)

    def gaps(first: float, last: float) -> list[float]:
        return [
            after - before for stream in times
            for before, after in zip(stream, stream[1:], strict=False)
            if before >= first and after <= last
        ]

    settled = max(stream[2] for stream in times)
    before, during = gaps(settled, began), gaps(arrived, ended)
    chunks, decoding = (passes.seconds(arrived, ended, is_chunk) for is_chunk in (True, False))
    allowed = max(chunks) + max(decoding)
    return {
        "gap_before_s": statistics.median(before), "longest_before_s": max(before),
        "gap_during_s": statistics.median(during), "longest_during_s": max(during),
        "chunk_s": statistics.median(chunks), "longest_chunk_s": max(chunks),
        "pass_s": statistics.median(decoding), "longest_by_chunk_and_pass": max(during) / allowed,
        "short_before_s": short_before_s, "short_s": short_s,
        "long_alone_s": alone_s, "long_s": long_s, "long_ratio": long_s / alone_s,
        "tokens_during": len(during),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--prompt", type=int, default=16000, help="tokens of the long prompt")
    parser.add_argument("--chunk-size", type=int, default=256)
    parser.add_argument("--cache-type", default="fp16")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        config = speed_models.GEOMETRY | {"num_hidden_layers": args.layers}
        folder = speed_models.write_exl2(Path(directory) / "model", config)
        with exl_loader.load(
            folder, ctx_size=args.prompt + 384, cache_size=4 * args.prompt,
            cache_type=args.cache_type, chunk_size=args.chunk_size, max_batch_size=STREAMS + 2,
        ) as model:
            found = asyncio.run(measure(model, args.prompt))
    if args.json:
        print(json.dumps({"layers": args.layers, "prompt": args.prompt,
                          "chunk_size": args.chunk_size} | found))
        return
    milliseconds = {name: 1000 * value for name, value in found.items() if name.endswith("_s")}
    print("between two tokens before: {gap_before_s:.0f} ms, at most {longest_before_s:.0f}\n"
          "while the prompt is read:  {gap_during_s:.0f} ms, at most {longest_during_s:.0f}\n"
          "a chunk {chunk_s:.0f} ms, at most {longest_chunk_s:.0f}; a decoding pass "
          "{pass_s:.0f} ms".format(**milliseconds))
    print("longest wait by the longest chunk and pass: {longest_by_chunk_and_pass:.2f}\n"
          "first token of a short prompt: {short_before_s:.2f} s before, {short_s:.2f} s while "
          "the long one is read\n"
          "first token of the long one: {long_alone_s:.1f} s alone, {long_s:.1f} s beside the "
          "others, {long_ratio:.2f} times".format(**found))


if __name__ == "__main__":
    main()
