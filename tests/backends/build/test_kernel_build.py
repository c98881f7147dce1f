"""Building kernels: keys, progress, errors of the compiler, finding it. Small sources only."""

import dataclasses
import logging
import os
import signal
import subprocess
import sys

import pytest

from exl_loader.backends import get_ops
from exl_loader.backends.build import store, toolchain
from exl_loader.backends.build.build import KEPT_BYTES, TASK, BoundedOutput, build, ninja_file
from exl_loader.backends.build.spec import BuildSpec, compile_flags, cpu_spec
from exl_loader.backends.cpu.open import open_library
from exl_loader.utils.errors import InvalidSettings, KernelBuildError
from exl_loader.utils.progress import NullProgress
from exl_loader.utils.system import processes
from support import run_python
from support.builds import Recorder, find_partials, needs_compiler, works, write_compiler
from support.counting import count


@needs_compiler
def test_builds_opens_and_reports_units(kernel_cache, kernel_sources):
    progress = Recorder()
    library = build(cpu_spec(kernel_sources), progress)
    assert works(library)
    assert library.parent.parent == kernel_cache
    assert progress.calls[0] == ("start", TASK, 3, "units")
    assert sum(call[2] for call in progress.calls if call[0] == "advance") == 3
    assert progress.calls[-1] == ("finish", TASK)
    assert sorted(path.name for path in library.parent.iterdir()) == [
        store.MARKER,
        library.name,
    ]


@needs_compiler
def test_second_build_compiles_nothing(kernel_cache, kernel_sources, counting_compiler):
    first = build(cpu_spec(kernel_sources))
    compiled = counting_compiler.read_text()
    assert build(cpu_spec(kernel_sources)) == first
    assert counting_compiler.read_text() == compiled and compiled.count("\n") == 2


@needs_compiler
def test_warm_build_only_asks_for_the_version_and_needs_few_calls(monkeypatch):
    build(cpu_spec(), NullProgress())
    started = []
    real_popen = subprocess.Popen

    def popen(command, *args, **options):
        started.append(list(command))
        return real_popen(command, *args, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    # 3,950 when this was written; benchmarks/cpu/planning.py has its time.
    assert count(lambda: build(cpu_spec(), NullProgress())).calls < 10_000
    assert [command[-1] for command in started] in ([], ["--version"])


@needs_compiler
@pytest.mark.skipif(sys.platform == "win32", reason="needs gcc's options")
@pytest.mark.parametrize("source", cpu_spec().sources if toolchain.find_compiler() else ())
def test_no_source_has_warnings(source):
    spec = cpu_spec()
    command = [*spec.compiler.command, *spec.flags, "-Werror", "-fsyntax-only", f"-I{spec.root}"]
    assert subprocess.run([*command, str(spec.root / source)]).returncode == 0


@needs_compiler
@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform == "win32", reason="needs gcc's options")
def test_project_kernels_compile_without_optimisers_warnings(kernel_cache):
    spec = cpu_spec()
    strict = dataclasses.replace(spec, flags=(*spec.flags, "-Werror"))
    assert build(strict).exists()


