"""Which word a token is: ids drawn by Zipf's law, and what the routers read off an id.

First layers route by token identity: two occurrences of one id share .39-.47 of OLMoE's experts in layer 0, random
pairs .16 (routing_statistics.md section 7). Ids are independent of each other; text's own grammar is not modelled, and
every topic uses the same words equally often.
"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from sim.kernels import affinity as kernel
from sim.kernels.elementary import power
from sim.rng import stream
from sim.tokens import F32, F64, I32

_MAX_TABLE = 2**26  # entries: 256 MiB of float32


class Vocabulary(BaseModel):
    """Token ids 0 (the most frequent), 1, ...; id v occurs in proportion to (v + 1 + offset)^-zipf.

    The defaults are OLMoE's vocabulary, the model that ``identity`` is set on, and Zipf's law with Mandelbrot's usual
    offset for English words (frequency proportional to 1 / (rank + 2.7): Mandelbrot 1953; Piantadosi 2014), which makes
    the commonest token 3 % of the text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    size: int = Field(default=50304, gt=0, le=2**20)
    """V. DeepSeek-V2-Lite has 102400, DeepSeek-V3 129280."""
    zipf: float = Field(default=1.0, ge=0, le=4)
    """Exponent; 0 = all ids equally frequent."""
    offset: float = Field(default=2.7, ge=0, le=1e6)
    """Mandelbrot's; flattens the head of the law."""
    identity: float = Field(default=0.9, ge=0, le=1)
    """Share of the token part's variance that is a function of the id; the rest is the context's, drawn per token."""

    def frequency(self) -> F64:
        """Return the probability of each id, [V] float64, decreasing; equal bits on every machine."""
        weight = power(np.arange(1.0, self.size + 1.0) + self.offset, -self.zipf)
        frequency: F64 = weight / np.cumsum(weight)[-1]  # a written order of additions, unlike np.sum
        return frequency

    def check(self, latent_rank: int) -> None:
        """Raise ValueError if the table of `Words` would be too large."""
        if self.size * latent_rank > _MAX_TABLE:
            raise ValueError(
                f"vocabulary.size x latent_rank must be at most {_MAX_TABLE}, found {self.size} x {latent_rank}"
            )


class Words:
    """A vocabulary for one replica: the latent vector of every id, [V, R] float32 of unit variance."""

    def __init__(
        self, vocabulary: Vocabulary, latent_rank: int, tail: tuple[float, float, float, float], seed: int, replica: int
    ) -> None:
        self.vocabulary = vocabulary
        self._edges = np.cumsum(vocabulary.frequency())
        self._edges /= self._edges[-1]
        self._table: F32 = stream(seed, "traffic", "vocabulary", replica).standard_normal(
            (vocabulary.size, latent_rank), dtype=np.float32
        )
        kernel.stretch(self._table, tail, compiled=False)

    def ids(self, n_tokens: int, rng: np.random.Generator) -> I32:
        """Return ``n_tokens`` independent ids, [T] int32."""
        found: I32 = np.searchsorted(self._edges, rng.random(n_tokens), side="right").astype(np.int32)
        return found

    def blend(self, token_ids: I32, context: F32) -> None:
        """Mix the ids' vectors into the white ``context`` [T, R], in place; the variance stays 1."""
        kernel.blend(context, self._table, token_ids, self.vocabulary.identity)


__all__ = ["Vocabulary", "Words"]
