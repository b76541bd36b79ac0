"""Tables of a result as text: policies down, figures across, intervals where there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sim.aligned import grid
from sim.results import Metric, Result, metrics_of

# Columns whose paired difference a table ends with.
_LEADING = {"step_time_s": "step time", "tpot_mean_s": "mean TPOT", "iteration_s": "iteration"}
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


def table(result: Result, names: Sequence[str]) -> list[str]:
    metrics = {m.name: m for m in metrics_of(result.scenario)}
    values: dict[tuple[str, str], tuple[float, float, float, float]] = {}
    rows: dict[str, list[Any]] = result.summary_rows
    for policy, metric, mean, half, diff, diff_half, _ in zip(*rows.values(), strict=True):
        values[policy, metric] = (mean, half, diff, diff_half)
    policies = [p.name for p in result.scenario.policies]
    names = [name for name in names if any(_says(name, values[policy, name][0], result) for policy in policies)]
    if not names:
        return []
    lines = []
    leading = next((name for name in _LEADING if name in names), None)
    first = result.scenario.policies[0].name
    for policy in (p.name for p in result.scenario.policies):
        row = [policy]
        for name in names:
            mean, half, diff, diff_half = values[policy, name]
            cell = number(mean, metrics[name])
            if not math.isnan(half) and not name.endswith("_floor") and half > 1e-6 * abs(mean):
                cell += f" ±{half * metrics[name].scale:.2g}"
            row.append(cell)
        if leading:
            mean, _, diff, diff_half = values[policy, leading]
            base = mean - diff
            cell = "-" if policy == first or math.isnan(diff) or base <= 0 else f"{100 * diff / base:+.1f} %"
            if cell != "-" and not math.isnan(diff_half):
                cell += f" ±{100 * diff_half / base:.1f}"
            row.append(cell)
        lines.append(row)
    head = ["policy", *(metrics[name].label for name in names)]
    if leading:
        head.append(f"{_LEADING[leading]} against first")
    return grid(head, lines)


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


def titled(result: Result, tables: Sequence[Sequence[str]]) -> list[str]:
    """The tables that say something, an empty line before each."""
    return [line for names in tables if (found := table(result, names)) for line in ("", *found)]
