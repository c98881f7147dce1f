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
from ..utils.output import TerminalWriter
from ..utils.progress import NullProgress, Progress, default_progress
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
    from ..generation.generator import TextGeneration

YOU, MODEL = "you> ", "model> "
HELP = "/reset forgets the conversation, /exit or Ctrl-D quits, Ctrl-C stops an answer"

# The prompt's format for models without a chat template. Most base models can follow it.
PLAIN_ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}
PLAIN_STOPS = ("\nUser:", "\nSystem:")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments to its parser."""
    add_load_arguments(parser)
    parser.add_argument(
        "--system", metavar="TEXT", help="system message, which comes before the conversation"
    )
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Answer one line after the other until the input ends.

    Returns:
        The exit code: 1 where messages came from a pipe or a file and one got no answer. At a
        terminal it is 0, because the person has seen the error.

    Raises:
        ExlLoaderError: the folder or an option is wrong, the model has no tokenizer, or the
            input is not UTF-8.
    """
    settings = sampling_settings(args)
    progress = default_progress()
    is_terminal = sys.stdin.isatty()
    failed = False
    with open_model(args, progress) as model:
        chat = Chat(model, settings, args.system, progress)
        if not chat.has_template:
            print("this model has no chat template; the prompt has plain User:/Assistant: lines",
                  file=sys.stderr)
        if is_terminal:
            print(HELP, file=sys.stderr)
        lines = _typed_lines() if is_terminal else _piped_lines()
        for line in lines:
            if line == "/exit":
                break
            if line == "/reset":
                chat.reset()
            elif line and not _answer(chat, line, stoppable=is_terminal):
                failed = True
    return 1 if failed and not is_terminal else 0


class Chat:
    """A conversation with a model.

    Args:
        model: has a tokenizer.
        settings: the settings of every answer.
        system: the system message; None for none.
        progress: gets the tokens of prompts.

    Attributes:
        messages: the conversation, without the system message.
        notices: one line for each message that was left out and each answer that was cut off
            since the list was last emptied.
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
        """Forget everything but the system message."""
        self.messages = []

    def ask(self, text: str):
        """Yield the answer piece by piece.

        What the caller has read of the answer becomes part of the conversation. The oldest
        messages are dropped until the answer has room in the context. `notices` reports that,
        and an answer that ends because the context is full.

        Raises:
            PromptTooLong: this message alone is too long. The conversation is unchanged.
            ExlLoaderError: the template refuses the conversation, which is unchanged.
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
    """Read messages that a person types. Ctrl-C discards a line."""
    while True:
        try:
            yield input(YOU).strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(f"\n{HELP}", file=sys.stderr)


def _piped_lines() -> Iterator[str]:
    """Read messages from a pipe or a file, and print each one, because no user typed it.

    Raises:
        InvalidSettings: the input is not UTF-8, or a line is longer than any text may be.
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
                "stdin", expected=f"messages of fewer than {TEXT_BYTES} characters", actual="more"
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
    """Print the answer to a message, or the error instead of one.

    Args:
        stoppable: Ctrl-C ends the answer and not the program.

    Returns:
        True where there was an answer.
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
