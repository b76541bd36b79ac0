"""The protocol: plans made on window A, times of window B under them, and what follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sim.advice import Serving, Setup, costs
from sim.advice.batches import Batches
from sim.advice.bench import Bench
from sim.advice.evidence import Interval, ratio
from sim.advice.options import Option, options
from sim.statistics import autocorrelation_time
from sim.tokens import F64

REPAID = 10
"""Where plans last, the interval suggested is this many times what repays a rebalance: a tenth of the saving is spent."""


@dataclass(frozen=True, slots=True)
class Row:
    """One option on window B, its plan made on window A.

    saving: share of the baseline's step per token, displaced cache included, before any cost of moving, with its 95 %
    interval; NaN where the option does not fit into memory. imbalance: mean (max - mean) / mean over ranks. rebalance_s:
    that one rebalance takes from serving. break_even: steps that repay one (infinite: never).
    """

    option: Option
    saving: Interval
    imbalance: float
    move: costs.Move
    rebalance_s: float
    break_even: Interval
    cache: costs.Cache


@dataclass(frozen=True, slots=True)
class Aged:
    """Saving under plans that are ``steps`` old on average, over all plans of that age in window B."""

    steps: float
    saving: float


@dataclass(frozen=True, slots=True)
class Every:
    """The chosen option replanned every ``steps``: saving, and what is left of it after the costs of that."""

    steps: int
    saving: float
    net: float


@dataclass(frozen=True, slots=True)
class Judged:
    """What window B shows.

    planned, batches: of windows A and B. base_s, base_imbalance, base_cache: without a balancer. other_s: of a step outside
    the experts' part. chosen: the row that did best inside window A. interval: steps between rebalances, asked for or the
    best that B speaks for: of those that it spans, if one of them pays. span: steps that B spans. net: the chosen row's
    saving after costs at that interval. times: autocorrelation times of that saving within B. aged: how its plans age;
    trend: change of a plan's saving over ``span`` steps of age, as a share of the baseline's step; tail: what the oldest
    save. every: intervals that compete.
    """

    planned: int
    batches: int
    base_s: float
    base_imbalance: float
    base_cache: costs.Cache
    other_s: float
    rows: tuple[Row, ...]
    chosen: Row
    interval: int
    span: int
    net: Interval
    times: float
    aged: tuple[Aged, ...]
    trend: Interval
    tail: float
    every: tuple[Every, ...]


def judge(setup: Setup, batches: Batches, phase: Serving, redundant: Sequence[int]) -> Judged | None:
    """Return what ``batches`` show of the options with these numbers of redundant experts; None if there are too few.

    Raises ValueError if no option fits into memory.
    """
    if not batches.n_windows:
        return None
    bench = Bench(setup, batches, phase)
    a, b = range(batches.n_planned), range(batches.n_planned, batches.n_windows)
    base = bench.times(bench.baseline, bench.plan(bench.baseline, a), b)
    mean_s = float(base.step_s.mean())
    rows = [_row(bench, option, base.step_s, a, b) for option in options(redundant)]
    able = [row for row in rows if bench.fits(row.option)]
    if not able:
        raise ValueError(f"no number of --redundant experts fits into the memory of {setup.cluster.device.name}")
    chosen = able[int(np.argmax([_inside_a(bench, row, a) for row in able]))]
    grid = _by_age(bench, chosen.option, a, b)
    cost = chosen.rebalance_s / mean_s
    tail = _tail(grid) / mean_s
    seen = [period * batches.per_window for period in dict.fromkeys((1, 2, 3, len(b))) if period <= len(b)]
    long = [max(seen[-1], math.ceil(REPAID * cost / tail))] if tail > 0 else []
    every = [_every(steps, grid, batches.per_window, mean_s, tail, cost) for steps in dict.fromkeys(seen + long)]

    def replanned(steps: int) -> tuple[F64, Interval]:
        """Return the seconds saved in B's batches, and what is left of a step after the costs of every ``steps``."""
        saved = _replanned(grid, _period(steps, batches.per_window, len(b)))
        gross, net = (
            ratio(saved, base.step_s, setup.seed),
            _every(steps, grid, batches.per_window, mean_s, tail, cost).net,
        )
        return saved, Interval(*(net + value - gross.mean for value in gross))

    # What B has seen whole needs no assumption, so it goes before what may be better further on.
    best_seen = max(every[: len(seen)], key=lambda one: one.net).steps
    certain = pays(replanned(best_seen)[1], setup.least_gain)
    interval = setup.interval or (best_seen if certain else max(every, key=lambda one: one.net).steps)
    saved, net = replanned(interval)
    return Judged(
        planned=len(a) * batches.per_window,
        batches=len(base.step_s),
        base_s=mean_s,
        base_imbalance=float(base.imbalance.mean()),
        base_cache=bench.without,
        other_s=bench.other_s,
        rows=tuple(rows),
        chosen=chosen,
        interval=interval,
        span=len(b) * batches.per_window,
        net=net,
        times=len(saved) / autocorrelation_time(saved),
        aged=tuple(
            Aged(
                (age + 0.5) * batches.per_window,
                float(np.mean([row[age].mean() for row in grid if age < len(row)])) / mean_s,
            )
            for age in range(len(b))
        ),
        trend=_trend(grid, mean_s, setup.seed),
        tail=tail,
        every=tuple(every),
    )


