"""How many may wait: when to come back where the bound is reached, and the bound of callers who wait for an answer."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serve_app.errors import QueueFull

RATE_OVER_S = 300.0
_MAX_RETRY_AFTER_S = 120.0


def queue_full(
    what: str, waiting: int, bound: int, num_recent: int, most_retry_after_s: float = _MAX_RETRY_AFTER_S
) -> QueueFull:
    """The refusal where `waiting` of at most `bound` wait, when `num_recent` have ended in the last RATE_OVER_S."""
    retry_after_s = min(most_retry_after_s, max(1.0, (waiting - bound + 1) * RATE_OVER_S / max(1, num_recent)))
    return QueueFull(
        f"{waiting} {what} wait already: at most {bound} may; try again in {retry_after_s:.0f} s", retry_after_s
    )


class Callers:
    """Those who wait at one Ingress, as for a video until it is made. None: no bound. For one event loop.

    A refusal says `what` they are, and to come again after `most_retry_after_s` at most.
    """

    def __init__(
        self,
        max_calls: int | None,
        max_per_owner: int | None,
        clock: Callable[[], float] = time.monotonic,
        *,
        what: str = "calls",
        most_retry_after_s: float = _MAX_RETRY_AFTER_S,
    ) -> None:
        self._max_calls, self._max_per_owner, self._clock = max_calls, max_per_owner, clock
        self._what, self._most_retry_after_s = what, most_retry_after_s
        self._waiting = Counter[str]()  # by owner
        self._ended_s = deque[float]()

    @contextmanager
    def one(self, owner: str | None = None) -> Iterator[None]:
        """For as long as a call lasts; without an owner, only the bound of all counts. Raises QueueFull."""
        self._check(self._waiting.total(), self._max_calls, f"{self._what} in all")
        if owner is not None:
            self._check(self._waiting[owner], self._max_per_owner, f"{self._what} of this key")
        name = owner or ""
        self._waiting[name] += 1
        try:
            yield
        finally:
            self._waiting[name] -= 1
            self._ended_s.append(self._clock())

    def _check(self, waiting: int, bound: int | None, what: str) -> None:
        while self._ended_s and self._ended_s[0] < self._clock() - RATE_OVER_S:
            self._ended_s.popleft()
        if bound is not None and waiting >= bound:
            raise queue_full(what, waiting, bound, len(self._ended_s), self._most_retry_after_s)
