"""Drafts of full length whatever they cost, for tests of what drafts do."""

from __future__ import annotations

from typing import Any

from exl_loader.generation.draft_pacing import DraftPacing


class FullDrafts(DraftPacing):
    """Drafts as many tokens as possible, the first jobs first."""

    def lengths(self, offers, num_jobs, num_rows, rows_left):
        counts = []
        for offer in offers:
            counts.append(min(offer.most, rows_left // offer.rows))
            rows_left -= offer.rows * counts[-1]
        return counts

    def better(self, first, second, num_jobs, num_rows):
        return first


def draft_fully(model: Any) -> Any:
    """Let a `LoadedModel` draft in full length; return it."""
    drafts = model._generator._scheduler.drafts
    drafts.pacing = FullDrafts(drafts.passes)
    return model
