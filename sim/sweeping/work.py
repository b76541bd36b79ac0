"""Running the points of a sweep: what is left to do, on whom, and how far it is."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sim import backends
from sim.backends import TRIES, Lost
from sim.estimate import Estimate, free_memory_bytes
from sim.results import Table
from sim.sweeping import dataset
from sim.sweeping.evaluate import PointFailed, attempt
from sim.sweeping.folder import opened
from sim.sweeping.points import Plan, Point
from sim.sweeping.sweep import Sweep, in_memory, read
from sim.units import human
from sim.workers import pace, processes

MAX_SECONDS = 24 * 3600.0
"""A sweep that takes more than a day deserves a second look."""


class PointLost(Exception):
    """A point whose worker was killed every time."""


class TooLong(Exception):
    """A sweep beyond the limits; the text says by how much and what to lower."""


def run(
    plan: Plan,
    folder: Path | None,
    *,
    jobs: int | None = None,
    backend: str = "local",
    address: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
    progress: bool = False,
) -> Sweep:
    """Run the points that have not run yet, and return the sweep.

    folder: where it is written, point by point; None: nowhere. Raises `sim.sweeping.folder.Refused` and `TooLong` before
    anything is written; later `PointLost`, ValueError (a point that cannot run after all) and OSError, and parts that were
    written stay.
    """
    schema = dataset.schema(plan.values, [metric.name for metric in plan.metrics])
    kind = backends.get(backend)
    tables: dict[int, Any] = {}
    with ExitStack() as stack:
        left, begin = plan.running, None
        if folder is not None:
            begin = stack.enter_context(opened(plan, folder, resume=resume, overwrite=overwrite))
            if not overwrite:
                left = [point for point in left if not _done(folder, point, schema)]
        todo = _together(left)
        asked = processes(jobs, len(todo), total(todo)) if backend == "local" else jobs
        engine = stack.enter_context(kind(asked, address))
        if not force:
            check(plan, todo, engine.workers, here=address is None)
        if begin is not None:
            begin()
        with _bar(todo, progress) as advance:
            for index, rows in _ran(plan, todo, engine):
                for point in todo[index]:
                    part = dataset.part(schema, point.values, rows)
                    if folder is None:
                        tables[point.index] = part
                    else:
                        dataset.write(folder, point.index, part)
                advance(index)
    return in_memory(plan, schema, tables) if folder is None else read(folder)


def _done(folder: Path, point: Point, schema: Any) -> bool:
    return dataset.done(folder, point.index, schema, len(point.policies) * point.replicas)


def _ran(plan: Plan, todo: Sequence[Sequence[Point]], engine: backends.Backend) -> Iterator[tuple[int, Table]]:
    """Yield runs by number with their rows, as they end; an error names the point."""
    try:
        yield from engine.run(attempt, _Items(todo))
    except PointFailed as error:
        raise ValueError(f"{plan.named(todo[error.index][0])}: {error.text}") from None
    except Lost as error:
        raise PointLost(
            f"{plan.named(todo[error.index][0])}: its worker was killed {TRIES} times, out of memory most likely: "
            "try fewer --jobs"
        ) from None


def _together(points: Sequence[Point]) -> list[list[Point]]:
    """Points by run, the longest runs first: so the last process to finish is not late by much."""
    runs: dict[str, list[Point]] = {}
    for point in points:
        runs.setdefault(point.run, []).append(point)
    return sorted(runs.values(), key=lambda points: -_expected(points[0]).seconds)


def _expected(point: Point) -> Estimate:
    assert point.expected is not None
    return point.expected


def total(todo: Sequence[Sequence[Point]]) -> Estimate:
    """Estimate runs: seconds are of all on one core, memory is of the largest."""
    parts = [_expected(points[0]) for points in todo]
    return Estimate(
        sum(part.token_layers for part in parts),
        sum(part.events for part in parts),
        max((part.memory_bytes for part in parts), default=1.0),
        sum(part.seconds for part in parts),
        "",
    )


def expected(plan: Plan) -> Estimate:
    """Estimate all runs of a plan; see `total`."""
    return total(_together(plan.running))


def check(plan: Plan, todo: Sequence[Sequence[Point]], workers: int, here: bool) -> None:
    """Raise TooLong if a point, or all together on ``workers``, exceed the limits. here: whether on this machine."""
    big = [points[0] for points in todo if _expected(points[0]).too_big]
    if big:
        lines = [f"{plan.named(point)}: too big: {_expected(point).reason}" for point in big[:3]]
        lines += [f"and {len(big) - 3} more points"] if len(big) > 3 else []
        raise TooLong("\n".join([*lines, "--force runs them all the same"]))
    workers = max(1, min(workers, len(todo)))
    memory = workers * total(todo).memory_bytes
    if here and workers > 1 and memory > (free := free_memory_bytes()):
        raise TooLong(
            f"{workers} processes take about {human(memory, 'B')} of memory, more than the free {human(free, 'B')}: lower "
            "--jobs; --force runs them all the same"
        )
    seconds = total(todo).seconds / workers
    if seconds > MAX_SECONDS:
        knobs = [f"{key} ({len(values)} values)" for key, values in plan.values.items()]
        replicas = plan.scenario.replicas
        knobs += [f"replicas = {replicas}"] if replicas > 1 else []
        raise TooLong(
            f"{len(todo)} runs take about {seconds / 3600:.3g} hours on {workers} process{'es' * (workers > 1)}, over "
            f"{MAX_SECONDS / 3600:g}: lower {' or '.join(knobs)}, draw fewer points (--design sobol --points N), or give it "
            "more --jobs or machines (--backend); --force runs it all the same"
        )


class _Items(Sequence[Any]):
    """Scenario data of runs, made when they start: thousands of scenarios at once would take gigabytes."""

    def __init__(self, todo: Sequence[Sequence[Point]]) -> None:
        self.todo = todo

    def __len__(self) -> int:
        return len(self.todo)

    def __getitem__(self, index: Any) -> Any:
        point = self.todo[index][0]
        return index, json.loads(point.data), point.run


@contextmanager
def _bar(todo: Sequence[Sequence[Point]], progress: bool) -> Iterator[Callable[[int], None]]:
    """Give a function to call with each run that has ended. The bar's time left goes by what the runs were estimated to
    take, for they may differ a hundredfold; without a terminal it says something every half minute."""
    if not progress:
        yield lambda index: None
        return
    from tqdm import tqdm

    seconds = [_expected(points[0]).seconds for points in todo]
    with tqdm(
        total=sum(seconds),
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left",
        desc=f"0 of {len(todo)} runs",
        file=sys.stderr,
        leave=False,
        smoothing=0.0,
        **pace(),
    ) as bar:
        ended = itertools.count(1)

        def advance(index: int) -> None:
            bar.set_description_str(f"{next(ended)} of {len(todo)} runs", refresh=False)
            bar.update(seconds[index])

        yield advance
