"""`python -m exl_loader eval`: measure how much quality each cache type loses on a text."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.config import ModelConfig
from ..utils.byte_counts import MIB
from ..utils.errors import InvalidSettings
from ..utils.progress import default_progress
from .model_options import add_model_argument, add_options, read_text

if TYPE_CHECKING:
    from .evaluation import Result
    from .evaluation_plan import EvaluationPlan

# The options of `load` that this command has as well.
SHARED_OPTIONS = ("memory_limit", "alpha_value", "compress_pos_emb", "as_architecture")

HEADINGS = (
    "cache", "perplexity", "KL mean", "+-", "median", "99.9 %", "largest", "same top", "MiB",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    add_model_argument(parser)
    parser.add_argument(
        "--text", required=True, metavar="FILE", help="UTF-8 text to evaluate on; - for stdin"
    )
    parser.add_argument(
        "--cache-type", default="q8,q6,q4", metavar="TYPE,...",
        help="cache types to compare with fp16, such as q4 or q8,q8_q4 (default %(default)s); "
        "fp16 computes the perplexity of fp16 alone",
    )
    parser.add_argument(
        "--ctx-size", type=int, metavar="N",
        help="tokens of context of a piece of the text; by default the model's own length, at most "
        "8192",
    )
    add_options(parser, SHARED_OPTIONS)
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="evaluate the first N tokens of the text only"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print a row for every cache type.

    Raises:
        ExlLoaderError: the folder, the text or an option is wrong, or the model does not fit
            together with all caches.
    """
    from ..loader import load
    from .evaluation import evaluate
    from .evaluation_plan import REFERENCE_TYPE, parse_cache_types, plan_evaluation

    text = read_text(args.text, "--text")
    if args.tokens is not None and args.tokens < 2:
        raise InvalidSettings("--tokens", expected="2 or more", actual=str(args.tokens))
    options = {name: getattr(args, name) for name in ("ctx_size", *SHARED_OPTIONS)}
    planned = plan_evaluation(
        args.model, parse_cache_types(args.cache_type),
        config=ModelConfig.from_dir(Path(args.model), args.as_architecture), **options,
    )
    progress = default_progress()
    began = time.perf_counter()
    options |= {
        "ctx_size": planned.reservation.ctx_size, "cache_type": REFERENCE_TYPE,
        "device": planned.reservation.devices[0].device,
    }
    with load(args.model, progress=progress, **options) as model:
        ids = model.encode(text, add_bos=False, special=False)[: args.tokens]
        results = evaluate(model, planned, ids, progress)
    report = _report(args, planned, len(ids), results) | {
        "seconds": round(time.perf_counter() - began, 1)
    }
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 0


def _report(
    args: argparse.Namespace, planned: EvaluationPlan, tokens: int, results: list[Result]
) -> dict[str, Any]:
    total = sum(device.total_bytes for device in planned.reservation.devices)
    return {
        "model": args.model,
        "text": args.text,
        "tokens": tokens,
        "ctx_size": planned.reservation.ctx_size,
        "reserved_bytes": total + planned.extra_bytes,
        "other_caches_bytes": planned.extra_bytes,
        "results": [asdict(result) for result in results],
    }


def render(report: dict[str, Any]) -> str:
    """Write a report as a table for a person."""
    rows = [list(HEADINGS)]
    for result in report["results"]:
        row = [result["cache_type"], f"{result['perplexity']:.4f}"]
        found = result["divergence"]
        if found is None:
            row += [""] * 6
        else:
            names = ("mean", "standard_error", "median", "percentile_99_9", "largest")
            row += [f"{found[name]:.2e}" for name in names]
            row.append(f"{found['top1_agreement']:.2%}")
        rows.append([*row, f"{result['cache_bytes'] / MIB:.1f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        row[0].ljust(widths[0])
        + "".join("  " + cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return "\n".join([
        f"{report['tokens']} tokens in pieces of {report['ctx_size']}; KL is the "
        "Kullback-Leibler divergence from the fp16 cache in nats per token",
        *(line.rstrip() for line in lines),
        f"took {report['seconds']:.1f} s and {report['reserved_bytes'] / MIB:.1f} MiB, of which "
        f"{report['other_caches_bytes'] / MIB:.1f} MiB were the other caches",
    ])  # fmt: skip
