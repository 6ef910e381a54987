"""How many may wait: when to come back where the bound is reached, and the bound of callers who wait for an answer."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serve_app.errors import QueueFull

RATE_OVER_S = 300.0
_MAX_RETRY_AFTER_S = 120.0


def queue_full(what: str, waiting: int, bound: int, num_recent: int) -> QueueFull:
    """The refusal where `waiting` of at most `bound` wait, when `num_recent` have ended in the last RATE_OVER_S."""
    retry_after_s = min(_MAX_RETRY_AFTER_S, max(1.0, (waiting - bound + 1) * RATE_OVER_S / max(1, num_recent)))
    return QueueFull(
        f"{waiting} {what} wait already: at most {bound} may; try again in {retry_after_s:.0f} s", retry_after_s
    )


class Callers:
    """Those who wait for a video until it is made, at one Ingress. None: no bound. For one event loop."""

    def __init__(
        self, max_calls: int | None, max_per_owner: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_calls, self._max_per_owner, self._clock = max_calls, max_per_owner, clock
        self._waiting = Counter[str]()  # by owner
        self._ended_s = deque[float]()

    @contextmanager
    def one(self, owner: str | None = None) -> Iterator[None]:
        """For as long as a call lasts; without an owner, only the bound of all counts. Raises QueueFull."""
        self._check(self._waiting.total(), self._max_calls, "calls in all")
        if owner is not None:
            self._check(self._waiting[owner], self._max_per_owner, "calls of this key")
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
            raise queue_full(what, waiting, bound, len(self._ended_s))
