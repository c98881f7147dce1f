"""Whether a text follows a grammar: token by token (which needs llguidance), and by definition."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

from exl_loader.generation.grammar.masks import Grammars
from exl_loader.generation.settings import SamplingSettings


@functools.cache
def grammars_of(tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)


def matcher_of(tokenizer, **settings):
    return grammars_of(tokenizer).matcher(SamplingSettings.from_dict(settings))


def follows(tokenizer, text: str, **settings) -> bool:
    """Whether a text, one token a byte, is one of the grammar's from beginning to end."""
    matcher = matcher_of(tokenizer, **settings)
    for token_id in tokenizer.encode(text, add_bos=False):
        if matcher.complete or token_id not in matcher.allowed_ids:
            return False
        matcher.accept(token_id)
    return matcher.complete or tokenizer.eos_token_id in matcher.allowed_ids


@dataclass(frozen=True)
class Tree:
    """A part of a grammar.

    Args:
        kind: "text" and "class" (of characters, or not these: "but"), "rule" by its number,
            "all" and "one" of parts, "times".
    """

    kind: str
    text: str = ""
    parts: tuple[Tree, ...] = ()
    number: int = 0
    low: int = 0
    high: int | None = None

    def gbnf(self) -> str:
        inner = [part.gbnf() for part in self.parts]
        if self.kind == "times":
            many = "" if self.high is None else str(self.high)
            return f"({inner[0]}){{{self.low},{many}}}"
        return {
            "text": f'"{self.text}"', "class": f"[{self.text}]", "but": f"[^{self.text}]",
            "rule": f"r{self.number}", "all": f"({' '.join(inner)})",
            "one": f"({' | '.join(inner)})",
        }[self.kind]

    def ends(self, text: str, begin: int, rule_ends) -> set[int]:
        """Return where a match that begins at `begin` may end; `rule_ends(number, begin)`."""
        if self.kind == "text":
            return {begin + len(self.text)} if text.startswith(self.text, begin) else set()
        if self.kind in ("class", "but"):
            fits = begin < len(text) and (text[begin] in self.text) == (self.kind == "class")
            return {begin + 1} if fits else set()
        if self.kind == "rule":
            return rule_ends(self.number, begin)
        if self.kind == "one":
            return set().union(*(part.ends(text, begin, rule_ends) for part in self.parts))
        parts, least = self.parts, len(self.parts)
        if self.kind == "times":
            # Rounds beyond the text's length add nothing but empty ones.
            most = self.low + len(text) + 1 if self.high is None else self.high
            parts, least = self.parts * most, self.low
        here, found = {begin}, set()
        for place, part in enumerate(parts):
            if place >= least:
                found |= here
            here = set().union(*(part.ends(text, at, rule_ends) for at in here))
        return found | here


def describes(rules: list[Tree], text: str) -> bool:
    """Whether the first rule describes a text: the least solution, found by repeating."""
    known: dict[tuple[int, int], set[int]] = {}

    def rule_ends(number: int, begin: int) -> set[int]:
        return known.setdefault((number, begin), set())

    rule_ends(0, 0)
    before = -1
    while before != (before := len(known) + sum(map(len, known.values()))):
        for number, begin in list(known):
            known[number, begin] |= rules[number].ends(text, begin, rule_ends)
    return len(text) in known[0, 0]


def random_tree(source: random.Random, depth: int, num_rules: int, letters: str) -> Tree:
    """A tree that uses rules up to `num_rules`."""
    kind = source.choice(
        ["text", "class", "but", "rule", "rule", "all", "all", "one", "one", "times"]
        if depth else ["text", "class", "rule"])
    if kind == "text":
        return Tree(kind, "".join(source.choices(letters, k=source.randrange(0, 3))))
    if kind in ("class", "but"):
        return Tree(kind, "".join(source.sample(letters, source.randrange(1, len(letters)))))
    if kind == "rule":
        return Tree(kind, number=source.randrange(num_rules))
    count = 1 if kind == "times" else source.randrange(2, 4)
    parts = tuple(random_tree(source, depth - 1, num_rules, letters) for _ in range(count))
    low, high = source.choice([(0, None), (1, None), (0, 1), (2, 2), (1, 2), (2, None)])
    return Tree(kind, parts=parts, low=low, high=high)


def random_text(source: random.Random, rules: list[Tree], tree: Tree, depth: int) -> str | None:
    """A text that a tree describes, None where none was found."""
    if depth == 0:
        return None
    if tree.kind == "text":
        return tree.text
    if tree.kind in ("class", "but"):
        return source.choice([c for c in LETTERS if (c in tree.text) == (tree.kind == "class")])
    parts: tuple[Tree, ...] | list[Tree] = tree.parts
    if tree.kind == "rule":
        parts = (rules[tree.number],)
    elif tree.kind == "one":
        parts = (source.choice(parts),)
    elif tree.kind == "times":
        most = tree.low + 2 if tree.high is None else tree.high
        parts *= source.randint(tree.low, most)
    texts = [random_text(source, rules, part, depth - 1) for part in parts]
    return None if None in texts else "".join(text for text in texts if text)


def random_rules(source: random.Random) -> list[Tree]:
    """Three rules, each with texts that end, which use one another."""
    while True:
        letters = "".join(source.sample(LETTERS, source.randrange(2, 6)))
        rules = [random_tree(source, 3, 3, letters) for _ in range(3)]
        if all(any(random_text(source, rules, rule, 8) is not None for _ in range(8))
               for rule in rules):
            return rules


# The last three begin with the same byte.
LETTERS = "abcdéèö"
