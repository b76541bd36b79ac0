"""What a search found: all trials, and of the feasible ones those that no other beats in every goal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sim.optimizing.goals import Goal, Limit
from sim.optimizing.search import Trial
from sim.results import Metric, Table
from sim.scenario import Scenario
from sim.statistics import half_width
from sim.tokens import F64, Bool

if TYPE_CHECKING:
    import pandas as pd


def dominated(values: F64) -> Bool:
    """Say of every row of ``values`` [n, goals], less being better, whether another is as good everywhere and better
    somewhere. Returns [n] bool.

    >>> dominated(np.array([[1.0, 2.0], [2.0, 1.0], [2.0, 2.0], [1.0, 2.0]])).tolist()
    [False, False, True, False]
    """
    found = np.zeros(len(values), bool)
    for i, row in enumerate(values):
        found[i] = ((values <= row).all(axis=1) & (values < row).any(axis=1)).any()
    return found


@dataclass(frozen=True)
class Front:
    """A finished search.

    axes: keys that were varied. tried: every trial in order. folder: where it lies, if anywhere. idle: of the first
    trials on the front, axes that make no difference to their policy. dropped: usual goals that only some policies have, and
    the policies that lack them.
    """

    scenario: Scenario
    axes: tuple[str, ...]
    goals: tuple[Goal, ...]
    limits: tuple[Limit, ...]
    tried: tuple[Trial, ...] = field(repr=False)
    idle: dict[int, set[str]] = field(default_factory=dict, repr=False)
    folder: Path | None = None
    dropped: dict[str, list[str]] = field(default_factory=dict, repr=False)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Figures of the goals and limits, each once."""
        wanted = [*(goal.metric for goal in self.goals), *(limit.metric for limit in self.limits)]
        return tuple(dict.fromkeys(wanted))

    @property
    def feasible(self) -> list[Trial]:
        return [trial for trial in self.tried if trial.rows is not None and not trial.reason]

    @property
    def best_of_all(self) -> list[Trial]:
        """Feasible trials that no other dominates, by the first goal."""
        trials = self.feasible
        values = self._values(trials)
        kept = [i for i in np.flatnonzero(~dominated(values)).tolist()]
        return [trials[i] for i in sorted(kept, key=lambda i: (*values[i].tolist(), i))]

    @property
    def best(self) -> Trial | None:
        """With one goal the best trial. With several the one nearest to the best of every goal: whose worst goal, measured
        on the front's own span, is least bad."""
        trials = self.best_of_all
        if not trials:
            return None
        values = self._values(trials)
        low = values.min(axis=0)
        span = values.max(axis=0) - low
        far = ((values - low) / np.where(span > 0, span, 1.0)).max(axis=1)
        return trials[int(far.argmin())]

    def _values(self, trials: Sequence[Trial]) -> F64:
        rows = [[goal.sign * trial.means[goal.metric.name] for goal in self.goals] for trial in trials]
        return np.array(rows, np.float64).reshape(len(trials), len(self.goals))

    @property
    def pareto(self) -> pd.DataFrame:
        """The front, by the first goal: columns as `trials`."""
        import pandas as pd

        return pd.DataFrame(self.rows(self.best_of_all))

    @property
    def trials(self) -> pd.DataFrame:
        """One row per trial: ``trial``, the axes by key, ``policy``, ``run``, ``feasible``, ``reason``, and of every goal and
        limit the mean over replicas and its 95 % half-width (NaN with one replica)."""
        import pandas as pd

        return pd.DataFrame(self.rows(self.tried))

    @property
    def runs(self) -> pd.DataFrame:
        """One row per trial that ran and replica, with every metric; ``point`` is the trial's number."""
        import pandas as pd

        frames = []
        for trial in self.tried:
            if trial.rows is not None:
                head = {"point": trial.index} | dict(zip(self.axes, map(_plain, trial.place.values), strict=True))
                frames.append(pd.DataFrame({**head, **trial.rows}))
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def rows(self, trials: Sequence[Trial]) -> Table:
        """`trials` as plain columns."""
        out: Table = {"trial": [trial.index for trial in trials]}
        for i, key in enumerate(self.axes):
            out[key] = [_plain(trial.place.values[i]) for trial in trials]
        out["policy"] = [trial.place.policy for trial in trials]
        out["run"] = [trial.run for trial in trials]
        out["feasible"] = [trial.rows is not None and not trial.reason for trial in trials]
        out["reason"] = [trial.reason for trial in trials]
        for metric in self.metrics:
            out[metric.name] = [trial.means.get(metric.name, np.nan) for trial in trials]
            out[f"{metric.name}_half_width"] = [self.half_width(trial, metric.name) for trial in trials]
        return out

    def half_width(self, trial: Trial, metric: str) -> float:
        return float("nan") if trial.rows is None else half_width(np.array(trial.rows[metric]))

    def apart(self, one: Trial, other: Trial) -> list[Goal] | None:
        """Return the goals in which two trials differ beyond the 95 % interval of their paired difference, replica by
        replica; None with one replica, which cannot tell."""
        assert one.rows is not None and other.rows is not None
        found = []
        for goal in self.goals:
            a, b = np.array(one.rows[goal.metric.name]), np.array(other.rows[goal.metric.name])
            if len(a) < 2 or len(a) != len(b):
                return None
            if abs((a - b).mean()) > half_width(a - b):
                found.append(goal)
        return found

    @property
    def reasons(self) -> dict[str, int]:
        """Why trials are infeasible, the most frequent first."""
        counted = Counter(trial.reason for trial in self.tried if trial.reason)
        return dict(sorted(counted.items(), key=lambda item: (-item[1], item[0])))


def _plain(value: Any) -> Any:
    """A value as a column holds it: lists and mappings as JSON."""
    import json

    return json.dumps(value) if isinstance(value, dict | list | tuple) else value
