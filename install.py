"""Set exl_loader up in an environment of its own, and run what the README shows.

    python install.py --demo        make .venv/, let the model that ships write a text in the
                                    terminal, then serve a page with it (in a terminal only)
    python install.py --terminal    the same without the page; so does --demo --terminal
    python install.py --test        make .venv/ with the test dependencies, then run the tests
    python install.py --env         make .venv/ alone; with --test, the test dependencies too
    python install.py --webui PATH    put the loader into a text-generation-webui; with
                                      --uninstall take it out, with --update refresh a copy

Needs Python 3.10 or newer and nothing else. Run again, it finds .venv/ complete and goes
straight on; a set-up that was interrupted is begun anew. Further arguments go to what is run,
and what that exits with is the exit code; EXIT_CODES has the others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent
VENV = REPO / ".venv"
# Written last: the environment is complete, and what for.
STAMP = VENV / "exl_loader-complete.json"
# There while packages are being installed: what was interrupted is not to be trusted.
UNFINISHED = VENV / "exl_loader-unfinished"
PINS = REPO / "tools" / "pins.txt"

TORCH_VERSION = "2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

EXIT_CODES = """\
exit codes: that of what is run (of the page: 0 when Ctrl-C ends it); 1 where the set-up failed,
in one line on stderr; 2 on wrong usage; 130 on Ctrl-C and 143 on SIGTERM, which both end what
runs as well
"""


class SetupError(Exception):
    """What went wrong, and what to do about it, in one line."""


class Terminated(SystemExit):
    """SIGTERM ended this."""


def main() -> int:
    """Make the environment and run what was asked for; returns the exit code."""
    if sys.version_info < (3, 10):  # noqa: UP036 (this file is what an older one meets first)
        raise SetupError(
            f"this is Python {platform.python_version()}, and exl_loader needs 3.10 or newer. "
            "Run install.py with a newer one, e.g. python3.12 install.py --demo"
        )
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Further arguments go to what is run. --webui PATH takes --python PYTHON, the one\n"
        "that runs the web UI; --copy, for an extension that is no link; --update; --uninstall.\n"
        f"\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--demo", action="store_true",
                      help="write text with the model that ships, then open a page with it")
    task.add_argument("--test", action="store_true", help="run the tests")
    task.add_argument("--webui", type=Path, metavar="PATH", help="install into a web UI")
    end = parser.add_mutually_exclusive_group()
    end.add_argument("--terminal", action="store_true",
                     help="write text, and open no page; alone or with --demo")
    end.add_argument("--env", action="store_true",
                     help="make the environment alone; alone, with --demo or with --test")
    args, further = parser.parse_known_args()
    check_arguments(parser, args, further)
    if args.webui:
        # It has an environment of its own; ours is not needed.
        from extension.install import command

        return command.main(args.webui, further)
    ensure_environment(test=args.test)
    if args.env:
        say(f"{VENV} is complete")
        return 0
    if args.test:
        return run_in_environment(["-m", "pytest", *(further or whole_suite())])
    if args.terminal:
        return write_text(further)
    return demo(further)


def check_arguments(
    parser: argparse.ArgumentParser, args: argparse.Namespace, further: list[str]
) -> None:
    """End the program with a usage error where the arguments name no task or contradict."""
    if not (args.demo or args.test or args.webui or args.terminal or args.env):
        parser.error("one of --demo, --test, --webui PATH, --terminal and --env is required")
    if args.terminal and (args.test or args.webui):
        parser.error("--terminal goes with --demo or alone")
    if args.env and args.webui:
        parser.error("--env goes with --demo, with --test or alone")
    if args.env and further:
        parser.error(f"unrecognized arguments: {' '.join(further)}")


def whole_suite() -> list[str]:
    """Return pytest's arguments for all tests: on several cores, and with where the time went.

    Not on more than four: kernels and builds under test use several threads themselves.
    """
    workers = str(min(4, os.cpu_count() or 1))
    return ["-n", workers, "--dist", "worksteal", "--durations", "25", "--durations-min", "1"]


def demo(page_arguments: list[str]) -> int:
    """Show that the engine works, then open the page until Ctrl-C.

    A page would keep a script or a pipe waiting for ever, so it opens for a terminal alone,
    or where arguments ask for something of it.
    """
    code = write_text(["--max-new-tokens", "200"])
    if code != 0:
        return code
    if not (page_arguments or sys.stdout.isatty()):
        say("no terminal: the page was not opened; "
            f"{venv_python()} -m extension.page.server does")
        return 0
    return run_in_environment(["-m", "extension.page.server", *page_arguments])


def write_text(arguments: list[str]) -> int:
    """Let the model that ships go on with a prompt of its own."""
    return run_in_environment(["-m", "exl_loader", "generate", "--stats", *arguments])


def run_in_environment(arguments: list[str]) -> int:
    """Run the environment's Python in the repository; its output and its end are ours."""
    sys.stdout.flush()
    process = subprocess.Popen([str(venv_python()), *arguments], cwd=REPO)
    while True:
        try:
            code = process.wait()
            return code if code >= 0 else 128 - code
        except KeyboardInterrupt:
            # The terminal's Ctrl-C reached it as well: how it ends is its own affair.
            continue
        except Terminated:
            # This reached us alone, and nobody else would end it.
            process.terminate()


