"""Measure the error of the quantised cache and of exllamav2's; docs/cache_quality.md.

    python -m benchmarks.cpu.cache_quality [--tokens N] [--update docs/cache_quality.md]

Three tables. Vectors: the relative squared error of a round trip. Model: the divergence of
the demo model's predictions from those with its fp16 cache, at its full context, over files of
the standard library that it was not trained on (tools/demo_corpus.py), for every cache type
and pair of types, and for exllamav2's scheme in the same attention. Biases: the error of
attention over keys with large constant biases, see `bias_table`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import REPO
from benchmarks.cpu import exllamav2_cache

sys.path.insert(0, str(REPO / "tools"))

from exl_loader import load
from exl_loader.backends.base import Call
from exl_loader.backends.reference.ops import cache_round_trip
from exl_loader.cache.layout import BITS_NAMES, CacheType
from exl_loader.cache.paging import PagedCache
from exl_loader.checkpoint.config import ModelConfig
from exl_loader.commands.evaluation import Lane, Result, bos_ids, cut_text, run_lanes, run_window
from exl_loader.commands.evaluation_plan import plan_evaluation
from exl_loader.commands.model_options import DEMO_MODEL
from exl_loader.model.parts.key_bias import remove_from, split_bias
from exl_loader.utils.progress import default_progress, task

# The names of exllamav2's types -> bits of keys and of values.
PEER_TYPES = {"exllamav2 Q8": (8, 8), "exllamav2 Q6": (8, 4), "exllamav2 Q4": (4, 4)}
SHOWN_BITS = (16, 8, 6, 4, 3)


def normal(seed: int, rows: int = 2000, head_dim: int = 128) -> torch.Tensor:
    """Return normal vectors, float32 [rows, head_dim]."""
    return torch.randn(rows, head_dim, generator=torch.Generator().manual_seed(seed))


def with_outliers(
    channels: int = 3, factor: float = 20, seeds: int = 16, rows: int = 150
) -> torch.Tensor:
    """Return normal data with a few channels of each head that are larger by a factor.

    Which channels these are changes a scheme's error by a fifth, so every seed draws its own.
    With three channels 20 times as large both schemes have the errors quoted in
    docs/cache_quality.md.

    Returns:
        float32 [seeds * rows, 128], of mean square 1 in each head.
    """
    heads = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, 128, generator=generator)
        x[:, torch.randperm(128, generator=generator)[:channels]] *= factor
        heads.append(x / x.square().mean().sqrt())
    return torch.cat(heads)


def relative_squared_error(y: torch.Tensor, x: torch.Tensor) -> float:
    """Return |y - x|^2 / |x|^2 over all vectors."""
    return ((y.double() - x.double()).square().sum() / x.double().square().sum()).item()


def vector_table() -> list[list[str]]:
    """Compare round trips at 3, 4, 6 and 8 bits."""
    rows = [["data", "bits an element", "exl_loader", "exllamav2's scheme", "ratio"]]
    data: dict[str, Callable[[], torch.Tensor]] = {
        "normal": lambda: normal(0),
        "3 outlier channels, 20 times": with_outliers,
        "1 outlier channel, 20 times": lambda: with_outliers(1, 20),
        "8 outlier channels, 20 times": lambda: with_outliers(8, 20),
    }
    for (name, make), bits in itertools.product(data.items(), (3, 4, 6, 8)):
        x = make()
        ours = relative_squared_error(cache_round_trip(x, BITS_NAMES[bits]), x)
        theirs = relative_squared_error(exllamav2_cache.round_trip(x, bits), x)
        rows.append([name, f"{bits + 0.5}", f"{ours:.3g}", f"{theirs:.3g}", f"{ours / theirs:.2f}"])
    return rows


class PeerOps:
    """Operations whose cache holds what exllamav2's would return.

    Args:
        ops: does all other operations; its cache type must be exact.
        k_bits, v_bits: bits of keys and of values in exllamav2's scheme.
    """

    def __init__(self, ops: Any, k_bits: int, v_bits: int) -> None:
        self._ops, self._bits = ops, (k_bits, v_bits)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def prepare(self, calls: Sequence[Call]) -> list[Callable[[], None]]:
        """Bind every call to these operations."""
        return [partial(call.run, self) for call in calls]

    def write_cache(self, k: torch.Tensor, v: torch.Tensor, *args: Any) -> None:
        k, v = (
            exllamav2_cache.round_trip(x, bits)
            for x, bits in zip((k, v), self._bits, strict=True)
        )
        self._ops.write_cache(k, v, *args)


def add_peer_lanes(lanes: list[Lane], ops: Any) -> None:
    """Add a lane for every cache type of exllamav2, over fp32."""
    exact = next(lane for lane in lanes if lane.name == "fp32")
    for name, (k_bits, v_bits) in PEER_TYPES.items():
        layers = [
            replace(layer, k_codes=layer.k_codes.clone(), v_codes=layer.v_codes.clone())
            for layer in exact.cache.layers
        ]
        cache = PagedCache(layers, exact.cache.num_pages)
        model = exact.model.with_cache(cache, {"cpu": PeerOps(ops, k_bits, v_bits)})
        lanes.append(Lane(name, model, cache))


def measure_model(tokens: int) -> tuple[list[Result], int]:
    """Run held-out text through the demo model with every cache type.

    Returns:
        the results, and how many tokens were predicted.
    """
    from demo_corpus import collect
    from exl_loader.backends import get_ops

    names = ["fp32", *(f"{BITS_NAMES[k]}_{BITS_NAMES[v]}"
                       for k, v in itertools.product(SHOWN_BITS, repeat=2))]
    types = dict.fromkeys(map(CacheType.parse, names))
    types.pop(CacheType(16, 16))
    planned = plan_evaluation(
        str(DEMO_MODEL), tuple(types), config=ModelConfig.from_dir(DEMO_MODEL)
    )
    text = "\n".join(file.text for file in collect().held_out)
    with load(DEMO_MODEL, ctx_size=planned.reservation.ctx_size) as loaded:
        ids = loaded.encode(text, add_bos=False, special=False)[:tokens]
        pieces = list(cut_text(ids, bos_ids(loaded), loaded.ctx_size))
        total = sum(len(piece) - 1 for piece in pieces)
        results: list[Result] = []

        def compare(lanes: list[Lane]) -> Iterator[int]:
            add_peer_lanes(lanes, get_ops())
            for piece in pieces:
                yield from run_window(lanes, piece, loaded.ctx_size)
            results.extend(lane.result() for lane in lanes)

        with task(default_progress(), "evaluating", total, "tokens") as advance:
            for count in run_lanes(loaded, planned, compare):
                advance(count)
        return results, total


def model_table(results: list[Result]) -> list[list[str]]:
    """Return the rows of a table of results, the most exact first."""
    rows = [["cache", "bits an element", "perplexity", "mean KL", "±", "median KL",
             "99.9 % KL", "same top token"]]  # fmt: skip
    for result in sorted(results, key=lambda r: r.divergence.mean if r.divergence else -1.0):
        found, name = result.divergence, result.cache_type
        row = [name, f"{_bits_an_element(name):.4g}", f"{result.perplexity:.4f}"]
        if found is None:
            rows.append([*row, "", "", "", "", ""])
            continue
        # One window has no standard error.
        row += ["?" if nats is None else f"{nats:.2e}" for nats in (
            found.mean, found.standard_error, found.median, found.percentile_99_9
        )]
        rows.append([*row, f"{found.top1_agreement:.2%}"])
    return rows


def _bits_an_element(name: str) -> float:
    """Return the mean bits of keys and values, scales included."""
    kind = CacheType(*PEER_TYPES[name]) if name in PEER_TYPES else CacheType.parse(name)
    return kind.bytes_per_token(1, 64) * 8 / 128


@dataclass(frozen=True)
class Head:
    """One attention head: queries and keys before RoPE, values, all float32 [tokens, 128]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def random(cls, tokens: int = 1024) -> Head:
        generator = torch.Generator().manual_seed(1)
        return cls(*torch.randn(3, tokens, 128, generator=generator))

    def attend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return causal scores of the last 256 rows over keys after RoPE, and the outputs."""
        q = turned(self.q)[-256:].double()
        scores = q @ keys.double().T * 128**-0.5
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(len(keys) - 255)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        return scores[~hidden], weights @ values.double()


def turned(x: torch.Tensor) -> torch.Tensor:
    """Apply RoPE of Qwen2's base to x, [tokens, 128], at positions 0, 1, ..."""
    half = x.shape[1] // 2
    angles = torch.arange(len(x)).double()[:, None] * 1e6 ** (-torch.arange(half) / half).double()
    a, b = x.double().split(half, dim=1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=1).float()


