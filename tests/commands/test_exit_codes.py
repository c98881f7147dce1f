"""How the program ends: exit codes, Ctrl-C, closed readers."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from exl_loader.commands import chat, cli, doctor, model_options
from exl_loader.commands.chat import HELP
from extension.install import webui as webui_installer
from support import REPO

posix = pytest.mark.skipif(os.name == "nt", reason="signals and terminals of POSIX")

SMALL = ("--ctx-size", "256")
NO_ROOM = ("--memory-limit", "1KiB")


@pytest.fixture(autouse=True)
def own_machine(monkeypatch):
    """Use the reference operations, and keep this process's own stdin out of the tests."""
    monkeypatch.setenv("EXL_LOADER_REFERENCE", "1")
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))


def test_the_overview_names_every_exit_code(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    listed = {int(code) for code in re.findall(r"^  (\d+) ", shown, re.MULTILINE)}
    assert listed == {0, cli.EXIT_ERROR, 2, cli.EXIT_INTERRUPTED, cli.EXIT_READER_GONE}


@pytest.mark.parametrize(("code", "argv"), [
    (0, ["plan", "MODEL", *SMALL]),
    # Whether a model fits is what a plan answers.
    (0, ["plan", "MODEL", *SMALL, *NO_ROOM]),
    (0, ["generate", "MODEL", *SMALL, "--max-new-tokens", "2"]),
    (0, ["chat", "MODEL", *SMALL, "--max-new-tokens", "2"]),
    (0, ["eval", "MODEL", "--ctx-size", "16", "--cache-type", "fp16", "--text", "TEXT"]),
    (0, ["bench", "MODEL", "-p", "8", "-n", "2", "-r", "1"]),
    *((1, [command, "MODEL", *SMALL, *NO_ROOM, *more]) for command, *more in (
        ["generate"], ["chat"], ["eval", "--text", "TEXT"], ["bench", "-p", "8", "-n", "8"])),
    *((1, [command, "/no/such/folder", *more]) for command, *more in (
        ["generate"], ["chat"], ["plan"], ["eval", "--text", "TEXT"], ["bench"])),
    *((2, [command, "--no-such-option"]) for command in cli.COMMANDS),
    (2, []),
    (2, ["no-such-command"]),
])
def test_exit_codes(code, argv, tiny_model_dir, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("a text of some words\n" * 3)
    names = {"MODEL": str(tiny_model_dir), "TEXT": str(text)}
    try:
        found = cli.main([names.get(word, word) for word in argv])
    except SystemExit as ended:
        found = ended.code
    captured = capsys.readouterr()
    assert found == code, captured.err
    if code == 0:
        assert captured.out
    else:
        start = "error: " if code == 1 else "usage: "
        assert captured.err.startswith(start) and captured.out == ""
        assert code == 2 or captured.err.count("\n") == 1


@pytest.mark.parametrize("problems", [[], [{"problem": "p", "remedy": "r"}]])
def test_doctor_exits_with_1_where_something_is_missing(problems, monkeypatch, capsys):
    report = doctor.examine() | {"problems": problems}
    monkeypatch.setattr(doctor, "examine", lambda: report)
    monkeypatch.setattr(webui_installer, "problems", lambda webui, python: problems)
    expected = 1 if problems else 0
    assert cli.main(["doctor"]) == cli.main(["doctor", "--webui", "folder"]) == expected


@pytest.mark.parametrize(("lines", "code", "answers"), [
    ("hi\nyou\n", 0, 2),
    ("x" * 400 + "\nhi\n", 1, 2),
    ("hi\n" + "x" * 400 + "\n", 1, 2),
    ("hi\n/exit\n" + "x" * 400 + "\n", 0, 1),
])
def test_chat_from_a_pipe_exits_with_1_where_a_message_got_no_answer(
    lines, code, answers, tiny_model_dir, monkeypatch, capsys
):
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    chat = ["chat", str(tiny_model_dir), *SMALL, "--max-new-tokens", "2"]
    assert cli.main(chat) == code
    captured = capsys.readouterr()
    assert captured.out.count("model> ") == answers
    assert captured.err.count("error: ") == code


def test_chat_at_a_terminal_exits_with_0_because_the_error_was_seen(
    tiny_model_dir, monkeypatch, capsys
):
    typed = io.StringIO("x" * 400 + "\n")
    monkeypatch.setattr(typed, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin", typed)
    assert cli.main(["chat", str(tiny_model_dir), *SMALL]) == 0
    assert "error: " in capsys.readouterr().err


class Endless(io.StringIO):
    """A standard input without a line's end, such as /dev/zero; it counts what is read of it."""

    taken = 0

    def read(self, size=-1):
        assert size >= 0, "everything was asked for"
        self.taken += size
        return "a" * size

    readline = read


@pytest.mark.parametrize(("module", "command"), [
    (chat, ["chat"]), (model_options, ["generate", "--prompt-file", "-"]),
])
def test_endless_input_is_read_to_a_limit(module, command, tiny_model_dir, monkeypatch, capsys):
    endless = Endless()
    monkeypatch.setattr("sys.stdin", endless)
    monkeypatch.setattr(module, "TEXT_BYTES", 5000)
    name, *options = command
    assert cli.main([name, str(tiny_model_dir), *SMALL, *options]) == 1
    assert "5000 characters" in capsys.readouterr().err and endless.taken <= 5001


def test_chat_refuses_bytes_that_are_no_text(tiny_model_dir, monkeypatch, capsys):
    # A byte order mark is no part of the first message.
    stream = io.BytesIO("\ufeffho\n".encode() + b"\xff\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(stream, "latin-1"))
    assert cli.main(["chat", str(tiny_model_dir), *SMALL, "--max-new-tokens", "2"]) == 1
    captured = capsys.readouterr()
    assert "error: stdin: expected messages in UTF-8" in captured.err
    assert "bug" not in captured.err


# ---- Readers and Ctrl-C ----------------------------------------------------------------------


@posix
@pytest.mark.parametrize("argv", [
    ["plan", *SMALL], ["generate", *SMALL, "--max-new-tokens", "2"],
    ["generate", *SMALL, "--max-new-tokens", "2", "--json"], ["chat", *SMALL],
])
def test_a_closed_reader_ends_the_program_without_a_message(
    argv, tiny_model_dir, monkeypatch, capsys
):
    readable, writable = os.pipe()
    os.close(readable)
    with os.fdopen(writable, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        code = cli.main([argv[0], str(tiny_model_dir), *argv[1:]])
    assert code == cli.EXIT_READER_GONE
    errors = capsys.readouterr().err.splitlines()
    assert all(line.startswith("this model has no chat template") for line in errors)


@posix
def test_python_itself_does_not_report_the_closed_reader_at_exit():
    process = subprocess.Popen(
        [sys.executable, "-m", "exl_loader", "doctor"],
        cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=300) == cli.EXIT_READER_GONE


def interrupted(args):
    print("so far", end="")
    raise KeyboardInterrupt


def test_interrupt_has_its_own_exit_code(monkeypatch, capsys):
    monkeypatch.setattr("exl_loader.commands.doctor.run", interrupted)
    assert cli.main(["doctor"]) == cli.EXIT_INTERRUPTED == 130
    assert capsys.readouterr().err == ""


@posix
def test_the_program_is_ended_by_the_signal_itself():
    """A shell's loop over models then ends too. The shell reports 130."""
    code = (
        "import sys\nsys.path[:0] = ['tests', 'tests/commands']\n"
        "import test_exit_codes\nfrom exl_loader.commands import doctor\n"
        "from exl_loader.commands import cli\ndoctor.run = test_exit_codes.interrupted\n"
        "sys.argv[1:] = ['doctor']\nsys.exit(cli.main())\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "so far", "")


LONG = ["--ctx-size", "32768", "--max-new-tokens", "32000", "--ban-eos-token"]


@posix
@pytest.mark.slow
def test_ctrl_c_ends_generate(tiny_model_dir):
    argv = [sys.executable, "-m", "exl_loader", "generate", str(tiny_model_dir), "--prompt", "hi"]
    with subprocess.Popen(
        [*argv, *LONG], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPO,
        start_new_session=True, preexec_fn=_default_interrupt,
    ) as process:
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGINT
        assert b"Traceback" not in errors and b"Exception" not in errors


class Terminal:
    """A process whose stdin is a terminal, or a pipe; its stdout is a pipe."""

    def __init__(self, folder: Path, *, terminal: bool) -> None:
        # An answer so long that no machine is through with it before the signal arrives.
        argv = [sys.executable, "-m", "exl_loader", "chat", str(folder), *LONG]
        if terminal:
            self.input, stdin = os.openpty()
        else:
            stdin, self.input = os.pipe()
        self.process = subprocess.Popen(
            argv, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPO,
            text=True, bufsize=0, errors="replace", start_new_session=True,
            preexec_fn=_take_terminal if terminal else _default_interrupt,
        )
        os.close(stdin)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self.input)

    def read_to(self, wanted: str) -> None:
        shown = ""
        while not re.search(wanted, shown, re.DOTALL):
            piece = self.process.stdout.read(1)
            assert piece, shown
            shown += piece


def _default_interrupt() -> None:
    # What a shell starts in the background ignores the signal, and so do its children.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _take_terminal() -> None:
    import fcntl
    import termios

    _default_interrupt()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@posix
@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_program(tiny_model_dir):
    with Terminal(tiny_model_dir, terminal=True) as chat:
        os.write(chat.input, b"hi\n")
        chat.read_to("model> .")
        os.write(chat.input, b"\x03")
        chat.read_to(r"\[stopped\]")
        os.write(chat.input, b"/exit\n")
        _, errors = chat.process.communicate(timeout=300)
        assert chat.process.returncode == 0
        assert HELP in errors and "Traceback" not in errors


@posix
@pytest.mark.slow
def test_ctrl_c_ends_a_chat_whose_messages_come_from_a_pipe(tiny_model_dir):
    with Terminal(tiny_model_dir, terminal=False) as chat:
        os.write(chat.input, b"hi\nyou\n")
        chat.read_to("model> .")
        chat.process.send_signal(signal.SIGINT)
        rest, errors = chat.process.communicate(timeout=300)
        assert chat.process.returncode == -signal.SIGINT
        assert "you>" not in rest and "Traceback" not in errors
