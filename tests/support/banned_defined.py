"""What a greedy text without banned strings is, by definition: every text is looked at whole."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count

import torch

from exl_loader.text.tokenizer import Tokenizer

# As many ids as the largest of the tokenizers has.
VOCAB = 600

Logits = Callable[[list[int]], torch.Tensor]


def invented(ids: Iterable[int], seed: int = 0) -> Logits:
    """A model that writes some ids only, each as likely as all of the text before says."""
    ids = sorted(set(ids))

    def logits(text: list[int]) -> torch.Tensor:
        rng = random.Random(f"{seed} {text}")
        row = torch.full((VOCAB,), -40.0)
        row[ids] = torch.tensor([rng.gauss(0, 2) for _ in ids])
        return row

    return logits


def letters_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return [i for letter in text for i in tokenizer.encode(letter, add_bos=False)]


def first_complete(text: str, banned: Iterable[str]) -> int | None:
    """Where the first complete banned string begins, by trying all ends and all strings."""
    folded = text.casefold()
    assert len(folded) == len(text)
    for end in range(1, len(folded) + 1):
        for one in sorted(banned, key=len):
            if folded[:end].endswith(one.casefold()):
                return end - len(one)
    return None


@dataclass
class Defined:
    """A greedy answer by definition: no cache and no state, one text after the other.

    Args:
        ids: the answer.
        num_texts: number of different texts whose next token was wanted.
        num_excluded: number of tokens that were taken back.
        num_lost: number of tokens after those, which were taken back as well.
    """

    ids: list[int]
    num_texts: int
    num_excluded: int
    num_lost: int


def define(
    tokenizer: Tokenizer, logits: Logits, banned: Iterable[str], length: int, eos: Iterable[int],
    min_new: int = 0, may_follow: Callable[[list[int]], Iterable[int]] | None = None,
) -> Defined:
    ids: list[int] = []
    excluded: dict[tuple[int, ...], set[int]] = {}
    seen, lost = set(), 0
    while len(ids) < length:
        seen.add(tuple(ids))
        row = logits(ids).clone()
        if may_follow is not None:
            allowed = torch.zeros(len(row), dtype=torch.bool)
            allowed[list(may_follow(ids))] = True
            row[~allowed] = -torch.inf
        row[list(excluded.get(tuple(ids), ()))] = -torch.inf
        if len(ids) < min_new:
            row[list(eos)] = -torch.inf
        assert row.max() > -torch.inf
        if int(row.argmax()) in eos:
            break
        ids.append(int(row.argmax()))
        start = first_complete(tokenizer.decode(ids), banned)
        if start is not None:
            first = next(i for i in count() if len(tokenizer.decode(ids[: i + 1])) > start)
            excluded.setdefault(tuple(ids[:first]), set()).add(ids[first])
            lost += len(ids) - first - 1
            del ids[first:]
    return Defined(ids, len(seen), sum(map(len, excluded.values())), lost)
