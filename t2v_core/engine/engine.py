"""Many requests, one UNet, and a batch that changes at every denoising step."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from t2v_core.denoising import Denoising, denoise_step
from t2v_core.engine.batching import Demand, Entry, Group, Priority, choose, due
from t2v_core.engine.budgets import RowBudgets
from t2v_core.engine.counters import Counters
from t2v_core.engine.events import Admitted, Cancelled, Event, Failed, Finished, Preview, Stepped
from t2v_core.engine.fit import check_fit
from t2v_core.engine.launched import Launched, Outcome, StepKind, mark
from t2v_core.engine.preview import Previewer
from t2v_core.errors import GenerationFailed, InvalidRequest, OutOfMemory, T2VError
from t2v_core.guidance import BatchConditioning, condition
from t2v_core.out_of_memory import out_of_memory_explained
from t2v_core.shapes import LatentShape
from t2v_core.trajectory import Trajectory
from t2v_core.unet3d import NoisePredictor


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A request as the engine takes it, at any of its steps.

    `deadline_s` is by the engine's clock, and orders requests: nothing is dropped for missing it. `waited_s` is how
    long it has waited elsewhere. A preview comes after every `preview_every` steps; 0 is never.
    """

    id: str
    denoising: Denoising
    priority: Priority = "normal"
    deadline_s: float | None = None
    waited_s: float = 0.0
    preview_every: int = 0


@dataclass(slots=True)
class _Slot:
    """A request in the engine."""

    request: Request
    entry: Entry
    arrival_s: float
    is_admitted: bool = False
    failed_alone: bool = False  # since its last step, where memory ran out

    @property
    def has_no_steps_left(self) -> bool:
        """It is only here until its last step has ended."""
        return self.request.denoising.trajectory.is_finished

    def drop_features(self) -> None:
        """They hold the memory of all that was made with them, and the next step makes others."""
        self.request = replace(self.request, denoising=replace(self.request.denoising, features=None))


_LAUNCH_S = 0.006  # how long before a step ends the next is launched: more than it takes until the first kernel


