"""Sweeps: many points of one scenario, checked before the first runs, resumable, in one data set."""

from __future__ import annotations

from sim.sweeping.evaluate import evaluate
from sim.sweeping.sweep import Sweep, read

__all__ = ["Sweep", "evaluate", "read"]
