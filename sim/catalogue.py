"""Every plug-in by family, and the JSON Schema of scenario files; both made from the registration rule."""

from __future__ import annotations

import inspect
import re
from typing import Any

from sim.cluster import Topology
from sim.cost import CommunicationCost, ComputeCost
from sim.designs import Design
from sim.gating.balance import Balance
from sim.gating.capacity import Capacity
from sim.gating.score import Score
from sim.gating.select import Select
from sim.pipeline import Pipeline
from sim.placement import Placement
from sim.plugin import Plugin, members
from sim.replicas import ReplicaChoice
from sim.requests import RequestSource
from sim.traffic import Traffic

FAMILIES: dict[str, type[Plugin]] = {
    "policies[].score": Score,
    "policies[].select": Select,
    "policies[].balance": Balance,
    "policies[].capacity": Capacity,
    "policies[].placement": Placement,
    "policies[].replicas": ReplicaChoice,
    "traffic": Traffic,
    "serving.requests": RequestSource,
    "schedule.pipeline": Pipeline,
    "cluster.topology": Topology,
    "cost.compute": ComputeCost,
    "cost.communication": CommunicationCost,
    "sweep.design": Design,
}


def listing() -> str:
    """Return all kinds, one line each: where it goes in a scenario, its name and its first sentence."""
    rows = [
        (where, kind, _first_sentence(inspect.getdoc(cls) or ""))
        for where, base in FAMILIES.items()
        for kind, cls in members(base).items()
    ]
    return "\n".join(f"{where:<22} {kind:<18} {text}" for where, kind, text in rows)


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph)[0]


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a resolved scenario; before resolution, ``extends`` may stand in any mapping."""
    from sim.scenario import Scenario

    return Scenario.model_json_schema()
