"""Text of models, templates and files is escaped before it reaches a terminal."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from itertools import pairwise

import pytest

from exl_loader.commands import chat, generate
from exl_loader.text.chat.template import ChatTemplates
from exl_loader.utils.errors import InvalidTokenizer
from exl_loader.utils.output import TerminalFormatter, TerminalWriter, for_terminal
from support import REPO
from support.tiny import write_tiny_model

HOSTILE = [
    "\x1b]0;title\x07", "\x1b[2J\x1b[H", "\x1b]52;c;ZXZpbA==\x07", "\x9b31m", "a\x08b", "\x7f",
    "\x00", "\x0e", "\x90q\x9c", "over\rwritten", "\x0b", "\x0c", "\x85", "\u202eabc", "\r\r\n",
]
ALLOWED = set("\n\t")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def is_safe(text: str) -> bool:
    return all(character in ALLOWED or character.isprintable() for character in text)


@pytest.mark.parametrize("text", HOSTILE)
def test_control_characters_are_escaped(text):
    shown = for_terminal(f"a{text}z")
    assert is_safe(shown) and "\\" in shown and len(shown) > len(text)


@pytest.mark.parametrize("text", [
    "", "a\tb\n", "größe 🎉 你好 שלום", "\\x1b", "def f():\n\tpass\n",
])
def test_other_text_is_unchanged(text):
    assert for_terminal(text) == text
    assert for_terminal(text.replace("\n", "\r\n")) == text


@pytest.mark.parametrize("cuts", [(), (1,), (2,), (1, 2), (1, 2, 3), (2, 4), (3,)])
def test_pieces_are_escaped_like_the_whole_text(cuts):
    for text in ("\r\n\x1b[", "a\r\nb\r", "\r\r\n\n", "\x1b\r[\r\n"):
        stream = Terminal()
        writer = TerminalWriter(stream)
        for first, last in pairwise((0, *cuts, len(text))):
            writer.write(text[first:last])
        writer.end()
        assert stream.getvalue() == for_terminal(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_pipe_gets_the_unchanged_text(text):
    stream = io.StringIO(newline="")
    writer = TerminalWriter(stream)
    writer.write(text)
    writer.end()
    assert stream.getvalue() == text


class Said(list):
    """A generation, or a chat that answers with it."""

    notices: list[str] = []

    def ask(self, line):
        return iter(self)


def test_text_of_a_model_is_escaped_for_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    generate._stream(Said(HOSTILE), "")
    chat._answer(Said(HOSTILE), "hi", stoppable=True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\x1b[2Jhi\n"))
    assert next(chat._piped_lines()) == "\x1b[2Jhi"
    written = sys.stdout.getvalue()
    assert is_safe(written) and written.count("\\x1b[2J") == 3


def test_messages_of_a_template_are_escaped_for_a_terminal():
    source = "{{ raise_exception('\x1b]0;title\x07 \u202e' ~ '\\x9b') }}"
    with pytest.raises(InvalidTokenizer) as caught:
        ChatTemplates({"default": source}).render([{"role": "user", "content": "x"}])
    assert is_safe(str(caught.value)) and "title" in str(caught.value)


def test_log_lines_are_escaped_for_a_terminal():
    record = logging.makeLogRecord({"msg": "%s", "args": ("\x1b[2J",)})
    assert TerminalFormatter("%(message)s").format(record) == "\\x1b[2J"


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals")
def test_a_terminal_gets_no_control_characters(tmp_path):
    """A model folder whose files are full of escape sequences, with a real terminal."""
    folder = write_tiny_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('\x1b]0;evil\x07') }}")
    controller, terminal = os.openpty()
    code = "import sys\nfrom exl_loader.commands.cli import main\nsys.exit(main(sys.argv[1:]))"
    environ = {**os.environ, "EXL_LOADER_REFERENCE": "1", "TERM": "dumb"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "chat", str(folder), "--ctx-size", "256", "--verbose"],
        cwd=REPO, env=environ, stdin=subprocess.PIPE, stdout=terminal, stderr=terminal,
    )
    os.close(terminal)
    process.stdin.write(b"hello\n")
    process.stdin.close()
    seen = b""
    while True:
        try:
            data = os.read(controller, 65536)
        except OSError:
            break
        if not data:
            break
        seen += data
    os.close(controller)
    assert process.wait() == 1
    assert b"evil" in seen and b"\x1b]0" not in seen and b"\x07" not in seen
