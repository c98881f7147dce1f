"""install.py --webui in made-up web UIs: found, installed, verified, taken out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from extension.install import command, host, place, saved
from extension.install.problems import InstallError
from extension.webui.host import OPTION_DEFAULTS
from support import REPO
from support.webui_double import write_host

verify = command.verify


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A venv without packages that sees this environment's."""
    folder = tmp_path_factory.mktemp("env") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    site = host.examine(python).site_packages
    here = host.examine(Path(sys.executable)).site_packages
    (site / "packages_of_the_tests.pth").write_text(f"{here}\n")
    return folder


@pytest.fixture
def webui(tmp_path, environment, monkeypatch):
    """A web UI whose own environment is the venv, without a trace of the plugin."""
    # Importing PyTorch takes seconds; one test does it for all.
    monkeypatch.setattr(command, "verify", lambda root, python: "not verified")
    root = write_host(tmp_path / "webui")
    (root / "venv").symlink_to(environment)
    yield root
    place.remove_hook(host.examine(environment / "bin" / "python").site_packages)


def site_of(root: Path) -> Path:
    return host.find_python(root).site_packages


def snapshot(root: Path) -> dict[str, str | None]:
    """Every file and link below a folder, and what is in it."""
    found = {}
    for path in sorted(root.rglob("*")):
        if "venv" in path.relative_to(root).parts or "__pycache__" in path.parts:
            continue
        found[str(path)] = path.read_text() if path.is_file() else None
    return found


def start(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    python = root / "venv" / "bin" / "python"
    return subprocess.run([str(python), "server.py", *arguments], cwd=root, capture_output=True,
                          text=True, timeout=300, env=host.clean_environment())


def test_install_twice_and_uninstall(webui, capsys, monkeypatch):
    monkeypatch.setattr(command, "verify", verify)
    before = snapshot(webui)
    command.install(webui)
    installed = snapshot(webui)
    target = webui / "user_data" / "extensions" / "exl_loader"
    assert target.resolve() == REPO / "extension"
    assert {k: v for k, v in installed.items() if str(target) not in k} == before | {
        str(target.parent): None}
    times = {p: p.stat().st_mtime_ns for p in site_of(webui).glob("exl_loader_webui*")}
    assert "verified: exl_loader 0." in capsys.readouterr().err
    monkeypatch.setattr(command, "verify", lambda root, python: "not verified")
    command.install(webui)
    assert capsys.readouterr().err.count("as it should be") == 2
    assert {p: p.stat().st_mtime_ns for p in site_of(webui).glob("exl_loader_webui*")} == times
    assert command.problems(webui) == []
    command.uninstall(webui)
    target.parent.rmdir()
    assert snapshot(webui) == before
    assert not list(site_of(webui).glob("exl_loader_webui*"))


def test_the_loader_is_there_before_the_model_loads(webui):
    command.install(webui)
    result = start(webui, "--loader", "exl2", "--cache-4bit")
    assert "loader ExLlamav2 ctx 0 4bit True" in result.stdout and result.stderr == ""


def test_a_copy_is_whole_and_refreshed(webui):
    command.install(webui, copy=True)
    target = webui / "user_data" / "extensions" / "exl_loader"
    assert not target.is_symlink()
    assert (target / "exl_loader" / "engine.py").is_file() and (target / "csrc").is_dir()
    result = start(webui, "--loader", "exl2")
    assert "loader ExLlamav2" in result.stdout and result.stderr == ""
    (target / place.COPY_MARK).write_text('{"source": "elsewhere"}')
    assert "is not today's" in str(command.problems(webui)[0])
    command.install(webui, update=True)
    assert command.problems(webui) == [] and not target.is_symlink()
    for name in ("webui/loading.py", "exl_loader/checkpoint/config.py"):
        (target / name).unlink()
        assert "is not today's" in str(command.problems(webui)[0]), "something of it is gone"
        command.install(webui)
        assert command.problems(webui) == [] and (target / name).is_file()
    command.uninstall(webui)
    assert not target.exists()


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
    (site_of(root) / place.START).unlink()


FLAGS = {"cache_8bit": [], "cache_4bit": [], "alpha_value": ["2"], "compress_pos_emb": ["2"]}


@pytest.mark.parametrize(
    "harm", [broken_link, broken_bootstrap, without_engine, broken_registration,
             without_start_file])
def test_a_half_removed_plugin_never_stops_the_host(webui, harm):
    command.install(webui)
    harm(webui)
    flags = [word for name, values in FLAGS.items() for word in (f"--{name}", *values)]
    # What would read them is what is missing there.
    result = start(webui, *([] if harm is without_start_file else flags))
    assert result.returncode == 0 and result.stdout.rstrip().endswith("up")
    assert result.stderr.count("exl_loader:") == 1 and len(result.stderr.splitlines()) == 1
    assert command.problems(webui), "doctor has to say something"


def test_the_flags_of_a_start_command_are_named_when_the_plugin_goes(webui, capsys):
    assert FLAGS.keys() == OPTION_DEFAULTS.keys()
    assert {flag[2:].replace("-", "_") for flag in saved.FLAGS} == OPTION_DEFAULTS.keys()
    flags = webui / "user_data" / "CMD_FLAGS.txt"
    flags.write_text("# --cache-8bit\n--api --cache_4bit --alpha-value=2.5\n")
    command.install(webui)
    capsys.readouterr()
    command.uninstall(webui)
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("take ")]
    assert said == [f"take --cache_4bit and --alpha-value=2.5 out of {flags}: without the plugin "
                    "the web UI does not start with that"]
    assert "--cache_4bit" in flags.read_text(), "a file of the web UI's own"


