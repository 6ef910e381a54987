"""Which requests the next step is for: a pure function of plain data, for the engine and for simulators.

Each request is given, when it comes, a time at which it is due. The request that is due first always runs, and others
of its group ride along as far as the row budget goes. So a request only ever waits for requests that are due before it:

    steps until it is done <= the steps of all requests that are due no later, its own included

Whatever comes afterwards: a request with priority "low" is due PATIENCE_S["low"] after it came, and a later urgent
one cannot overtake it for longer. That is all there is of classes, deadlines and aging.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from t2v_core.shapes import LatentShape

Priority = Literal["urgent", "normal", "low"]

PATIENCE_S: dict[Priority, float] = {"urgent": 0.0, "normal": 120.0, "low": 600.0}
STRETCH = 3.0  # how many times its own length alone a request may take: long ones yield to short ones


class Group(NamedTuple):
    """What requests must share to be rows of one call of the network."""

    shape: LatentShape
    num_tokens: int  # of text


class Demand(NamedTuple):
    """What decides how large a batch of a group is good: the rows that want to be in it.

    `urgent_rows` are those of urgent requests where the request due first is one of them: riders must not slow it much.
    """

    rows: int
    urgent_rows: int = 0


RowBudget = Callable[[Group, Demand], int]


@dataclass(frozen=True, slots=True)
class Entry:
    """A request as the policy sees it. `rows` is what it takes of the budget; `number` says who came first."""

    id: str
    group: Group
    rows: int
    due_s: float
    number: int
    is_urgent: bool = False

    @property
    def order(self) -> tuple[float, int]:
        return self.due_s, self.number


def due(arrival_s: float, alone_s: float, priority: Priority = "normal", deadline_s: float | None = None) -> float:
    """When a request is due that came at `arrival_s` and takes `alone_s` by itself.

    A deadline can only hasten it, and does so whatever the priority.
    """
    usual = arrival_s + PATIENCE_S[priority] + STRETCH * alone_s
    return usual if deadline_s is None else min(usual, deadline_s)


def choose(entries: Sequence[Entry], row_budget: RowBudget) -> list[Entry]:
    """The batch of the next step, in the order in which its requests came; empty only if there are none.

    The request due first is always in it, even where it alone is over the budget.
    """
    if not entries:
        return []
    first = min(entries, key=lambda entry: entry.order)
    candidates = sorted((entry for entry in entries if entry.group == first.group), key=lambda entry: entry.order)
    room = row_budget(first.group, _demand(first, candidates))
    chosen = []
    for entry in candidates:
        if entry.rows <= room or entry is first:
            chosen.append(entry)
            room -= entry.rows
    return sorted(chosen, key=lambda entry: entry.number)


def _demand(first: Entry, candidates: Sequence[Entry]) -> Demand:
    urgent_rows = sum(entry.rows for entry in candidates if entry.is_urgent) if first.is_urgent else 0
    return Demand(sum(entry.rows for entry in candidates), urgent_rows)
