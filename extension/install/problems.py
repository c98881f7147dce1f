"""What can be wrong with an installation, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass


class InstallError(Exception):
    """What went wrong and what to do about it, in one line."""


@dataclass(frozen=True)
class Problem:
    """Something that keeps the loader from working.

    Args:
        problem: what is wrong. remedy: what to do about it.
    """

    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.problem}. {self.remedy}"
