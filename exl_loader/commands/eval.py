"""`python -m exl_loader eval`: measure how much quality each cache type loses on texts."""

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
from ..utils.output import aligned
from ..utils.progress import default_progress
from .model_options import add_model_argument, add_options, read_text, refuse_machines

if TYPE_CHECKING:
    from .evaluation import Evaluation
    from .evaluation_plan import EvaluationPlan

# The options of `load` that this command has as well.
SHARED_OPTIONS = ("memory_limit", "alpha_value", "compress_pos_emb", "as_architecture")

HEADINGS = (
    "cache", "perplexity", "+-", "KL mean", "+-", "median", "99.9 %", "largest", "same top",
    "+-", "MiB",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    add_model_argument(parser)
    parser.add_argument(
        "--text", required=True, action="append", metavar="FILE",
        help="UTF-8 text to evaluate on; - for stdin. Repeat it for several texts, which are "
        "reported one by one and together",
    )
    parser.add_argument(
        "--cache-type", default="q8,q6,q4", metavar="TYPE,...",
        help="cache types to compare with fp16, such as q4 or q8,q8_q4 (default %(default)s); "
        "fp16 computes the perplexity of fp16 alone",
    )
    parser.add_argument(
        "--ctx-size", type=int, metavar="N",
        help="tokens of a window. A text is cut into windows that are evaluated on their own; by "
        "default they are as long as the model's own length, at most 8192",
    )
    add_options(parser, SHARED_OPTIONS)
    parser.add_argument("--machines", help=argparse.SUPPRESS)
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="evaluate the first N tokens of each text only"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print a row for every cache type.

    Raises:
        ExlLoaderError: the folder, a text or an option is wrong, or the model does not fit
            together with all caches.
    """
    from ..loader import load
    from .evaluation import evaluate
    from .evaluation_plan import REFERENCE_TYPE, parse_cache_types, plan_evaluation

    refuse_machines(
        args.machines, "a comparison of caches",
        "Leave it out, and evaluate where one machine holds the model and all caches",
    )
    texts = [read_text(path, "--text") for path in args.text]
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
        ids = [
            model.encode(text, add_bos=False, special=False)[: args.tokens] for text in texts
        ]
        found = evaluate(model, planned, ids, progress)
    report = _report(args, planned, [len(text) for text in ids], found) | {
        "seconds": round(time.perf_counter() - began, 1)
    }
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 0


def _report(
    args: argparse.Namespace, planned: EvaluationPlan, tokens: list[int], found: Evaluation
) -> dict[str, Any]:
    texts = [
        {"text": path, "tokens": count, "windows": windows,
         "results": [asdict(result) for result in results]}
        for path, count, windows, results in zip(
            args.text, tokens, found.windows, found.texts, strict=True
        )
    ]
    total = sum(device.total_bytes for device in planned.reservation.devices)
    return {
        "model": args.model,
        "tokens": sum(tokens),
        "windows": sum(found.windows),
        "ctx_size": planned.reservation.ctx_size,
        "reserved_bytes": total + planned.extra_bytes,
        "other_caches_bytes": planned.extra_bytes,
        "texts": texts,
        "results": [asdict(result) for result in found.together],
    }


def render(report: dict[str, Any]) -> str:
    """Write a report as tables for a person: one for each text, and one for all together."""
    texts = report["texts"]
    lines = [
        f"KL is the Kullback-Leibler divergence from the fp16 cache in nats per token; +- is the "
        f"standard error over windows of {report['ctx_size']} tokens"
    ]
    if len(texts) > 1:
        for part in texts:
            lines += [f"{part['text']}: {_size(part)}", *_table(part["results"])]
        lines.append(f"together: {_size(report)}")
    else:
        lines.append(_size(report))
    lines += _table(report["results"])
    lines.append(
        f"took {report['seconds']:.1f} s and {report['reserved_bytes'] / MIB:.1f} MiB, of which "
        f"{report['other_caches_bytes'] / MIB:.1f} MiB were the other caches"
    )
    return "\n".join(lines)


def _size(part: dict[str, Any]) -> str:
    windows = part["windows"]
    return f"{part['tokens']} tokens in {windows} window{'s' if windows > 1 else ''}"


def _table(results: list[dict[str, Any]]) -> list[str]:
    """Return the aligned lines of a table with a row for each cache type."""
    rows = [list(HEADINGS)]
    for result in results:
        row = [result["cache_type"], f"{result['perplexity']:.4f}",
               _error(result["perplexity_error"], ".4f")]
        found = result["divergence"]
        if found is None:
            row += [""] * 7
        else:
            row += [f"{found['mean']:.2e}", _error(found["standard_error"], ".2e")]
            row += [f"{found[name]:.2e}" for name in ("median", "percentile_99_9", "largest")]
            row += [f"{found['top1_agreement']:.2%}", _error(found["top1_error"], ".2%")]
        rows.append([*row, f"{result['cache_bytes'] / MIB:.1f}"])
    return aligned(rows)


def _error(value: float | None, form: str) -> str:
    """Format a standard error; one window has none."""
    return "?" if value is None else format(value, form)
