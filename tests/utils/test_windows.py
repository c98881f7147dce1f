"""Behaviour on Windows, as far as other systems can test it.

Where code asks for the operating system, tests answer that it is Windows. The answers of the
system itself are tested on Windows alone.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from exl_loader.backends.build import store, toolchain
from exl_loader.backends.build.spec import compile_flags, csrc_dir, link_flags
from exl_loader.backends.build.toolchain import Compiler
from exl_loader.backends.cpu import ops
from exl_loader.backends.cpu.memory import MainMemory
from exl_loader.backends.cuda import compilers
from exl_loader.backends.cuda.compilers import cuda_spec
from exl_loader.commands import doctor
from exl_loader.utils.errors import KernelBuildError
from exl_loader.utils.system import files, windows
from exl_loader.utils.system.main_memory import vm_stat_free_bytes
from extension.install import plugin_files
from support import REPO
from support.cuda_sources import cuda_compiler

MINGW = shutil.which("x86_64-w64-mingw32-g++-posix") or shutil.which("x86_64-w64-mingw32-g++")
GCC = Compiler(("g++",), "gcc", "g++ 14.2.0")
CLANG = Compiler(("clang++",), "clang", "clang version 22")
MSVC = Compiler(("cl.exe",), "msvc", "MSVC 14.44.35207")


@pytest.fixture
def on_windows(monkeypatch):
    """Make `utils.system` report Windows."""
    monkeypatch.setattr(sys, "platform", "win32")


# ---- Compilers ---------------------------------------------------------------------------------


@pytest.fixture
def visual_studio(on_windows, monkeypatch, tmp_path):
    """A folder of programs with Visual Studio and two of its compilers, and a double of vswhere."""
    studio = tmp_path / "Büro" / "2022" / "BuildTools"
    build = studio / "VC" / "Auxiliary" / "Build"
    build.mkdir(parents=True)
    (build / "vcvars64.bat").touch()
    (build / "Microsoft.VCToolsVersion.default.txt").write_text("14.38.33130\r\n", encoding="utf-8")
    for release in ("14.38.33130", "14.44.35207"):
        compiler = studio / "VC" / "Tools" / "MSVC" / release / "bin" / "Hostx64" / "x64" / "cl.exe"
        compiler.parent.mkdir(parents=True)
        compiler.touch()
    vswhere = tmp_path / "Microsoft Visual Studio" / "Installer" / "vswhere.exe"
    vswhere.parent.mkdir(parents=True)
    vswhere.touch()
    asked = []

    def answer(command):
        asked.append(command)
        return f"{studio}\r\n" if command[0] == str(vswhere) else None

    monkeypatch.setattr(toolchain, "command_output", answer)
    return SimpleNamespace(environ={"ProgramFiles(x86)": str(tmp_path), "PATH": ""}, root=studio,
                           asked=asked)


def test_visual_studios_default_compiler_is_used(visual_studio):
    compiler = toolchain.find_compiler(visual_studio.environ)
    assert compiler is not None and compiler.kind == "msvc"
    assert compiler.version == "MSVC 14.38.33130" and "14.38.33130" in compiler.command[0]
    assert compiler.environment_script == str(
        visual_studio.root / "VC" / "Auxiliary" / "Build" / "vcvars64.bat"
    )
    assert len(visual_studio.asked) == 1, "a warm load starts vswhere and nothing else"


def test_visual_studio_without_its_compiler_is_ignored(visual_studio, monkeypatch):
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    shutil.rmtree(visual_studio.root / "VC" / "Tools")
    assert toolchain.find_compiler(visual_studio.environ) is None


def test_ziglang_is_used_where_there_is_no_other_compiler(monkeypatch, tmp_path):
    package = tmp_path / "ziglang"
    package.mkdir()
    (package / "__init__.py").touch()
    (tmp_path / "ziglang-0.17.1.dist-info").mkdir()
    (tmp_path / "ziglang-0.17.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: ziglang\nVersion: 0.17.1\n"
    )
    (package / "__main__.py").write_text(
        "import sys\nprint('clang version 22.1.8') if sys.argv[1:] == ['c++', '--version'] "
        "else sys.exit(1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(toolchain, "_find_msvc", lambda environ: None)
    compiler = toolchain.find_compiler({"PATH": str(tmp_path)})
    assert compiler is not None
    assert compiler.command == (sys.executable, "-m", "ziglang", "c++")
    assert compiler.kind == "clang" and compiler.version == "zig 0.17.1, clang version 22.1.8"


def test_the_remedy_without_a_compiler_is_one_line(on_windows):
    remedy = toolchain.compiler_remedy()
    assert f'"{sys.executable}" -m pip install ziglang' in remedy
    # Of Visual Studio's installer alone there is no compiler.
    assert "winget install Microsoft.VisualStudio.2022.BuildTools" in remedy
    assert "--add Microsoft.VisualStudio.Workload.VCTools" in remedy
    assert "\n" not in remedy


def test_a_library_for_windows_is_linked_statically(on_windows):
    assert "-static" in link_flags(GCC) and "-static" in link_flags(CLANG)
    assert "/MT" in compile_flags(MSVC, ("amd64",)) and "/LD" in link_flags(MSVC)
    for compiler in (GCC, CLANG):
        assert "-fPIC" not in compile_flags(compiler, ("amd64", "avx2"))
    # GCC's own spills crash without, where the stack is not aligned to 32 bytes.
    assert "-Wa,-muse-unaligned-vector-move" in compile_flags(GCC, ("amd64",))
    assert "-Wa,-muse-unaligned-vector-move" not in compile_flags(CLANG, ("amd64",))


def test_nvrtc_is_recognised_by_its_names_on_windows(tmp_path):
    """The files of torch's folder `lib` and of the pip package."""
    for name in ("nvrtc64_120_0.dll", "nvrtc64_120_0.alt.dll", "nvrtc-builtins64_128.dll",
                 "nvrtc-builtins64_128.alt.dll", "cudart64_12.dll", "torch_cuda.dll"):
        (tmp_path / name).touch()
    assert compilers._nvrtc_in(tmp_path) == [(tmp_path / "nvrtc64_120_0.dll", (12, 8))]


