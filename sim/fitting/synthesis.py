"""The affinity generator's own trace of given sequences: the same latents, tables and kernels as in a run.

Latents are drawn once per seed and serve any parameters of a layer (common random numbers), which is what makes fitting
by simulation cheap. A sequence is drawn as if a rank of its own had brought it, so that each has its recorded length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sim.kernels import affinity as kernel
from sim.kernels.choose import choose
from sim.tokens import F32, F64, I16, I32, I64
from sim.traffic import TrafficShape
from sim.traffic.affinity import NOISE_BITS, Affinity, AffinityBatch, AffinitySource, rescale
from sim.traffic.layers import LayerValues

# Loads and choices of a fit are asked for hundreds of times: always worth compiling.
_KERNELS = choose(1 << 40)


@dataclass(frozen=True, slots=True)
class Draw:
    """One seed's latents for all tokens of a trace."""

    source: AffinitySource
    topic: I32
    latents: F32
    noise_keys: npt.NDArray[np.uint32]
    sureness: F64

    def logits(self, layer: int, values: LayerValues) -> F32:
        """Return float32 logits [N, E] of MoE layer ``layer`` if it had ``values``."""
        tables = self.source.draw_layer(layer, values)
        logits = kernel.combine(
            tables.base,
            self.topic,
            self.source.noise,
            kernel.windows_of(self.noise_keys, tables.noise_key, NOISE_BITS),
            tables.noise_gain,
            self.latents,
            tables.gains,
            tables.basis,
            compiled=True,
        )
        if tables.scale_spread:
            rescale(logits, self.sureness, tables.scale_spread, self.source.config.logit_mean)
        return logits


def draw(config: Affinity, shape: TrafficShape, seqlens: I64, seed: int, topics: Sequence[int] | None = None) -> Draw:
    """Return the latents of sequences of ``seqlens`` tokens; ``topics`` [S] fixes each sequence's topic.

    Without ``topics`` the generator draws them. Sequences longer than ``config.sequence_length`` restart, as in a run.
    """
    source = AffinitySource(config, shape, seed, 0)
    drawn = [
        AffinityBatch(source, "train", 0, len(seqlens), int(n), compiled=True).drawn(rank)
        for rank, n in enumerate(seqlens)
        if n > 0
    ]
    topic = np.concatenate([part.topic for part in drawn])
    if topics is not None:
        topic = np.repeat(np.asarray(topics, dtype=np.int32), seqlens)
    return Draw(
        source=source,
        topic=topic,
        latents=np.concatenate([part.latents for part in drawn]),
        noise_keys=np.concatenate([part.noise_keys for part in drawn]),
        sureness=np.concatenate([np.zeros(0), *(part.sureness for part in drawn if part.sureness is not None)]),
    )


def route(logits: F32, k: int) -> I16:
    """Return the ids [N, k] of the k largest logits, best first, ties to the lower index."""
    n_experts = logits.shape[1]
    one, zero = np.ones(n_experts, dtype=np.float32), np.zeros(n_experts, dtype=np.float32)
    return _KERNELS.topk(logits, one, zero, k)


def gate_weights(logits: F32, topk_ids: I16, renormalised: bool) -> F32:
    """Return softmax gate weights [N, k] of the chosen experts, divided by their sum if ``renormalised``."""
    weights = _KERNELS.picked(_KERNELS.softmax(logits), topk_ids)
    return weights / weights.sum(axis=1, keepdims=True) if renormalised else weights
