"""install.py --webui in doubles of the web UI: install, verify, update, uninstall."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from extension.install import environment, plugin_files, saved_settings, steps
from extension.install import webui as installer
from extension.install.environment import InstallError
from extension.webui.contract import OPTION_DEFAULTS
from support import REPO
from support.webui_double import write_webui

verify = installer.verify


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    """A venv without packages that sees this environment's."""
    folder = tmp_path_factory.mktemp("env") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    site = environment.examine(python).site_packages
    here = environment.examine(Path(sys.executable)).site_packages
    (site / "packages_of_the_tests.pth").write_text(f"{here}\n")
    return folder


@pytest.fixture
def webui(tmp_path, venv, monkeypatch):
    """A web UI whose own environment is the venv, without a trace of the plugin."""
    # Importing PyTorch takes seconds, so only one test verifies.
    monkeypatch.setattr(installer, "verify", lambda root, python: "not verified")
    root = write_webui(tmp_path / "webui")
    (root / "venv").symlink_to(venv)
    yield root
    plugin_files.remove_hook(environment.examine(venv / "bin" / "python").site_packages)


def site_of(root: Path) -> Path:
    return environment.find_python(root).site_packages


def snapshot(root: Path) -> dict[str, str | None]:
    """Return every file and link below a folder with its content."""
    found = {}
    for path in sorted(root.rglob("*")):
        if "venv" in path.relative_to(root).parts or "__pycache__" in path.parts:
            continue
        found[str(path)] = path.read_text() if path.is_file() else None
    return found


