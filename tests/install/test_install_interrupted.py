"""Ctrl-C and SIGTERM while install.py sets up, compiles, or serves a page that writes.

Each ends it within seconds, without a traceback, with everything that it had started.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from extension.install.environment import REQUIREMENTS
from support import REPO, wait_for
from support.builds import default_signals, is_running, needs_compiler
from support.tiny import write_tiny_model
from support.webui_double import write_webui
from support.webui_page import CHROMIUM

pytestmark = pytest.mark.skipif(os.name == "nt", reason="a console's Ctrl-C goes to all of it")

# A busy machine is slow to wake a process; a process that hangs would do so for ten minutes.
END_S = 15.0

# Like pip it takes a while to clean up, and then fails.
PIP = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
try:
    (folder / "pip-runs").touch()
    time.sleep(600)
except KeyboardInterrupt:
    time.sleep(0.6)
    (folder / "pip-ended").touch()
    sys.exit(1)
"""


class Ended:
    """How a process and everything it started in its process group ended."""

    def __init__(self, process: subprocess.Popen[str], how: str) -> None:
        if how == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.terminate()
        # Its pipes close when the last process that has them ends.
        self.stdout, self.stderr = process.communicate(timeout=END_S)
        self.code = process.returncode
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
        assert "Traceback" not in self.stderr, self.stderr


def start(*command: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=default_signals,
    )


@pytest.fixture
def started():
    """Return `start`; end processes that are still running."""
    processes = []

    def run(*command):
        processes.append(start(*command))
        return processes[-1]

    yield run
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path):
    """A repository whose `.venv/` has this Python, the pip above, and nothing to generate."""
    root = tmp_path / "checkout"
    root.mkdir()
    for name in ("exl_loader", "extension", "csrc"):
        (root / name).symlink_to(REPO / name)
    shutil.copy(REPO / "pyproject.toml", root)
    shutil.copytree(REPO / "tools", root / "tools")
    shutil.copy(REPO / "install.py", root)
    version = "{}.{}".format(*sys.version_info[:2])
    (root / "pip.py").write_text(PIP)
    write_program(
        root / ".venv" / "bin" / "python",
        'case "$*" in\n'
        f"  *'import sys, pip'*) echo {version} ;;\n"
        '  "-m pip index "*) echo 2.13.0+cpu ;;\n'
        f'  "-m pip install "*) exec "{sys.executable}" "{root}/pip.py" "{root}" ;;\n'
        '  "-m exl_loader generate --stats --memory --max-new-tokens 200") echo a text ;;\n'
        f'  *) exec "{sys.executable}" "$@" ;;\n'
        "esac",
    )
    return root


def complete(root: Path) -> Path:
    """Write the stamp of a complete environment; return install.py."""
    script = root / "install.py"
    spec = importlib.util.spec_from_file_location("interrupted_install", script)
    install = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(install)
    install.STAMP.write_text(json.dumps({"key": install.environment_key(), "level": install.PAGE}))
    return script


# ---- Setting up ------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "code"), [("Ctrl-C", 130), ("SIGTERM", 143)])
def test_while_pip_installs(checkout, started, how, code):
    process = started(sys.executable, checkout / "install.py", "--demo")
    wait_for((checkout / "pip-runs").exists)
    ended = Ended(process, how)
    assert ended.code == code
    # pip had time to clean up, and the next run will not use this environment.
    assert (checkout / "pip-ended").exists()
    assert (checkout / ".venv" / "exl_loader-unfinished").exists()
    if how == "Ctrl-C":
        assert ended.stderr.endswith("interrupted; run the same command again to continue\n")


def test_a_pip_that_does_not_end_is_killed_after_one_wait(checkout, started):
    deaf = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    (checkout / "pip.py").write_text(deaf + PIP)
    process = started(sys.executable, checkout / "install.py", "--env")
    wait_for((checkout / "pip-runs").exists)
    os.killpg(process.pid, signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    assert Ended(process, "Ctrl-C").code == 130


@pytest.mark.parametrize(("how", "code"), [("Ctrl-C", 130), ("SIGTERM", 143)])
def test_while_pip_installs_into_a_web_ui(tmp_path, started, how, code):
    root = write_webui(tmp_path / "webui")
    site = tmp_path / "site"
    site.mkdir()
    (tmp_path / "pip.py").write_text(PIP)
    packages = {name: "99" for name in (*REQUIREMENTS, "llguidance") if name != "ninja"}
    answer = json.dumps({
        "version": [3, 11, 9], "executable": str(tmp_path / "python"), "site": str(site),
        "packages": packages,
    })
    python = write_program(
        tmp_path / "python",
        'case "$*" in\n'
        f'  "-m pip install "*) exec "{sys.executable}" "{tmp_path}/pip.py" "{tmp_path}" ;;\n'
        f"  *) echo '{answer}' ;;\n"
        "esac",
    )
    process = started(sys.executable, REPO / "install.py", "--webui", root, "--python", python)
    wait_for((tmp_path / "pip-runs").exists)
    ended = Ended(process, how)
    assert ended.code == code and (tmp_path / "pip-ended").exists()
    assert list(site.iterdir()) == [] and not (root / "user_data" / "extensions").exists()


# ---- Running ---------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [
    ("Ctrl-C", 130), pytest.param("SIGTERM", 143, marks=pytest.mark.exhaustive),
])
def test_while_kernels_are_compiled_for_a_text(
    checkout, started, kernel_cache, hanging_compiler, how, code
):
    model = write_tiny_model(checkout / "model")
    process = started(sys.executable, complete(checkout), "--terminal", model)
    wait_for(hanging_compiler[1].read_text, 120)
    assert Ended(process, how).code == code
    assert_compilers_end(hanging_compiler[1])


def assert_compilers_end(running: Path) -> None:
    pids = [int(pid) for pid in running.read_text().split()]
    wait_for(lambda: not any(map(is_running, pids)), END_S)


def read_port(process: subprocess.Popen[str]) -> int:
    """Wait for the page's address, with a text before it; return its port."""
    assert process.stdout.readline() == "a text\n"
    line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
    assert found, line + process.stderr.read()
    return int(found[1])


def assert_port_is_free(port: int) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)


BOTH = [("Ctrl-C", 0), pytest.param("SIGTERM", 143, marks=pytest.mark.exhaustive)]


@needs_compiler
@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(("how", "code"), BOTH)
def test_while_kernels_are_compiled_for_a_page(
    checkout, started, kernel_cache, hanging_compiler, how, code
):
    pytest.importorskip("gradio")
    model = write_tiny_model(checkout / "model")
    process = started(sys.executable, complete(checkout), "--demo", model, "--no-browser")
    port = read_port(process)
    wait_for(hanging_compiler[1].read_text, 120)
    assert Ended(process, how).code == code
    assert_compilers_end(hanging_compiler[1])
    assert_port_is_free(port)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize(("how", "code"), BOTH)
def test_while_a_page_writes(checkout, started, browser, monkeypatch, how, code):
    pytest.importorskip("gradio")
    from support.page_server import Page, write_endless_model

    monkeypatch.setenv("EXL_LOADER_REFERENCE", "1")
    model = write_endless_model(checkout / "endless")
    process = started(sys.executable, complete(checkout), "--demo", model, "--no-browser")
    port = read_port(process)
    page = Page(browser, f"http://127.0.0.1:{port}/")
    try:
        page.expect_gauge("Measured equals reserved, to the byte")
        page.click("#exl_write")
        page.expect_text("#exl_stats", "tokens/s")
        assert Ended(process, how).code == code
    finally:
        page.page.close()
    assert_port_is_free(port)
