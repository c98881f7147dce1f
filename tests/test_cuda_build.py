"""Building CUDA kernels: compilers, architectures, keys, healing. No card, no driver."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cuda_sources import REPO, cuda_compiler, kernels_of, resource_report, sample_root

from exl_loader import cli
from exl_loader.errors import InvalidSettings, KernelBuildError
from exl_loader.kernels import build as build_module
from exl_loader.kernels import store
from exl_loader.kernels.build import build_entry
from exl_loader.kernels.cuda import arch, toolchain
from exl_loader.kernels.cuda.arch import COMMON, arch_name, compiled_capability, parse_archs
from exl_loader.kernels.cuda.nvrtc_cc import Nvrtc
from exl_loader.kernels.cuda.spec import cuda_spec
from exl_loader.kernels.toolchain import Compiler, command_output, find_compiler

KINDS = toolchain.KINDS
SOURCES = sorted((REPO / "csrc" / "cuda").glob("*.cu"))
SAMPLES = REPO / "tests" / "cuda_emulation" / "samples.cu"

# Of every source for every architecture; by default the oldest and the newest common one of a
# data centre, since all of them take a minute.
QUICK = ((7, 5), (9, 0))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, for this process and its children."""
    monkeypatch.setenv("EXL_LOADER_CACHE_DIR", str(tmp_path / "a cache"))
    for name in ("CXX", toolchain.COMPILER_ENV):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "a cache" / "kernels"


@pytest.fixture
def sources(tmp_path):
    """Two sources in a folder whose name needs quoting (nvcc itself stumbles over a dollar)."""
    return sample_root(tmp_path / "the sources: (here)", ("one", "two"))


@pytest.fixture(params=KINDS)
def compiler(request):
    found = cuda_compiler(request.param)
    if found is None:
        pytest.skip(f"no {request.param}")
    return found


@pytest.fixture
def nvrtc():
    found = cuda_compiler("nvrtc")
    if found is None:
        pytest.skip("no NVRTC")
    return found


@pytest.fixture
def slow_python(tmp_path):
    """A Python that writes down what it compiles, slowly enough to be interrupted."""
    log, script = tmp_path / "compiled.log", tmp_path / "slow python"
    script.write_text(f'#!/bin/sh\necho "$*" >> "{log}"\nsleep 0.5\nexec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    log.touch()
    return script, log


# ---- Architectures ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sm_90", [(9, 0)]),
        ("9.0", [(9, 0)]),
        ("120", [(12, 0)]),
        ("sm_80, 8.6,80", [(8, 0), (8, 6)]),
        ("all", list(COMMON)),
    ],
)
def test_archs_are_read(text, expected):
    assert parse_archs(text) == expected


@pytest.mark.parametrize("text", ["", "sm_70", "6.1", "sm_90a", "hopper", "9", "sm_80,"])
def test_what_is_no_arch_is_refused(text):
    with pytest.raises(InvalidSettings, match="sm_75 or newer"):
        parse_archs(text)


@pytest.mark.parametrize(
    ("capability", "cuda", "expected"),
    [
        ((9, 0), (13, 0), (9, 0)),
        ((12, 1), (12, 8), (12, 0)),
        ((8, 9), (11, 4), (8, 7)),
        ((9, 0), (11, 4), None),
        ((12, 0), (12, 6), None),
        ((13, 0), (13, 0), None),
    ],
)
def test_newer_cards_are_served_by_their_generation(capability, cuda, expected):
    assert compiled_capability(capability, cuda) == expected


def test_old_card_is_refused():
    arch.check_capability((7, 5), "cuda:0")
    with pytest.raises(KernelBuildError, match=r"7.0.*device='cpu'"):
        arch.check_capability((7, 0), "cuda:0")


def test_known_architectures_are_the_compilers_own(compiler):
    """Whatever the table says that a compiler of this release knows, it knows."""
    if compiler.compiler.kind == "nvcc":
        words = command_output([str(compiler.path), "--list-gpu-code"])
        known = {int(number) for number in re.findall(r"sm_(\d+)", words)}
    else:
        known = set(Nvrtc(compiler.path).supported())
    ours = {
        10 * capability[0] + capability[1]
        for capability, since in arch._SINCE.items()
        if since <= compiler.cuda
    }
    assert ours <= known


# ---- Compilers -------------------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without anything: no packages, no toolkit."""
    monkeypatch.setattr(toolchain, "_package_folders", lambda name: [])
    monkeypatch.setattr(
        toolchain, "_toolkits",
        lambda environ: [Path(environ["CUDA_HOME"])] if "CUDA_HOME" in environ else [],
    )
    return {"PATH": str(tmp_path / "nothing")}


