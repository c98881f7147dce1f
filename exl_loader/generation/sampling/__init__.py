"""From a row of logits to a token.

    a grammar                             leaves out what it does not allow
    biases and bans                       always first of the samplers
    penalties, curves, filters            in the order of `sampler_priority`
    mirostat, adaptive-p                  last, because they learn from what is drawn
    one draw                              from what remains

Every sampler is a pure function of `Candidates` in `penalties`, `curves` or `filters`, and
`pipeline.STAGES` names them all; those in `feedback` have a state besides, one a request.

A row may stay on a device (`lazy_row`): then its likeliest tokens, and what is known of the
others (`rest`), decide where they surely give what the whole row would give.
"""

from .candidates import Candidates, draw
from .guidance import guide
from .lazy_row import LazyRow, argmax
from .pipeline import STAGES
from .sampler import Sampler
from .tokens import TokenRoles

__all__ = [
    "STAGES", "Candidates", "LazyRow", "Sampler", "TokenRoles", "argmax", "draw", "guide",
]
