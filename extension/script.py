"""What text-generation-webui imports as an extension. It may be run again at any time.

A `ModuleNotFoundError` raised here would end the web UI, so every error is caught.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

params = {"display_name": "exl_loader", "is_tab": False}


def _registration() -> Any:
    """Activate the plugin and return its `registration`; None if that fails."""
    try:
        path = Path(__file__).resolve().parent / "bootstrap.py"
        spec = importlib.util.spec_from_file_location("exl_loader_webui_bootstrap", path)
        assert spec is not None and spec.loader is not None
        bootstrap = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(bootstrap)
        registration = bootstrap.activate("registration")
        registration.register()
        return registration
    except Exception as error:
        print(f"exl_loader: not available: {error}", flush=True)
        return None


registration = _registration()
