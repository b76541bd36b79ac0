"""The two timing engines: against each other, queueing recursions on the same draws, and the laws of time."""

from __future__ import annotations

import gc
import heapq
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import rng
from sim.engine import EventOrder, Op, Plan, Timeline, breakdown, des, maxplus, violations

ENGINES = pytest.mark.parametrize("simulate", [des.simulate, maxplus.simulate], ids=["des", "maxplus"])
several = settings(deadline=None, max_examples=200)


def op(stream: str, duration: Any, after: tuple[int, ...] = (), transfer: Any = None, phase: str = "") -> Op:
    phase = phase or {"compute": "experts", "communication": "dispatch"}.get(stream, "")
    moved = None if transfer is None else np.array(transfer, dtype=np.int64)
    return Op(phase, 0, 0, False, stream, after, np.array(duration, dtype=np.int64), moved)  # type: ignore[arg-type]


@st.composite
def plans(draw: st.DrawFn, max_ranks: int = 5, max_ops: int = 10) -> Plan:
    """Random programs: any dependencies, sparse reach, small integers so that ties and zeros are common."""
    n_ranks = draw(st.integers(1, max_ranks))
    ops: list[Op] = []
    for index in range(draw(st.integers(0, max_ops))):
        stream = draw(st.sampled_from(["compute", "communication"]))
        after = tuple(draw(st.lists(st.integers(0, index - 1), max_size=3))) if index else ()
        duration = draw(st.lists(st.integers(0, 4), min_size=n_ranks, max_size=n_ranks))
        transfer = None
        if stream == "communication" and draw(st.booleans()):
            row = st.lists(st.integers(draw(st.sampled_from([-1, 0])), 6), min_size=n_ranks, max_size=n_ranks)
            transfer = draw(st.lists(row, min_size=n_ranks, max_size=n_ranks))
        phase = draw(st.sampled_from(["a", "b", "combine", "rebalance"]))
        ops.append(op(stream, duration, after, transfer, phase))
    return Plan(n_ranks, tuple(ops))


def same(left: Timeline, right: Timeline) -> None:
    np.testing.assert_array_equal(left.start_ps, right.start_ps)
    np.testing.assert_array_equal(left.end_ps, right.end_ps)
    np.testing.assert_array_equal(left.peer_start_ps, right.peer_start_ps)


# --- the engines agree, and agree with an example worked out by hand ---


@several
@given(plans())
def test_both_engines_give_the_same_integers(plan: Plan) -> None:
    events, recurrence = des.simulate(plan), maxplus.simulate(plan)
    same(events, recurrence)
    assert events.n_events == len(plan.ops) * plan.n_ranks and recurrence.n_events == 0
    assert events.start_ps.dtype == events.end_ps.dtype == events.peer_start_ps.dtype == np.int64


@pytest.mark.parametrize("reach", [0.02, 0.3, 1.0])
def test_both_engines_agree_on_a_large_group(reach: float) -> None:
    draw = rng.stream(1, "engine", str(reach))
    ops = []
    for index in range(40):
        moved = np.where(draw.random((33, 33)) < reach, draw.integers(0, 10**9, (33, 33)), -1)
        exchange = index % 2 == 1
        ops.append(
            op(
                "communication" if exchange else "compute",
                draw.integers(0, 10**9, 33),
                tuple(draw.integers(0, index, 2).tolist()) if index else (),
                moved if exchange else None,
            )
        )
    plan = Plan(33, tuple(ops))
    same(des.simulate(plan), maxplus.simulate(plan))
    assert violations(plan, des.simulate(plan)) == []


def two_ranks() -> Plan:
    """Rank 1 is slow in attention and sends to rank 0; rank 0 sends nothing."""
    return Plan(
        2,
        (
            op("compute", [10, 25], phase="attention"),
            op("communication", [1, 2], (0,), [[-1, -1], [8, 3]]),
            op("compute", [5, 5], (1,), phase="experts"),
        ),
    )


