"""What the four families of a gate share: scores, selections, balancing rules and capacities are fitted to a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from sim.model import Model
from sim.plugin import Plugin
from sim.tokens import F64


class Piece(Plugin):
    """A part of a gate."""

    def for_model(self, model: Model) -> Self:
        """Return a copy whose unset fields hold the model's own values."""
        return self

    def problems(self, model: Model) -> list[tuple[str, str]]:
        """Return ``(field, rule)`` for each setting (of `for_model`'s copy) that ``model`` cannot serve."""
        return []

    def note(self, model: Model) -> str:
        """Return one sentence that a reader of the results must know, or nothing: causality, calibration, assumption."""
        return ""


@dataclass(frozen=True, slots=True)
class GateShape:
    """What a gate has to know of its model and of the traffic's topics.

    n_group, topk_group: the model's groups of experts (V2: devices, V3: nodes). modalities: one name per topic of the
    traffic. token_frequency: [V] relative frequency of each vocabulary index, or None.
    """

    n_routed_experts: int
    num_experts_per_tok: int
    n_group: int = 1
    topk_group: int = 1
    modalities: tuple[str, ...] = ("text",)
    token_frequency: F64 | None = None

    @property
    def n_topics(self) -> int:
        return len(self.modalities)

    @property
    def modality_of_topic(self) -> list[int]:
        """Index of each topic's modality among the distinct ones, in order of appearance."""
        names = list(dict.fromkeys(self.modalities))
        return [names.index(name) for name in self.modalities]
