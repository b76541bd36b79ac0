"""The search: Optuna suggests places, somebody runs them, Optuna is told. The same places for the same seed, whoever runs.

Suggestions come in batches of a fixed size, whatever the number of processes, and results are told in the order of the
suggestions. So a broken search is taken up by searching again: what was run before is at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sim.optimizing.goals import Goal, Limit
from sim.optimizing.space import Place, Space
from sim.results import Table
from sim.rng import stream

BATCH = 16
"""Places that are suggested before results are told; the size of a generation of NSGA-II as well."""
_STALLED = 10  # suggestions in a row that are known already
_IMPOSSIBLE = 1e6  # violation of a place that does not run


@dataclass
class Trial:
    """A place that was tried. rows: its figures by replica, once it has run. reason: why it is infeasible, or nothing.

    means: by metric, of the goals and limits.
    """

    index: int
    place: Place
    run: str = ""
    data: str = field(default="", repr=False)
    rows: Table | None = field(default=None, repr=False)
    reason: str = ""
    means: dict[str, float] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return self.rows is not None or bool(self.reason)

    def judge(self, outcome: Table | str, goals: Sequence[Goal], limits: Sequence[Limit]) -> None:
        """Take what running it gave: rows, or why there are none."""
        if isinstance(outcome, str):
            self.reason = outcome
            return
        self.rows = outcome
        names = dict.fromkeys([*(goal.metric.name for goal in goals), *(limit.metric.name for limit in limits)])
        self.means = {name: math.fsum(outcome[name]) / len(outcome[name]) for name in names}
        absent = [name for name, value in self.means.items() if math.isnan(value)]
        broken = [str(limit) for limit in limits if limit.violation(self.means[limit.metric.name]) > 0]
        if absent:
            self.reason = f"has no {', '.join(absent)}"
        elif broken:
            self.reason = f"not {' and '.join(broken)}"


Measure = Callable[[list[Trial]], Iterator[tuple[Trial, "Table | str"]]]
"""Runs trials and yields each with its rows, or with why it could not run."""


def search(
    space: Space, goals: Sequence[Goal], limits: Sequence[Limit], trials: int, batch: int, seed: int, measure: Measure
) -> list[Trial]:
    """Return what was tried, in order: up to ``trials`` runs, no two the same, and the places met that do not run.

    Ends earlier if the space has no more, or hardly any more (suggestions are 50 times as many).
    """
    study = _study(goals, batch, seed)
    distributions = space.distributions()
    tried: dict[str, Trial] = {}  # by place
    by_run: dict[str, Trial] = {}
    found: list[Trial] = []
    rest = _shuffled(space, seed)
    suggestions, most = 0, 50 * trials + 1000
    while len(by_run) < trials:
        fresh: list[Trial] = []
        pending: list[tuple[Any, Trial]] = []
        stalled, room = 0, min(batch, trials - len(by_run))
        while len(fresh) < room and suggestions < most:
            if stalled >= _STALLED and rest is not None:
                untried = next((place for place in rest if place.key not in tried), None)
                if untried is None:
                    break
                study.enqueue_trial(space.params(untried))
            asked = study.ask(distributions)
            suggestions += 1
            place = space.place(asked.params)
            if place.key in tried:
                stalled += 1
            else:
                ready = space.ready(place)
                trial = by_run.get(ready.run)
                if trial is None:
                    trial = Trial(len(found), place, ready.run, ready.data, reason=ready.reason)
                    found.append(trial)
                    if ready.run:
                        by_run[ready.run] = trial
                        fresh.append(trial)
                        stalled = 0
                tried[place.key] = trial
            trial = tried[place.key]
            if trial.ended:
                _tell(study, asked, trial, goals, limits)
            else:
                pending.append((asked, trial))
        for trial, outcome in measure(fresh):
            trial.judge(outcome, goals, limits)
        for asked, trial in pending:
            _tell(study, asked, trial, goals, limits)
        if not fresh:
            break
    return found


def _study(goals: Sequence[Goal], batch: int, seed: int) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    number = int(stream(seed, "optimize", "sampler").integers(2**31))
    sampler: Any
    if len(goals) > 1:
        sampler = optuna.samplers.NSGAIISampler(population_size=max(2, batch), seed=number)
    else:
        sampler = optuna.samplers.TPESampler(n_startup_trials=batch, seed=number)
    directions = optuna.study.StudyDirection
    wanted = [directions.MAXIMIZE if goal.maximize else directions.MINIMIZE for goal in goals]
    return optuna.create_study(sampler=sampler, directions=wanted)


def _tell(study: Any, asked: Any, trial: Trial, goals: Sequence[Goal], limits: Sequence[Limit]) -> None:
    complete = trial.rows is not None and not any(map(math.isnan, trial.means.values()))
    asked.set_constraint("runs", 0.0 if complete else _IMPOSSIBLE)
    for i, limit in enumerate(limits):
        asked.set_constraint(f"{i} {limit}", limit.violation(trial.means[limit.metric.name]) if complete else 0.0)
    study.tell(asked, [trial.means[goal.metric.name] if complete else 0.0 for goal in goals])


def _shuffled(space: Space, seed: int) -> Iterator[Place] | None:
    """All places of a small space in random order, for when suggestions repeat themselves."""
    places = list(space.places())
    if not places:
        return None
    order = stream(seed, "optimize", "rest").permutation(len(places))
    return (places[i] for i in order.tolist())