def test_build_path_does_not_import_torch():
    code = (
        "import sys, exl_loader.backends, exl_loader.backends.build.build\n"
        "import exl_loader.backends.build.spec\n"
        "exl_loader.backends.build.spec.cpu_spec()\n"
        "assert 'torch' not in sys.modules and 'filelock' not in sys.modules\n"
    )
    run_python(code)


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
    "an argument of the compiler": {
        "compiler": toolchain.Compiler(("g++", "-O0"), "gcc", "g++ 12.2.0")},
    "a launcher": {"compiler": toolchain.Compiler(("ccache", "g++"), "gcc", "g++ 12.2.0")},
    "compiler setup": {
        "compiler": toolchain.Compiler(("g++",), "gcc", "g++ 12.2.0", "vcvars64.bat")},
    "compiler's file": {
        "compiler": toolchain.Compiler(("g++",), "gcc", "g++ 12.2.0", None, ("g++ 77 1",))},
    "a variable": {"environment": (("CPATH", "/opt/include"),)},
    "a variable's value": {"environment": (("CPATH", "/opt/other"),)},
    "another variable": {"environment": (("CPLUS_INCLUDE_PATH", "/opt/include"),)},
    "flags": {"flags": ("-O2", "-march=native")},
    "flags run together": {"flags": ("-O3 -march=native",)},
    "a link flag that became a flag": {
        "flags": ("-O3", "-march=native", "-shared"),
        "link_flags": (),
    },
    "link flags": {"link_flags": ("-shared", "-s")},
    "cpu features": {"cpu_features": ("x86_64", "avx2", "avx512f")},
    "include path": {"include_dirs": (".", "cpu")},
    "what a CUDA compiler makes": {"device_suffix": ".ptx"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_argument_changes_the_key(kernel_sources, change):
    base = make_spec(kernel_sources)
    assert make_spec(kernel_sources).key == base.key
    assert make_spec(kernel_sources, **CHANGES[change]).key != base.key


def test_all_changes_have_keys_of_their_own(kernel_sources):
    keys = [make_spec(kernel_sources, **change).key for change in CHANGES.values()]
    assert len(set(keys)) == len(keys)


COMMANDS = [
    "", "g++ -O0", "g++ -march=x86-64", "g++ -fsanitize=address", "g++ -O1", "g++ -DNDEBUG",
    "g++ -O0 -DNDEBUG", "g++ -DNDEBUG -O0", "g++ '-O0 -DNDEBUG'", "g++ -include cstdint",
]


@needs_compiler
def test_every_command_of_cxx_has_a_key_of_its_own(kernel_sources):
    def key(command):
        return cpu_spec(kernel_sources, {"PATH": os.environ["PATH"], "CXX": command}).key

    assert len({key(command) for command in COMMANDS}) == len(COMMANDS)
    assert [key(command) for command in COMMANDS] == [key(command) for command in COMMANDS]


VARIABLES = ["CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "COMPILER_PATH", "NVCC_APPEND_FLAGS",
             "NVCC_PREPEND_FLAGS", "NVCC_CCBIN", "CL", "_LINK_", "CCC_OVERRIDE_OPTIONS",
             "NIX_CFLAGS_COMPILE", "GCC_EXEC_PREFIX", "SDKROOT"]


@needs_compiler
@pytest.mark.parametrize("name", VARIABLES)
def test_variables_that_compilers_read_are_in_the_key(kernel_sources, name):
    environ = {"PATH": os.environ["PATH"]}
    spec = cpu_spec(kernel_sources, {**environ, name: "/nowhere"})
    assert spec.key != cpu_spec(kernel_sources, environ).key
    assert spec.key != cpu_spec(kernel_sources, {**environ, name: "/elsewhere"}).key
    # Other variables, and empty ones, do not change the key.
    assert cpu_spec(kernel_sources, {**environ, "CFLAGS": "-O0", "EDITOR": "vi", name: ""}).key == (
        cpu_spec(kernel_sources, environ).key)


@needs_compiler
def test_a_script_around_the_compiler_that_changes_is_another_compiler(kernel_sources, tmp_path):
    script = write_compiler(tmp_path / "g++", "true")
    environ = {"PATH": os.environ["PATH"], "CXX": str(script)}
    before = cpu_spec(kernel_sources, environ).key
    write_compiler(script, "exit 1")
    assert cpu_spec(kernel_sources, environ).key != before


@needs_compiler
def test_the_compiler_gets_the_variables_of_the_key(
    kernel_cache, kernel_sources, tmp_path, monkeypatch
):
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "answer.h").write_text("#define ANSWER 42\n")
    (kernel_sources / "shared.h").write_text("#include <answer.h>\n")
    with pytest.raises(KernelBuildError, match="answer.h"):
        build(cpu_spec(kernel_sources))
    monkeypatch.setenv("CPATH", str(tmp_path / "include"))
    monkeypatch.setenv("DEPENDENCIES_OUTPUT", str(tmp_path / "dependencies"))
    spec = cpu_spec(kernel_sources)
    # A change after the key was made has no effect.
    monkeypatch.setenv("CPATH", str(tmp_path / "elsewhere"))
    assert works(build(spec))
    assert not (tmp_path / "dependencies").exists()


