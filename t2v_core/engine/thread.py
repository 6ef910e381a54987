"""The thread that runs an engine, so that callers may come from any other."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue

from t2v_core.engine.engine import Engine, Request
from t2v_core.engine.events import ENDINGS, Event, Failed
from t2v_core.errors import EngineBroken, InvalidRequest, T2VError
from t2v_core.trajectory import Trajectory

logger = logging.getLogger(__name__)

_Command = Callable[[], list[Event]]


class EngineThread:
    """An engine at work. `on_event` is called in its thread with each event, in order, and should be quick."""

    def __init__(self, engine: Engine, on_event: Callable[[Event], None]) -> None:
        self._engine, self._on_event = engine, on_event
        self._commands: SimpleQueue[_Command | None] = SimpleQueue()
        self._live: set[str] = set()
        self._lock = threading.Lock()  # of _live and _is_closed
        self._is_closed = False
        self.failure: str | None = None  # of the last step, where it was none of the errors that a request can have
        self._began_s: float | None = None  # by the engine's clock; None while it waits for commands
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def busy_s(self) -> float:
        """For how long the engine has been at one thing: a step, with its wait for the device, or a command; or 0."""
        began_s = self._began_s
        return 0.0 if began_s is None else self._engine.clock() - began_s

    def add(self, request: Request) -> None:
        """Take a request in. Raises InvalidRequest for an id that is already here."""
        with self._lock:
            if self._is_closed:
                raise EngineBroken(f"request {request.id}: the engine is closed; send it to another")
            if request.id in self._live:
                raise InvalidRequest(f"request {request.id}: is already being denoised; use another id", param="id")
            self._live.add(request.id)
            arrival_s = self._engine.clock()
            self._commands.put(lambda: self._add(request, arrival_s))

    def cancel(self, request_id: str) -> None:
        """Drop a request before the next step. The event says when; of one that has ended there is none."""
        self._commands.put(lambda: self._engine.cancel(request_id))

    def take(self, request_id: str) -> "Future[Trajectory | None]":
        """Where a request stands before the next step, to go on with it elsewhere. None if it has ended.

        There is no event of it. To cancel the answer before it comes is to leave the request where it is.
        """
        return self._ask(lambda: self._take(request_id))

    def look(self, request_id: str) -> "Future[Trajectory | None]":
        """Where a request stands, to save it while it goes on. None if it has ended."""
        return self._ask(lambda: self._engine.look(request_id))

    def close(self) -> None:
        """Stop after the step at hand, with a Cancelled for each request that is left."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._commands.put(None)
        self._thread.join()

    def _ask(self, question: Callable[[], Trajectory | None]) -> "Future[Trajectory | None]":
        answer: Future[Trajectory | None] = Future()

        def command() -> list[Event]:
            if not answer.set_running_or_notify_cancel():
                return []  # nobody waits for it any more
            try:
                answer.set_result(question())
            except Exception as error:
                answer.set_exception(error)
            return []

        with self._lock:
            if self._is_closed:
                answer.set_result(None)
            else:
                self._commands.put(command)
        return answer

    def _add(self, request: Request, arrival_s: float) -> list[Event]:
        try:
            self._engine.add(request, arrival_s)
        except T2VError as error:
            return [Failed(request.id, error)]
        except Exception as error:
            # The caller has gone on, and without this thread all other requests would wait for ever.
            logger.exception("a request could not be taken in: id=%s", request.id)
            reason = f"request {request.id}: could not be taken in ({type(error).__name__}: {error}); prepare it anew"
            return [Failed(request.id, EngineBroken(reason))]
        return []

    def _take(self, request_id: str) -> Trajectory | None:
        trajectory = self._engine.take(request_id)
        if trajectory is not None:  # else it has ended, or will when its last step has
            with self._lock:
                self._live.discard(request_id)
        return trajectory

    def _run(self) -> None:
        while True:
            try:
                command = self._next_command()
            except Empty:
                self._hand_out(self._try(self._engine.advance))
                continue
            if command is None:
                break
            self._hand_out(command())
        self._hand_out(self._try(self._engine.settle))
        for request_id in self._engine.ids:
            self._hand_out(self._engine.cancel(request_id))
        self._began_s = None

    def _next_command(self) -> _Command | None:
        """Raises Empty when it is time for a step."""
        self._began_s = None
        try:
            if len(self._engine) == 0:
                return self._commands.get()
            pause_s = self._engine.pause_s()
            return self._commands.get(block=pause_s > 0, timeout=pause_s or None)
        finally:
            self._began_s = self._engine.clock()

    def _try(self, work: Callable[[], list[Event]]) -> list[Event]:
        try:
            events = work()
        except Exception as error:
            # Not one request's fault, so all of them end; a GPU that is lost stays lost, and the owner must know.
            logger.exception("denoising failed: requests=%d", len(self._engine))
            self.failure = f"{type(error).__name__}: {error}"
            reason = f"the denoiser broke down ({self.failure}): try again on another"
            return self._engine.fail_all(EngineBroken(reason))
        self.failure = None
        return events

    def _hand_out(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, ENDINGS):
                with self._lock:
                    self._live.discard(event.id)
            try:
                self._on_event(event)
            except Exception:
                logger.exception("the receiver of an event failed: event=%s", type(event).__name__)
