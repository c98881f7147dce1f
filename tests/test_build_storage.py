"""Where built kernels are kept, and folders and disks that will not have them."""

import stat

import pytest
from builds import find_partials, needs_compiler, write_compiler

from exl_loader.errors import KernelBuildError
from exl_loader.kernels import store
from exl_loader.kernels.build import build
from exl_loader.kernels.spec import cpu_spec


@needs_compiler
def test_cache_folder_is_private(kernel_cache, kernel_sources):
    library = build(cpu_spec(kernel_sources))
    assert stat.S_IMODE(kernel_cache.stat().st_mode) == 0o700
    kernel_cache.chmod(0o777)
    assert build(cpu_spec(kernel_sources)) == library
    assert stat.S_IMODE(kernel_cache.stat().st_mode) == 0o700


def test_unwritable_cache_is_an_error_with_a_remedy(tmp_path, kernel_sources, monkeypatch):
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
def test_full_disk_is_an_error_with_a_remedy(kernel_cache, kernel_sources, monkeypatch):
    def full(directory, library_name):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("exl_loader.kernels.build.seal", full)
    with pytest.raises(KernelBuildError, match="No space left on device.*Free some space"):
        build(cpu_spec(kernel_sources))
    assert find_partials(kernel_cache) == []


@needs_compiler
def test_a_disk_that_fills_while_the_compiler_writes(
    kernel_cache, kernel_sources, tmp_path, monkeypatch
):
    # As binutils say it.
    words = "/tmp/cc.s: Fatal error: can't write 8 bytes to two.o: 'No space left on device'"
    fails = f'case "$*" in *two.cpp*) echo "{words}"; exit 1 ;; esac'
    script = write_compiler(tmp_path / "g++", fails)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(KernelBuildError, match="No space left.*Free some space") as caught:
        build(cpu_spec(kernel_sources))
    assert words in caught.value.details and "EXL_LOADER_REFERENCE" not in str(caught.value)
    assert find_partials(kernel_cache) == []


