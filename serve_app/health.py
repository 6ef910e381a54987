"""Whether a replica's work succeeds and comes to an end: one whose GPU is lost, or that hangs, is replaced."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar, TypeVarTuple

import torch

from serve_app.errors import Unavailable
from t2v_core.errors import T2VError

logger = logging.getLogger(__name__)

_BROKEN_AFTER = 3
_BROKEN_PAUSE_S = 30.0

_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")


async def admit(part: str, is_broken: Callable[[], bool]) -> None:
    """Let a call in. Of a part that is broken, it takes long: a quick no would only draw more calls.

    Raises Unavailable.
    """
    if is_broken():
        await asyncio.sleep(_BROKEN_PAUSE_S)
        if is_broken():
            raise Unavailable(f"the {part} broke down, and is replaced: try again in a few seconds")


def end_process(why: str) -> NoReturn:
    """End a replica at once: Serve would wait for its calls as long as a generation may take, and these do not end."""
    logger.error("%s: its process ends, and is replaced", why)
    os._exit(1)  # whatever else ends a process waits for its threads


class Health:
    """Of a part, as "decoder". Work may take `stuck_after_s`; None is for ever. For any number of threads.

    It is broken where its GPU is lost or, time after time, an error comes that nobody foresaw.
    """

    def __init__(self, part: str, stuck_after_s: float | None = None) -> None:
        self._part, self._stuck_after_s = part, stuck_after_s
        self._num_failures, self._failure = 0, ""  # in a row, and the last
        self._began_s: dict[int, float] = {}  # by thread

    def watched(self, work: Callable[[*_Arguments], _Result], *arguments: *_Arguments) -> _Result:
        """Do some work in this thread."""
        thread = threading.get_ident()
        self._began_s[thread] = time.monotonic()
        try:
            result = work(*arguments)
        except T2VError:  # what was asked for is to blame
            raise
        except Exception as error:
            # Each further look would cost a job an attempt. Memory may be there the next time.
            is_lost = isinstance(error, torch.AcceleratorError) and "out of memory" not in str(error)
            self._num_failures, self._failure = _BROKEN_AFTER if is_lost else self._num_failures + 1, repr(error)
            raise
        finally:
            del self._began_s[thread]
        self._num_failures = 0
        return result

    @property
    def is_broken(self) -> bool:
        """Whether it cannot be expected to do anything."""
        return self._num_failures >= _BROKEN_AFTER

    async def admit(self) -> None:
        """See the function of this name."""
        await admit(self._part, lambda: self.is_broken)

    def check(self, busy_s: float = 0.0) -> None:
        """Raises Unavailable where Serve shall replace this replica. Ends its process where work does not end.

        `busy_s`: for how long it has been at work that is not watched here.
        """
        now_s = time.monotonic()
        busy_s = max([busy_s, *(now_s - began_s for began_s in list(self._began_s.values()))])
        if self._stuck_after_s is not None and busy_s > self._stuck_after_s:
            end_process(f"the {self._part} has been at one thing for {busy_s:.0f} s")
        if self.is_broken:
            raise Unavailable(f"the {self._part} broke down ({self._failure}): it is replaced")
