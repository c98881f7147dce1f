"""Nothing is opened that another user could have written, because it would run as this user.

Some tests need root, to act as another user.
"""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from exl_loader.backends.build import ownership, store
from exl_loader.backends.build.build import build
from exl_loader.backends.build.spec import cpu_spec
from exl_loader.utils.errors import KernelBuildError
from support.builds import needs_compiler, works

pytestmark = pytest.mark.skipif(os.name == "nt", reason="owners and modes of POSIX")
needs_root = pytest.mark.skipif(
    os.name == "nt" or os.geteuid() != 0, reason="only root can act as another user"
)

STRANGER = 65534
NAME = "cpu-0123456789abcdef"


def write_entry(directory: Path, code: bytes = b"code", name: str = "exl_cpu.so") -> Path:
    """Write an entry whose marker is right."""
    directory.mkdir(parents=True, mode=0o700)
    (directory / name).write_bytes(code)
    store.seal(directory, name)
    return directory


def give(path: Path, user: int = STRANGER) -> None:
    """Give a file or folder to another user, with all that is in it."""
    for each in [path, *path.rglob("*")]:
        os.chown(each, user, user, follow_symlinks=False)


@pytest.fixture
def entry(kernel_cache):
    return write_entry(kernel_cache / NAME)


def test_a_directory_that_only_this_user_can_write_is_an_entry(entry):
    assert store.verify(entry).files == (entry / "exl_cpu.so",)
    assert store.verify(entry, ["exl_cpu.so"]) is not None


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_a_umask_does_not_let_others_write(kernel_cache, umask):
    before = os.umask(umask)
    try:
        directory = store.writable_dir()
        entry = write_entry(directory / NAME)
    finally:
        os.umask(before)
    assert store.verify(entry) is not None
    for path in (directory, entry, *entry.iterdir()):
        assert not path.stat().st_mode & 0o022, path


OPENED = {
    "entry for all": ("", 0o777), "entry for a group": ("", 0o770), "sticky entry": ("", 0o1777),
    "library": ("exl_cpu.so", 0o666), "library for a group": ("exl_cpu.so", 0o660),
    "marker": (store.MARKER, 0o646),
}


@pytest.mark.parametrize("opened", OPENED)
def test_a_directory_that_others_may_write_is_no_entry(entry, opened):
    name, mode = OPENED[opened]
    (entry / name).chmod(mode)
    assert store.verify(entry) is None


@needs_root
@pytest.mark.parametrize("name", ["", "exl_cpu.so", store.MARKER])
def test_a_directory_of_another_user_is_no_entry(entry, name):
    os.chown(entry / name, STRANGER, STRANGER)
    assert store.verify(entry) is None


def test_the_owner_is_the_effective_user(entry, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert (store.verify(entry) is None) == (entry.stat().st_uid != 0)


@pytest.mark.parametrize("kind", ["link to a file", "fifo", "folder", "device"])
@pytest.mark.parametrize("name", ["exl_cpu.so", store.MARKER])
def test_a_directory_with_other_than_regular_files_is_no_entry(entry, tmp_path, name, kind):
    path = entry / name
    moved = path.rename(tmp_path / "moved")
    if kind == "fifo":
        os.mkfifo(path, 0o600)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else moved)
    assert store.verify(entry) is None


def test_a_link_to_an_entry_is_no_entry(entry):
    link = entry.with_name("cpu-0000000000000000")
    link.symlink_to(entry)
    assert store.verify(link) is None


@pytest.mark.parametrize("marker", [
    {"../x": {}}, {"/etc/passwd": {}}, {"sub/exl_cpu.so": {}}, {}, {"exl_cpu.so": None},
    {"exl_cpu.so": {"bytes": 4}}, {"..": {}}, {"": {}},
])
def test_a_marker_that_names_other_files_makes_no_entry(entry, marker):
    (entry / store.MARKER).write_text(json.dumps({"files": marker}))
    assert store.verify(entry) is None


