"""A C++ compiler that keeps objects: `python -I -S cached_cc.py FOLDER COMPILER ARGUMENT...`.

Tests build the emulated kernels dozens of times, each time with one changed expression, so most
sources of a build are those of another one. The key of an object is its preprocessed source with
the compiler and the options, but not the folder of the sources. Commands without `-c` are passed
on.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

MOST_OBJECTS = 600


def object_key(command: list[str], source: str) -> str | None:
    """Return the key of what a command compiles; None if the source cannot be preprocessed."""
    preprocess = [argument for argument in command if argument != "-c"] + ["-E", "-P", source]
    answer = subprocess.run(preprocess, capture_output=True)
    if answer.returncode != 0:
        return None
    options = [argument for argument in command if not argument.startswith("-I")]
    return hashlib.sha256("\0".join(options).encode() + answer.stdout).hexdigest()


def keep(target: str, kept: Path) -> None:
    """Copy an object into the folder, and delete the oldest objects if there are many."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=kept.parent, suffix=".partial")
    os.close(handle)
    shutil.copyfile(target, partial)
    os.replace(partial, kept)
    objects = sorted(kept.parent.glob("*.o"), key=lambda path: path.stat().st_mtime)
    for path in objects[:-MOST_OBJECTS]:
        path.unlink(missing_ok=True)


def main(folder: str, *command: str) -> int:
    """Compile, or copy an object that was compiled before."""
    if "-c" not in command:
        return subprocess.call(command)
    *options, minus_c, source, minus_o, target = command
    assert (minus_c, minus_o) == ("-c", "-o"), command
    key = object_key(options, source)
    kept = Path(folder) / f"{key}.o"
    if key is not None and kept.exists():
        shutil.copyfile(kept, target)
        return 0
    code = subprocess.call(command)
    if code == 0 and key is not None:
        keep(target, kept)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
