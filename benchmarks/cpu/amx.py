"""Measure prompts on AMX tiles: `python -m benchmarks.cpu.amx [MODEL] [--cache q4] [--json]`.

Reads a prompt of 512 tokens by `Model.forward` in chunks, with tiles and without them in turns, and
reports seconds and ratios. Without MODEL the model is the Llama of 1.1 B parameters of
`benchmarks.cpu.speed`. Verified as well: the logits have the same bits. The time of processors is
reported beside that of the clock, because on a shared machine it leaves other programs out. With
EXL_LOADER_THREADS=1 no thread waits for another one, which would count as time of processors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import exl_loader
from benchmarks.cpu import speed_models
from exl_loader.backends import get_ops
from exl_loader.backends.cpu import amx
from exl_loader.backends.cpu.ops import CpuOps


def read(model, sequence, ids: list[int]) -> tuple[float, float, np.ndarray]:
    """Read a prompt. Return the seconds by the clock and of processors, and the last logits."""
    sequence.past_len = 0
    start = time.perf_counter(), time.process_time()
    for first in range(0, len(ids), model.chunk_size):
        logits = model.forward([(sequence, ids[first : first + model.chunk_size])])
    return time.perf_counter() - start[0], time.process_time() - start[1], logits.numpy().copy()


def measure(folder: Path, cache_type: str, tokens: int, rounds: int) -> dict[str, float]:
    with exl_loader.load(folder, ctx_size=4096, cache_type=cache_type, max_batch_size=1) as loaded:
        torch.set_num_threads(1)
        ops = get_ops("cpu")
        if not isinstance(ops, CpuOps) or ops.set_amx(True) != amx.ON:
            raise SystemExit("This machine has no AMX tiles, or its system does not permit them.")
        # Below the generator, because its scheduling is no part of a prompt's product.
        scheduler = loaded._generator._scheduler
        sequence = scheduler.cache.acquire(tokens + 1)
        ids = [3 + 7919 * i % 30000 for i in range(tokens)]
        times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        expected = read(scheduler.model, sequence, ids)[2]
        for turn in range(rounds):
            for on in ((False, True) if turn % 2 else (True, False)):
                ops.set_amx(on)
                clock, processors, logits = read(scheduler.model, sequence, ids)
                assert np.array_equal(logits, expected), "the logits differ"
                times[on].append((clock, processors))
        ops.set_amx(True)
        scheduler.cache.release(sequence)
    result: dict[str, float] = {"tokens": tokens}
    for index, name in enumerate(("clock", "processors")):
        without, on_tiles = ([pair[index] for pair in times[on]] for on in (False, True))
        result |= {
            f"{name}_without_s": min(without), f"{name}_on_tiles_s": min(on_tiles),
            f"{name}_ratio": statistics.median(a / b for a, b in zip(without, on_tiles,
                                                                    strict=True)),
        }  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--cache", default="fp16")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folder = args.model or speed_models.write_exl2(
            Path(directory) / "model", speed_models.GEOMETRY)
        result = measure(folder, args.cache, args.tokens, args.rounds)
    if args.json:
        print(json.dumps(result))
        return
    for name in ("clock", "processors"):
        print(f"{name}: {result[f'{name}_without_s']:.2f} s without tiles, "
              f"{result[f'{name}_on_tiles_s']:.2f} s on tiles (best), "
              f"{result[f'{name}_ratio']:.2f} times (median of pairs)")


if __name__ == "__main__":
    main()
