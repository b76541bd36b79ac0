"""How layers differ: the generator's parameters by depth (`LayerProfile`), and those of one layer (`LayerValues`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Self

from pydantic import BaseModel, ConfigDict, model_validator

_FACTORS = ("logit_scale", "temporal", "topic")  # of a profile; its other values replace
MOST_SPREAD = 8.0
_MOST = 1024.0  # bound of a profile's replaced values


class LayerProfile(BaseModel):
    """How layers differ with depth: factors at knots, linear between them; depth 0 = first MoE layer, 1 = last.

    The defaults follow DeepSeek-R1's router entropy by layer for ``logit_scale`` (routing_statistics.md section 7:
    Gaussian-equivalent standard deviation 0.4 first, 1.1 middle, 1.55 last; R1's single sharp dips are left out), and
    DeepSeek-V2-Lite for ``temporal`` (latent lag-1 correlation .10 in the first layer, .42-.50 from a sixth to the
    middle of the depth, .36 at four fifths: sections 4, 8) and ``topic`` (spread of popularity on ESFT law by layer).
    A model with one MoE layer sits at depth 0.5. Known departure: DeepSeek-V3's own load skew on GPQA does not rise
    with depth (share of the 32 hottest experts .34-.50 in layers 3-9, .31 on average), V2-Lite's and OLMoE's do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    depth: tuple[float, ...] = (0.0, 0.12, 0.35, 0.8, 1.0)
    """Knots, from 0 to 1."""
    logit_scale: tuple[float, ...] = (0.37, 0.7, 1.0, 1.1, 1.4)
    """Multiplies ``logit_scale``."""
    temporal: tuple[float, ...] = (0.2, 0.7, 1.0, 0.8, 0.75)
    """Share of the sequence, slow and fast variances that stays; the rest moves to the token part (0..1)."""
    topic: tuple[float, ...] = (0.4, 0.6, 1.0, 1.0, 1.0)
    """Multiplies every topic's ``popularity_sd``."""
    # What follows replaces the traffic's own value of the same name, where given (`sim.fit` writes it).
    popularity_sd: tuple[float, ...] | None = None
    """Instead of the traffic's own, at every knot."""
    latent_rank: tuple[float, ...] | None = None
    """Factors at work in a layer, at most the traffic's ``latent_rank``; 4.3 = four and a third one at weight 0.3."""
    sequence_variance: tuple[float, ...] | None = None
    """Instead of the traffic's own, at every knot."""
    slow_variance: tuple[float, ...] | None = None
    """Instead of the traffic's own, at every knot."""
    fast_variance: tuple[float, ...] | None = None
    """Instead of the traffic's own, at every knot."""
    token_variance: tuple[float, ...] | None = None
    """Instead of the traffic's own, at every knot."""
    basis_tail: tuple[float, ...] | None = None
    """Instead of the traffic's own, at every knot."""
    iid_variance: tuple[float, ...] | None = None
    """Instead of the traffic's own, at every knot."""
    memory_spread: tuple[float, ...] | None = None
    """Instead of the traffic's own, at every knot."""
    scale_spread: tuple[float, ...] | None = None
    """Instead of the traffic's own, at every knot."""

    @model_validator(mode="after")
    def _knots(self) -> Self:
        if len(self.depth) < 2 or self.depth[0] != 0 or self.depth[-1] != 1:
            raise ValueError("depth must run from 0 to 1")
        if any(b <= a for a, b in zip(self.depth, self.depth[1:], strict=False)):
            raise ValueError("depth must increase")
        for name in type(self).model_fields:
            values = getattr(self, name)
            if name == "depth" or values is None:
                continue
            if len(values) != len(self.depth):
                raise ValueError(f"{name} needs one value per depth ({len(self.depth)}, found {len(values)})")
            if min(values) < 0 or (name == "temporal" and max(values) > 1):
                raise ValueError(f"{name} must be {'between 0 and 1' if name == 'temporal' else 'at least 0'}")
            most = {"memory_spread": MOST_SPREAD, "scale_spread": 1.0}.get(name, _MOST)
            if name not in _FACTORS and max(values) > most:
                raise ValueError(f"{name} must be at most {most:g}")
        return self

    def at(self, layer: int, n_layers: int) -> tuple[float, float, float]:
        """Return (logit_scale, temporal, topic) factors of MoE layer ``layer`` of ``n_layers``."""
        factors = self._mixed(layer, n_layers, _FACTORS)
        return factors["logit_scale"], factors["temporal"], factors["topic"]

    def replaced(self, layer: int, n_layers: int) -> dict[str, float]:
        """Return the values that MoE layer ``layer`` of ``n_layers`` has instead of the traffic's own, by name."""
        own = [name for name in type(self).model_fields if name not in ("depth", *_FACTORS)]
        return self._mixed(layer, n_layers, [name for name in own if getattr(self, name) is not None])

    def _mixed(self, layer: int, n_layers: int, names: Iterable[str]) -> dict[str, float]:
        depth = layer / (n_layers - 1) if n_layers > 1 else 0.5
        upper = next(i for i in range(1, len(self.depth)) if depth <= self.depth[i])
        left, right = self.depth[upper - 1], self.depth[upper]
        share = (depth - left) / (right - left)

        def mix(values: tuple[float, ...]) -> float:
            return values[upper - 1] * (1 - share) + values[upper] * share

        return {name: mix(getattr(self, name)) for name in names}


class LayerValues(NamedTuple):
    """The generator's parameters in one layer, after the profile."""

    logit_scale: float
    popularity: tuple[float, ...] | None
    popularity_sd: float
    topic_factor: float
    latent_rank: float
    sequence_variance: float
    slow_variance: float
    fast_variance: float
    token_variance: float
    iid_variance: float
    basis_tail: float
    memory_spread: float = 0.0
    scale_spread: float = 0.0
