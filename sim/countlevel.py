"""Loads without the tokens x experts matrix: a pilot is routed once, its blocks of tokens are drawn again and again.

A pilot's tokens are routed one by one and counted in blocks: per block the tokens per expert, per destination rank and
per node. What a rank sends later is a sum of blocks drawn with replacement (block bootstrap). A block is made of whole
sequences, so tokens within it may be as correlated as they like, and of whole micro-batches where a sequence spans
several. Only integers are added, so every draw keeps the laws of `sim.conservation` exactly and is the same on every
machine. Given the pilot, draws have its mean and, but for a factor (m - 1) / m with m blocks, its covariance.

The pilot's mean is shared by all draws made from it: it errs by sqrt(n / m) times the sampling noise of n drawn ranks,
with m ranks in the pilot, and extremes such as MaxVio are overstated (measured with 32 experts: by 12, 5, 2 and below
1 % at m = 1, 4, 16 and 64 n). A pilot of 256 n passes two-sample tests of 200 draws against 200 routed batches. Where
a controller moves, each step needs a new pilot, which can only be a part of the step's own ranks: the batch is then as
noisy as a smaller one (`noise_of_a_step`), which a balanced gate's MaxVio shows in full. That saves time, not truth.

Rejected: normal draws with the pilot's covariance. Sums over many sequences come out right, but one sequence's counts
are skewed and mixed over topics: for a rank of one 1,024-token sequence and 256 experts, MaxVio 2.41 instead of 2.65,
the least loaded expert at 0.4 tokens instead of 3.2, and 1 % of all loads negative, to be mended by rules of thumb.
Poisson and multinomial draws lack the correlation within sequences altogether (see tests/test_countlevel.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from sim.exchange import is_token_in_rank
from sim.tokens import I16, I32, I64

BLOCKS_PER_PART = 8
"""At most so many blocks make up a rank's micro-batch: more would refine the spread, not the mean, and cost memory."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How one rank's tokens are cut into exchangeable blocks.

    cell: tokens that are counted together, a micro-batch or an equal part of one. parts: micro-batches that a block
    spans. per_part: cells that make up a micro-batch, 1 if a block spans several.
    """

    cell: int
    parts: int
    per_part: int

    @classmethod
    def of(cls, sequence: I32 | None, n_tokens: int, micro_batches: int) -> Self:
        """Return the finest cut at ends of sequences that repeats through the rank.

        sequence: [T] int32 as in `Tokens`; None: all of one sequence.

        Two micro-batches of 4 tokens, and sequences of 2, 8 or 3:

        >>> [(c.cell, c.parts, c.per_part) for c in (Cut.of(np.arange(8) // n, 8, 2) for n in (2, 8, 3))]
        [(2, 1, 2), (4, 2, 1), (4, 2, 1)]
        """
        size = n_tokens // micro_batches
        starts = np.flatnonzero(np.diff(sequence)) + 1 if sequence is not None else np.zeros(0, np.int64)
        lengths = np.diff(np.r_[0, starts, n_tokens])
        length = int(lengths[0]) if (lengths == lengths[0]).all() else n_tokens
        if size % length == 0:
            sequences = size // length
            per_part = max(n for n in range(1, BLOCKS_PER_PART + 1) if sequences % n == 0)
            return cls(size // per_part, 1, per_part)
        return cls(size, length // size if length % size == 0 else micro_batches, 1)


def block_counts(topk_ids: I16, cut: Cut, expert_rank: I32, n_ranks: int, ranks_per_node: int, n_experts: int) -> I32:
    """Count one rank's [T, k] kept ids, [blocks, parts, E + P + N] int32: tokens per expert, rank and node.

    A token with several experts on a rank or node counts once there, as in DeepEP's layout (`sim.exchange`).
    """
    cells = len(topk_ids) // cut.cell
    cell = np.arange(len(topk_ids)) // cut.cell
    where = cell[:, None] * (n_experts + 1) + topk_ids + 1  # ids of -1 count in a column of their own
    experts = np.bincount(where.ravel(), minlength=cells * (n_experts + 1)).reshape(cells, n_experts + 1)[:, 1:]
    hit = is_token_in_rank(topk_ids, expert_rank, n_ranks)
    node = np.logical_or.reduceat(hit, np.arange(0, n_ranks, ranks_per_node), axis=1)
    ranks, nodes = (h.reshape(cells, cut.cell, -1).sum(axis=1, dtype=np.int64) for h in (hit, node))
    return (
        np.concatenate([experts, ranks, nodes], axis=1)
        .astype(np.int32)
        .reshape(-1, cut.parts, n_experts + ranks.shape[1] + nodes.shape[1])
    )


def joined(found: list[tuple[Cut, I32]], micro_batches: int) -> tuple[Cut, I32]:
    """Return the cut and blocks [m, parts, D] of all ranks; whole ranks where their sequences ask for other cuts."""
    cuts = {cut for cut, _ in found}
    if len(cuts) == 1:
        return cuts.pop(), np.concatenate([blocks for _, blocks in found])
    # Cells come in the order of the tokens, so a micro-batch is a run of them.
    whole = [blocks.reshape(micro_batches, cut.per_part, -1).sum(axis=1, dtype=np.int32) for cut, blocks in found]
    cell = max(cut.cell * cut.per_part for cut in cuts)
    return Cut(cell, micro_batches, 1), np.array(whole)


def noise_of_a_step(n_ranks: int, pilot_ranks: int) -> float:
    """Return the sampling noise of a step with ``pilot_ranks`` of its ranks routed and the others drawn from them, over
    that of routing all.

    Ranks weigh 1 + Multinomial(n - p, 1/p), so the variance is n/p + (1 - p/n) (1 - 1/p) times the usual one.

    >>> [round(noise_of_a_step(64, p), 2) for p in (64, 32, 8)]
    [1.0, 1.58, 2.96]
    """
    n, p = n_ranks, pilot_ranks
    return float((n / p + (1 - p / n) * (1 - 1 / p)) ** 0.5)


def draw(blocks: I32, cut: Cut, rng: np.random.Generator, n_ranks: int, micro_batches: int) -> I64:
    """Return [M, n_ranks, D] counts of as many ranks: sums of ``blocks`` [m, parts, D] drawn with replacement.

    The same generator, number of blocks and cut draw the same blocks, so policies and layers meet the same tokens.

    >>> blocks = np.array([[[1, 2]], [[3, 0]]], np.int32)
    >>> draw(blocks, Cut(1, 1, 2), np.random.default_rng(0), 2, 1).tolist()
    [[[6, 0], [4, 2]]]
    """
    picks: npt.NDArray[np.int64] = rng.integers(len(blocks), size=(cut.per_part, n_ranks, micro_batches // cut.parts))
    total = np.zeros((n_ranks, micro_batches // cut.parts, *blocks.shape[1:]), dtype=np.int64)
    for chosen in picks:
        total += blocks[chosen]
    return total.reshape(n_ranks, micro_batches, -1).swapaxes(0, 1)
