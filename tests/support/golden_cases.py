"""The cases of the golden record: what the engine computes, writes, plans and refuses.

    python tests/support/golden_cases.py --check              # names the cases that differ
    python tests/support/golden_cases.py --check --only plan  # those whose name has `plan` in it
    python tests/support/golden_cases.py --write              # record again: a deliberate change
    python tests/support/golden_cases.py --write --only error
    python tests/support/golden_cases.py --write --changed --only q4  # other bits everywhere

The record is tests/golden/record.json; `golden_record` describes its contents. Where it does
not have a case's bits on a machine, `--check` compares within bounds and reports that, and
`--write` adds them. `--changed` drops those of other machines, where a change within the bounds
does not show here.
Before a change is recorded, `--check` has to name no other case than the change is about.

Cases use the public functions only (`exl_loader.load`, `plan`, the loaded model's methods, the
command line). `golden_models` has their models, `golden_outputs` the cases about logits and
texts, `golden_plans` those about plans and errors.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    # The settings of the test run: one thread, no variables of the machine, an own kernel cache.
    sys.path[:0] = [
        str(parent) for parent in Path(__file__).resolve().parents[:3]
        if (parent / "conftest.py").is_file() or (parent / "exl_loader").is_dir()
    ]
    import conftest  # noqa: F401

import torch

from support.golden_models import FIXTURES, MODELS, Bench, NotHere
from support.golden_outputs import (
    command_case,
    convert_case,
    draft_case,
    logits_case,
    logits_cases,
    texts_case,
    tokens_case,
)
from support.golden_plans import errors_case, plan_case
from support.golden_record import Record, Result, machine

CASES: dict[str, Callable[[Bench], Result]] = {
    "errors": errors_case,
    "tokens": tokens_case,
    **{f"plan {model}": partial(plan_case, model=model) for model in (*MODELS, "demo", *FIXTURES)},
    **{
        f"logits {model} {backend} {cache_type}": partial(
            logits_case, model=model, backend=backend, cache_type=cache_type)
        for model, backend, cache_type in logits_cases()
    },
    "texts fp16": partial(texts_case, cache_type="fp16"),
    "texts q4": partial(texts_case, cache_type="q4"),
    "draft of itself": partial(draft_case, model="demo", draft="demo"),
    "draft of another": partial(draft_case, model="llama-exl2", draft="mistral-gptq"),
    "command line": command_case,
    "convert": convert_case,
}


def main() -> int:
    """Check or write the record; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Check or write the golden record.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="name the cases that differ")
    action.add_argument("--write", action="store_true", help="record the cases again")
    action.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases with this in their name")
    parser.add_argument("--changed", action="store_true",
                        help="with --write: drop the bits of other machines")
    parser.add_argument("--times", action="store_true", help="print the CPU time of each case")
    parser.add_argument(
        "--march", metavar="NAME", help="compile for this processor, as on another machine")
    args = parser.parse_args()
    names = [name for name in CASES if args.only in name]
    if args.list:
        print("\n".join(names))
        return 0
    torch.set_num_threads(1)
    # As tests/conftest.py does: a failed load looks through everything that may be garbage.
    gc.collect()
    gc.freeze()
    if args.march:
        os.environ["EXL_LOADER_MARCH"] = args.march
    logging.getLogger("exl_loader").setLevel(logging.ERROR)
    record = Record()
    differing = 0
    without_bits = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for name in names:
            start = time.process_time()
            try:
                result = CASES[name](bench)
            except NotHere as missing:
                print(f"{name}: left out, {missing}")
                continue
            except Exception as error:
                traceback.print_exc()
                print(f"{name}: failed with {type(error).__name__}: {error}")
                differing += 1
                continue
            if args.times:
                print(f"{time.process_time() - start:6.2f} s  {name}")
            differences = record.differences(name, result)
            differing += bool(differences)
            if result.bits and not record.has_bits(name):
                without_bits.append(name)
            if args.write:
                record.put(name, result, args.changed)
            for difference in differences[:8]:
                print(f"{name}: {difference[:300]}")
            if len(differences) > 8:
                print(f"{name}: and {len(differences) - 8} more differences")
    if args.write:
        if not args.only:
            record.keep_only(set(CASES))
        record.write()
    if without_bits:
        print(f"The record has no bits of {len(without_bits)} cases on this machine, so they were "
              f"not compared: {', '.join(without_bits)}; {machine()}")
    print(f"{len(names)} cases in {time.perf_counter() - began:.1f} s, {differing} differ")
    return int(bool(differing) and not args.write)


if __name__ == "__main__":
    raise SystemExit(main())
