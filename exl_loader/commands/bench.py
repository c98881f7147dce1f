"""`python -m exl_loader bench`: the speed of prompts and of generated tokens, by depth and cache.

Its short options are those of llama-bench.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..backends.cpu.threads import default_threads
from ..cache.layout import CacheType
from ..memory.reservation import LoadOptions
from ..memory.reservation.text import refusal
from ..utils.byte_counts import amount
from ..utils.errors import InvalidSettings, shown
from ..utils.progress import Progress, default_progress, task
from ..utils.system.processors import cpu_name
from .model_options import add_model_argument, add_options, chosen_options, refuse_machines

if TYPE_CHECKING:
    from ..cache.paging import PagedCache
    from ..engine import LoadedModel
    from ..generation.forward_model import ForwardModel
    from ..memory.reservation import Reservation
    from .speed import ReadBuffers, SpeedResult, SpeedTest, StepBytes

# Options of `load` that this command has its own form of, or that do not change what it times.
OMITTED_OPTIONS = ("cache_type", "model_draft", "ctx_size_draft", "draft_max", "machines")
MAX_COUNT = 1 << 24
MAX_REPETITIONS = 1000

HEADINGS = ("cache", "test", "depth", "tokens/s", "slowest", "fastest", "bandwidth")
WIDTHS = (8, 14, 8, 10, 10, 10, 10)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    add_model_argument(parser)
    parser.add_argument("-p", "--n-prompt", default="512", metavar="N,...",
                        help="tokens of prompts; 0 for none (default %(default)s)")
    parser.add_argument("-n", "--n-gen", default="128", metavar="N,...",
                        help="tokens to generate; 0 for none (default %(default)s)")
    parser.add_argument("-d", "--n-depth", default="0", metavar="N,...",
                        help="tokens that the context holds before them (default %(default)s)")
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N",
                        help="times that each test runs (default %(default)s)")
    parser.add_argument("--cache-type", default="fp16", metavar="TYPE,...",
                        help="key/value caches, such as fp16,q8,q4 or q8_q4 (default %(default)s)")
    names = [name for name in LoadOptions.names("load") if name not in OMITTED_OPTIONS]
    add_options(parser, names)
    parser.add_argument("--machines", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def run(args: argparse.Namespace) -> int:
    """Time every test, and print a row for each as soon as it is known, or all as JSON.

    Raises:
        ExlLoaderError: the folder or an option is wrong, or the model does not fit with a cache
            type. This is found out before anything is timed.
    """
    from .speed import ReadBuffers

    tests = _tests(args)
    types = list(dict.fromkeys(
        str(CacheType.parse(name)) for name in args.cache_type.split(",")
    ))
    options = {name: value for name, value in chosen_options(args).items() if name != "cache_type"}
    refuse_machines(
        options["machines"], "the timing of single passes",
        "Time a text over machines by `exl_loader generate --stats`, or leave it out",
    )
    if options["ctx_size"] is None:
        options["ctx_size"] = max(test.ctx_size for test in tests)
    progress = default_progress()
    with ReadBuffers() as buffers:
        plans = _plans(args.model, types, options, tests)
        # A device with less memory may hold fewer layers, so that another one is needed.
        while missing := _devices(plans) - buffers.devices:
            for device in sorted(missing):
                buffers.take(device)
            plans = _plans(args.model, types, options, tests)
        report = _head(args.model, plans[types[0]][0], args.repetitions)
        if not args.json:
            print("\n".join(_title(report)), flush=True)
        for name, (_, step_bytes) in plans.items():
            for result in _run_tests(
                args, name, options, tests, step_bytes, buffers, progress
            ):
                report["results"].append(_record(name, result))
                if not args.json:
                    print(_row(report["results"][-1]), flush=True)
    if args.json:
        print(json.dumps(report, indent=2))
    return 0


def _tests(args: argparse.Namespace) -> list[SpeedTest]:
    """Return the tests in the order in which they run: by depth, prompts first."""
    from .speed import SpeedTest

    prompts = [count for count in _counts(args.n_prompt, "--n-prompt") if count]
    generated = [count for count in _counts(args.n_gen, "--n-gen") if count]
    depths = _counts(args.n_depth, "--n-depth")
    if not prompts and not generated:
        raise InvalidSettings(
            "--n-prompt and --n-gen", expected="at least one number of tokens",
            actual="0 in both",
        )
    if not 1 <= args.repetitions <= MAX_REPETITIONS:
        raise InvalidSettings(
            "--repetitions", expected=f"1 to {MAX_REPETITIONS}", actual=args.repetitions
        )
    return [
        test for depth in depths
        for test in (
            *(SpeedTest("prompt", count, depth) for count in prompts),
            *(SpeedTest("generate", count, depth) for count in generated),
        )
    ]


def _counts(text: str, option: str) -> list[int]:
    """Read numbers of tokens such as `0,2048`, each once."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word[:9]) <= MAX_COUNT and len(word) < 9
               for word in words):
        raise InvalidSettings(
            option, expected=f"numbers of tokens up to {MAX_COUNT}, such as 0,2048",
            actual=shown(text),
        )
    return list(dict.fromkeys(int(word) for word in words))


def _plans(
    model_dir: str, types: Sequence[str], options: dict[str, Any], tests: Sequence[SpeedTest]
) -> dict[str, tuple[Reservation, StepBytes]]:
    """Plan the model with each cache type, and count the bytes that a token reads.

    Raises:
        InsufficientMemory: it does not fit with one of them.
        InvalidSettings: the context is too short for a test.
    """
    plans = {name: _planned(model_dir, name, options) for name in types}
    for reservation, _ in plans.values():
        _check(reservation, tests)
    return plans


