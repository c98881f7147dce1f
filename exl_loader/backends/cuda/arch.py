"""Compute capabilities: which are supported, and which compilers know them.

Machine code for X.y runs on every card X.z with z >= y (CUDA C++ Programming Guide, "Binary
Compatibility"). So a card that is newer than the compiler gets the machine code of the newest
older architecture of its generation. A card of a generation that the compiler does not know gets
PTX, which the driver compiles for any card at least as new as the PTX's architecture ("PTX
Compatibility" there).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ...utils.errors import InvalidSettings, KernelBuildError

Capability = tuple[int, int]
Version = tuple[int, int]

OLDEST: Capability = (7, 5)

# Tests, and `build --cuda-arch all`, compile every source for these.
COMMON: tuple[Capability, ...] = (
    (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0),
)

# The first CUDA release whose compilers know a capability (release notes of each).
_SINCE: dict[Capability, Version] = {
    (7, 5): (10, 0), (8, 0): (11, 0), (8, 6): (11, 1), (8, 7): (11, 4), (8, 9): (11, 8),
    (9, 0): (11, 8), (10, 0): (12, 8), (10, 3): (12, 9), (11, 0): (13, 0), (12, 0): (12, 8),
    (12, 1): (12, 9),
}

# The newest major release that the table was checked for. A newer release may know more
# architectures, and may have dropped some.
NEWEST_MAJOR = 13

# The first release whose PTX (7.8) has movmatrix, the newest instruction of csrc/cuda.
# tests/backends/cuda/test_cuda_ptx.py has the release of each instruction.
OLDEST_CUDA: Version = (11, 8)


@dataclass(frozen=True)
class Target:
    """A target of compilation for a card.

    Args:
        capability: of the architecture.
        is_ptx: whether the output is PTX, which the driver compiles for the card, instead of
            machine code.
    """

    capability: Capability
    is_ptx: bool = False

    @property
    def name(self) -> str:
        """The name for compilers: `sm_90`, or `compute_90` for PTX."""
        return arch_name(self.capability).replace("sm", "compute" if self.is_ptx else "sm")


def arch_name(capability: Capability) -> str:
    """Name a capability as compilers do: (9, 0) is `sm_90`."""
    return f"sm_{capability[0]}{capability[1]}"


def capability_of(number: int) -> Capability:
    """Return the capability of an architecture's number: 90 is (9, 0), 121 is (12, 1)."""
    return divmod(number, 10)


def parse_archs(text: str) -> list[Capability]:
    """Parse `sm_90`, `9.0`, `90`, a list of those with commas, or `all` (`COMMON`).

    Raises:
        InvalidSettings: the text is something else, or an architecture is older than 7.5.
    """
    if text.strip() == "all":
        return list(COMMON)
    return list(dict.fromkeys(_parse_arch(part.strip()) for part in text.split(",")))


def _parse_arch(text: str) -> Capability:
    match = re.fullmatch(r"(?:sm_)?(\d{1,2})\.?(\d)", text)
    capability = (int(match[1]), int(match[2])) if match else (0, 0)
    if capability < OLDEST:
        raise InvalidSettings(
            f"CUDA architecture {text!r}",
            expected="sm_75 or newer, like sm_86, or all",
            remedy="nvidia-smi --query-gpu=compute_cap --format=csv prints that of each card",
        )
    return capability


def known_capabilities(cuda: Version) -> list[Capability]:
    """Return the capabilities that compilers of a CUDA release know, from the table."""
    return [capability for capability, since in _SINCE.items() if since <= cuda]


def is_tabled(capability: Capability, cuda: Version) -> bool:
    """Tell whether the table is certain whether compilers of a release know a capability."""
    return capability in _SINCE and cuda[0] <= NEWEST_MAJOR


def target_for(capability: Capability, known: Iterable[Capability]) -> Target | None:
    """Choose the target for a card.

    Args:
        capability: of the card.
        known: capabilities that the compiler knows.

    Returns:
        Machine code for the newest known capability of the card's generation that is not newer
        than the card, else PTX for the newest one of an older generation; None if the compiler
        knows only newer capabilities.
    """
    older = [candidate for candidate in known if OLDEST <= candidate <= capability]
    same = [candidate for candidate in older if candidate[0] == capability[0]]
    if same:
        return Target(max(same))
    return Target(max(older), is_ptx=True) if older else None


def check_capability(capability: Capability, card: str) -> None:
    """Refuse a card that is too old.

    Raises:
        KernelBuildError: with the card's name.
    """
    if capability < OLDEST:
        raise KernelBuildError(
            f"graphics card {card}",
            expected="compute capability 7.5 (Turing) or newer",
            actual=f"{capability[0]}.{capability[1]}",
            remedy="Run on the CPU: device='cpu'",
        )
