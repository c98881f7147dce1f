"""Builds that are interrupted, damaged, or wanted by two at once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from exl_loader.backends.build import lock as lock_module
from exl_loader.backends.build import store
from exl_loader.backends.build.build import build
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
    assert list(kernel_cache.glob("*.partial")), "the victim was killed too late to prove anything"
    assert works(build(cpu_spec(kernel_sources)))
    assert not list(kernel_cache.glob("*.partial*"))


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
def test_lock_of_a_dead_process_does_not_matter(kernel_cache, kernel_sources):
    spec = cpu_spec(kernel_sources)
    kernel_cache.mkdir(parents=True, mode=0o700)
    (kernel_cache / f"{spec.directory_name}.lock").write_text("")
    record = {"pid": 2**22 + 1, "host": "elsewhere", "beat": 3}
    (kernel_cache / f"{spec.directory_name}.holder").write_text(json.dumps(record))
    assert works(build(spec))


@needs_compiler
def test_silent_holder_is_not_waited_for(kernel_cache, kernel_sources, monkeypatch):
    from filelock import FileLock

    spec = cpu_spec(kernel_sources)
    kernel_cache.mkdir(parents=True, mode=0o700)
    record = {"pid": 12345, "host": "elsewhere", "beat": 3}
    (kernel_cache / f"{spec.directory_name}.holder").write_text(json.dumps(record))
    code = (
        "import sys, time\nfrom filelock import FileLock\n"
        "lock = FileLock(sys.argv[1])\nlock.acquire()\n"
        "print('held', flush=True)\ntime.sleep(60)\n"
    )
    path = str(kernel_cache / f"{spec.directory_name}.lock")
    holder = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        monkeypatch.setattr(lock_module, "STALE_S", 0.5)
        progress = Recorder()
        assert works(build(spec, progress))
        assert "process 12345 on elsewhere" in progress.calls[0][1]
    finally:
        holder.kill()
        holder.communicate()
    with FileLock(path, timeout=5):
        assert find_partials(kernel_cache) == []


def test_living_holder_is_waited_for(tmp_path, monkeypatch):
    # A busy machine may stop the holder's heartbeat for a second.
    monkeypatch.setattr(lock_module, "STALE_S", 3.0)
    monkeypatch.setattr(lock_module, "HEARTBEAT_S", 0.05)
    path = tmp_path / "cpu-1.lock"
    held, events = threading.Event(), []

    def hold():
        with lock_module.build_lock(path, lambda: False, NullProgress()):
            held.set()
            time.sleep(4.0)
            events.append("released")

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(300)
    progress = Recorder()
    with lock_module.build_lock(path, lambda: False, progress) as locked:
        events.append("acquired")
    holder.join()
    assert locked and events == ["released", "acquired"]
    assert f"process {os.getpid()}," in progress.calls[0][1]
    assert progress.calls[-1][0] == "finish"
    assert not path.with_suffix(".holder").exists()




@needs_compiler
@pytest.mark.parametrize("ending", ["SIGTERM", "SIGHUP", "SIGKILL", "Ctrl-C"])
def test_compilers_end_with_the_process_that_wanted_them(
    kernel_cache, kernel_sources, hanging_compiler, monkeypatch, ending
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
        # Its pipes are nobody's but its own: what it leaves behind must not hold them.
        _, said = victim.communicate(timeout=300)
        assert victim.returncode == -getattr(signal, ending.replace("Ctrl-C", "SIGINT"))
        pids = [int(pid) for pid in running.read_text().split()]
        assert len(pids) >= 2
        wait_for(lambda: not any(map(is_running, pids)), 300)
    finally:
        victim.kill()
    if ending == "Ctrl-C":
        assert said.rstrip().endswith("KeyboardInterrupt") and "supervise" not in said
        assert find_partials(kernel_cache) == []
    hang.unlink()
    # A build that waits for a lock that nobody gives back would hang here.
    monkeypatch.setattr(lock_module, "STALE_S", float("inf"))
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
def test_a_compiler_that_outlived_its_build_writes_to_nothing(kernel_cache, kernel_sources):
    spec = cpu_spec(kernel_sources)
    work = kernel_cache / f"{spec.directory_name}.partial" / "work"
    work.mkdir(parents=True)
    kernel_cache.chmod(0o700)
    code = (
        "import pathlib\nprint('there', flush=True)\nnumber = 0\n"
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
        assert orphan.stdout.readline() == "there\n"
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
