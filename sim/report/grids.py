"""Tables of a result as text: policies down, figures across, intervals where there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from sim.aligned import grid
from sim.results import Metric, Result, metrics_of


class Value(NamedTuple):
    """A figure of one policy: mean, half-width, paired difference against the first policy with its half-width."""

    mean: float
    half: float
    difference: float
    difference_half: float


class Section(NamedTuple):
    """A table of policies: its title and the metrics that are its columns, by name."""

    title: str
    names: tuple[str, ...]


# Columns whose paired difference a table ends with.
LEADING = {"step_time_s": "step time", "tpot_mean_s": "mean TPOT", "iteration_s": "iteration"}
# Columns that say nothing where every policy has this value.
_DULL = {
    "refused": 0.0,
    "preemptions": 0.0,
    "retries": 0.0,
    "cached_tokens_per_s_per_gpu": 0.0,
    "dropped_share": 0.0,
    "dropped_worst_topic": 0.0,
    "offset_rms": 0.0,
}


def number(value: float, metric: Metric) -> str:
    """Format a mean for people; a dash where there is none."""
    if math.isnan(value):
        return "-"
    value *= metric.scale
    if metric.digits >= 4 and metric.name != "kept_affinity":
        return (
            f"{value:.{max(0, metric.digits - 1 - math.floor(math.log10(abs(value) or 1)))}f}"
            if abs(value) < 1e9
            else f"{value:.3g}"
        )
    return f"{value:.{metric.digits}f}"


def values(result: Result) -> dict[tuple[str, str], Value]:
    """Return the summary by (policy, metric)."""
    policies, metrics, *figures = list(result.summary_rows.values())[:-1]
    return dict(zip(zip(policies, metrics, strict=True), map(Value, *figures), strict=True))


def columns(result: Result, names: Sequence[str]) -> list[Metric]:
    """Return those of ``names`` that say something about some policy."""
    found, metrics = values(result), {m.name: m for m in metrics_of(result.scenario)}
    policies = [policy.name for policy in result.scenario.policies]
    return [
        metrics[name] for name in names if any(_says(name, found[policy, name].mean, result) for policy in policies)
    ]


def leading(shown: Sequence[Metric]) -> str | None:
    """Return the metric whose paired difference ends a table of the columns ``shown``, or None."""
    return next((metric.name for metric in shown if metric.name in LEADING), None)


def spread(value: Value, metric: Metric) -> str:
    """Format the interval of a mean; nothing where there is none or it is of no account."""
    if math.isnan(value.half) or metric.name.endswith("_floor") or value.half <= 1e-6 * abs(value.mean):
        return ""
    return f"±{two_digits(value.half * metric.scale)}"


def two_digits(value: float) -> str:
    """Format to two significant digits, without an exponent where people would not write one.

    >>> two_digits(0.0213), two_digits(241.2)
    ('0.021', '241')
    """
    return f"{value:.0f}" if 10 <= abs(value) < 1e6 else f"{value:.2g}"


def against_first(value: Value, is_first: bool) -> str:
    """Format the paired difference against the first policy in per cent."""
    base = value.mean - value.difference
    if is_first or math.isnan(value.difference) or base <= 0:
        return "-"
    interval = "" if math.isnan(value.difference_half) else f" ±{100 * value.difference_half / base:.1f}"
    return f"{100 * value.difference / base:+.1f} %{interval}"


def table(result: Result, names: Sequence[str]) -> list[str]:
    """Return the lines of a table of policies; none if no column says anything."""
    shown, found = columns(result, names), values(result)
    if not shown:
        return []
    last, policies, rows = leading(shown), [policy.name for policy in result.scenario.policies], []
    for policy in policies:
        row = [policy]
        for metric in shown:
            value = found[policy, metric.name]
            row.append(" ".join(filter(None, (number(value.mean, metric), spread(value, metric)))))
        if last:
            row.append(against_first(found[policy, last], policy == policies[0]))
        rows.append(row)
    head = ["policy", *(metric.label for metric in shown)]
    if last:
        head.append(f"{LEADING[last]} against first")
    return grid(head, rows)


def _says(name: str, value: float, result: Result) -> bool:
    if name == "goodput_share" and result.scenario.serving is not None:  # of interest where something is asked for
        slo = result.scenario.serving.slo
        return any(limit is not None for limit in (slo.ttft_s, slo.tpot_s, slo.e2e_s))
    if name == "experts_per_token":  # of interest where policies differ from the model's number
        scenario = result.scenario
        moe = [policy for policy in scenario.policies if scenario.model_of(policy).is_moe]
        several = len({scenario.model_of(policy).num_experts_per_tok for policy in moe}) > 1
        return several or any(policy.select.varies for policy in moe)
    if name == "max_vio_asked":  # where nothing is dropped it is MaxVio itself
        return any(policy.capacity.kind != "none" for policy in result.scenario.policies)
    if name.startswith(("max_vio_micro_batch", "max_vio_ep_group")) and result.scenario.schedule.micro_batches == 1:
        return False  # the EP group's micro-batch is the batch
    return not math.isnan(value) and value != _DULL.get(name)


def titled(result: Result, sections: Sequence[Section]) -> list[str]:
    """The tables that say something, an empty line before each."""
    return [line for section in sections if (found := table(result, section.names)) for line in ("", *found)]
