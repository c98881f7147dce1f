"""Limits the depth of references in a grammar, before llguidance follows them.

llguidance follows references by recursion in compiled code. A few thousand rules or definitions
that each refer to the next overflow its stack, which ends the process.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

# The library (1.9) overflows a stack of 8 MiB from about 2,000 rules and 2,400 levels of JSON.
MAX_RULES = 500
MAX_LEVELS = 1000
# Most references by `$id` or `$anchor`, which are not followed here.
MAX_FOREIGN_REFERENCES = 20


def reach(
    start: str, edges: Mapping[str, Collection[str]], weights: Mapping[str, int]
) -> int:
    """Return an upper bound of the weight of any path from `start` that visits no node twice.

    The weights of nodes in one cycle are added, because a path may visit all of them.

    Args:
        start: the first node.
        edges: node -> the nodes that it leads to; a node that is not a key leads nowhere.
        weights: node -> its weight; 1 for nodes that are not a key.
    """
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    total: dict[str, int] = {}
    open_nodes: list[str] = []
    index[start] = low[start] = 0
    open_nodes.append(start)
    # Tarjan, SIAM J. Comput. 1 (1972), with an explicit stack.
    work: list[tuple[str, Iterator[str]]] = [(start, iter(edges.get(start, ())))]
    while work:
        node, followers = work[-1]
        for follower in followers:
            if follower not in index:
                index[follower] = low[follower] = len(index)
                open_nodes.append(follower)
                work.append((follower, iter(edges.get(follower, ()))))
                break
            if follower not in total:
                low[node] = min(low[node], index[follower])
        else:
            work.pop()
            if work:
                parent = work[-1][0]
                low[parent] = min(low[parent], low[node])
            if low[node] == index[node]:
                _close(node, open_nodes, edges, weights, total)
    return total[start]


def _close(
    root: str, open_nodes: list[str], edges: Mapping[str, Collection[str]],
    weights: Mapping[str, int], total: dict[str, int],
) -> None:
    """Set the total of the nodes from `root` on the stack, which form one component."""
    members = [open_nodes.pop()]
    while members[-1] != root:
        members.append(open_nodes.pop())
    beyond = max(
        (total[follower] for node in members for follower in edges.get(node, ())
         if follower in total), default=0,
    )
    weight = beyond + sum(weights.get(node, 1) for node in members)
    total.update(dict.fromkeys(members, weight))


@dataclass
class _References:
    """The references of a JSON schema.

    Attributes:
        edges: pointer -> pointers that the schema at it refers to.
        levels: pointer -> depth of nesting of the schema at it.
        foreign: number of references that are not pointers into the schema.
    """

    edges: dict[str, set[str]] = field(default_factory=dict)
    levels: dict[str, int] = field(default_factory=dict)
    foreign: int = 0


def schema_problem(schema: dict[str, Any]) -> str | None:
    """Return why a JSON schema is refused; None if it is accepted."""
    found = _references(schema)
    if found.foreign > MAX_FOREIGN_REFERENCES:
        return (f"more than {MAX_FOREIGN_REFERENCES} values of $ref that are no pointers such as "
                "#/$defs/name")
    if reach("#", found.edges, found.levels) > MAX_LEVELS:
        return f"values of $ref that lead more than {MAX_LEVELS} levels deep"
    return None


def _references(schema: dict[str, Any]) -> _References:
    found = _References()
    waiting = ["#"]
    while waiting:
        pointer = waiting.pop()
        if pointer in found.edges:
            continue
        found.edges[pointer] = set()
        found.levels[pointer] = 0
        level: list[Any] = [_at(schema, pointer)]
        while level:
            found.levels[pointer] += 1
            for value in level:
                target = value.get("$ref") if isinstance(value, dict) else None
                if isinstance(target, str) and _at(schema, target) is not None:
                    found.edges[pointer].add(target)
                    waiting.append(target)
                elif isinstance(target, str):
                    found.foreign += 1
            level = [
                inner for value in level if isinstance(value, (dict, list))
                for inner in (value.values() if isinstance(value, dict) else value)
                if isinstance(inner, (dict, list))
            ]
    return found


def _at(schema: Any, pointer: str) -> Any:
    """Return the value at a pointer such as `#/$defs/name` (RFC 6901); None if there is none."""
    if pointer != "#" and not pointer.startswith("#/"):
        return None
    value = schema
    for part in unquote(pointer[1:]).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and key.isascii() and key.isdigit() and len(key) < 9:
            value = value[int(key)] if int(key) < len(value) else None
        else:
            return None
    return value
