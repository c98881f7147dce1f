"""install.py --tabbyapi in doubles of TabbyAPI: install, verify, update, uninstall."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from exl_loader.commands.cli import main
from extension.install import environment, plugin_files, tabbyapi
from extension.install.environment import TABBYAPI, InstallError
from support import REPO

# A TabbyAPI that says which backends it has, after it has imported `common.model`.
MAIN = """
from common import model
print("backends", type(getattr(model, "ExllamaV3Container", None)).__name__, flush=True)
"""
CONFIG = "developer:\n  # for the CPU\n  unsafe_launch: true  # see the docs\n"

verify = tabbyapi.verify


def no_torch(python: Path) -> None:
    raise AssertionError("PyTorch is there")


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    """A venv without packages that sees this environment's."""
    folder = tmp_path_factory.mktemp("env") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = environment.examine(folder / "bin" / "python").site_packages
    here = environment.examine(Path(sys.executable)).site_packages
    (site / "packages_of_the_tests.pth").write_text(f"{here}\n")
    return folder


@pytest.fixture
def root(tmp_path, venv, monkeypatch):
    """A TabbyAPI whose environment is the venv, without a trace of the backend."""
    # Importing PyTorch takes seconds, so only one test verifies.
    monkeypatch.setattr(tabbyapi, "verify", lambda root, python: "not verified")
    root = tmp_path / "tabbyAPI"
    (root / "common").mkdir(parents=True)
    (root / "backends").mkdir()
    (root / "main.py").write_text(MAIN)
    (root / "common" / "model.py").write_text(
        "def validate_backend(backend, hf_model):\n    pass\n")
    (root / "config.yml").write_text(CONFIG)
    (root / "venv").symlink_to(venv)
    yield root
    site = site_of(root)
    plugin_files.remove_extension(site / "exl_loader_tabbyapi")
    plugin_files.remove_hook(site, plugin_files.TABBYAPI_HOOK)


def site_of(root: Path) -> Path:
    return environment.find_python(root, host=TABBYAPI).site_packages


def start(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    python = root / "venv" / "bin" / "python"
    return subprocess.run([str(python), *(arguments or ("main.py",))], cwd=root, text=True,
                          capture_output=True, timeout=120, env=environment.clean_environment())


def installed(root: Path) -> list[str]:
    return sorted(path.name for path in site_of(root).glob("exl_loader_tabbyapi*"))


FILES = ["exl_loader_tabbyapi", "exl_loader_tabbyapi.json", "exl_loader_tabbyapi.pth",
         "exl_loader_tabbyapi_start.py"]


def test_install_twice_and_uninstall(root, capsys, monkeypatch):
    monkeypatch.setattr(tabbyapi, "verify", verify)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()
              and "venv" not in path.parts}
    tabbyapi.install(root, None, no_torch)
    assert installed(root) == FILES
    assert (site_of(root) / "exl_loader_tabbyapi").resolve() == REPO / "extension"
    said = capsys.readouterr().err
    assert "verified: exl_loader 0." in said and "unsafe_launch" in said
    monkeypatch.setattr(tabbyapi, "verify", lambda root, python: "not verified")
    tabbyapi.install(root, None, no_torch)
    assert capsys.readouterr().err.count("(unchanged)") == 2
    assert tabbyapi.problems(root) == []
    tabbyapi.uninstall(root)
    assert installed(root) == []
    assert before == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()
                      and "venv" not in path.parts and "__pycache__" not in path.parts}


def test_the_backend_is_registered_where_tabbyapi_runs_and_nowhere_else(root):
    assert "backends NoneType" in start(root).stdout
    tabbyapi.install(root, None, no_torch)
    result = start(root)
    assert "backends _Chooser" in result.stdout, result.stderr
    listing = "import sys; print([n for n in sys.modules if 'exl_loader' in n])"
    assert start(root, "-c", listing).stdout.strip() == "[]"
    other = root.parent / "main.py"
    other.write_text(listing)
    assert start(root, str(other)).stdout.strip() == "['exl_loader_tabbyapi_start']"


def test_a_copy_is_complete_and_can_be_renewed(root):
    tabbyapi.install(root, None, no_torch, copy=True)
    target = site_of(root) / "exl_loader_tabbyapi"
    assert not target.is_symlink() and (target / "exl_loader" / "engine.py").is_file()
    assert "backends _Chooser" in start(root).stdout
    (target / "tabby" / "options.py").unlink()
    assert "is not up to date" in str(tabbyapi.problems(root)[0])
    tabbyapi.install(root, None, no_torch, update=True)
    assert tabbyapi.problems(root) == [] and not target.is_symlink()


def test_a_backend_that_is_gone_is_one_line_and_tabbyapi_starts(root):
    tabbyapi.install(root, None, no_torch)
    (site_of(root) / "exl_loader_tabbyapi").unlink()
    result = start(root)
    assert "backends NoneType" in result.stdout
    assert result.stderr.count("\n") == 1 and "the backend is not available" in result.stderr
    assert "does not exist" in str(tabbyapi.problems(root)[0])


def test_doctor_names_what_is_missing(root, capsys):
    assert main(["doctor", "--tabbyapi", str(root)]) == 1
    said = capsys.readouterr().out
    assert "does not exist" in said and "start hook" in said and "install.py --tabbyapi" in said
    tabbyapi.install(root, None, no_torch)
    capsys.readouterr()
    assert main(["doctor", "--tabbyapi", str(root)]) == 0
    assert "the backend is ready" in capsys.readouterr().out
    (root / "config.yml").write_text("developer:\n  unsafe_launch: false\n")
    assert main(["doctor", "--tabbyapi", str(root), "--json"]) == 1
    assert "exllamav3 is not installed" in capsys.readouterr().out


def test_another_folder_is_named(tmp_path, capsys):
    with pytest.raises(InstallError, match="main.py or common/model.py is missing"):
        tabbyapi.check_folder(tmp_path)
    assert tabbyapi.main(tmp_path, [], no_torch) == 1
    assert "is not the folder of TabbyAPI" in capsys.readouterr().err


def test_pytorch_is_installed_only_where_tabbyapi_does_not_choose_it(root, monkeypatch):
    bare = environment.HostPython(Path("python"), (3, 11, 0), Path("site"), {})
    asked = []
    monkeypatch.setattr(tabbyapi, "pip", lambda python, arguments: asked.append(arguments))
    assert tabbyapi._install_torch(bare, lambda python: ["torch==2+cpu"]) == ["torch"]
    assert asked == [["install", "torch==2+cpu"]]
    with pytest.raises(InstallError, match="TabbyAPI chooses its version.*start script"):
        tabbyapi._install_torch(bare, lambda python: None)


def test_packages_of_tabbyapis_own_are_refused_with_its_own_remedy():
    everything = dict(environment.REQUIREMENTS)
    del everything["numpy"], everything["ninja"]
    python = environment.HostPython(Path("python"), (3, 11, 0), Path("site"), everything)
    own, ours = environment.package_problems(python, TABBYAPI)[::-1]
    assert "numpy" in str(own) and "TabbyAPI's start script" in str(own)
    assert "ninja" in str(ours) and "installs it" in str(ours)
