"""Draws tokens from rows of logits.

For each token these run in order:

    a grammar                             restricts the tokens
    biases and bans                       always before the samplers
    penalties, curves, filters            in the order of `sampler_priority`
    mirostat, adaptive-p                  last, because their state depends on the drawn token
    one draw                              among the remaining candidates

Each sampler is a pure function of `Candidates` in `penalties`, `curves` or `filters`, and
`pipeline.SAMPLERS` lists all of them. Samplers with a state per request are in `feedback`.
To add a sampler, write its function, list it in `pipeline.SAMPLERS`, and add its settings to
`SamplingSettings` and its name to `settings.SAMPLER_PRIORITY`.

If a device has computed the top logits of a row, they are tried first; `tail` decides whether
they suffice.
"""

from .candidates import Candidates, draw
from .curves import guide
from .pipeline import SAMPLERS, NoTokenLeft
from .sampler import Sampler, TokenRoles

__all__ = ["SAMPLERS", "Candidates", "NoTokenLeft", "Sampler", "TokenRoles", "draw", "guide"]
