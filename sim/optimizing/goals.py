"""What is wanted: figures to make small or large, and limits that have to be kept."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sim.located import Problem, ScenarioError, nearest, short
from sim.results import Metric, Table

DEFAULTS = (
    "step_time_s",
    "tpot_mean_s",
    "output_tokens_per_s_per_gpu",
    "max_vio_batch",
    "kept_affinity",
    "memory_bytes",
    "usd_per_million_tokens",
)
"""Time, balance, what balance costs the gate, memory and money: those of them that a scenario has are its goals if none
are named."""

_LIMIT = re.compile(r"\s*(\w+)\s*(<=|>=)\s*(\S+)\s*")


@dataclass(frozen=True)
class Goal:
    """A figure to make as small as can be, or as large."""

    metric: Metric
    maximize: bool

    @property
    def sign(self) -> float:
        """What a value is multiplied by so that less is better."""
        return -1.0 if self.maximize else 1.0

    def __str__(self) -> str:
        return f"{'maximize' if self.maximize else 'minimize'} {self.metric.name}"


@dataclass(frozen=True)
class Limit:
    """A figure that has to be at least, or at most, ``bound`` (SI units)."""

    metric: Metric
    least: bool
    bound: float

    def violation(self, value: float) -> float:
        """Return by how much ``value`` misses the bound, in parts of the bound; 0 or less if it is kept."""
        gap = self.bound - value if self.least else value - self.bound
        return gap / (abs(self.bound) or 1.0)

    def __str__(self) -> str:
        return f"{self.metric.name} {'>=' if self.least else '<='} {self.bound:g}"


def goals(metrics: Sequence[Metric], minimize: Sequence[str], maximize: Sequence[str]) -> list[Goal]:
    """Return the named goals. Raises ScenarioError with every problem."""
    known = {metric.name: metric for metric in metrics}
    problems: list[Problem] = []
    found: dict[str, Goal] = {}
    for option, names in (("--minimize", minimize), ("--maximize", maximize)):
        for name in names:
            where = f"{option} {name[:60]}"
            if name not in known:
                problems.append(_unknown(where, name, known))
            elif name in found:
                problems.append(Problem(where, "", "is a goal already"))
            else:
                found[name] = Goal(known[name], option == "--maximize")
    if problems:
        raise ScenarioError(problems)
    return list(found.values())


def usual_goals(metrics: Sequence[Metric], rows: Table) -> tuple[list[Goal], dict[str, list[str]]]:
    """Return those of `DEFAULTS` that every policy of a run with the figures ``rows`` has, and of those that only some have,
    the policies that lack them."""
    known = {metric.name: metric for metric in metrics}
    policies = list(dict.fromkeys(rows["policy"]))
    found: list[Goal] = []
    dropped: dict[str, list[str]] = {}
    for name in DEFAULTS:
        if name not in known:
            continue
        lacking = {
            policy
            for policy, value in zip(rows["policy"], rows[name], strict=True)
            if value is None or math.isnan(value)
        }
        if not lacking:
            found.append(Goal(known[name], known[name].better == "higher"))
        elif len(lacking) < len(policies):
            dropped[name] = [policy for policy in policies if policy in lacking]
    return found, dropped


def limits(metrics: Sequence[Metric], texts: Sequence[str]) -> list[Limit]:
    """Read ``kept_affinity>=0.97`` texts. Raises ScenarioError with every problem."""
    known = {metric.name: metric for metric in metrics}
    problems: list[Problem] = []
    found: list[Limit] = []
    for text in texts:
        where = f"--subject-to {short(text)}"
        match = _LIMIT.fullmatch(text)
        if match is None:
            problems.append(Problem(where, "", "must be written METRIC>=NUMBER or METRIC<=NUMBER"))
            continue
        name, relation, number = match.groups()
        try:
            bound = math.nan if "_" in number else float(number)  # 0_97 would be 97
        except ValueError:
            bound = math.nan
        if not math.isfinite(bound):
            problems.append(Problem(where, "", "needs a number after the sign", short(number)))
        elif name not in known:
            problems.append(_unknown(where, name, known))
        else:
            found.append(Limit(known[name], relation == ">=", bound))
    if problems:
        raise ScenarioError(problems)
    return found


def _unknown(where: str, name: str, known: Mapping[str, Metric]) -> Problem:
    hint = nearest(name, known) or next((other for other in known if name in other), "")
    return Problem(
        where, "", "unknown metric" if hint else f"unknown metric; known here: {', '.join(known)}", hint=hint
    )
