"""The folder of built kernels, and folders and disks that refuse them."""

import errno
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exl_loader.backends.build import store
from exl_loader.backends.build.build import build
from exl_loader.backends.build.spec import cpu_spec
from exl_loader.utils.errors import KernelBuildError
from exl_loader.utils.progress import NullProgress
from support.builds import REPO, find_partials, needs_compiler, works, write_compiler


@needs_compiler
def test_cache_folder_is_private(kernel_cache, kernel_sources):
    library = build(cpu_spec(kernel_sources))
    assert stat.S_IMODE(kernel_cache.stat().st_mode) == 0o700
    # Others could have read it, and not written in it: what it holds stays.
    kernel_cache.chmod(0o755)
    assert store.find_built(cpu_spec(kernel_sources)) == library
    assert stat.S_IMODE(kernel_cache.stat().st_mode) == 0o700


def test_unwritable_cache_is_an_error_with_a_remedy(tmp_path, kernel_sources, monkeypatch):
    (tmp_path / "file").write_text("")
    environ = {"EXL_LOADER_CACHE_DIR": str(tmp_path / "file")}
    with pytest.raises(KernelBuildError, match="Set EXL_LOADER_CACHE_DIR"):
        store.writable_dir(environ)


def test_falls_back_to_temporary_files_where_home_cannot_be_written(tmp_path, monkeypatch, caplog):
    (tmp_path / "home").write_text("a file, so that nothing can be created in it")
    monkeypatch.setattr(store.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.setattr(
        "platformdirs.user_cache_path", lambda *args, **kwargs: tmp_path / "home" / "exl_loader"
    )
    directory = store.writable_dir({})
    assert directory.parent == tmp_path / "tmp"
    (record,) = caplog.records
    assert str(directory) in record.message and str(tmp_path / "home") in record.message
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_link_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "kernels").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KernelBuildError, match="belongs to another user"):
        store.writable_dir({"EXL_LOADER_CACHE_DIR": str(tmp_path / "cache")})


@needs_compiler
def test_full_disk_is_an_error_with_a_remedy(kernel_cache, kernel_sources, monkeypatch):
    def full(directory, library_name):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("exl_loader.backends.build.build.seal", full)
    with pytest.raises(KernelBuildError, match="No space left on device.*Free some space"):
        build(cpu_spec(kernel_sources))
    assert find_partials(kernel_cache) == []


@needs_compiler
def test_a_disk_that_becomes_full_while_the_compiler_writes(
    kernel_cache, kernel_sources, tmp_path, monkeypatch
):
    # The message of binutils.
    message = "/tmp/cc.s: Fatal error: can't write 8 bytes to two.o: 'No space left on device'"
    fails = f'case "$*" in *two.cpp*) echo "{message}"; exit 1 ;; esac'
    script = write_compiler(tmp_path / "g++", fails)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(KernelBuildError, match="No space left.*Free some space") as caught:
        build(cpu_spec(kernel_sources))
    assert message in caught.value.details and "EXL_LOADER_REFERENCE" not in str(caught.value)
    assert find_partials(kernel_cache) == []


# A child process, so that its mounts end with it.
FULL_DISK = """
import subprocess, sys
from pathlib import Path
from exl_loader.utils.errors import KernelBuildError
from exl_loader.backends.build.build import build
from exl_loader.backends.build.spec import cpu_spec
disk, spec = Path(sys.argv[1]), cpu_spec(Path(sys.argv[2]))
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)], check=True)
for size in sys.argv[3:]:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
    try:
        print("built", build(spec).stat().st_size > 0)
    except KernelBuildError as error:
        print(error)
    print([path.name for path in disk.rglob("*partial*")])
"""


