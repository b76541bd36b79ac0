"""What the serving loop asks of the policy under test. It knows no experts: maps pass through it unread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sim.engine.iteration import IterationTimes
from sim.settings import Rebalance
from sim.tokens import F64, I32


@dataclass(frozen=True, slots=True)
class State:
    """What is wrong in a group: (rank, factor) of slow devices and of slow links, and dead ranks; ranks ascending."""

    slow_devices: tuple[tuple[int, float], ...] = ()
    slow_links: tuple[tuple[int, float], ...] = ()
    dead: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Move:
    """What a new map moves in one group: slots and bytes over all layers, and the time of each chunk, in turn."""

    slots: int
    moved_bytes: float
    chunks_ps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Repair:
    """A map without dead ranks, the share of (layer, expert) that had a live copy, and number and bytes over all layers
    of the experts that ranks have to load for it."""

    maps: I32 | None
    alive_share: float = 1.0
    loaded: int = 0
    loaded_bytes: float = 0.0


class ServingPolicy(Protocol):
    """One policy on the units of a scenario; ``unit`` is a unit's number. Maps are None where there are no experts."""

    @property
    def rebalance(self) -> Rebalance:
        """When experts move."""

    def first(self, unit: int) -> I32 | None:
        """Return the maps before any request."""

    def times(self, unit: int, maps: I32 | None, state: State) -> IterationTimes:
        """Return the clock of a group in ``state``."""

    def plan(self, unit: int, topic_tokens: F64, ages_s: F64, maps: I32) -> I32 | None:
        """Return new maps from the tokens by topic [W, topics] of windows that ended ``ages_s`` [W] ago, oldest first, or
        None to keep ``maps``."""

    def move(self, unit: int, before: I32, after: I32) -> Move:
        """Return what going from one map to the other moves."""

    def repair(self, unit: int, maps: I32 | None, dead: tuple[int, ...], held: I32 | None) -> Repair:
        """Return ``maps`` without the devices ``dead``, of which some are alive, and what ranks load that have ``held``."""
