"""The text of a run that serves requests: what users get, what operators get, and what happened on the way."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from sim.aligned import grid
from sim.report.about import describe
from sim.report.grids import Section, number, titled
from sim.report.over_time import over_time
from sim.report.remarks import remarks_on
from sim.results import Result, Table, metrics_of
from sim.units import human

_USERS = (
    "ttft_p50_s", "ttft_p99_s", "tpot_mean_s", "tpot_p99_s", "itl_p99_s", "e2e_p50_s", "queued_p99_s",
    "goodput_share", "goodput_per_s",
)  # fmt: skip
_OPERATORS = (
    "input_tokens_per_s_per_gpu", "cached_tokens_per_s_per_gpu", "output_tokens_per_s_per_gpu",
    "usd_per_million_input", "usd_per_million_output", "utilisation", "decoding_per_rank", "queue_mean", "kv_mean",
    "kv_max",
)  # fmt: skip
_ITERATIONS = (
    "iteration_s", "attention_s", "experts_s", "communication_s", "other_s", "imbalance_mean", "imbalance_p99",
    "refused", "preemptions", "retries",
)  # fmt: skip


def sections(result: Result) -> list[Section]:
    """Return the tables of policies that a run that serves requests has."""
    return [
        Section("What users get", _USERS),
        Section("What operators get", _OPERATORS),
        Section("Iterations", _ITERATIONS),
    ]


def note(result: Result) -> str:
    """Say what the tables' figures are means of."""
    return "Means over replicas, ± 95 %." if result.scenario.replicas > 1 else "One replica, so no intervals."


def units(result: Result) -> list[tuple[list[str], list[list[str]]]]:
    """Return the head and rows of a table of units side by side where there are several: means over replicas of what each does."""
    table = result.tables.get("units", {})
    if not table or len(set(table["unit"])) < 2:
        return []
    names = ("input_tokens_per_s_per_gpu", "output_tokens_per_s_per_gpu", "utilisation", "decoding_per_rank", "kv_mean",
             "kv_max", "iteration_s", "imbalance_mean")  # fmt: skip
    metrics = {m.name: m for m in metrics_of(result.scenario)}
    found: dict[tuple[str, str], list[int]] = {}
    for i, key in enumerate(zip(table["policy"], table["unit"], strict=True)):
        found.setdefault(key, []).append(i)
    rows = []
    for (policy, unit), at in found.items():
        means = [math.fsum(table[name][i] for i in at) / len(at) for name in names]
        rows.append(
            [f"{policy}, {unit}", *(number(mean, metrics[name]) for name, mean in zip(names, means, strict=True))]
        )
    return [(["policy, unit", *(metrics[name].label for name in names)], rows)]


def events(result: Result) -> list[str]:
    """What faults and rebalances did, in a line each, and what one long replica tells by itself."""
    lines = []
    for row in _rows(result.tables.get("faults", {})):
        if row["kind"] == "dead_rank" and not row["replica"]:
            lines.append(
                f"{row['policy']}: after the death of rank {row['rank']} of {row['unit']} {row['index']} "
                f"{100 * row['alive_share']:.2f} % of experts had a live copy, {row['loaded_experts']} were loaded again in "
                f"{human(row['load_s'], 's')}; {row['retried']} requests computed again, {human(row['paused_s'], 's')} "
                "without service"
            )
    plans: dict[str, list[dict[str, Any]]] = {}
    for row in _rows(result.tables.get("rebalances", {})):
        plans.setdefault(row["policy"], []).append(row)
    for policy, found in plans.items():
        done = [row for row in found if row["done"]]
        moved = math.fsum(row["moved_bytes"] for row in done)
        added = math.fsum(row["added_s"] for row in done)
        lines.append(
            f"{policy}: {len(done)} of {len(found)} plans moved experts, {human(moved, 'B')} in all, which took "
            f"{human(added, 's')} of iterations"
        )
    return lines + over_time(result)


def _rows(table: Table) -> list[dict[str, Any]]:
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]


def terminal(result: Result) -> str:
    """Return the whole text of a run that serves requests."""
    parts = [*describe(result.scenario), *titled(result, sections(result))]
    parts += [line for head, rows in units(result) for line in ("", *grid(head, rows))]
    lines = [*events(result), note(result)]
    wrapped = [part for line in lines for part in textwrap.wrap(line, 120, subsequent_indent="  ")]
    return "\n".join([*parts, "", *wrapped, *remarks_on(result.scenario)])
