"""Where tokens and their affinities come from. Knows nothing about gates, placements, devices or time.

A traffic is a config (`Traffic`); started for a model it is a `Source`; one step of it is a `Batch`, from which the
tokens of each (layer, rank) are taken in any order. Everything is a pure function of (seed, replica, phase, step), so
every policy sees the same tokens (common random numbers).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from sim.plugin import Plugin
from sim.tokens import F64, Tokens


@dataclass(frozen=True, slots=True)
class TrafficShape:
    """What traffic has to know about the model and the expert-parallel (EP) group."""

    n_moe_layers: int
    n_routed_experts: int
    num_experts_per_tok: int
    ep_size: int


class Batch(ABC):
    """The tokens of one step on all ranks of an EP group."""

    @abstractmethod
    def tokens(self, layer: int, rank: int) -> Tokens:
        """Return what ``rank`` brings to MoE layer ``layer`` (0-based, dense layers not counted).

        Pure, in any order; logits are float32 [tokens_per_rank, n_routed_experts]. Raises ValueError outside the
        model's layers or the batch's ranks.
        """


class Source(ABC):
    """A traffic started for one model, seed and replica."""

    @abstractmethod
    def batch(self, phase: str, step: int, *, n_ranks: int, tokens_per_rank: int) -> Batch:
        """Return step ``step`` (from 0) of ``phase`` (``"train"``, or one before it: ``"warmup"``,
        ``"history"``).

        A pure function of (seed, replica) and the arguments: the same arguments give the same tokens, whatever was
        asked before. Raises ValueError if the source has no such step (a recorded trace that is too short).
        """


class Traffic(Plugin):
    """A source of tokens. Members implement `start`."""

    tokens_per_rank: int = Field(default=4096, gt=0)
    """Tokens that each EP rank brings to each MoE layer in each step."""

    @property
    @abstractmethod
    def provides(self) -> Literal["logits", "ids"]:
        """``"logits"``: router logits, any gate can choose; ``"ids"``: recorded choices only, gates cannot be compared
        counterfactually, placements and capacities can."""

    @property
    @abstractmethod
    def topics(self) -> tuple[str, ...]:
        """Names that ``Tokens.topic`` indexes."""

    @property
    def topic_weights(self) -> F64:
        """[topics] share of each topic in the tokens, before anything shifts it; equal ones where none are stated."""
        n = max(1, len(self.topics))
        return np.full(n, 1.0 / n)

    @property
    def caveats(self) -> tuple[str, ...]:
        """Sentences that a report must print beside results made with this traffic."""
        return ()

    @property
    def longest_sequence(self) -> int | None:
        """Tokens of the longest sequence, where that is known before the traffic starts."""
        return None

    def fingerprint(self) -> str:
        """Return the SHA-256 of the recorded data behind the traffic, or nothing: part of a run's identity."""
        return ""

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modality of each topic, in the order of ``topics``."""
        return ("text",) * len(self.topics)

    @property
    def stationary(self) -> bool:
        """Whether all train steps draw from one distribution, so that a count-level pilot of one serves the others."""
        return False

    @property
    def token_frequency(self) -> F64 | None:
        """[V] relative frequency of each vocabulary index, or None if tokens carry no ``token_ids``."""
        return None

    @abstractmethod
    def start(self, shape: TrafficShape, seed: int, replica: int) -> Source:
        """Return the source for a model of ``shape``; raises ValueError, with one line why, if it cannot serve it."""


__all__ = ["Batch", "Source", "Traffic", "TrafficShape"]
