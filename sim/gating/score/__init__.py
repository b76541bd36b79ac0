"""From router logits to affinities. One file per score function."""

from __future__ import annotations

from abc import abstractmethod

from sim.kernels.choose import Kernels
from sim.plugin import Plugin
from sim.tokens import F32


class Score(Plugin):
    """A score function. What normalisation and scale do to the weights is the model's or the policy's business."""

    @abstractmethod
    def scores(self, logits: F32, kernels: Kernels) -> F32:
        """Return affinities, [T, E] float32 and non-negative, of router logits [T, E] float32."""
