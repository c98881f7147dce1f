"""Compute capabilities: which are supported, and which compiler knows which.

Machine code for X.y runs on every card X.z with z >= y (CUDA C++ Programming Guide, "Binary
Compatibility"), so a card that is newer than the compiler is served by the nearest older one
of its generation.
"""

from __future__ import annotations

import re

from ...errors import InvalidSettings, KernelBuildError

Capability = tuple[int, int]
Version = tuple[int, int]

OLDEST: Capability = (7, 5)

# Which every source is compiled for in the tests, and by `build --cuda-arch all`.
COMMON: tuple[Capability, ...] = (
    (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0),
)

# The first CUDA release whose compilers know a capability (release notes of each).
_SINCE: dict[Capability, Version] = {
    (7, 5): (10, 0), (8, 0): (11, 0), (8, 6): (11, 1), (8, 7): (11, 4), (8, 9): (11, 8),
    (9, 0): (11, 8), (10, 0): (12, 8), (10, 3): (12, 9), (11, 0): (13, 0), (12, 0): (12, 8),
    (12, 1): (12, 9),
}

# Below this, NVRTC and nvcc lack C++17 or the L1 hints that platform.cuh uses.
OLDEST_CUDA: Version = (11, 4)


def arch_name(capability: Capability) -> str:
    """Name a capability as compilers do: (9, 0) is `sm_90`."""
    return f"sm_{capability[0]}{capability[1]}"


def parse_archs(text: str) -> list[Capability]:
    """Read `sm_90`, `9.0`, `90`, a list of those with commas, or `all` (`COMMON`).

    Raises:
        InvalidSettings: something else, or older than 7.5.
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
            remedy="nvidia-smi --query-gpu=compute_cap --format=csv says what a card is",
        )
    return capability


def compiled_capability(capability: Capability, cuda: Version) -> Capability | None:
    """Choose what a compiler of CUDA `cuda` compiles for, so that a card can run it.

    Returns:
        The newest capability of the card's generation that both know; None where the
        compiler knows none.
    """
    known = [
        candidate
        for candidate, since in _SINCE.items()
        if candidate[0] == capability[0] and candidate <= capability and since <= cuda
    ]
    return max(known, default=None)


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
