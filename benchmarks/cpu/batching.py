"""Measure requests at once: `python -m benchmarks.cpu.batching [--layers N] [--json]`.

Decodes one request alone and several together, in turns, on a Llama of 1.1 B geometry with
random EXL2 weights of 4.5 bits (--layers makes it smaller), and reports new tokens a second of all
requests and the ratio. Verified as well: each text is the same together as alone. A figure is
the best of several rounds, because the machine may be busy with other work.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import exl_loader
from benchmarks.cpu import speed_models

ROUNDS = 3


def decode(model, prompts: list[list[int]], count: int) -> tuple[list[list[int]], float]:
    """Return the token ids of all texts, and new tokens a second once all requests run."""
    settings = {"temperature": 0, "max_new_tokens": count, "ban_eos_token": True}
    generations = [model.generate_ids(prompt, settings) for prompt in prompts]
    texts: list[list[int]] = [[] for _ in prompts]
    barrier = threading.Barrier(len(prompts) + 1)

    def read(i: int) -> None:
        texts[i].append(next(generations[i]))
        barrier.wait()
        texts[i].extend(generations[i])

    threads = [threading.Thread(target=read, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    barrier.wait()
    done = sum(generation.stats.new_tokens for generation in generations)
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - start
    return texts, (count * len(prompts) - done) / elapsed


def measure(model, requests: int, count: int) -> tuple[float, float]:
    prompts = [[(31 * i + 7 * j) % 30000 + 3 for j in range(32)] for i in range(requests)]
    alone = [decode(model, [prompt], count)[0][0] for prompt in prompts]
    best_one = best_all = 0.0
    for _ in range(ROUNDS):
        best_one = max(best_one, decode(model, prompts[:1], count)[1])
        texts, rate = decode(model, prompts, count)
        assert texts == alone, "a text depends on what runs beside it"
        best_all = max(best_all, rate)
    return best_one, best_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        config = speed_models.GEOMETRY | {"num_hidden_layers": args.layers}
        folder = speed_models.write_exl2(Path(directory) / "model", config)
        with exl_loader.load(
            folder, ctx_size=4096, cache_type="q8", max_batch_size=args.requests
        ) as model:
            one, many = measure(model, args.requests, args.tokens)
    result = {"layers": args.layers, "requests": args.requests, "one_tokens_per_s": one,
              "all_tokens_per_s": many, "ratio": many / one}
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{args.layers} layers: one {one:.1f} tokens/s, {args.requests} at once "
              f"{many:.1f} tokens/s, {many / one:.2f} times")


if __name__ == "__main__":
    main()