@ENGINES
def test_a_rank_waits_only_for_those_who_send_to_it(simulate: Callable[[Plan], Timeline]) -> None:
    plan = two_ranks()
    timeline = simulate(plan)
    assert timeline.start_ps.tolist() == [[0, 0], [10, 25], [33, 28]]
    assert timeline.end_ps.tolist() == [[10, 25], [33, 28], [38, 33]]
    assert timeline.peer_start_ps.tolist() == [[0, 0], [25, 25], [33, 28]]
    assert timeline.makespan_ps == 38
    parts = {name: part.tolist() for name, part in breakdown(plan, timeline).items()}
    # Rank 0 idles from 10 to 33: until its peer starts at 25 it waits, then data are under way.
    assert parts == {"attention": [10, 25], "experts": [5, 5], "exposed_communication": [8, 3], "waiting": [15, 5]}


@ENGINES
def test_streams_overlap_and_block_in_program_order(simulate: Callable[[Plan], Timeline]) -> None:
    plan = Plan(
        1,
        (
            op("compute", [4]),
            op("communication", [10], (0,)),
            op("compute", [4]),  # second micro-batch computes under the first one's exchange
            op("communication", [3], (2,)),  # and its exchange queues behind it
            op("compute", [5], (3,)),  # waits for that
            op("compute", [1], (1,)),  # could have run at 14, but a stream keeps its order
        ),
    )
    timeline = simulate(plan)
    assert timeline.start_ps.ravel().tolist() == [0, 4, 4, 14, 17, 22]
    parts = breakdown(plan, timeline)
    assert (parts["experts"][0], parts["exposed_communication"][0], parts["waiting"][0]) == (14, 9, 0)


@ENGINES
def test_empty_plan(simulate: Callable[[Plan], Timeline]) -> None:
    timeline = simulate(Plan(3, ()))
    assert timeline.makespan_ps == 0 and timeline.start_ps.shape == (0, 3)
    assert {name: part.tolist() for name, part in breakdown(Plan(3, ()), timeline).items()} == {
        "exposed_communication": [0, 0, 0],
        "waiting": [0, 0, 0],
    }


# --- closed forms ---


@ENGINES
def test_dense_exchange_of_nothing_is_a_barrier(simulate: Callable[[Plan], Timeline]) -> None:
    work = rng.stream(2, "engine").integers(0, 100, (20, 6))
    ops: list[Op] = []
    for duration in work:
        ops.append(op("compute", duration, (len(ops) - 1,) if ops else ()))
        ops.append(op("communication", np.zeros(6), (len(ops) - 1,), np.zeros((6, 6))))
    assert simulate(Plan(6, tuple(ops))).makespan_ps == work.max(axis=1).sum()


@several
@given(plans())
def test_free_communication_leaves_the_slowest_compute_chain(plan: Plan) -> None:
    zero = np.zeros(plan.n_ranks, dtype=np.int64)
    free = Plan(
        plan.n_ranks,
        tuple(replace(o, duration_ps=zero, transfer_ps=None) if o.stream == "communication" else o for o in plan.ops),
    )
    chain = sum((o.duration_ps for o in free.ops if o.stream == "compute"), start=zero)
    timeline = des.simulate(free)
    assert timeline.makespan_ps == chain.max(initial=0)
    assert not breakdown(free, timeline)["exposed_communication"].any()


# --- the laws of time (C7) ---


@several
@given(plans())
def test_makespan_is_within_its_bounds(plan: Plan) -> None:
    makespan = des.simulate(plan).makespan_ps
    path = np.zeros((len(plan.ops), plan.n_ranks), dtype=np.int64)  # critical path over `after` alone
    for index, o in enumerate(plan.ops):
        ready = np.max([path[a] for a in o.after], axis=0) if o.after else np.zeros(plan.n_ranks, dtype=np.int64)
        path[index] = ready + o.duration_ps
        if o.transfer_ps is not None:
            for s, r in np.argwhere(o.transfer_ps >= 0):
                path[index, r] = max(path[index, r], ready[s] + o.transfer_ps[s, r])
                assert makespan >= o.transfer_ps[s, r]
    assert makespan >= path.max(initial=0)
    for stream in ("compute", "communication"):
        work = sum((o.duration_ps for o in plan.ops if o.stream == stream), start=np.zeros(plan.n_ranks, np.int64))
        assert makespan >= work.max()
    longest = [max(o.duration_ps.max(), -1 if o.transfer_ps is None else o.transfer_ps.max()) for o in plan.ops]
    assert makespan <= sum(longest)


