"""What install.py decides; pip and venv only record their calls."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import unittest.mock

import pytest

from support import REPO


class World:
    """A repository folder of its own, and every command that install.py would have run."""

    def __init__(self, install, root):
        self.install = install
        self.root = root
        self.commands = []
        self.failing = None
        self.interrupts = 0
        self.torch_versions = "torch (2.13.0+cpu)\nAvailable versions: 2.13.0+cpu, 2.13.0"

    def run(self, command, **options):
        words = [str(word) for word in command]
        if "venv" in words:
            python = self.install.venv_python()
            python.parent.mkdir(parents=True)
            python.write_text("")
            return self.done(words)
        if "-c" in words:
            version = "{}.{}\n".format(*sys.version_info[:2])
            return subprocess.CompletedProcess(words, 0, stdout=version, stderr="")
        if "index" in words:
            return subprocess.CompletedProcess(words, 0, stdout=self.torch_versions, stderr="")
        return self.done(words)

    def start(self, command, **options):
        code = self.done([str(word) for word in command]).returncode
        waits = [KeyboardInterrupt] * self.interrupts + [code]
        return unittest.mock.Mock(wait=unittest.mock.Mock(side_effect=waits))

    def done(self, words):
        self.commands.append(" ".join(words))
        code = 1 if self.failing and self.failing in self.commands[-1] else 0
        return subprocess.CompletedProcess(words, code, stdout="its words", stderr="")

    def take(self):
        taken, self.commands = self.commands, []
        return taken


@pytest.fixture
def world(tmp_path, monkeypatch):
    # A copy, so that every path that it computes, and may delete, is in tmp_path.
    (tmp_path / "tools").mkdir()
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "tools" / "pins.txt").write_text("numpy==1\n")
    script = shutil.copy(REPO / "install.py", tmp_path)
    spec = importlib.util.spec_from_file_location("exl_loader_install", script)
    install = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(install)
    world = World(install, tmp_path)
    monkeypatch.setattr(install, "has_nvidia", lambda: False)
    monkeypatch.setattr(install.subprocess, "run", world.run)
    monkeypatch.setattr(install, "run_child", world.run)
    monkeypatch.setattr(install.subprocess, "Popen", world.start)
    monkeypatch.setattr(install.sys, "platform", "linux")
    return world


def call(world, monkeypatch, *arguments):
    monkeypatch.setattr(world.install.sys, "argv", ["install.py", *arguments])
    return world.install.main()


def test_ctrl_c_lets_the_running_program_end_by_itself(world, monkeypatch):
    world.interrupts = 2
    assert call(world, monkeypatch, "--demo", "--no-browser") == 0
    assert "extension.page.server --no-browser" in world.take()[-1]


def test_the_first_run_makes_everything_and_the_second_nothing(world, monkeypatch):
    assert call(world, monkeypatch, "--env") == 0
    commands = world.take()
    assert "-m venv" in commands[0]
    assert any("torch==2.13.0+cpu" in command for command in commands)
    assert all("--constraint" in command for command in commands[1:])
    assert commands[-1].endswith("[extension]")
    assert call(world, monkeypatch, "--env") == 0
    assert world.take() == []


def test_test_adds_to_a_plain_environment_and_runs_pytest(world, monkeypatch):
    call(world, monkeypatch, "--env")
    world.take()
    assert call(world, monkeypatch, "--test", "-x") == 0
    commands = world.take()
    assert not any("-m venv" in command for command in commands)
    assert commands[-2].endswith("[extension,test]")
    assert commands[-1].endswith("-m pytest -x")
    # An environment for the tests serves the demo as well.
    assert call(world, monkeypatch, "--terminal", "--seed", "1") == 0
    (command,) = world.take()
    assert command.endswith("-m exl_loader generate --stats --memory --max-new-tokens 200 --seed 1")


@pytest.mark.parametrize(("terminal", "arguments", "page"), [
    (True, [], "-m extension.page.server"),
    (False, [], None),
    (False, ["--port", "7000"], "-m extension.page.server --port 7000"),
])
def test_demo_writes_text_and_opens_the_page_for_a_person(
    world, monkeypatch, terminal, arguments, page
):
    call(world, monkeypatch, "--env")
    world.take()
    monkeypatch.setattr(world.install.sys.stdout, "isatty", lambda: terminal)
    assert call(world, monkeypatch, "--demo", *arguments) == 0
    text, *pages = world.take()
    assert text.endswith("-m exl_loader generate --stats --memory --max-new-tokens 200")
    assert [command.split("python ", 1)[1] for command in pages] == ([page] if page else [])


@pytest.mark.parametrize("arguments", [["--terminal"], ["--demo", "--terminal"],
                                       ["--terminal", "--demo"]])
def test_terminal_writes_text_and_opens_no_page(world, monkeypatch, arguments):
    call(world, monkeypatch, "--env")
    world.take()
    monkeypatch.setattr(world.install.sys.stdout, "isatty", lambda: True)
    assert call(world, monkeypatch, *arguments, "--seed", "1") == 0
    (text,) = world.take()
    assert text.endswith("-m exl_loader generate --stats --memory --max-new-tokens 200 --seed 1")


def programs(world):
    """What was run, without interpreter and repository."""
    return [command.split("python ", 1)[1].replace(f"{world.root}{os.sep}", "")
            for command in world.take()]


SMOLLM2 = os.path.join("build", "smollm2")
SMOLLM2_EXL2 = os.path.join("build", "smollm2-exl2")
SMOLLM2_MEASUREMENT = os.path.join("tools", "smollm2-measurement.json")


@pytest.mark.parametrize(("arguments", "end"), [
    (["--port", "7000"], f"-m extension.page.server {SMOLLM2_EXL2} --port 7000"),
    (["--terminal", "--seed", "1"], f"-m exl_loader chat {SMOLLM2_EXL2} --seed 1"),
])
def test_the_demo_with_smollm2_downloads_converts_and_opens_a_chat(
    world, monkeypatch, arguments, end
):
    call(world, monkeypatch, "--env")
    world.take()
    assert call(world, monkeypatch, "--demo", "smollm2", *arguments) == 0
    install, *others = programs(world)
    assert install.startswith("-m pip install --constraint") and install.endswith(" gguf")
    assert others == [
        f"tools/smollm2.py {SMOLLM2}",
        f"-m exl_loader convert {SMOLLM2} {SMOLLM2_EXL2} --bits {world.install.SMOLLM2_BITS} "
        f"--measurement {SMOLLM2_MEASUREMENT}",
        f"-m exl_loader plan {SMOLLM2_EXL2}", end,
    ]
    # What is there already is not made again.
    (world.root / SMOLLM2).mkdir(parents=True)
    assert call(world, monkeypatch, "--demo", "smollm2", *arguments) == 0
    assert [line.split()[2] for line in programs(world)[:-1]] == ["convert", "plan"]
    (world.root / SMOLLM2_EXL2).mkdir()
    assert call(world, monkeypatch, "--demo", "smollm2", *arguments) == 0
    assert programs(world) == [f"-m exl_loader plan {SMOLLM2_EXL2}", end]


@pytest.mark.parametrize("failing", ["tools/smollm2.py", "exl_loader convert", "exl_loader plan"])
def test_the_demo_with_smollm2_ends_at_the_step_that_fails(world, monkeypatch, failing):
    call(world, monkeypatch, "--env")
    world.take()
    world.failing = failing
    assert call(world, monkeypatch, "--demo", "smollm2", "--terminal") == 1
    assert failing in programs(world)[-1]


@pytest.mark.parametrize(("task", "packages"), [("--demo", "[extension]"),
                                                ("--test", "[extension,test]")])
def test_env_stops_after_the_environment_of_the_task(world, monkeypatch, task, packages):
    assert call(world, monkeypatch, task, "--env") == 0
    assert world.take()[-1].endswith(packages)


def test_the_page_gets_its_packages_when_the_text_is_written(world, monkeypatch):
    monkeypatch.setattr(world.install.sys.stdout, "isatty", lambda: True)
    assert call(world, monkeypatch, "--demo", "--terminal") == 0
    *_, core, text = world.take()
    assert core.endswith("[hub]") and "generate" in text
    assert call(world, monkeypatch, "--demo") == 0
    text, *further, page = world.take()
    assert "generate" in text and page.endswith("-m extension.page.server")
    assert further[-1].endswith("[extension]")
    # PyTorch and the folder are already there.
    assert not any("torch" in command or "-m venv" in command for command in further)
    assert call(world, monkeypatch, "--demo", "--terminal") == 0
    (text,) = world.take()
    assert "generate" in text


def test_packages_of_the_page_that_fail_leave_the_text_and_the_next_run_continues(
    world, monkeypatch
):
    world.failing = "[extension]"
    with pytest.raises(world.install.SetupError, match=r"pip install .*\[extension\]"):
        call(world, monkeypatch, "--demo", "--no-browser")
    assert any("generate" in command for command in world.take())
    world.failing = None
    assert call(world, monkeypatch, "--demo", "--no-browser") == 0
    commands = world.take()
    assert not any("-m venv" in command for command in commands)
    assert "extension.page.server" in commands[-1]


def test_demo_that_cannot_write_text_opens_no_page(world, monkeypatch):
    monkeypatch.setattr(world.install.sys.stdout, "isatty", lambda: True)
    world.failing = "generate"
    assert call(world, monkeypatch, "--demo") == 1
    assert not any("extension.page" in command for command in world.take())


def test_exit_code_of_the_main_job_is_passed_on(world, monkeypatch):
    world.failing = "-m pytest"
    assert call(world, monkeypatch, "--test") == 1


@pytest.mark.parametrize("changed", ["tools/pins.txt", "pyproject.toml"])
def test_changed_requirements_are_installed(world, monkeypatch, changed):
    call(world, monkeypatch, "--test")
    world.take()
    (world.root / changed).write_text("# changed\n")
    assert call(world, monkeypatch, "--env") == 0
    commands = world.take()
    # Installed test packages stay.
    assert commands and commands[-1].endswith("[extension,test]")


def test_a_killed_setup_starts_again(world, monkeypatch):
    def killed(level, quiet):
        raise KeyboardInterrupt

    install_packages = world.install.install_packages
    monkeypatch.setattr(world.install, "install_packages", killed)
    with pytest.raises(KeyboardInterrupt):
        call(world, monkeypatch, "--env")
    half_a_package = world.install.VENV / "half a package"
    half_a_package.write_text("")
    world.take()
    monkeypatch.setattr(world.install, "install_packages", install_packages)
    assert call(world, monkeypatch, "--env") == 0
    assert "-m venv" in world.take()[0]
    assert not half_a_package.exists()


def test_a_failed_pip_is_an_error_and_the_next_run_continues(world, monkeypatch):
    world.failing = "--editable"
    with pytest.raises(world.install.SetupError, match="pip install .*--editable"):
        call(world, monkeypatch, "--env")
    world.take()
    world.failing = None
    assert call(world, monkeypatch, "--env") == 0
    assert not any("-m venv" in command for command in world.take())


def test_failed_venv_leaves_nothing_and_names_the_package(world, monkeypatch):
    def run(command, **options):
        world.install.VENV.mkdir()
        return subprocess.CompletedProcess(command, 1, stdout="ensurepip is not available")

    monkeypatch.setattr(world.install, "run_child", run)
    with pytest.raises(world.install.SetupError, match="apt install python3-venv"):
        call(world, monkeypatch, "--env")
    assert not world.install.VENV.exists()


def torch_command(world):
    world.install.install_torch()
    (command,) = world.take()
    return command


def test_torch_without_a_gpu_is_the_cpu_build(world):
    command = torch_command(world)
    assert command.endswith("torch==2.13.0+cpu")


def test_torch_comes_from_its_own_index_if_others_lack_the_cpu_build(world):
    world.torch_versions = "torch (2.14.0)\nAvailable versions: 2.14.0, 2.13.0"
    command = torch_command(world)
    assert "torch==2.13.0+cpu" in command
    assert command.endswith(f"--extra-index-url {world.install.TORCH_CPU_INDEX}")


def test_torch_never_falls_back_to_the_cuda_build(world):
    world.failing = "torch"
    with pytest.raises(world.install.SetupError, match="only the CPU build"):
        world.install.install_torch()
    assert all("+cpu" in command for command in world.take())


@pytest.mark.parametrize(("platform", "gpu"), [("linux", True), ("darwin", False)])
def test_torch_on_other_systems_is_the_one_on_pypi(world, monkeypatch, platform, gpu):
    monkeypatch.setattr(world.install.sys, "platform", platform)
    monkeypatch.setattr(world.install, "has_nvidia", lambda: gpu)
    assert torch_command(world).endswith("torch==2.13.0")


def test_an_old_python_is_refused(world, monkeypatch):
    monkeypatch.setattr(world.install.sys, "version_info", (3, 8, 10))
    with pytest.raises(world.install.SetupError, match="needs 3.10 or newer"):
        call(world, monkeypatch, "--demo")


def test_a_damaged_stamp_counts_as_none(world):
    world.install.VENV.mkdir()
    for text in ("", "[]", "{"):
        world.install.STAMP.write_text(text)
        assert world.install.read_stamp() == {}
    world.install.STAMP.write_text(json.dumps({"key": "k"}))
    assert world.install.read_stamp() == {"key": "k"}


def test_wrong_arguments_are_refused_before_anything_is_made(world, monkeypatch):
    wrong = ([], ["--demo", "--test"], ["--demo", "other"], ["--env", "--what"],
             ["--terminal", "--env"], ["--test", "--terminal"], ["--webui", "x", "--terminal"],
             ["--webui", "x", "--env"])
    for arguments in wrong:
        with pytest.raises(SystemExit) as caught:
            call(world, monkeypatch, *arguments)
        assert caught.value.code == 2
    assert world.take() == [] and not world.install.VENV.exists()


def test_every_runtime_dependency_is_pinned_for_every_python():
    pinned = {}
    for line in (REPO / "tools" / "pins.txt").read_text().splitlines():
        match = re.match(r"([a-z0-9.-]+)==\S+?(?:;.*\"(3\.\d+)\")?$", line.replace("; ", ";"))
        assert match or line.startswith("#"), line
        if match:
            pinned.setdefault(match[1], set()).add(match[2])
    project = (REPO / "pyproject.toml").read_text()
    names = re.findall(r'^    "([a-z0-9-]+)(?:\[|>|=|")', project, re.MULTILINE)
    assert "numpy" in names and "pytest" in names
    every = {"3.10", "3.11", "3.12", "3.13"}
    # auto-round needs Python 3.11.
    assert "auto-round>=0.16; python_version >= '3.11'" in project
    assert pinned.pop("auto-round") == every - {"3.10"}
    for name in set(names) - {"torch", "auto-round"}:
        assert pinned.get(name) in ({None}, every), name


@pytest.mark.skipif(os.name == "nt", reason="a bash script")
def test_ci_runs_the_readme_command():
    readme = (REPO / "README.md").read_text()
    assert "python install.py --demo\n" in readme and "python install.py --test\n" in readme
    assert "install.py --test" in (REPO / ".ci" / "run").read_text()
    assert os.access(REPO / ".ci" / "run", os.X_OK)
    assert subprocess.run(["bash", "-n", str(REPO / ".ci" / "run")]).returncode == 0
