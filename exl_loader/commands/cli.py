"""Find the subcommand, run it, and print errors as one readable line.

A subcommand is a module with `add_arguments(parser)` and `run(args) -> exit code`. Only the
chosen one is imported, so that `doctor` works where a package that another one needs is
missing. `EXIT_CODES`, which `--help` shows, has the meaning of the exit codes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ..utils.errors import ExlLoaderError, known_line
from ..utils.output import TerminalFormatter, for_terminal
from ..utils.system.processes import end_by_interrupt

# name -> (module, its line in the overview)
COMMANDS = {
    "generate": ("exl_loader.commands.generate", "write text that follows a prompt"),
    "chat": ("exl_loader.commands.chat", "talk to a model in the terminal"),
    "plan": ("exl_loader.commands.plan", "compute the memory that a model will take"),
    "bench": ("exl_loader.commands.bench", "measure speed by depth and cache type"),
    "serve-stage": (
        "exl_loader.commands.serve_stage", "run layers of a model for another machine"
    ),
    "eval": ("exl_loader.commands.eval", "measure how much quality each cache type loses"),
    "download": ("exl_loader.commands.download", "download a model from the Hugging Face Hub"),
    "convert": ("exl_loader.commands.convert", "quantise a model folder to EXL2"),
    "build": ("exl_loader.commands.build", "compile the kernels ahead of the first load"),
    "doctor": ("exl_loader.commands.doctor", "report what this machine has and what is missing"),
}

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
# The exit code that a shell reports for a program that SIGPIPE ended.
EXIT_READER_GONE = 141

EXIT_CODES = """\
exit codes:
  0    success; for plan, whether or not the model fits
  1    an error, printed as one line on stderr: a wrong folder or option, a model that does not
       fit, kernels that do not compile. For doctor: something is missing. For chat with
       messages from a pipe or a file: one of them got no answer
  2    wrong usage
  130  interrupted by Ctrl-C
  141  the reader of the output has closed it, as `| head` does
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: arguments without the program's name. None takes those of the process. Then
            Ctrl-C also ends the process by its signal.

    Returns:
        The exit code, see `EXIT_CODES`.
    """
    code = _run(sys.argv[1:] if argv is None else list(argv))
    if code == EXIT_INTERRUPTED and argv is None:
        end_by_interrupt()
    return code


def _run(argv: list[str]) -> int:
    """Run one subcommand and turn every error into a line on stderr and an exit code."""
    _open_streams()
    handler = logging.StreamHandler()
    handler.setFormatter(TerminalFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    # Generated text may hold characters that a redirected stdout's code page lacks.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    verbose = "--verbose" in argv
    if "serve-stage" in argv[:1] or any(word.startswith("--machines") for word in argv):
        # PyTorch prints a C++ stack trace for every connection that ends or is not there yet. It
        # reads this when it is imported.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    try:
        args = parse(argv)
        code = args.run(args)
        sys.stdout.flush()
        return code
    except ExlLoaderError as error:
        _report(str(error), verbose, error.details)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Otherwise Python's own flush at exit would report the same error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_READER_GONE
    except Exception as error:
        hint = "" if verbose else " (this is a bug in exl_loader; --verbose shows where)"
        _report(known_line(error) or f"{type(error).__name__}: {error}{hint}", verbose)
    return EXIT_ERROR


def _open_streams() -> None:
    """Replace standard streams that were closed by the null device."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse arguments; `run` of the result is the subcommand's function."""
    parser = argparse.ArgumentParser(
        prog="exl_loader", description="Run EXL2 and GPTQ models, and plan the memory they take.",
        epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"exl_loader {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, (module_name, summary) in COMMANDS.items():
        description = summary[0].upper() + summary[1:]
        subparser = subparsers.add_parser(name, help=summary, description=description)
        subparser.add_argument(
            "--verbose", action="store_true", help="on an error, show its details and traceback"
        )
        if name == chosen:
            module = importlib.import_module(module_name)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser.parse_args(argv)


def environment_hint(repo: Path, prefix: str) -> str:
    """Name the environment that `install.py` has made; empty where this Python is or needs none.

    Args:
        repo: the folder of install.py.
        prefix: `sys.prefix`.
    """
    venv = repo / ".venv"
    if importlib.util.find_spec("torch") is not None or Path(prefix).resolve() == venv.resolve():
        return ""
    for python in (venv / "bin" / "python", venv / "Scripts" / "python.exe"):
        if python.exists():
            return (f"This Python is not that of install.py, which has all packages: "
                    f"{python} -m exl_loader")
    return ""


def _report(line: str, verbose: bool, details: str | None = None) -> None:
    print(f"error: {for_terminal(line)}", file=sys.stderr)
    hint = environment_hint(Path(__file__).resolve().parents[2], sys.prefix)
    if hint:
        print(for_terminal(hint), file=sys.stderr)
    if verbose:
        if details:
            print(for_terminal(details), file=sys.stderr)
        print(for_terminal(traceback.format_exc()), end="", file=sys.stderr)