@pytest.mark.skipif(cuda_compiler("nvrtc") is None, reason="needs NVRTC")
def test_with_nvrtc_no_other_compiler_is_looked_for(monkeypatch):
    def none(*_):
        raise AssertionError("a C++ compiler is wanted")

    monkeypatch.setattr(compilers, "find_compiler", none)
    assert cuda_spec((8, 6), driver=(99, 0)).compiler.kind == "nvrtc"


def test_doctor_does_not_ask_for_a_compiler_where_a_card_runs_models(monkeypatch):
    monkeypatch.setattr(toolchain, "find_compiler", lambda: None)
    problems = []
    assert doctor._examine_compiler(problems, has_cards=True) is None and problems == []
    assert doctor._examine_compiler(problems, has_cards=False) is None and len(problems) == 1


# ---- Sources -----------------------------------------------------------------------------------


def exported() -> set[str]:
    texts = [path.read_text(encoding="utf-8") for path in (csrc_dir() / "cpu").glob("*.cpp")]
    names = {name for text in texts for name in re.findall(r"^EXL_API \w+ (exl_\w+)\(", text, re.M)}
    replayed = (re.findall(r"^EXL_REPLAYED\((\w+)\)", text, re.M) for text in texts)
    return names | {f"exl_replay_{name}" for found in replayed for name in found}


def test_every_called_function_is_exported():
    assert {f"exl_{name}" for name in ops.NAMES} == exported()