def make_nvrtc(folder, release):
    folder.mkdir(parents=True)
    major, minor = release
    (folder / f"libnvrtc.so.{major}").write_bytes(b"1234")
    (folder / f"libnvrtc-builtins.so.{major}.{minor}").write_bytes(b"")
    return folder / f"libnvrtc.so.{major}"


def test_nothing_there_says_what_to_install(bare):
    with pytest.raises(KernelBuildError, match="pip install nvidia-cuda-nvrtc ") as caught:
        toolchain.choose_cuda_compiler((9, 0), bare)
    assert caught.value.actual == "none"
    with pytest.raises(KernelBuildError, match="pip install nvidia-cuda-nvrtc-cu12"):
        toolchain.choose_cuda_compiler((9, 0), bare, driver=(12, 4))


def test_unknown_kind_is_refused(bare):
    with pytest.raises(InvalidSettings, match="nvrtc or nvcc, found 'clang'"):
        toolchain.choose_cuda_compiler((9, 0), {**bare, toolchain.COMPILER_ENV: "clang"})


@pytest.mark.skipif(sys.platform == "win32", reason="names of Linux")
def test_packages_come_before_toolkits(bare, tmp_path, monkeypatch):
    package = make_nvrtc(tmp_path / "nvidia" / "cu13" / "lib", (13, 5))
    older = make_nvrtc(tmp_path / "nvidia" / "cuda_nvrtc" / "lib", (12, 6))
    toolkit = make_nvrtc(tmp_path / "toolkit" / "lib64", (12, 9))
    environ = {**bare, "CUDA_HOME": str(tmp_path / "toolkit")}
    monkeypatch.setattr(
        toolchain, "_package_folders",
        lambda name: [tmp_path / "nvidia"] if name == "nvidia" else [],
    )
    found = list(toolchain.find_cuda_compilers(environ))
    assert [one.path for one in found] == [package, older, toolkit]
    assert [one.cuda for one in found] == [(13, 5), (12, 6), (12, 9)]
    assert found[0].compiler.version == "NVRTC 13.5 (4 bytes)"
    # A driver takes cubins of its own generation and older ones.
    assert toolchain.choose_cuda_compiler((9, 0), environ).path == package
    assert toolchain.choose_cuda_compiler((9, 0), environ, (12, 2)).path == older
    assert toolchain.choose_cuda_compiler((12, 0), environ, (12, 9)).path == toolkit
    with pytest.raises(KernelBuildError, match="NVRTC 13.5 .* is newer than the driver"):
        toolchain.choose_cuda_compiler((12, 0), environ, (11, 8))


def test_library_without_builtins_is_no_compiler(bare, tmp_path):
    library = make_nvrtc(tmp_path / "toolkit" / "lib64", (13, 0))
    library.with_name("libnvrtc-builtins.so.13.0").unlink()
    assert not list(toolchain._find_nvrtc({**bare, "CUDA_HOME": str(tmp_path / "toolkit")}))


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_nvcc_needs_a_host_compiler(bare, tmp_path):
    if find_compiler() is None:
        pytest.skip("no host compiler here")
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    environ = {**bare, "CUDA_HOME": str(tmp_path / "toolkit")}
    assert not list(toolchain.find_cuda_compilers(environ))
    environ["CXX"] = find_compiler().command[0]
    (found,) = toolchain.find_cuda_compilers(environ)
    assert found.cuda == (12, 4) and found.compiler.kind == "nvcc"
    assert found.compiler.version.startswith("nvcc V12.4.131 with ")


# ---- Keys ------------------------------------------------------------------------------------


def fake_compiler(**changes):
    fields = {"command": ("nvcc",), "kind": "nvcc", "version": "nvcc V13.0.88 with g++ 12"}
    return toolchain.CudaCompiler(Compiler(**{**fields, **changes}), (13, 0), Path("nvcc"))


def test_all_that_changes_cubins_changes_the_key(sources):
    base = cuda_spec((9, 0), compiler=fake_compiler(), root=sources)
    assert cuda_spec((9, 0), compiler=fake_compiler(), root=sources).key == base.key
    others = [
        cuda_spec((8, 6), compiler=fake_compiler(), root=sources),
        cuda_spec((9, 0), compiler=fake_compiler(kind="nvrtc"), root=sources),
        cuda_spec((9, 0), compiler=fake_compiler(version="nvcc V13.1 with g++"), root=sources),
        dataclasses.replace(base, flags=(*base.flags, "-lineinfo")),
    ]
    platform = sources / "cuda" / "platform.cuh"
    platform.write_text(platform.read_text() + "// more\n")
    others.append(cuda_spec((9, 0), compiler=fake_compiler(), root=sources))
    assert len({base.key, *(spec.key for spec in others)}) == 6


