"""How much memory a model will take: computed before loading, exact, and kept.

See docs/reservation.md for every term.
"""

from .options import LoadOptions
from .planning import PlannedModel, plan, planned
from .records import DeviceReservation, Reservation

__all__ = [
    "DeviceReservation",
    "LoadOptions",
    "PlannedModel",
    "Reservation",
    "plan",
    "planned",
]
