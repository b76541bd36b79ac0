"""Hash routing: a fixed table from token id to experts; nothing is learned, nothing adapts.

Roller et al., "Hash Layers for Large Sparse Models" (arXiv 2106.04426), sections 3.1 (random, balanced by frequency).
DeepSeek-V4 routes its first three MoE layers this way (config: ``num_hash_layers: 3``); the learned scores still weight
the outputs. The load is the token frequencies' skew, which a balanced table evens out as far as single tokens allow.
"""

from __future__ import annotations

import functools
import heapq
from typing import ClassVar, Literal

import numpy as np

from sim.gating.select import Candidates, Select
from sim.gating.select.random import distinct_draws
from sim.rng import stream
from sim.tokens import F64, I16


class Hash(Select):
    """The experts that a table holds for the token's vocabulary index.

    table: ``random``, or ``balanced``: token ids in the order of their frequency, each to the experts least loaded so far.
    table_seed: of the random table. The same table serves all layers.

    Index 0 is half of all tokens, so the balanced table gives it an expert of its own:

    >>> from sim.kernels import plain
    >>> scores, one = np.full((4, 2), 0.5, np.float32), np.ones(2, np.float32)
    >>> given = Candidates(scores, one, 0 * one, 1, plain, np.random.default_rng,
    ...     token_ids=np.arange(4, dtype=np.int32), token_frequency=np.array([0.5, 0.2, 0.2, 0.1]))
    >>> Hash(table="balanced").select(given).ravel().tolist()
    [0, 1, 1, 1]
    """

    kind: Literal["hash"] = "hash"
    needs: ClassVar[Literal["logits", "ids", "token_ids"]] = "token_ids"
    reads: ClassVar[Literal["nothing", "order", "differences", "sizes"]] = "nothing"
    table: Literal["random", "balanced"] = "random"
    table_seed: int = 0

    def select(self, candidates: Candidates) -> I16:
        c = candidates
        if c.token_ids is None or c.token_frequency is None:
            raise ValueError("select hash needs traffic with a vocabulary")
        n_experts = c.scores.shape[1]
        if self.table == "random":
            table = _random_table(len(c.token_frequency), n_experts, c.k, self.table_seed)
        else:
            table = _balanced_table(c.token_frequency.tobytes(), n_experts, c.k)
        ids = table[c.token_ids]
        order = np.argsort(-c.kernels.picked(c.unbiased, ids), axis=1, kind="stable")
        return np.take_along_axis(ids, order, axis=1)


@functools.lru_cache(maxsize=8)
def _random_table(size: int, n_experts: int, k: int, seed: int) -> I16:
    return np.sort(distinct_draws(stream(seed, "hash table"), size, n_experts, k), axis=1)


@functools.lru_cache(maxsize=8)
def _balanced_table(frequency: bytes, n_experts: int, k: int) -> I16:
    weights: F64 = np.frombuffer(frequency, dtype=np.float64)
    table = np.empty((len(weights), k), dtype=np.int16)
    heap = [(0.0, expert) for expert in range(n_experts)]
    for token in np.argsort(-weights, kind="stable").tolist():
        taken = [heapq.heappop(heap) for _ in range(k)]
        table[token] = sorted(expert for _, expert in taken)
        for load, expert in taken:
            heapq.heappush(heap, (load + float(weights[token]), expert))
    return table
