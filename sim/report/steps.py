"""The text of a run of steps: balance beside its floors, times, and where there is a pipeline what training costs."""

from __future__ import annotations

import math
import textwrap

from sim.aligned import grid
from sim.metrics.dynamics import MIN_STEPS
from sim.report.about import describe
from sim.report.grids import Section, titled
from sim.report.over_time import over_time
from sim.report.remarks import remarks_on
from sim.report.repaid import repaid
from sim.results import Result
from sim.units import human

_BALANCE = (
    "max_vio_batch", "max_vio_batch_floor", "max_vio_global", "max_vio_global_floor", "device_max_over_mean",
    "least_share", "kept_affinity", "nodes_per_token", "devices_per_token", "inter_node_bytes",
)  # fmt: skip
_EXPERTS = (
    "max_vio_sequence", "max_vio_sequence_floor", "max_vio_micro_batch", "max_vio_micro_batch_floor", "max_vio_ep_group",
    "topic_max_vio", "specialisation_bits", "kept_against_oracle",
    "starved_10pct", "update_cv", "experts_per_token", "max_vio_asked", "dropped_share", "dropped_worst_topic",
    "offset_rms",
)  # fmt: skip
_CONTROL = ("max_vio_late", "settling_step", "ripple", "churn")
_TIME = (
    "step_time_s", "attention_s", "experts_s", "other_compute_s", "exposed_communication_s", "waiting_s",
    "tokens_per_s_per_gpu", "moved_bytes", "step_and_moves_s",
)  # fmt: skip
_PIPELINE_TIME = (
    "step_time_s", "forward_s", "backward_s", "weight_gradients_s", "overlapped_s", "bubble_s", "optimizer_s",
)  # fmt: skip
_PRICE = (
    "tokens_per_day", "tokens_per_s_per_gpu", "model_flops_per_s_per_gpu", "mfu", "gpu_hours_per_trillion",
    "usd_per_trillion", "energy_j_per_trillion",
)  # fmt: skip
_MOST_TOPICS = 12  # of which each has a column


def by_topic(result: Result) -> list[tuple[list[str], list[list[str]]]]:
    """Return the head and rows of tables policies x topics: MaxVio within each topic and, where something is dropped, the
    share that is."""
    topics, table = result.scenario.traffic.topics, result.tables.get("topics", {})
    if not table or not 1 < len(topics) <= _MOST_TOPICS:
        return []
    found: list[tuple[list[str], list[list[str]]]] = []
    for column, label, scale in (("max_vio", "MaxVio within", 1.0), ("dropped_share", "dropped %", 100.0)):
        values: dict[tuple[str, str], list[float]] = {}
        for policy, topic, value in zip(table["policy"], table["topic"], table[column], strict=True):
            if not math.isnan(value):
                values.setdefault((policy, topic), []).append(value * scale)
        means = {key: math.fsum(listed) / len(listed) for key, listed in values.items()}
        if not any(means.values()):
            continue
        shown = [policy.name for policy in result.scenario.policies]
        if column == "dropped_share":  # most policies drop nothing
            shown = [name for name in shown if any(means.get((name, topic)) for topic in topics)]
        rows = [
            [name, *(f"{means[key]:.2f}" if (key := (name, topic)) in means else "-" for topic in topics)]
            for name in shown
        ]
        found.append(([label, *topics], rows))
    return found


def sections(result: Result) -> list[Section]:
    """Return the tables of policies that a run of steps has."""
    found = [Section("Balance and bytes", _BALANCE), Section("Experts", _EXPERTS)]
    if result.scenario.steps.count >= MIN_STEPS:
        found.append(Section("Control", _CONTROL))
    if len(result.scenario.timed_steps()):
        if result.scenario.pipelined:
            found += [Section("Time of a step", _PIPELINE_TIME), Section("What training costs", _PRICE)]
        else:
            found.append(Section("Time of a step", _TIME))
    return found


def note(result: Result) -> str:
    """Say what the tables' figures are means of."""
    text = "(floor): MaxVio of a perfectly uniform random gate at this batch size. Means over MoE layers and steps"
    return text + (", ± 95 % over replicas." if result.scenario.replicas > 1 else "; one replica, so no intervals.")


def terminal(result: Result) -> str:
    """Return the whole text of a run of steps."""
    tables = sections(result)
    parts = [*describe(result.scenario), *titled(result, tables[:2])]
    parts += [line for head, rows in by_topic(result) for line in ("", *grid(head, rows))]
    parts += titled(result, tables[2:])
    moved = [part for line in events(result) for part in textwrap.wrap(line, 120, subsequent_indent="  ")]
    return "\n".join([*parts, "", note(result), *moved, *remarks_on(result.scenario)])


def events(result: Result) -> list[str]:
    """What every policy's moves cost and gained against its counterpart that stays, and what one long replica tells by itself."""
    lines = []
    for row in repaid(result):
        found = f"a new placement costs {human(row.cost_s, 's')} and shortens later steps by {human(row.gain_s, 's')}"
        pays = f"repaid in {row.steps:.3g} steps" if math.isfinite(row.steps) else "never repaid"
        lines.append(f"{row.policy}: {found} against {row.against} (mean of {row.moves}): {pays}")
    return lines + over_time(result)