@several
@given(plans())
def test_no_stream_runs_two_operations_at_once(plan: Plan) -> None:
    timeline = des.simulate(plan)
    for stream in ("compute", "communication"):
        rows = [index for index, o in enumerate(plan.ops) if o.stream == stream]
        assert (timeline.start_ps[rows[1:]] >= timeline.end_ps[rows[:-1]]).all()
    assert violations(plan, timeline) == []


def judged_instant_by_instant(plan: Plan, timeline: Timeline) -> dict[str, list[int]]:
    """The rule of `breakdown`, read off a clock that ticks once per picosecond."""
    parts: dict[str, list[int]] = {o.phase: [0] * plan.n_ranks for o in plan.ops if o.stream == "compute"}
    parts |= {"exposed_communication": [0] * plan.n_ranks, "waiting": [0] * plan.n_ranks}
    for rank in range(plan.n_ranks):
        work_ends = [timeline.end_ps[index, rank] for index, o in enumerate(plan.ops) if o.stream == "compute"]
        last_work = max(work_ends, default=0)
        for now in range(timeline.makespan_ps):
            running = [
                index
                for index in range(len(plan.ops))
                if timeline.start_ps[index, rank] <= now < timeline.end_ps[index, rank]
            ]
            work = [plan.ops[index].phase for index in running if plan.ops[index].stream == "compute"]
            exchange = [index for index in running if plan.ops[index].stream == "communication"]
            assert len(work) <= 1 and len(exchange) <= 1
            assert work or exchange or now >= last_work, "a gap before work always lies under communication"
            in_flight = bool(exchange) and now >= timeline.peer_start_ps[exchange[0], rank]
            parts[work[0] if work else "exposed_communication" if in_flight else "waiting"][rank] += 1
    return parts


@several
@given(plans())
def test_breakdown_matches_the_clock_and_sums_to_the_makespan(plan: Plan) -> None:
    timeline = des.simulate(plan)
    parts = breakdown(plan, timeline)
    assert {name: part.tolist() for name, part in parts.items()} == judged_instant_by_instant(plan, timeline)
    assert all(part.dtype == np.int64 for part in parts.values())
    assert (sum(parts.values()) == timeline.makespan_ps).all()


