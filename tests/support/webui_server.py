"""A real text-generation-webui as a process: how it is found, started and asked.

Tests use it if TEXTGEN_WEBUI_DIR is a checkout of the web UI; TEXTGEN_WEBUI_PYTHON is its Python
if that cannot be found. They install the plugin into it and uninstall it again.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import exl_loader
from extension.install.environment import clean_environment, find_python

WEBUI = os.environ.get("TEXTGEN_WEBUI_DIR")
PYTHON = Path(os.environ["TEXTGEN_WEBUI_PYTHON"]) if "TEXTGEN_WEBUI_PYTHON" in os.environ else None
DEMO = Path(exl_loader.__file__).parent / "demo_model"

# For every module of such tests.
MARKS = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not WEBUI, reason="TEXTGEN_WEBUI_DIR is not set"),
    pytest.mark.skipif(not (DEMO / "config.json").is_file(), reason="no demo model"),
]

# The shipped model was trained on nothing but Python.
PROMPT = "import os\nimport"
GREEDY = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}

START_WAIT_S = 240


def tracked(root: Path) -> dict[str, str]:
    """Return the web UI's own files with a checksum of each."""
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest()
            for folder in ("modules", "modules/api", "extensions", ".")
            for p in (root / folder).glob("*.py")}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class StreamError(Exception):
    """A stream that ended with an error; its argument is the error object."""


class Server:
    """The web UI as a process, with its API.

    Args:
        root: the web UI. models: its folder of models.
        flags: more of its options.
        page: serve the page as well, at `address`.
        kernels: folder of compiled kernels; None for the user's own.
    """

    def __init__(self, root: Path, models: Path, *flags: str, page: bool = False,
                 kernels: Path | None = None) -> None:
        self.root, self.models = root, models
        self.port, self.page_port = free_port(), free_port()
        self.address = f"http://127.0.0.1:{self.page_port}"
        self._has_page = page
        python = find_python(root, PYTHON).executable
        arguments = ["--api", "--api-port", str(self.port), "--model-dir", str(models), *flags]
        arguments += ["--listen-port", str(self.page_port)] if page else ["--nowebui"]
        self.log = models.parent / f"server-{self.port}.log"
        self._file = self.log.open("w")
        # Wide, so that no line of the log is wrapped.
        environment = clean_environment() | {"OMP_NUM_THREADS": "1", "COLUMNS": "400"}
        if kernels is not None:
            environment["EXL_LOADER_CACHE_DIR"] = str(kernels)
        self._process = subprocess.Popen(
            [str(python), "server.py", *arguments], cwd=root, stdout=self._file,
            stderr=subprocess.STDOUT, env=environment)

    def __enter__(self) -> Server:
        deadline = time.monotonic() + START_WAIT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                self.get("internal/model/info")
                if self._has_page:
                    # Stock Gradio gives up on a page that does not answer within 3 s, which can
                    # happen while a browser asks for everything at once.
                    urllib.request.urlopen(self.address, timeout=300).close()
                return self
            except OSError:
                time.sleep(0.5)
        self.__exit__()
        raise AssertionError(self.said())

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._file.close()

    def said(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, timeout_s: float = 300) -> None:
        """Wait until the log has a text."""
        deadline = time.monotonic() + timeout_s
        while text not in self.said():
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.said()[-3000:]}"
            time.sleep(0.2)

    def reserved_bytes(self) -> list[int]:
        """Return the bytes that each load has reserved; the log has the same measured."""
        lines = re.findall(r"([\d,]+) bytes reserved, ([\d,]+) measured", self.said())
        assert all(reserved == measured for reserved, measured in lines)
        return [int(reserved.replace(",", "")) for reserved, _ in lines]

    def get(self, path: str):
        with urllib.request.urlopen(self._url(path), timeout=300) as answer:
            return json.load(answer)

    def post(self, path: str, **body):
        """Post a request; return the answer, or the status of an error."""
        status, answer = self.ask(path, **body)
        return answer if status == 200 else status

    def ask(self, path: str, **body):
        """Post a request; return the status and the answer, as text if it is not JSON."""
        request = urllib.request.Request(
            self._url(path), json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            try:
                return error.code, json.loads(text)
            except ValueError:
                return error.code, text

    def load(self, name: str = "demo", **args):
        return self.post("internal/model/load", model_name=name, args=args, settings={})

    def info(self) -> dict[str, object]:
        return self.get("internal/model/info")

    def text(self, **changes) -> str:
        """Return a completion's text, greedy unless `changes` override that."""
        return self.post("completions", **GREEDY | changes)["choices"][0]["text"]

    def stream(self, **changes) -> Iterator[str]:
        """Yield a completion's text in pieces; closing the iterator closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.request("POST", "/v1/completions", json.dumps(GREEDY | changes | {
            "stream": True}), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        try:
            for line in answer:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        raise StreamError(chunk["error"])
                    yield chunk["choices"][0]["text"]
        finally:
            answer.close()
            connection.close()

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/v1/{path}"


def copy_demo(folder: Path, *names: str) -> Path:
    """Make a folder of models, each a copy of the shipped one."""
    for name in names:
        shutil.copytree(DEMO, folder / name)
    return folder
