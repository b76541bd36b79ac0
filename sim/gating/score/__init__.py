"""From router logits to affinities. One file per score function."""

from __future__ import annotations

from abc import abstractmethod

from sim.gating.piece import Piece
from sim.kernels.choose import Kernels
from sim.tokens import F32, F64


class Score(Piece):
    """A score function. What normalisation and scale do to the weights is the model's or the policy's business."""

    @abstractmethod
    def scores(self, logits: F32, kernels: Kernels) -> F32:
        """Return affinities, [T, E] float32 and non-negative, of router logits [T, E] float32."""

    @abstractmethod
    def slope(self, scores: F64) -> F64:
        """Return ds/dz, [T, E], of affinities s before any normalisation over experts.

        With P_j = s_j / sum(s) the gradient of sum_i f_i P_i is slope_j / sum(s) (f_j - sum_i f_i P_i); softmax is the
        case s = exp(z), whose slope is s itself.
        """
