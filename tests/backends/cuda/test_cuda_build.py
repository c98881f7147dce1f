"""Building CUDA kernels: every source, every architecture, repair. No card, no driver."""

import itertools
import json
import os
import re
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest

from exl_loader.backends.build import build as build_module
from exl_loader.backends.build import store
from exl_loader.backends.build.build import build_entry
from exl_loader.backends.cuda import compilers
from exl_loader.backends.cuda.arch import COMMON, arch_name
from exl_loader.backends.cuda.compilers import cuda_spec
from exl_loader.commands import cli
from exl_loader.utils.errors import KernelBuildError
from support import exhaustive, ptx, run_python
from support.builds import Recorder, find_partials
from support.cuda_emulation.launcher import launch_bound
from support.cuda_ptx_table import TYPE_BYTES, least_target
from support.cuda_sources import (
    REPO,
    SAMPLES,
    Compiled,
    KeepingNvrtc,
    compiled_once,
    cuda_compiler,
    hide_compilers,
    kernels_of,
    make_nvrtc,
    resource_report,
    sample_root,
    traps_of,
)
from support.targets import emulated_launcher

KINDS = compilers.KINDS
SOURCES = sorted((REPO / "csrc" / "cuda").glob("*.cu"))

# Every source compiles for every architecture in every run. These are fully optimised, so that
# the report has their spills: for the newest architecture all but the slowest to compile, which
# is the code of another source for other head sizes; for the oldest those of fast decoding.
# Others compile quickly, see `apart`.
NEWEST_EXCEPT = ("attention_decode_padded",)
OLDEST = ("linear_decode", "linear_dense_decode")
# This takes a fifth of the time.
HASTY = "--Ofast-compile=max"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, for this process and its children."""
    monkeypatch.setenv("EXL_LOADER_CACHE_DIR", str(tmp_path / "a cache"))
    for name in ("CXX", compilers.COMPILER_ENV):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "a cache" / "kernels"


@pytest.fixture
def sources(tmp_path):
    """Two sources in a folder whose name needs quoting (nvcc itself stumbles over a dollar)."""
    return sample_root(tmp_path / "the sources: (here)", ("one", "two"))


@pytest.fixture
def nvrtc():
    found = cuda_compiler("nvrtc")
    if found is None:
        pytest.skip("no NVRTC")
    return found


# ---- Builds ----------------------------------------------------------------------------------


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


def test_build_for_a_card_that_no_compiler_knows_makes_ptx(cache, sources, compiler):
    spec = cuda_spec((99, 0), compiler=compiler, root=sources)
    entry = build_entry(spec)
    newest = max(compilers._own_capabilities(compiler))
    assert entry.directory.name.startswith(f"cuda_compute_{newest[0]}{newest[1]}-")
    assert [path.name for path in entry.files] == ["one.ptx", "two.ptx"]
    for path in entry.files:
        text = path.read_text()
        assert f".target sm_{newest[0]}{newest[1]}" in text
        assert all(f".entry {name}(" in text for name in kernels_of(SAMPLES))
    assert build_entry(spec) == entry


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone", "empty marker"])
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
    else:
        (entry.directory / store.MARKER).write_text('{"files": {}}')
    assert store.find_entry(spec) is None
    assert build_entry(spec) == entry
    assert second.read_bytes() == data


def test_compile_error_shows_the_compilers_message(cache, sources, compiler):
    (sources / "cuda" / "two.cu").write_text("__global__ void k() { undeclared_thing(); }\n")
    with pytest.raises(KernelBuildError, match="two.cu.*error.*EXL_LOADER_CUDA_COMPILER") as caught:
        build_entry(cuda_spec((9, 0), compiler=compiler, root=sources))
    assert "undeclared_thing" in caught.value.details and "\n" not in str(caught.value)
    assert find_partials(cache) == []


def test_a_file_that_is_no_library_is_an_error(cache, sources, monkeypatch, tmp_path):
    hide_compilers(monkeypatch, tmp_path)
    make_nvrtc(tmp_path / "toolkit" / "lib64", (13, 0))
    environ = {**os.environ, "CUDA_HOME": str(tmp_path / "toolkit")}
    with pytest.raises(KernelBuildError, match="error: .*libnvrtc"):
        build_entry(cuda_spec((9, 0), root=sources, environ=environ))


def test_build_path_does_not_import_torch():
    code = (
        "import sys, exl_loader.backends.cuda.kernels, exl_loader.commands.build\n"
        "from exl_loader.backends.cuda import compilers\n"
        "list(compilers.find_cuda_compilers())\n"
        "assert 'torch' not in sys.modules\n"
    )
    run_python(code)


def test_build_command(cache, sources, nvrtc, monkeypatch, capsys):
    monkeypatch.setattr("exl_loader.backends.cuda.compilers.csrc_dir", lambda: sources)
    monkeypatch.setenv(compilers.COMPILER_ENV, "nvrtc")
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


def optimised_in_every_run(source, capability):
    if source == SAMPLES or capability == COMMON[-1]:
        return source.stem not in NEWEST_EXCEPT
    return capability == COMMON[0] and source.stem in OLDEST


def text_for(source, capability):
    """Return a source as an architecture's compiler sees it, headers and macros expanded."""
    command = ["g++", "-x", "c++", "-std=c++17", "-E", "-P", "-D__CUDACC__", "-D__CUDACC_RTC__"]
    command += [f"-D__CUDA_ARCH__={capability[0]}{capability[1]}0", "-I", str(REPO / "csrc")]
    command += ["-I", str(REPO / "csrc" / "cuda" / "nvrtc"), str(source)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def apart(source):
    """List the architectures for which a source has to compile.

    PTX that an architecture's assembler accepts is valid for newer ones, so those in between
    need no compilation of a text that compiles for an older and for the newest architecture.
    `--exhaustive` lists all.
    """
    if os.environ.get(exhaustive.ENV):
        return list(COMMON)
    oldest = {text_for(source, capability): capability for capability in reversed(COMMON)}
    return sorted({*oldest.values(), COMMON[-1]})


def cases(sources, are_sampled):
    return [
        pytest.param(
            source, capability, id=f"{source.stem}-{arch_name(capability)}",
            marks=() if are_sampled(source, capability) else pytest.mark.exhaustive,
        )
        for source, capability in itertools.product(sources, COMMON)
    ]


def check_resources(report, source):
    """Check that those of decoding, sampling and feedback do not spill, and all are emulated."""
    assert sorted(report) == sorted(kernels_of(source))
    for name, used in report.items():
        assert used["registers"] <= 255
        if any(word in name for word in ("decode", "logits", "feedback")):
            assert used["spilled"] == 0, f"{name} spills: {used}"


# Kernels with a barrier after a branch that all threads take alike, which the analysis cannot see.
ALIKE = {
    # The branch depends on the largest logit, which each warp finds among the same numbers.
    "count_logits_kernel", "take_logits_kernel",
}


@lru_cache
def emulated_signatures():
    """Return kernel -> bytes of each parameter, by the emulation's own compiler."""
    library = emulated_launcher()._library
    return {
        name: [int(word[1:]) for word in library.exl_emulated_signature(name.encode()).split()]
        for source in SOURCES for name in kernels_of(source)
    }


def check_ptx(text, source):
    """Check that PTX needs nothing else and has the kernels and parameters of its source."""
    module = ptx.parse(text)
    assert sorted(kernel.name for kernel in module.kernels) == sorted(kernels_of(source))
    shared = r"\.extern \.shared \.align 16 \.b8 \w*exl_shared_memory\w*\[\];"
    assert not re.findall(r"\.extern|\.func", re.sub(shared, "", module.rest))
    for kernel in module.kernels:
        names = {instruction.name for instruction in kernel.instructions()}
        assert not names & {"trap", "brkpt", "call", "brx"}, (kernel.name, names)
        assert ptx.unset_reads(kernel) == []
        assert kernel.name in ALIKE or ptx.divergent_barriers(kernel) == []
        sizes = [int(size) if size else TYPE_BYTES[kind] for kind, size in kernel.parameters]
        assert sizes == emulated_signatures()[kernel.name]
        assert int(kernel.directives["maxntid"].split(",")[0]) == launch_bound(kernel.name)
        if module.target == "sm_75":
            for instruction in kernel.instructions():
                assert least_target(instruction.opcode) <= 75, instruction


def check_cubin(compiled, source):
    """Check that machine code has no trap, and its PTX."""
    assert compiled.traps == 0
    check_ptx(compiled.ptx, source)


@pytest.fixture(scope="module")
def compile_with_nvrtc():
    """Return a function that compiles a source in this process, or returns a kept result."""
    found = cuda_compiler("nvrtc")
    if found is None:
        pytest.skip("no NVRTC")
    nvrtc = lru_cache(lambda: KeepingNvrtc(found.path))

    def compile_source(source, capability, option):
        if option == HASTY and found.cuda < (13, 0):
            pytest.skip("this NVRTC cannot compile quickly")
        spec = cuda_spec(capability, compiler=found)
        include = [f"-I{spec.root / name}" for name in spec.include_dirs]

        def compile_now():
            cubin, messages = nvrtc().compile(
                source.read_bytes(), source.name, [*spec.flags, *include, option]
            )
            assert cubin.startswith(b"\x7fELF")
            ptx = "" if option == HASTY else nvrtc().ptx
            return Compiled(messages, sum(traps_of(cubin).values()), ptx)

        compiled = compiled_once(spec, source, option, compile_now)
        assert "warning" not in compiled.messages, compiled.messages
        return compiled

    return compile_source


@pytest.mark.parametrize(
    ("source", "capability"), cases([*SOURCES, SAMPLES], optimised_in_every_run)
)
def test_source_compiles_with_nvrtc(compile_with_nvrtc, source, capability):
    compiled = compile_with_nvrtc(source, capability, "-Xptxas=-v")
    if source != SAMPLES:
        check_cubin(compiled, source)
    check_resources(resource_report(compiled.messages), source)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_source_compiles_for_every_architecture(compile_with_nvrtc, source):
    for capability in apart(source):
        if not optimised_in_every_run(source, capability):
            compile_with_nvrtc(source, capability, HASTY)


def compile_with_nvcc(source, capability, option, target):
    found = cuda_compiler("nvcc")
    if found is None:
        pytest.skip("no nvcc")
    spec = cuda_spec(capability, compiler=found)
    command = [*found.compiler.command, *spec.flags, f"-I{spec.root}", option]

    def compile_now():
        result = subprocess.run(
            [*command, str(source), "-o", str(target)], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        is_ptx = option == "-ptx"
        traps = 0 if is_ptx else sum(traps_of(target.read_bytes()).values())
        return Compiled(result.stderr, traps, target.read_text() if is_ptx else "")

    compiled = compiled_once(spec, source, option, compile_now)
    assert "warning" not in compiled.messages, compiled.messages
    return compiled


@pytest.mark.parametrize(
    ("source", "capability"), cases(SOURCES, lambda source, capability: capability == COMMON[0])
)
def test_ptx_of_nvcc(source, capability, tmp_path):
    check_ptx(compile_with_nvcc(source, capability, "-ptx", tmp_path / "out.ptx").ptx, source)


@pytest.mark.parametrize(("source", "capability"), cases(SOURCES, lambda *case: False))
def test_source_compiles_with_nvcc_as_cards_run_it(source, capability, tmp_path):
    compiled = compile_with_nvcc(source, capability, "-Xptxas=-v", tmp_path / "out.cubin")
    check_resources(resource_report(compiled.messages), source)
    assert compiled.traps == 0
