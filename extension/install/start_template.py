"""Registers ExLlamav2 with text-generation-webui before `--model` loads.

Written by exl_loader's `install.py --webui`; `install.py --webui PATH --uninstall` removes it.
exl_loader_webui.pth runs it in every process of this environment that has a server.py among its
arguments. Any error is reported here in one line, and the web UI starts without the loader.
"""

import os
import sys
from typing import Any


def _extension_folders(server):
    """Return where a web UI with that server.py has its extension, the likeliest place first."""
    root = os.path.dirname(server)
    data = []
    for i, argument in enumerate(sys.orig_argv):
        if argument == "--user-data-dir" and i + 1 < len(sys.orig_argv):
            data.append(sys.orig_argv[i + 1])
        elif argument.startswith("--user-data-dir="):
            data.append(argument.split("=", 1)[1])
    data += [os.path.join(root, "user_data"), root]
    return [os.path.join(folder, "extensions", "exl_loader") for folder in data]


def _server():
    """Return the server.py of the web UI that is about to run; None in any other process."""
    for argument in sys.orig_argv[1:]:
        if os.path.basename(argument) == "server.py":
            server = os.path.abspath(argument)
            root = os.path.dirname(server)
            if os.path.isfile(os.path.join(root, "modules", "loaders.py")):
                return server
    return None


def start():
    """Activate the extension if this process is a web UI that has it."""
    server = _server()
    if server is None:
        return
    for folder in _extension_folders(server):
        path = os.path.join(folder, "bootstrap.py")
        if os.path.isfile(path):
            from importlib.util import module_from_spec, spec_from_file_location

            spec = spec_from_file_location("exl_loader_webui_bootstrap", path)
            assert spec is not None and spec.loader is not None
            bootstrap = module_from_spec(spec)
            spec.loader.exec_module(bootstrap)
            bootstrap.activate("early").start()
            return
        # A link whose target is gone; `islink` does not recognise junctions.
        if os.path.lexists(folder) and not os.path.exists(folder):
            raise FileNotFoundError(folder + " links to a folder that no longer exists")
    raise FileNotFoundError("user_data/extensions/exl_loader no longer exists")


def accept_flags():
    """Let the web UI ignore the plugin's flags, which its start command may still have.

    It does not start with an option that it does not know.
    """
    import argparse

    parser_class: Any = argparse.ArgumentParser
    parse_args = parser_class.parse_args

    def accepting(parser, *args, **kwargs):
        if "--loader" in parser._option_string_actions:
            parser_class.parse_args = parse_args
            ignored: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            for flags in (("--cache-8bit", "--cache_8bit"), ("--cache-4bit", "--cache_4bit"),
                          ("--as-llama", "--as_llama")):
                parser.add_argument(*flags, action="store_true", **ignored)
            for flags in (("--alpha-value", "--alpha_value"),
                          ("--compress-pos-emb", "--compress_pos_emb"),
                          ("--cache-size", "--cache_size"),
                          ("--chunk-size", "--chunk_size"),
                          ("--embedding-device", "--embedding_device")):
                parser.add_argument(*flags, **ignored)
            parser.add_argument("--machines", **ignored)
        return parse_args(parser, *args, **kwargs)

    parser_class.parse_args = accepting


try:
    start()
except Exception as error:
    accept_flags()
    sys.stderr.write(
        f"exl_loader: the loader ExLlamav2 is not available: {error} (to remove the plugin "
        f"completely, delete exl_loader_webui* in {os.path.dirname(__file__)})\n"
    )
