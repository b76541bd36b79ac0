"""Timing of one step: a plan of operations in, the moment each one starts and ends out.

``plan`` says what an operation is, ``des`` runs a plan in SimPy (the reference), ``maxplus`` computes the same times
as an array recurrence (for sweeps), ``accounting`` says where each rank's time went and checks the laws of time.
"""

from __future__ import annotations

from sim.engine.accounting import breakdown, violations
from sim.engine.plan import EventOrder, Op, Plan, Timeline

__all__ = ["EventOrder", "Op", "Plan", "Timeline", "breakdown", "violations"]
