"""A real text-generation-webui as a process: how it is found, started and asked.

Tests use it if TEXTGEN_WEBUI_DIR is a checkout of the web UI; TEXTGEN_WEBUI_PYTHON is its Python
if that cannot be found. They install the plugin into it and uninstall it again.
"""

from __future__ import annotations

import hashlib
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from extension.install.environment import find_python

from .host_server import DEMO, GREEDY, HostServer
from .ports import free_port

WEBUI = os.environ.get("TEXTGEN_WEBUI_DIR")
PYTHON = Path(os.environ["TEXTGEN_WEBUI_PYTHON"]) if "TEXTGEN_WEBUI_PYTHON" in os.environ else None

# For every module of such tests.
MARKS = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not WEBUI, reason="TEXTGEN_WEBUI_DIR is not set"),
    pytest.mark.skipif(not (DEMO / "config.json").is_file(), reason="no demo model"),
]


def tracked(root: Path) -> dict[str, str]:
    """Return the web UI's own files with a checksum of each."""
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest()
            for folder in ("modules", "modules/api", "extensions", ".")
            for p in (root / folder).glob("*.py")}


class StreamError(Exception):
    """A stream that ended with an error; its argument is the error object."""


class Server(HostServer):
    """The web UI as a process, with its API.

    Args:
        root: the web UI. models: its folder of models.
        flags: more of its options.
        page: serve the page as well, at `address`.
        kernels: folder of compiled kernels; None for the user's own.
    """

    prefix = "/v1"

    def __init__(self, root: Path, models: Path, *flags: str, page: bool = False,
                 kernels: Path | None = None) -> None:
        self.root, self.models = root, models
        port, page_port = free_port(), free_port()
        self.address = f"http://127.0.0.1:{page_port}"
        self._has_page = page
        python = find_python(root, PYTHON).executable
        arguments = ["--api", "--api-port", str(port), "--model-dir", str(models), *flags]
        arguments += ["--listen-port", str(page_port)] if page else ["--nowebui"]
        # Wide, so that no line of the log is wrapped.
        environment = {"COLUMNS": "400"}
        if kernels is not None:
            environment["EXL_LOADER_CACHE_DIR"] = str(kernels)
        super().__init__(
            [str(python), "server.py", *arguments], root, models.parent, port, environment)

    def check_answers(self) -> None:
        self.get("internal/model/info")
        if self._has_page:
            # Stock Gradio gives up on a page that does not answer within 3 s, which can happen
            # while a browser asks for everything at once.
            urllib.request.urlopen(self.address, timeout=300).close()

    def post(self, path: str, **body: Any) -> Any:
        """Post a request; return the answer, or the status of an error."""
        status, answer = self.ask(path, **body)
        return answer if status == 200 else status

    def load(self, name: str = "demo", **args: Any) -> Any:
        return self.post("internal/model/load", model_name=name, args=args, settings={})

    def info(self) -> dict[str, object]:
        return self.get("internal/model/info")

    def text(self, **changes: Any) -> str:
        """Return a completion's text, greedy unless `changes` override that."""
        return self.post("completions", **GREEDY | changes)["choices"][0]["text"]

    def stream(self, **changes: Any) -> Iterator[str]:
        """Yield a completion's text in pieces; closing the iterator closes the connection."""
        for chunk in self.events("completions", **GREEDY | changes | {"stream": True}):
            if "error" in chunk:
                raise StreamError(chunk["error"])
            yield chunk["choices"][0]["text"]
