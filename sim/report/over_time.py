"""What one replica's own time says where there are no others: leading metrics with intervals by batch means."""

from __future__ import annotations

import math

from sim.report.grids import number
from sim.results import Result, metrics_of
from sim.steady import known_metrics, steady

_LEADING = ("max_vio_batch", "step_time_s", "ttft_mean_s", "tpot_mean_s", "e2e_mean_s")


def over_time(result: Result) -> list[str]:
    """Return a line per leading metric for which a run of one replica is long enough; nothing for several replicas, whose
    spread is the better evidence."""
    if result.scenario.replicas > 1:
        return []
    labels = {metric.name: metric for metric in metrics_of(result.scenario)}
    known, lines = known_metrics(result.tables, result.scenario), []
    for name in _LEADING:
        if name not in known:
            continue
        metric, found = labels[name], steady(result.tables, result.scenario, name)
        rows = [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]
        told = [
            f"{row['policy']} {number(row['mean'], metric)} ±{row['half_width'] * metric.scale:.2g}"
            for row in rows
            if not math.isnan(row["half_width"])
        ]
        if told:
            unit = next(row["unit"] for row in rows if not math.isnan(row["half_width"]))
            lines.append(f"{metric.label} in steady state, ± 95 % by batch means of {unit}: {', '.join(told)}")
    return lines
