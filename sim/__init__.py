"""gatesim: routing and load balancing in Mixture-of-Experts models, simulated.

import sim
result = sim.run("scenarios/v3.yaml", overrides={"policies.2.select.topk_group": 2})
result.summary(), result.steps, result.layers, result.devices, result.experts
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sim.loading import load
    from sim.results import Result
    from sim.scenario import Scenario
    from sim.study import run
    from sim.sweeping.study import sweep
    from sim.yamlfile import ScenarioError

__version__ = "0.1.0"
__all__ = ["Result", "Scenario", "ScenarioError", "load", "run", "sweep"]

# Loaded on first use, so that `python -m sim.run --help` needs argparse only.
_HOME = {
    "Result": "sim.results",
    "Scenario": "sim.scenario",
    "ScenarioError": "sim.yamlfile",
    "load": "sim.loading",
}


def __getattr__(name: str) -> Any:
    if name in ("run", "sweep", "optimize", "sensitivity"):
        return importlib.import_module(f"sim.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'sim' has no attribute {name!r}")
