"""The part of doctor about CUDA, with made-up cards and the compilers of this machine."""

import subprocess
import sys

import pytest

from exl_loader.backends.build.build import build_entry
from exl_loader.backends.cuda import compilers
from exl_loader.backends.cuda.compilers import cuda_spec
from exl_loader.commands import doctor_cuda
from exl_loader.commands.doctor_cuda import cuda_rows, examine_cuda
from support.cuda_sources import cuda_compiler, hide_compilers, sample_root


def card(capability, name="NVIDIA Something"):
    return {"name": name, "compute_capability": capability, "memory_bytes": 1 << 34}


@pytest.fixture
def bare(monkeypatch, tmp_path):
    for name, value in hide_compilers(monkeypatch, tmp_path).items():
        monkeypatch.setenv(name, value)
    for name in (compilers.COMPILER_ENV, "CUDA_HOME", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor_cuda, "driver_release", lambda: (12, 8))


def test_nothing_is_missing_without_a_card(bare):
    report, errors = examine_cuda([])
    assert errors == [] and report["kernels"] == [] and report["compilers"] == []
    assert dict(cuda_rows(report)) == {
        "CUDA driver": "12.8", "nvrtc": "none", "nvcc": "none"
    }


def test_a_card_without_a_compiler_names_the_compiler_to_install(bare):
    _, errors = examine_cuda([card("9.0"), card("9.0")])
    (error,) = errors
    assert "pip install nvidia-cuda-nvrtc-cu12" in error.remedy


def test_old_card_is_named(bare):
    (error,) = examine_cuda([card("6.1", "NVIDIA GeForce GTX 1080")])[1]
    assert "GTX 1080" in str(error) and "7.5" in str(error)


def test_an_invalid_environment_variable_is_a_problem(bare, monkeypatch):
    monkeypatch.setenv(compilers.COMPILER_ENV, "gcc")
    report, errors = examine_cuda([])
    assert compilers.COMPILER_ENV in str(errors[0]) and report["compilers"] == []


@pytest.mark.skipif(cuda_compiler("nvrtc") is None, reason="needs NVRTC")
def test_kernels_that_are_compiled_are_found(tmp_path, monkeypatch):
    root = sample_root(tmp_path / "sources")
    monkeypatch.setattr("exl_loader.backends.cuda.compilers.csrc_dir", lambda: root)
    monkeypatch.setenv("EXL_LOADER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv(compilers.COMPILER_ENV, "nvrtc")
    monkeypatch.setattr(doctor_cuda, "driver_release", lambda: None)
    passed = {"card": "cuda:0", "milliseconds": 7}
    monkeypatch.setattr(doctor_cuda, "_check_cards", lambda: [passed])
    report, errors = examine_cuda([card("8.6")])
    assert report["checks"] == []
    assert errors == [] and report["kernels"][0]["current"] is None
    assert "build --cuda-arch sm_86" in dict(cuda_rows(report))["for sm_86"]
    entry = build_entry(cuda_spec((8, 6)))
    report, errors = examine_cuda([card("8.6")])
    assert dict(cuda_rows(report))["for sm_86"] == str(entry.directory)
    assert report["compilers"][0]["version"].startswith("NVRTC ")
    assert "7 ms" in dict(cuda_rows(report))["cuda:0"]


class Kernels:
    """Return the report of a card whose kernels are compiled, and of its self-check."""

    def __init__(self, monkeypatch, *lines, fails=False):
        monkeypatch.setattr(doctor_cuda, "find_cuda_compilers", lambda: [])
        found = {"arch": "sm_90", "compiler": "NVRTC", "current": "/somewhere"}
        monkeypatch.setattr(doctor_cuda, "_kernels_for", lambda gpu, driver: found)
        script = f"print({chr(10).join(lines)!r}); raise SystemExit({int(fails)})"
        real = subprocess.run

        def run(command, **options):
            assert command[1:] == ["-m", "exl_loader.commands.check_cards"]
            return real([sys.executable, "-c", script], **options)

        monkeypatch.setattr(doctor_cuda.subprocess, "run", run)
        self.report, self.errors = examine_cuda([card("9.0")])


def test_a_card_whose_kernels_pass_the_check_is_shown(monkeypatch):
    found = Kernels(monkeypatch, "a driver's word", '{"card": "cuda:0", "milliseconds": 31}')
    assert found.errors == [] and "31 ms" in dict(cuda_rows(found.report))["cuda:0"]


def test_a_card_whose_kernels_fail_the_check_is_a_problem(monkeypatch):
    line = '{"card": "cuda:0", "thing": "its kernels", "actual": "an error of 2", "remedy": "Mend"}'
    found = Kernels(monkeypatch, line)
    (error,) = found.errors
    assert (error.thing, error.actual, error.remedy) == ("its kernels", "an error of 2", "Mend")
    assert dict(cuda_rows(found.report))["cuda:0"] == "an error of 2"


def test_a_check_that_ends_early_is_a_problem(monkeypatch):
    (error,) = Kernels(monkeypatch, fails=True).errors
    assert "exit status 1" in str(error) and "driver" in error.remedy
