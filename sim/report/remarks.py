"""What a reader has to know beside the figures, each thing once."""

from __future__ import annotations

import textwrap

from sim.countlevel import noise_of_a_step
from sim.scenario import Scenario


def _count_level(scenario: Scenario) -> list[str]:
    """Which ranks were routed and which drawn, and the error that the pilot leaves."""
    ranks, pilot = scenario.parallel.ep_size, scenario.steps.pilot_ranks
    gates = [policy for policy in scenario.policies if scenario.model_of(policy).is_moe]
    moving = [policy.name for policy in gates if not scenario.pilots_once(policy)]
    lines = []
    if len(moving) < len(gates):
        lines.append(
            f"count level: all ranks of all steps are drawn from blocks of a pilot of {pilot} ranks, whose means err by "
            f"{(ranks / pilot) ** 0.5:.2f} times the sampling noise of one step; that overstates MaxVio"
        )
    if moving and pilot < ranks:
        lines.append(
            f"{', '.join(moving)}: of each step's {ranks} ranks {pilot} are routed token by token, the others drawn from "
            f"them; that makes a batch's sampling noise {noise_of_a_step(ranks, pilot):.2f} times too large"
        )
    return lines


def _without_effect(scenario: Scenario) -> list[str]:
    """Balancing that a reader would take to be at work and that is not."""
    moe = [policy for policy in scenario.policies if policy.learns and scenario.model_of(policy).is_moe]
    deaf = [policy.name for policy in moe if policy.select.reads == "nothing"]
    early = [policy.name for policy in moe if policy.name not in deaf]
    lines = [f"{', '.join(deaf)}: the selection looks at no scores, so balancing has no effect"] if deaf else []
    if early and scenario.steps.count == 1 and not scenario.steps.warmup.steps:
        lines.append(
            f"{', '.join(early)}: balancing has not moved yet: it learns from a step after it; set steps.warmup or steps.count"
        )
    return lines


def remarks_on(scenario: Scenario) -> list[str]:
    """Return `remarks` as lines for a terminal."""
    return [part for line in remarks(scenario) for part in textwrap.wrap(line, 120, subsequent_indent="  ")]


def remarks(scenario: Scenario) -> list[str]:
    """What the pieces of the gates, the assumed dynamics and the traffic want the reader to know, each thing once."""
    notes: dict[str, list[str]] = {}
    for policy in scenario.policies:
        model = scenario.model_of(policy)
        if model.is_moe:
            for _, piece in policy.pieces():
                notes.setdefault(piece.note(model), []).append(policy.name)
    lines = [f"{', '.join(dict.fromkeys(names))}: {note}" for note, names in notes.items() if note]
    lines += _without_effect(scenario)
    lines += [f"all policies: {rule.note(scenario.model)}" for rule in scenario.router_dynamics]
    if scenario.pipelined and scenario.cluster.device.price_per_hour is None:
        lines.append(f"no USD: cluster {scenario.cluster.name} states no device.price_per_hour")
    lines += [f"traffic: {caveat}" for caveat in scenario.traffic.caveats]
    if scenario.serving is not None:
        lines += [f"requests: {caveat}" for caveat in scenario.serving.requests.caveats]
    if scenario.steps.resolution == "count":
        lines += _count_level(scenario)
    return lines
