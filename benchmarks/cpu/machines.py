"""Measure a model over two machines: `python -m benchmarks.cpu.machines [--layers N] [--json]`.

The machines are processes, each pinned to a core of its own and in a network namespace of its
own, joined by a link of given latency and bandwidth (`slow_link`). Each has half of the layers of
a Llama of 1.1 B geometry with random EXL2 weights, and is compared with one pinned process that
has all of them. Measured are the new tokens a second of one request and of several at once, and
the tokens a second of a prompt. `--links` has the links, each as MILLISECONDS or
MILLISECONDS:GBIT, where the milliseconds are those of one way. Without the right to make
namespaces, machines meet on loopback, and only the first link is measured.

Beside each rate is that of the model of cost in docs/machines.md: what the one process measured,
divided among two, and what hidden states add on their way.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import exl_loader
from benchmarks.cpu import speed_models
from benchmarks.cpu.slow_link import HOSTS, SlowLink

PORT = 29555
SETTINGS = {"temperature": 0, "ban_eos_token": True}
# Bytes of a frame besides its hidden states, and of the way of one besides Ethernet's payload.
FRAME_BYTES = 300


def measure(
    model: exl_loader.LoadedModel, tokens: int, requests: int, prompt: int, depth: int
) -> dict[str, Any]:
    """Return tokens a second: of a prompt, of one request, and of several at once."""
    ids = [3 + 7 * i % 1000 for i in range(max(prompt, depth + requests))]
    settings = SETTINGS | {"max_new_tokens": tokens}
    list(model.generate_ids(ids[:40], settings | {"max_new_tokens": 4}))
    found: dict[str, Any] = {}
    start = time.perf_counter()
    list(model.generate_ids(ids[:prompt], SETTINGS | {"max_new_tokens": 1}))
    found["prompt"] = prompt / (time.perf_counter() - start)
    for name, count in (("one", 1), ("half", requests // 2), ("several", requests)):
        texts = [model.generate_ids([5 + i, *ids[i : i + depth]], settings) for i in range(count)]
        readers = [iter(text) for text in texts]
        # The prompts are no part of what is measured.
        firsts = [next(reader) for reader in readers]
        before = sum(text.stats.new_tokens for text in texts)
        start = time.perf_counter()
        # Each text has a reader, because a text that nobody reads is not computed far ahead.
        with ThreadPoolExecutor(count) as pool:
            others = list(pool.map(list, readers))
        seconds = time.perf_counter() - start
        found[name] = (sum(text.stats.new_tokens for text in texts) - before) / seconds
        found[f"{name}_ids"] = [[one, *more] for one, more in zip(firsts, others, strict=True)]
    return found


def run_worker(folder: str, options: str) -> None:
    """Load, measure and print the result as JSON; a process of its own."""
    chosen = json.loads(options)
    sizes = chosen.pop("measure")
    with exl_loader.load(folder, **chosen) as model:
        print(json.dumps(measure(model, **sizes)), flush=True)


def start(
    command: list[str], core: int, prefix: list[str], **options: Any
) -> subprocess.Popen[str]:
    """Start a Python program on one core."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*prefix, "taskset", "-c", str(core), sys.executable, "-m", *command], text=True,
        env=environment, **options,
    )


def rates(folder: Path, sizes: dict[str, int], link: AbstractContextManager[Any], split: str | None,
          host: str) -> dict[str, Any]:
    """Measure one process, or with a split two machines."""
    options: dict[str, Any] = {
        "device": "cpu", **context(sizes), "cache_type": "fp16",
        "max_batch_size": sizes["requests"], "measure": sizes,
    }
    with link as made:
        prefixes = [[], []] if made is None else made.prefixes
        other = None
        if split is not None:
            address = f"tcp://{host}:{PORT}"
            options |= {"machines": address, "gpu_split": split}
            other = start(
                ["exl_loader", "serve-stage", str(folder), "--device", "cpu", "--machines",
                 address, "--rank", "1", "--world-size", "2"],
                1, prefixes[1], stderr=subprocess.DEVNULL,
            )
        try:
            first = start(
                ["benchmarks.cpu.machines", "--worker", str(folder), json.dumps(options)],
                0, prefixes[0], stdout=subprocess.PIPE,
            )
            out, _ = first.communicate()
            if first.returncode:
                raise SystemExit("the first machine failed")
            found: dict[str, Any] = json.loads(out)
            return found
        finally:
            if other is not None:
                other.kill()
                other.wait()


