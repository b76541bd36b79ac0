"""The timing of a plan by discrete events in SimPy, in integer picoseconds: the reference engine.

One SimPy event per (operation, rank), no process, no condition and no store: a `Job` is itself the event of its end, a
`Stream` starts jobs in submission order, a `Collective` schedules a rank's end directly once all its senders have
started. Events of one instant are processed by `EventOrder`, then by id, never by who was scheduled first.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import simpy
from simpy.core import SimTime
from simpy.events import EventPriority

from sim.engine.plan import NEVER_PS, STREAMS, EventOrder, Plan, Timeline
from sim.tokens import I64, Bool

_ID_BITS = 48


def priority(order: EventOrder, ident: int) -> EventPriority:
    """Return the SimPy priority by which events of one instant are sorted: ``order`` first, then ``ident``.

    Distinct ids within an order leave nothing to SimPy's own tie rule, the insertion count. ValueError unless
    0 <= ident < 2**48.
    """
    if not 0 <= ident < 1 << _ID_BITS:
        raise ValueError(f"an event id must be in [0, 2**{_ID_BITS}), got {ident}")
    return EventPriority((order << _ID_BITS) | ident)


class Job(simpy.Event):
    """Work for one `Stream`; as a SimPy event it is the end of that work, so other jobs and processes can wait for it.

    duration_ps: service time; unused in a collective.
    after: events that must have happened before the job may start.
    collective, rank: the rendezvous that decides when the job ends, and on whose behalf the job takes part.
    start_ps, end_ps: clock readings, -1 until the job has started or ended.
    """

    start_ps: SimTime = -1
    end_ps: SimTime = -1
    _ok = True  # work cannot fail; SimPy reads this when it processes the event

    def __init__(
        self,
        env: simpy.Environment,
        priority: EventPriority,
        duration_ps: SimTime = 0,
        after: Sequence[simpy.Event] = (),
        collective: Collective | None = None,
        rank: int = 0,
    ) -> None:
        # Spelt out instead of calling Event.__init__, as SimPy's own Timeout does: one is made per operation and rank.
        self.env = env
        self.callbacks = []
        self.priority = priority
        self.duration_ps = duration_ps
        self.after = after
        self.collective = collective
        self.rank = rank

    def end_in(self, delay_ps: SimTime) -> None:
        """Schedule the end ``delay_ps`` from now."""
        self._value = None  # for SimPy: no longer pending
        self.env.schedule(self, self.priority, delay_ps)


class Stream:
    """A first-in first-out queue in front of ``n_servers`` equal servers; with one server, a CUDA stream.

    Jobs start strictly in submission order: one whose ``after`` events are outstanding holds back those behind it.
    """

    __slots__ = ("_advance", "_ended", "_env", "_n_idle", "_queue")

    def __init__(self, env: simpy.Environment, n_servers: int = 1) -> None:
        if n_servers < 1:
            raise ValueError(f"n_servers must be at least 1, got {n_servers}")
        self._env = env
        self._n_idle = n_servers
        self._queue: deque[Job] = deque()
        self._advance, self._ended = self._start_jobs, self._end_job  # bound once, used as callbacks

    @property
    def n_waiting(self) -> int:
        """Jobs submitted and not yet started."""
        return len(self._queue)

    def submit(self, job: Job) -> None:
        """Queue ``job``; it starts once all before it have started, its ``after`` has happened and a server idles."""
        job.callbacks.append(self._ended)
        self._queue.append(job)
        if len(self._queue) == 1:  # otherwise the head could not start, so nothing new can
            self._start_jobs()

    def _start_jobs(self, _: simpy.Event | None = None) -> None:
        queue = self._queue
        while queue and self._n_idle:
            job = queue[0]
            for event in job.after:
                if event.callbacks is not None:  # SimPy sets it to None when the event has happened
                    event.callbacks.append(self._advance)
                    return
            job.after = ()  # lets go of the past
            queue.popleft()
            self._n_idle -= 1
            job.start_ps = self._env.now
            if job.collective is None:
                job.end_in(job.duration_ps)
            else:
                job.collective.join(job)

    def _end_job(self, job: Job) -> None:
        job.end_ps = self._env.now
        self._n_idle += 1
        if self._queue:
            self._start_jobs()


class Collective:
    """The rendezvous of one communication operation: rank r's job ends when its own send and all its arrivals have.

    The moment the last sender to r starts, r's end is known and scheduled; ranks that exchange nothing never meet.
    """

    def __init__(self, env: simpy.Environment, duration_ps: I64, transfer_ps: I64) -> None:
        """``duration_ps`` [P] and ``transfer_ps`` [P, P] as in `Op`."""
        n_ranks = len(duration_ps)
        self._env = env
        # A rank waits for itself too: its own send is one more arrival, joined to what it sends to itself.
        self._arrival_ps = np.where(transfer_ps >= 0, transfer_ps, NEVER_PS)
        np.fill_diagonal(self._arrival_ps, np.maximum(transfer_ps.diagonal(), duration_ps))
        self._sends: Bool = self._arrival_ps >= 0
        self._n_missing = self._sends.sum(axis=0)
        self._n_least = int(self._n_missing.min())  # below this many starts nobody can be ready
        self._start_ps = np.zeros(n_ranks, dtype=np.int64)
        self._jobs: dict[int, Job] = {}
        self._n_joined = 0
        self.peer_start_ps = np.full(n_ranks, -1, dtype=np.int64)

    def join(self, job: Job) -> None:
        """Note that ``job.rank`` starts now, and schedule the end of every rank that was waiting for it alone."""
        now = int(self._env.now)
        self._start_ps[job.rank] = now
        self._jobs[job.rank] = job
        self._n_joined += 1
        if self._n_joined < self._n_least:
            return
        if self._n_joined == self._n_least:
            self._n_missing -= self._sends[list(self._jobs)].sum(axis=0)
        else:
            self._n_missing -= self._sends[job.rank]
        ready = np.flatnonzero(self._n_missing == 0)
        if len(ready):
            # A sender that has not started yet sends to none of these, so its term stays hugely negative.
            end_ps = (self._start_ps[:, None] + self._arrival_ps[:, ready]).max(axis=0)
            self._n_missing[ready] = -1  # done with
            self.peer_start_ps[ready] = now
            for rank, delay_ps in zip(ready.tolist(), (end_ps - now).tolist(), strict=True):
                self._jobs.pop(rank).end_in(delay_ps)


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """A run only allocates until it ends; letting the collector look for cycles meanwhile costs a quarter of it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def simulate(plan: Plan) -> Timeline:
    """Run ``plan`` in a SimPy environment of its own and return the times of all operations on all ranks.

    ``n_events`` counts the SimPy events processed: one per operation and rank. Raises RuntimeError should an operation
    not end, which no valid plan can cause.
    """
    with _garbage_collection_paused():
        start, end, peer_start = _run(plan)  # its jobs are gone again when collection resumes
    n_events = int(np.count_nonzero(end >= 0))
    if n_events != end.size:
        raise RuntimeError(f"engine invariant violated: {end.size - n_events} of {end.size} operations never ended")
    return Timeline(start, end, peer_start, n_events)


