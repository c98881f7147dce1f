"""Measure what a reservation costs: `python -m benchmarks.cpu.planning [--rounds N]`.

Times what a user waits for before anything is loaded, and checks each result first: reading
the headers of 2,000 tensors in ten files, the reservation of that model on one device and split
over four, the gauge of a 7B model, and finding kernels that are compiled already. The files have
headers alone, so nothing depends on a disk. Reports the minimum and the median of processor time
and of wall time, in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import REPO

sys.path.insert(0, str(REPO / "tests"))

import exl_loader  # noqa: E402
from exl_loader.backends.build.build import build  # noqa: E402
from exl_loader.backends.build.spec import cpu_spec  # noqa: E402
from exl_loader.checkpoint import Checkpoint  # noqa: E402
from exl_loader.utils.progress import NullProgress  # noqa: E402
from extension.panel.panel import ModelChoice, plan_html  # noqa: E402
from support.sparse import LLAMA_2_7B, write_sparse_exl2  # noqa: E402

# 37 tensors a layer and 7 around them.
LAYERS = 54
VRAM = "3GiB,2GiB,4GiB,24GiB"


def tasks(folder: Path) -> dict[str, Callable[[], object]]:
    """Make the model folders and return the timed tasks by name; each checks its result."""
    config = LLAMA_2_7B | {"num_hidden_layers": LAYERS}
    large = write_sparse_exl2(folder / "large", shards=10, **config)
    common = write_sparse_exl2(folder / "7B", shards=4, **LLAMA_2_7B)
    options = ModelChoice(str(common), ctx_size=4096, cache_type="q4")

    def headers() -> None:
        assert len(Checkpoint.open(large).headers) > 2000

    def one_device() -> None:
        assert exl_loader.plan(large, ctx_size=18432, cache_type="q4").ctx_size == 18432

    def four_devices() -> None:
        assert exl_loader.plan(large, ctx_size=18432, cache_type="q4", vram=VRAM).ctx_size == 18432

    def gauge() -> None:
        assert "4,096 tokens of context" in plan_html(options)

    def kernels() -> None:
        assert build(cpu_spec(), NullProgress()).exists()

    return {
        "headers of 2,000 tensors in 10 files": headers,
        "reservation of 2,000 tensors": one_device,
        "the same, split over four devices": four_devices,
        "gauge of a 7B model": gauge,
        "finding compiled CPU kernels": kernels,
    }


def main() -> None:
    """Time every task in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        work = tasks(Path(folder))
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
        for task in work.values():
            task()
        for _ in range(rounds):
            for name, task in work.items():
                began = time.process_time(), time.perf_counter()
                task()
                ended = time.process_time(), time.perf_counter()
                times[name].append((ended[0] - began[0], ended[1] - began[1]))
    print(f"{'milliseconds, least and median':40} {'processor':>15} {'wall':>15}")
    for name, pairs in times.items():
        columns = (
            f"{min(values) * 1e3:6.1f} {statistics.median(values) * 1e3:6.1f}"
            for values in zip(*pairs, strict=True)
        )
        print(f"{name:40} " + " ".join(f"{column:>15}" for column in columns))


if __name__ == "__main__":
    main()