def context(sizes: dict[str, int]) -> dict[str, int]:
    """Return the options for the length of the texts and for all of them at once."""
    longest = max(sizes["prompt"], sizes["depth"]) + sizes["tokens"] + 256
    return {"ctx_size": longest, "cache_size": longest * sizes["requests"]}


def half_split(folder: Path, sizes: dict[str, int]) -> str:
    """Return the `gpu_split` that leaves half of the layers to the second machine."""
    plan = exl_loader.plan(
        folder, device="cpu", **context(sizes), cache_type="fp16",
        max_batch_size=sizes["requests"],
    )
    config = speed_models.GEOMETRY
    # Embedding, head and workspace are on the first machine besides its layers.
    ends = 2 * 2 * config["vocab_size"] * config["hidden_size"]
    (device,) = plan.devices
    layers = (device.weights_bytes - ends + device.cache_bytes) // 2
    return f"{(ends + layers + device.workspace_bytes) / (1 << 30):.6f};"


def predicted(one: dict[str, Any], sizes: dict[str, int], latency_s: float,
              bits_per_s: float) -> dict[str, float]:
    """Return the rates that the model of cost expects of two machines."""
    hidden = 4 * speed_models.GEOMETRY["hidden_size"]

    def way(rows: int) -> float:
        nbytes = rows * hidden + FRAME_BYTES
        return latency_s + (8 * nbytes / bits_per_s if bits_per_s else 0.0)

    requests = sizes["requests"]
    # A request alone: all layers one after the other, and two ways.
    alone = 1 / (1 / one["one"] + 2 * way(1))
    # Several: two passes of half of the requests each, which go around at the same time.
    half = requests // 2
    period = half / one["half"] + 2 * way(half)
    return {"one": alone, "several": requests / period, "prompt": 2 * one["prompt"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of a request")
    parser.add_argument("--depth", type=int, default=30,
                        help="tokens of each request's text before the new ones")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--links", default="0,0.1:10,0.1:1,1:1", help="MS or MS:GBIT, ...")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "OPTIONS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        run_worker(*args.worker)
        return
    sizes = {"tokens": args.tokens, "requests": args.requests, "prompt": args.prompt,
             "depth": args.depth}
    found = []
    with tempfile.TemporaryDirectory() as directory:
        config = speed_models.GEOMETRY | {"num_hidden_layers": args.layers}
        folder = speed_models.write_exl2(Path(directory) / "model", config)
        one = rates(folder, sizes, nullcontext(), None, "")
        split = half_split(folder, sizes)
        for text in args.links.split(","):
            milliseconds, _, gbit = text.partition(":")
            latency_s, bits_per_s = float(milliseconds) / 1e3, float(gbit or 0) * 1e9
            try:
                link: AbstractContextManager[Any] = SlowLink(latency_s, bits_per_s)
                two = rates(folder, sizes, link, split, HOSTS[0])
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"no namespaces ({error}): loopback", file=sys.stderr)
                two = rates(folder, sizes, nullcontext(), split, "127.0.0.1")
                text = "loopback"
            for name in ("one_ids", "several_ids"):
                assert one[name] == two[name], "other tokens than on one machine"
            expected = predicted(one, sizes, latency_s, bits_per_s)
            result: dict[str, Any] = {"link": text}
            for name in ("one", "several", "prompt"):
                result |= {name: two[name], f"{name}_ratio": two[name] / one[name],
                           f"{name}_predicted": expected[name] / one[name]}
            found.append(result)
            if not args.json:
                print(f"{text}: " + "; ".join(
                    f"{name} {result[name]:.1f} tokens/s, {result[f'{name}_ratio']:.2f} times one "
                    f"machine (expected {result[f'{name}_predicted']:.2f})"
                    for name in ("one", "several", "prompt")
                ), flush=True)
            if text == "loopback":
                break
    if args.json:
        rate = {name: one[name] for name in ("one", "several", "prompt")}
        print(json.dumps({"layers": args.layers, **sizes, "one_machine": rate, "links": found}))


if __name__ == "__main__":
    main()
