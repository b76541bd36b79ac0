"""How many tokens an expert or device accepts, and which ones are dropped when there are more."""

from __future__ import annotations

from abc import abstractmethod

from sim.plugin import Plugin
from sim.tokens import F32, I16


class Capacity(Plugin):
    """A capacity rule, applied to the tokens of one source rank after selection."""

    @abstractmethod
    def keep(self, topk_ids: I16, affinity: F32, n_routed_experts: int) -> I16:
        """Return ``topk_ids`` [T, k] with -1 in place of dropped choices; affinity [T, k] holds their scores."""