def test_every_corrupted_time_is_noticed() -> None:
    plan = two_ranks()
    honest = des.simulate(plan)
    draw, caught = rng.stream(3, "engine", "corrupt"), 0
    for _ in range(50):
        name = ["start_ps", "end_ps", "peer_start_ps"][draw.integers(3)]
        wrong = getattr(honest, name).copy()
        wrong[draw.integers(3), draw.integers(2)] += draw.choice([-1, 1, 1000])
        caught += bool(violations(plan, replace(honest, **{name: wrong})))
    assert caught == 50
    assert "ops[1] ('dispatch', layer 0) on rank 0: end is 34 ps, must be 33 ps" in violations(
        plan, replace(honest, end_ps=honest.end_ps + np.array([[0, 0], [1, 0], [0, 0]]))
    )
    halved = replace(honest, start_ps=honest.start_ps // 2, end_ps=honest.end_ps // 2)
    assert "makespan 19 ps is less than the compute work 30 ps of a rank" in violations(plan, halved)


# --- metamorphic relations ---


def mapped(plan: Plan, change: Callable[[Op], Op]) -> Plan:
    return Plan(plan.n_ranks, tuple(change(o) for o in plan.ops))


@several
@given(plans(), st.integers(0, 10**6))
def test_scaling_all_durations_scales_the_timeline(plan: Plan, scale: int) -> None:
    def slower(o: Op) -> Op:
        moved = None if o.transfer_ps is None else np.where(o.transfer_ps < 0, -1, o.transfer_ps * scale)
        return replace(o, duration_ps=o.duration_ps * scale, transfer_ps=moved)

    once, scaled = des.simulate(plan), des.simulate(mapped(plan, slower))
    np.testing.assert_array_equal(scaled.start_ps, once.start_ps * scale)
    np.testing.assert_array_equal(scaled.end_ps, once.end_ps * scale)


@several
@given(plans(), st.randoms(use_true_random=False))
def test_permuting_ranks_permutes_the_timeline(plan: Plan, random: Any) -> None:
    order = random.sample(range(plan.n_ranks), plan.n_ranks)

    def moved(o: Op) -> Op:
        matrix = None if o.transfer_ps is None else o.transfer_ps[np.ix_(order, order)]
        return replace(o, duration_ps=o.duration_ps[order], transfer_ps=matrix)

    once, permuted = des.simulate(plan), des.simulate(mapped(plan, moved))
    same(permuted, Timeline(once.start_ps[:, order], once.end_ps[:, order], once.peer_start_ps[:, order], 0))


@several
@given(plans())
def test_an_idle_rank_changes_nothing_for_the_others(plan: Plan) -> None:
    def widened(o: Op) -> Op:
        matrix = None if o.transfer_ps is None else np.pad(o.transfer_ps, (0, 1), constant_values=-1)
        return replace(o, duration_ps=np.append(o.duration_ps, 0), transfer_ps=matrix)

    once = des.simulate(plan)
    wider = des.simulate(Plan(plan.n_ranks + 1, tuple(widened(o) for o in plan.ops)))
    np.testing.assert_array_equal(wider.end_ps[:, :-1], once.end_ps)
    assert wider.makespan_ps == once.makespan_ps


@several
@given(plans(), st.data())
def test_an_operation_without_duration_changes_nothing(plan: Plan, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(plan.ops)))
    nothing = op(data.draw(st.sampled_from(["compute", "communication"])), np.zeros(plan.n_ranks))
    later = [replace(o, after=tuple(a + (a >= at) for a in o.after)) for o in plan.ops[at:]]
    once, more = des.simulate(plan), des.simulate(Plan(plan.n_ranks, (*plan.ops[:at], nothing, *later)))
    np.testing.assert_array_equal(np.delete(more.start_ps, at, axis=0), once.start_ps)
    np.testing.assert_array_equal(np.delete(more.end_ps, at, axis=0), once.end_ps)


@several
@given(plans(), st.data())
def test_more_work_never_makes_anything_earlier(plan: Plan, data: st.DataObject) -> None:
    """Safe here because the order within a stream is fixed; Graham's anomalies need a scheduler that chooses."""
    extra = data.draw(st.lists(st.integers(0, 3), min_size=len(plan.ops), max_size=len(plan.ops)))
    longer = Plan(
        plan.n_ranks, tuple(replace(o, duration_ps=o.duration_ps + e) for o, e in zip(plan.ops, extra, strict=True))
    )
    assert (des.simulate(longer).start_ps >= des.simulate(plan).start_ps).all()


@ENGINES
def test_same_plan_same_bytes(simulate: Callable[[Plan], Timeline]) -> None:
    plan = two_ranks()
    first, second = simulate(plan), simulate(plan)
    assert first.start_ps.tobytes() == second.start_ps.tobytes() and first.end_ps.tobytes() == second.end_ps.tobytes()


# --- the stream as a queue: recursions on the same draws (O1, O2) ---


def queue(arrival: list[Any], service: list[Any], n_servers: int) -> list[Any]:
    """Start times of customers in a `des.Stream`, the class that also runs plans."""
    env = simpy.Environment()
    server = des.Stream(env, n_servers)
    jobs = []
    for ident, (when, duration) in enumerate(zip(arrival, service, strict=True)):
        here = des.Job(env, des.priority(EventOrder.ARRIVE, ident))
        here.end_in(when)
        jobs.append(des.Job(env, des.priority(EventOrder.FINISH, ident), duration, after=(here,)))
        server.submit(jobs[-1])
    env.run()
    assert server.n_waiting == 0
    assert all(job.end_ps == job.start_ps + job.duration_ps for job in jobs)
    return [job.start_ps for job in jobs]


