"""Measure what sampling costs a token: `python -m benchmarks.cpu.sampling [--beside CHECKOUT]`.

Draws from made-up rows with every sampler that looks at a whole vocabulary, in the most
expensive cases, and reports milliseconds a token, the best of all draws. The rows of logits are
one with a few likely tokens ("likely"), one close to uniform, as at a high temperature ("flat"),
and one of equal logits ("equal"). With `--beside`, another checkout of the
repository draws from the same rows in a process of its own, turn by turn: the tokens must be the
same, and the ratio is the median over turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks import REPO

NUM_ROWS, DRAWS = 4, 12
LONG = 32_768

# A sort of the whole row, to compare the samplers with on this processor.
SORT = "NumPy's sort of the row"

# Settings, and the number of tokens in the history; "bans" and "biases" count tokens.
CASES: dict[str, tuple[dict, int]] = {
    SORT: ({}, 0),
    "greedy": ({"temperature": 0}, 1000),
    "no filter": ({"temperature": 0.7}, 1000),
    "no filter, 5000 biases": ({"biases": 5000}, 1000),
    "no filter, 5000 bans": ({"bans": 5000}, 1000),
    "top_k 40, top_p 0.9": ({"top_k": 40, "top_p": 0.9}, 1000),
    "top_p 0.95": ({"top_p": 0.95}, 1000),
    "min_p 0.05 after temperature 5": ({"temperature": 5, "min_p": 0.05}, 1000),
    "typical_p 0.9": ({"typical_p": 0.9}, 1000),
    "typical_p 0.2": ({"typical_p": 0.2}, 1000),
    "tfs 0.95": ({"tfs": 0.95}, 1000),
    "tfs 0.3": ({"tfs": 0.3}, 1000),
    "top_a 0.2": ({"top_a": 0.2}, 1000),
    "top_n_sigma 1": ({"top_n_sigma": 1}, 1000),
    "epsilon_cutoff 3": ({"epsilon_cutoff": 3}, 1000),
    "eta_cutoff 3": ({"eta_cutoff": 3}, 1000),
    "xtc, threshold 0.1": ({"xtc_probability": 1, "xtc_threshold": 0.1}, 1000),
    "xtc, threshold 0": ({"xtc_probability": 1, "xtc_threshold": 0}, 1000),
    "dynamic temperature": ({"dynamic_temperature": True, "dynatemp_high": 2}, 1000),
    "smoothing 0.2": ({"smoothing_factor": 0.2}, 1000),
    "mirostat": ({"mirostat_mode": 2}, 1000),
    "mirostat, tau 12": ({"mirostat_mode": 2, "mirostat_tau": 12}, 1000),
    "adaptive_p": ({"adaptive_target": 0.3}, 1000),
    "dry": ({"dry_multiplier": 0.8}, LONG),
    "three penalties": (
        {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1}, LONG),
    "encoder_repetition_penalty": ({"encoder_repetition_penalty": 1.1}, LONG),
    "no_repeat_ngram_size 3": ({"no_repeat_ngram_size": 3}, LONG),
    "dry, xtc, min_p, smoothing, dynamic": ({
        "dry_multiplier": 0.8, "xtc_probability": 1, "xtc_threshold": 0.1, "min_p": 0.02,
        "smoothing_factor": 0.2, "dynamic_temperature": True, "dynatemp_low": 0.7,
        "dynatemp_high": 1.5,
    }, LONG),
    "the same, temperatures last": ({
        "dry_multiplier": 0.8, "xtc_probability": 1, "xtc_threshold": 0.1, "min_p": 0.02,
        "smoothing_factor": 0.2, "dynamic_temperature": True, "dynatemp_low": 0.7,
        "dynatemp_high": 1.5, "temperature_last": True,
    }, LONG),
}


def make_rows(kind: str, vocab_size: int) -> np.ndarray:
    """Return logits, float32 [NUM_ROWS, vocab_size]."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((NUM_ROWS, vocab_size), np.float32)
    if kind == "equal":
        rows[:] = 0
    elif kind == "flat":
        rows *= np.float32(0.5)
    else:
        rows *= np.float32(2.5)
        for row in rows:
            row[rng.integers(0, vocab_size, 40)] += 19 - 0.3 * np.arange(40)
    return rows


