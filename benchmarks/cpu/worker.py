"""Serve one engine of speed.py in a process of its own: what both engines share.

A worker reads one JSON object a line from standard input and answers each with one on
standard output. The first object is its configuration; the answer has the seconds of loading.
Engines are classes with

    decode(depth, count) -> seconds     of `count` steps of one token at a depth of `depth`
    prefill(depth, count) -> seconds    of a prompt of `count` tokens at a depth of `depth`
    first_token(count) -> seconds       from a prompt of `count` tokens to its greedy successor
    logits(ids) -> list of floats       of the last of `ids`, with nothing before them
    batch(count) -> seconds             of `count` greedy tokens of each of `requests` sequences
                                        at once, after prompts of BATCH_PROMPT tokens

and the attributes `version`, `build` (instruction sets, where known) and `load_tasks`: seconds by
part of loading, where known.
This module imports nothing that either engine's interpreter might lack.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from typing import Any

# Tokens that are computed before the rest of a context is filled with copies of them.
FILL_TOKENS = 256
BATCH_PROMPT = 32


def random_ids(count: int, vocab_size: int, seed: int | None = None) -> list[int]:
    """Draw token ids, none of the three special ones at the beginning of the vocabulary."""
    generator = random.Random(seed)
    return [generator.randrange(3, vocab_size) for _ in range(count)]


def peak_bytes() -> int:
    """Return the peak resident memory of this process in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        match = re.search(r"VmHWM:\s*(\d+) kB", file.read())
    assert match is not None
    return int(match[1]) * 1024


def serve(engine_class: Any) -> None:
    """Load an engine and answer until standard input ends."""
    # Libraries print to standard output, so everything but answers goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    config = json.loads(sys.stdin.readline())
    start = time.perf_counter()
    engine = engine_class(config)
    answer({"load_s": time.perf_counter() - start, "version": engine.version,
            "build": engine.build, "load_tasks": engine.load_tasks})
    for line in sys.stdin:
        command = json.loads(line)
        task = command.pop("do")
        if task == "peak":
            answer({"value": peak_bytes()})
        else:
            answer({"value": getattr(engine, task)(**command)})
