"""Measure requests without a limit: `python -m benchmarks.cpu.open_ended [--layers N] [--json]`.

Sends 8, 32 and 128 requests at once to a cache that holds 4 texts of the whole context. Each
request may fill the context and is left by its caller after a random number of tokens. Two models
take turns: one runs 4 texts at a time, as many as the cache holds whole. The other runs more,
whose pages are taken as texts grow and given back by the youngest when none is free. Reported are
the new tokens a second of all requests, the ratio, the new tokens of a forward pass, which do not
depend on other work of the machine, how often a text lost its pages, and which share of tokens
was evaluated again because of that. Verified as well: each text is the same with both.

The model is a Llama of 1.1 B geometry with random EXL2 weights; --layers makes it smaller.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import exl_loader
from benchmarks.cpu import speed_models

TEXTS_OF_CACHE = 4
SETTINGS = {"temperature": 0, "max_new_tokens": 1 << 20, "ban_eos_token": True}


@dataclass
class Run:
    """What a number of requests gave.

    Args:
        tokens_per_s: new tokens that callers took a second.
        tokens_per_pass: new tokens that callers took for each forward pass.
        preemptions: how often a text lost its pages.
        again: share of the evaluated tokens that had been evaluated before.
        texts: the ids that each caller took.
    """

    tokens_per_s: float
    tokens_per_pass: float
    preemptions: int
    again: float
    texts: list[list[int]] = field(repr=False)


def requests(count: int, longest: int) -> list[tuple[list[int], int]]:
    """Return prompts that share no beginning, and how many tokens their callers take."""
    rng = random.Random(count)
    return [
        ([rng.randrange(3, 30000) for _ in range(rng.randint(20, 200))], rng.randint(30, longest))
        for _ in range(count)
    ]


def run(model, wanted: list[tuple[list[int], int]]) -> Run:
    inner = model._generator._scheduler.model
    forward, evaluated, passes = inner.forward_rows, [0], [0]

    def counted(entries, *args):
        passes[0] += 1
        evaluated[0] += sum(len(ids) for _, ids in entries)
        return forward(entries, *args)

    async def read(prompt: list[int], count: int):
        ids: list[int] = []
        async with model.agenerate_ids(prompt, SETTINGS) as generation:
            async for token_id in generation:
                ids.append(token_id)
                if len(ids) == count:
                    break
        return ids, generation.stats

    async def read_all():
        return await asyncio.gather(*(read(*request) for request in wanted))

    inner.forward_rows = counted
    try:
        start = time.perf_counter()
        results = asyncio.run(read_all())
        seconds = time.perf_counter() - start
    finally:
        del inner.forward_rows
    texts = [ids for ids, _ in results]
    stats = [stats for _, stats in results]
    needed = sum(
        one.prompt_tokens - one.reused_tokens + max(one.new_tokens - 1, 0) for one in stats
    )
    return Run(
        sum(map(len, texts)) / seconds, sum(map(len, texts)) / passes[0],
        sum(one.preemptions for one in stats),
        max(0.0, evaluated[0] / needed - 1), texts,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--requests", default="8,32,128", metavar="N,...")
    parser.add_argument("--batch", type=int, default=16, help="texts that run at once")
    parser.add_argument("--ctx-size", type=int, default=4096)
    parser.add_argument("--longest", type=int, default=800, help="most tokens that a caller takes")
    parser.add_argument("--cache-type", default="fp16")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as directory:
        config = speed_models.GEOMETRY | {"num_hidden_layers": args.layers}
        folder = speed_models.write_exl2(Path(directory) / "model", config)
        options = {"ctx_size": args.ctx_size, "cache_size": TEXTS_OF_CACHE * args.ctx_size,
                   "cache_type": args.cache_type}
        with (
            exl_loader.load(folder, max_batch_size=TEXTS_OF_CACHE, **options) as whole,
            exl_loader.load(folder, max_batch_size=args.batch, **options) as growing,
        ):
            for model in (whole, growing):
                run(model, requests(2, 50))
            for count in map(int, args.requests.split(",")):
                wanted = requests(count, args.longest)
                first, second = run(whole, wanted), run(growing, wanted)
                assert first.texts == second.texts, "a text depends on what runs beside it"
                found.append({
                    "requests": count, "whole_tokens_per_s": first.tokens_per_s,
                    "growing_tokens_per_s": second.tokens_per_s,
                    "ratio": second.tokens_per_s / first.tokens_per_s,
                    "whole_tokens_per_pass": first.tokens_per_pass,
                    "growing_tokens_per_pass": second.tokens_per_pass,
                    "preemptions": second.preemptions, "evaluated_again": second.again,
                })
                if not args.json:
                    print("{requests} requests: {whole_tokens_per_s:.0f} tokens/s with 4 at a "
                          "time, {growing_tokens_per_s:.0f} with growing pages, {ratio:.2f} "
                          "times; {whole_tokens_per_pass:.2f} and {growing_tokens_per_pass:.2f} "
                          "tokens a pass; {preemptions} preemptions, {evaluated_again:.1%} "
                          "evaluated again".format(**found[-1]), flush=True)
    if args.json:
        print(json.dumps({"layers": args.layers, "batch": args.batch, "runs": found}))


if __name__ == "__main__":
    main()
