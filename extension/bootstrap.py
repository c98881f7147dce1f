"""Makes the plugin's modules and the engine importable inside a host's process.

The web UI runs script.py as a single file outside any package, and again at every restart of its
page, so modules that must outlive a restart are registered under a name of their own. `sys.path`
is not changed: a folder on it would make its `tests` or `tools` importable everywhere.

Start hooks of earlier installations load this file by its path and call `activate("early")`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

PACKAGE = "exl_loader_extension"
ENGINE = "exl_loader"


class EngineFinder:
    """Finds the engine that belongs to this plugin before any other package of that name.

    Args:
        root: the folder that contains `exl_loader/`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> ModuleSpec | None:
        """Return the engine's spec; its submodules are found through its own path."""
        if fullname != ENGINE:
            return None
        folder = self.root / ENGINE
        return importlib.util.spec_from_file_location(
            ENGINE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def engine_root(folder: Path) -> Path:
    """Return the folder of the engine: beside the extension in a checkout, inside it in a copy.

    Raises:
        FileNotFoundError: it is in neither place; the checkout was moved or deleted.
    """
    for root in (folder, folder.parent):
        if (root / ENGINE / "__init__.py").is_file():
            return root
    raise FileNotFoundError(
        f"the folder {ENGINE} is neither in {folder} nor next to it; run install.py again"
    )


def activate(name: str, room: str = "webui") -> ModuleType:
    """Make plugin and engine importable, and import a module; a second call changes nothing.

    Args:
        name: of a module in the room.
        room: the folder of the host, `webui` or `tabby`.

    Returns:
        that module.

    Raises:
        FileNotFoundError: the engine was moved or deleted.
    """
    folder = Path(__file__).resolve().parent
    root = engine_root(folder)
    if not any(type(finder).__name__ == EngineFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, EngineFinder(root))
    if PACKAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules[PACKAGE] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"{PACKAGE}.{room}.{name}")
