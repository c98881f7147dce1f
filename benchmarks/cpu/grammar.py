"""Measure what a grammar costs a step: `python -m benchmarks.cpu.grammar [--vocab N]`.

Draws from random logits, with a made-up vocabulary of syllables, without a grammar and with
several, in turns, and reports the milliseconds of setting up and of a step (mask, samplers and
draw). The grammars allow nearly every token nearly everywhere, which is the most expensive case.
Verified first: every token drawn is one that the grammar allows.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import cast

import numpy as np

from exl_loader.generation.forward_model import LogitsRow
from exl_loader.generation.grammar.masks import Grammars
from exl_loader.generation.sampling import Sampler, TokenRoles
from exl_loader.generation.settings import SamplingSettings
from exl_loader.text.tokenizer import Tokenizer

# llama.cpp's grammars/json.gbnf describes the same texts.
JSON_GBNF = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (pair ("," ws pair)*)? "}" ws
pair   ::= string ":" ws value
array  ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= "-"? ([0-9] | [1-9] [0-9]{0,15}) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""

CASES: dict[str, dict] = {
    "no grammar": {},
    "JSON schema": {"json_schema": '{"type": "array", "items": {"type": "string"}}'},
    "GBNF, regular": {"grammar_string": 'root ::= [^"]* "." [^"]*'},
    "GBNF, recursive": {"grammar_string": 'root ::= ([^()] | "(" root ")")*'},
    "GBNF, JSON": {"grammar_string": JSON_GBNF},
    "GBNF, by character": {"grammar_string": 'root ::= [a-z]* "a" (root "b")?'},
}
SYLLABLES = [*"aeiou012{}[]:,\"\\()-_.\néü中文", "th", "er", "on", "an", "re", "ing", "tion"]


class MadeUpTokenizer:
    """An end token, all bytes, then tokens of up to five syllables, half of them after a space."""

    bytes_known, strips_space, special_ids = True, False, frozenset({0})

    def __init__(self, vocab_size: int) -> None:
        source, tokens = random.Random(0), set[bytes]()
        while len(tokens) < vocab_size - 257:
            token = "".join(source.choices(SYLLABLES, k=source.randrange(1, 6)))
            if len(token) > 1:
                tokens.add((source.choice(["", " "]) + token).encode())
        self.tokens = [b"", *(bytes([byte]) for byte in range(256)), *sorted(tokens)]
        self.vocab_size = vocab_size

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id]

    def encode(self, text: str, add_bos: bool = False, special: bool = False) -> list[int]:
        return [byte + 1 for byte in text.encode()]


def measure(grammars: Grammars, rows: np.ndarray, steps: int, **settings) -> tuple[float, float]:
    """Return milliseconds of setting up, and of a step on average."""
    chosen = SamplingSettings(seed=1, min_p=0.05, ban_eos_token=True, **settings)
    began_s = time.perf_counter()
    matcher = grammars.matcher(chosen)
    setup_s = time.perf_counter() - began_s
    roles = TokenRoles(vocab_size=rows.shape[1], banned_ids=(0,))
    sampler, times_s = Sampler(chosen, roles=roles, constraint=matcher), []
    for step in range(steps):
        allowed = None if matcher is None else matcher.allowed_ids
        began_s = time.perf_counter()
        token_id = sampler.sample(LogitsRow(rows[step % len(rows)]), [1])
        times_s.append(time.perf_counter() - began_s)
        assert allowed is None or token_id in allowed
        if sampler.complete:
            break
    return setup_s * 1e3, statistics.mean(times_s) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=152_064)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    tokenizer = cast(Tokenizer, MadeUpTokenizer(args.vocab))
    grammars = Grammars(tokenizer, args.vocab, (0,))
    rows = np.random.default_rng(0).normal(0, 3, (4, args.vocab)).astype(np.float32)
    began_s = time.perf_counter()
    grammars.matcher(SamplingSettings(grammar_string='root ::= "a"'))
    print(f"token table, once a model: {(time.perf_counter() - began_s) * 1e3:.0f} ms")
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    for _ in range(args.rounds):
        for name, settings in CASES.items():
            results[name].append(measure(grammars, rows, args.steps, **settings))
    for name, measured in results.items():
        setup_ms, step_ms = (min(column) for column in zip(*measured, strict=True))
        print(f"{name:18} set up {setup_ms:6.1f} ms, a step {step_ms:6.2f} ms")


if __name__ == "__main__":
    main()
