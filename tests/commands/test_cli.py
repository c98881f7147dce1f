"""Subcommands, errors and exit codes of the command line, and `build` and `doctor`."""

import json
import subprocess
import sys
import types

import pytest

from exl_loader.backends.build import toolchain
from exl_loader.backends.build.store import Entry
from exl_loader.commands import build as build_command
from exl_loader.commands import cli, doctor
from exl_loader.utils.errors import KernelBuildError, ModelNotFound
from support import REPO


@pytest.fixture
def subcommand(monkeypatch):
    """Install a subcommand `try` whose run function the test chooses."""

    def install(run):
        module = types.ModuleType("exl_loader_test_subcommand")
        module.add_arguments = lambda parser: parser.add_argument("words", nargs="*")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.COMMANDS, "try", (module.__name__, "a test"))

    return install


def run_process(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "exl_loader", *arguments],
        cwd=REPO, capture_output=True, text=True, **options,
    )


def test_arguments_and_exit_code_pass_through(subcommand):
    subcommand(lambda args: len(args.words))
    assert cli.main(["try", "a", "b", "c"]) == 3


def test_known_errors_are_one_line(subcommand, capsys):
    def run(args):
        raise ModelNotFound("folder x", actual="none", remedy="Give one", details="long\nwords")

    subcommand(run)
    assert cli.main(["try"]) == cli.EXIT_ERROR
    assert capsys.readouterr().err == "error: folder x: none. Give one\n"


def test_verbose_shows_details_and_traceback(subcommand, capsys):
    def run(args):
        raise KernelBuildError("compiling", details="two.cpp:1: error: what?")

    subcommand(run)
    assert cli.main(["try", "--verbose"]) == cli.EXIT_ERROR
    error = capsys.readouterr().err
    assert error.startswith("error: compiling\ntwo.cpp:1: error: what?\nTraceback")


def test_unexpected_errors_are_one_line_too(subcommand, capsys):
    subcommand(lambda args: [][0])
    assert cli.main(["try"]) == cli.EXIT_ERROR
    error = capsys.readouterr().err
    assert error.startswith("error: IndexError: ") and error.count("\n") == 1


def test_a_full_disk_is_not_reported_as_a_bug(subcommand, capsys):
    def run(args):
        raise OSError(28, "No space left on device", *args.words)

    subcommand(run)
    assert cli.main(["try"]) == cli.main(["try", "/f"]) == cli.EXIT_ERROR
    space = "No space left on device\n"
    assert capsys.readouterr().err == f"error: {space}error: /f: {space}"


@pytest.mark.parametrize(("error", "words"), [
    (MemoryError(), "main memory is full"),
    (ModuleNotFoundError("No module named 'jinja2'"), "'jinja2'. `python -m exl_loader doctor`"),
])
def test_missing_memory_and_packages_are_not_reported_as_bugs(error, words, subcommand, capsys):
    def run(args):
        raise error

    subcommand(run)
    assert cli.main(["try"]) == cli.EXIT_ERROR
    shown = capsys.readouterr().err
    assert words in shown and "bug" not in shown and shown.count("\n") == 1


def test_an_error_in_another_python_names_the_environments(
    subcommand, tmp_path, monkeypatch, capsys
):
    python = tmp_path / ".venv" / "bin" / "python"
    assert cli.environment_hint(tmp_path, "/usr") == "", "this Python has everything"
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda _: None)
    assert cli.environment_hint(tmp_path, "/usr") == "", "there is no other"
    python.parent.mkdir(parents=True)
    python.touch()
    assert f"{python} -m exl_loader" in cli.environment_hint(tmp_path, "/usr")
    assert cli.environment_hint(tmp_path, str(tmp_path / ".venv")) == ""
    monkeypatch.setattr(cli, "environment_hint", lambda *_: "the hint")

    def run(args):
        raise ModelNotFound("folder x", actual="none")

    subcommand(run)
    assert cli.main(["try"]) == cli.EXIT_ERROR
    assert capsys.readouterr().err.splitlines()[-1] == "the hint"


def test_closed_standard_streams_are_empty_ones(subcommand, monkeypatch):
    def run(args):
        print("unread", sys.stdin.read(), sys.stdout.isatty())
        return 0

    subcommand(run)
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert cli.main(["try"]) == 0


@pytest.mark.parametrize("command", ["plan", "generate", "chat"])
def test_a_context_that_is_no_number_is_refused_in_words(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "folder", "--ctx-size", "32k"])
    assert "expected a number of tokens such as 32768, or auto, found '32k'" in (
        capsys.readouterr().err)


def test_a_tilde_that_no_shell_expanded_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = cli.parse(["plan", "~/m", "--model-draft=~/d"])
    assert [args.model_dir, args.model_draft] == [str(tmp_path / "m"), str(tmp_path / "d")]
    assert cli.parse(["generate", "~/m"]).model == str(tmp_path / "m")
    assert cli.parse(["eval", "~/m", "--text", "-"]).model == str(tmp_path / "m")


