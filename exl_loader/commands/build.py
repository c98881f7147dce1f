"""`python -m exl_loader build`: compile the kernels ahead of the first load."""

from __future__ import annotations

import argparse
import json
import time

from ..kernels.build import build
from ..kernels.spec import require_cpu_spec
from ..kernels.store import discard, find_built
from ..progress import default_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    parser.add_argument(
        "--force", action="store_true", help="compile even where a finished build exists"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Build, and say where the library is and how long that took.

    Raises:
        KernelBuildError: no compiler, or the kernels do not compile.
    """
    spec = require_cpu_spec()
    found = find_built(spec)
    if found is not None and args.force:
        discard(found)
        found = None
    began = time.perf_counter()
    library = build(spec, default_progress())
    seconds = time.perf_counter() - began
    result = {
        "library": str(library),
        "library_bytes": library.stat().st_size,
        "compiled": found is None,
        "seconds": round(seconds, 3),
        "compiler": spec.compiler.version,
        "flags": list(spec.flags),
    }
    if args.json:
        print(json.dumps(result, indent=2))
    elif result["compiled"]:
        print(f"compiled {library} in {seconds:.1f} s with {spec.compiler.version}")
    else:
        print(f"already there: {library}")
    return 0
