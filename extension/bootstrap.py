"""Makes the plugin's modules and the engine importable inside the web UI's process.

The web UI runs script.py as a lone file, again at every restart of its page, so what must
outlive a restart is registered under a name of its own. Nothing is installed and `sys.path`
stays as it is: a folder on it would lend its `tests` or `tools` to the whole environment.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

PACKAGE = "exl_loader_webui"
ENGINE = "exl_loader"


class EngineFinder:
    """Finds the engine that belongs to this plugin, before any other of that name.

    Args:
        root: the folder with `exl_loader/` in it.
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
    """Find the engine: beside the extension in a checkout, inside it in a copy.

    Raises:
        FileNotFoundError: in neither place; the checkout was moved or deleted.
    """
    for root in (folder, folder.parent):
        if (root / ENGINE / "__init__.py").is_file():
            return root
    raise FileNotFoundError(
        f"the folder {ENGINE} is neither in {folder} nor beside it; run install.py --webui again"
    )


def activate(name: str) -> ModuleType:
    """Make plugin and engine importable; a second call changes nothing.

    Args:
        name: of a module of `webui/`.

    Returns:
        that module.

    Raises:
        FileNotFoundError: the engine is not where it was.
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
    return importlib.import_module(f"{PACKAGE}.webui.{name}")