def customers(load: float, n_servers: int = 1) -> tuple[Any, Any]:
    draw = rng.stream(4, "engine", "queue", n_servers)
    return np.cumsum(draw.exponential(1 / (load * n_servers), 20_000)), draw.exponential(1.0, 20_000)


def lindley(arrival: Any, service: Any) -> list[Any]:
    """W[n+1] = max(0, W[n] + S[n] - A[n+1]), as waiting times."""
    waits = [service[0] * 0]
    for n in range(len(service) - 1):
        waits.append(max(service[0] * 0, waits[-1] + service[n] - (arrival[n + 1] - arrival[n])))
    return waits


def test_single_server_follows_lindley() -> None:
    arrival, service = customers(load=0.8)
    waits = np.array(queue(arrival.tolist(), service.tolist(), 1)) - arrival
    assert waits.max() > 10  # the queue is a real one
    assert np.abs(waits - lindley(arrival, service)).max() <= 1e-9
    ticks = np.rint(arrival * 1e12).astype(np.int64).tolist(), np.rint(service * 1e12).astype(np.int64).tolist()
    assert [start - when for start, when in zip(queue(*ticks, 1), ticks[0], strict=True)] == lindley(*ticks)
    assert np.abs(waits - lindley(arrival, np.roll(service, 1))).max() > 1  # negative control: off by one customer


@pytest.mark.parametrize("n_servers", [2, 8])
def test_several_servers_follow_kiefer_wolfowitz(n_servers: int) -> None:
    arrival, service = customers(0.9, n_servers)
    ticks = np.rint(arrival * 1e12).astype(np.int64).tolist(), np.rint(service * 1e12).astype(np.int64).tolist()
    free, expected = [0] * n_servers, []
    for when, duration in zip(*ticks, strict=True):
        expected.append(max(when, heapq.heappop(free)))
        heapq.heappush(free, expected[-1] + duration)
    assert queue(*ticks, n_servers) == expected
    assert queue(*ticks, n_servers + 1) != expected


# --- simultaneous events (D5) ---


def processed(schedule: list[tuple[int, EventOrder, int]], written: bool) -> list[tuple[int, EventOrder, int]]:
    env, seen = simpy.Environment(), []
    for when, order, ident in schedule:
        event = simpy.Event(env)
        event._ok, event._value = True, None
        event.callbacks.append(lambda _, order=order, ident=ident: seen.append((int(env.now), order, ident)))
        env.schedule(event, des.priority(order, ident) if written else simpy.events.NORMAL, when)
    env.run()
    return seen


def test_equal_times_resolve_by_written_order_then_id() -> None:
    assert EventOrder.ARRIVE < EventOrder.FINISH < EventOrder.COMBINE < EventOrder.REBALANCE
    draw, disordered = rng.stream(5, "engine", "ties"), 0
    for _ in range(1000):
        idents = draw.choice(10**6, 12, replace=False).tolist()
        schedule = [(int(draw.integers(3)), EventOrder(draw.integers(2, 6)), ident) for ident in idents]
        assert processed(schedule, written=True) == sorted(schedule)
        disordered += processed(schedule, written=False) != sorted(schedule)
    assert disordered > 990  # negative control: SimPy's own rule, the order of insertion, is not ours


def test_operations_of_one_instant_end_by_phase_then_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    names = {5: "rebalance", 4: "combine", 3: "experts", 2: "dispatch"}

    def record(self: des.Job, delay_ps: int) -> None:
        self.callbacks.append(lambda _: seen.append((names[self.priority >> 48], self.rank)))
        genuine(self, delay_ps)

    genuine = des.Job.end_in
    monkeypatch.setattr(des.Job, "end_in", record)
    together = Plan(
        2,
        (
            op("compute", [0, 0], phase="rebalance"),
            op("communication", [0, 0], phase="combine"),
            op("compute", [7, 7], phase="experts"),
            op("communication", [7, 7], phase="dispatch"),
        ),
    )
    des.simulate(together)
    assert seen[-4:] == [("dispatch", 0), ("dispatch", 1), ("experts", 0), ("experts", 1)]
    assert seen[:4] == [("combine", 0), ("combine", 1), ("rebalance", 0), ("rebalance", 1)]


