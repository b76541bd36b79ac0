"""How far a run can be trusted: where its constants come from, what was assumed, what is not claimed."""

from __future__ import annotations

import re
from typing import NamedTuple

from sim.cluster import Cluster
from sim.report.remarks import remarks
from sim.scenario import Scenario
from sim.store import named_traces


class Constant(NamedTuple):
    """What a constant is for, its status in a word or two, and its source."""

    used_for: str
    status: str
    source: str


class Check(NamedTuple):
    """A group of `python -m sim.validate` that bears on a run, and what it holds to what."""

    group: str
    says: str


NOT_CLAIMED = (
    "Quality. Nothing is trained: kept affinity says how much of the router's wish a policy grants, not what a model's "
    "loss, perplexity or benchmark scores would be.",
    "That a trained router would look like this one. Its scores are drawn from a fitted generator or a recorded trace; how "
    "a model would adapt to another gate is not simulated beyond the dynamics named above.",
    "Anything the scenario does not name: other jobs on the network, reading data, checkpoints, failures and repairs, "
    "temperature and clock of the chips.",
)
_STATUS = re.compile(r"(?P<kernels>.*?) (?P<status>measured|derived) \((?P<source>.*)\)$", re.DOTALL)
_LAWS = {
    "port": "traffic of the exchange, its busiest port",
    "flow": "traffic of the exchange, flows that share links",
    "all_gather": "all-gather and reduce-scatter",
    "alpha_beta": "traffic of the exchange, latency and rate of a pair",
    "table": "traffic of the exchange, measured table",
}


def constants(scenario: Scenario) -> list[tuple[str, list[Constant]]]:
    """Return, for every cluster of the scenario by its name, the constants that turn work into time."""
    cost = scenario.cost
    step_in = cost.gemm_dtype if scenario.serving is None else None
    found: dict[str, list[Constant]] = {}
    for cluster in [scenario.cluster, *(policy.cluster for policy in scenario.policies if policy.cluster)]:
        if cluster.name not in found:
            rows = _compute(cost.compute.provenance(cluster.device, step_in))
            source = getattr(cost.communication, "source", "")
            rows.append(Constant(_LAWS.get(cost.communication.kind, cost.communication.kind), *_network(source)))
            found[cluster.name] = rows + _machine(cluster)
    return list(found.items())


def _compute(provenance: str) -> list[Constant]:
    """Take the line of a compute law apart: kernels of one source each."""
    if provenance.startswith("data sheet"):
        return [Constant("all kernels", "data sheet", provenance.removeprefix("data sheet of ").strip())]
    rows = []
    for part in _parts(provenance):
        if match := _STATUS.match(part):
            rows.append(Constant(match["kernels"], match["status"], match["source"]))
        elif " transferred from " in part:
            kernels, _, source = part.partition(" transferred ")
            rows.append(Constant(kernels, "transferred", source))
        else:
            rows.append(Constant("kernels", "measured" if "calibrated" not in part else "calibrated", part))
    return rows


def _parts(text: str) -> list[str]:
    """Cut at semicolons outside brackets."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == ";" and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]


def _network(source: str) -> tuple[str, str]:
    if not source:
        return "data sheet", "rates and latencies of the links alone"
    return "calibrated", source


def _machine(cluster: Cluster) -> list[Constant]:
    rows = [Constant("rates of device and links", "data sheet", f"{cluster.device.source}; {cluster.source}")]
    if cluster.device.price_per_hour is not None:
        price = f"{cluster.device.price_per_hour:g} USD per device and hour: {cluster.device.price_source}"
        rows.append(Constant("price", "stated", price))
    return rows


def checks(scenario: Scenario) -> list[Check]:
    """Return the groups of published or measured figures that a run of this kind rests on."""
    found = [Check("balance", "balancing rules beside the tables of their papers"),
             Check("gating", "gates beside closed forms and published effects")]  # fmt: skip
    if scenario.serving is not None or len(scenario.timed_steps()):
        found += [Check("compute", "grouped GEMM beside measured kernels"),
                  Check("kernels", "dense GEMM, attention and elementwise kernels beside measured ones"),
                  Check("communication", "dispatch, combine and collectives beside DeepEP's and measured tables")]  # fmt: skip
    if any(policy.placement.kind != "linear" for policy in scenario.policies):
        found.append(Check("placement", "load balancers beside what their users published"))
    if scenario.pipelined:
        found.append(Check("training", "whole training steps of DeepSeek-V3, V2 and a dense 67B model"))
    if scenario.serving is not None:
        found += [Check("serving", "serving iterations of DeepSeek-V3 beside its published profile"),
                  Check("serving_dense", "vLLM on RTX PRO 6000, iteration by iteration")]  # fmt: skip
    if not any(scenario.model_of(policy).is_moe for policy in scenario.policies):
        found = [check for check in found if check.group not in ("balance", "gating", "communication", "serving")]
    return found


def assumptions(scenario: Scenario) -> list[str]:
    """Return what the figures rest on, one sentence each."""
    moe = any(scenario.model_of(policy).is_moe for policy in scenario.policies)
    traffic, requests = named_traces(scenario)
    lines = []
    if moe and traffic:
        lines.append(
            f"Routing is recorded (traffic {scenario.traffic.kind}): what another gate would have chosen follows from the trace."
        )
    elif moe:
        lines.append(
            f"Tokens are synthetic (traffic {scenario.traffic.kind}): a generator whose constants were fitted to traces of "
            "real routers draws their affinities. All policies see the same tokens."
        )
    serving = scenario.serving
    if serving is not None:
        whose = "recorded" if requests else "synthetic"
        lines.append(f"Requests are {whose} (requests {serving.requests.kind}); all policies get the same ones.")
        if serving.warmup_s:
            lines.append(f"The first {serving.warmup_s:g} s fill queues and caches and are left out of all means.")
    elif (warm := scenario.steps.warmup).steps and any(policy.learns for policy in scenario.policies):
        lines.append(
            f"Balancing rules were settled on {warm.steps} smaller batches before step 0, at a rate falling from "
            f"{warm.gain:g} times to once: the run shows the settled state, not how long it takes to get there."
        )
    if scenario.replicas == 1:
        lines.append("One replica: chance is not measured, and there are no intervals.")
    else:
        lines.append(f"Intervals are 95 % Student intervals over {scenario.replicas} replicas; differences are paired.")
    if scenario.stragglers:
        lines.append(f"{len(scenario.stragglers)} device(s) compute slowly, as the scenario says.")
    return lines + [line[0].upper() + line[1:] for line in remarks(scenario) if line]
