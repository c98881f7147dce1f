"""The compilers of CUDA kernels, the cards that they serve, and the keys of builds."""

import dataclasses
import re
import sys

import pytest

from exl_loader.backends.build.toolchain import find_compiler
from exl_loader.backends.cuda import arch, compilers
from exl_loader.backends.cuda.arch import COMMON, known_capabilities, parse_archs, target_for
from exl_loader.backends.cuda.compilers import cuda_spec
from exl_loader.backends.cuda.nvrtc_cc import Nvrtc
from exl_loader.utils.errors import InvalidSettings, KernelBuildError
from exl_loader.utils.system.processes import command_output
from support.cuda_sources import fake_compiler, hide_compilers, make_nvrtc, sample_root

KINDS = compilers.KINDS


@pytest.fixture
def sources(tmp_path):
    return sample_root(tmp_path / "sources")


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
def test_architectures_are_parsed(text, expected):
    assert parse_archs(text) == expected


@pytest.mark.parametrize("text", ["", "sm_70", "6.1", "sm_90a", "hopper", "9", "sm_80,"])
def test_text_that_is_no_architecture_is_refused(text):
    with pytest.raises(InvalidSettings, match="sm_75 or newer"):
        parse_archs(text)


@pytest.mark.parametrize(
    ("capability", "cuda", "name"),
    [
        ((9, 0), (13, 0), "sm_90"),
        # Newer than the release, of a generation that it knows.
        ((12, 1), (12, 8), "sm_120"),
        ((8, 9), (11, 4), "sm_87"),
        ((12, 7), (13, 0), "sm_121"),
        # Of a generation that it does not know: PTX, which the driver compiles.
        ((9, 0), (11, 4), "compute_87"),
        ((12, 0), (12, 6), "compute_90"),
        ((13, 0), (13, 0), "compute_121"),
        ((27, 3), (12, 8), "compute_120"),
    ],
)
def test_newer_cards_are_served_by_their_generation_or_by_ptx(capability, cuda, name):
    assert target_for(capability, known_capabilities(cuda)).name == name


def test_a_compiler_that_knows_newer_cards_only_serves_none():
    assert target_for((8, 6), [(9, 0), (10, 0)]) is None
    assert target_for((8, 6), [(7, 0), (9, 0)]) is None  # the kernels are for 7.5 and newer


def test_old_card_is_refused():
    arch.check_capability((7, 5), "cuda:0")
    with pytest.raises(KernelBuildError, match=r"7.0.*device='cpu'"):
        arch.check_capability((7, 0), "cuda:0")


def test_known_architectures_equal_the_compilers_list(compiler):
    """A compiler knows every architecture that the table lists for its release."""
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
    return hide_compilers(monkeypatch, tmp_path)


def test_without_a_compiler_the_error_says_what_to_install(bare):
    with pytest.raises(KernelBuildError, match="pip install nvidia-cuda-nvrtc ") as caught:
        compilers.choose_cuda_compiler((9, 0), bare)
    assert caught.value.actual == "none"
    with pytest.raises(KernelBuildError, match="pip install nvidia-cuda-nvrtc-cu12"):
        compilers.choose_cuda_compiler((9, 0), bare, driver=(12, 4))


def test_unknown_kind_is_refused(bare):
    with pytest.raises(InvalidSettings, match="nvrtc or nvcc, found 'clang'"):
        compilers.choose_cuda_compiler((9, 0), {**bare, compilers.COMPILER_ENV: "clang"})


@pytest.mark.skipif(sys.platform == "win32", reason="names of Linux")
def test_packages_come_before_toolkits(bare, tmp_path, monkeypatch):
    package = make_nvrtc(tmp_path / "nvidia" / "cu13" / "lib", (13, 5))
    older = make_nvrtc(tmp_path / "nvidia" / "cuda_nvrtc" / "lib", (12, 6))
    toolkit = make_nvrtc(tmp_path / "toolkit" / "lib64", (12, 9))
    environ = {**bare, "CUDA_HOME": str(tmp_path / "toolkit")}
    monkeypatch.setattr(
        compilers, "_package_folders",
        lambda name: [tmp_path / "nvidia"] if name == "nvidia" else [],
    )
    found = list(compilers.find_cuda_compilers(environ))
    assert [one.path for one in found] == [package, older, toolkit]
    assert [one.cuda for one in found] == [(13, 5), (12, 6), (12, 9)]
    assert found[0].compiler.version == "NVRTC 13.5 (4 bytes)"
    # A driver takes cubins of its own generation and older ones.
    assert compilers.choose_cuda_compiler((9, 0), environ).path == package
    assert compilers.choose_cuda_compiler((9, 0), environ, (12, 2)).path == older
    assert compilers.choose_cuda_compiler((12, 0), environ, (12, 9)).path == toolkit
    with pytest.raises(KernelBuildError, match="NVRTC 13.5 .* is newer than the driver"):
        compilers.choose_cuda_compiler((12, 0), environ, (11, 8))