def test_paths_do_not_change_the_key(sources, tmp_path):
    before = cuda_spec((9, 0), compiler=fake_compiler(), root=sources).key
    moved = sources.rename(tmp_path / "moved")
    other = fake_compiler(command=("/elsewhere/nvcc",))
    assert cuda_spec((9, 0), compiler=other, root=moved).key == before


def test_shim_of_the_standard_library_is_part_of_nvrtc_keys_alone(sources):
    keys = []
    for text in ("", "// more\n"):
        shim = sources / "cuda" / "nvrtc" / "cstdint"
        shim.write_text(shim.read_text() + text)
        keys.append(
            [cuda_spec((9, 0), compiler=fake_compiler(kind=kind), root=sources).key
             for kind in KINDS]
        )
    assert keys[0][KINDS.index("nvrtc")] != keys[1][KINDS.index("nvrtc")]
    assert keys[0][KINDS.index("nvcc")] == keys[1][KINDS.index("nvcc")]


def test_missing_sources_are_named(tmp_path):
    (tmp_path / "cuda").mkdir()
    with pytest.raises(KernelBuildError, match=r"expected \*\.cu"):
        cuda_spec((9, 0), compiler=fake_compiler(), root=tmp_path)


# ---- Builds ----------------------------------------------------------------------------------


class Recorder:
    def __init__(self):
        self.calls = []

    def start(self, task, total, unit):
        self.calls.append(("start", task, total, unit))

    def advance(self, task, n=1):
        self.calls.append(("advance", task, n))

    def finish(self, task):
        self.calls.append(("finish", task))


def find_partials(cache):
    return [path.name for path in cache.iterdir() if "partial" in path.name]


def test_build_makes_one_cubin_a_source(cache, sources, compiler):
    progress = Recorder()
    entry = build_entry(cuda_spec((9, 0), compiler=compiler, root=sources), progress)
    assert progress.calls[0] == ("start", build_module.TASK, 2, "units")
    assert sum(call[2] for call in progress.calls if call[0] == "advance") == 2
    assert [path.name for path in entry.files] == ["one.cubin", "two.cubin"]
    assert entry.directory.parent == cache and entry.directory.name.startswith("cuda_sm_90-")
    for path in entry.files:
        cubin = path.read_bytes()
        assert cubin.startswith(b"\x7fELF")
        assert all(f".text.{name}\0".encode() in cubin for name in kernels_of(SAMPLES))
    before = [path.stat().st_mtime_ns for path in entry.files]
    assert build_entry(cuda_spec((9, 0), compiler=compiler, root=sources)) == entry
    assert [path.stat().st_mtime_ns for path in entry.files] == before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone", "no marker", "empty marker"])
def test_damaged_build_heals(cache, sources, nvrtc, damage):
    spec = cuda_spec((9, 0), compiler=nvrtc, root=sources)
    entry = build_entry(spec)
    second = entry.files[1]
    data = second.read_bytes()
    if damage == "truncated":
        second.write_bytes(data[:100])
    elif damage == "flipped":
        second.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    elif damage == "gone":
        second.unlink()
    elif damage == "no marker":
        (entry.directory / store.MARKER).unlink()
    else:
        (entry.directory / store.MARKER).write_text('{"files": {}}')
    assert store.find_entry(spec) is None
    assert build_entry(spec) == entry
    assert second.read_bytes() == data


def spawn_build(sources, python):
    code = (
        "import sys, pathlib\n"
        "from exl_loader.kernels.build import build_entry\n"
        "from exl_loader.kernels.cuda.spec import cuda_spec\n"
        "sys.executable = sys.argv[2]\n"
        "print(build_entry(cuda_spec((9, 0), root=pathlib.Path(sys.argv[1]))).directory)\n"
    )
    environ = {**os.environ, toolchain.COMPILER_ENV: "nvrtc"}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(sources), str(python)], cwd=REPO,
        stdout=subprocess.PIPE, text=True, env=environ,
    )


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_killed_build_heals(cache, sources, nvrtc, slow_python):
    python, log = slow_python
    victim = spawn_build(sources, python)
    deadline = time.monotonic() + 30
    while not log.read_text():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.communicate(timeout=30)
    assert find_partials(cache), "the victim was killed too late to prove anything"
    entry = build_entry(cuda_spec((9, 0), compiler=nvrtc, root=sources))
    assert len(entry.files) == 2 and find_partials(cache) == []


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_two_processes_build_once(cache, sources, nvrtc, slow_python):
    python, log = slow_python
    processes = [spawn_build(sources, python) for _ in range(2)]
    answers = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert answers[0] == answers[1] and Path(answers[0]).is_dir()
    assert log.read_text().count("\n") == 2


def test_full_disk_is_an_error_with_a_remedy(cache, sources, nvrtc, monkeypatch):
    def full(directory, *names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build_module, "seal", full)
    with pytest.raises(KernelBuildError, match="No space left on device.*Free some space"):
        build_entry(cuda_spec((9, 0), compiler=nvrtc, root=sources))
    assert find_partials(cache) == []