@pytest.mark.exhaustive
@pytest.mark.skipif(MINGW is None, reason="needs g++ for Windows (g++-mingw-w64-x86-64)")
def test_sources_compile_for_windows_into_a_library_without_dependencies(tmp_path, on_windows):
    sources = sorted((csrc_dir() / "cpu").glob("*.cpp"))
    flags = [flag for flag in compile_flags(GCC, ("amd64",), "x86-64-v3") if flag != "-O3"]
    built = tmp_path / "exl_cpu.dll"
    command = [MINGW, *flags, "-O0", "-Werror", f"-I{csrc_dir()}", *map(str, sources),
               *link_flags(GCC), "-o", str(built)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    objdump = MINGW.replace("g++-posix", "objdump").replace("g++", "objdump")
    words = subprocess.run([objdump, "-p", str(built)], capture_output=True, text=True).stdout
    needed = set(re.findall(r"DLL Name: (\S+)", words))
    assert needed <= {"KERNEL32.dll", "msvcrt.dll"}, needed
    assert exported() <= set(re.findall(r"\bexl_\w+", words))


# ---- The system --------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "win32", reason="needs Windows")
def test_memory_and_cores_on_windows():
    total, free = windows.machine_memory()
    assert 1 << 28 < free <= total < 1 << 50
    before, _ = windows.process_memory()
    block = ctypes.create_string_buffer(b"\1" * (64 << 20))
    resident, peak = windows.process_memory()
    assert resident - before > 48 << 20 and peak >= resident and len(block) > 64 << 20
    assert 1 <= (windows.physical_cores() or 0) <= (os.cpu_count() or 0)


class FakeKernel:
    """kernel32 of a machine with four cores of two processors each."""

    CORES = (0b11, 0b1100, 0b110000, 0b11000000)

    def __init__(self, allowed):
        self.allowed = allowed

    def GetCurrentProcess(self):
        return -1

    def GetProcessAffinityMask(self, process, allowed, present):
        allowed._obj.value = self.allowed
        return 1

    def GetLogicalProcessorInformation(self, found, nbytes):
        size = ctypes.sizeof(windows._Processors)
        nbytes._obj.value = size * (len(self.CORES) + 1)
        if found is None:
            return 0
        found[0].mask, found[0].relationship = 0xFF, 2  # a cache that all share
        for each, mask in zip(list(found)[1:], self.CORES, strict=True):
            each.mask, each.relationship = mask, 0
        return 1


@pytest.mark.parametrize(("allowed", "cores"), [(0xFF, 4), (0b1111, 2), (0b1000_0001, 2)])
def test_processors_of_one_core_count_once(monkeypatch, allowed, cores):
    monkeypatch.setattr(windows, "_kernel32", lambda: FakeKernel(allowed))
    assert ctypes.sizeof(windows._Processors) == 32
    assert windows.physical_cores() == cores


def test_capacity_on_windows(on_windows, monkeypatch, tmp_path):
    monkeypatch.setattr(windows, "machine_memory", lambda: (32 << 30, 20 << 30))
    monkeypatch.setattr(windows, "process_memory", lambda: (1 << 30, 2 << 30))
    found = MainMemory(proc=str(tmp_path), cgroups=str(tmp_path)).capacity("cpu")
    assert (found.capacity_bytes, found.free_bytes) == (32 << 30, 20 << 30)
    assert found.own_bytes == 1 << 30


VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               33280.
Pages active:                            210000.
Pages inactive:                          190000.
Pages speculative:                         1024.
Pages throttled:                              0.
"""


def test_free_memory_on_macos_is_read_from_vm_stat():
    assert vm_stat_free_bytes(VM_STAT) == (33280 + 190000 + 1024) * 16384
    assert vm_stat_free_bytes("command not found") is None


# ---- The web UI's folder -----------------------------------------------------------------------


def test_a_folder_below_a_link_is_not_a_link(tmp_path):
    """The link may be a drive that is mapped to a folder, or a short name."""
    (tmp_path / "real" / "extension").mkdir(parents=True)
    try:
        (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    except OSError:
        pytest.skip("needs the privilege to make symbolic links")
    assert not plugin_files.is_link(tmp_path / "link" / "extension")
    assert plugin_files.is_link(tmp_path / "link")
    (tmp_path / "real" / "extension").rmdir()
    (tmp_path / "real").rmdir()
    assert plugin_files.is_link(tmp_path / "link"), "to where nothing is any more"


def test_a_junction_is_a_link():
    # As Windows describes one: a folder with a mark.
    assert plugin_files._is_junction(SimpleNamespace(st_mode=0o40777, st_reparse_tag=0xA0000003))
    assert not plugin_files._is_junction(SimpleNamespace(st_mode=0o40777, st_reparse_tag=0))


def test_a_link_that_cannot_be_made_becomes_a_copy(tmp_path, monkeypatch):
    """An attempt to make a link may leave a folder."""
    def half_made(target):
        target.mkdir()
        raise OSError("not on this disk")

    monkeypatch.setattr(plugin_files, "_symlink", lambda target: None)
    monkeypatch.setattr(plugin_files, "_junction", half_made)
    target = tmp_path / "extensions" / "exl_loader"
    assert plugin_files.install_extension(target) == "copy"
    assert (target / "script.py").is_file() and plugin_files.extension_is_current(target)


def test_kernels_in_use_are_removed_completely_or_not_at_all(tmp_path, monkeypatch):
    """On Windows a loaded library cannot be deleted, and its folder cannot be renamed."""
    entry = tmp_path / "cpu-0"
    entry.mkdir()
    (entry / "exl_cpu.dll").touch()
    store.seal(entry, "exl_cpu.dll")
    pauses = []
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    refusals = [PermissionError(13, "Access is denied")] * 20

    def rename(self, target):
        if refusals:
            raise refusals.pop()
        os.rename(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KernelBuildError, match="Access is denied.*End the programs"):
        store.discard(entry / "exl_cpu.dll")
    assert store.verify(entry) is not None and len(refusals) == 14 and len(pauses) == 5
    # A scanner lets go after a while.
    del refusals[2:]
    store.discard(entry / "exl_cpu.dll")
    assert list(tmp_path.iterdir()) == []


# ---- Output ------------------------------------------------------------------------------------


NAME = "modèle 模型"


@pytest.mark.parametrize(
    ("encoding", "arguments", "code"),
    [
        ("cp1252", ["generate", NAME, "--ctx-size=64", "--prompt=Ж × 模", "--max-new-tokens=4"], 0),
        ("ascii", ["plan", NAME, "--ctx-size=256"], 0),
        ("ascii", ["plan", "nichts × 模"], 1),
    ],
)
def test_output_works_with_any_code_page(tiny_model, encoding, arguments, code):
    folder = tiny_model(name=NAME)
    environ = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict", "PYTHONUTF8": "0",
               "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-m", "exl_loader", *arguments], cwd=folder.parent,
                          env=environ, capture_output=True, timeout=300)
    assert b"UnicodeEncodeError" not in done.stderr and done.returncode == code, done.stderr
    assert done.stdout if code == 0 else done.stderr
