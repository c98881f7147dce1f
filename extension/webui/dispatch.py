"""Functions of the web UI with a constant or a dict entry more than in its files.

Both change a function's code in place: who imported the function by value runs the new body,
and all else that the web UI does around it stays the web UI's.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

from .host import HostDiffers, Patches


def add_dict_entries(
    patches: Patches, function: Any, variable: str, entries: Mapping[str, str]
) -> None:
    """Add entries to a dict that a function makes in a local variable.

    Args:
        function: of a module whose source can be read.
        variable: the local name that one dict display is assigned to.
        entries: key -> global name that stands for the value.

    Raises:
        HostDiffers: the function has no such assignment, or no source.
    """
    try:
        lines, first_line = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError) as error:
        raise HostDiffers(f"the source of {function.__name__} cannot be read: {error}") from None
    displays = [
        node.value for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        and any(isinstance(t, ast.Name) and t.id == variable for t in node.targets)
    ]
    if len(displays) != 1 or function.__code__.co_freevars:
        raise HostDiffers(f"{function.__name__} makes no dict {variable}")
    for key, name in entries.items():
        displays[0].keys.append(ast.Constant(key))
        displays[0].values.append(ast.Name(name, ast.Load()))
    # Tracebacks are to point into the web UI's own file.
    ast.increment_lineno(tree, first_line - 1)
    ast.fix_missing_locations(tree)
    namespace: dict[str, Any] = {}
    exec(compile(tree, function.__code__.co_filename, "exec"), namespace)
    patches.code(function, namespace[function.__name__].__code__)


def extend_constant(
    patches: Patches, module: ModuleType, constant: tuple[str, ...], extended: tuple[str, ...]
) -> int:
    """Replace a tuple of names in every function of a module, nested ones included.

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
