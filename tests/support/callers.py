"""Callers that send, read and leave requests at random moments, and what has to hold meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field

from exl_loader.generation.jobs import Job


@dataclass
class Caller:
    """Someone who sends a request at a step, reads it fast or slowly, and may leave early."""

    arrives: int
    prompt: list[int]
    options: dict
    reads: float
    leaves_after: int
    job: Job | None = None
    taken: list[int] = field(default_factory=list)


def check_pages(scheduler) -> None:
    """Every page is free or held by a text, and waiting jobs hold none."""
    cache = scheduler.cache
    held = {page for job in scheduler.active for text, _ in job.texts for page in text.pages}
    for evaluation in scheduler.evaluations:
        held |= set(evaluation.sequence.pages)
    assert held.isdisjoint(cache._free) and len(held) + len(cache._free) == cache.num_pages
    assert all(request.sequence is None for request in scheduler.waiting)
    arrivals = [request.arrival for request in scheduler.waiting]
    assert arrivals == sorted(arrivals)
    assert max((job.arrival for job in scheduler.active), default=-1) < min(arrivals, default=9**9)