def test_library_without_builtins_is_no_compiler(bare, tmp_path):
    library = make_nvrtc(tmp_path / "toolkit" / "lib64", (13, 0))
    library.with_name("libnvrtc-builtins.so.13.0").unlink()
    assert not list(compilers._find_nvrtc({**bare, "CUDA_HOME": str(tmp_path / "toolkit")}))


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_nvcc_needs_a_host_compiler(bare, tmp_path):
    if find_compiler() is None:
        pytest.skip("no host compiler here")
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    environ = {**bare, "CUDA_HOME": str(tmp_path / "toolkit")}
    assert not list(compilers.find_cuda_compilers(environ))
    environ["CXX"] = find_compiler().command[0]
    (found,) = compilers.find_cuda_compilers(environ)
    assert found.cuda == (12, 4) and found.compiler.kind == "nvcc"
    assert found.compiler.version.startswith("nvcc V12.4.131 with ")


# ---- What is newer or older than expected ------------------------------------------------------


def make_nvcc(folder, release, architectures=()):
    """An nvcc that prints its release and architectures, and compiles nothing."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    lines = "".join(f"echo sm_{number}\n" for number in architectures)
    path.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = --list-gpu-code ]; then\n{lines or "exit 1"}\nexit 0\nfi\n'
        f"echo 'Cuda compilation tools, release {release}, V{release}.1'\n"
    )
    path.chmod(0o755)
    return path


needs_shell = pytest.mark.skipif(
    sys.platform == "win32" or find_compiler() is None, reason="a shell script; a host compiler"
)


@pytest.fixture
def with_nvcc(bare, tmp_path):
    """An environment with an nvcc of a release."""

    def make(release, architectures=()):
        make_nvcc(tmp_path / release, release, architectures)
        return {**bare, "CUDA_HOME": str(tmp_path / release),
                "CXX": find_compiler().command[0]}

    return make


@needs_shell
@pytest.mark.parametrize(("release", "is_old"), [
    ("10.2", True), ("11.4", True), ("11.7", True), ("11.8", False), ("12.0", False),
])  # fmt: skip
def test_a_toolkit_that_is_too_old_is_refused(with_nvcc, release, is_old):
    environ = with_nvcc(release)
    if not is_old:
        assert compilers.choose_cuda_compiler((8, 0), environ).compiler.kind == "nvcc"
        return
    message = f"of CUDA 11.8 or newer, found nvcc V{release}.1 with .* is too old"
    with pytest.raises(KernelBuildError, match=message):
        compilers.choose_cuda_compiler((8, 0), environ)
    with pytest.raises(KernelBuildError, match=message):
        cuda_spec((8, 0), environ=environ)


@needs_shell
@pytest.mark.parametrize(("architectures", "capability", "name"), [
    # The compiler knows these cards, and the table does not.
    ((90, 120, 130), (13, 0), "sm_130"),
    ((90, 130, 132), (13, 1), "sm_130"),
    ((90, 120, 121), (13, 0), "compute_121"),
    ((90, 120), (17, 5), "compute_120"),
    # The compiler does not answer: the newest architecture of the table.
    ((), (13, 0), "compute_121"),
])  # fmt: skip
def test_a_card_newer_than_the_table_runs(with_nvcc, sources, architectures, capability, name):
    environ = with_nvcc("13.9", architectures)
    chosen = compilers.choose_cuda_compiler(capability, environ, (13, 9))
    spec = cuda_spec(capability, compiler=chosen, root=sources)
    assert spec.name == f"cuda_{name}" and spec.flags[0] == f"-arch={name}"
    suffix = ".ptx" if name.startswith("compute") else ".cubin"
    assert spec.artifacts == (f"samples{suffix}",)


@needs_shell
def test_a_release_newer_than_the_table_is_asked(with_nvcc):
    """A newer release may have dropped old architectures."""
    environ = with_nvcc("14.0", (80, 90, 130))
    assert compilers.choose_cuda_compiler((8, 6), environ).cuda == (14, 0)
    with pytest.raises(KernelBuildError, match="nvcc V14.0.1 .* does not know sm_75"):
        compilers.choose_cuda_compiler((7, 5), environ)


@needs_shell
def test_machine_code_is_preferred_to_ptx(with_nvcc, tmp_path, monkeypatch):
    older = make_nvrtc(tmp_path / "nvidia" / "cu12" / "lib", (12, 6))
    monkeypatch.setattr(
        compilers, "_package_folders",
        lambda name: [tmp_path / "nvidia"] if name == "nvidia" else [],
    )
    environ = with_nvcc("12.8")
    assert compilers.choose_cuda_compiler((9, 0), environ).path == older
    assert compilers.choose_cuda_compiler((12, 0), environ).compiler.kind == "nvcc"
    # The driver compiles PTX of its own release and of older ones.
    assert compilers.choose_cuda_compiler((13, 0), environ, (13, 0)).path == older
    with pytest.raises(KernelBuildError, match=r"its PTX is newer than the driver \(12.5\)"):
        compilers.choose_cuda_compiler((13, 0), environ, (12, 5))


def test_compilers_say_which_architectures_they_know(compiler):
    own = compilers._own_capabilities(compiler)
    assert (7, 5) in own and (9, 0) in own and max(own) >= (12, 0)
    assert set(known_capabilities(compiler.cuda)) <= set(own)


# ---- Keys ------------------------------------------------------------------------------------


def test_everything_that_changes_cubins_changes_the_key(sources):
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


def test_only_keys_of_nvrtc_contain_the_shim_of_the_standard_library(sources):
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
