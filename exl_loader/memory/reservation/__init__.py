"""How much memory a model will take: computed before loading, exact, and kept.

See docs/reservation.md for every term.
"""

from .planning import PlannedModel, PlanRequest, plan, planned
from .records import DeviceReservation, Reservation

__all__ = [
    "DeviceReservation",
    "PlanRequest",
    "PlannedModel",
    "Reservation",
    "plan",
    "planned",
]
