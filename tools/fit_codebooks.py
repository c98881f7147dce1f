"""Fit the codebooks of cache codes: Lloyd's iteration under the writer's own search.

    python tools/fit_codebooks.py [--bits 3] [--rounds 40] [--vectors 1500]

Starts at the codebooks that are in use. Every round quantises rotated vectors of several kinds
with `reference_codec.search_groups`, then moves each level to the least-squares value of the
elements that chose it; in the last quarter levels are rounded to what int8 holds. Kinds weigh
alike: each counts relative to the error it should have. Prints the errors, then the tables.
With its defaults it takes a minute or two; the codebooks in use came from 80 rounds over
6,000 vectors of each kind.

With 3 bits all errors are larger by nearly the same factor, so that the kinds weigh as with 4.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

# A checkout works without being installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from exl_loader.backends.reference.codec import CODEBOOKS, levels, rotate, search_groups
from exl_loader.cache.layout import GROUP

HEAD_DIM = 128
UNIT = 128
LARGEST = 127
# Outlier channels and their factor -> the squared error that is aimed at.
KINDS = {(0, 1): 0.0053, (3, 20): 0.0038, (5, 30): 0.004, (8, 20): 0.0042, (8, 40): 0.0042}


@dataclass(frozen=True)
class Kind:
    """Groups of one kind of data.

    Args:
        name: for people. weight: what a unit of squared error counts.
        groups: float32 [n, GROUP], rotated. energy: sum of their squares.
    """

    name: str
    weight: float
    groups: torch.Tensor
    energy: float


def make_kind(channels: int, factor: float, target: float, vectors: int) -> Kind:
    """Draw vectors whose outlier channels are elsewhere in each."""
    generator = torch.Generator().manual_seed(1000 * channels + int(factor))
    x = torch.randn(vectors, HEAD_DIM, generator=generator)
    places = torch.rand(vectors, HEAD_DIM, generator=generator).argsort(dim=1)[:, :channels]
    x.scatter_(1, places, x.gather(1, places) * factor)
    groups = rotate(x.double()).float().unflatten(1, (-1, GROUP)).flatten(0, 1)
    energy = groups.double().square().sum().item()
    return Kind(f"{channels} channels x {factor}", 1 / (energy * target), groups, energy)


def fit_round(
    kinds: list[Kind], grids: torch.Tensor, bits: int = 4
) -> tuple[torch.Tensor, list[float]]:
    """Run one round: new levels, float32 [tables, 2^bits], and each kind's relative error."""
    products, norms = torch.zeros(2, *grids.shape, dtype=torch.float64)
    errors = []
    for kind in kinds:
        found = search_groups(kind.groups, bits, grids)
        errors.append(found.errors.double().sum().item() / kind.energy)
        scales = found.scales.double().expand(kind.groups.shape)
        index = (found.tables.long() * grids.shape[1] + found.codes.long()).flatten()
        for sums, terms in ((products, scales * kind.groups), (norms, scales.square())):
            sums.view(-1).index_add_(0, index, (terms * kind.weight).flatten())
    fitted = torch.where(norms > 0, products / norms, grids.double())
    fitted *= LARGEST / UNIT / fitted.abs().amax(dim=1, keepdim=True)
    return fitted.float(), errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, choices=sorted(CODEBOOKS), default=4)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--vectors", type=int, default=1500, help="of each kind")
    args = parser.parse_args()
    kinds = [make_kind(*key, target, args.vectors) for key, target in KINDS.items()]
    grids = levels(args.bits)
    for number in range(args.rounds):
        grids, errors = fit_round(kinds, grids, args.bits)
        if number >= args.rounds * 3 // 4:
            grids = (grids * UNIT).round() / UNIT
        shown = "  ".join(f"{kind.name} {e:.5f}" for kind, e in zip(kinds, errors, strict=True))
        print(f"round {number}: {shown}", flush=True)
    for table in (grids * UNIT).round().int().tolist():
        print(tuple(table))


if __name__ == "__main__":
    main()