def pays(net: Interval, least_gain: float) -> bool:
    """Say whether all of a net saving's interval is above 0 and its mean reaches ``least_gain``."""
    return net.low > 0 and net.mean >= least_gain


def _every(steps: int, grid: list[list[F64]], per_window: int, base_s: float, tail: float, cost: float) -> Every:
    """Return what a rebalance every ``steps`` leaves of a step of ``base_s``; beyond window B plans save the ``tail``."""
    span = len(grid) * per_window
    saving = float(_replanned(grid, _period(steps, per_window, len(grid))).mean()) / base_s
    if steps > span:
        saving = (saving * span + tail * (steps - span)) / steps
    return Every(steps, saving, saving - cost / steps)


def _period(steps: int, per_window: int, windows: int) -> int:
    """Return the windows between two plans that come nearest to ``steps``."""
    return min(windows, max(1, round(steps / per_window)))


def _tail(grid: list[list[F64]]) -> float:
    """Return the mean seconds saved by the oldest plans in window B: those of the last third of ages."""
    oldest = range(len(grid) - max(1, len(grid) // 3), len(grid))
    return float(np.concatenate([row[age] for row in grid for age in oldest if age < len(row)]).mean())


def _trend(grid: list[list[F64]], base_s: float, seed: int) -> Interval:
    """Return how much less (below 0) or more a plan as old as window B saves than a new one, as a share of ``base_s``.

    The slope through 0 of the differences to the newest plan of the same batches, over ages: a window in which all plans
    save much or little does not look like age.
    """
    found, weights = [], []
    for window in range(1, len(grid)):
        ages = range(1, window + 1)
        found.append(np.sum([age * (grid[window - age][age] - grid[window][0]) for age in ages], axis=0))
        weights.append(np.full(len(found[-1]), float(sum(age**2 for age in ages))))
    each, weight = np.concatenate(found), np.concatenate(weights)
    slope = float(each.mean() / weight.mean())
    # Around the slope: the weights grow with age, and so would the autocorrelation of what they multiply.
    around = ratio(each - slope * weight, weight, seed)
    return Interval(*((slope + value - around.mean) * len(grid) / base_s for value in around))


def _row(bench: Bench, option: Option, base_s: F64, a: range, b: range) -> Row:
    setup, slots, cache = bench.setup, option.slots(bench.like), bench.cache(option)
    plan = bench.plan(option, a)
    # The next plan sees as much traffic as the first, all of it new: what a rebalance moves once things run.
    moved = costs.move(setup, bench.clock, plan, bench.plan(option, b[-len(a) :]), slots)
    never = Interval(math.nan, math.nan, math.nan)
    if not bench.fits(option):
        return Row(option, never, math.nan, moved, math.nan, never, cache)
    times = bench.times(option, plan, b)
    saving = ratio(bench.saved_s(option, times.step_s, base_s), base_s, setup.seed)
    taken = costs.rebalance_s(setup, moved, float(times.communication.mean()))
    # Nothing saved repays nothing; of an unknown bound there is none.
    steps = [math.inf if value <= 0 else taken / (value * float(base_s.mean())) for value in saving]
    break_even = Interval(steps[0], steps[2], steps[1])
    return Row(option, saving, float(times.imbalance.mean()), moved, taken, break_even, cache)


def _inside_a(bench: Bench, row: Row, a: range) -> float:
    """Return the seconds that an option saves per step on the last window of A, planned on those before it (on itself, if
    alone); after costs, if it is known how often they come."""
    seen = a[:-1] or a
    base_s = bench.times(bench.baseline, bench.plan(bench.baseline, seen), a[-1:]).step_s
    times = bench.times(row.option, bench.plan(row.option, seen), a[-1:])
    saved = float(bench.saved_s(row.option, times.step_s, base_s).mean())
    each = row.rebalance_s / bench.setup.interval if bench.setup.interval else 0.0
    return saved - each


def _by_age(bench: Bench, option: Option, a: range, b: range) -> list[list[F64]]:
    """Return seconds saved in batches of window B: item o, of the plan made before its o-th window, by age in windows."""
    linear = bench.plan(bench.baseline, a)
    found = []
    for first in b:
        plan = bench.plan(option, range(first - len(a), first))
        later = range(first, b[-1] + 1)
        base = [bench.times(bench.baseline, linear, [window]).step_s for window in later]
        own = [bench.times(option, plan, [window]).step_s for window in later]
        found.append([bench.saved_s(option, mine, theirs) for mine, theirs in zip(own, base, strict=True)])
    return found


def _replanned(grid: list[list[F64]], period: int) -> F64:
    """Return seconds saved in every batch of window B, replanned every ``period`` windows."""
    windows = range(len(grid))
    return np.concatenate([grid[window - window % period][window % period] for window in windows])
