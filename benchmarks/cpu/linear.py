"""Measure the CPU's matrix products: `python -m benchmarks.cpu.linear [--threads N] [--json]`.

Every layer is verified against the reference first. Decoding cycles through copies of a layer
that are together several times larger than a cache, and is reported as GB/s of weights and as a
share of what a loop of plain loads reads (csrc/cpu/read_sum.cpp) in the same rounds. Prefill is
reported in GMAC/s. A figure is the best of several rounds, and with one thread it is processor
time, so that it is of use on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from benchmarks import REPO

sys.path.insert(0, str(REPO / "tests"))

import torch  # noqa: E402

from benchmarks.cpu.read_bandwidth import BUFFER_BYTES as ROUND_BYTES  # noqa: E402
from benchmarks.cpu.read_bandwidth import Bandwidth  # noqa: E402
from exl_loader.backends.cpu.linear import linear_scratch_bytes  # noqa: E402
from exl_loader.backends.cpu.memory import MainMemory  # noqa: E402
from exl_loader.backends.cpu.threads import default_threads  # noqa: E402
from exl_loader.backends.reference.ops import ReferenceOps  # noqa: E402
from exl_loader.utils.integers import round_up  # noqa: E402
from support.kernel_cases import compiled_ops, dense_linear, packed_linear  # noqa: E402

# (in_features, out_features, bits, group size): a Llama of 1.1 B parameters, then widths.
DECODE = [
    (2048, 5632, 4, 128),
    (5632, 2048, 4, 128),
    (2048, 2048, 4, 128),
    (2048, 256, 4, 128),
    (2048, 32000, 6, 128),
    *((2048, 5632, bits, 64) for bits in (2, 3, 5, 8)),
]
PREFILL = [(2048, 5632, 4, 128), (5632, 2048, 4, 128), (2048, 5632, 4, 32), (2048, 2048, 8, 128)]
ROUNDS = 9
ALIGNMENT = 64
# Float32 sums and, for EXL2, the rounding of weights to float16 that kernels leave out.
TOLERANCE = 1e-3


def seconds(clock, function) -> float:
    start = clock()
    function()
    return clock() - start


def verify(ops, layer, rows: int) -> None:
    x, out, exact = _buffers(layer, rows)
    ops.linear(x, layer, out, _scratch(layer, rows))
    ReferenceOps().linear(x, layer, exact, torch.empty(0))
    error = float((out - exact).norm() / exact.norm())
    if not error < TOLERANCE:
        raise SystemExit(f"wrong result: relative error {error:.2e}")


def decode(ops, clock, bandwidth: Bandwidth, make, rows: int = 1) -> dict:
    layer = make(0)
    verify(ops, layer, rows)
    nbytes = _weight_bytes(layer)
    layers = [layer, *(make(seed) for seed in range(1, max(2, ROUND_BYTES // nbytes)))]
    move_into_one_buffer(layers)
    x, out, _ = _buffers(layer, rows)
    scratch = _scratch(layer, rows)

    def go() -> None:
        for w in layers:
            ops.linear(x, w, out, scratch)

    rounds = [(bandwidth.measure(clock), seconds(clock, go)) for _ in range(ROUNDS)]
    peak = max(speed for speed, _ in rounds)
    # The mean over a round: single layers may be in a cache by chance.
    best = min(time for _, time in rounds) / len(layers)
    speed = nbytes / best
    return {
        "rows": rows,
        "us": best * 1e6,
        "gb_per_s": speed / 1e9,
        "read_gb_per_s": peak / 1e9,
        "share": speed / peak,
    }


def move_into_one_buffer(layers) -> None:
    """Move the weights of layers into one buffer of the kind that holds a model's weights."""
    buffer, _ = MainMemory().empty("cpu", sum(_weight_bytes(w) + 2 * ALIGNMENT for w in layers))
    offset = 0
    for w in layers:
        for role in ("weight",) if hasattr(w, "weight") else ("codes", "scales"):
            tensor = getattr(w, role)
            view = buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            setattr(w, role, view.copy_(tensor))
            offset += round_up(tensor.nbytes, ALIGNMENT)
        w.native = None  # it holds the old addresses


def prefill(ops, clock, layer, rows: int) -> dict:
    verify(ops, layer, rows)
    x, out, _ = _buffers(layer, rows)
    scratch = _scratch(layer, rows)
    best = min(seconds(clock, lambda: ops.linear(x, layer, out, scratch)) for _ in range(ROUNDS))
    macs = rows * layer.in_features * layer.out_features
    return {"rows": rows, "us": best * 1e6, "gmac_per_s": macs / best / 1e9}


def call_overhead(ops, clock) -> dict:
    layer = packed_linear([(4, 32)], 16)
    x, out, _ = _buffers(layer, 1)
    scratch = _scratch(layer, 1)

    def go() -> None:
        for _ in range(1000):
            ops.linear(x, layer, out, scratch)

    return {"us": min(seconds(clock, go) for _ in range(ROUNDS)) * 1e3}


def _buffers(layer, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(0))
    return x, torch.empty(rows, layer.out_features), torch.empty(rows, layer.out_features)


def _scratch(layer, rows: int) -> torch.Tensor:
    return torch.empty(linear_scratch_bytes(rows, layer.in_features), dtype=torch.uint8)


def _weight_bytes(layer) -> int:
    if hasattr(layer, "weight"):
        return layer.weight.nbytes
    return layer.codes.nbytes + layer.scales.nbytes


def results(ops, clock, bandwidth: Bandwidth):
    """Measure one case after the other; yield its name and figures as soon as they are known."""
    for k, n, bits, group in DECODE:
        def make(seed, k=k, n=n, bits=bits, group=group):
            return packed_linear([(bits, group)] * (k // group), n, seed=seed, perm=True)

        name = f"decode {k}x{n} {bits} bit, groups of {group}"
        yield name, decode(ops, clock, bandwidth, make)
    for rows in (2, 4, 8):
        def make_four(seed):
            return packed_linear([(4, 128)] * 16, 5632, seed=seed)

        name = "decode 2048x5632 4 bit, groups of 128"
        yield name, decode(ops, clock, bandwidth, make_four, rows)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        name = f"decode 2048x5632 {str(dtype).removeprefix('torch.')}"
        yield name, decode(
            ops, clock, bandwidth, lambda seed, d=dtype: dense_linear(2048, 5632, d, seed=seed)
        )
    for k, n, bits, group in PREFILL:
        layer = packed_linear([(bits, group)] * (k // group), n, perm=True)
        for rows in (16, 128, 512):
            yield f"prefill {k}x{n} {bits} bit, groups of {group}", prefill(ops, clock, layer, rows)
    layer = dense_linear(2048, 5632, torch.float16)
    yield "prefill 2048x5632 float16", prefill(ops, clock, layer, 128)
    yield "a call from Python", call_overhead(ops, clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ops = compiled_ops()
    ops.set_threads(arguments.threads)
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    bandwidth = Bandwidth(arguments.threads)
    for what, figures in results(ops, clock, bandwidth):
        if arguments.json:
            print(json.dumps({"what": what, "threads": arguments.threads, **figures}))
        else:
            text = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
            print(f"{what:45} {text}", flush=True)


if __name__ == "__main__":
    main()
