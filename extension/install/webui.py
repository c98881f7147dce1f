"""`install.py --webui PATH`: install the plugin into the web UI, verify or uninstall it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from . import saved_settings
from .environment import (
    WEBUI,
    HostPython,
    InstallError,
    Problem,
    check_folder,
    dotted,
    extension_folder,
    find_python,
)
from .plugin_files import WEBUI_HOOK, remove_extension
from .steps import (
    import_in,
    install_extras,
    install_missing,
    install_plugin,
    plugin_problems,
    refuse_missing,
    remove_packages_and_hook,
    run,
    say,
    verification_problems,
)


def main(webui: Path, arguments: list[str]) -> int:
    """Install, update or uninstall in the web UI, according to the arguments.

    Args:
        webui: the web UI's folder.
        arguments: `--python P`, `--update`, `--copy` or `--uninstall`.

    Returns:
        the exit code.
    """
    return run(WEBUI, arguments, partial(install, webui), partial(uninstall, webui))


def install(
    webui: Path, given: Path | None = None, *, copy: bool = False, update: bool = False
) -> None:
    """Install the plugin; if it is installed completely, nothing is written.

    Args:
        webui: the web UI's folder. given: its Python, if it cannot be found.
        copy: copy the extension instead of linking it.
        update: renew the extension even if it seems current.

    Raises:
        InstallError: a package of the web UI's own is missing, or the check failed.
    """
    root = check_folder(webui)
    python = find_python(root, given)
    say(f"web UI: {root}\nits Python: {python.executable} ({dotted(python.version)})")
    refuse_missing(python, WEBUI)
    installed = [*install_missing(python), *install_extras(python)]
    install_plugin(python, WEBUI_HOOK, extension_folder(root), installed, copy=copy, update=update)
    say(f"verified: exl_loader {verify(root, python)} can be imported in the web UI's Python. "
         "Start the web UI as usual; its Model tab now has the loaders ExLlamav2 and ExLlamav2_HF")


def uninstall(webui: Path, given: Path | None = None) -> None:
    """Remove everything: extension, start hook, packages we installed, saved settings.

    Raises:
        InstallError: the folder or its Python does not exist; the rest has been removed.
    """
    root = webui.expanduser().resolve()
    if remove_extension(extension_folder(root)):
        say(f"removed {extension_folder(root)}")
    for path in saved_settings.config_files(root):
        models = saved_settings.remove_entries(path)
        if models:
            say(f"{path}: removed the loader ExLlamav2 from the settings of "
                 f"{', '.join(models)} (the previous file is {saved_settings.BACKUP})")
    for path, flags in saved_settings.named_flags(root).items():
        # This file belongs to the web UI, so it is not changed.
        say(f"remove {' and '.join(flags)} from {path}: without the plugin the web UI does not "
             "start with these flags")
    remove_packages_and_hook(find_python(root, given), WEBUI_HOOK)


def problems(webui: Path, given: Path | None = None) -> list[Problem]:
    """Return what keeps the loader from working in a web UI, each with its remedy."""
    again = f"Run install.py --webui {webui} again"
    try:
        root = check_folder(webui)
        python = find_python(root, given)
    except InstallError as error:
        line, _, remedy = str(error).partition(". ")
        return [Problem(line, remedy)]
    found = plugin_problems(python, WEBUI, WEBUI_HOOK, extension_folder(root), again,
                            "--model does not find the loader")
    return found or verification_problems(partial(verify, root, python), again)


def verify(root: Path, python: HostPython) -> str:
    """Import the plugin and the engine in the web UI's Python.

    Returns:
        the engine's version.

    Raises:
        InstallError: with the last line of Python's output.
    """
    more = ["hf_model"] if "transformers" in python.packages else []
    modules = ["early", "registration", "native_model", *more]
    return import_in(python, extension_folder(root), "webui", modules, root)
