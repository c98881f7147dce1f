"""GBNF, llama.cpp's notation of grammars: its meaning and its errors."""

from __future__ import annotations

import random
import re

import pytest

from exl_loader.generation.grammar import automata
from exl_loader.generation.grammar.gbnf import GbnfError, gbnf_to_lark
from exl_loader.utils.errors import InvalidSettings
from support.exhaustive import some_of
from support.grammar_cases import LETTERS, describes, follows, matcher_of, random_rules, random_text

pytest.importorskip("llguidance")


def random_pattern(source: random.Random, depth: int) -> tuple[str, str]:
    """Return the same set of texts as GBNF and as a regular expression."""
    kind = source.randrange(8 if depth else 3)
    if kind == 0:
        text = "".join(source.choice("abé") for _ in range(source.randrange(1, 4)))
        return f'"{text}"', text
    if kind in (1, 2):
        return ("[ab]", "[ab]") if kind == 1 else ("[^a\\u00e9]", "[^aé]")
    first, second = random_pattern(source, depth - 1), random_pattern(source, depth - 1)
    if kind in (3, 4):
        return f"({first[0]}) ({second[0]})", f"(?:{first[1]})(?:{second[1]})"
    if kind == 5:
        return f"({first[0]} | {second[0]})", f"(?:{first[1]}|{second[1]})"
    repeat = source.choice(["*", "+", "?", "{2}", "{1,2}", "{2,}"])
    return f"({first[0]}){repeat}", f"(?:{first[1]}){repeat}"


def test_grammars_agree_with_regular_expressions(single_bytes):
    """Compared with Python's regular expressions, with and without recursion."""
    seed = random.randrange(1 << 32)
    source, matched = random.Random(seed), 0
    for _ in range(60):
        grammar, pattern = random_pattern(source, 3)
        for _ in range(8):
            text = "".join(source.choice("abcé") for _ in range(source.randrange(6)))
            wanted = re.fullmatch(pattern, text) is not None
            for form in (f"root ::= {grammar}", f'root ::= {grammar} | "z" root'):
                actual = follows(single_bytes, text, grammar_string=form)
                assert actual == wanted, (seed, form, text)
            matched += wanted
    assert matched > 20


@pytest.mark.parametrize("part", some_of(range(12), 12))
def test_recursive_grammars_agree_with_their_definition(single_bytes, part):
    """Compared with the definition, whichever parts are lexemes."""
    seed = random.randrange(1 << 32)
    source, matched, refused = random.Random(seed), 0, 0
    for _ in range(100):
        rules = random_rules(source)
        grammar = "\n".join(
            ["root ::= r0", *(f"r{i} ::= {rule.gbnf()}" for i, rule in enumerate(rules))])
        texts = set()
        for _ in range(6):
            text = random_text(source, rules, rules[0], 12)
            text = "".join(source.choices(LETTERS, k=3)) if text is None else text[:8]
            at = source.randrange(len(text) + 1)
            texts |= {text, text[:at] + source.choice(LETTERS) + text[at + source.randrange(2):]}
        for text in sorted(texts):
            wanted = describes(rules, text)
            actual = follows(single_bytes, text, grammar_string=grammar)
            assert actual == wanted, (seed, grammar, text)
            matched += wanted
            refused += not wanted
    assert matched > 100 and refused > 100


def lexemes_of(grammar: str) -> list[str]:
    """Return the lexemes of a recursive grammar as Python's regular expressions."""
    found = re.findall(r"^T\d+: /(.*?)/", gbnf_to_lark(grammar), re.MULTILINE)
    return [re.sub(r"\\x\{(\w+)\}", lambda code: f"\\U{int(code[1], 16):08X}", pattern)
            for pattern in found]


@pytest.mark.parametrize(("grammar", "text", "lexeme"), [
    # The parts around a recursion, and a list that is written as one.
    ('root ::= "<" [a-z]* ">" root? "</>"', "<ab><></></>", "<ab>"),
    ('root ::= "[" (ws word ("," root)?) "]"\nword ::= [a-z] word | [a-z]\nws ::= ([ ] ws)?',
     "[  abc,[d]]", "[  abc"),
    ('root ::= "(" list ")"\nlist ::= list "," [a-z]+ | (root | "x")', "(x,ab,c)", ",ab,c"),
    # Options of a repetition, written in place or as a rule.
    ('root ::= ([^()] | "(" root ")")*', "a(bc(d))e", "bc"),
    ('root ::= item+\nitem ::= [^()] | "(" root ")"', "a(bc(d))e", "bc"),
    # Spaces may be inside a text, but not at its beginning.
    ('root ::= "{" ws (text | root) ws "}" ws\ntext ::= "\'" [^\']* "\'"\nws ::= [ ]*',
     "{ {' x ' } } ", "' x '"),
])
def test_regular_parts_of_a_recursion_are_lexemes(single_bytes, grammar, text, lexeme):
    assert follows(single_bytes, text, grammar_string=grammar)
    assert not follows(single_bytes, text + ")", grammar_string=grammar)
    assert any(re.fullmatch(pattern, lexeme) for pattern in lexemes_of(grammar))


