"""The answer of a run in a sentence or two: who wins, by how much, and whether the run can tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sim.contest import leading_metrics, yardsticks
from sim.report.grids import number, two_digits
from sim.results import Metric, Result, metrics_of, per_replica
from sim.statistics import half_width
from sim.tokens import F64

_LEADERS = {
    "step_and_moves_s": "the shortest step, moves of experts included",
    "step_time_s": "the shortest step",
    "tokens_per_s_per_gpu": "the most tokens per second and device",
    "goodput_share": "the most requests within the SLO",
    "output_tokens_per_s_per_gpu": "the most output tokens per second and device",
    "input_tokens_per_s_per_gpu": "the most input tokens per second and device",
    "tpot_mean_s": "the shortest time per output token",
    "ttft_mean_s": "the shortest time to the first token",
    "max_vio_batch": "the most even load",
}
_PRICES = (
    "kept_affinity", "dropped_share", "max_vio_batch", "memory_bytes", "refused", "ttft_p99_s", "usd_per_million_tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Price:
    """What the winner shows in another figure: its label, its value, and how the others stand to it."""

    metric: str
    label: str
    value: str
    others: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """metric: name of the leading one. winners: the best policy first, then those that the run cannot tell from it.
    sentences: the answer. prices: what the first winner shows elsewhere. asides: what the contest leaves out and why. method:
    how policies are told apart, or nothing where there is no interval.
    """

    metric: str
    winners: tuple[str, ...]
    sentences: tuple[str, ...]
    prices: tuple[Price, ...]
    asides: tuple[str, ...]
    method: str


@dataclass(frozen=True, slots=True)
class _Contest:
    """Values [n_policies, n_replicas] of the leading metric of those that can win, in the order of the scenario. without: those
    that could but have no value of it in every replica."""

    metric: Metric
    names: list[str]
    values: F64
    without: list[str]

    @property
    def rivals(self) -> int:
        return len(self.names) - 1

    @property
    def level(self) -> float:
        """The confidence of each paired difference against the best: 95 % for all of them together (Bonferroni). That also
        covers that the best was picked after the fact: of ``rivals`` policies that might seem better than the truly best
        one, each does so with at most its share of the 5 %."""
        return 1 - 0.05 / max(1, self.rivals)

    @property
    def sign(self) -> float:
        return -1.0 if self.metric.better == "higher" else 1.0

    @property
    def means(self) -> F64:
        means: F64 = self.values.mean(axis=1)
        return means

    def value(self, i: int) -> str:
        half = half_width(self.values[i]) * self.metric.scale
        interval = f" ± {two_digits(half)}" if half > 0 else ""
        return f"{number(float(self.means[i]), self.metric)}{interval}{unit_of(self.metric)}"

    def gap(self, i: int, best: int) -> tuple[float, float]:
        """Paired difference of policy ``i`` against ``best``, positive where ``i`` is worse, and its half-width at `level`."""
        difference = self.sign * (self.values[i] - self.values[best])
        return float(difference.mean()), half_width(difference, self.level)

    def words(self, i: int, best: int) -> str:
        """How much better ``best`` is than ``i``."""
        mean, half = self.gap(i, best)
        share = 100 * mean / abs(self.means[i]) if self.means[i] else math.inf
        way = "less" if self.metric.better != "higher" else "more"
        text = (
            f"{share:.2g} % {way} than {quoted(self.names[i])}"
            if share < 1000
            else f"{way} than {quoted(self.names[i])}"
        )
        return text if math.isnan(half) else f"{text} (paired difference {self.difference(i, best)})"

    def difference(self, i: int, best: int) -> str:
        """The paired difference with its interval."""
        mean, half = self.gap(i, best)
        size = f"{two_digits(abs(mean) * self.metric.scale)}"
        if half <= 1e-9 * abs(mean):
            return f"{size}{unit_of(self.metric)} in every replica"
        return f"{size} ± {two_digits(half * self.metric.scale)}{unit_of(self.metric)}"


def quoted(name: str) -> str:
    """Set a policy's name off from the sentence around it."""
    return f"“{name}”"


def unit_of(metric: Metric) -> str:
    """The unit at the end of a metric's label, with a space before it; nothing for a pure number."""
    return next((unit for unit in (" ms", " s", " GB", " %", " bits") if metric.label.endswith(unit)), "")


def with_unit(value: float, metric: Metric) -> str:
    return number(float(value), metric) + unit_of(metric)


def listed(names: Sequence[str], word: str = "and", most: int = 3) -> str:
    """Join names for a sentence; of many, the first ``most`` and how many more there are.

    >>> listed(["a"]), listed(["a", "b"], "or"), listed([*"abcde"])
    ('a', 'a or b', 'a, b, c and 2 others')
    """
    shown = list(names) if len(names) <= most + 1 else [*names[:most], f"{len(names) - most} others"]
    return " ".join(filter(None, (", ".join(shown[:-1]), word if len(shown) > 1 else "", shown[-1])))


def verdict(result: Result) -> Verdict:
    """Return the answer. Policies are compared replica by replica: all of them see the same tokens or requests."""
    contest = _contest(result)
    asides = _asides(result, contest)
    if not contest.names:
        return Verdict(contest.metric.name, (), ("Nothing in this run can be compared.",), (), asides, "")
    order = np.argsort(contest.sign * contest.means, kind="stable").tolist()
    best, rest = order[0], order[1:]
    tied = [i for i in rest if not _told_apart(*contest.gap(i, best))]
    ahead = [i for i in rest if i not in tied]
    sentences = [_first(contest, best, rest, tied, alone=not asides)]
    first_is_in = contest.names[0] == result.scenario.policies[0].name
    if tied and ahead:
        sentences.append(f"{quoted(contest.names[best])} is ahead of the next, with {contest.words(ahead[0], best)}.")
    elif first_is_in and len(ahead) > 1 and 0 in ahead[1:]:
        sentences.append(f"Against the first policy it is {contest.words(0, best)}.")
    if result.scenario.replicas == 1 and rest:
        sentences.append("One replica: no interval, so this run cannot say how much is chance (--replicas 5 can).")
    winners = tuple(contest.names[i] for i in (best, *tied))
    prices = _prices(result, contest, winners[0])
    return Verdict(contest.metric.name, winners, tuple(sentences), prices, asides, _method(result, contest))


