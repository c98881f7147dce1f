"""What changes the web UI alone: code of functions, and its modules while they are imported."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

from ..patching import Patches, Watcher
from .contract import WebuiDiffers, say

# ---- Functions with one more dict entry or constant ----
# Both functions change a function's code in place: a module that imported the function by value
# runs the new body, and everything else in the body stays the web UI's.


def add_dict_entries(
    patches: Patches, function: Any, variable: str, entries: Mapping[str, str]
) -> None:
    """Add entries to a dict that a function builds in a local variable.

    Args:
        function: of a module whose source can be read.
        variable: the local name that one dict display is assigned to.
        entries: key -> global name of the value.

    Raises:
        WebuiDiffers: the function has no such assignment, or no source.
    """
    try:
        lines, first_line = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError) as error:
        raise WebuiDiffers(f"the source of {function.__name__} cannot be read: {error}") from None
    displays = [
        node.value for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        and any(isinstance(t, ast.Name) and t.id == variable for t in node.targets)
    ]
    if len(displays) != 1 or function.__code__.co_freevars:
        raise WebuiDiffers(f"{function.__name__} builds no dict {variable}")
    for key, name in entries.items():
        displays[0].keys.append(ast.Constant(key))
        displays[0].values.append(ast.Name(name, ast.Load()))
    # So that tracebacks point into the web UI's own file.
    ast.increment_lineno(tree, first_line - 1)
    ast.fix_missing_locations(tree)
    namespace: dict[str, Any] = {}
    exec(compile(tree, function.__code__.co_filename, "exec"), namespace)
    patches.code(function, namespace[function.__name__].__code__)


def extend_constant(
    patches: Patches, module: ModuleType, constant: tuple[str, ...], extended: tuple[str, ...]
) -> int:
    """Replace a tuple of names in every function of a module, nested functions included.

    Returns:
        how many code objects had it.
    """
    count = 0
    for function in list(vars(module).values()):
        if isinstance(function, FunctionType) and function.__module__ == module.__name__:
            code, found = _with_constant(function.__code__, constant, extended)
            if found:
                patches.code(function, code)
                count += found
    return count


def _with_constant(
    code: CodeType, old: tuple[str, ...], new: tuple[str, ...]
) -> tuple[CodeType, int]:
    count = 0
    constants = []
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            constant, inner = _with_constant(constant, old, new)
            count += inner
        elif type(constant) is tuple and constant == old:
            constant = new
            count += 1
        constants.append(constant)
    return (code.replace(co_consts=tuple(constants)) if count else code), count


# ---- Modules, right after or while they are imported ----
# The web UI loads `--model` before any extension, and imports its API and its page even later.
# `modules` is a namespace package, so it has no __init__.py that could be asked to wait.


def _report(name: str, error: Exception) -> None:
    say(f"{name} could not be extended and is left unchanged: {error}")


# One per process: `early` starts it before any module of the web UI is imported.
watcher = Watcher(_report)