@needs_compiler
def test_a_relative_compiler_is_found_from_ninjas_folder(
    kernel_cache, kernel_sources, tmp_path, monkeypatch
):
    write_compiler(tmp_path / "my-g++", "true")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "./my-g++ -DNDEBUG")
    assert works(build(cpu_spec(kernel_sources)))


def test_every_field_is_covered_by_a_change():
    fields = {field.name for field in dataclasses.fields(BuildSpec)}
    changed = {name for change in CHANGES.values() for name in change}
    # The folder of the sources cannot change the binary; their contents do (next test).
    assert fields - changed == {"root"}


@pytest.mark.parametrize("name", ["shared.h", "cpu/one.cpp"])
def test_contents_of_files_change_the_key(kernel_sources, name):
    before = make_spec(kernel_sources).key
    path = kernel_sources / name
    path.write_text(path.read_text() + "// more\n")
    assert make_spec(kernel_sources).key != before


def test_same_sources_elsewhere_have_the_same_key(kernel_sources, tmp_path):
    before = make_spec(kernel_sources).key
    moved = kernel_sources.rename(tmp_path / "moved")
    assert make_spec(moved).key == before


def test_march_overrides_native(monkeypatch, kernel_sources):
    compiler = toolchain.Compiler(("g++",), "gcc", "g++ 12.2.0")
    assert "-march=native" in compile_flags(compiler, ("x86_64", "avx2"))
    assert "-march=x86-64-v3" in compile_flags(compiler, ("x86_64",), "x86-64-v3")
    assert "-mcpu=native" in compile_flags(compiler, ("arm64",))
    msvc = toolchain.Compiler(("cl",), "msvc", "MSVC 14.44")
    assert "/arch:AVX2" in compile_flags(msvc, ("amd64", "avx", "avx2"))
    assert not any("fast-math" in flag for flag in compile_flags(compiler, ("x86_64",)))


def test_missing_source_is_named(kernel_sources):
    with pytest.raises(KernelBuildError, match="three.cpp"):
        assert make_spec(kernel_sources, sources=("cpu/three.cpp",)).key


def test_ninja_file_quotes_for_ninja(kernel_sources):
    text = ninja_file(make_spec(kernel_sources))
    assert "the$ $$sources$:$ (here)/cpu/one.cpp" in text


@needs_compiler
def test_compile_error_shows_the_compilers_output(kernel_cache, kernel_sources):
    (kernel_sources / "cpu" / "two.cpp").write_text("int broken( { return undeclared_thing; }\n")
    with pytest.raises(KernelBuildError) as caught:
        build(cpu_spec(kernel_sources))
    assert "two.cpp" in str(caught.value) and "error" in str(caught.value)
    assert "undeclared_thing" in caught.value.details
    assert "\n" not in str(caught.value)
    assert find_partials(kernel_cache) == []


FLOODS = {
    "lines": "head -c 40000000 /dev/zero | tr '\\0' '\\n'",
    "one line": "head -c 40000000 /dev/zero | tr '\\0' 'x'",
    "zeros on stderr": "head -c 40000000 /dev/zero >&2",
}


@needs_compiler
@pytest.mark.parametrize("flood", FLOODS)
@pytest.mark.parametrize("fails", [True, False])
def test_a_compilers_output_is_bounded(kernel_cache, kernel_sources, tmp_path, monkeypatch,
                                       flood, fails):
    script = write_compiler(
        tmp_path / "g++",
        f"echo 'one.cpp:1: error: the first'; {FLOODS[flood]}; echo 'error: the last'"
        + ("; exit 1" if fails else ""),
    )
    monkeypatch.setenv("CXX", str(script))
    if not fails:
        assert works(build(cpu_spec(kernel_sources)))
        return
    with pytest.raises(KernelBuildError, match="error: the first") as caught:
        build(cpu_spec(kernel_sources))
    details = caught.value.details
    assert "error: the last" in details and "bytes of output are left out here" in details
    # An error writes a control character as four characters.
    longest = 4 if flood == "zeros on stderr" else 1
    assert len(details) < longest * (2 * KEPT_BYTES + 4000)


