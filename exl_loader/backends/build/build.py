"""From source to binary, in one replaceable step.

Look for a finished build; take the lock; look again; compile with ninja in a private
directory; seal it and let it appear by one rename (`store.py`). A killed build, a damaged
binary or a lock whose holder died therefore heal themselves on the next call. Compilers end
with the process that wanted them, whatever ends it (`supervise.py`). No PyTorch.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path

from ...utils.errors import KernelBuildError
from ...utils.progress import NullProgress, Progress
from ...utils.system.processes import join_command
from . import supervise
from .lock import build_lock
from .spec import BuildSpec
from .store import Entry, find_entry, publish, seal, verify, writable_dir
from .toolchain import compiler_environment, find_ninja

TASK = "compiling kernels"

# NINJA_STATUS below is "[finished/total] "; ninja writes it when a unit is done.
_STATUS = re.compile(rb"^\[(\d{1,9})/(\d{1,9})\] ")
# Of the output of all compilers the beginning and the end are kept, this much of each.
_KEPT_BYTES = 1 << 18
_MAX_LINE_BYTES = 1 << 16
# In the C locale, which _run_ninja sets.
_DISK_FULL = "No space left on device"
_ERROR_LINE = re.compile(r"\berror\b[: ]", re.IGNORECASE)


def build(
    spec: BuildSpec,
    progress: Progress | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Path:
    """Return the library of a spec, compiling it where no finished build exists.

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
    """Return the finished build of a spec, compiling where there is none.

    Args:
        spec: what to build.
        progress: shows compiling as units done of all, and waiting for another process.
        environ: `EXL_LOADER_CACHE_DIR` says where builds are kept.

    Returns:
        The directory and its files, verified against their checksums.

    Raises:
        KernelBuildError: the compiler failed (its words are in `details`), ninja is missing,
            or the cache folder cannot be written.
    """
    found = find_entry(spec, environ)
    if found is not None:
        return found
    directory = writable_dir(environ)
    target = directory / spec.directory_name
    progress = progress or NullProgress()
    try:
        lock = directory / f"{spec.directory_name}.lock"
        with build_lock(lock, lambda: verify(target, spec.artifacts) is not None, progress) as held:
            found = verify(target, spec.artifacts)
            if found is not None:
                return found
            # Who builds without the lock must not clear away the holder's work.
            suffix = "partial" if held else f"partial-{os.getpid()}"
            return _build_in(target.with_name(f"{target.name}.{suffix}"), target, spec, progress)
    except OSError as error:
        raise _storage_error(directory, error) from error


def _build_in(partial: Path, target: Path, spec: BuildSpec, progress: Progress) -> Entry:
    """Compile in `partial`, which is emptied before and gone afterwards."""
    _clear(partial)
    work = partial / "work"
    partial.mkdir(mode=0o700)
    work.mkdir(mode=0o700)
    try:
        (work / "build.ninja").write_text(ninja_file(spec), encoding="utf-8")
        units = len(spec.sources) + (0 if spec.makes_cubins else 1)
        progress.start(TASK, units, "units")
        try:
            _run_ninja(work, spec, progress)
        finally:
            progress.finish(TASK)
        for name in spec.artifacts:
            (work / name).rename(partial / name)
        shutil.rmtree(work)
        seal(partial, *spec.artifacts)
        return publish(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_left(partial)


def _clear(partial: Path) -> None:
    """Remove what a killed build left; compilers that still write there write to nothing."""
    try:
        partial.rename(partial.with_name(f"{partial.name}-left-{uuid.uuid4().hex}"))
    except FileNotFoundError:
        pass
    _remove_left(partial)


def _remove_left(partial: Path) -> None:
    """Remove what `_clear` put aside, as far as nobody is writing to it."""
    for left in partial.parent.glob(f"{partial.name}-left-*"):
        shutil.rmtree(left, ignore_errors=True)


def _run_ninja(work: Path, spec: BuildSpec, progress: Progress) -> None:
    """Run ninja to its end, counting units; it ends, with its compilers, when this does."""
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
    output = supervise.BoundedOutput(_KEPT_BYTES)
    done = 0
    assert process.stdin is not None and process.stdout is not None
    try:
        # A line of any length comes in parts of this size.
        while line := process.stdout.readline(_MAX_LINE_BYTES):
            status = _STATUS.match(line)
            if status is None:
                output.add(line)
            else:
                progress.advance(TASK, int(status[1]) - done)
                done = int(status[1])
    finally:
        # What still runs has nobody to write to any more, and is told to end.
        process.stdout.close()
        process.stdin.close()
        code = process.wait()
    words = output.get().decode("utf-8", "replace")
    if code == supervise.START_FAILED:
        raise _ninja_error(words.strip())
    if code != 0:
        raise _compile_error(spec, words)


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
    # MSVC needs its include and library paths, which only its own batch file knows.
    script = subprocess.list2cmdline([spec.compiler.environment_script])
    return f'cmd /s /c "{script} >nul && {subprocess.list2cmdline(command)}"'


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ninja_file(spec: BuildSpec) -> str:
    """Write the build as ninja reads it: one compile edge a source; one link edge for a library.
    """
    # ninja holds a compiler's output in memory, whatever its length.
    bounded = (sys.executable, "-I", "-S", os.path.abspath(supervise.__file__), supervise.BOUNDED)
    compiler = _command((*bounded, *spec.compiler.command))
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


def _command(arguments) -> str:
    """Quote arguments for the shell that ninja uses, then for ninja."""
    quoted = join_command(arguments)
    return quoted.replace("$", "$$")


def _path(path: Path) -> str:
    """Quote a path for ninja, which quotes $in for the shell by itself."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def _compile_error(spec: BuildSpec, words: str) -> KernelBuildError:
    """An error whose line is the compiler's first complaint and whose details are all."""
    other = f"EXL_LOADER_CUDA_COMPILER={'nvcc' if spec.compiler.kind == 'nvrtc' else 'nvrtc'}"
    way_out = f"{other} compiles with the other compiler" if spec.makes_cubins else (
        "EXL_LOADER_REFERENCE=1 runs without compiled kernels, slowly"
    )
    complaint = _ERROR_LINE
    if _DISK_FULL in words:
        complaint = re.compile(_DISK_FULL)
        way_out = (
            "Free some space there and among temporary files, or set EXL_LOADER_CACHE_DIR and "
            "TMPDIR to folders on another disk"
        )
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    first = next((line for line in lines if complaint.search(line)), None)
    return KernelBuildError(
        f"compiling kernels with {spec.compiler.version}",
        actual=first or (lines[-1] if lines else "the compiler failed without a word"),
        remedy=f"All of the compiler's words are in the details (--verbose). {way_out}",
        details=words.strip(),
    )


def _storage_error(directory: Path, error: OSError) -> KernelBuildError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return KernelBuildError(
        f"folder for compiled kernels {directory}",
        actual=error.strerror or str(error),
        remedy=("Free some space there" if full else "Make it writable")
        + ", or set EXL_LOADER_CACHE_DIR to another folder",
    )
