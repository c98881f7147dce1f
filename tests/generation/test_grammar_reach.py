"""Deep references in grammars: refused before the library's recursion ends the process."""

from __future__ import annotations

import itertools
import random

import pytest

from exl_loader.generation.grammar.gbnf import GbnfError, gbnf_to_lark
from exl_loader.generation.grammar.masks import Grammars
from exl_loader.generation.grammar.reach import MAX_LEVELS, MAX_RULES, reach, schema_problem
from exl_loader.generation.settings import SamplingSettings
from exl_loader.utils.errors import InvalidSettings

pytest.importorskip("llguidance")


def heaviest_path(edges, weights, node, seen=frozenset()):
    """The definition: try every path."""
    seen = seen | {node}
    rest = [heaviest_path(edges, weights, follower, seen)
            for follower in edges.get(node, ()) if follower not in seen]
    return weights.get(node, 1) + max(rest, default=0)


def test_the_bound_holds_and_is_exact_without_cycles():
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(300):
        names = [str(i) for i in range(rng.randint(1, 7))]
        weights = {name: rng.randint(1, 9) for name in names}
        pairs = [pair for pair in itertools.product(names, names) if rng.random() < 0.3]
        edges = {name: {b for a, b in pairs if a == name} for name in names}
        assert reach("0", edges, weights) >= heaviest_path(edges, weights, "0")
        falling = {name: {b for a, b in pairs if a == name and a < b} for name in names}
        assert reach("0", falling, weights) == heaviest_path(falling, weights, "0")


def test_a_long_chain_does_not_recurse_in_python():
    edges = {str(i): [str(i + 1)] for i in range(100_000)}
    assert reach("0", edges, {}) == 100_001
    edges["100000"] = ["0"]
    assert reach("0", edges, {}) == 100_001


def chain_of_rules(count: int, body: str) -> str:
    rules = [f"r{i} ::= " + body.format(f"r{i + 1}") for i in range(count)]
    return "\n".join([*rules, f'r{count} ::= "a"', "root ::= r0"])


BODIES = ['"y" {}', '"x" {} | "(" root ")"', "({})?"]


@pytest.mark.parametrize("body", BODIES)
def test_a_chain_of_rules(body):
    gbnf_to_lark(chain_of_rules(MAX_RULES // 5, body))
    for count in (MAX_RULES, 20 * MAX_RULES):
        with pytest.raises(GbnfError, match=f"more than {MAX_RULES} others"):
            gbnf_to_lark(chain_of_rules(count, body))


@pytest.mark.parametrize("count", [3, 20 * MAX_RULES])
def test_a_chain_of_names_is_replaced_by_its_last_rule(count):
    assert gbnf_to_lark(chain_of_rules(count, "{}")) == gbnf_to_lark('root ::= "a"')


def test_rules_that_name_each_other_are_refused(single_bytes):
    circle = "root ::= a\na ::= b\nb ::= c\nc ::= a"
    with pytest.raises((GbnfError, InvalidSettings)):
        Grammars(single_bytes, 288, [2]).matcher(SamplingSettings(grammar_string=circle))


def test_many_independent_rules_are_accepted():
    rules = [f'r{i} ::= "{i}"' for i in range(3 * MAX_RULES)]
    names = " | ".join(f"r{i}" for i in range(3 * MAX_RULES))
    assert gbnf_to_lark("\n".join([*rules, f"root ::= {names}"]))


LINKS = {
    "reference": lambda ref: ref,
    "property": lambda ref: {"type": "object", "properties": {"x": ref}},
    "item": lambda ref: {"type": "array", "items": ref},
    "any of": lambda ref: {"anyOf": [ref, {"type": "null"}]},
}


def chain_of_definitions(count: int, link) -> dict:
    definitions = {f"a/{i}": link({"$ref": f"#/$defs/a~1{i + 1}"}) for i in range(count)}
    definitions[f"a/{count}"] = {"type": "string"}
    return {"$ref": "#/$defs/a~10", "$defs": definitions}


@pytest.mark.parametrize("kind", LINKS)
def test_a_chain_of_definitions(single_bytes, kind):
    grammars = Grammars(single_bytes, 288, [2])
    short = chain_of_definitions(60, LINKS[kind])
    assert grammars.matcher(SamplingSettings(json_schema=short)) is not None
    for count in (MAX_LEVELS, 10 * MAX_LEVELS):
        long = chain_of_definitions(count, LINKS[kind])
        with pytest.raises(InvalidSettings, match=r"json_schema.*\$ref that lead more than 1000"):
            grammars.matcher(SamplingSettings(json_schema=long))


def test_references_that_are_not_pointers():
    schema = {"properties": {str(i): {"$ref": f"name{i}"} for i in range(50)}}
    assert "no pointers" in (schema_problem(schema) or "")
    assert schema_problem({"properties": {"a": {"$ref": "other"}}}) is None
    # A property with this name is not a reference.
    assert schema_problem({"properties": {"$ref": {"type": "string"}}}) is None


def test_a_recursive_schema_is_accepted(single_bytes):
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}
    assert schema_problem(tree) is None
    assert Grammars(single_bytes, 288, [2]).matcher(SamplingSettings(json_schema=tree))


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ('root ::= "a"{' + "9" * 5000 + "}", "not a range up to"),
        ('root ::= "a"{1,' + "9" * 5000 + "}", "not a range up to"),
        ('root ::= "a"' + "*" * 5000, "repetitions of one part"),
        ("root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "groups are nested deeper than"),
    ],
)
def test_excessive_numbers_and_nesting_are_refused(grammar, words):
    with pytest.raises(GbnfError, match=words) as caught:
        gbnf_to_lark(grammar)
    assert len(str(caught.value)) < 6000


def test_leading_zeros_of_a_number_are_ignored():
    assert gbnf_to_lark('root ::= "a"{000000003}') == gbnf_to_lark('root ::= "a"{3}')
