"""A host's server as a process: how it is started, asked and ended."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import exl_loader
from extension.install.environment import clean_environment

DEMO = Path(exl_loader.__file__).parent / "demo_model"

# The shipped model was trained on nothing but Python.
PROMPT = "import os\nimport"
GREEDY = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}

_START_WAIT_S = 240
_END_WAIT_S = 60
_ANSWER_WAIT_S = 300


def copy_demo(folder: Path, *names: str) -> Path:
    """Make a folder of models, each a copy of the shipped one."""
    for name in names:
        shutil.copytree(DEMO, folder / name)
    return folder


class HostServer(ABC):
    """A server as a process; it runs inside of a `with` block.

    Args:
        command: starts it.
        root: the host's folder.
        folder: for its log.
        port: where it answers.
        environment: more variables of its environment.

    Attributes:
        process: the process.
        log: the file of its output.
    """

    # What each path begins with.
    prefix = ""

    def __init__(
        self, command: Sequence[str], root: Path, folder: Path, port: int,
        environment: Mapping[str, str],
    ) -> None:
        self.port = port
        self.log = folder / f"server-{port}.log"
        self._file = self.log.open("w")
        self.process = subprocess.Popen(
            list(command), cwd=root, stdout=self._file, stderr=subprocess.STDOUT,
            env=clean_environment() | {"OMP_NUM_THREADS": "1", **environment})

    def __enter__(self):
        deadline = time.monotonic() + _START_WAIT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.check_answers()
                return self
            except OSError:
                time.sleep(0.3)
        self.__exit__()
        raise AssertionError(self.said()[-5000:])

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(_END_WAIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._file.close()

    @abstractmethod
    def check_answers(self) -> None:
        """Raise OSError unless the server answers."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.prefix}"

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
        """Return the bytes that each load has reserved; the log has the same as taken."""
        lines = re.findall(r"([\d,]+) bytes reserved, ([\d,]+) (?:measured|allocated)", self.said())
        assert all(reserved == taken for reserved, taken in lines)
        return [int(reserved.replace(",", "")) for reserved, _ in lines]

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=_ANSWER_WAIT_S) as answer:
            return json.load(answer)

    def ask(self, path: str, method: str = "POST", **body: Any) -> tuple[int, Any]:
        """Send a request; return the status and the answer, as text if it is not JSON."""
        request = urllib.request.Request(
            f"{self.url}/{path}", json.dumps(body).encode(),
            {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=_ANSWER_WAIT_S) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode(errors="replace")
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def events(self, path: str, **body: Any) -> Iterator[dict[str, Any]]:
        """Yield the events of a stream; closing the iterator closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_ANSWER_WAIT_S)
        connection.request("POST", f"{self.prefix}/{path}", json.dumps(body),
                           {"Content-Type": "application/json"})
        answer = connection.getresponse()
        try:
            for line in answer:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])
        finally:
            answer.close()
            connection.close()