def _run(plan: Plan) -> tuple[I64, I64, I64]:
    """Return the starts, ends and latest peers' starts, each [n_ops, P], -1 where something never happened."""
    env = simpy.Environment()
    jobs, collectives = _submit(env, plan)
    env.run()
    shape = (len(plan.ops), plan.n_ranks)
    start = np.array([[job.start_ps for job in row] for row in jobs], dtype=np.int64).reshape(shape)
    end = np.array([[job.end_ps for job in row] for row in jobs], dtype=np.int64).reshape(shape)
    peer_start = start.copy()
    for index, collective in collectives.items():
        peer_start[index] = collective.peer_start_ps
    return start, end, peer_start


def _submit(env: simpy.Environment, plan: Plan) -> tuple[list[list[Job]], dict[int, Collective]]:
    """Queue the whole program on every rank; return its jobs [n_ops][P] and the rendezvous of each exchange."""
    streams = {name: [Stream(env) for _ in range(plan.n_ranks)] for name in STREAMS}
    collectives: dict[int, Collective] = {}
    jobs: list[list[Job]] = []
    for index, op in enumerate(plan.ops):
        first = priority(op.order, index * plan.n_ranks)
        if op.transfer_ps is not None:
            collectives[index] = Collective(env, op.duration_ps, op.transfer_ps)
        collective = collectives.get(index)
        # Earlier operations of the same stream have ended anyway when this one becomes the head of its queue.
        causes = [jobs[cause] for cause in op.after if plan.ops[cause].stream != op.stream]
        row = []
        for rank, duration_ps in enumerate(op.duration_ps.tolist()):
            after = [cause[rank] for cause in causes] if causes else ()
            job = Job(env, EventPriority(first + rank), duration_ps, after, collective, rank)
            row.append(job)
            streams[op.stream][rank].submit(job)
        jobs.append(row)
    return jobs, collectives