class Contestant:
    """A process that draws with the `exl_loader` of one checkout."""

    def __init__(self, checkout: Path, vocab_size: int) -> None:
        command = [sys.executable, "-m", "benchmarks.cpu.sampling", "--worker",
                   str(checkout.resolve()), "--vocab", str(vocab_size)]
        self._process = subprocess.Popen(
            command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def measure(self, case: str, kind: str) -> tuple[float, list[int]]:
        """Return the best time of a draw in ms, and the tokens."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([case, kind]), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def work(checkout: str, vocab_size: int) -> None:
    """Answer lines of [case, kind of row] until there are no more."""
    sys.path.insert(0, checkout)
    from exl_loader.generation.sampling import Sampler, TokenRoles
    from exl_loader.generation.settings import SamplingSettings

    try:
        from exl_loader.generation.forward_model import LogitsRow as as_row
    except ImportError:  # an older checkout, which samples from arrays
        as_row = np.asarray

    # Loading a model does this as well: after a large allocation the C library keeps more of the
    # freed memory, and new pages would take longer than most samplers.
    np.ones(7_000_000, np.float32)
    rows_of: dict[str, np.ndarray] = {}
    for line in sys.stdin:
        case, kind = json.loads(line)
        if kind not in rows_of:
            rows_of[kind] = make_rows(kind, vocab_size)
        wanted, num_tokens = CASES[case]
        options = {"seed": 1, **wanted}
        rng = np.random.default_rng(1)
        # As in a text: a few tokens make up most of it.
        history = (vocab_size * rng.random(num_tokens) ** 4).astype(np.int64)
        some_ids = rng.choice(vocab_size, options.pop("biases", 0), replace=False).tolist()
        if some_ids:
            options["logit_bias"] = {token: -1.5 for token in some_ids}
        banned = rng.choice(vocab_size, options.pop("bans", 0), replace=False)
        roles = TokenRoles(
            vocab_size=vocab_size, banned_ids=tuple(banned.tolist()),
            prompt_ids=history.tolist() if "encoder_repetition_penalty" in options else (),
            breaker_ids=frozenset({0, 1, 2}), spared_ids=frozenset({3, 4}),
        )
        sampler = Sampler(SamplingSettings.from_dict(options), roles=roles)
        times_s, tokens = [], []
        for draw in range(DRAWS):
            values = rows_of[kind][draw % NUM_ROWS]
            row = as_row(values)
            began_s = time.perf_counter()
            token = int(np.argsort(values)[-1]) if case == SORT else sampler.sample(row, history)
            times_s.append(time.perf_counter() - began_s)
            tokens.append(token)
        print(json.dumps([min(times_s) * 1e3, tokens]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=152_064)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", nargs="*", default=["likely", "flat", "equal"])
    parser.add_argument("--case", default="", help="only cases whose name begins so")
    parser.add_argument("--beside", type=Path, help="another checkout to compare with")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.vocab)
        return
    checkouts = [path for path in (args.beside, REPO) if path is not None]
    contestants = [Contestant(path, args.vocab) for path in checkouts]
    for case in (name for name in CASES if name.startswith(args.case)):
        for kind in args.rows:
            turns = [
                [contestant.measure(case, kind) for contestant in contestants]
                for _ in range(args.rounds)
            ]
            if any(tokens != turn[0][1] for turn in turns for _, tokens in turn):
                raise SystemExit(f"{case}, {kind}: the checkouts draw different tokens")
            report(case, kind, [[ms for ms, _ in turn] for turn in turns])
    for contestant in contestants:
        contestant.close()


def report(case: str, kind: str, turns: list[list[float]]) -> None:
    best = [min(column) for column in zip(*turns, strict=True)]
    figures = " ".join(f"{ms:8.3f}" for ms in best)
    if len(best) > 1:
        ratio = statistics.median(before / after for before, after in turns)
        figures += f"   {ratio:5.2f} times as fast"
    print(f"{case:38} {kind:7} {figures}", flush=True)


if __name__ == "__main__":
    main()
