"""A test that hangs is ended, and its traceback shown; another run with shorter limits."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pytest_timeout") is None or sys.platform != "linux",
    reason="needs pytest-timeout, and the size of a mutex on Linux",
)

# The first test of a process imports what fixtures need, which may take longer than the short
# limit on a busy machine.
HANGING = """
import ctypes, threading
import pytest

@pytest.mark.timeout(60)
def test_that_comes_first():
    pass

def test_that_hangs_in_python():
    threading.Event().wait()

def test_that_hangs_in_compiled_code():
    # Locks a mutex twice, with the interpreter's own lock in hand.
    libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)

@pytest.mark.timeout(60)
def test_that_comes_later():
    pass
"""

SHORT = """
import conftest
conftest.GRACE_S = 1
"""

LIMIT_S = 2


@pytest.fixture
def run(tmp_path):
    """Run pytest on those tests; a hang that nothing ends is an error here."""
    (tmp_path / "test_hanging.py").write_text(HANGING)
    (tmp_path / "short_grace.py").write_text(SHORT)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\ntimeout = {LIMIT_S}\n")
    # pytest's own variables are those of the run that this test belongs to.
    environ = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    environ["PYTHONPATH"] = os.pathsep.join(map(str, (tmp_path, TESTS, TESTS.parent)))

    def call(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "short_grace",
             "-p", "no:cacheprovider", "-p", "no:hypothesispytest", *arguments],
            cwd=tmp_path, capture_output=True, text=True, env=environ, timeout=300,
        )

    return call


@pytest.mark.exhaustive
def test_a_hang_ends_its_test_and_one_in_compiled_code_its_process(run):
    result = run("-v")
    assert result.returncode == 1, result.stdout
    assert "test_that_hangs_in_python FAILED" in result.stdout
    # The process ended with a traceback of the hanging test; no test ran after it.
    assert "Timeout (0:00:03)!" in result.stderr
    where = result.stderr.partition("most recent call first")[2]
    assert "in test_that_hangs_in_compiled_code" in where
    assert "test_that_comes_later" not in result.stdout


@pytest.mark.slow
def test_a_process_that_was_ended_is_replaced_and_the_run_goes_on(run):
    pytest.importorskip("xdist")
    result = run("-n", "1", "-v")
    assert result.returncode == 1, result.stdout
    assert "Failed: Timeout" in result.stdout and "threading.Event().wait()" in result.stdout
    assert "crashed while running 'test_hanging.py::test_that_hangs_in_compiled_code'" in (
        result.stdout)
    assert "in test_that_hangs_in_compiled_code" in result.stderr + result.stdout
    assert "2 failed, 2 passed" in result.stdout
