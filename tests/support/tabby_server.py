"""A real TabbyAPI as a process: how it is found, started and asked.

Tests use it if TABBYAPI_DIR is a checkout of TabbyAPI; TABBYAPI_PYTHON is its Python if that cannot
be found. They install the backend into it and uninstall it again.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from extension.install.environment import TABBYAPI, clean_environment, find_python

from .webui_server import DEMO, free_port

FOLDER = os.environ.get("TABBYAPI_DIR")
PYTHON = Path(os.environ["TABBYAPI_PYTHON"]) if "TABBYAPI_PYTHON" in os.environ else None

# For every module of such tests.
MARKS = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not FOLDER, reason="TABBYAPI_DIR is not set"),
    pytest.mark.skipif(not (DEMO / "config.json").is_file(), reason="no demo model"),
]

# The shipped model was trained on nothing but Python.
PROMPT = "import os\nimport"
GREEDY = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}

START_WAIT_S = 240

# The branch exl2-checkpoint, which has a table of backends.
IS_OLD = FOLDER is not None and (Path(FOLDER) / "backends" / "base_model_container.py").is_file()


def tracked(root: Path) -> str:
    """Return what git says of changed and added files."""
    command = ["git", "-C", str(root), "status", "--porcelain"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class TabbyServer:
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
        self.port = free_port()
        config = {
            "network": {"port": self.port, "disable_auth": True, "api_servers": ["OAI", "Kobold"]},
            "model": {"model_dir": str(folder / "models"), **(model or {})},
            "lora": {"lora_dir": str(folder / "loras")},
            "draft_model": {"draft_model_dir": str(folder / "models")},
            "developer": {"unsafe_launch": True},
        }
        for name, values in sections.items():
            config[name] = config.get(name, {}) | values
        path = folder / f"config-{self.port}.yml"
        # JSON is YAML.
        path.write_text(json.dumps(config))
        self.log = folder / f"server-{self.port}.log"
        self._file = self.log.open("w")
        python = find_python(root, PYTHON, TABBYAPI).executable
        start = ["main.py"] if launcher is None else [str(launcher), str(root)]
        # Wide, so that no line of the log is wrapped.
        self.process = subprocess.Popen(
            [str(python), *start, "--config", str(path)], cwd=root, stdout=self._file,
            stderr=subprocess.STDOUT, env=clean_environment() | {
                "OMP_NUM_THREADS": "1", "TABBY_LOG_CONSOLE_WIDTH": "1000"})

    def __enter__(self) -> TabbyServer:
        deadline = time.monotonic() + START_WAIT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("health")
                return self
            except OSError:
                time.sleep(0.2)
        self.__exit__()
        raise AssertionError(self.said()[-5000:])

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._file.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def said(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace")

    def get(self, path: str):
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=300) as answer:
            return json.load(answer)

    def ask(self, path: str, method: str = "POST", **body):
        """Send a request; return the status and the answer, as text if it is not JSON."""
        request = urllib.request.Request(
            f"{self.url}/{path}", json.dumps(body).encode(),
            {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode(errors="replace")
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def text(self, **changes) -> str:
        """Return a completion's text, greedy unless `changes` override that."""
        status, answer = self.ask("v1/completions", **GREEDY | changes)
        assert status == 200, answer
        return answer["choices"][0]["text"]

    def load(self, name: str, **options) -> list[dict[str, Any]]:
        """Load a model; return the events of the load, the last of which may be an error."""
        return list(self.events("v1/model/load", model_name=name, **options))

    def events(self, path: str, **body) -> Iterator[dict[str, Any]]:
        """Yield the events of a stream; closing the iterator closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.request("POST", f"/{path}", json.dumps(body),
                           {"Content-Type": "application/json"})
        answer = connection.getresponse()
        try:
            for line in answer:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])
        finally:
            answer.close()
            connection.close()

    def reserved_bytes(self) -> list[int]:
        """Return the bytes that each load has reserved; the log has the same allocated."""
        lines = re.findall(r"([\d,]+) bytes reserved, ([\d,]+) allocated", self.said())
        assert all(reserved == allocated for reserved, allocated in lines)
        return [int(reserved.replace(",", "")) for reserved, _ in lines]