def start(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    python = root / "venv" / "bin" / "python"
    return subprocess.run([str(python), "server.py", *arguments], cwd=root, capture_output=True,
                          text=True, timeout=300, env=environment.clean_environment())


def test_install_twice_and_uninstall(webui, capsys, monkeypatch):
    monkeypatch.setattr(installer, "verify", verify)
    before = snapshot(webui)
    installer.install(webui)
    installed = snapshot(webui)
    target = webui / "user_data" / "extensions" / "exl_loader"
    assert target.resolve() == REPO / "extension"
    assert {k: v for k, v in installed.items() if str(target) not in k} == before | {
        str(target.parent): None}
    times = {p: p.stat().st_mtime_ns for p in site_of(webui).glob("exl_loader_webui*")}
    assert "verified: exl_loader 0." in capsys.readouterr().err
    monkeypatch.setattr(installer, "verify", lambda root, python: "not verified")
    installer.install(webui)
    assert capsys.readouterr().err.count("(unchanged)") == 2
    assert {p: p.stat().st_mtime_ns for p in site_of(webui).glob("exl_loader_webui*")} == times
    assert installer.problems(webui) == []
    installer.uninstall(webui)
    target.parent.rmdir()
    assert snapshot(webui) == before
    assert not list(site_of(webui).glob("exl_loader_webui*"))


def test_the_loader_is_registered_before_the_model_loads(webui):
    installer.install(webui)
    result = start(webui, "--loader", "exl2", "--cache-4bit")
    assert "loader ExLlamav2 ctx 0 4bit True" in result.stdout and result.stderr == ""


def test_a_copy_is_complete_and_can_be_renewed(webui):
    installer.install(webui, copy=True)
    target = webui / "user_data" / "extensions" / "exl_loader"
    assert not target.is_symlink()
    assert (target / "exl_loader" / "engine.py").is_file() and (target / "csrc").is_dir()
    result = start(webui, "--loader", "exl2")
    assert "loader ExLlamav2" in result.stdout and result.stderr == ""
    (target / plugin_files.COPY_MARK).write_text('{"source": "elsewhere"}')
    assert "is not up to date" in str(installer.problems(webui)[0])
    installer.install(webui, update=True)
    assert installer.problems(webui) == [] and not target.is_symlink()
    for name in ("webui/loading.py", "exl_loader/checkpoint/config.py"):
        (target / name).unlink()
        assert "is not up to date" in str(installer.problems(webui)[0]), "a file is missing"
        installer.install(webui)
        assert installer.problems(webui) == [] and (target / name).is_file()
    installer.uninstall(webui)
    assert not target.exists()


# What the start files of all earlier installations do with the extension's folder.
EARLIER_START = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
if sys.orig_argv[1:2] == ["server.py"]:
    path = "user_data/extensions/exl_loader/bootstrap.py"
    spec = spec_from_file_location("exl_loader_webui_bootstrap", path)
    bootstrap = module_from_spec(spec)
    spec.loader.exec_module(bootstrap)
    bootstrap.activate("early").start()
"""


@pytest.mark.parametrize("copy", [False, True])
def test_start_files_of_earlier_installations_start_todays_plugin(webui, copy):
    installer.install(webui, copy=copy)
    (site_of(webui) / plugin_files.START).write_text(EARLIER_START)
    assert "is missing or outdated" in str(installer.problems(webui)[0])
    result = start(webui, "--loader", "exl2", "--cache-4bit")
    assert "loader ExLlamav2 ctx 0 4bit True" in result.stdout and result.stderr == ""


def broken_link(root: Path) -> None:
    target = root / "user_data" / "extensions" / "exl_loader"
    target.unlink()
    target.symlink_to(root / "gone")


def broken_bootstrap(root: Path) -> None:
    target = root / "user_data" / "extensions" / "exl_loader"
    target.unlink()
    target.mkdir()
    (target / "bootstrap.py").write_text("raise ValueError('broken')")


def without_engine(root: Path) -> None:
    target = root / "user_data" / "extensions" / "exl_loader"
    target.unlink()
    target.mkdir()
    (target / "bootstrap.py").write_text((REPO / "extension" / "bootstrap.py").read_text())


def broken_registration(root: Path) -> None:
    target = root / "user_data" / "extensions" / "exl_loader"
    target.unlink()
    shutil.copytree(REPO / "extension", target)
    (target / "exl_loader").symlink_to(REPO / "exl_loader")
    (target / "webui" / "registration.py").write_text("def broken(:")


def without_start_file(root: Path) -> None:
    (site_of(root) / plugin_files.START).unlink()


FLAGS = {"cache_8bit": [], "cache_4bit": [], "alpha_value": ["2"], "compress_pos_emb": ["2"],
         "as_llama": [], "chunk_size": ["64"], "embedding_device": ["cpu"],
         "cache_size": ["4096"], "machines": ["tcp://192.0.2.1:29500"]}


@pytest.mark.parametrize(
    "harm", [broken_link, broken_bootstrap, without_engine, broken_registration,
             without_start_file])
def test_a_half_removed_plugin_never_stops_the_webui(webui, harm):
    installer.install(webui)
    harm(webui)
    flags = [word for name, values in FLAGS.items() for word in (f"--{name}", *values)]
    # Without the start file nothing accepts the flags.
    result = start(webui, *([] if harm is without_start_file else flags))
    assert result.returncode == 0 and result.stdout.rstrip().endswith("up")
    assert result.stderr.count("exl_loader:") == 1 and len(result.stderr.splitlines()) == 1
    assert installer.problems(webui), "doctor must report it"


def test_uninstalling_names_the_plugins_flags_in_cmd_flags(webui, capsys):
    assert FLAGS.keys() == OPTION_DEFAULTS.keys()
    assert {flag[2:].replace("-", "_") for flag in saved_settings.FLAGS} == OPTION_DEFAULTS.keys()
    flags = webui / "user_data" / "CMD_FLAGS.txt"
    flags.write_text("# --cache-8bit\n--api --cache_4bit --alpha-value=2.5\n")
    installer.install(webui)
    capsys.readouterr()
    installer.uninstall(webui)
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("remove ")]
    assert said == [f"remove --cache_4bit and --alpha-value=2.5 from {flags}: without the plugin "
                    "the web UI does not start with these flags"]
    assert "--cache_4bit" in flags.read_text(), "the file belongs to the web UI"


def test_other_programs_of_the_environment_are_not_affected(webui):
    installer.install(webui)
    python = str(webui / "venv" / "bin" / "python")
    code = "import sys; print([m for m in sys.modules if m.startswith('exl_loader')])"
    result = subprocess.run([python, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]"
    (webui / "other").mkdir()
    (webui / "other" / "server.py").write_text(code)
    result = subprocess.run([python, "other/server.py"], cwd=webui, capture_output=True, text=True)
    assert result.stdout.strip() == "['exl_loader_webui_start']" and result.stderr == ""


def test_a_folder_that_is_not_ours_is_left_alone(webui):
    target = webui / "user_data" / "extensions" / "exl_loader"
    target.mkdir(parents=True)
    (target / "script.py").write_text("theirs")
    with pytest.raises(InstallError, match="not made by this installer"):
        installer.install(webui)
    assert (target / "script.py").read_text() == "theirs"


def test_refusals_name_the_remedy(tmp_path, webui):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InstallError, match="not the folder of a text-generation-webui"):
        installer.install(tmp_path / "empty")
    old = write_webui(tmp_path / "old", loaders=("loaders_and_params = {",
                                                "loaders_and_params = {'ExLlamav2': [],"))
    with pytest.raises(InstallError, match="has its own ExLlamav2 loader"):
        installer.install(old)
    with pytest.raises(InstallError, match="--python"):
        installer.install(webui, webui / "no-python")
    (webui / "portable_env").mkdir()
    with pytest.raises(InstallError, match="portable"):
        installer.install(webui)


def test_where_the_webuis_python_is_looked_for(tmp_path, monkeypatch):
    root = write_webui(tmp_path / "webui")
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(InstallError, match="was not found"):
        environment.find_python(root)
    for folder in ("active", "webui/venv", "webui/installer_files/env"):
        python = tmp_path / folder / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/sh\nexec {sys.executable} \"$@\"\n")
        python.chmod(0o755)
    asked = []
    monkeypatch.setattr(environment, "examine", lambda path, host: asked.append(path))
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "active"))
    environment.find_python(root)
    (root / "installer_files/env/bin/python").unlink()
    environment.find_python(root)
    (root / "venv/bin/python").unlink()
    environment.find_python(root)
    assert [str(p.relative_to(tmp_path)) for p in asked] == [
        "webui/installer_files/env/bin/python", "webui/venv/bin/python", "active/bin/python"]


CONFIG = """\
# my settings
big-exl2$:
  loader: ExLlamav2
  ctx_size: 8192
  cache_4bit: true
small$:
  loader: 'ExLlamav2_HF'
gguf$:
  loader: llama.cpp
  ctx_size: 4096
ExLlamav2-notes$:
  custom: 'loader: ExLlamav2'
"""


def test_saved_settings_no_longer_name_the_loader(tmp_path):
    path = tmp_path / saved_settings.CONFIG
    path.write_text(CONFIG)
    assert saved_settings.entries(path) == ["big-exl2$", "small$"]
    assert saved_settings.remove_entries(path) == ["big-exl2$", "small$"]
    left = path.read_text()
    expected = CONFIG.replace("  loader: ExLlamav2\n  ctx", "  ctx")
    expected = expected.replace("small$:\n  loader: 'ExLlamav2_HF'\n", "")
    assert left == expected
    assert path.with_name(saved_settings.BACKUP).read_text() == CONFIG
    assert saved_settings.remove_entries(path) == [] and path.read_text() == left


def test_saved_settings_of_a_long_name(tmp_path):
    """YAML writes a key of more than 128 characters after a question mark."""
    path = tmp_path / saved_settings.CONFIG
    path.write_text(f"? {'a' * 130}$\n: loader: ExLlamav2\n  ctx_size: 1\n  cache_4bit: true\n"
                    f"? {'b' * 130}$\n: loader: ExLlamav2_HF\n? {'c' * 130}$\n: ctx_size: 2\n")
    assert saved_settings.remove_entries(path) == [f"{'a' * 130}$", f"{'b' * 130}$"]
    assert path.read_text() == (f"? {'a' * 130}$\n: ctx_size: 1\n  cache_4bit: true\n"
                                f"? {'c' * 130}$\n: ctx_size: 2\n")


def test_saved_settings_are_found_where_the_webui_reads_them(webui, tmp_path):
    elsewhere = tmp_path / "my models"
    elsewhere.mkdir()
    flags = webui / "user_data" / "CMD_FLAGS.txt"
    flags.write_text(f"# --model-dir nowhere\n--api --model-dir '{elsewhere}'\n")
    for folder in (elsewhere, webui / "user_data" / "models"):
        (folder / saved_settings.CONFIG).write_text("a$:\n  loader: ExLlamav2\n  ctx_size: 1\n")
    installer.uninstall(webui)
    for folder in (elsewhere, webui / "user_data" / "models"):
        assert (folder / saved_settings.CONFIG).read_text() == "a$:\n  ctx_size: 1\n"


def test_install_py_reports_and_fails(tmp_path):
    result = subprocess.run([sys.executable, "install.py", "--webui", str(tmp_path)], cwd=REPO,
                            capture_output=True, text=True, env=os.environ | {"LANG": "C"})
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr


def test_doctor_names_problems_and_remedies(webui, capsys):
    from exl_loader.commands.cli import main

    assert main(["doctor", "--webui", str(webui)]) == 1
    said = capsys.readouterr().out
    assert "does not exist" in said and "install.py --webui" in said and "--model" in said
    installer.install(webui)
    assert main(["doctor", "--webui", str(webui)]) == 0
    assert "is ready" in capsys.readouterr().out


# ---- Packages ----


def test_requirements_are_the_projects():
    text = (REPO / "pyproject.toml").read_text()
    block = text.split("dependencies = [", 1)[1].split("]", 1)[0]
    wanted = dict(line.strip(' ",').split(">=") for line in block.strip().splitlines())
    assert environment.REQUIREMENTS == wanted


def python_with(packages: dict[str, str], version=(3, 11, 0)) -> environment.HostPython:
    everything = {name: oldest for name, oldest in environment.REQUIREMENTS.items()} | packages
    present = {k: v for k, v in everything.items() if v}
    return environment.HostPython(Path("python"), version, Path("site"), present)


def test_old_and_missing_packages():
    assert environment.package_problems(python_with({})) == []
    assert environment.package_problems(python_with({"torch": "2.9.1+cu128"})) == []
    (old,) = environment.package_problems(python_with({"torch": "2.4.1"}))
    assert "torch is 2.4.1" in str(old) and "Update the web UI" in str(old)
    (missing,) = environment.package_problems(python_with({"torch": ""}))
    assert "start script" in str(missing)
    (ours,) = environment.package_problems(python_with({"ninja": ""}))
    assert "installs it" in str(ours)
    (python,) = environment.package_problems(python_with({}, (3, 9, 1)))
    assert "3.9.1" in str(python)


def test_only_missing_packages_are_installed_and_others_keep_their_version(monkeypatch):
    asked = []

    def pip(python, arguments):
        held = Path(arguments[2]).read_text()
        asked.append((arguments[3:], held))

    monkeypatch.setattr(steps, "pip", pip)
    assert steps.install_missing(python_with({})) == []
    found = steps.install_missing(python_with({"ninja": "", "torch": "2.9.1+cu128"}))
    assert found == ["ninja"] and len(asked) == 1
    assert asked[0][0] == ["ninja>=1.11"]
    assert "torch==2.9.1+cu128\n" in asked[0][1] and "ninja" not in asked[0][1]


def test_a_failure_to_install_an_optional_package_is_only_reported(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(steps, "pip", lambda python, arguments: asked.append(arguments[3:]))
    bare, complete = python_with({}), python_with({"llguidance": "1.9.1"})
    assert steps.install_extras(complete) == [] == environment.extra_problems(complete)
    assert steps.install_extras(bare) == ["llguidance"] and asked == [["llguidance>=1.9"]]
    (problem,) = environment.extra_problems(bare)
    assert "llguidance is missing" in str(problem) and "grammar" in str(problem)
    (old,) = environment.extra_problems(python_with({"llguidance": "1.2.0"}))
    assert "1.2.0" in str(old)

    def fail(python, arguments):
        raise InstallError("pip install failed: no wheel")

    monkeypatch.setattr(steps, "pip", fail)
    assert steps.install_extras(bare) == []
    said = capsys.readouterr().err
    assert "without llguidance requests with a grammar fail" in said and "no wheel" in said


def test_versions_compare_by_their_numbers():
    for low, high in (("2.6", "2.10.0"), ("1.26.4", "2.0"), ("2.0.0rc1", "2.1"), ("0.20", "0.21")):
        assert environment.older(low, high) and not environment.older(high, low)
    assert not environment.older("4.0.0", "4.0") and not environment.older("2.13.0+cpu", "2.13")
