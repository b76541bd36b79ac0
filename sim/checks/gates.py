"""Rules between a policy's gate, its model and the traffic."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ValidationError

from sim.checks.rule import Path, Rule
from sim.scenario import Scenario, with_k
from sim.settings import Policy


def problems(scenario: Scenario, i: int, policy: Policy) -> Iterator[Rule]:
    at: Path = ("policies", i)
    base, k = policy.model or scenario.model, policy.num_experts_per_tok
    if k is not None and base.is_moe:
        try:
            with_k(base, k)
        except ValidationError as error:
            found = error.errors()[0]
            yield (*at, "num_experts_per_tok"), f"{'.'.join(map(str, found['loc']))} {found['msg']}"
    model = scenario.model_of(policy)
    if model.is_moe:
        for j, own in enumerate(policy.balance):
            others = [other.kind for other in policy.balance if other is not own and other.kind in ("bias", own.kind)]
            if own.ranks_alone and others:
                yield (*at, "balance", j), f"{own.kind} ranks by its own thresholds alone: not beside {others[0]}"
        for path, piece in policy.pieces():
            for field, rule in piece.for_model(model).problems(model):
                yield (*at, *path, field), rule
        has, wants = scenario.traffic.provides, policy.select.needs
        if wants == "token_ids" and scenario.traffic.token_frequency is None:
            yield (
                (*at, "select"),
                f"select {policy.select.kind} routes by vocabulary index; traffic {scenario.traffic.kind} has no vocabulary",
            )
        elif wants != has and not (wants == "token_ids" and has == "logits"):
            yield (
                (*at, "select"),
                f"select {policy.select.kind} needs {wants}, traffic {scenario.traffic.kind} provides {has}"
                + (
                    ": with recorded ids no other gate can be judged, only placements (use select: recorded)"
                    if has == "ids"
                    else ""
                ),
            )
        if has == "ids" and policy.learns:
            yield (*at, "balance"), "recorded choices cannot be balanced after the fact; only placements can differ"
    elif policy.select.kind != "dense":
        yield (*at, "select"), "a model without routed experts takes select: dense"
