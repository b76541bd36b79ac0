"""Optimisation: the places of a scenario's axes where its figures are best, found with few runs, resumable."""

from __future__ import annotations

from sim.optimizing.front import Front
from sim.optimizing.goals import Goal, Limit

__all__ = ["Front", "Goal", "Limit"]