def test_a_grammar_too_large_to_analyse_has_lexemes_of_one_character(single_bytes, monkeypatch):
    grammar = 'root ::= "<" [a-z]* ">" root? "</>"'
    monkeypatch.setattr(automata, "MAX_STEPS", 30)
    assert all(len(pattern) < 30 for pattern in lexemes_of(grammar))
    assert follows(single_bytes, "<ab><></></>", grammar_string=grammar)


def chain(rule: str, length: int) -> str:
    rules = [rule.format(i, i + 1) for i in range(length)]
    return "\n".join(["root ::= r0", *rules, f'r{length} ::= "a"'])


@pytest.mark.parametrize(("grammar", "text"), [
    ('root ::= word "b"\nword ::= [a-z]+', "aab"),
    ('root ::= [a-z]* "begin" [0-9]{2}', "bexbebegin42"),
    (r'root ::= "\u0041\x42\U00000043\n\t\r\\\"\[\]"', 'ABC\n\t\r\\"[]'),
    ("root ::= .{3}", "\n中🎉"),
    ("root ::= [-a] [b-] [\\]] [^\\]xQ] # a comment", "--]y"),
    ('root ::= (a-Rule\n | b_1)\na-Rule ::=\n  "x"\nb_1 ::= root "y" |\n "z"', "zyy"),
    ('root ::= root "a" | "a"', "aaa"),
    ("root ::= " + "(" * 60 + '"a"' + ")" * 60, "a"),
    ("\r\nroot ::= \"a\"\r\n\r\n", "a"),
    # Characters with the same first byte: the lexer cannot go back.
    ('root ::= "(" [é]* (root | [è]) ")"', "(ééè)"),
    # Rules that cannot be expanded: too deep, and 2^30 times.
    (chain("r{0} ::= r{1}", 2000), "a"),
    (chain("r{0} ::= r{1}{{0,2}} r{1}{{0,2}}", 30), "aaaaa"),
])
def test_gbnf_syntax(single_bytes, grammar, text):
    assert follows(single_bytes, text, grammar_string=grammar)
    assert not follows(single_bytes, text + "!", grammar_string=grammar)
    assert not follows(single_bytes, text[:-1] + "Q", grammar_string=grammar) or "." in grammar


@pytest.mark.parametrize(("grammar", "problem"), [
    ("root ::= foo", "line 1: there is no rule foo"),
    ("rot ::= \"a\"", "no rule root"),
    ("# nothing", "no rule root"),
    ('root ::= "a"\nroot ::= "b"', "line 2: a second rule root"),
    ('root ::= "a', "ends too early"),
    ("root ::= [a", "ends too early"),
    ("root ::= []", "empty set"),
    ("root ::= [b-a]", "ends before it begins"),
    (r'root ::= "\q"', r"unknown escape \\q"),
    ('root ::= "\\', "unknown escape"),
    (r'root ::= "\uD800"', "is not a character"),
    ('root ::= ("a"', r"expected \)"),
    ('root ::= "a")', "is unexpected"),
    ('root = "a"', "expected ::="),
    ('root ::= * "a"', "is unexpected"),
    ('root ::= "a"{3,1}', "not a range"),
    ('root ::= "a"{99999}', "not a range"),
    ("root ::= <think>", "not supported"),
    ("root ::= " + "(" * 5000, "nested deeper"),
    ("::=", "expected the name"),
])
def test_invalid_gbnf_is_refused(single_bytes, grammar, problem):
    with pytest.raises(GbnfError, match=problem):
        gbnf_to_lark(grammar)
    with pytest.raises(InvalidSettings, match="grammar_string: expected a grammar in") as caught:
        matcher_of(single_bytes, grammar_string=grammar)
    # Without the sign `::=` it is read as Lark, which says something else.
    assert re.search(problem, caught.value.details) or "::=" not in grammar