def test_bounded_output_keeps_beginning_and_end():
    output = BoundedOutput(4)
    for piece in (b"", b"ab", b"cdef"):
        output.add(piece)
    assert output.get() == b"abcdef"
    for piece in (b"gh", b"ijklmnop", b"qr"):
        output.add(piece)
    assert output.get() == b"abcd\n... 10 bytes of output are left out here ...\nopqr"


@pytest.mark.skipif(sys.platform == "win32", reason="runs shell scripts")
def test_a_compiler_whose_answer_has_no_end_is_none(tmp_path, monkeypatch):
    script = tmp_path / "endless++"
    script.write_text("#!/bin/sh\nyes 'endless++ 1.0'\n")
    script.chmod(0o755)
    assert processes.command_output([str(script)]) is None
    monkeypatch.setattr(processes, "COMMAND_TIMEOUT_S", 0.2)
    # Its child holds the pipe open.
    script.write_text("#!/bin/sh\nsleep 600 & echo $! > \"$0.pid\"; wait\n")
    assert processes.command_output([str(script)]) is None
    os.kill(int((tmp_path / "endless++.pid").read_text()), signal.SIGKILL)


def test_no_compiler_means_reference_and_one_warning(kernel_cache, monkeypatch, caplog):
    monkeypatch.setattr("exl_loader.backends.build.spec.find_compiler", lambda environ: None)
    monkeypatch.setattr("exl_loader.backends.cpu.open._warned", False)
    with caplog.at_level(logging.WARNING, logger="exl_loader"):
        assert get_ops().name == "reference"
        assert get_ops().name == "reference"
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
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: release)
    assert command in toolchain.compiler_remedy()


def test_reference_can_be_forced(kernel_cache, monkeypatch):
    monkeypatch.setenv("EXL_LOADER_REFERENCE", "1")
    assert get_ops().name == "reference"
    assert not kernel_cache.exists()


def test_unknown_device_is_refused():
    with pytest.raises(InvalidSettings, match="abacus"):
        get_ops("abacus")


@needs_compiler
def test_library_that_does_not_open_is_built_again(kernel_cache, kernel_sources, monkeypatch):
    monkeypatch.setattr("exl_loader.backends.build.spec.csrc_dir", lambda: kernel_sources)
    spec = cpu_spec(kernel_sources)
    library = build(spec)
    good = library.read_bytes()
    library.write_bytes(b"not a library, but sealed as one")
    store.seal(library.parent, library.name)
    assert open_library().exl_answer() == 42
    assert library.read_bytes() == good


@needs_compiler
def test_library_that_lacks_a_function_is_built_again_once(
    kernel_cache, kernel_sources, monkeypatch
):
    from exl_loader.backends.cpu import ops

    monkeypatch.setattr("exl_loader.backends.build.spec.csrc_dir", lambda: kernel_sources)
    monkeypatch.setattr(ops, "NAMES", ("answer",))
    monkeypatch.setattr(ops, "CpuOps", lambda library: library.exl_answer())
    monkeypatch.setattr("exl_loader.backends.cpu.amx.use_amx", lambda ops: None)
    source = next(p for p in kernel_sources.rglob("*.cpp") if "exl_answer" in p.read_text())
    text = source.read_text()
    source.write_text(text.replace("exl_answer", "exl_question"))
    foreign = build(cpu_spec(kernel_sources)).read_bytes()
    source.write_text(text)
    library = build(cpu_spec(kernel_sources))
    library.write_bytes(foreign)
    store.seal(library.parent, library.name)
    assert get_ops() == 42
    assert library.read_bytes() != foreign


@needs_compiler
def test_library_that_lacks_functions_after_each_build_is_an_error(
    kernel_cache, kernel_sources, monkeypatch
):
    monkeypatch.setattr("exl_loader.backends.build.spec.csrc_dir", lambda: kernel_sources)
    with pytest.raises(KernelBuildError, match=r"without exl_set_threads, .*exl_attention"):
        get_ops()
