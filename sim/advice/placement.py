"""The protocol: plans made on window A, times of window B under them, and what follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sim.advice import Serving, Setup, Verdict, costs
from sim.advice.batches import Batches
from sim.advice.bench import Bench
from sim.advice.evidence import MIN_TIMES, Interval, autocorrelation_time, ratio
from sim.advice.options import BASELINE, Option, options
from sim.tokens import F64


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
    """What window B shows. planned, batches: of windows A and B. base_s, base_imbalance: without a balancer. chosen: the
    row that did best inside window A. net: its saving after costs at the interval asked for. times: autocorrelation times
    of that saving within B. aged: how its plans age. every: other intervals, those seen in B."""

    planned: int
    batches: int
    base_s: float
    base_imbalance: float
    rows: tuple[Row, ...]
    chosen: Row
    net: Interval
    times: float
    aged: tuple[Aged, ...]
    every: tuple[Every, ...]


def judge(setup: Setup, batches: Batches, phase: Serving, redundant: Sequence[int]) -> Judged | None:
    """Return what ``batches`` show of the options with these numbers of redundant experts; None if there are too few.

    Raises ValueError if no option fits into memory.
    """
    if not batches.n_windows:
        return None
    bench = Bench(setup, batches, phase)
    a, b = range(batches.n_planned), range(batches.n_planned, batches.n_windows)
    base = bench.times(BASELINE, bench.plan(BASELINE, a), b)
    mean_s = float(base.step_s.mean())
    rows = [_row(bench, option, base.step_s, a, b) for option in options(redundant)]
    able = [row for row in rows if bench.fits(row.option)]
    if not able:
        raise ValueError(f"no number of --redundant experts fits into the memory of {setup.cluster.device.name}")
    chosen = able[int(np.argmax([_inside_a(bench, row, a) for row in able]))]
    grid = _by_age(bench, chosen.option, a, b)
    cost = chosen.rebalance_s / mean_s
    seen = [period for period in (1, 2, 3, len(b)) if period <= len(b)]
    every = []
    for period in dict.fromkeys(seen):
        steps, saving = period * batches.per_window, float(_replanned(grid, period).mean()) / mean_s
        every.append(Every(steps, saving, saving - cost / steps))
    saved = _replanned(grid, min(len(b), max(1, round(setup.interval / batches.per_window))))
    gross = ratio(saved, base.step_s, setup.seed)
    return Judged(
        planned=len(a) * batches.per_window,
        batches=len(base.step_s),
        base_s=mean_s,
        base_imbalance=float(base.imbalance.mean()),
        rows=tuple(rows),
        chosen=chosen,
        net=Interval(*(value - cost / setup.interval for value in gross)),
        times=len(saved) / autocorrelation_time(saved),
        aged=tuple(
            Aged((age + 0.5) * batches.per_window, float(np.mean([row[age].mean() for row in grid if age < len(row)])) / mean_s)
            for age in range(len(b))
        ),
        every=tuple(every),
    )


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
    steps = [taken / (value * float(base_s.mean())) if value > 0 else math.inf for value in saving]
    break_even = Interval(steps[0], steps[2], steps[1])
    return Row(option, saving, float(times.imbalance.mean()), moved, taken, break_even, cache)


def _inside_a(bench: Bench, row: Row, a: range) -> float:
    """Return the net saving of an option on the last window of A, planned on those before it (on itself, if alone)."""
    seen = a[:-1] or a
    base_s = bench.times(BASELINE, bench.plan(BASELINE, seen), a[-1:]).step_s
    times = bench.times(row.option, bench.plan(row.option, seen), a[-1:])
    saved = bench.saved_s(row.option, times.step_s, base_s).mean() - row.rebalance_s / bench.setup.interval
    return float(saved / base_s.mean())


def _by_age(bench: Bench, option: Option, a: range, b: range) -> list[list[F64]]:
    """Return seconds saved in batches of window B: item o, of the plan made before its o-th window, by age in windows."""
    linear = bench.plan(BASELINE, a)
    found = []
    for first in b:
        plan = bench.plan(option, range(first - len(a), first))
        later = range(first, b[-1] + 1)
        base = [bench.times(BASELINE, linear, [window]).step_s for window in later]
        own = [bench.times(option, plan, [window]).step_s for window in later]
        found.append([bench.saved_s(option, mine, theirs) for mine, theirs in zip(own, base, strict=True)])
    return found


def _replanned(grid: list[list[F64]], period: int) -> F64:
    """Return seconds saved in every batch of window B, replanned every ``period`` windows."""
    windows = range(len(grid))
    return np.concatenate([grid[window - window % period][window % period] for window in windows])


def verdict(setup: Setup, batches: Batches, found: Judged | None) -> tuple[Verdict, str]:
    """Return the verdict and one line why."""
    if found is None:
        wanted = math.ceil(1.5 * MIN_TIMES) * batches.size
        return "not enough evidence", (
            f"the traffic fills {batches.n_batches} batches of {batches.size:,} tokens: record {wanted:,} tokens or more, or "
            "lower --tokens-per-rank"
        )
    best, net = found.chosen, found.net
    so_far = f"{best.option.name} saves {_percent(net)} of a step after costs"
    if found.times < MIN_TIMES:
        wanted = math.ceil(batches.ids.shape[1] * MIN_TIMES / found.times)
        return "not enough evidence", (
            f"window B holds {found.times:.0f} independent batches, {MIN_TIMES} are wanted: record about {wanted:,} tokens "
            f"(so far: {so_far})"
        )
    if net.low > 0 and net.mean >= setup.least_gain:
        return "worth it", so_far
    if net.high < setup.least_gain:
        if best.saving.low > setup.least_gain:
            return "not worth it", (
                f"{best.option.name} saves {_percent(best.saving)} of a step, but a rebalance costs more than "
                f"{setup.interval:,} steps bring: it takes {best.break_even.mean:,.0f} steps to pay"
            )
        return "not worth it", f"{so_far}, less than {100 * setup.least_gain:g} %"
    return "not enough evidence", f"{so_far}: the interval allows both"


def _percent(value: Interval) -> str:
    return f"{100 * value.mean:.1f} % [{100 * value.low:.1f}, {100 * value.high:.1f}]"
