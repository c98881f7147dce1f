"""Starts TabbyAPI with this backend, where no start hook is installed, as in a container.

    python extension/tabby/launcher.py /path/to/tabbyAPI [arguments of its main.py]

It runs in TabbyAPI's Python, which must have the engine's packages (`install.py --tabbyapi`
installs them and the start hook, with which main.py and start.py need no launcher).
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

USAGE = "usage: launcher.py /path/to/tabbyAPI [arguments of its main.py]"


def main(arguments: list[str]) -> int:
    """Start TabbyAPI; return the exit code where that is not possible."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    root = Path(arguments[0]).expanduser().resolve()
    if not (root / "main.py").is_file() or not (root / "common" / "model.py").is_file():
        print(f"error: {root} is not the folder of TabbyAPI: main.py or common/model.py is missing",
              file=sys.stderr)
        return 2
    path = Path(__file__).resolve().parents[1] / "bootstrap.py"
    spec = spec_from_file_location("exl_loader_bootstrap", path)
    assert spec is not None and spec.loader is not None
    bootstrap = module_from_spec(spec)
    spec.loader.exec_module(bootstrap)
    bootstrap.activate("early", "tabby").start()
    # As if main.py had been started in its folder.
    os.chdir(root)
    sys.path[0] = str(root)
    sys.argv = ["main.py", *arguments[1:]]
    importlib.import_module("main").entrypoint()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
