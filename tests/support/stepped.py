"""Requests whose steps run in the test's own thread, so that their order is the same each time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import exl_loader
from exl_loader.generation.jobs import Job


def start(model: Any, prompt: Any, options: dict[str, Any], as_text: bool = False) -> Job:
    """Give a request to the scheduler of a `LoadedModel`; a caller waits for it.

    The test runs the steps. Nothing may have been asked of the model before, because its own
    thread, which starts with the first question, would run steps beside the test's.
    """
    assert not model._generator._claim.locked(), "the model's thread runs steps as well"
    settings = exl_loader.SamplingSettings.from_dict(options)
    job = model._requests.job(prompt, settings, None, as_text)
    job.add_waiter()
    model._generator._scheduler.accept(job)
    return job


def read(job: Job) -> list[tuple[int, str]]:
    """Take what a job has computed, ids and pieces of text, and wait for more."""
    taken = []
    while job.output:
        taken.append(job.output.popleft())
    if not job.finished and not job._waiters:
        job.add_waiter()
    return taken


def texts_together(
    model: Any, requests: Sequence[tuple[Any, dict[str, Any]]]
) -> tuple[list[str], list[Job]]:
    """Run requests that arrive at once; return their texts and the finished jobs."""
    jobs = [start(model, *request, as_text=True) for request in requests]
    texts = [""] * len(jobs)
    while not all(job.finished for job in jobs):
        assert model._generator._scheduler.step()
        for i, job in enumerate(jobs):
            texts[i] += "".join(piece for _, piece in read(job))
    return [text + job.last_text for text, job in zip(texts, jobs, strict=True)], jobs