@pytest.mark.parametrize("text", ["[" * 30_000, '{"files": ' + " " * 100_000 + "{}}", "\udcff"])
def test_an_unreadable_marker_makes_no_entry(entry, text):
    (entry / store.MARKER).write_text(text, errors="surrogateescape")
    assert store.verify(entry) is None


def test_an_entry_has_the_files_of_its_build(entry):
    assert store.verify(entry, ["exl_cpu.so", "other.so"]) is None
    assert store.verify(entry, ["other.so"]) is None


# The folder


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_a_folder_that_others_could_write_is_put_aside(entry, kernel_cache, mode, caplog):
    (kernel_cache / f"{NAME}.lock").symlink_to("/dev/null")
    kernel_cache.chmod(mode)
    assert store.list_built() == [] and not kernel_cache.exists()
    [aside] = kernel_cache.parent.iterdir()
    assert sorted(path.name for path in aside.iterdir()) == [NAME, f"{NAME}.lock"]
    assert str(kernel_cache) in caplog.text and str(aside) in caplog.text
    assert store.writable_dir() == kernel_cache
    assert stat.S_IMODE(kernel_cache.stat().st_mode) == 0o700
    assert list(kernel_cache.iterdir()) == []


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755])
def test_a_folder_that_others_may_read_keeps_what_it_has(entry, kernel_cache, mode):
    kernel_cache.chmod(mode)
    assert [found.directory for found in store.list_built()] == [entry]
    assert stat.S_IMODE(kernel_cache.stat().st_mode) == 0o700


def test_a_folder_above_that_others_could_write_becomes_sticky(entry, kernel_cache, caplog):
    outer = kernel_cache.parent
    outer.chmod(0o777)
    assert store.list_built() == []
    assert stat.S_IMODE(outer.stat().st_mode) == 0o1777
    assert not kernel_cache.exists() and str(outer) in caplog.text
    # Nobody else can exchange the folder any more.
    write_entry(kernel_cache / NAME)
    assert len(store.list_built()) == 1


def test_a_folder_above_on_a_disk_without_modes_is_refused(kernel_cache, monkeypatch):
    # Such a disk accepts chmod and ignores it.
    kernel_cache.parent.mkdir()
    kernel_cache.parent.chmod(0o777)
    monkeypatch.setattr(Path, "chmod", lambda self, mode: None)
    with pytest.raises(KernelBuildError, match="others can exchange it"):
        store.writable_dir()


def test_links_on_the_way_are_followed(tmp_path, monkeypatch):
    (tmp_path / "open" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to("open/../open/real")
    (tmp_path / "open").chmod(0o777)
    assert ownership.find_open_parent(tmp_path / "link" / "kernels") == tmp_path / "open"
    (tmp_path / "open").chmod(0o755)
    assert ownership.find_open_parent(tmp_path / "link" / "kernels") is None
    (tmp_path / "loop").symlink_to("loop")
    assert ownership.find_open_parent(tmp_path / "loop" / "kernels") is None


@needs_root
@pytest.mark.parametrize("at", ["above", "store", "link"])
def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch, at):
    cache = tmp_path / "cache"
    (cache / "kernels").mkdir(parents=True, mode=0o700)
    environ = {"EXL_LOADER_CACHE_DIR": str(cache)}
    assert store.writable_dir(environ) == cache / "kernels"
    if at == "link":
        cache.rename(tmp_path / "real")
        cache.symlink_to(tmp_path / "real")
        assert store.writable_dir(environ) == cache / "kernels"
        os.chown(cache, STRANGER, STRANGER, follow_symlinks=False)
    else:
        os.chown(cache if at == "above" else cache / "kernels", STRANGER, STRANGER)
    with pytest.raises(KernelBuildError, match="EXL_LOADER_CACHE_DIR to a folder of yours"):
        store.writable_dir(environ)