def bias_table() -> list[list[str]]:
    """Compare attention over keys with a bias in three channels, as Qwen2's have.

    Normal queries, keys and values; in all other channels the bias has a deviation of 0.2.
    "in the cache" is rotation and search alone; "beside it" adds the bias as
    exl_loader/model/parts/key_bias.py does.
    """
    head = Head.random()
    rows = [["bias", "cache", "error of a score", "relative error of the output"]]
    for size in (0, 50, 150):
        bias = torch.randn(1, 128, generator=torch.Generator().manual_seed(2)) * 0.2
        bias[0, [20, 70, 101]] += torch.tensor([1.0, -0.7, 0.5]) * size
        exact = turned(head.k + bias)
        expected = head.attend(exact, head.v)
        rest = bias.clone()
        taken = split_bias(rest, head.k.square().sum(dim=1).mean()[None], 64)
        if taken is not None:
            remove_from(rest, taken)
        beside = turned((bias - rest).expand_as(head.k))
        for name in ("q8", "q6", "q4", "q3"):
            bits = CacheType.parse(name).k_bits
            without = turned(head.k + rest)
            kept = {
                f"exllamav2's scheme, {bits} bits": exllamav2_cache.round_trip(exact, bits),
                f"{name}, in the cache": cache_round_trip(exact, name),
                f"{name}, beside it": cache_round_trip(without, name) + beside,
            }
            values = cache_round_trip(head.v, name)
            for scheme, keys in kept.items():
                scores, out = head.attend(keys, values)
                score_error = (scores - expected[0]).square().mean().sqrt().item()
                error = relative_squared_error(out, expected[1]) ** 0.5
                rows.append([str(size), scheme, f"{score_error:.3g}", f"{error:.3g}"])
    return rows


def markdown(rows: list[list[str]]) -> str:
    """Return a table as Markdown; its first row has the headings."""
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def update(path: Path, tables: dict[str, str]) -> None:
    """Replace the text between `<!-- NAME -->` and `<!-- end NAME -->` in a file."""
    text = path.read_text(encoding="utf-8")
    for name, table in tables.items():
        before, found, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end {name} -->")
        if not found or not end:
            raise SystemExit(f"{path}: no place for the table {name!r}")
        text = f"{before}{found}{table}\n{end}{after}"
    path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=40960, help="of the held-out text")
    parser.add_argument("--update", type=Path, metavar="FILE", help="put the tables into it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tables = {"vectors": markdown(vector_table())}
    tables["biases"] = markdown(bias_table())
    results, total = measure_model(args.tokens)
    tables["model"] = f"{total} tokens predicted.\n\n{markdown(model_table(results))}"
    for table in tables.values():
        print(f"\n{table}")
    if args.update:
        update(args.update, tables)


if __name__ == "__main__":
    main()
