"""A recorded run as a trace that opens in Perfetto (https://ui.perfetto.dev) and in chrome://tracing."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from sim.engine.recording import Recorded, RecordedPipeline, RecordedService, RecordedStep
from sim.results import Result
from sim.timeline.events import Scribe, members
from sim.timeline.pipeline import PipelineView
from sim.timeline.serving import ServiceView
from sim.timeline.step import StepView
from sim.tokens import I64
from sim.units import PS_PER_S

__all__ = ["MOST_EVENTS", "chrome_trace", "left_out"]

MOST_EVENTS = 700_000
"""Events of a trace, about 100 MB of JSON: what a browser opens in seconds."""
_BATCH, _ABOUT = 4096, 5


class View(Protocol):
    """What a trace shows of one record. counts: events by two coordinates, ``units`` says which; what does not fit is left
    out from the end, first of the first one. until_ps: the last moment."""

    units: tuple[str, str]
    policy: str
    until_ps: int

    @property
    def counts(self) -> I64: ...

    def events(self, scribe: Scribe, first: int, second: int) -> Iterator[str]: ...


@dataclass(frozen=True)
class _Kept:
    """How much of every record is shown: its first ``first`` x ``second``, and of ``policies`` policies."""

    policies: int
    first: int
    second: int


def chrome_trace(result: Result, most_events: int = MOST_EVENTS) -> bytes:
    """Return the timeline of ``result.recorded`` as gzipped JSON in the Trace Event Format; the same bytes for the same run.

    At most ``most_events`` events: of what does not fit, whole nodes and then layers are left out from the end (of a
    service, the end of the time), as `left_out` says and the trace itself does. Raises ValueError for a run that was not
    recorded.
    """
    views = _views(result)
    kept = _fit(views, most_events)
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=6, mtime=0) as file:
        file.write(b'{"displayTimeUnit":"ns","traceEvents":[\n')
        lines, opened = _lines(result, views, kept), False
        while batch := list(islice(lines, _BATCH)):
            file.write(((",\n" if opened else "") + ",\n".join(batch)).encode())
            opened = True
        file.write(f'\n],"otherData":{{{members(_about(result, views, kept))}}}}}\n'.encode())
    return buffer.getvalue()


def left_out(result: Result, most_events: int = MOST_EVENTS) -> str:
    """Return one line on what `chrome_trace` leaves out of the run; empty if nothing."""
    views = _views(result)
    return _left_out(result, views, _fit(views, most_events))


def _views(result: Result) -> list[View]:
    if not result.recorded:
        raise ValueError("nothing was recorded: no step of this run was timed, or it was not asked for a timeline")
    return [_view(recorded) for recorded in result.recorded]


def _view(recorded: Recorded) -> View:
    match recorded:
        case RecordedStep():
            return StepView(recorded)
        case RecordedPipeline():
            return PipelineView(recorded)
        case RecordedService():
            return ServiceView(recorded)


def _fit(views: Sequence[View], most: int) -> _Kept:
    """Return the most that fits, alike for all policies so that they can be compared."""
    firsts, seconds = (max(view.counts.shape[axis] for view in views) for axis in (0, 1))

    def fits(policies: int, first: int, second: int) -> bool:
        return _ABOUT + sum(int(view.counts[:first, :second].sum()) for view in views[:policies]) <= most

    for first in range(firsts, 0, -1):
        if fits(len(views), first, seconds):
            return _Kept(len(views), first, seconds)
    for second in range(seconds - 1, 0, -1):
        if fits(len(views), 1, second):
            return _Kept(len(views), 1, second)
    policies = next((n for n in range(len(views), 1, -1) if fits(n, 1, 1)), 1)
    return _Kept(policies, 1, 1)


def _left_out(result: Result, views: Sequence[View], kept: _Kept) -> str:
    found = []
    firsts, seconds = (max(view.counts.shape[axis] for view in views) for axis in (0, 1))
    for n, of, unit in ((kept.first, firsts, views[0].units[0]), (kept.second, seconds, views[0].units[1])):
        if n < of:
            found.append(f"all but the first {n} of {of} {unit}")
    if kept.policies < len(views):
        found.append(f"the policies after {views[kept.policies - 1].policy!r}")
    cut = [r for r in result.recorded if isinstance(r, RecordedService) and r.until_ps < r.end_ps]
    if cut:
        found.append(f"what comes after {min(r.until_ps for r in cut) / PS_PER_S:.6g} s")
    return f"timeline leaves out {' and '.join(found)}: more than viewers open" if found else ""


def _about(result: Result, views: Sequence[View], kept: _Kept) -> dict[str, str]:
    """What a reader has to know about the trace."""
    first = result.recorded[0]
    what = "all requests" if isinstance(first, RecordedService) else f"step {first.step}, the last one timed,"
    about = {"scenario": result.scenario.name, "shows": f"{what} of replica {first.replica} under every policy"}
    if any(isinstance(recorded, RecordedService) and len(recorded.handovers) for recorded in result.recorded):
        about["arrows"] = (
            "a sample of requests, from the iteration that computed the prompt to the first that decodes it"
        )
    omitted = _left_out(result, views, kept)
    return about | ({"left out": omitted} if omitted else {})


def _lines(result: Result, views: Sequence[View], kept: _Kept) -> Iterator[str]:
    shown = views[: kept.policies]
    scribe = Scribe()
    about = _about(result, views, kept)
    pid, lines = scribe.process("about this trace")
    yield from lines
    tid, lines = scribe.thread(pid, about["scenario"])
    yield from lines
    yield scribe.slice(pid, tid, about["shows"], 0, max(view.until_ps for view in shown), members(about), "about")
    for view in shown:
        yield from view.events(scribe, kept.first, kept.second)