def test_only_the_chosen_subcommand_is_imported(subcommand, monkeypatch):
    subcommand(lambda args: 0)
    monkeypatch.setitem(cli.COMMANDS, "broken", ("exl_loader.no_such_module", "cannot be used"))
    assert cli.main(["try"]) == 0


def test_overview_imports_neither_torch_nor_subcommands():
    code = (
        "import sys\nfrom exl_loader.commands import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "loaded = [name for name in sys.modules if name.startswith('exl_loader.commands.')"
        " and name != 'exl_loader.commands.cli']\n"
        "sys.exit(3 if 'torch' in sys.modules or loaded else 0)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True
    )
    assert result.returncode == 0
    assert "doctor" in result.stdout


def test_doctor_as_json(tmp_path, monkeypatch):
    result = run_process("doctor", "--json")
    report = json.loads(result.stdout)
    assert result.returncode == (1 if report["problems"] else 0)
    assert report["packages"]["numpy"]
    assert report["cpu"]["features"]


@pytest.fixture
def healthy(monkeypatch, tmp_path):
    monkeypatch.setenv("EXL_LOADER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "_version", lambda package: "1.0")
    monkeypatch.setattr(doctor, "cpu_spec", lambda: None)
    compiler = toolchain.Compiler(("g++",), "gcc", "g++ 12.2.0")
    monkeypatch.setattr(toolchain, "find_compiler", lambda: compiler)


def test_doctor_finds_nothing_missing(healthy, capsys):
    assert cli.main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert "g++ 12.2.0" in output and output.endswith("Nothing is missing.\n")


def test_doctor_names_missing_packages(healthy, monkeypatch, capsys):
    monkeypatch.setattr(
        doctor, "_version", lambda package: None if package in ("ninja", "gradio") else "1.0"
    )
    assert cli.main(["doctor"]) == 1
    output = capsys.readouterr().out
    # gradio is for the web interface alone; its absence is nothing to mend.
    assert "packages are missing: ninja\n" in output and "pip install ninja\n" in output


def test_doctor_names_the_compiler_to_install(healthy, monkeypatch, capsys):
    monkeypatch.setattr(toolchain, "find_compiler", lambda: None)
    assert cli.main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "no C++ compiler" in output and toolchain.compiler_remedy() in output


def test_doctor_reports_a_cache_that_cannot_be_written(healthy, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EXL_LOADER_CACHE_DIR", str(tmp_path / "file"))
    assert cli.main(["doctor"]) == 1
    assert "Set EXL_LOADER_CACHE_DIR" in capsys.readouterr().out


def test_doctor_without_the_extension_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "extension.install", None)
    assert cli.main(["doctor", "--webui", "folder"]) == cli.EXIT_ERROR
    assert "an installed package, which has the engine alone" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script replaces nvidia-smi")
def test_doctor_reads_nvidia_smi(tmp_path, monkeypatch):
    script = tmp_path / "nvidia-smi"
    script.write_text(
        "#!/bin/sh\necho '9.0, 143771, 570.1, NVIDIA H200, the long one'\n"
        "echo '9.0, [N/A], 570.1, NVIDIA Odd'\necho 'no devices'\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.find_gpus() == [
        {
            "name": "NVIDIA H200, the long one",
            "memory_bytes": 143771 << 20,
            "driver": "570.1",
            "compute_capability": "9.0",
        }
    ]
    script.write_text("#!/bin/sh\nexit 9\n")
    assert doctor.find_gpus() == []


def test_build_says_what_it_did(tmp_path, monkeypatch, capsys):
    library = tmp_path / "cpu-1" / "exl_cpu.so"
    library.parent.mkdir()
    library.write_bytes(b"1234")
    spec = types.SimpleNamespace(
        compiler=toolchain.Compiler(("g++",), "gcc", "g++ 12.2.0"), flags=("-O3",),
        library_name=library.name,
    )
    entry = Entry(library.parent, (library,))
    found = [None, entry, entry]
    monkeypatch.setattr(build_command, "require_cpu_spec", lambda: spec)
    monkeypatch.setattr(build_command, "find_entry", lambda spec: found.pop(0))
    monkeypatch.setattr(build_command, "build_entry", lambda spec, progress: entry)
    assert cli.main(["build", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["compiled"] is True and result["library_bytes"] == 4
    assert cli.main(["build"]) == 0
    assert capsys.readouterr().out == f"already there: {library}\n"
    discarded = []
    monkeypatch.setattr(build_command, "discard", discarded.append)
    assert cli.main(["build", "--force"]) == 0
    assert discarded == [library]
    assert capsys.readouterr().out.startswith("compiled ")


def test_build_without_compiler_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr("exl_loader.backends.build.spec.find_compiler", lambda environ: None)
    assert cli.main(["build"]) == cli.EXIT_ERROR
    assert toolchain.compiler_remedy() in capsys.readouterr().err