def run_child(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    """Run a step of the set-up, which is given time to end where we are interrupted."""
    from extension.install import children

    return children.run(command, **options)


def ensure_environment(test: bool) -> None:
    """Make `.venv/`, unless a stamp says that it is what it should be.

    Args:
        test: with the packages that the tests need; an environment that has them serves
            without as well.

    Raises:
        SetupError: a step failed; its own words stand above the error.
    """
    key = environment_key()
    stamp = read_stamp()
    complete = stamp.get("key") == key and venv_python().exists()
    if complete and (stamp.get("test") or not test):
        return
    test = test or bool(stamp.get("test"))
    make_venv()
    STAMP.unlink(missing_ok=True)
    UNFINISHED.touch()
    try:
        install_packages(test)
    except SetupError:
        # pip gave up in good order; what it installed before is whole.
        UNFINISHED.unlink()
        raise
    UNFINISHED.unlink()
    temporary = STAMP.with_suffix(".tmp")
    temporary.write_text(json.dumps({"key": key, "test": test}) + "\n", encoding="utf-8")
    temporary.replace(STAMP)


def install_packages(test: bool) -> None:
    """Install PyTorch, then exl_loader (editable) with all that it needs.

    Raises:
        SetupError: pip failed.
    """
    say(f"[2/3] PyTorch {TORCH_VERSION}" + (", for an NVIDIA GPU" if has_nvidia() else ""))
    install_torch()
    say("[3/3] other packages" + (" and those of the tests" if test else ""))
    # Without isolation the pinned build tool serves, and nothing unpinned is fetched.
    pip_install(["hatchling"])
    target = f"{REPO}[extension,test]" if test else f"{REPO}[extension]"
    pip_install(["--no-build-isolation", "--editable", target])


def environment_key() -> str:
    """Hash what decides the environment's contents: this file, pins, project, interpreter."""
    digest = hashlib.sha256()
    for path in (Path(__file__), PINS, REPO / "pyproject.toml"):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    interpreter = f"{platform.python_version()} {platform.machine()} {REPO} {has_nvidia()}"
    digest.update(interpreter.encode())
    return digest.hexdigest()


def read_stamp() -> dict:
    """Return the stamp, empty where there is none that can be read."""
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def venv_python() -> Path:
    """Path of the environment's interpreter."""
    if os.name == "nt":
        return VENV / "Scripts" / "python.exe"
    return VENV / "bin" / "python"


def make_venv() -> None:
    """Create `.venv/`, from nothing where it is unfinished or of another Python."""
    say(f"[1/3] {VENV} with Python {platform.python_version()}")
    if venv_is_usable():
        return
    shutil.rmtree(VENV, ignore_errors=True)
    result = run_child(
        [sys.executable, "-m", "venv", str(VENV)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    if result.returncode != 0:
        print(result.stdout, file=sys.stderr)
        # What a failed venv leaves behind looks like one.
        shutil.rmtree(VENV, ignore_errors=True)
        remedy = "see the words above"
        if "ensurepip" in result.stdout:
            remedy = "this Python lacks venv; on Debian or Ubuntu: sudo apt install python3-venv"
        raise SetupError(f"{VENV} cannot be created: {remedy}")


def venv_is_usable() -> bool:
    """Whether a `.venv/` is there that was not left unfinished, of this Python, with pip."""
    if UNFINISHED.exists() or not venv_python().exists():
        return False
    probe = "import sys, pip; print('%d.%d' % sys.version_info[:2])"
    result = subprocess.run(
        [str(venv_python()), "-c", probe], capture_output=True, text=True, errors="replace"
    )
    wanted = "{}.{}".format(*sys.version_info[:2])
    return result.returncode == 0 and result.stdout.strip() == wanted


def has_nvidia() -> bool:
    """Whether an NVIDIA GPU is here, seen without starting anything."""
    gpus = Path("/proc/driver/nvidia/gpus")
    if gpus.is_dir():
        return any(gpus.iterdir())
    return Path("/usr/lib/wsl/lib/nvidia-smi").exists()


def install_torch() -> None:
    """Install the pinned PyTorch; without an NVIDIA GPU its CPU build or none.

    On Linux the build on PyPI brings gigabytes of CUDA libraries. The CPU build is called
    `2.13.0+cpu`, a version that only CPU builds have, so that there is no falling back to
    the other. Where the indexes that pip is configured with do not have it, PyTorch's own
    does. On macOS and Windows the build on PyPI is for the CPU.

    Raises:
        SetupError: no index has the CPU build, or pip failed.
    """
    if sys.platform != "linux" or has_nvidia():
        pip_install([f"torch=={TORCH_VERSION}"])
        return
    cpu_build = f"{TORCH_VERSION}+cpu"
    index = [] if cpu_build in known_torch_versions() else ["--extra-index-url", TORCH_CPU_INDEX]
    try:
        pip_install([f"torch=={cpu_build}", *index])
    except SetupError as error:
        raise SetupError(
            f"{error}. Without an NVIDIA GPU only the CPU build torch=={cpu_build} is taken; "
            f"see that {TORCH_CPU_INDEX} can be reached, or give pip an index that has it "
            "(PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS)"
        ) from error


def known_torch_versions() -> list[str]:
    """List the versions of PyTorch that pip's configured indexes have for this Python."""
    result = subprocess.run(
        [str(venv_python()), "-m", "pip", "index", "versions", "torch"],
        capture_output=True, text=True, errors="replace",
    )
    return result.stdout.replace(",", " ").split()


def pip_install(arguments: list[str]) -> None:
    """Run the environment's pip, within the pins; its progress is shown as it is."""
    command = [str(venv_python()), "-m", "pip", "install", "--constraint", str(PINS)]
    # Python compiles a module when it is first imported, which most of these never are.
    command += ["--disable-pip-version-check", "--no-input", "--no-compile", *arguments]
    sys.stdout.flush()
    code = run_child(command, cwd=REPO).returncode
    if code != 0:
        raise SetupError(f"pip install {' '.join(arguments)} failed (its words stand above)")


def say(line: str) -> None:
    """Print a step to stderr, which keeps stdout for what the main job writes."""
    print(line, file=sys.stderr, flush=True)


def end_on_sigterm(number: int, frame: object) -> None:
    """Let SIGTERM end what this runs before it ends this; a handler of signals."""
    raise Terminated(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_on_sigterm)
    try:
        sys.exit(main())
    except SetupError as setup_error:
        say(f"error: {setup_error}")
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted; run the same command again to go on")
        sys.exit(130)
