"""Time attention over the packed cache on the CPU: fp16 against q8, q6, q4 and q3.

    python -m benchmarks.cpu.attention [--heads 32 --kv-heads 4 --head-dim 64] [--json]

Verifies the compiled operations against the reference first. Then all cache types take turns
within each round, so that other work on the machine slows all of them alike. Shows the median
over rounds, the ratio to fp16 and the bytes of cache read per second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from types import SimpleNamespace

import torch

from exl_loader.backends import get_ops
from exl_loader.backends.base import AttentionShape, Batch
from exl_loader.backends.cpu.attention import attention_scratch_bytes
from exl_loader.backends.reference.ops import ReferenceOps
from exl_loader.cache.layout import PAGE_LEN, CacheLayer, CacheType, cache_specs, pages_for

CACHE_TYPES = ("fp16", "q8", "q6", "q4", "q3")
DEPTHS = (512, 2048, 8192)
TOLERANCE = 2e-6  # relative L2: float32 sums of up to 8192 terms against float64


def make_layer(cache_type: CacheType, num_pages: int, shape: AttentionShape) -> CacheLayer:
    """Allocate one layer's cache."""
    config = SimpleNamespace(
        num_hidden_layers=1, num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_dim
    )
    tensors = {
        spec.name.split(".")[-1]: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype))
        for spec in cache_specs(config, num_pages, cache_type)
    }
    return CacheLayer(
        tensors["k_codes"], tensors.get("k_scales"), tensors["v_codes"], tensors.get("v_scales"),
        cache_type,
    )  # fmt: skip


def one_sequence(past_len: int, rows: int) -> Batch:
    """Return a batch of one sequence on consecutive pages."""
    total = past_len + rows
    return Batch(
        positions=torch.arange(past_len, total, dtype=torch.int32),
        q_start=torch.tensor([0, rows], dtype=torch.int32),
        past_len=torch.tensor([past_len], dtype=torch.int32),
        page_table=torch.arange(pages_for(total), dtype=torch.int32)[None],
        max_total_len=total,
    )


class Case:
    """One cache type, filled to a depth, with rows to attend."""

    def __init__(self, ops, name: str, depth: int, rows: int, shape: AttentionShape) -> None:
        self.ops, self.shape, self.depth = ops, shape, depth
        kind = CacheType.parse(name)
        self.layer = make_layer(kind, pages_for(depth + rows), shape)
        self.cache_bytes = (depth + rows) * kind.bytes_per_token(
            shape.num_kv_heads, shape.head_dim
        )
        generator = torch.Generator().manual_seed(depth)
        total = depth + rows
        self.k = torch.randn(total, shape.num_kv_heads, shape.head_dim, generator=generator)
        self.v = torch.randn(total, shape.num_kv_heads, shape.head_dim, generator=generator)
        self.q = torch.randn(rows, shape.num_heads, shape.head_dim, generator=generator)
        self.batch = one_sequence(depth, rows)
        self.out = torch.empty_like(self.q)
        nbytes = attention_scratch_bytes(1, total, shape)
        self.scratch = torch.empty(nbytes, dtype=torch.uint8)
        ops.write_cache(self.k, self.v, self.layer, one_sequence(0, total), self.scratch)

    def attend(self) -> float:
        """Attend once and return the seconds."""
        start = time.perf_counter()
        self.ops.attention(self.q, self.layer, self.batch, self.shape, self.out, self.scratch)
        return time.perf_counter() - start

    def write(self) -> float:
        """Write all tokens again and return the seconds."""
        start = time.perf_counter()
        batch = one_sequence(0, len(self.k))
        self.ops.write_cache(self.k, self.v, self.layer, batch, self.scratch)
        return time.perf_counter() - start

    def verify(self) -> None:
        """Compare the compiled operations with the reference.

        Raises:
            SystemExit: they differ, so timing them would be of no use.
        """
        expected = torch.empty_like(self.out)
        reference = ReferenceOps()
        reference.attention(
            self.q, self.layer, self.batch, self.shape, expected, self.scratch
        )
        self.attend()
        error = ((self.out - expected).norm() / expected.norm()).item()
        if not error <= TOLERANCE:
            raise SystemExit(f"{self.layer.cache_type} at {self.depth}: error {error:.2e}")


def measure(ops, shape: AttentionShape, depth: int, rows: int, rounds: int) -> list[dict]:
    """Time all cache types at one depth, in turns; one record each."""
    cases = {name: Case(ops, name, depth, rows, shape) for name in CACHE_TYPES}
    for case in cases.values():
        case.verify()
    times: dict[str, list[float]] = {name: [] for name in cases}
    writes: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            times[name].append(case.attend())
    for _ in range(3):
        for name, case in cases.items():
            writes[name].append(case.write())
    base = statistics.median(times["fp16"])
    results = []
    for name, case in cases.items():
        seconds = statistics.median(times[name])
        results.append(
            {
                "cache_type": name,
                "depth": depth,
                "rows": rows,
                "microseconds": round(seconds * 1e6, 1),
                "best_microseconds": round(min(times[name]) * 1e6, 1),
                "speed_to_fp16": round(base / seconds, 2),
                "cache_gb_per_s": round(case.cache_bytes / seconds / 1e9, 2),
                "write_microseconds_per_token": round(
                    statistics.median(writes[name]) / (depth + rows) * 1e6, 2
                ),
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=PAGE_LEN, help="rows of a prefill call")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ops = get_ops()
    shape = AttentionShape(args.heads, args.kv_heads, args.head_dim, args.head_dim**-0.5)
    results = []
    for rows in (1, args.chunk):
        for depth in DEPTHS:
            rounds = args.rounds if rows == 1 else max(3, args.rounds // 8)
            results += measure(ops, shape, depth, rows, rounds)
            if not args.json:
                for result in results[-len(CACHE_TYPES) :]:
                    print("  ".join(f"{key} {value}" for key, value in result.items()), flush=True)
    if args.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