def test_compile_error_shows_the_compilers_words(cache, sources, compiler):
    (sources / "cuda" / "two.cu").write_text("__global__ void k() { undeclared_thing(); }\n")
    with pytest.raises(KernelBuildError, match="two.cu.*error.*EXL_LOADER_CUDA_COMPILER") as caught:
        build_entry(cuda_spec((9, 0), compiler=compiler, root=sources))
    assert "undeclared_thing" in caught.value.details and "\n" not in str(caught.value)
    assert find_partials(cache) == []


def test_library_that_is_none_is_an_error(cache, sources, bare, tmp_path):
    make_nvrtc(tmp_path / "toolkit" / "lib64", (13, 0))
    environ = {**os.environ, "CUDA_HOME": str(tmp_path / "toolkit")}
    with pytest.raises(KernelBuildError, match="error: .*libnvrtc"):
        build_entry(cuda_spec((9, 0), root=sources, environ=environ))


def test_build_path_does_not_import_torch():
    code = (
        "import sys, exl_loader.kernels.cuda.open, exl_loader.commands.build\n"
        "from exl_loader.kernels.cuda import toolchain\n"
        "list(toolchain.find_cuda_compilers())\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


def test_build_command(cache, sources, nvrtc, monkeypatch, capsys):
    monkeypatch.setattr("exl_loader.kernels.cuda.spec.csrc_dir", lambda: sources)
    monkeypatch.setenv(toolchain.COMPILER_ENV, "nvrtc")
    assert cli.main(["build", "--cuda-arch", "8.6", "--json"]) == 0
    (built,) = json.loads(capsys.readouterr().out)
    assert built["compiled"] and built["arch"] == "sm_86" and "NVRTC" in built["compiler"]
    cubins = Path(built["folder"]).glob("*.cubin")
    assert built["total_bytes"] == sum(cubin.stat().st_size for cubin in cubins)
    assert cli.main(["build", "--cuda-arch", "sm_86,sm_90"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"already there: sm_86 in {built['folder']}"
    assert lines[1].startswith("compiled sm_90 in ")
    assert cli.main(["build", "--cuda-arch", "86", "--force"]) == 0
    assert capsys.readouterr().out.startswith("compiled sm_86 in ")
    assert cli.main(["build", "--cuda-arch", "sm_50"]) == cli.EXIT_ERROR
    assert "sm_75 or newer" in capsys.readouterr().err


# ---- The project's own sources -----------------------------------------------------------------


def every_arch():
    for capability in COMMON:
        marks = () if capability in QUICK else pytest.mark.slow
        yield pytest.param(capability, marks=marks, id=arch_name(capability))


def check_resources(report, source):
    """Decoding kernels spill nothing, and every kernel is known to the emulation."""
    assert sorted(report) == sorted(kernels_of(source))
    for name, used in report.items():
        assert used["registers"] <= 255
        if "decode" in name:
            assert used["spilled"] == 0, f"{name} spills: {used}"


@pytest.fixture(scope="module")
def nvrtc_in_process():
    found = cuda_compiler("nvrtc")
    return None if found is None else Nvrtc(found.path)


@pytest.mark.parametrize("capability", list(every_arch()))
@pytest.mark.parametrize("source", [*SOURCES, SAMPLES], ids=lambda path: path.stem)
def test_source_compiles_with_nvrtc(nvrtc_in_process, capability, source):
    if nvrtc_in_process is None:
        pytest.skip("no NVRTC")
    spec = cuda_spec(capability, compiler=cuda_compiler("nvrtc"))
    include = [f"-I{spec.root / name}" for name in spec.include_dirs]
    cubin, words = nvrtc_in_process.compile(
        source.read_bytes(), source.name, [*spec.flags, *include, "-Xptxas=-v"]
    )
    assert cubin.startswith(b"\x7fELF") and "warning" not in words, words
    check_resources(resource_report(words), source)


@pytest.mark.slow
@pytest.mark.parametrize("capability", COMMON, ids=arch_name)
def test_sources_compile_with_nvcc(capability, tmp_path):
    found = cuda_compiler("nvcc")
    if found is None:
        pytest.skip("no nvcc")
    spec = cuda_spec(capability, compiler=found)
    for source in SOURCES:
        command = [*found.compiler.command, *spec.flags, f"-I{spec.root}", "-Xptxas=-v"]
        result = subprocess.run(
            [*command, str(source), "-o", str(tmp_path / "out.cubin")],
            capture_output=True, text=True,
        )
        assert result.returncode == 0 and "warning" not in result.stderr, result.stderr
        check_resources(resource_report(result.stderr), source)
