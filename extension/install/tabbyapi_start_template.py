"""Registers exl_loader as a backend of TabbyAPI before its model loads.

Written by exl_loader's `install.py --tabbyapi PATH`, which removes it with `--uninstall`.
exl_loader_tabbyapi.pth runs it in every process of this environment that has a main.py or start.py
among its arguments. Any error is reported here in one line, and TabbyAPI starts without the
backend.
"""

import os
import sys


def is_tabbyapi():
    """Return whether this process is about to run TabbyAPI."""
    for argument in sys.orig_argv[1:]:
        if os.path.basename(argument) in ("main.py", "start.py"):
            root = os.path.dirname(os.path.abspath(argument))
            if os.path.isfile(os.path.join(root, "common", "model.py")):
                return os.path.isdir(os.path.join(root, "backends"))
    return False


def start():
    """Activate the backend if this process is TabbyAPI."""
    if not is_tabbyapi():
        return
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "exl_loader_tabbyapi")
    path = os.path.join(folder, "bootstrap.py")
    if not os.path.isfile(path):
        raise FileNotFoundError(folder + " does not exist or links to a folder that does not")
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("exl_loader_bootstrap", path)
    assert spec is not None and spec.loader is not None
    bootstrap = module_from_spec(spec)
    spec.loader.exec_module(bootstrap)
    bootstrap.activate("early", "tabby").start()


try:
    start()
except Exception as error:
    sys.stderr.write(
        f"exl_loader: the backend is not available: {error} (to remove it completely, delete "
        f"exl_loader_tabbyapi* in {os.path.dirname(__file__)})\n"
    )
