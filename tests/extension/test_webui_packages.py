"""Which packages install.py --webui wants in the web UI's Python, and how it gets them."""

from __future__ import annotations

from pathlib import Path

from extension.install import command, host
from extension.install.problems import InstallError
from support import REPO


def test_requirements_are_the_projects():
    text = (REPO / "pyproject.toml").read_text()
    block = text.split("dependencies = [", 1)[1].split("]", 1)[0]
    wanted = dict(line.strip(' ",').split(">=") for line in block.strip().splitlines())
    assert host.REQUIREMENTS == wanted


def python_with(packages: dict[str, str], version=(3, 11, 0)) -> host.HostPython:
    everything = {name: oldest for name, oldest in host.REQUIREMENTS.items()} | packages
    present = {k: v for k, v in everything.items() if v}
    return host.HostPython(Path("python"), version, Path("site"), present)


def test_old_and_missing_packages():
    assert command.package_problems(python_with({})) == []
    assert command.package_problems(python_with({"torch": "2.9.1+cu128"})) == []
    (old,) = command.package_problems(python_with({"torch": "2.4.1"}))
    assert "torch is 2.4.1" in str(old) and "Update the web UI" in str(old)
    (missing,) = command.package_problems(python_with({"torch": ""}))
    assert "start script" in str(missing)
    (ours,) = command.package_problems(python_with({"ninja": ""}))
    assert "installs it" in str(ours)
    (python,) = command.package_problems(python_with({}, (3, 9, 1)))
    assert "3.9.1" in str(python)


def test_only_what_is_missing_is_installed_and_all_else_is_held(monkeypatch):
    asked = []

    def pip(python, arguments):
        held = Path(arguments[2]).read_text()
        asked.append((arguments[3:], held))

    monkeypatch.setattr(command, "_pip", pip)
    assert command._install_missing(python_with({})) == []
    found = command._install_missing(python_with({"ninja": "", "torch": "2.9.1+cu128"}))
    assert found == ["ninja"] and len(asked) == 1
    assert asked[0][0] == ["ninja>=1.11"]
    assert "torch==2.9.1+cu128\n" in asked[0][1] and "ninja" not in asked[0][1]


def test_extras_are_installed_and_their_failure_is_told_and_no_more(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(command, "_pip", lambda python, arguments: asked.append(arguments[3:]))
    bare, complete = python_with({}), python_with({"llguidance": "1.9.1"})
    assert command._install_extras(complete) == [] == command.extra_problems(complete)
    assert command._install_extras(bare) == ["llguidance"] and asked == [["llguidance>=1.9"]]
    (problem,) = command.extra_problems(bare)
    assert "llguidance is missing" in str(problem) and "grammar" in str(problem)
    (old,) = command.extra_problems(python_with({"llguidance": "1.2.0"}))
    assert "1.2.0" in str(old)

    def fail(python, arguments):
        raise InstallError("pip install failed: no wheel")

    monkeypatch.setattr(command, "_pip", fail)
    assert command._install_extras(bare) == []
    said = capsys.readouterr().err
    assert "without llguidance requests with a grammar fail" in said and "no wheel" in said


def test_versions_compare_by_their_numbers():
    for low, high in (("2.6", "2.10.0"), ("1.26.4", "2.0"), ("2.0.0rc1", "2.1"), ("0.20", "0.21")):
        assert host.older(low, high) and not host.older(high, low)
    assert not host.older("4.0.0", "4.0") and not host.older("2.13.0+cpu", "2.13")
