"""The CPU kernels' sources compile for machines that are not at hand."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from support import REPO

CSRC = REPO / "csrc"
SOURCES = sorted((CSRC / "cpu").glob("*.cpp"))
COMPILER = "aarch64-linux-gnu-g++"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_aarch64_compiles_portable_code(source, tmp_path):
    target = tmp_path / "unit.o"
    subprocess.run(
        [COMPILER, "-std=c++17", "-O0", "-fPIC", "-pthread", "-ffp-contract=off", "-Wall",
         "-Wextra", "-Werror", f"-I{CSRC}", "-c", str(source), "-o", str(target)],
        check=True,
    )  # fmt: skip
    machine = target.read_bytes()[18:20]
    assert machine == (183).to_bytes(2, "little"), "EM_AARCH64 of the ELF header"
