"""A random permutation per layer: what placement is worth is measured against this."""

from __future__ import annotations

from typing import Literal

import numpy as np

from sim.placement import Placement
from sim.tokens import I32


class RandomPlacement(Placement):
    """Every assignment with equally many experts per rank is equally likely."""

    kind: Literal["random"] = "random"

    def place(self, n_routed_experts: int, ep_size: int, rng: np.random.Generator) -> I32:
        return rng.permutation(n_routed_experts).astype(np.int32)
