"""From what window B shows to one of three answers, and one line why."""

from __future__ import annotations

import math

from sim.advice import Setup, Verdict
from sim.advice.batches import WINDOWS, Batches
from sim.advice.evidence import Interval
from sim.advice.placement import Judged, pays
from sim.statistics import MIN_TIMES

_JUDGED = WINDOWS - WINDOWS // 3

_NO: Verdict = "not worth it"
_UNKNOWN: Verdict = "not enough evidence"


def verdict(setup: Setup, batches: Batches, found: Judged | None) -> tuple[Verdict, str]:
    """Return the answer and its reason.

    Worth it: the 95 % interval of the net saving is above 0 and its mean reaches ``setup.least_gain``, at an interval that
    window B spans. Where B does not, it depends on what plans save later: worth it if they keep, if B shows no sign that
    their saving fades. Not worth it: all of the interval is below ``setup.least_gain``. Anything else, and a window B of
    fewer than 50 autocorrelation times: not enough.
    """
    if found is None:
        return _UNKNOWN, (
            f"the traffic fills {batches.n_batches} batches of {batches.size:,} tokens: "
            f"{_record(setup, batches, WINDOWS * math.ceil(MIN_TIMES / _JUDGED))}, or lower --tokens-per-rank"
        )
    best, net, least = found.chosen, found.net, setup.least_gain
    name = best.option.name
    after = f"{name} saves {percent(net)} of a step, a rebalance every {found.interval:,} steps paid for"
    if found.times < MIN_TIMES:
        # One more batch in every window at least.
        wanted = math.ceil(batches.n_batches * MIN_TIMES / found.times) + batches.n_windows
        return _UNKNOWN, (
            f"window B holds {found.times:.0f} independent batches, {MIN_TIMES} are wanted: "
            f"{_record(setup, batches, wanted)} (so far: {after})"
        )
    if pays(net, least):
        if found.interval <= found.span:
            return "worth it", after
        if found.trend.high >= 0:
            return "worth it if plans keep", f"{after}, {condition(found)}"
        return _UNKNOWN, (
            f"{after}, but only if plans keep that long: within the {found.span:,} steps of window B their saving changes by "
            f"{percent(found.trend)} of a step: {_record(setup, batches, _spanning(setup, found))}"
        )
    if net.high >= least:
        return _UNKNOWN, f"{after}: that interval allows both answers"
    if not any(row.saving.mean > 0 for row in found.rows):
        return _NO, f"no option saves anything: {name} saves {percent(best.saving)} of a step"
    fresh = found.aged[0].saving
    if fresh >= least and found.tail < fresh / 2:
        return _NO, (
            f"{name} saves {100 * fresh:.1f} % of a step at first, but plans age faster than a rebalance repays itself: "
            f"{100 * found.tail:.1f} % are left after {found.aged[-1].steps:,.0f} steps"
        )
    return _NO, (
        f"{name}, the best, saves {percent(best.saving)} of a step, {percent(net)} with a rebalance every "
        f"{found.interval:,} steps paid for: less than {100 * least:g} %"
    )


def condition(found: Judged) -> str:
    """Return what a saving at an interval that window B does not span rests on."""
    return f"if plans keep: window B spans {found.span:,} steps, in which a plan's saving changes by {percent(found.trend)} of a step"


def _record(setup: Setup, batches: Batches, wanted: int) -> str:
    """Return what to do for ``wanted`` batches."""
    if setup.simulated:
        return f"record {wanted:,} batches with --batches {wanted} --tokens-per-rank {batches.tokens_per_rank}"
    return f"record about {wanted * batches.size:,} tokens"


def _spanning(setup: Setup, found: Judged) -> int:
    """Return the batches of a trace whose window B spans what a rebalance needs to pay for certain."""
    cost = found.chosen.rebalance_s / found.base_s
    low, mean = (value + cost / found.interval for value in (found.net.low, found.net.mean))
    steps = cost / min(low, mean - setup.least_gain)
    return WINDOWS * math.ceil(steps / _JUDGED)


def percent(value: Interval) -> str:
    """Return a saving with its 95 % interval, if it has one, for people."""
    mean, low, high = (f"{round(100 * number, 1) + 0.0:.1f}" for number in value)  # + 0.0: no minus before a zero
    return f"{mean} %" if math.isnan(value.low) else f"{mean} % [{low}, {high}]"
