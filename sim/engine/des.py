"""The timing of a plan by discrete events in SimPy, in integer picoseconds: the reference engine.

One SimPy event per (operation, rank), no process, no condition and no store: a `Job` is itself the event of its end, a
`Stream` starts jobs in submission order, a `Collective` schedules a rank's end directly once all its senders have
started. Events of one instant are processed by `EventOrder`, then by id, never by who was scheduled first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import simpy
from simpy.core import SimTime
from simpy.events import EventPriority

from sim.engine.plan import STREAMS, EventOrder, Op, Plan, Timeline
from sim.tokens import Bool, I64

_ID_BITS = 48
_NEVER_PS = -(2**62)


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

    duration_ps: service time; unused if ``begin`` is given.
    begin: called with the job at its start instead, and responsible for one call of `end_in`.
    start_ps, end_ps: clock readings, -1 until the job has started or ended.
    """

    def __init__(
        self,
        env: simpy.Environment,
        priority: EventPriority,
        duration_ps: SimTime = 0,
        begin: Callable[[Job], None] | None = None,
    ) -> None:
        super().__init__(env)
        self.priority = priority
        self.duration_ps = duration_ps
        self.begin = begin
        self.start_ps: SimTime = -1
        self.end_ps: SimTime = -1
        self.n_pending = 0
        self.stream: Stream

    def end_in(self, delay_ps: SimTime) -> None:
        """Schedule the end ``delay_ps`` from now."""
        self._ok = True
        self._value = None
        self.env.schedule(self, self.priority, delay_ps)

    def _released(self, _: simpy.Event) -> None:
        self.n_pending -= 1
        if not self.n_pending:
            self.stream.advance()


class Stream:
    """A first-in first-out queue in front of ``n_servers`` equal servers; with one server, a CUDA stream.

    Jobs start strictly in submission order: one whose ``after`` events are outstanding holds back those behind it.
    """

    __slots__ = ("_env", "_n_idle", "_queue")

    def __init__(self, env: simpy.Environment, n_servers: int = 1) -> None:
        if n_servers < 1:
            raise ValueError(f"n_servers must be at least 1, got {n_servers}")
        self._env = env
        self._n_idle = n_servers
        self._queue: deque[Job] = deque()

    @property
    def n_waiting(self) -> int:
        """Jobs submitted and not yet started."""
        return len(self._queue)

    def submit(self, job: Job, after: Iterable[simpy.Event] = ()) -> None:
        """Queue ``job``: it starts once all submitted before it have started, ``after`` has happened, a server idles."""
        job.stream = self
        job.callbacks.append(self._ended)
        for event in after:
            if event.callbacks is not None:
                event.callbacks.append(job._released)
                job.n_pending += 1
        self._queue.append(job)
        self.advance()

    def advance(self) -> None:
        """Start every job that may start now."""
        queue = self._queue
        while queue and self._n_idle and not queue[0].n_pending:
            job = queue.popleft()
            self._n_idle -= 1
            job.start_ps = self._env.now
            if job.begin is None:
                job.end_in(job.duration_ps)
            else:
                job.begin(job)

    def _ended(self, job: Job) -> None:
        job.end_ps = self._env.now
        self._n_idle += 1
        self.advance()


class Collective:
    """The rendezvous of one communication operation: rank r's job ends when its own send and all its arrivals have.

    The moment the last sender to r starts, r's end is known and scheduled; ranks that exchange nothing never meet.
    """

    def __init__(self, env: simpy.Environment, duration_ps: I64, transfer_ps: I64) -> None:
        """``duration_ps`` [P] and ``transfer_ps`` [P, P] as in `Op`."""
        n_ranks = len(duration_ps)
        self._env = env
        # A rank waits for itself too: its own send is one more arrival, at the latest of the two times.
        self._arrival_ps = np.where(transfer_ps >= 0, transfer_ps, _NEVER_PS)
        own = np.arange(n_ranks)
        self._arrival_ps[own, own] = np.maximum(transfer_ps[own, own], duration_ps)
        self._sends: Bool = self._arrival_ps >= 0
        self._n_missing = self._sends.sum(axis=0)
        self._n_least = int(self._n_missing.min())
        self._start_ps = np.zeros(n_ranks, dtype=np.int64)
        self._jobs: list[Job | None] = [None] * n_ranks
        self._n_joined = 0
        self.peer_start_ps = np.full(n_ranks, -1, dtype=np.int64)

    def join(self, rank: int, job: Job) -> None:
        """Note that ``rank`` starts now, and schedule the end of every rank that has only been waiting for it."""
        now = self._env.now
        self._start_ps[rank] = now
        self._jobs[rank] = job
        self._n_joined += 1
        self._n_missing -= self._sends[rank]
        if self._n_joined < self._n_least:
            return
        ready = np.flatnonzero((self._n_missing == 0) & self._sends[rank])
        if len(ready):
            # Senders that have not started are none of these ranks' and stay hugely negative.
            ends = (self._start_ps[:, None] + self._arrival_ps[:, ready]).max(axis=0)
            self.peer_start_ps[ready] = now
            for peer, end_ps in zip(ready.tolist(), ends.tolist(), strict=True):
                waiting = self._jobs[peer]
                assert waiting is not None  # its own start is one of those it waited for
                waiting.end_in(end_ps - now)


def simulate(plan: Plan) -> Timeline:
    """Run ``plan`` in a SimPy environment of its own and return the times of all operations on all ranks.

    ``n_events`` counts the SimPy events processed: one per operation and rank.
    """
    env = simpy.Environment()
    streams = {name: [Stream(env) for _ in range(plan.n_ranks)] for name in STREAMS}
    jobs: list[list[Job]] = []
    ...