def test_other_programs_of_the_environment_do_not_see_it(webui):
    command.install(webui)
    python = str(webui / "venv" / "bin" / "python")
    code = "import sys; print([m for m in sys.modules if m.startswith('exl_loader')])"
    result = subprocess.run([python, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]"
    (webui / "other").mkdir()
    (webui / "other" / "server.py").write_text(code)
    result = subprocess.run([python, "other/server.py"], cwd=webui, capture_output=True, text=True)
    assert result.stdout.strip() == "['exl_loader_webui_start']" and result.stderr == ""


def test_what_is_not_ours_is_left_alone(webui):
    target = webui / "user_data" / "extensions" / "exl_loader"
    target.mkdir(parents=True)
    (target / "script.py").write_text("theirs")
    with pytest.raises(InstallError, match="not made by this installer"):
        command.install(webui)
    assert (target / "script.py").read_text() == "theirs"


def test_refusals_name_the_remedy(tmp_path, webui):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InstallError, match="not a text-generation-webui folder"):
        command.install(tmp_path / "empty")
    old = write_host(tmp_path / "old", loaders=("loaders_and_params = {",
                                                "loaders_and_params = {'ExLlamav2': [],"))
    with pytest.raises(InstallError, match="has ExLlamav2 itself"):
        command.install(old)
    with pytest.raises(InstallError, match="--python"):
        command.install(webui, webui / "no-python")
    (webui / "portable_env").mkdir()
    with pytest.raises(InstallError, match="portable"):
        command.install(webui)


def test_the_python_is_looked_for_where_it_may_be(tmp_path, monkeypatch):
    root = write_host(tmp_path / "webui")
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(InstallError, match="was not found"):
        host.find_python(root)
    for folder in ("active", "webui/venv", "webui/installer_files/env"):
        python = tmp_path / folder / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/sh\nexec {sys.executable} \"$@\"\n")
        python.chmod(0o755)
    asked = []
    monkeypatch.setattr(host, "examine", lambda path: asked.append(path))
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "active"))
    host.find_python(root)
    (root / "installer_files/env/bin/python").unlink()
    host.find_python(root)
    (root / "venv/bin/python").unlink()
    host.find_python(root)
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
    path = tmp_path / saved.CONFIG
    path.write_text(CONFIG)
    assert saved.entries(path) == ["big-exl2$", "small$"]
    assert saved.remove_entries(path) == ["big-exl2$", "small$"]
    left = path.read_text()
    expected = CONFIG.replace("  loader: ExLlamav2\n  ctx", "  ctx")
    expected = expected.replace("small$:\n  loader: 'ExLlamav2_HF'\n", "")
    assert left == expected
    assert path.with_name(saved.BACKUP).read_text() == CONFIG
    assert saved.remove_entries(path) == [] and path.read_text() == left


def test_saved_settings_of_a_long_name(tmp_path):
    """YAML writes a name of more than 128 characters as a question."""
    path = tmp_path / saved.CONFIG
    path.write_text(f"? {'a' * 130}$\n: loader: ExLlamav2\n  ctx_size: 1\n  cache_4bit: true\n"
                    f"? {'b' * 130}$\n: loader: ExLlamav2_HF\n? {'c' * 130}$\n: ctx_size: 2\n")
    assert saved.remove_entries(path) == [f"{'a' * 130}$", f"{'b' * 130}$"]
    assert path.read_text() == (f"? {'a' * 130}$\n: ctx_size: 1\n  cache_4bit: true\n"
                                f"? {'c' * 130}$\n: ctx_size: 2\n")


def test_saved_settings_are_found_where_the_host_reads_them(webui, tmp_path):
    elsewhere = tmp_path / "my models"
    elsewhere.mkdir()
    flags = webui / "user_data" / "CMD_FLAGS.txt"
    flags.write_text(f"# --model-dir nowhere\n--api --model-dir '{elsewhere}'\n")
    for folder in (elsewhere, webui / "user_data" / "models"):
        (folder / saved.CONFIG).write_text("a$:\n  loader: ExLlamav2\n  ctx_size: 1\n")
    command.uninstall(webui)
    for folder in (elsewhere, webui / "user_data" / "models"):
        assert (folder / saved.CONFIG).read_text() == "a$:\n  ctx_size: 1\n"


def test_install_py_reports_and_fails(tmp_path):
    result = subprocess.run([sys.executable, "install.py", "--webui", str(tmp_path)], cwd=REPO,
                            capture_output=True, text=True, env=os.environ | {"LANG": "C"})
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr


def test_doctor_says_what_is_wrong_and_what_to_do(webui, capsys):
    from exl_loader.commands.cli import main

    assert main(["doctor", "--webui", str(webui)]) == 1
    said = capsys.readouterr().out
    assert "is not there" in said and "install.py --webui" in said and "--model" in said
    command.install(webui)
    assert main(["doctor", "--webui", str(webui)]) == 0
    assert "is ready" in capsys.readouterr().out
