"""What a run's policies compete in, and which of them compete. One answer for the report and for the sensitivity."""

from __future__ import annotations

from sim.scenario import Scenario


def leading_metric(scenario: Scenario) -> str:
    """Return the name of the metric (of `sim.results.metrics_of`) that decides which policy is best."""
    return leading_metrics(scenario)[0]


def leading_metrics(scenario: Scenario) -> tuple[str, ...]:
    """Return what decides, first choice first; the next counts where no policy has a value of the one before."""
    serving = scenario.serving
    if serving is None:
        if not len(scenario.timed_steps()):
            return ("max_vio_batch",)
        if any(policy.parallel for policy in scenario.policies):  # steps of unlike groups hold unlike numbers of tokens
            return ("tokens_per_s_per_gpu", "max_vio_batch")
        moving = any(policy.rebalance.interval_steps is not None for policy in scenario.policies)
        return (*(["step_and_moves_s"] if moving else []), "step_time_s", "max_vio_batch")
    decodes = any(unit.role != "prefill" for unit in serving.units)
    if serving.requests.kind == "saturated":  # as much as there is room for: what matters is how much gets through
        return ("output_tokens_per_s_per_gpu" if decodes else "input_tokens_per_s_per_gpu",)
    asked = any(limit is not None for limit in (serving.slo.ttft_s, serving.slo.tpot_s, serving.slo.e2e_s))
    users = ("tpot_mean_s", "ttft_mean_s") if decodes else ("ttft_mean_s",)
    return (*(["goodput_share"] if asked else []), *users, "input_tokens_per_s_per_gpu")


def yardsticks(scenario: Scenario) -> frozenset[str]:
    """Return the names of the policies that nobody would deploy and that others are measured against: gates that spread
    tokens at random or evenly. Gates by token number (hash) and recorded choices are candidates."""
    blind = ("random", "balanced")
    return frozenset(p.name for p in scenario.policies if scenario.model_of(p).is_moe and p.select.kind in blind)
