"""A real TabbyAPI as a process: how it is found, started and asked.

Tests use it if TABBYAPI_DIR is a checkout of TabbyAPI; TABBYAPI_PYTHON is its Python if that cannot
be found. They install the backend into it and uninstall it again.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from extension.install.environment import TABBYAPI, find_python

from .host_server import DEMO, GREEDY, HostServer
from .ports import free_port

FOLDER = os.environ.get("TABBYAPI_DIR")
PYTHON = Path(os.environ["TABBYAPI_PYTHON"]) if "TABBYAPI_PYTHON" in os.environ else None

# For every module of such tests.
MARKS = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not FOLDER, reason="TABBYAPI_DIR is not set"),
    pytest.mark.skipif(not (DEMO / "config.json").is_file(), reason="no demo model"),
]

# The branch exl2-checkpoint, which has a table of backends.
IS_OLD = FOLDER is not None and (Path(FOLDER) / "backends" / "base_model_container.py").is_file()


def tracked(root: Path) -> str:
    """Return what git says of changed and added files."""
    command = ["git", "-C", str(root), "status", "--porcelain"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class TabbyServer(HostServer):
    """TabbyAPI as a process.

    Args:
        root: TabbyAPI.
        folder: for its configuration and its log; its models are in `models`, its LoRAs in `loras`.
        model: the options of the section `model`.
        launcher: start it with the launcher instead of the start hook.
        sections: further sections of its configuration.
    """

    def __init__(
        self, root: Path, folder: Path, model: dict[str, Any] | None = None, *,
        launcher: Path | None = None, **sections: dict[str, Any],
    ) -> None:
        port = free_port()
        config = {
            "network": {"port": port, "disable_auth": True, "api_servers": ["OAI", "Kobold"]},
            "model": {"model_dir": str(folder / "models"), **(model or {})},
            "lora": {"lora_dir": str(folder / "loras")},
            "draft_model": {"draft_model_dir": str(folder / "models")},
            "developer": {"unsafe_launch": True},
        }
        for name, values in sections.items():
            config[name] = config.get(name, {}) | values
        path = folder / f"config-{port}.yml"
        # JSON is YAML.
        path.write_text(json.dumps(config))
        python = find_python(root, PYTHON, TABBYAPI).executable
        start = ["main.py"] if launcher is None else [str(launcher), str(root)]
        # Wide, so that no line of the log is wrapped.
        super().__init__([str(python), *start, "--config", str(path)], root, folder, port,
                         {"TABBY_LOG_CONSOLE_WIDTH": "1000"})

    def check_answers(self) -> None:
        self.get("health")

    def text(self, **changes) -> str:
        """Return a completion's text, greedy unless `changes` override that."""
        status, answer = self.ask("v1/completions", **GREEDY | changes)
        assert status == 200, answer
        return answer["choices"][0]["text"]

    def load(self, name: str, **options) -> list[dict[str, Any]]:
        """Load a model; return the events of the load, the last of which may be an error."""
        return list(self.events("v1/model/load", model_name=name, **options))