class Engine:
    """Takes requests between any two steps and runs one step at a time. For one thread.

    All that changes in a request is its trajectory, and a step makes new ones: a step that fails has changed nothing.

    `step` does a step and says what came of it. `advance` does so too, but launches the next step before the one at
    hand has ended, where the device works by itself (`runs_ahead`; by default on a GPU): so it never waits for the
    engine. Whoever calls it after `pause_s` lets requests join until shortly before.

    `cached_steps`: see `denoise_step`. A batch in which one request has no features yet computes them for all. One that
    is set aside keeps none.
    """

    def __init__(
        self,
        unet: NoisePredictor,
        budgets: RowBudgets,
        *,
        previewer: Previewer | None = None,
        clock: Callable[[], float] = time.monotonic,
        runs_ahead: bool | None = None,
        cached_steps: int = 0,
    ) -> None:
        self.counters: defaultdict[LatentShape, Counters] = defaultdict(Counters)
        self.clock = clock
        self._unet, self._budgets, self._previewer = unet, budgets, previewer
        self._cached_steps = cached_steps
        self._runs_ahead = next(unet.parameters()).is_cuda if runs_ahead is None else runs_ahead
        self._launched: deque[Launched] = deque()  # first the step that the device is at
        self._ended_s = clock()  # when the newest of the steps that have ended did
        self._step_s: dict[StepKind, float] = {}  # what a step takes the device, as it says; 0 after one alone
        self._untold: list[Event] = []  # where what came after them failed
        self._slots: dict[str, _Slot] = {}
        self._num_added = 0
        # Batches are told apart by their entries: an id may come again, as another request.
        self._batch: tuple[Entry, ...] = ()  # whom the device was given last
        self._conditioning: tuple[tuple[Entry, ...], BatchConditioning] | None = None  # of whom it was made last

    def __len__(self) -> int:
        """How many requests are waiting, running or set aside."""
        return len(self._slots)

    @property
    def ids(self) -> list[str]:
        """Of all requests, first come first."""
        return list(self._slots)

    def add(self, request: Request, arrival_s: float | None = None) -> None:
        """Take a request in; it may join the next step. It came now or, by the engine's clock, at `arrival_s`.

        Raises InvalidRequest for an id that is already here, and for what this model cannot run.
        """
        if request.id in self._slots:
            raise InvalidRequest(f"request {request.id}: is already being denoised; use another id", param="id")
        trajectory, conditioning = request.denoising.trajectory, request.denoising.conditioning
        if trajectory.is_finished:
            raise InvalidRequest(f"request {request.id}: has no steps left; decode its latents", param="id")
        check_fit(request.id, request.denoising, self._unet)
        group = Group(trajectory.shape, len(conditioning.prompt))
        rows = conditioning.num_rows
        arrival_s = (self.clock() if arrival_s is None else arrival_s) - request.waited_s
        alone_s = (trajectory.num_steps - trajectory.step_index) * self._budgets.step_s(group.shape, rows)
        due_s = due(arrival_s, alone_s, request.priority, request.deadline_s)
        entry = Entry(request.id, group, rows, due_s, self._num_added, request.priority == "urgent")
        self._slots[request.id] = _Slot(request, entry, arrival_s)
        self._num_added += 1
        self.counters[group.shape].added += 1

    def cancel(self, request_id: str) -> list[Event]:
        """Drop a request. One that is not here, because it has ended, is no error."""
        if request_id not in self._slots:
            return []
        self._count(request_id).cancelled += 1
        self._remove(request_id)
        return [Cancelled(request_id)]

    def take(self, request_id: str) -> Trajectory | None:
        """Where a request stands, to go on with it elsewhere: it leaves the engine. None if it is not here."""
        trajectory = self.look(request_id)
        if trajectory is not None:
            self._count(request_id).cancelled += 1
            self._remove(request_id)
        return trajectory

    def look(self, request_id: str) -> Trajectory | None:
        """Where a request stands, to save it; it stays. None if it is not here, or has made its last step."""
        slot = self._slots.get(request_id)
        if slot is None or slot.has_no_steps_left:
            return None
        return _apart(slot.request.denoising.trajectory)

    def step(self) -> list[Event]:
        """One denoising step of the requests whose turn it is, and what came of it."""
        return self._launch() + self.settle()

    def settle(self) -> list[Event]:
        """Wait for all that was launched, and say what came of it."""
        events: list[Event] = []
        while self._launched:
            events += self._settle()
        return events

    def advance(self) -> list[Event]:
        """Launch a step, and say what came of the one before, once that has ended."""
        if not self._runs_ahead:
            return self.step()
        is_idle = not self._launched
        self._untold = self._launch()
        came_of_it = [] if is_idle else self._settle()
        events, self._untold = self._untold + came_of_it, []
        return events

    def pause_s(self) -> float:
        """How long the device can do without another step, and requests that come may still be in that."""
        if not self._launched:
            return 0.0
        at_hand = self._launched[0]
        step_s = self._step_s.get(at_hand.kind) or self._budgets.step_s(at_hand.shape, at_hand.rows)
        ends_s = max(at_hand.launched_s, self._ended_s) + step_s
        return max(0.0, ends_s - _LAUNCH_S - self.clock())

    def fail_all(self, error: T2VError) -> list[Event]:
        """Give every request up. What was not told yet comes first."""
        self._launched.clear()
        events, self._untold = self._untold, []
        return events + [event for request_id in self.ids for event in self._fail(request_id, error)]

    def _admit(self, entries: Sequence[Entry], now: float) -> list[Event]:
        events: list[Event] = []
        for entry in entries:
            slot, counters = self._slots[entry.id], self._count(entry.id)
            if not slot.is_admitted:
                slot.is_admitted = True
                counters.admitted += 1
                counters.queue_s += now - slot.arrival_s
                events.append(Admitted(entry.id, now - slot.arrival_s))
        return events

    def _launch(self) -> list[Event]:
        """Hand the device a step of the requests whose turn it is, if there are any."""
        waiting = [slot.entry for slot in self._slots.values() if not slot.has_no_steps_left]
        entries = choose(waiting, self._budgets.rows)
        if not entries:
            return []
        now = self.clock()
        events = self._admit(entries, now)
        try:
            launched = self._denoise(entries, now)
        except OutOfMemory as error:
            message = str(error)  # the error itself holds on to the memory of the step that failed
        else:
            self._keep(launched)
            return events
        return events + self._make_room(entries, message)

    @out_of_memory_explained()
    def _denoise(self, entries: Sequence[Entry], now: float) -> Launched:
        """What the step makes of each request: all that can fail comes here, before anything is kept."""
        requests = [self._slots[entry.id].request for entry in entries]
        start = mark(requests[0].denoising.trajectory.latents.device)
        batch, conditioning = [request.denoising for request in requests], self._condition(entries)
        stepped = denoise_step(self._unet, batch, conditioning, cached_steps=self._cached_steps)
        outcomes = [
            Outcome(entry, denoising, self._preview(request, denoising.trajectory))
            for entry, request, denoising in zip(entries, requests, stepped, strict=True)
        ]
        return Launched(outcomes, start, now)

    def _condition(self, entries: Sequence[Entry]) -> BatchConditioning:
        """Made once, for as long as the batch stays the same."""
        batch = tuple(entries)
        if self._conditioning is None or self._conditioning[0] != batch:
            self._conditioning = None  # it makes room first
            conditionings = [self._slots[entry.id].request.denoising.conditioning for entry in batch]
            self._conditioning = batch, condition(self._unet, conditionings)
        return self._conditioning[1]

    def _keep(self, launched: Launched) -> None:
        for entry in set(self._batch) - set(launched.entries):
            slot = self._slots.get(entry.id)
            if slot is not None and slot.entry == entry and not slot.has_no_steps_left:
                self._count(entry.id).set_aside += 1
                slot.drop_features()
        self._batch = launched.entries
        for entry, denoising, _ in launched.outcomes:
            slot = self._slots[entry.id]
            slot.request, slot.failed_alone = replace(slot.request, denoising=denoising), False
        self._launched.append(launched)

    def _settle(self) -> list[Event]:
        """Wait for the step that was launched first, and say what came of it for those who are still here."""
        if not self._launched:
            return []
        launched = self._launched.popleft()
        settled = launched.wait()
        began_s, ended_s = max(launched.launched_s, self._ended_s), self.clock()
        if settled.device_s is not None:  # the clock would count pauses as well
            self._learn(launched.kind, settled.device_s)
            if settled.was_over:  # while the next was being launched: the device has been at that since then
                ended_s = min(ended_s, began_s + settled.device_s)
        self._ended_s = ended_s
        self._count_step(launched, ended_s - began_s)
        events: list[Event] = []
        for entry, trajectory, is_finite, preview in settled.rows:
            slot = self._slots.get(entry.id)
            if slot is None or slot.entry != entry:
                continue  # it has gone meanwhile
            if not is_finite:
                reason = (
                    f"step {trajectory.step_index} of {trajectory.num_steps} gave latents that are not finite: "
                    "use bf16 or fp32, or a lower guidance scale"
                )
                events += self._fail(entry.id, GenerationFailed(reason))
                continue
            events.append(Stepped(entry.id, trajectory.step_index, trajectory.num_steps))
            if trajectory.is_finished:
                self._count(entry.id).finished += 1
                self._remove(entry.id)
                events.append(Finished(entry.id, trajectory))
            elif preview is not None:
                events.append(Preview(entry.id, trajectory.step_index, preview))
        return events

    def _learn(self, kind: StepKind, device_s: float) -> None:
        """The least that was seen, but for the first: it may have compiled something, and others made previews."""
        known_s = self._step_s.get(kind)
        self._step_s[kind] = 0.0 if known_s is None else min(device_s, known_s or device_s)

    def _make_room(self, entries: Sequence[Entry], message: str) -> list[Event]:
        """After a step that did not fit into memory: try half of it, or give up who twice did not fit alone."""
        self._conditioning = None
        for slot in self._slots.values():
            slot.drop_features()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        shape = entries[0].group.shape
        self.counters[shape].out_of_memory += 1
        if len(entries) > 1:
            self._budgets.halve(shape, sum(entry.rows for entry in entries))
            return []
        alone = self._slots[entries[0].id]
        if alone.failed_alone:
            return self._fail(alone.entry.id, OutOfMemory(message))
        alone.failed_alone = True  # what was freed may be enough: libraries take memory past torch's
        return []

    def _preview(self, request: Request, trajectory: Trajectory) -> Tensor | None:
        """None where it is not wanted, or memory does not hold it beside the batch: the video can do without."""
        every = request.preview_every
        is_due = every > 0 and trajectory.step_index % every == 0 and not trajectory.is_finished
        if self._previewer is None or not is_due:
            return None
        try:
            with out_of_memory_explained():
                return self._previewer(trajectory.x0)
        except OutOfMemory:
            self.counters[trajectory.shape].out_of_memory += 1
            return None

    def _fail(self, request_id: str, error: T2VError) -> list[Event]:
        self._count(request_id).failed += 1
        self._remove(request_id)
        return [Failed(request_id, error)]

    def _remove(self, request_id: str) -> None:
        del self._slots[request_id]
        if not self._slots:  # nobody's memory while the engine is idle
            self._conditioning = None
            self._launched.clear()

    def _count(self, request_id: str) -> Counters:
        return self.counters[self._slots[request_id].entry.group.shape]

    def _count_step(self, launched: Launched, seconds: float) -> None:
        rows = launched.rows
        counters = self.counters[launched.shape]
        counters.steps += 1
        counters.step_s += seconds
        counters.rows += rows
        counters.budget_rows += max(rows, self._budgets.rows(launched.entries[0].group, Demand(rows)))
        self._budgets.succeeded(launched.shape)


def _apart(trajectory: Trajectory) -> Trajectory:
    """The same without the rows of its neighbours, whose memory it shares."""
    return replace(trajectory, latents=trajectory.latents.clone(), history=trajectory.history.clone())