@pytest.mark.parametrize(("members", "name", "is_open"), [
    ([], "me", False), (["me"], "me", False), (["me", "other"], "me", True), ([], "users", True),
])
def test_a_folder_that_only_this_users_own_group_can_write_is_safe(
    tmp_path, monkeypatch, members, name, is_open
):
    from types import SimpleNamespace

    folder = tmp_path / "home"
    folder.mkdir()
    folder.chmod(0o775)
    gid = folder.stat().st_gid
    monkeypatch.setattr("pwd.getpwuid", lambda uid: SimpleNamespace(pw_name="me", pw_gid=gid))
    monkeypatch.setattr(
        "grp.getgrgid",
        lambda gid: SimpleNamespace(gr_gid=gid, gr_name=name, gr_mem=members),
    )
    assert ownership.find_open_parent(folder / "kernels") == (folder if is_open else None)


@pytest.mark.skipif(not shutil.which("setfacl"), reason="no access control lists")
def test_a_folder_with_an_access_control_list_is_not_safe(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    folder.mkdir()
    done = subprocess.run(["setfacl", "-m", f"u:{STRANGER}:rwx", str(folder)])
    if done.returncode != 0:
        pytest.skip("the disk has no access control lists")
    assert ownership.find_open_parent(folder / "kernels") == folder


# Planted by another user


PLANTED = """
#include <stdio.h>
__attribute__((constructor)) static void planted(void) { puts("PLANTED"); fflush(stdout); }
"""

PLANT = """
import hashlib, json, os, pathlib, sys
store, name, library, how = sys.argv[1:]
data = open(library, "rb").read()
os.umask(0)
# Relative paths from here on, because other users cannot enter the folder of tests.
os.chdir(os.path.dirname(store))
os.setgid(65534), os.setuid(65534)
store = pathlib.Path("kernels")
if how == "replaced store":
    store.rename(store.with_name("moved"))
    store.mkdir()
entry = store / name
if how == "linked entry":
    (store / "elsewhere").mkdir()
    entry.symlink_to("elsewhere")
elif how != "written over":
    entry.mkdir()
with open(entry / "exl_cpu.so", "wb") as file:
    file.write(data)
described = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
with open(entry / "complete.json", "w") as file:
    json.dump({"files": {"exl_cpu.so": described}}, file)
"""

OPEN = """
import sys
from pathlib import Path
from exl_loader.backends.build import spec
sources = Path(sys.argv[1])
spec.csrc_dir = lambda: sources
from exl_loader.backends.cpu.open import open_library
print(open_library().exl_answer())
"""


@pytest.fixture(scope="module")
def planted_library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.c").write_text(PLANTED)
    library = folder / "planted.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(folder / "planted.c")],
                   check=True)
    return library


@needs_root
@needs_compiler
@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
@pytest.mark.parametrize("how", ["new entry", "linked entry", "replaced store", "written over"])
def test_planted_code_does_not_run(kernel_cache, kernel_sources, planted_library, how):
    spec = cpu_spec(kernel_sources)
    name = spec.directory_name
    for folder in (kernel_cache.parent, kernel_cache):
        folder.mkdir()
        folder.chmod(0o777)
    if how == "written over":
        kernel_cache.chmod(0o700)
        entry = build(spec).parent
        for path in (kernel_cache, entry, *entry.iterdir()):
            path.chmod(0o777)
    subprocess.run([sys.executable, "-c", PLANT, str(kernel_cache), name, str(planted_library),
                    how], check=True)
    assert (kernel_cache / name / "exl_cpu.so").read_bytes() == planted_library.read_bytes()
    done = subprocess.run([sys.executable, "-c", OPEN, str(kernel_sources)], text=True,
                          capture_output=True)
    assert "PLANTED" not in done.stdout
    if how == "replaced store":
        # It belongs to another user now.
        assert done.returncode == 1 and "KernelBuildError" in done.stderr
        return
    assert done.stdout == "42\n", done.stderr
    assert stat.S_IMODE(kernel_cache.stat().st_mode) == 0o700
    assert (kernel_cache / name).stat().st_uid == 0
    assert works(build(spec))
