"""From what a user asks to a finished `Front`: goals and space checked first, then the search, part by part on disk."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sim import backends
from sim.backends import Lost
from sim.designs import Axis
from sim.designs.block import SweepBlock
from sim.estimate import Estimate, estimate
from sim.loading import check
from sim.located import Problem, ScenarioError
from sim.optimizing import folder as disk
from sim.optimizing.front import Front
from sim.optimizing.goals import Goal, Limit, goals, limits, usual_goals
from sim.optimizing.search import BATCH, Trial, search
from sim.optimizing.space import POLICY, Place, Space, check_axes, chosen
from sim.results import Table, metrics_of
from sim.rng import stream
from sim.scenario import Scenario
from sim.store import resolved_data
from sim.sweeping import dataset
from sim.sweeping.axes import Varied, from_block
from sim.sweeping.evaluate import evaluate
from sim.sweeping.manifest import definition
from sim.sweeping.points import Plan
from sim.sweeping.work import MAX_SECONDS, TooLong
from sim.workers import pace, processes
from sim.yamlfile import Document

CHECKED = 30
"""Trials of the front whose axes are looked at for those without effect: some 50 ms each."""


SAMPLED = 8
"""Places drawn to estimate what a run of the search takes."""


class TrialLost(Exception):
    """A trial whose worker was killed every time."""


@dataclass(frozen=True)
class Question:
    """A checked search: where, for what, and for how long. dropped: usual goals that only some policies have, and the
    policies that lack them."""

    scenario: Scenario
    space: Space
    goals: tuple[Goal, ...]
    limits: tuple[Limit, ...]
    trials: int
    batch: int
    seed: int
    dropped: dict[str, list[str]] = field(default_factory=dict)


def question(
    document: Document,
    varied: Sequence[Varied],
    *,
    minimize: Sequence[str] = (),
    maximize: Sequence[str] = (),
    subject_to: Sequence[str] = (),
    policies: Sequence[str] = (),
    trials: int = 100,
    batch: int = BATCH,
    seed: int = 0,
    allow_outside: bool = False,
    force: bool = False,
) -> Question:
    """Check a search. varied: axes; none: those of the document's ``sweep`` block. Raises ScenarioError with all problems,
    and ImportError if Optuna is absent."""
    import optuna  # noqa: F401 - absent: said before anything runs

    base = check(document, allow_outside=allow_outside)
    metrics = metrics_of(base)
    problems: list[Problem] = []

    def attempt(job: Callable[[], Any]) -> Any:
        try:
            return job()
        except ScenarioError as error:
            problems.extend(error.problems)

    aims = attempt(lambda: goals(metrics, minimize, maximize))
    bounds = attempt(lambda: limits(metrics, subject_to))
    names = attempt(lambda: chosen(base, policies))
    if problems:
        raise ScenarioError(problems)
    axes = list(varied) or from_block(document, base.sweep.vary if base.sweep else {})
    if not axes and len(names) < 2:
        rule = "nothing to choose from: --vary KEY=VALUES, a sweep: block in the file, or several policies"
        raise ScenarioError([Problem("optimize", "", rule)])
    space = Space(document, tuple(axes), names, allow_outside, force)
    check_axes(space)
    base = base.model_copy(update={"sweep": None})
    dropped: dict[str, list[str]] = {}
    if not aims:
        aims, dropped = _usual(base, space)
    return Question(base, space, tuple(aims), tuple(bounds), trials, batch, seed, dropped)


def _usual(base: Scenario, space: Space) -> tuple[list[Goal], dict[str, list[str]]]:
    """The goals of a question that names none: what one replica of the scenario as it stands has, of every policy; and see
    `Question.dropped`."""
    policies = tuple(base.policies[i] for i in space.policies.values())
    one = base.model_copy(update={"policies": policies, "replicas": 1})
    if (expected := estimate(one)).too_big and not space.force:
        rule = "without goals the scenario runs once as it stands, to see which it has, and is too big for that: "
        rule += f"{expected.reason}; name goals (--minimize METRIC, --maximize METRIC), or --force runs it all the same"
        raise ScenarioError([Problem("optimize", "", rule)])
    found, dropped = usual_goals(metrics_of(base), evaluate(resolved_data(one)))
    if not found:
        raise ScenarioError([Problem("optimize", "", "no goal: --minimize METRIC or --maximize METRIC")])
    return found, dropped


def run(
    asked: Question,
    folder: Path | None,
    *,
    jobs: int | None = None,
    backend: str = "local",
    address: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Front:
    """Search, and return what was found. folder: where every trial is written as it ends; None: nowhere.

    Raises `Refused` and `TooLong` before anything is written or removed; later `TrialLost`, MemoryError, ValueError and
    OSError (`TraceChanged` among them), and trials that were written stay.
    """
    space = asked.space
    space.remember(asked.scenario)
    schema = dataset.schema({axis.key: axis.values or (axis.low, axis.high) for axis in space.axes}, [metric.name for metric in metrics_of(asked.scenario)])  # fmt: skip
    with ExitStack() as stack:
        begin = None
        if folder is not None:
            begin = stack.enter_context(disk.opened(folder, _definition(asked), resume=resume, overwrite=overwrite))
        kind, expected = backends.get(backend), _expected(asked)
        count = processes(jobs, asked.batch, expected) if backend == "local" else jobs
        engine = stack.enter_context(kind(count, address))
        if not space.force:
            _check(asked, expected.seconds, engine.workers)
        if begin is not None:
            begin()
        advance = stack.enter_context(_bar(asked, progress))

        def measure(trials: list[Trial]) -> Iterator[tuple[Trial, Table | str]]:
            todo = []
            for trial in trials:
                rows = None if folder is None else disk.kept(folder, schema, trial)
                if rows is None:
                    todo.append(trial)
                else:
                    advance(1)
                    yield trial, rows
            try:
                for index, outcome in engine.run(measured, [(json.loads(trial.data), trial.run) for trial in todo]):
                    if folder is not None and not isinstance(outcome, str):
                        disk.keep(folder, schema, todo[index], outcome)
                    advance(1)
                    yield todo[index], outcome
            except Lost as error:
                where = _said(asked, todo[error.index].place)
                raise TrialLost(f"{where}: {error}: try fewer --jobs") from None

        tried = search(space, asked.goals, asked.limits, asked.trials, asked.batch, asked.seed, measure)
        front = Front(asked.scenario, tuple(axis.key for axis in space.axes), asked.goals, asked.limits, tuple(tried), folder=folder, dropped=asked.dropped)  # fmt: skip
        idle = {trial.index: space.without_effect(trial.place) for trial in front.best_of_all[:CHECKED]}
        front = dataclasses.replace(front, idle=idle)
        if folder is not None:
            disk.write(front, folder)
    return front


def measured(item: tuple[dict[str, Any], str]) -> Table | str:
    """Run a scenario given as plain data and its identity: its rows by replica, or why it cannot run."""
    try:
        return evaluate(*item)
    except ValueError as error:
        return str(error)


def _said(asked: Question, place: Place) -> str:
    from sim.sweeping.points import said

    return ", ".join(filter(None, [said(asked.space.axes, place.values), f"policy {place.policy}"]))


def _expected(asked: Question) -> Estimate:
    """Estimate the whole search on one core, by places drawn at random that run; memory by the scenario as it stands."""
    space = asked.space
    drawn = stream(asked.seed, "optimize", "estimate").random((len(space.axes) + 1, SAMPLED))
    columns = [axis.at(u) for axis, u in zip(space.axes, drawn[1:], strict=True)]
    policies = Axis(POLICY, tuple(space.policies)).at(drawn[0])
    places = [Place(tuple(column[i] for column in columns), policy) for i, policy in enumerate(policies)]
    seconds = [ready.expected for ready in map(space.ready, places) if ready.run]
    mean = sum(seconds) / len(seconds) if seconds else 0.0
    return dataclasses.replace(estimate(asked.scenario), seconds=mean * _most(asked))


def _most(asked: Question) -> int:
    """Runs that the search makes at most."""
    return min(asked.trials, asked.space.size or asked.trials)


def _check(asked: Question, seconds: float, workers: int) -> None:
    """Raise TooLong if the search, ``seconds`` on one core, takes more than a day."""
    together = max(1, min(workers, asked.batch, _most(asked)))
    if (seconds := seconds / together) > MAX_SECONDS:
        raise TooLong(
            f"{_most(asked)} runs take about {seconds / 3600:.3g} hours on {together} process{'es' * (together > 1)}, over "
            f"{MAX_SECONDS / 3600:g}: lower --trials, replicas or the scenario's steps, or give it more --jobs or machines "
            "(--backend); --force runs it all the same"
        )


def _definition(asked: Question) -> dict[str, Any]:
    """The search as plain data."""
    from importlib.metadata import version

    sweep = definition(Plan(asked.scenario, asked.space.axes, SweepBlock(), ()))
    versions = sweep["versions"] | {"optuna": version("optuna")}
    kept = {key: sweep[key] for key in ("format", "scenario", "traces", "axes", "metrics")}
    return kept | {
        "policies": list(asked.space.policies),
        "goals": [str(goal) for goal in asked.goals],
        "limits": [str(limit) for limit in asked.limits],
        "trials": asked.trials,
        "batch": asked.batch,
        "seed": asked.seed,
        "versions": versions,
        "runs": [],
    }


@contextmanager
def _bar(asked: Question, progress: bool) -> Iterator[Callable[[int], object]]:
    """Give a function to call with the number of trials that have ended; without a terminal it says something every half
    minute."""
    if not progress:
        yield lambda n: None
        return
    from tqdm import tqdm

    with tqdm(total=_most(asked), desc="runs", file=sys.stderr, leave=False, **pace()) as bar:
        yield bar.update