@pytest.mark.parametrize("ident", [-1, 2**48])
def test_an_id_outside_its_bits_is_refused(ident: int) -> None:
    with pytest.raises(ValueError, match="event id"):
        des.priority(EventOrder.FINISH, ident)


# --- deadlock, and what the engine promises about its surroundings ---


def meet(orders: list[list[int]]) -> int:
    """Let two ranks execute two collectives in the given orders; return how many jobs never end."""
    env = simpy.Environment()
    all_to_all = np.ones((2, 2), dtype=np.int64)
    exchanges = [des.Collective(env, np.ones(2, dtype=np.int64), all_to_all) for _ in range(2)]
    jobs = []
    for rank, order in enumerate(orders):
        stream = des.Stream(env)
        for which in order:
            ident = des.priority(EventOrder.ARRIVE, 2 * which + rank)
            jobs.append(des.Job(env, ident, collective=exchanges[which], rank=rank))
            stream.submit(jobs[-1])
    env.run()
    return sum(job.end_ps < 0 for job in jobs)


def test_one_program_order_cannot_deadlock_and_two_do() -> None:
    assert meet([[0, 1], [0, 1]]) == 0
    assert meet([[0, 1], [1, 0]]) == 4


def test_an_operation_that_never_ends_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(des.Job, "end_in", lambda self, delay_ps: None)
    with pytest.raises(RuntimeError, match="6 of 6 operations never ended"):
        des.simulate(two_ranks())


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_found(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        des.simulate(two_ranks())
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_a_process_can_wait_for_a_job() -> None:
    env = simpy.Environment()
    job = des.Job(env, des.priority(EventOrder.FINISH, 0), 5)
    times = []

    def watcher() -> Any:
        yield job
        times.append(env.now)

    env.process(watcher())
    des.Stream(env).submit(job)
    env.run()
    assert times == [5] and job.ok


# --- malformed plans ---

GOOD = op("communication", [1, 1], (), [[0, 0], [0, 0]])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (replace(GOOD, after=(1,)), r"ops\[1\] \('dispatch', layer 0\): after must name earlier .* got 1"),
        (replace(GOOD, after=(-1,)), "after must name earlier"),
        (replace(GOOD, after=(0.0,)), "after must name earlier"),  # type: ignore[arg-type]
        (replace(GOOD, stream="copy"), "stream must be one of compute, communication, got 'copy'"),  # type: ignore[arg-type]
        (replace(GOOD, stream="compute"), "transfer_ps is for communication"),
        (replace(GOOD, phase="waiting"), "reserved"),
        (replace(GOOD, duration_ps=np.array([1, 1, 1])), r"int64 array of shape \[2\], got int64 \[3\]"),
        (replace(GOOD, duration_ps=np.array([1.0, 1.0])), "got float64"),  # type: ignore[arg-type]
        (replace(GOOD, duration_ps=[1, 1]), "got list"),  # type: ignore[arg-type]
        (replace(GOOD, duration_ps=np.array([1, -1])), "duration_ps must be >= 0 ps, got -1"),
        (replace(GOOD, transfer_ps=np.array([1, 1])), r"shape \[2, 2\], got int64 \[2\]"),
        (replace(GOOD, transfer_ps=np.full((2, 2), -2)), "transfer_ps must be >= -1 ps, got -2"),
        (replace(GOOD, duration_ps=np.array([2**62 - 1, 0])), "the clock holds less than"),
    ],
)
def test_a_malformed_plan_is_refused(bad: Op, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(2, (GOOD, bad))


def test_a_plan_and_a_stream_need_someone_to_work() -> None:
    with pytest.raises(ValueError, match="n_ranks must be at least 1, got 0"):
        Plan(0, ())
    with pytest.raises(ValueError, match="n_servers must be at least 1, got 0"):
        des.Stream(simpy.Environment(), 0)
