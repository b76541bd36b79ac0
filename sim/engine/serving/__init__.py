"""Serving: requests through units of devices that batch them continuously; see `world` for the whole."""

from __future__ import annotations

from sim.engine.serving.fleet import Sizes
from sim.engine.serving.policy import Move, Repair, ServingPolicy, State
from sim.engine.serving.world import Finished, World

__all__ = ["Finished", "Move", "Repair", "ServingPolicy", "Sizes", "State", "World"]
