"""The project as a whole: style and types are clean, and the wheel has what it needs."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support import REPO


def run(*arguments, **options):
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=options.pop("cwd", REPO),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_ruff_finds_nothing():
    pytest.importorskip("ruff")
    run("-m", "ruff", "check", "--no-cache", ".")


def test_no_two_test_files_share_a_name():
    """pytest imports a test file by its name alone, and cannot collect the second one."""
    names = [path.name for path in (REPO / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


# Reading the sources of these packages takes mypy seven times as long as reading ours.
PACKAGES_UNREAD = """
[[tool.mypy.overrides]]
module = ["torch.*", "gradio.*", "transformers.*"]
follow_imports = "skip"
"""



@pytest.mark.parametrize(
    "settings", [PACKAGES_UNREAD, pytest.param("", marks=pytest.mark.exhaustive)],
    ids=["packages unread", "as set"],
)
def test_mypy_finds_nothing(tmp_path, settings):
    pytest.importorskip("mypy")
    config = tmp_path / "mypy.toml"
    config.write_text((REPO / "pyproject.toml").read_text(encoding="utf-8") + settings)
    run("-m", "mypy", "--config-file", str(config), "--cache-dir", str(tmp_path / "cache"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_mypy_finds_nothing_on_other_systems(tmp_path, system):
    pytest.importorskip("mypy")
    config = tmp_path / "mypy.toml"
    config.write_text((REPO / "pyproject.toml").read_text(encoding="utf-8") + PACKAGES_UNREAD)
    run("-m", "mypy", "--platform", system, "--config-file", str(config),
        "--cache-dir", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "hatchling", "build", "-t", "wheel", "-d", str(folder))
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_has_the_kernel_sources_and_the_model(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside in ((REPO / "csrc", "exl_loader/csrc"),
                           (REPO / "exl_loader" / "demo_model", "exl_loader/demo_model")):
        files = {
            f"{inside}/{path.relative_to(folder).as_posix()}"
            for path in folder.rglob("*")
            if path.is_file()
        }
        assert files and files <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "tools/", "benchmarks/")) for name in names)


def test_installed_package_finds_its_kernel_sources(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "from exl_loader.backends.build.spec import csrc_dir, cpu_spec\n"
        "spec = cpu_spec()\n"
        "print(csrc_dir(), spec.key if spec else 'none')\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    folder, key = run("-c", code, cwd=tmp_path, env=environ).split()
    assert Path(folder) == tmp_path / "site" / "exl_loader" / "csrc"
    # The same sources are the same build, wherever they lie.
    assert key == run("-c", code, env={**os.environ, "PYTHONPATH": ""}).split()[1]
