"""Builds that are interrupted, damaged, or requested by two processes at once."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from exl_loader.backends.build import store
from exl_loader.backends.build.build import WAIT_TASK, build
from exl_loader.backends.build.spec import cpu_spec
from exl_loader.utils.errors import KernelBuildError
from exl_loader.utils.progress import NullProgress
from support.builds import (
    Recorder,
    default_signals,
    find_partials,
    is_running,
    needs_compiler,
    spawn_build,
    wait_for,
    works,
)


@needs_compiler
def test_two_processes_build_once(kernel_cache, kernel_sources, counting_compiler):
    processes = [spawn_build(kernel_sources) for _ in range(2)]
    answers = [process.communicate(timeout=300)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert answers[0] == answers[1] and works(answers[0])
    assert counting_compiler.read_text().count("\n") == 2


@needs_compiler
def test_killed_build_heals(kernel_cache, kernel_sources, counting_compiler):
    victim = spawn_build(kernel_sources)
    wait_for(lambda: counting_compiler.read_text())
    victim.send_signal(signal.SIGKILL)
    victim.communicate(timeout=300)
    assert find_partials(kernel_cache), "the victim was killed too late to prove anything"
    assert works(build(cpu_spec(kernel_sources)))
    assert find_partials(kernel_cache) == []


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone", "no marker", "odd marker"])
def test_damaged_build_heals(kernel_cache, kernel_sources, damage):
    library = build(cpu_spec(kernel_sources))
    data = library.read_bytes()
    if damage == "truncated":
        library.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        library.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    elif damage == "gone":
        library.unlink()
    elif damage == "no marker":
        (library.parent / store.MARKER).unlink()
    else:
        (library.parent / store.MARKER).write_text("[1]")
    assert build(cpu_spec(kernel_sources)) == library
    assert library.read_bytes() == data


@needs_compiler
def test_the_lock_of_a_running_process_is_waited_for(kernel_cache, kernel_sources):
    spec = cpu_spec(kernel_sources)
    kernel_cache.mkdir(parents=True, mode=0o700)
    code = (
        "import sys\nfrom filelock import FileLock\n"
        "with FileLock(sys.argv[1]):\n"
        "    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    path = str(kernel_cache / f"{spec.directory_name}.lock")
    holder = subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    waited = threading.Event()

    class Waiting(Recorder):
        def start(self, task, total, unit):
            super().start(task, total, unit)
            if task == WAIT_TASK:
                waited.set()

    progress = Waiting()
    built = []
    builder = threading.Thread(target=lambda: built.append(build(spec, progress)))
    try:
        assert holder.stdout.readline() == b"held\n"
        builder.start()
        assert waited.wait(300)
        assert not list(kernel_cache.glob("*.partial-*")) and not built
    finally:
        # The system frees the lock of a process that is killed.
        holder.kill()
        holder.communicate()
    builder.join(300)
    assert works(built[0])
    assert progress.calls[0] == ("start", WAIT_TASK, None, "s")
    assert ("finish", WAIT_TASK) in progress.calls


@needs_compiler
@pytest.mark.parametrize("ending", ["SIGTERM", "SIGHUP", "SIGKILL", "Ctrl-C"])
def test_compilers_end_with_the_process_that_started_the_build(
    kernel_cache, kernel_sources, hanging_compiler, ending
):
    hang, running = hanging_compiler
    victim = spawn_build(
        kernel_sources, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=default_signals,
    )
    try:
        wait_for(running.read_text)
        if ending == "Ctrl-C":
            os.killpg(victim.pid, signal.SIGINT)
        else:
            victim.send_signal(getattr(signal, ending))
        # Returns when the pipes are closed, so processes that it leaves must not hold them.
        _, stderr = victim.communicate(timeout=300)
        assert victim.returncode == -getattr(signal, ending.replace("Ctrl-C", "SIGINT"))
        pids = [int(pid) for pid in running.read_text().split()]
        assert len(pids) >= 2
        wait_for(lambda: not any(map(is_running, pids)), 300)
    finally:
        victim.kill()
    if ending == "Ctrl-C":
        assert stderr.rstrip().endswith("KeyboardInterrupt") and "supervise" not in stderr
        assert find_partials(kernel_cache) == []
    hang.unlink()
    assert works(build(cpu_spec(kernel_sources)))
    assert find_partials(kernel_cache) == []


@needs_compiler
def test_compilers_end_when_progress_stops_the_build(
    kernel_cache, kernel_sources, hanging_compiler, monkeypatch
):
    _, running = hanging_compiler
    # The first source compiles, so that something is advanced, and the second hangs.
    script = os.environ["CXX"]
    text = Path(script).read_text()
    Path(script).write_text(text.replace("*-c*)", "*two.cpp*)"))

    class Stopped(NullProgress):
        def advance(self, task, n=1):
            wait_for(running.read_text)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(cpu_spec(kernel_sources), Stopped())
    pids = [int(pid) for pid in running.read_text().split()]
    wait_for(lambda: not any(map(is_running, pids)), 300)
    assert find_partials(kernel_cache) == []


@needs_compiler
def test_a_compiler_that_outlived_its_build_changes_no_other_build(kernel_cache, kernel_sources):
    spec = cpu_spec(kernel_sources)
    work = kernel_cache / f"{store.private_prefix(kernel_cache / spec.directory_name)}1" / "work"
    work.mkdir(parents=True)
    kernel_cache.chmod(0o700)
    code = (
        "import pathlib\nprint('running', flush=True)\nnumber = 0\n"
        "try:\n"
        "    while True:\n"
        "        number += 1\n"
        "        pathlib.Path(f'cpu_one.cpp.o{number % 100}').write_text('stale')\n"
        "except FileNotFoundError:\n    print('gone')\n"
    )
    orphan = subprocess.Popen(
        [sys.executable, "-c", code], cwd=work, stdout=subprocess.PIPE, text=True
    )
    try:
        assert orphan.stdout.readline() == "running\n"
        library = build(spec)
        assert works(library) and len(list(library.parent.iterdir())) == 2
    finally:
        orphan.kill()
        orphan.communicate()


@needs_compiler
def test_ninja_that_does_not_start_is_an_error_with_a_remedy(
    kernel_cache, kernel_sources, tmp_path, monkeypatch
):
    (tmp_path / "ninja").write_text("no program")
    monkeypatch.setattr(
        "exl_loader.backends.build.build.find_ninja", lambda: str(tmp_path / "ninja")
    )
    with pytest.raises(KernelBuildError, match="^ninja: Permission denied.*reinstall ninja"):
        build(cpu_spec(kernel_sources))
    assert find_partials(kernel_cache) == []
