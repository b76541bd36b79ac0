"""From what window B shows to one of three answers, and one line why."""

from __future__ import annotations

import math

from sim.advice import Setup, Verdict
from sim.advice.batches import Batches
from sim.advice.evidence import MIN_TIMES, Interval
from sim.advice.placement import Judged

_NO: Verdict = "not worth it"
_UNKNOWN: Verdict = "not enough evidence"


def verdict(setup: Setup, batches: Batches, found: Judged | None) -> tuple[Verdict, str]:
    """Return the answer and its reason.

    Worth it: the 95 % interval of the net saving is above 0 and its mean reaches ``setup.least_gain``. Not worth it: all
    of the interval is below that. Anything else, and a window B of fewer than 50 autocorrelation times: not enough.
    """
    if found is None:
        wanted = math.ceil(1.5 * MIN_TIMES) * batches.size
        return _UNKNOWN, (
            f"the traffic fills {batches.n_batches} batches of {batches.size:,} tokens: record {wanted:,} tokens or more, or "
            "lower --tokens-per-rank"
        )
    best, net, least = found.chosen, found.net, setup.least_gain
    name = best.option.name
    after = f"{name} saves {percent(net)} of a step, a rebalance every {found.interval:,} steps paid for"
    if found.times < MIN_TIMES:
        # One more batch in every window at least.
        wanted = math.ceil(batches.size * (batches.n_batches * MIN_TIMES / found.times + batches.n_windows))
        return _UNKNOWN, (
            f"window B holds {found.times:.0f} independent batches, {MIN_TIMES} are wanted: record about {wanted:,} tokens "
            f"(so far: {after})"
        )
    if net.low > 0 and net.mean >= least:
        return "worth it", after
    if net.high >= least:
        return _UNKNOWN, f"{after}: that interval allows both answers"
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


def percent(value: Interval) -> str:
    """Return a saving with its 95 % interval, if it has one, for people."""
    if math.isnan(value.low):
        return f"{100 * value.mean:.1f} %"
    return f"{100 * value.mean:.1f} % [{100 * value.low:.1f}, {100 * value.high:.1f}]"
