"""Building kernels: keys, healing, concurrency, words of the compiler. Small sources only."""

import ctypes
import dataclasses
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from builds import Recorder, find_partials

from exl_loader import kernels
from exl_loader.errors import InvalidSettings, KernelBuildError
from exl_loader.kernels import lock as lock_module
from exl_loader.kernels import store, toolchain
from exl_loader.kernels.build import TASK, build, ninja_file
from exl_loader.kernels.spec import BuildSpec, compile_flags, cpu_spec
from exl_loader.progress import NullProgress

REPO = Path(__file__).resolve().parents[1]

needs_compiler = pytest.mark.skipif(
    os.name == "nt" or toolchain.find_compiler() is None, reason="needs g++ or clang++"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, for this process and its children."""
    monkeypatch.setenv("EXL_LOADER_CACHE_DIR", str(tmp_path / "a cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("EXL_LOADER_MARCH", raising=False)
    monkeypatch.delenv("EXL_LOADER_REFERENCE", raising=False)
    return tmp_path / "a cache" / "kernels"


@pytest.fixture
def sources(tmp_path):
    """Two translation units and a header, in a folder whose name needs quoting."""
    root = tmp_path / "the $sources: (here)"
    (root / "cpu").mkdir(parents=True)
    (root / "shared.h").write_text("#define ANSWER 42\n")
    (root / "cpu" / "one.cpp").write_text(
        '#include "shared.h"\nextern "C" int exl_answer() { return ANSWER; }\n'
    )
    (root / "cpu" / "two.cpp").write_text('extern "C" int exl_double(int x) { return 2 * x; }\n')
    return root


@pytest.fixture
def counting_compiler(tmp_path, monkeypatch):
    """A compiler that writes down what it compiles, slowly enough to be interrupted."""
    log = tmp_path / "compiled.log"
    script = tmp_path / "counting g++"
    real = toolchain.find_compiler().command[0]
    script.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *--version*) ;; *-c*) echo "$*" >> "{log}"; sleep 0.5 ;; esac\n'
        f'exec "{real}" "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    log.touch()
    return log


def spawn_build(sources):
    code = (
        "import sys, pathlib\n"
        "from exl_loader.kernels.build import build\n"
        "from exl_loader.kernels.spec import cpu_spec\n"
        "print(build(cpu_spec(pathlib.Path(sys.argv[1]))))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(sources)], cwd=REPO, stdout=subprocess.PIPE, text=True
    )


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def works(library):
    opened = ctypes.CDLL(str(library))
    return opened.exl_answer() == 42 and opened.exl_double(21) == 42


@needs_compiler
def test_builds_opens_and_reports_units(cache, sources):
    progress = Recorder()
    library = build(cpu_spec(sources), progress)
    assert works(library)
    assert library.parent.parent == cache
    assert progress.calls[0] == ("start", TASK, 3, "units")
    assert sum(call[2] for call in progress.calls if call[0] == "advance") == 3
    assert progress.calls[-1] == ("finish", TASK)
    assert sorted(path.name for path in library.parent.iterdir()) == [
        store.MARKER,
        library.name,
    ]


@needs_compiler
def test_second_build_compiles_nothing(cache, sources, counting_compiler):
    first = build(cpu_spec(sources))
    compiled = counting_compiler.read_text()
    assert build(cpu_spec(sources)) == first
    assert counting_compiler.read_text() == compiled and compiled.count("\n") == 2


@needs_compiler
def test_cache_folder_is_private(cache, sources):
    library = build(cpu_spec(sources))
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    cache.chmod(0o777)
    assert build(cpu_spec(sources)) == library
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


@needs_compiler
def test_warm_build_is_quick():
    build(cpu_spec(), NullProgress())
    # Best of several: the limit is on the work, not on what else the machine does meanwhile.
    times = []
    for _ in range(7):
        began = time.perf_counter()
        build(cpu_spec(), NullProgress())
        times.append(time.perf_counter() - began)
    assert min(times) < 0.050, times


@needs_compiler
@pytest.mark.skipif(sys.platform == "win32", reason="needs gcc's options")
@pytest.mark.parametrize("source", cpu_spec().sources if toolchain.find_compiler() else ())
def test_no_source_has_warnings(source):
    spec = cpu_spec()
    command = [*spec.compiler.command, *spec.flags, "-Werror", "-fsyntax-only", f"-I{spec.root}"]
    assert subprocess.run([*command, str(spec.root / source)]).returncode == 0


@needs_compiler
@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform == "win32", reason="counts the time of child processes")
def test_project_kernels_compile_in_time_and_without_optimisers_warnings(cache):
    import resource

    spec = cpu_spec()
    strict = dataclasses.replace(spec, flags=(*spec.flags, "-Werror"))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    build(strict)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # 30 s on two cores, in time of the compiler: other load does not count.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 60


def test_build_path_does_not_import_torch():
    code = (
        "import sys, exl_loader.kernels, exl_loader.kernels.build, exl_loader.kernels.spec\n"
        "exl_loader.kernels.spec.cpu_spec()\n"
        "assert 'torch' not in sys.modules and 'filelock' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


def make_spec(root, **changes):
    fields = {
        "name": "cpu",
        "root": root,
        "sources": ("cpu/one.cpp", "cpu/two.cpp"),
        "headers": ("shared.h",),
        "compiler": toolchain.Compiler(("g++",), "gcc", "g++ 12.2.0"),
        "flags": ("-O3", "-march=native"),
        "link_flags": ("-shared",),
        "cpu_features": ("x86_64", "avx2"),
    }
    return BuildSpec(**{**fields, **changes})


CHANGES = {
    "name": {"name": "cuda"},
    "a source less": {"sources": ("cpu/one.cpp",)},
    "a source that became a header": {
        "sources": ("cpu/one.cpp",),
        "headers": ("cpu/two.cpp", "shared.h"),
    },
    "a header less": {"headers": ()},
    "compiler version": {"compiler": toolchain.Compiler(("g++",), "gcc", "g++ 13.1.0")},
    "compiler kind": {"compiler": toolchain.Compiler(("g++",), "clang", "g++ 12.2.0")},
    "flags": {"flags": ("-O2", "-march=native")},
    "flags run together": {"flags": ("-O3 -march=native",)},
    "a link flag that became a flag": {
        "flags": ("-O3", "-march=native", "-shared"),
        "link_flags": (),
    },
    "link flags": {"link_flags": ("-shared", "-s")},
    "cpu features": {"cpu_features": ("x86_64", "avx2", "avx512f")},
    "include path": {"include_dirs": (".", "cpu")},
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_argument_changes_the_key(sources, change):
    base = make_spec(sources)
    assert make_spec(sources).key == base.key
    assert make_spec(sources, **CHANGES[change]).key != base.key


def test_every_field_is_covered_by_a_change():
    fields = {field.name for field in dataclasses.fields(BuildSpec)}
    changed = {name for change in CHANGES.values() for name in change}
    # Where the sources lie cannot change the binary; what they say does (next test).
    assert fields - changed == {"root"}


@pytest.mark.parametrize("name", ["shared.h", "cpu/one.cpp"])
def test_contents_of_files_change_the_key(sources, name):
    before = make_spec(sources).key
    path = sources / name
    path.write_text(path.read_text() + "// more\n")
    assert make_spec(sources).key != before


def test_same_sources_elsewhere_have_the_same_key(sources, tmp_path):
    before = make_spec(sources).key
    moved = sources.rename(tmp_path / "moved")
    assert make_spec(moved).key == before


def test_march_overrides_native(monkeypatch, sources):
    compiler = toolchain.Compiler(("g++",), "gcc", "g++ 12.2.0")
    assert "-march=native" in compile_flags(compiler, ("x86_64", "avx2"))
    assert "-march=x86-64-v3" in compile_flags(compiler, ("x86_64",), "x86-64-v3")
    assert "-mcpu=native" in compile_flags(compiler, ("arm64",))
    msvc = toolchain.Compiler(("cl",), "msvc", "MSVC 14.44")
    assert "/arch:AVX2" in compile_flags(msvc, ("amd64", "avx", "avx2"))
    assert not any("fast-math" in flag for flag in compile_flags(compiler, ("x86_64",)))


def test_missing_source_is_named(sources):
    with pytest.raises(KernelBuildError, match="three.cpp"):
        assert make_spec(sources, sources=("cpu/three.cpp",)).key


def test_ninja_file_quotes_for_ninja(sources):
    text = ninja_file(make_spec(sources))
    assert "the$ $$sources$:$ (here)/cpu/one.cpp" in text


@needs_compiler
def test_two_processes_build_once(cache, sources, counting_compiler):
    processes = [spawn_build(sources) for _ in range(2)]
    answers = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert answers[0] == answers[1] and works(answers[0])
    assert counting_compiler.read_text().count("\n") == 2


@needs_compiler
def test_killed_build_heals(cache, sources, counting_compiler):
    victim = spawn_build(sources)
    wait_for(lambda: counting_compiler.read_text())
    victim.send_signal(signal.SIGKILL)
    victim.communicate(timeout=30)
    assert list(cache.glob("*.partial")), "the victim was killed too late to prove anything"
    assert works(build(cpu_spec(sources)))
    assert not list(cache.glob("*.partial*"))


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone", "no marker", "odd marker"])
def test_damaged_build_heals(cache, sources, damage):
    library = build(cpu_spec(sources))
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
    assert build(cpu_spec(sources)) == library
    assert library.read_bytes() == data


@needs_compiler
def test_lock_of_a_dead_process_does_not_matter(cache, sources):
    spec = cpu_spec(sources)
    cache.mkdir(parents=True, mode=0o700)
    (cache / f"{spec.directory_name}.lock").write_text("")
    record = {"pid": 2**22 + 1, "host": "elsewhere", "beat": 3}
    (cache / f"{spec.directory_name}.holder").write_text(json.dumps(record))
    assert works(build(spec))


@needs_compiler
def test_silent_holder_is_not_waited_for(cache, sources, monkeypatch):
    from filelock import FileLock

    spec = cpu_spec(sources)
    cache.mkdir(parents=True, mode=0o700)
    record = {"pid": 12345, "host": "elsewhere", "beat": 3}
    (cache / f"{spec.directory_name}.holder").write_text(json.dumps(record))
    code = (
        "import sys, time\nfrom filelock import FileLock\n"
        "lock = FileLock(sys.argv[1])\nlock.acquire()\n"
        "print('held', flush=True)\ntime.sleep(60)\n"
    )
    path = str(cache / f"{spec.directory_name}.lock")
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
        assert find_partials(cache) == []


def test_living_holder_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "STALE_S", 1.0)
    monkeypatch.setattr(lock_module, "HEARTBEAT_S", 0.05)
    path = tmp_path / "cpu-1.lock"
    held, events = threading.Event(), []

    def hold():
        with lock_module.build_lock(path, lambda: False, NullProgress()):
            held.set()
            time.sleep(2.0)
            events.append("released")

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(30)
    progress = Recorder()
    with lock_module.build_lock(path, lambda: False, progress) as locked:
        events.append("acquired")
    holder.join()
    assert locked and events == ["released", "acquired"]
    assert f"process {os.getpid()}," in progress.calls[0][1]
    assert progress.calls[-1][0] == "finish"
    assert not path.with_suffix(".holder").exists()


@needs_compiler
def test_compile_error_shows_the_compilers_words(cache, sources):
    (sources / "cpu" / "two.cpp").write_text("int broken( { return undeclared_thing; }\n")
    with pytest.raises(KernelBuildError) as caught:
        build(cpu_spec(sources))
    assert "two.cpp" in str(caught.value) and "error" in str(caught.value)
    assert "undeclared_thing" in caught.value.details
    assert "\n" not in str(caught.value)
    assert find_partials(cache) == []


def test_unwritable_cache_is_an_error_with_a_remedy(tmp_path, sources, monkeypatch):
    (tmp_path / "file").write_text("")
    environ = {"EXL_LOADER_CACHE_DIR": str(tmp_path / "file")}
    with pytest.raises(KernelBuildError, match="Set EXL_LOADER_CACHE_DIR"):
        store.writable_dir(environ)


def test_falls_back_to_temporary_files_where_home_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "home").write_text("a file, so that nothing can be created in it")
    monkeypatch.setattr(store.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.setattr(
        "platformdirs.user_cache_path", lambda *args, **kwargs: tmp_path / "home" / "exl_loader"
    )
    directory = store.writable_dir({})
    assert directory.parent == tmp_path / "tmp"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_link_in_place_of_the_folder_is_not_trusted(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernels").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KernelBuildError, match="belongs to somebody else"):
        store.writable_dir({"EXL_LOADER_CACHE_DIR": str(tmp_path / "cache")})


@needs_compiler
def test_full_disk_is_an_error_with_a_remedy(cache, sources, monkeypatch):
    def full(directory, library_name):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("exl_loader.kernels.build.seal", full)
    with pytest.raises(KernelBuildError, match="No space left on device.*Free some space"):
        build(cpu_spec(sources))
    assert find_partials(cache) == []


@needs_compiler
def test_a_disk_that_fills_while_the_compiler_writes(cache, sources, tmp_path, monkeypatch):
    script, real = tmp_path / "g++", toolchain.find_compiler().command[0]
    # As binutils say it.
    words = "/tmp/cc.s: Fatal error: can't write 8 bytes to two.o: 'No space left on device'"
    script.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *two.cpp*) echo "{words}"; exit 1 ;; esac\n'
        f'exec "{real}" "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(KernelBuildError, match="No space left.*Free some space") as caught:
        build(cpu_spec(sources))
    assert words in caught.value.details and "EXL_LOADER_REFERENCE" not in str(caught.value)
    assert find_partials(cache) == []


def test_no_compiler_means_reference_and_one_warning(cache, monkeypatch, caplog):
    monkeypatch.setattr("exl_loader.kernels.spec.find_compiler", lambda environ: None)
    monkeypatch.setattr(kernels, "_warned", False)
    with caplog.at_level(logging.WARNING, logger="exl_loader"):
        assert kernels.get_ops().name == "reference"
        assert kernels.get_ops().name == "reference"
    assert len(caplog.records) == 1
    assert toolchain.compiler_remedy() in caplog.text


def test_empty_path_has_no_compiler(tmp_path):
    if sys.platform == "win32":
        pytest.skip("vswhere does not look at the PATH")
    assert toolchain.find_compiler({"PATH": str(tmp_path)}) is None
    with pytest.raises(KernelBuildError, match="CXX is set to 'no-such-compiler'"):
        toolchain.find_compiler({"PATH": str(tmp_path), "CXX": "no-such-compiler"})


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ({"ID": "debian"}, "sudo apt install g++"),
        ({"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, "sudo apt install g++"),
        ({"ID": "rocky", "ID_LIKE": "rhel centos fedora"}, "sudo dnf install gcc-c++"),
        ({"ID": "unheard-of"}, "g++ or gcc-c++"),
    ],
)
def test_remedy_names_the_package(monkeypatch, release, command):
    monkeypatch.setattr(toolchain.sys, "platform", "linux")
    monkeypatch.setattr(toolchain.platform, "freedesktop_os_release", lambda: release)
    assert command in toolchain.compiler_remedy()


def test_reference_can_be_forced(cache, monkeypatch):
    assert kernels.get_ops(force_reference=True).name == "reference"
    monkeypatch.setenv("EXL_LOADER_REFERENCE", "1")
    assert kernels.get_ops().name == "reference"
    assert not cache.exists()


def test_unknown_device_is_refused():
    with pytest.raises(InvalidSettings, match="abacus"):
        kernels.get_ops("abacus")


@needs_compiler
def test_library_that_does_not_open_is_built_anew(cache, sources, monkeypatch):
    monkeypatch.setattr("exl_loader.kernels.spec.csrc_dir", lambda: sources)
    spec = cpu_spec(sources)
    library = build(spec)
    good = library.read_bytes()
    library.write_bytes(b"not a library, but sealed as one")
    store.seal(library.parent, library.name)
    assert kernels.open_library().exl_answer() == 42
    assert library.read_bytes() == good
