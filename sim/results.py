"""What a run returns: tidy tables, and their summary with intervals and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sim.scenario import Scenario
from sim.statistics import half_width

if TYPE_CHECKING:
    import pandas as pd

    from sim.engine.recording import Recorded

Table = dict[str, list[Any]]


@dataclass(frozen=True)
class Metric:
    """A figure of the summary: its name, how people read it, and which direction is better, if any."""

    name: str
    label: str
    digits: int
    scale: float = 1.0
    better: Literal["lower", "higher", "none"] = "lower"


METRICS = (
    Metric("max_vio_batch", "MaxVio batch", 3),
    Metric("max_vio_batch_floor", "(floor)", 3, better="none"),
    Metric("max_vio_global", "MaxVio global", 3),
    Metric("max_vio_global_floor", "(floor)", 3, better="none"),
    Metric("device_max_over_mean", "device max/mean", 3),
    Metric("balancedness_sum", "balancedness (vLLM)", 3, better="higher"),
    Metric("balancedness_mean", "balancedness (SGLang)", 3, better="higher"),
    Metric("nodes_per_token", "nodes /token", 3),
    Metric("devices_per_token", "devices /token", 3),
    Metric("inter_node_bytes", "inter-node GB", 4, 1e-9),
    Metric("kept_affinity", "kept affinity", 4, better="higher"),
    Metric("least_share", "least-updated expert", 3, better="higher"),
    Metric("max_vio_sequence", "MaxVio sequence", 3),
    Metric("max_vio_sequence_floor", "(floor)", 3, better="none"),
    Metric("max_vio_micro_batch", "MaxVio micro-batch", 3),
    Metric("max_vio_micro_batch_floor", "(floor)", 3, better="none"),
    Metric("max_vio_ep_group", "MaxVio EP group", 3),
    Metric("topic_max_vio", "MaxVio within topic", 3, better="none"),
    Metric("specialisation_bits", "topic-expert bits", 3, better="none"),
    Metric("kept_against_oracle", "kept against oracle", 4, better="higher"),
    Metric("starved_1pct", "dead experts %", 1, 100.0),
    Metric("starved_10pct", "starved experts %", 1, 100.0),
    Metric("update_cv", "update CV", 3),
    Metric("experts_per_token", "experts /token", 3, better="none"),
    Metric("dropped_share", "dropped %", 3, 100.0),
    Metric("max_vio_asked", "MaxVio before drops", 3),
    Metric("dropped_worst_topic", "dropped, worst topic %", 3, 100.0),
    Metric("offset_rms", "learned offset", 3, better="none"),
    Metric("max_vio_late", "MaxVio last quarter", 3),
    Metric("settling_step", "settled at step", 0),
    Metric("ripple", "ripple of MaxVio", 3),
    Metric("churn", "churn", 3),
    Metric("step_time_s", "step ms", 5, 1e3),
    Metric("attention_s", "attention ms", 4, 1e3),
    Metric("experts_s", "experts ms", 4, 1e3),
    Metric("other_compute_s", "other compute ms", 4, 1e3),
    Metric("exposed_communication_s", "exposed comm ms", 4, 1e3),
    Metric("waiting_s", "waiting ms", 4, 1e3),
    Metric("moved_bytes", "moved GB /step", 4, 1e-9),
    Metric("step_and_moves_s", "step with moves ms", 5, 1e3),
    Metric("forward_s", "forward ms", 5, 1e3),
    Metric("backward_s", "backward ms", 5, 1e3),
    Metric("weight_gradients_s", "weight gradients ms", 5, 1e3),
    Metric("overlapped_s", "forward and backward ms", 5, 1e3, better="none"),
    Metric("bubble_s", "bubble ms", 5, 1e3),
    Metric("optimizer_s", "optimizer ms", 5, 1e3),
    Metric("tokens_per_s_per_gpu", "tokens /s/GPU", 5, better="higher"),
    Metric("tokens_per_day", "tokens /day 1e9", 5, 1e-9, better="higher"),
    Metric("model_flops_per_s_per_gpu", "model TFLOP/s", 4, 1e-12, better="higher"),
    Metric("mfu", "MFU %", 2, 100.0, better="higher"),
    Metric("gpu_hours_per_trillion", "GPU hours /1e12 tokens", 6),
    Metric("usd_per_trillion", "USD /1e12 tokens", 6),
    Metric("energy_j_per_trillion", "MWh /1e12 tokens", 4, 1 / 3.6e9),
    Metric("usd_per_million_tokens", "USD /1e6 tokens", 4),
    Metric("memory_bytes", "memory GB", 4, 1e-9),
)

SERVICE_METRICS = (
    *(
        Metric(f"{name}_{key}_s", f"{label} {key} {unit}", 4, scale)
        for name, label, unit, scale in (
            ("ttft", "TTFT", "s", 1.0),
            ("tpot", "TPOT", "ms", 1e3),
            ("itl", "ITL", "ms", 1e3),
            ("e2e", "end to end", "s", 1.0),
            ("queued", "queued", "s", 1.0),
        )
        for key in ("mean", "p50", "p90", "p99")
    ),
    Metric("user_tokens_per_s", "tokens/s per user", 4, better="higher"),
    Metric("goodput_share", "within SLO %", 2, 100.0, better="higher"),
    Metric("goodput_per_s", "goodput requests/s", 4, better="higher"),
    Metric("requests", "requests", 0, better="none"),
    Metric("refused", "refused", 0),
    Metric("preemptions", "pre-empted", 0),
    Metric("retries", "retried", 0),
    Metric("queue_mean", "mean queue", 4),
    Metric("running_mean", "mean running", 5, better="none"),
    Metric("handover_mean", "mean in handover", 4),
    Metric("iterations", "iterations", 0, better="none"),
    Metric("utilisation", "busy %", 1, 100.0, better="none"),
    Metric("input_tokens_per_s_per_gpu", "input tokens /s/GPU", 5, better="higher"),
    Metric("prompt_tokens_per_s_per_gpu", "of these computed", 5, better="none"),
    Metric("cached_tokens_per_s_per_gpu", "of these cached", 5, better="higher"),
    Metric("output_tokens_per_s_per_gpu", "output tokens /s/GPU", 5, better="higher"),
    Metric("usd_per_million_input", "USD /1e6 input", 4),
    Metric("usd_per_million_output", "USD /1e6 output", 4),
    Metric("usd_per_million_tokens", "USD /1e6 tokens", 4),
    Metric("memory_bytes", "memory GB", 4, 1e-9),
    Metric("decoding_per_rank", "decodes per rank", 4, better="none"),
    Metric("kv_mean", "KV mean %", 1, 100.0, better="none"),
    Metric("kv_max", "KV most %", 1, 100.0, better="none"),
    Metric("imbalance_mean", "imbalance max/mean", 3),
    Metric("imbalance_p99", "imbalance p99", 3),
    Metric("iteration_s", "iteration ms", 4, 1e3),
    Metric("attention_s", "attention ms", 4, 1e3),
    Metric("experts_s", "experts ms", 4, 1e3),
    Metric("communication_s", "exposed comm ms", 4, 1e3),
    Metric("other_s", "other ms", 4, 1e3),
)
"""Columns of the service table of a run that serves requests."""


@dataclass(frozen=True)
class Result:
    """A finished run. ``tables`` and ``summary_rows`` are plain columns; the properties give pandas frames.

    n_events: events that the discrete-event engine processed. recorded: what `sim.timeline` draws, one entry per policy;
    empty unless the run was asked for it, and in stored runs. traces: of a stored run, SHA-256 of the recorded traffic and
    requests that it was made of (empty for none); None: they are as the files are now.
    """

    scenario: Scenario
    tables: dict[str, Table]
    summary_rows: Table
    n_events: int
    recorded: tuple[Recorded, ...] = ()
    traces: tuple[str, str] | None = None

    def __repr__(self) -> str:
        tables = ", ".join(name for name, table in self.tables.items() if table)
        return f"<Result of {self.scenario.name}: {len(self.scenario.policies)} policies, {self.scenario.replicas} replica(s); {tables}>"

    def _frame(self, table: Table) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(table)

    @property
    def steps(self) -> pd.DataFrame:
        """One row per policy, replica and step; means over MoE layers, and the time of timed steps."""
        return self._frame(self.tables["steps"])

    @property
    def layers(self) -> pd.DataFrame:
        """One row per policy, replica, step and MoE layer."""
        return self._frame(self.tables["layers"])

    @property
    def totals(self) -> pd.DataFrame:
        """One row per policy, replica and MoE layer: what holds over all steps."""
        return self._frame(self.tables["totals"])

    @property
    def topics(self) -> pd.DataFrame:
        """One row per policy, replica, measured step, MoE layer and topic; empty if the traffic has one topic."""
        return self._frame(self.tables["topics"])

    @property
    def devices(self) -> pd.DataFrame:
        """One row per policy, replica, timed step and device: tokens received, and where the time went."""
        return self._frame(self.tables["devices"])

    @property
    def experts(self) -> pd.DataFrame:
        """One row per policy, replica, MoE layer and expert: tokens over all steps."""
        return self._frame(self.tables["experts"])

    @property
    def requests(self) -> pd.DataFrame:
        """One row per policy, replica and request: where it was served, and how long everything took."""
        return self._frame(self.tables["requests"])

    @property
    def service(self) -> pd.DataFrame:
        """One row per policy and replica: what users and operators get (`SERVICE_METRICS`)."""
        return self._frame(self.tables["service"])

    @property
    def units(self) -> pd.DataFrame:
        """One row per policy, replica and serving unit: its own rates, occupancy and times."""
        return self._frame(self.tables["units"])

    @property
    def timeline(self) -> pd.DataFrame:
        """One row per policy, replica, serving unit and hundredth of the duration."""
        return self._frame(self.tables["timeline"])

    @property
    def rebalances(self) -> pd.DataFrame:
        """One row per policy, replica, serving unit and time at which moving experts was considered."""
        return self._frame(self.tables["rebalances"])

    @property
    def faults(self) -> pd.DataFrame:
        """One row per policy, replica and fault of a serving unit: what was lost, and for how long."""
        return self._frame(self.tables["faults"])

    def summary(self) -> pd.DataFrame:
        """One row per policy and metric: mean over replicas, 95 % half-width, paired difference against the first
        policy with its half-width (NaN with one replica)."""
        return self._frame(self.summary_rows)

    def steady(self, metric: str, policy: str | None = None) -> pd.DataFrame:
        """One row per policy (or of one): the mean of ``metric`` over the first replica's own time, with a 95 % interval by
        batch means once the warm-up is cut off, or why there is none (see `sim.steady.steady`)."""
        from sim.steady import steady

        return self._frame(steady(self.tables, self.scenario, metric, policy))


def metrics_of(scenario: Scenario) -> tuple[Metric, ...]:
    """The figures that a run of ``scenario`` is summarised by."""
    return METRICS if scenario.serving is None else SERVICE_METRICS


def _rows_of(table: Table) -> dict[tuple[str, int], list[int]]:
    """Row numbers by (policy, replica)."""
    rows: dict[tuple[str, int], list[int]] = {}
    for i, key in enumerate(zip(table.get("policy", []), table.get("replica", []), strict=True)):
        rows.setdefault(key, []).append(i)
    return rows


def _mean(table: Table, rows: list[int], name: str) -> float:
    """Mean over ``rows`` of the values that are there; NaN if there are none."""
    known = [v for i in rows if (v := table[name][i]) is not None and not math.isnan(v)] if name in table else []
    return math.fsum(known) / len(known) if known else math.nan


_IN_STEPS = {"max_vio_batch": "max_vio", "max_vio_batch_floor": "max_vio_floor"}


def per_replica(tables: dict[str, Table], scenario: Scenario) -> Table:
    """Return one row per policy and replica: ``policy``, ``replica`` and every figure of `metrics_of`, NaN where there is none.

    What holds over a run (the totals table) is averaged over layers, everything else over steps; a run that serves
    requests has one row of its service table for each policy and replica.
    """
    serves = scenario.serving is not None
    steps, totals = tables["service" if serves else "steps"], tables.get("totals", {})
    in_steps, in_totals = _rows_of(steps), _rows_of(totals)
    out: Table = {name: [] for name in ("policy", "replica", *(metric.name for metric in metrics_of(scenario)))}
    for policy in scenario.policies:
        for replica in range(scenario.replicas):
            key = (policy.name, replica)
            out["policy"].append(policy.name)
            out["replica"].append(replica)
            for metric in metrics_of(scenario):
                name = metric.name
                if name in totals:
                    value = _mean(totals, in_totals.get(key, []), name)
                else:
                    value = _mean(steps, in_steps.get(key, []), _IN_STEPS.get(name, name))
                out[name].append(value)
    return out


def compared(rows: Table, metrics: Sequence[Metric]) -> Table:
    """Return the summary columns of `per_replica` rows: policy, metric, mean, half_width, difference, difference_half_width,
    replicas. Policies come in the order of ``rows`` and are compared with the first, replica by replica."""
    policies = list(dict.fromkeys(rows["policy"]))
    found = _rows_of(rows)
    replicas = len(rows["policy"]) // len(policies)
    at = [[found[policy, replica][0] for replica in range(replicas)] for policy in policies]
    out: Table = {
        name: []
        for name in ("policy", "metric", "mean", "half_width", "difference", "difference_half_width", "replicas")
    }
    for index, policy in enumerate(policies):
        for metric in metrics:
            values = rows[metric.name]
            mine = np.array([values[row] for row in at[index]])
            first = np.array([values[row] for row in at[0]])
            row = (
                policy,
                metric.name,
                float(mine.mean()),
                half_width(mine),
                float((mine - first).mean()),
                half_width(mine - first),
                replicas,
            )
            for column, value in zip(out.values(), row, strict=True):
                column.append(value)
    return out


def summarise(tables: dict[str, Table], scenario: Scenario) -> Table:
    """Return what `compared` says about the run's own `per_replica` rows."""
    return compared(per_replica(tables, scenario), metrics_of(scenario))
