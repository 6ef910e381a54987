"""Whose call is next, where more wait than are made at once."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Turns:
    """Places for calls. Owners who wait take turns, and each one's calls come in their order. For one event loop."""

    def __init__(self, num_places: Callable[[], int]) -> None:
        self._num_places = num_places
        self._num_taken = 0
        self._waiting: dict[str, deque[asyncio.Event]] = {}  # by owner, whose turn is next first

    def __len__(self) -> int:
        """How many places are taken."""
        return self._num_taken

    @asynccontextmanager
    async def one(self, owner: str) -> AsyncIterator[None]:
        """A place, once it is this call's turn. Cancelled before that, it leaves the line."""
        has_come = asyncio.Event()
        line = self._waiting.setdefault(owner, deque())
        line.append(has_come)
        self.let_in()
        try:
            await has_come.wait()
            yield
        finally:
            if has_come.is_set():  # also where it was cancelled just then
                self._num_taken -= 1
                self.let_in()
            else:
                line.remove(has_come)
                if not line:
                    del self._waiting[owner]

    def let_in(self) -> None:
        """Give the free places to those who are next: also to be called when there are more of them."""
        while self._waiting and self._num_taken < self._num_places():
            owner = next(iter(self._waiting))
            line = self._waiting.pop(owner)
            line.popleft().set()
            self._num_taken += 1
            if line:
                self._waiting[owner] = line  # behind all others