def _devices(plans: Mapping[str, tuple[Reservation, StepBytes]]) -> set[str]:
    """Return the devices that have layers in any of the plans."""
    return {device for _, step_bytes in plans.values() for device in step_bytes.weights}


def _planned(
    model_dir: str, cache_type: str, options: dict[str, Any]
) -> tuple[Reservation, StepBytes]:
    from ..memory.reservation import planned
    from .speed import StepBytes

    chosen = LoadOptions(**options, cache_type=cache_type)
    with planned(model_dir, chosen) as found:
        step_bytes = StepBytes.from_parts(found.model.parts, CacheType.parse(cache_type))
        return found.reservation, step_bytes


def _check(reservation: Reservation, tests: Sequence[SpeedTest]) -> None:
    """Refuse a context that is too short for a test, and a model that does not fit."""
    needed = max(test.ctx_size for test in tests)
    if reservation.ctx_size < needed:
        raise InvalidSettings(
            "--ctx-size", expected=f"at least {needed} tokens, for the deepest test",
            actual=reservation.ctx_size, remedy="Leave it out, or choose smaller depths",
        )
    if not reservation.fits:
        raise refusal(reservation)


def _run_tests(
    args: argparse.Namespace, cache_type: str, options: dict[str, Any],
    tests: Sequence[SpeedTest], step_bytes: StepBytes, buffers: ReadBuffers, progress: Progress,
) -> Iterator[SpeedResult]:
    """Load the model with a cache type, and yield the finished result of each test."""
    from ..loader import load

    with load(args.model, progress=progress, cache_type=cache_type, **options) as model:
        growing = _measured(model, tests, args.repetitions, step_bytes, buffers)
        for test in tests:
            with task(progress, f"{cache_type}: {test}", args.repetitions, "times") as advance:
                for _ in range(args.repetitions):
                    result = next(growing)
                    advance(1)
            yield result


def _measured(
    model: LoadedModel, tests: Sequence[SpeedTest], repetitions: int, step_bytes: StepBytes,
    buffers: ReadBuffers,
) -> Iterator[SpeedResult]:
    """Yield the result of each test after every repetition; see `speed.measure`."""
    from ..model.forward import Model
    from .speed import measure

    def steps(forward: ForwardModel, cache: PagedCache) -> Iterator[SpeedResult | None]:
        assert isinstance(forward, Model)
        return measure(
            forward, cache, tests=tests, repetitions=repetitions, ctx_size=model.ctx_size,
            vocab_size=forward.config.vocab_size, ops=forward.ops, step_bytes=step_bytes,
            buffers=buffers,
        )

    return model.run_alone(steps)


def _head(model_dir: str, reservation: Reservation, repetitions: int) -> dict[str, Any]:
    return {
        "exl_loader": __version__,
        "model": model_dir,
        "architecture": reservation.architecture,
        "format": reservation.format,
        "weights_bytes": reservation.weights_bytes + reservation.embedding_bytes,
        "ctx_size": reservation.ctx_size,
        "chunk_size": reservation.chunk_size,
        "devices": [device.device for device in reservation.devices],
        "processor": cpu_name(),
        "cpu_threads": default_threads(),
        "repetitions": repetitions,
        "results": [],
    }


def _record(cache_type: str, result: SpeedResult) -> dict[str, Any]:
    """Describe a result by JSON types; speeds in tokens a second, bandwidths in bytes a second."""
    slowest, fastest = result.spread
    devices = result.bandwidths[0] if result.bandwidths else {}
    return {
        "cache_type": cache_type,
        "test": result.test.kind,
        "tokens": result.test.tokens,
        "depth": result.test.depth,
        "tokens_per_s": result.tokens_per_s,
        "slowest_tokens_per_s": slowest,
        "fastest_tokens_per_s": fastest,
        "bandwidth_share": result.bandwidth_share,
        "bandwidth_bytes_per_s": {
            device: statistics.median(found[device] for found in result.bandwidths)
            for device in devices
        },
        "seconds": result.seconds,
    }


def _title(report: dict[str, Any]) -> list[str]:
    times = report["repetitions"]
    return [
        f"{report['model']}: {report['architecture']}, {report['format']}, "
        f"{amount(report['weights_bytes'])} of weights",
        f"on {', '.join(report['devices'])}; {report['processor']}, "
        f"{report['cpu_threads']} thread{'s' if report['cpu_threads'] > 1 else ''}; "
        f"the median of {times} repetition{'s' if times > 1 else ''}",
        "",
        _line(HEADINGS),
    ]


def _row(record: dict[str, Any]) -> str:
    share = record["bandwidth_share"]
    speeds = ("tokens_per_s", "slowest_tokens_per_s", "fastest_tokens_per_s")
    return _line((
        record["cache_type"], f"{record['test']} {record['tokens']}", str(record["depth"]),
        *(f"{record[name]:.2f}" for name in speeds), "" if share is None else f"{share:.0%}",
    ))


def _line(cells: Sequence[str]) -> str:
    """Align a row's cells; the columns are fixed, because rows are printed one by one."""
    texts = [cell.ljust(n) if i < 2 else cell.rjust(n)
             for i, (cell, n) in enumerate(zip(cells, WIDTHS, strict=True))]
    return "".join(texts).rstrip()