@needs_compiler
@pytest.mark.skipif(not shutil.which("unshare"), reason="no unshare")
def test_a_disk_is_full_until_there_is_room(kernel_cache, kernel_sources):
    own = ["unshare", "--map-root-user", "--mount"]
    mount = "mount -t tmpfs tmpfs /tmp"
    if subprocess.run([*own, "sh", "-c", mount], capture_output=True).returncode != 0:
        pytest.skip("nothing may be mounted here")
    disk = kernel_cache.parent
    disk.mkdir()
    # No room for the first object; for all objects, but not for the library; for everything.
    done = subprocess.run(
        [*own, sys.executable, "-c", FULL_DISK, str(disk), str(kernel_sources),
         "4k", "8k", "24k", "1m"],
        cwd=REPO, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    *full, built, left = done.stdout.splitlines()
    assert (built, left) == ("built True", "[]")
    for error, partials in zip(full[::2], full[1::2], strict=True):
        assert "No space left on device" in error and "Free some space" in error, error
        assert "EXL_LOADER_CACHE_DIR" in error and partials == "[]"


@needs_compiler
@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_builds_without_a_lock(
    kernel_cache, kernel_sources, monkeypatch, number
):
    def flock(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    assert works(build(cpu_spec(kernel_sources)))
    assert find_partials(kernel_cache) == []


@needs_compiler
def test_a_folder_on_a_disk_that_became_read_only_still_serves(
    kernel_cache, kernel_sources, monkeypatch
):
    library = build(cpu_spec(kernel_sources))
    kernel_cache.chmod(0o755)

    def refuse(self, *args, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "chmod", refuse)
    monkeypatch.setattr(Path, "rename", refuse)
    assert build(cpu_spec(kernel_sources)) == library
    # But a library that others could have written is not opened.
    os.chmod(kernel_cache, 0o775)
    assert store.find_built(cpu_spec(kernel_sources)) is None
    with pytest.raises(KernelBuildError, match="others could write in it"):
        build(cpu_spec(kernel_sources))


@needs_compiler
def test_a_deleted_folder_is_made_again(kernel_cache, kernel_sources):
    class Vanishing(NullProgress):
        def advance(self, task, n=1):
            shutil.rmtree(kernel_cache, ignore_errors=True)

    spec = cpu_spec(kernel_sources)
    with pytest.raises(KernelBuildError) as caught:
        build(spec, Vanishing())
    assert "\n" not in str(caught.value)
    library = build(spec)
    opened = works(library)
    shutil.rmtree(kernel_cache)
    # An opened library keeps working; the next one is compiled again.
    assert opened and works(build(spec))


@needs_compiler
@pytest.mark.parametrize("moved_s", [-(10**9), 10**6], ids=["back", "forth"])
def test_modification_times_do_not_matter(kernel_cache, kernel_sources, counting_compiler, moved_s):
    for source in kernel_sources.rglob("*.*"):
        os.utime(source, (time.time() + moved_s,) * 2)
    library = build(cpu_spec(kernel_sources))
    os.utime(library, (time.time() - moved_s,) * 2)
    assert build(cpu_spec(kernel_sources)) == library and works(library)
    assert counting_compiler.read_text().count("\n") == 2


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder of `kernel_dirs` among temporary files."""
    monkeypatch.setattr(store.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "tmp" / f"exl_loader-{os.getuid()}"


@pytest.mark.skipif(sys.platform != "linux", reason="variables of Linux")
def test_a_user_without_a_home(temporary, monkeypatch):
    # Without HOME the system's user database still has the user's home.
    assert store.kernel_dirs({})[1:] == [temporary]

    def unknown(user):
        raise KeyError(user)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert store.kernel_dirs({}) == [temporary]
    assert store.writable_dir({}) == temporary
    with pytest.raises(KernelBuildError, match="'~/kernels'.*Name the folder without ~"):
        store.writable_dir({"EXL_LOADER_CACHE_DIR": "~/kernels"})
    # An older platformdirs returns ~ as it is.
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_, **__: Path("~/.cache/x"))
    assert store.kernel_dirs({}) == [temporary]


@pytest.mark.skipif(sys.platform != "linux", reason="variables of Linux")
def test_a_cache_home_that_is_relative_or_no_folder(temporary, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    assert all(folder.is_absolute() for folder in store.kernel_dirs({}))
    assert tmp_path / "caches" / "exl_loader" / "kernels" not in store.kernel_dirs({})
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert store.writable_dir({}) == temporary
