"""Measure a model over two machines: `python -m benchmarks.cpu.machines [--layers N] [--json]`.

The machines are processes, each pinned to a core of its own and in a network namespace of its
own, joined by a link of given latency and bandwidth (`slow_link`). They share a random Llama of
1.1 B geometry with EXL2 weights as a load without `--gpu-split` does, and are compared with one
pinned process that has all of it. Both sides are measured in turns; each figure is the median of
`--rounds`. `--links` has the links, each as MILLISECONDS or MILLISECONDS:GBIT, where the
milliseconds are those of one way. Without the right to make namespaces, machines meet on loopback,
and only the first link is measured.

Measured are the new tokens a second of one request and of several at once after texts of each of
`--depths`, from when all of them have a token until the first one ends, and the tokens a second of
a prompt. Beside each ratio is the most that the model of cost in docs/machines.md allows: what the
one process measured, divided among two, and what hidden states add on their way.

`--realtime` runs a measurement at real-time priority, where other programs need the cores as well.
The system then leaves a core only a twentieth of its time for them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import exl_loader
from benchmarks.cpu import speed_models
from benchmarks.cpu.slow_link import HOSTS, SlowLink

PORT = 29555
SETTINGS = {"temperature": 0, "ban_eos_token": True}
# Bytes of a frame besides its hidden states, and of the way of one besides Ethernet's payload.
FRAME_BYTES = 300


def decode(
    model: exl_loader.LoadedModel, realtime: Realtime, count: int, depth: int, tokens: int
) -> dict[str, Any]:
    """Return the tokens a second of some texts while all of them are written, and their tokens.

    Args:
        count: number of texts. A deeper text begins as a shallower one, so that the cache has its
            beginning already.
    """
    ids = [3 + 7 * i % 1000 for i in range(depth + count)]
    settings = SETTINGS | {"max_new_tokens": tokens}
    texts = [model.generate_ids([5 + i, *ids[i : i + depth]], settings) for i in range(count)]
    readers = [iter(text) for text in texts]
    # The prompts are no part of what is measured.
    firsts = [next(reader) for reader in readers]
    ends: list[tuple[float, int]] = []

    def written() -> int:
        return sum(text.stats.new_tokens for text in texts)

    def drain(reader: Any) -> list[int]:
        found = list(reader)
        ends.append((time.perf_counter(), written()))
        return found

    # Each text has a reader, because a text that nobody reads is not computed far ahead.
    with realtime, ThreadPoolExecutor(count) as pool:
        before, start = written(), time.perf_counter()
        others = list(pool.map(drain, readers))
    first_end, after = ends[0]
    return {
        "rate": (after - before) / (first_end - start),
        "ids": [[one, *more] for one, more in zip(firsts, others, strict=True)],
    }


def read_prompt(
    model: exl_loader.LoadedModel, realtime: Realtime, length: int, number: int
) -> dict[str, Any]:
    """Return the tokens a second of a prompt, another one for each number."""
    ids = [5 + number, *(3 + 11 * i % 1000 for i in range(length - 1))]
    with realtime:
        start = time.perf_counter()
        first = list(model.generate_ids(ids, SETTINGS | {"max_new_tokens": 1}))
        return {"rate": length / (time.perf_counter() - start), "ids": first}


class Realtime:
    """Real-time priority for all threads of some processes.

    All threads of a machine need the same one. At a higher one than the thread that computes,
    gloo's thread was seen to spin and to leave it no time.

    Args:
        priorities: process -> priority; for none nothing is changed.
    """

    def __init__(self, priorities: Mapping[int, int]) -> None:
        self._priorities = priorities

    def __enter__(self) -> None:
        self._set(os.SCHED_FIFO, self._priorities)

    def __exit__(self, *error: object) -> None:
        self._set(os.SCHED_OTHER, dict.fromkeys(self._priorities, 0))

    def _set(self, policy: int, priorities: Mapping[int, int]) -> None:
        for process, priority in priorities.items():
            for thread in os.listdir(f"/proc/{process}/task"):
                os.sched_setscheduler(int(thread), policy, os.sched_param(priority))


def run_worker(folder: str, options: str) -> None:
    """Load, and answer requests to measure, one a line of JSON; a process of its own."""
    chosen = json.loads(options)
    priorities = {int(process): value for process, value in chosen.pop("priorities").items()}
    if chosen.pop("realtime"):
        priorities[os.getpid()] = 1
    with exl_loader.load(folder, **chosen) as model:
        ids = [3 + 7 * i % 1000 for i in range(40)]
        list(model.generate_ids(ids, SETTINGS | {"max_new_tokens": 4}))
        realtime = Realtime(priorities)
        devices = model.reservation.devices
        print(json.dumps([(d.first_layer, d.end_layer) for d in devices]), flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            call = decode if "depth" in asked else read_prompt
            print(json.dumps(call(model, realtime, **asked)), flush=True)


def start(
    command: list[str], core: int, prefix: list[str], **options: Any
) -> subprocess.Popen[str]:
    """Start a Python program on one core."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*prefix, "taskset", "-c", str(core), sys.executable, "-m", *command], text=True,
        env=environment, **options,
    )


