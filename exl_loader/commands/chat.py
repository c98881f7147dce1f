"""`python -m exl_loader chat`: talk to a model in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..generation.settings import SamplingSettings
from ..text.chat.fitting import context_notice, fit_messages
from ..utils.errors import ExlLoaderError, InvalidSettings
from ..utils.progress import NullProgress, Progress, default_progress
from ..utils.terminal import TerminalWriter
from ..utils.untrusted_files import TEXT_BYTES
from .model_options import (
    add_load_arguments,
    add_sampling_arguments,
    open_model,
    sampling_settings,
    use_utf8,
)

if TYPE_CHECKING:
    from ..engine import LoadedModel
    from ..generation.generation import TextGeneration

YOU, MODEL = "you> ", "model> "
HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"

# For models without a template: what most untrained ones can follow.
PLAIN_ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}
PLAIN_STOPS = ("\nUser:", "\nSystem:")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    add_load_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Read lines, answer each; until the input ends.

    Returns:
        The exit code: 1 where messages came from a pipe or a file and one got no answer. A
        person at a terminal has seen it.

    Raises:
        ExlLoaderError: the folder or an option is wrong, the model has no tokenizer, or the
            input is no UTF-8.
    """
    settings = sampling_settings(args)
    progress = default_progress()
    talks = sys.stdin.isatty()
    failed = False
    with open_model(args, progress) as model:
        chat = Chat(model, settings, args.system, progress)
        if not chat.has_template:
            print("this model has no chat template; using plain User:/Assistant: lines",
                  file=sys.stderr)
        if talks:
            print(HELP, file=sys.stderr)
        lines = _typed_lines() if talks else _piped_lines()
        for line in lines:
            if line == "/exit":
                break
            if line == "/reset":
                chat.reset()
            elif line and not _answer(chat, line, stoppable=talks):
                failed = True
    return 1 if failed and not talks else 0


class Chat:
    """A conversation with a model.

    Args:
        model: has a tokenizer.
        settings: of every answer.
        system: the system message, None for none.
        progress: told about long prompts.

    Attributes:
        messages: the conversation, without the system message.
        notices: what was left out or cut off since the list was emptied, a line each.
    """

    def __init__(
        self, model: LoadedModel, settings: SamplingSettings, system: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._model = model
        self._progress = progress or NullProgress()
        self._system = [{"role": "system", "content": system}] if system else []
        self.has_template = bool(model.tokenizer.chat_templates)
        stops = () if self.has_template else PLAIN_STOPS
        self._settings = replace(settings, stop_strings=(*settings.stop_strings, *stops))
        self.messages: list[dict[str, str]] = []
        self.notices: list[str] = []

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = []

    def ask(self, text: str):
        """Yield the answer's pieces; it joins the conversation, as far as it was read.

        Messages are dropped from the oldest on until the answer asked for fits into the
        context; `notices` says so, and where an answer ends because the context is full.

        Raises:
            PromptTooLong: this message alone is too long; the conversation is as before.
            ExlLoaderError: the template refuses the conversation, which is as before.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            generation = self._generate()
        except ExlLoaderError:
            self.messages = before
            raise
        answer = ""
        try:
            with generation:
                for piece in generation:
                    answer += piece
                    yield piece
        finally:
            self.messages.append({"role": "assistant", "content": answer.strip()})
        if generation.finish_reason == "context":
            self.notices.append(
                context_notice(self._model.ctx_size, generation.stats.new_tokens)
            )

    def _generate(self) -> TextGeneration:
        fitted = fit_messages(
            self.messages, self._prompt_ids, self._model.ctx_size, self._settings.max_new_tokens
        )
        generation = self._model.generate(fitted.ids, self._settings, progress=self._progress)
        if fitted.dropped:
            self.messages = self.messages[fitted.dropped :]
            self.notices.append(fitted.notice)
        return generation

    def _prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
        messages = [*self._system, *messages]
        if self.has_template:
            return self._model.chat_ids(messages)
        lines = [f"{PLAIN_ROLES[m['role']]}: {m['content']}\n" for m in messages]
        tokenizer = self._model.tokenizer
        return tokenizer.prompt_ids("".join(lines) + "Assistant:")


def _typed_lines() -> Iterator[str]:
    """Read messages that a person types; Ctrl-C drops a line."""
    while True:
        try:
            yield input(YOU).strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(f"\n{HELP}", file=sys.stderr)


def _piped_lines() -> Iterator[str]:
    """Read messages from a pipe or a file, and write each down: nobody saw it being typed.

    Raises:
        InvalidSettings: the input is no UTF-8, or a line has more characters than any text.
    """
    use_utf8(sys.stdin)
    while True:
        print(YOU, end="", flush=True)
        try:
            line = sys.stdin.readline(TEXT_BYTES)
        except UnicodeDecodeError as error:
            raise InvalidSettings(
                "stdin", expected="messages in UTF-8", actual=str(error)
            ) from None
        if len(line) == TEXT_BYTES:
            raise InvalidSettings(
                "stdin", expected=f"messages of less than {TEXT_BYTES} characters", actual="more"
            )
        TerminalWriter(sys.stdout).write(line.strip() + "\n")
        if not line:
            return
        yield line.strip()


def _show_notices(chat: Chat) -> None:
    for notice in chat.notices:
        print(f"[{notice}]", file=sys.stderr)
    chat.notices.clear()


def _answer(chat: Chat, line: str, *, stoppable: bool) -> bool:
    """Print the answer to a message, or why there is none; returns whether there was one.

    Args:
        stoppable: Ctrl-C ends the answer, and not the program.
    """
    writer = TerminalWriter(sys.stdout)
    writer.write(MODEL)
    try:
        for piece in chat.ask(line):
            _show_notices(chat)
            writer.write(piece)
        writer.write("\n")
        _show_notices(chat)
    except KeyboardInterrupt:
        if not stoppable:
            raise
        print(" [stopped]")
    except ExlLoaderError as error:
        print(flush=True)
        print(f"error: {error}", file=sys.stderr)
        return False
    return True
