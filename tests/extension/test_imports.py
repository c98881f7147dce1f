"""The front ends use what `exl_loader` exports, and a short list of its modules besides."""

from __future__ import annotations

import ast

import exl_loader
from support import REPO

# Module below the top level of exl_loader -> why a front end imports it.
INTERNAL = {
    "checkpoint": "is_quantised: which folders are this loader's",
    "checkpoint.config": "the page's picker says which folders cannot be loaded, and why",
    "checkpoint.model_class": "has_unknown_class: whether to offer the toggle of unknown classes",
    "checkpoint.weight_files": "the page's picker names downloads that have not ended",
    "commands.generate": "the page starts with the prompt of `generate`",
    "commands.hub": "the page downloads models by the same client as `download`",
    "commands.model_download": "the page downloads what `download` would, with its plan",
    "commands.model_options": "the page shows the shipped model with the defaults of `generate`",
    "generation.settings": "biases: the API's logit_bias is checked as the engine checks it",
    "memory.reservation.text": "refusal: TabbyAPI's backend refuses a load before it begins",
    "utils.byte_counts": "byte counts are written as in the engine's own messages",
    "utils.errors": "printable, known_line, modules_of: errors of the system in one line",
    "utils.json_keys": "files of the web UI are read with the engine's checks",
    "utils.progress": "front ends draw the progress that the engine reports",
    "utils.setting_values": "values of a page are checked with the engine's messages",
    "utils.untrusted_files": "files are read with a bound on their size; standard library alone",
    "utils.output": "a load repeats warnings that a plan has already given",
}


def imported():
    """Yield (module, names) of every import of exl_loader that runs, types left out."""
    for path in [REPO / "install.py", *(REPO / "extension").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for_types = {
            node for block in ast.walk(tree)
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
            for node in ast.walk(block)
        }
        for node in ast.walk(tree):
            if node in for_types:
                continue
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                if node.module.partition(".")[0] == "exl_loader":
                    yield node.module.removeprefix("exl_loader").lstrip("."), [
                        alias.name for alias in node.names]
            elif isinstance(node, ast.Import):
                yield from ((alias.name.removeprefix("exl_loader."), []) for alias in node.names
                            if alias.name.startswith("exl_loader."))


def test_front_ends_import_public_names_and_the_named_modules():
    assert {module for module, _ in imported() if module} == INTERNAL.keys()


def test_names_from_the_top_level_are_public():
    names = {name for module, names in imported() if not module for name in names}
    assert names and names <= {*exl_loader.__all__, "__version__"}
