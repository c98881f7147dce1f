"""What doctor says of CUDA. Cards are made up, compilers are those that are here."""

import pytest
from cuda_sources import cuda_compiler, hide_compilers, sample_root

from exl_loader.commands import doctor_cuda
from exl_loader.commands.doctor_cuda import cuda_rows, examine_cuda
from exl_loader.kernels.build import build_entry
from exl_loader.kernels.cuda import toolchain
from exl_loader.kernels.cuda.spec import cuda_spec


def card(capability, name="NVIDIA Something"):
    return {"name": name, "compute_capability": capability, "memory_bytes": 1 << 34}


@pytest.fixture
def bare(monkeypatch, tmp_path):
    for name, value in hide_compilers(monkeypatch, tmp_path).items():
        monkeypatch.setenv(name, value)
    for name in (toolchain.COMPILER_ENV, "CUDA_HOME", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor_cuda, "driver_release", lambda: (12, 8))


def test_machine_without_a_card_misses_nothing(bare):
    report, errors = examine_cuda([])
    assert errors == [] and report["kernels"] == [] and report["compilers"] == []
    assert dict(cuda_rows(report)) == {
        "CUDA driver": "12.8", "nvrtc": "none", "nvcc": "none"
    }


def test_card_without_a_compiler_says_what_to_install(bare):
    _, errors = examine_cuda([card("9.0"), card("9.0")])
    (error,) = errors
    assert "pip install nvidia-cuda-nvrtc-cu12" in error.remedy


def test_old_card_is_named(bare):
    (error,) = examine_cuda([card("6.1", "NVIDIA GeForce GTX 1080")])[1]
    assert "GTX 1080" in str(error) and "7.5" in str(error)


def test_wrong_setting_is_a_problem(bare, monkeypatch):
    monkeypatch.setenv(toolchain.COMPILER_ENV, "gcc")
    report, errors = examine_cuda([])
    assert toolchain.COMPILER_ENV in str(errors[0]) and report["compilers"] == []


@pytest.mark.skipif(cuda_compiler("nvrtc") is None, reason="needs NVRTC")
def test_kernels_that_are_compiled_are_found(tmp_path, monkeypatch):
    root = sample_root(tmp_path / "sources")
    monkeypatch.setattr("exl_loader.kernels.cuda.spec.csrc_dir", lambda: root)
    monkeypatch.setenv("EXL_LOADER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv(toolchain.COMPILER_ENV, "nvrtc")
    monkeypatch.setattr(doctor_cuda, "driver_release", lambda: None)
    report, errors = examine_cuda([card("8.6")])
    assert errors == [] and report["kernels"][0]["current"] is None
    assert "build --cuda-arch sm_86" in dict(cuda_rows(report))["for sm_86"]
    entry = build_entry(cuda_spec((8, 6)))
    report, errors = examine_cuda([card("8.6")])
    assert dict(cuda_rows(report))["for sm_86"] == str(entry.directory)
    assert report["compilers"][0]["version"].startswith("NVRTC ")
