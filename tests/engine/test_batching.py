"""The policy: what it promises for any requests, whenever they come."""

from hypothesis import given, settings
from hypothesis import strategies as st

from t2v_core.engine.batching import PATIENCE_S, STRETCH, Demand, Entry, Group, choose, due
from t2v_core.shapes import LatentShape

GROUPS = [Group(LatentShape(4, 16, side, side), 77) for side in (16, 32)] + [Group(LatentShape(4, 16, 32, 32), 154)]

entries = st.lists(
    st.builds(
        Entry,
        id=st.uuids().map(str),
        group=st.sampled_from(GROUPS),
        rows=st.integers(1, 2),
        due_s=st.floats(0, 100),
        number=st.integers(0, 10_000),
    ),
    max_size=12,
    unique_by=lambda entry: entry.number,
)
budgets = st.fixed_dictionaries({group: st.integers(1, 8) for group in GROUPS})


def known(budget):
    return lambda group, demand: budget[group]


@given(entries=entries, budget=budgets, data=st.data())
def test_a_batch_is_one_group_within_its_budget_and_as_full_as_it_can_be(entries, budget, data):
    chosen = choose(entries, known(budget))
    assert chosen == choose(data.draw(st.permutations(entries)), known(budget))
    if not entries:
        assert chosen == []
        return
    first = min(entries, key=lambda entry: entry.order)
    assert first in chosen
    assert {entry.group for entry in chosen} == {first.group}
    rows = sum(entry.rows for entry in chosen)
    assert len(chosen) == 1 or rows <= budget[first.group]
    left_out = [entry for entry in entries if entry.group == first.group and entry not in chosen]
    assert all(rows + entry.rows > budget[first.group] for entry in left_out)
    assert chosen == sorted(chosen, key=lambda entry: entry.number)


jobs = st.lists(
    st.tuples(
        st.integers(0, 40),  # the step before which it comes
        st.sampled_from(GROUPS),
        st.integers(1, 2),
        st.integers(1, 12),  # its steps
        st.sampled_from(sorted(PATIENCE_S)),
        st.one_of(st.none(), st.floats(0, 200)),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=300)
@given(jobs=jobs, budget=budgets, step_s=st.floats(0.01, 30))
def test_nobody_waits_for_more_than_the_steps_of_those_due_before(jobs, budget, step_s):
    """The bound on the longest wait, whoever comes later and with whatever priority."""
    arrivals, steps_left = {}, {}
    for number, (arrival, group, rows, steps, priority, deadline) in enumerate(jobs):
        due_s = due(arrival * step_s, steps * step_s, priority, deadline)
        arrivals.setdefault(arrival, []).append(Entry(str(number), group, rows, due_s, number))
        steps_left[str(number)] = steps
    here, ended, now = [], {}, 0
    while here or arrivals.keys() - range(now):
        here += arrivals.get(now, [])
        for entry in choose(here, known(budget)):
            steps_left[entry.id] -= 1
            if steps_left[entry.id] == 0:
                here.remove(entry)
                ended[entry.id] = now + 1
        now += 1
    everyone = [entry for several in arrivals.values() for entry in several]
    for entry in everyone:
        bound = sum(jobs[int(other.id)][3] for other in everyone if other.order <= entry.order)
        assert ended[entry.id] - jobs[int(entry.id)][0] <= bound


def test_a_low_request_is_served_while_urgent_ones_never_stop_coming():
    group = GROUPS[0]
    low = Entry("low", group, 2, due(0.0, 10.0, "low"), 0)
    second = next(
        second
        for second in range(10_000)
        if low in choose([low, Entry("urgent", group, 2, due(second, 1.0, "urgent"), second + 1)], lambda *_: 2)
    )
    assert second <= PATIENCE_S["low"] + STRETCH * 10.0


def test_of_two_that_come_together_the_shorter_is_due_first():
    assert due(0.0, 1.0) < due(0.0, 3.0)
    assert due(0.0, 10.0, "urgent") < due(0.0, 1.0, "normal") < due(0.0, 1.0, "low")


def test_a_deadline_hastens_and_never_delays():
    assert due(10.0, 1.0, "low", deadline_s=12.0) == 12.0
    assert due(10.0, 1.0, "urgent", deadline_s=1e6) == due(10.0, 1.0, "urgent")


def demands_of(entries):
    demands = []
    choose(entries, lambda group, demand: demands.append((group, demand)) or 8)
    return demands


def test_the_budget_hears_who_is_waiting_in_the_group_whose_turn_it_is():
    here, elsewhere = GROUPS[0], GROUPS[1]
    entries = [
        Entry("first", here, 2, 1.0, 0),
        Entry("urgent, but due later", here, 1, 2.0, 1, is_urgent=True),
        Entry("of another shape", elsewhere, 2, 3.0, 2),
    ]
    assert demands_of(entries) == [(here, Demand(rows=3, urgent_rows=0))]
    urgent = [Entry("urgent", here, 2, 0.0, 3, is_urgent=True), *entries]
    assert demands_of(urgent) == [(here, Demand(rows=5, urgent_rows=3))]