def _asides(result: Result, contest: _Contest) -> tuple[str, ...]:
    """Return who takes no part, and why."""
    found = []
    blind = yardsticks(result.scenario)
    left_out = [p.name for p in result.scenario.policies if p.name in blind and p.name not in contest.names]
    if left_out:
        found.append(
            f"{listed(left_out)}: no candidate, for its gate does not look at the tokens; a yardstick."
            if len(left_out) == 1
            else f"{listed(left_out)}: no candidates, for their gates do not look at the tokens; yardsticks."
        )
    if contest.without:
        label = contest.metric.label.removesuffix(unit_of(contest.metric))
        found.append(f"{listed(contest.without)}: not compared, for lack of a value of “{label}” in every replica.")
    return tuple(found)


def _method(result: Result, contest: _Contest) -> str:
    """Say how policies are told apart."""
    if result.scenario.replicas == 1 or contest.rivals < 1:
        return ""
    text = "One policy is called better than another where the 95 % interval of their paired difference leaves out 0"
    if contest.rivals == 1:
        return f"{text}."
    return (
        f"{text}, at 95 % for all {contest.rivals} rivals of the best together (Bonferroni: {100 * contest.level:.4g} % "
        "each, so wider than the intervals of the tables)."
    )


def _told_apart(difference: float, half: float) -> bool:
    """Without an interval every difference counts; equal is equal."""
    return difference > (0.0 if math.isnan(half) else half)


def _first(contest: _Contest, best: int, rest: list[int], tied: list[int], alone: bool) -> str:
    winner, what = quoted(contest.names[best]), _LEADERS[contest.metric.name]
    if not rest:
        label = contest.metric.label.removesuffix(unit_of(contest.metric))
        others = "policy" if alone else "candidate"
        if contest.without:
            return f"{winner}: {label} {contest.value(best)}. No other candidate has one in every replica."
        return f"{winner}: {label} {contest.value(best)}. There is no other {others} to compare it with."
    if not tied:
        return f"{winner} has {what}, {contest.value(best)}: {contest.words(rest[0], best)}."
    names = [quoted(contest.names[i]) for i in tied]
    unequal = [i for i in tied if contest.gap(i, best)[0] != 0 or contest.gap(i, best)[1] > 0]
    if not unequal:
        return f"{listed([winner, *names])} are equal, with {what}: {contest.value(best)}."
    return (
        f"This run cannot tell {winner} from {listed(names, 'or')}. The first has {what} on average, "
        f"{contest.value(best)}, but the paired difference against {quoted(contest.names[unequal[0]])} is "
        f"{contest.difference(unequal[0], best)}."
    )


def _contest(result: Result) -> _Contest:
    """Return the leading metric and its values; yardsticks take part only where there is nobody else."""
    scenario, metrics = result.scenario, {m.name: m for m in metrics_of(result.scenario)}
    rows = {name: np.array(column) for name, column in per_replica(result.tables, scenario).items()}
    if "step_and_moves_s" in rows:  # policies that move nothing take a step's time
        moved = rows["step_and_moves_s"].astype(float)
        rows["step_and_moves_s"] = np.where(np.isnan(moved), rows["step_time_s"].astype(float), moved)
    blind, leaders = yardsticks(scenario), leading_metrics(scenario)
    names = [policy.name for policy in scenario.policies]
    for pool in ([name for name in names if name not in blind], names):
        for leader in leaders:
            table = {name: rows[leader][rows["policy"] == name].astype(float) for name in pool}
            known = [name for name in pool if np.isfinite(table[name]).all()]
            if known:
                without = [name for name in pool if name not in known]
                return _Contest(metrics[leader], known, np.stack([table[name] for name in known]), without)
    return _Contest(metrics[leaders[-1]], [], np.empty((0, scenario.replicas)), names)


def _prices(result: Result, contest: _Contest, winner: str) -> tuple[Price, ...]:
    """What ``winner`` shows in figures that do not lead, beside the best candidate's where that is another."""
    found: dict[tuple[str, str], float] = {}
    for policy, metric, mean in zip(*(result.summary_rows[c] for c in ("policy", "metric", "mean")), strict=True):
        found[policy, metric] = mean
    metrics, prices = {m.name: m for m in metrics_of(result.scenario)}, []
    for name in _PRICES:
        mine = found.get((winner, name), math.nan)
        if name == contest.metric.name or math.isnan(mine):
            continue
        metric, known = metrics[name], {p: found[p, name] for p in contest.names if not math.isnan(found[p, name])}
        if name in ("dropped_share", "refused") and not any(known.values()):
            continue
        best = (max if metric.better == "higher" else min)(known, key=lambda policy: known[policy])
        text = number(known[best], metric)
        if len(known) == 1:
            others = ""
        elif all(number(value, metric) == text for value in known.values()):
            others = "as all others"
        elif number(mine, metric) == text:
            others = "the best"
        else:
            others = f"best: {text}{unit_of(metric)}, {best}"
        label = metric.label.removesuffix(unit_of(metric)).replace(" /", "/")
        prices.append(Price(name, label, with_unit(mine, metric), others))
    return tuple(prices)