class Side:
    """A process that has the model, alone or with another machine.

    Args:
        folder: the model.
        options: for the load.
        link: between two machines; None for one machine.
        host: the address of the first of two machines.
        realtime: as the option.
    """

    def __init__(
        self, folder: Path, options: dict[str, Any], realtime: bool, kept: ExitStack,
        link: AbstractContextManager[Any] | None = None, host: str = "",
    ) -> None:
        made = None if link is None else kept.enter_context(link)
        prefixes = [[], []] if made is None else made.prefixes
        # Packets are carried also while both machines compute.
        priorities = {} if made is None else {made.process: 2}
        if link is not None:
            address = f"tcp://{host}:{PORT}"
            options = options | {"machines": address}
            other = start(
                ["exl_loader", "serve-stage", str(folder), "--device", "cpu", "--machines",
                 address, "--rank", "1", "--world-size", "2"],
                1, prefixes[1], stderr=subprocess.DEVNULL,
            )
            kept.callback(other.wait)
            kept.callback(other.kill)
            priorities[other.pid] = 1
        options = options | {"realtime": realtime, "priorities": priorities if realtime else {}}
        self._process = start(
            ["benchmarks.cpu.machines", "--worker", str(folder), json.dumps(options)],
            0, prefixes[0], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        kept.callback(self._end)
        self.layers = self._read()

    def measure(self, **asked: int) -> dict[str, Any]:
        """Return what `decode` or `read_prompt` found."""
        assert self._process.stdin is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        found: dict[str, Any] = self._read()
        return found

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a process failed")
        return json.loads(line)

    def _end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(one: Side, two: Side, rounds: int, **asked: int) -> tuple[float, float]:
    """Measure both sides in turns; return the median rate of each.

    Args:
        asked: what is measured. `number` stays the same for both sides and is another one in
            each round.
    """
    rates: list[list[float]] = [[], []]
    for number in range(rounds):
        if "length" in asked:
            asked["number"] = number
        found = [side.measure(**asked) for side in (one, two)]
        assert found[0]["ids"] == found[1]["ids"], "other tokens than on one machine"
        for side, result in zip(rates, found, strict=True):
            side.append(result["rate"])
    return statistics.median(rates[0]), statistics.median(rates[1])


def way_seconds(rows: int, latency_s: float, bits_per_s: float) -> float:
    """Return for how long hidden states are under way to the next machine."""
    nbytes = rows * 4 * speed_models.GEOMETRY["hidden_size"] + FRAME_BYTES
    return latency_s + (8 * nbytes / bits_per_s if bits_per_s else 0.0)


def record(what: str, rates: tuple[float, float], best: float) -> dict[str, Any]:
    """Describe the rates of both sides, and the best that two machines could have."""
    one, two = rates
    return {"what": what, "one": one, "two": two, "ratio": two / one, "best_ratio": best / one}


def measure_link(
    one: Side, two: Side, args: argparse.Namespace, latency_s: float, bits_per_s: float
) -> Iterator[dict[str, Any]]:
    """Compare both sides; yield a record of each thing that is measured."""
    half = args.requests // 2
    for depth in map(int, args.depths.split(",")):
        # The most texts first: they leave the beginnings of all texts in the cache.
        several, part, alone = (
            compare(one, two, args.rounds, count=count, depth=depth, tokens=args.tokens)
            for count in (args.requests, half, 1)
        )
        # Two passes of half of the requests each, which go around at the same time.
        period = half / part[0] + 2 * way_seconds(half, latency_s, bits_per_s)
        yield record(f"{args.requests} after {depth}", several, args.requests / period)
        # All layers one after the other, and two ways.
        time_alone = 1 / alone[0] + 2 * way_seconds(1, latency_s, bits_per_s)
        yield record(f"one after {depth}", alone, 1 / time_alone)
    if args.prompt:
        prompt = compare(one, two, args.rounds, length=args.prompt)
        yield record(f"prompt of {args.prompt}", prompt, 2 * prompt[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--vocab-size", type=int, default=speed_models.GEOMETRY["vocab_size"])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of a request")
    parser.add_argument("--depths", default="30",
                        help="tokens of each request's text before the new ones: N, ...")
    parser.add_argument("--prompt", type=int, default=1024, help="0 for none")
    parser.add_argument("--links", default="0,0.1:10,0.1:1,1:1", help="MS or MS:GBIT, ...")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--realtime", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "OPTIONS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        run_worker(*args.worker)
        return
    longest = max(args.prompt, *map(int, args.depths.split(","))) + args.tokens + 256
    options = {
        "device": "cpu", "cache_type": "fp16", "ctx_size": longest,
        "cache_size": longest * args.requests, "max_batch_size": args.requests,
    }
    records = []
    with tempfile.TemporaryDirectory() as directory, ExitStack() as kept:
        geometry = {"num_hidden_layers": args.layers, "vocab_size": args.vocab_size}
        folder = speed_models.write_exl2(
            Path(directory) / "model", speed_models.GEOMETRY | geometry
        )
        one = Side(folder, options, args.realtime, kept)
        for text in args.links.split(","):
            milliseconds, _, gbit = text.partition(":")
            latency_s, bits_per_s = float(milliseconds) / 1e3, float(gbit or 0) * 1e9
            with ExitStack() as of_link:
                try:
                    two = Side(folder, options, args.realtime, of_link,
                               SlowLink(latency_s, bits_per_s), HOSTS[0])
                except (OSError, subprocess.CalledProcessError) as error:
                    print(f"no namespaces ({error}): loopback", file=sys.stderr)
                    two = Side(folder, options, args.realtime, of_link, nullcontext(),
                               "127.0.0.1")
                    text = "loopback"
                for result in measure_link(one, two, args, latency_s, bits_per_s):
                    records.append({"link": text, "layers": two.layers} | result)
                    if not args.json:
                        print(f"{text}, layers {two.layers}: " + "{what}: {one:.1f} and {two:.1f} "
                              "tokens/s, ratio {ratio:.2f} (at best {best_ratio:.2f})".format(
                                  **result), flush=True)
            if text == "loopback":
                break
    if args.json:
        print(json.dumps({**vars(args), "found": records}))


if __name__ == "__main__":
    main()
