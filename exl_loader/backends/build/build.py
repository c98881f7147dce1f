"""Compile kernels with ninja, once for all processes, and keep the result.

`build_entry` looks for a finished build and otherwise takes the build's lock, compiles in a
private directory and publishes that directory by one rename (`store.py`). A killed build leaves
only its private directory, which the next build removes. Compilers end with the process that
wanted them (`supervise.py`). No PyTorch.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...utils.errors import KernelBuildError
from ...utils.progress import NullProgress, Progress, task
from ...utils.system.processes import join_command
from . import supervise
from .spec import BuildSpec
from .store import (
    Entry,
    find_entry,
    private_prefix,
    publish,
    remove_private,
    seal,
    verify,
    writable_dir,
)
from .toolchain import compiler_environment, find_ninja

TASK = "compiling kernels"
WAIT_TASK = "waiting for another process, which compiles the same kernels"

# A waiting process asks for the lock this often.
_POLL_S = 0.1
# NINJA_STATUS below is "[finished/total] ". ninja writes it, and the unit's name, in a line when
# a unit is done.
_STATUS = re.compile(rb"^\[(\d{1,9})/\d{1,9}\] .*\n?", re.MULTILINE)
_MAX_STATUS_BYTES = 64
# The beginning and the end of the compilers' output are kept, this much of each.
KEPT_BYTES = 1 << 18
_READ_BYTES = 1 << 16
# In the C locale, which _run_ninja sets.
_DISK_FULL = "No space left on device"
_ERROR_LINE = re.compile(r"\berror\b[: ]", re.IGNORECASE)


def build(
    spec: BuildSpec,
    progress: Progress | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Path:
    """Return the library of a spec; compile it where no finished build exists.

    Args, errors: of `build_entry`.

    Returns:
        Path of the shared library, verified against its checksum.
    """
    return build_entry(spec, progress, environ).directory / spec.library_name


def build_entry(
    spec: BuildSpec,
    progress: Progress | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Entry:
    """Return the finished build of a spec; compile where there is none.

    Args:
        spec: what to build.
        progress: shows compiled units out of all units, and seconds of waiting for another
            process.
        environ: `EXL_LOADER_CACHE_DIR` names the folder in which builds are kept.

    Returns:
        The directory and its files, verified against their checksums.

    Raises:
        KernelBuildError: the compiler failed (its output is in `details`), ninja is missing,
            or the cache folder cannot be written.
    """
    found = find_entry(spec, environ)
    if found is not None:
        return found
    directory = writable_dir(environ)
    target = directory / spec.directory_name
    progress = progress or NullProgress()
    try:
        with _build_lock(directory / f"{target.name}.lock", progress) as is_locked:
            found = verify(target, spec.artifacts)
            if found is not None:
                return found
            if is_locked:
                # Left by killed builds. Without the lock they may belong to running ones.
                remove_private(target)
            return _build_in(directory, target, spec, progress)
    except OSError as error:
        raise _storage_error(directory, error) from error


@contextmanager
def _build_lock(path: Path, progress: Progress) -> Iterator[bool]:
    """Hold the lock on a file during the block, so that one process compiles and others wait.

    The system frees the lock when its holder dies, however it dies. The lock only saves work:
    builds run in private directories and are correct without it.

    Args:
        path: the lock file; it stays.
        progress: shows the seconds of waiting.

    Yields:
        Whether the lock is held. False where the disk has no locks.
    """
    # Imported here, because a load whose kernels are built needs neither it nor its 50 ms.
    from filelock import FileLock

    lock = FileLock(str(path))
    try:
        _acquire(lock, progress)
        is_locked = True
    except (OSError, NotImplementedError):
        # Network and container file systems may have no locks. If the folder has another
        # defect, the build meets it and reports it.
        is_locked = False
    try:
        yield is_locked
    finally:
        lock.release()


def _acquire(lock, progress: Progress) -> None:
    """Wait for a lock of filelock.

    Raises:
        OSError, NotImplementedError: the file cannot be locked.
    """
    from filelock import Timeout

    try:
        lock.acquire(timeout=0)
        return
    except Timeout:
        pass
    with task(progress, WAIT_TASK, None, "s") as advance:
        while True:
            try:
                lock.acquire(timeout=1.0, poll_interval=_POLL_S)
                return
            except Timeout:
                advance(1)


def _build_in(directory: Path, target: Path, spec: BuildSpec, progress: Progress) -> Entry:
    """Compile in a private directory of `directory` and publish it as `target`."""
    # Of mode 0700. The name is unique: compilers that outlived another build write elsewhere.
    private = Path(tempfile.mkdtemp(prefix=private_prefix(target), dir=directory))
    try:
        work = private / "work"
        work.mkdir(mode=0o700)
        (work / "build.ninja").write_text(ninja_file(spec), encoding="utf-8")
        units = len(spec.sources) + (0 if spec.makes_cubins else 1)
        with task(progress, TASK, units, "units"):
            _run_ninja(work, spec, progress)
        for name in spec.artifacts:
            (work / name).rename(private / name)
        shutil.rmtree(work)
        seal(private, *spec.artifacts)
        return publish(private, target)
    finally:
        shutil.rmtree(private, ignore_errors=True)


class BoundedOutput:
    """The beginning and the end of a text of any length, in a fixed amount of memory.

    Args:
        kept_bytes: size of the beginning, and of the end.
    """

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept_bytes = kept_bytes
        self._head = b""
        self._tail = b""
        self._left_out_bytes = 0

    def add(self, data: bytes) -> None:
        """Append to the text."""
        room = self._kept_bytes - len(self._head)
        self._head += data[:room]
        self._tail += data[room:]
        excess = len(self._tail) - self._kept_bytes
        if excess > 0:
            self._left_out_bytes += excess
            self._tail = self._tail[excess:]

    def get(self) -> bytes:
        """Return the kept parts, with a line in place of the part that is left out."""
        if not self._left_out_bytes:
            return self._head + self._tail
        gap = f"\n... {self._left_out_bytes} bytes of output are left out here ...\n"
        return self._head + gap.encode() + self._tail


def _run_ninja(work: Path, spec: BuildSpec, progress: Progress) -> None:
    """Run ninja until it ends, and count compiled units.

    Ninja and its compilers end when this process does, or when `progress` raises.
    """
    environ = {
        **compiler_environment(os.environ, spec.environment),
        "NINJA_STATUS": "[%f/%t] ",
        # GCC and MSVC then write in English.
        "LC_ALL": "C",
        "VSLANG": "1033",
    }
    try:
        process = supervise.start(_ninja_command(work, spec), environ)
    except OSError as error:
        raise _ninja_error(error.strerror or str(error)) from error
    kept = BoundedOutput()
    assert process.stdin is not None and process.stdout is not None
    done = 0
    # The beginning of a line whose end has not been read.
    pending = b""
    try:
        while data := os.read(process.stdout.fileno(), _READ_BYTES):
            kept.add(data)
            for status in _STATUS.finditer(pending + data):
                progress.advance(TASK, int(status[1]) - done)
                done = int(status[1])
            pending = (pending + data).rpartition(b"\n")[2][:_MAX_STATUS_BYTES]
    finally:
        # Closing stdin tells the supervisor to end the running compilers.
        process.stdout.close()
        process.stdin.close()
        code = process.wait()
    output = _STATUS.sub(b"", kept.get()).decode("utf-8", "replace")
    if code == supervise.START_FAILED:
        raise _ninja_error(output.strip())
    if code != 0:
        raise _compile_error(spec, output)


def _ninja_error(reason: str) -> KernelBuildError:
    return KernelBuildError(
        "ninja", actual=reason, remedy="pip install --force-reinstall ninja"
    )


def _ninja_command(work: Path, spec: BuildSpec) -> list[str] | str:
    ninja = find_ninja()
    if ninja is None:
        raise KernelBuildError(
            "ninja", expected="the pip package ninja", actual="none", remedy="pip install ninja"
        )
    command = [ninja, "-C", str(work), "-j", str(_usable_cpus())]
    if spec.compiler.environment_script is None:
        return command
    # Only MSVC's own batch file knows its include and library paths.
    script = subprocess.list2cmdline([spec.compiler.environment_script])
    return f'cmd /s /c "{script} >nul && {subprocess.list2cmdline(command)}"'


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ninja_file(spec: BuildSpec) -> str:
    """Write ninja's file of a build: one compile edge for each source, one link edge for a library.
    """
    compiler = _command(spec.compiler.command)
    flags = _command(spec.flags)
    option = "/I" if spec.compiler.kind == "msvc" else "-I"
    include = _command([f"{option}{(spec.root / name).absolute()}" for name in spec.include_dirs])
    compile_output = "/c $in /Fo$out" if spec.compiler.kind == "msvc" else "-c $in -o $out"
    if spec.makes_cubins:
        compile_output = "$in -o $out"
    lines = ["rule compile", f"  command = {compiler} {flags} {include} {compile_output}"]
    lines.append("  description = $in")
    objects = spec.artifacts
    if not spec.makes_cubins:
        objects = tuple(source.replace("/", "_") + ".o" for source in spec.sources)
        link_output = "/Fe:$out" if spec.compiler.kind == "msvc" else "-o $out"
        link_flags = _command(spec.link_flags)
        lines += ["rule link", f"  command = {compiler} $in {link_flags} {link_output}"]
        lines += ["  description = $out"]
        lines.append(f"build {spec.library_name}: link {' '.join(objects)}")
    for source, made in zip(spec.sources, objects, strict=True):
        lines.append(f"build {made}: compile {_path(spec.root / source)}")
    return "\n".join(lines) + "\n"


def _command(arguments: Sequence[str]) -> str:
    """Quote arguments for the shell that ninja uses, then for ninja."""
    quoted = join_command(arguments)
    return quoted.replace("$", "$$")


def _path(path: Path) -> str:
    """Quote a path for ninja, which itself quotes $in for the shell."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def _compile_error(spec: BuildSpec, output: str) -> KernelBuildError:
    """Make an error from the first error line of a compiler; the whole output is its details."""
    if spec.makes_cubins:
        other = "nvcc" if spec.compiler.kind == "nvrtc" else "nvrtc"
        remedy = f"EXL_LOADER_CUDA_COMPILER={other} compiles with the other compiler"
    else:
        remedy = "EXL_LOADER_REFERENCE=1 runs without compiled kernels, slowly"
    pattern = _ERROR_LINE
    if _DISK_FULL in output:
        pattern = re.compile(_DISK_FULL)
        remedy = (
            "Free some space there and among temporary files, or set EXL_LOADER_CACHE_DIR and "
            "TMPDIR to folders on another disk"
        )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    first = next((line for line in lines if pattern.search(line)), None)
    return KernelBuildError(
        f"compiling kernels with {spec.compiler.version}",
        actual=first or (lines[-1] if lines else "the compiler failed without any output"),
        remedy=f"The compiler's whole output is in the details (--verbose). {remedy}",
        details=output.strip(),
    )


def _storage_error(directory: Path, error: OSError) -> KernelBuildError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return KernelBuildError(
        f"folder for compiled kernels {directory}",
        actual=error.strerror or str(error),
        remedy=("Free some space there" if full else "Make it writable")
        + ", or set EXL_LOADER_CACHE_DIR to another folder",
    )
