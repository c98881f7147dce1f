"""Other machines for plans, in this process: questions and answers go through real JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

from exl_loader.memory.reservation import LoadOptions, planned
from exl_loader.memory.reservation.answers import PlanAnswers


@dataclass(frozen=True)
class FakeMachine:
    place: int
    rank: int
    host: str

    @property
    def name(self) -> str:
        if self.place == 0:
            return f"the first machine ({self.host})"
        return f"machine {self.rank} ({self.host})"


class FakeConnection:
    """A connection to machines that answer in this process.

    Args:
        models: each other machine's folder of models, or model folder.
        options: each one's own options; none where it is shorter.

    Attributes:
        first, others: the machines.
        answers: those of the other machines, in order.
        asked: (place, question) -> how often.
        change: called with question and reply, in place of which it returns another.
    """

    def __init__(self, models, options=()) -> None:
        self.first = FakeMachine(0, 0, "host-a")
        self.others = tuple(
            FakeMachine(i, i, f"host-{'bcdefgh'[i - 1]}") for i in range(1, len(models) + 1)
        )
        options = [*options, *[None] * len(models)]
        self.answers = [
            PlanAnswers(folder, chosen) for folder, chosen in zip(models, options, strict=False)
        ]
        self.asked: Counter = Counter()
        self.change = lambda question, reply: reply

    def ask_each(self, fields, question):
        replies = {}
        for place, own in fields.items():
            self.asked[place, question] += 1
            assert json.loads(json.dumps(own)) == own, "no JSON types"
            reply = self.answers[place - 1].answer(question, json.loads(json.dumps(own)))
            replies[place] = json.loads(json.dumps(self.change(question, reply), allow_nan=False))
        return replies

    def close(self) -> None:
        for answers in self.answers:
            answers.close()


def plan_over(connection, folder, connection_bytes: int = 0, **options):
    """Return the reservation of a plan over machines."""
    chosen = LoadOptions.from_keywords("plan", options)
    with planned(folder, chosen, connection, connection_bytes) as model:
        return model.reservation
