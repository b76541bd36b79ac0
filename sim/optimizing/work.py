"""From what a user asks to a finished `Front`: goals and space checked first, then the search, part by part on disk."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim import backends
from sim.backends import Lost
from sim.designs.block import SweepBlock
from sim.estimate import estimate
from sim.loading import check
from sim.located import Problem, ScenarioError
from sim.optimizing import folder as disk
from sim.optimizing.front import Front
from sim.optimizing.goals import Goal, Limit, goals, limits, usual_goals
from sim.optimizing.search import BATCH, Trial, search
from sim.optimizing.space import Place, Space, check_axes, chosen
from sim.results import Table, metrics_of
from sim.scenario import Scenario
from sim.sweeping import dataset
from sim.sweeping.axes import Varied, from_block
from sim.sweeping.evaluate import evaluate
from sim.sweeping.manifest import definition
from sim.sweeping.points import Plan
from sim.workers import processes
from sim.yamlfile import Document

CHECKED = 30
"""Trials of the front whose axes are looked at for those without effect: some 50 ms each."""


class TrialLost(Exception):
    """A trial whose worker was killed every time."""


@dataclass(frozen=True)
class Question:
    """A checked search: where, for what, and for how long."""

    scenario: Scenario
    space: Space
    goals: tuple[Goal, ...]
    limits: tuple[Limit, ...]
    trials: int
    batch: int
    seed: int


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
    return Question(base, space, tuple(aims or _usual(base, space)), tuple(bounds), trials, batch, seed)


def _usual(base: Scenario, space: Space) -> list[Goal]:
    """The goals of a question that names none: what one replica of the scenario as it stands has."""
    policy = base.policies[next(iter(space.policies.values()))]
    data = base.model_copy(update={"policies": (policy,), "replicas": 1}).model_dump(mode="json", exclude_none=True)
    found = usual_goals(metrics_of(base), evaluate(data))
    if not found:
        raise ScenarioError([Problem("optimize", "", "no goal: --minimize METRIC or --maximize METRIC")])
    return found


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

    Raises `Refused`, `TrialLost`, MemoryError, ValueError and OSError; trials that were written stay.
    """
    space = asked.space
    schema = dataset.schema({axis.key: axis.values or (axis.low, axis.high) for axis in space.axes}, [metric.name for metric in metrics_of(asked.scenario)])  # fmt: skip
    with ExitStack() as stack:
        if folder is not None:
            stack.enter_context(disk.opened(folder, _definition(asked), resume=resume, overwrite=overwrite))
        kind = backends.get(backend)
        count = processes(jobs, asked.batch, _expected(asked)) if backend == "local" else jobs
        engine = stack.enter_context(kind(count, address))
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
                for index, outcome in engine.run(measured, [json.loads(trial.data) for trial in todo]):
                    if folder is not None and not isinstance(outcome, str):
                        disk.keep(folder, schema, todo[index], outcome)
                    advance(1)
                    yield todo[index], outcome
            except Lost as error:
                where = _said(asked, todo[error.index].place)
                raise TrialLost(f"{where}: {error}: try fewer --jobs") from None

        tried = search(space, asked.goals, asked.limits, asked.trials, asked.batch, asked.seed, measure)
        front = Front(asked.scenario, tuple(axis.key for axis in space.axes), asked.goals, asked.limits, tuple(tried), folder=folder)  # fmt: skip
        idle = {trial.index: space.without_effect(trial.place) for trial in front.best_of_all[:CHECKED]}
        front = dataclasses.replace(front, idle=idle)
        if folder is not None:
            disk.write(front, folder)
    return front


def measured(data: dict[str, Any]) -> Table | str:
    """Run a scenario given as plain data: its rows by replica, or why it cannot run."""
    try:
        return evaluate(data)
    except ValueError as error:
        return str(error)


def _said(asked: Question, place: Place) -> str:
    from sim.sweeping.points import said

    return ", ".join(filter(None, [said(asked.space.axes, place.values), f"policy {place.policy}"]))


def _expected(asked: Question) -> Any:
    """Estimate the whole search by its scenario as it stands, of which a trial has one policy."""
    found = estimate(asked.scenario)
    share = asked.trials / len(asked.scenario.policies)
    return dataclasses.replace(found, seconds=found.seconds * share)


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

    wait = 0.1 if sys.stderr.isatty() else 30.0
    total = min(asked.trials, asked.space.size or asked.trials)
    with tqdm(total=total, desc="runs", file=sys.stderr, leave=False, delay=wait, mininterval=wait) as bar:
        yield bar.update
