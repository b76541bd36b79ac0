"""Who sends what to whom: routing x placement -> token counts, in DeepEP's terms. Pure counting, no seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sim.kernels.choose import Kernels
from sim.tokens import I16, I32, I64, Bool

Dtype = Literal["fp8", "bf16"]


@dataclass(frozen=True, slots=True)
class Layout:
    """DeepEP's dispatch layout of one source rank's tokens (``get_dispatch_layout``); all counts int64.

    num_tokens_per_rank: [P] tokens with at least one expert on the rank. num_tokens_per_rdma_rank: [N] the same per
    node. num_tokens_per_expert: [E]. copies: [2] sums of the first two, counted another way (see `Exchange.copies`).
    """

    num_tokens_per_rank: I64
    num_tokens_per_rdma_rank: I64
    num_tokens_per_expert: I64
    copies: I64


def dispatch_layout(
    topk_ids: I16, expert_rank: I32, ep_size: int, ranks_per_node: int, n_routed_experts: int, kernels: Kernels
) -> Layout:
    """Count the destinations of [T, k] int16 ids under ``expert_rank`` [E] int32; -1 goes nowhere."""
    expert_node, nodes = (expert_rank // ranks_per_node).astype(np.int32), -(-ep_size // ranks_per_node)
    return Layout(
        kernels.group_tokens(topk_ids, expert_rank, ep_size),
        kernels.group_tokens(topk_ids, expert_node, nodes),
        kernels.expert_tokens(topk_ids, n_routed_experts),
        np.array(
            [
                kernels.distinct_groups(topk_ids, expert_rank, ep_size),
                kernels.distinct_groups(topk_ids, expert_node, nodes),
            ],
            dtype=np.int64,
        ),
    )


def is_token_in_rank(topk_ids: I16, expert_rank: I32, ep_size: int) -> Bool:
    """Return DeepEP's ``is_token_in_rank``, [T, P] bool: whether a token has an expert on a rank."""
    hit = np.zeros((len(topk_ids), ep_size + 1), dtype=bool)
    np.put_along_axis(hit, np.append(expert_rank, ep_size)[topk_ids].astype(np.int64), True, axis=1)
    return hit[:, :ep_size]


@dataclass(frozen=True, slots=True)
class Exchange:
    """The tokens of one MoE layer and micro-batch, for a whole EP group (P ranks, N nodes, E experts); int64.

    `stack` puts many of them behind one another; arrays then have a leading axis.

    rank_tokens: [P, P], row s: ``num_tokens_per_rank`` of source s. node_tokens: [P, N]. expert_tokens: [P, E].
    expert_rank: [E] int32. copies: [P, 2], the row sums of rank_tokens and node_tokens counted by another algorithm, so
    that `sim.conservation` can tell a lost copy; None if unknown. computed_tokens: [P, E] rows that the experts compute,
    padding included; None: the expert_tokens.
    """

    rank_tokens: I64
    node_tokens: I64
    expert_tokens: I64
    expert_rank: I32
    copies: I64 | None = None
    computed_tokens: I64 | None = None

    @property
    def pairs(self) -> I64:
        """[P, P] (token, expert) pairs from source s to rank d: what low-latency mode sends."""
        n_ranks = self.rank_tokens.shape[-1]
        order = np.argsort(self.expert_rank, kind="stable")
        starts = np.searchsorted(self.expert_rank[order], np.arange(n_ranks))
        return np.add.reduceat(self.expert_tokens[..., order], starts, axis=-1)

    @property
    def rows(self) -> I64:
        """[E] rows that the experts compute, padding included."""
        computed = self.expert_tokens if self.computed_tokens is None else self.computed_tokens
        total: I64 = computed.sum(axis=-2)
        return total

    @classmethod
    def stack(cls, exchanges: Sequence[Exchange]) -> Exchange:
        """Put the exchanges of one layer, alike in their placement, behind one another."""
        return cls(
            np.stack([e.rank_tokens for e in exchanges]),
            np.stack([e.node_tokens for e in exchanges]),
            np.stack([e.expert_tokens for e in exchanges]),
            exchanges[0].expert_rank,
            computed_tokens=None
            if exchanges[0].computed_tokens is None
            else np.stack([e.computed_tokens for e in exchanges if e.computed_tokens is not None]),
        )

    @classmethod
    def sum(cls, exchanges: Sequence[Exchange]) -> Exchange:
        """Add up the exchanges of one layer, alike in their placement: what a step moved in all."""
        return cls(
            sum(e.rank_tokens for e in exchanges),  # type: ignore[arg-type]
            sum(e.node_tokens for e in exchanges),  # type: ignore[arg-type]
            sum(e.expert_tokens for e in exchanges),  # type: ignore[arg-type]
            exchanges[0].expert_rank,
        )

    def sent(self, mode: Literal["normal", "low_latency"]) -> I64:
        """[P, P] copies that leave s for d: one per token in ``normal`` mode, one per expert in ``low_latency``."""
        return self.rank_tokens if mode == "normal" else self.pairs

    def inter_node_copies(self, ranks_per_node: int, mode: Literal["normal", "low_latency"]) -> int:
        """Copies that cross between nodes in one dispatch: one per (token, remote node), or per expert there."""
        node = np.arange(len(self.rank_tokens)) // ranks_per_node
        if mode == "normal":
            remote = node[:, None] != np.arange(self.node_tokens.shape[1])
            return int(self.node_tokens[remote].sum())
        return int(self.pairs[node[:, None] != node[None, :]].sum())


def by_rank(per_expert: I64, expert_rank: I32, n_ranks: int) -> I64:
    """Return [..., P, e]: each rank's values of ``per_expert`` [..., E], zeros after them where a rank holds fewer than e.

    >>> by_rank(np.array([5, 7, 9]), np.array([1, 0, 1], dtype=np.int32), 2).tolist()
    [[7, 0], [5, 9]]
    """
    held = np.bincount(expert_rank, minlength=n_ranks)
    order = np.argsort(expert_rank, kind="stable")
    table = np.full((n_ranks, int(held.max())), len(expert_rank))  # the index one past the end reads a zero
    table[expert_rank[order], np.arange(len(order)) - (np.cumsum(held) - held)[expert_rank[order]]] = order
    padded = np.concatenate([per_expert, np.zeros_like(per_expert[..., :1])], axis=-1)
    values: I64 = padded[..., table]
    return values


def token_bytes(hidden_size: int, dtype: Dtype) -> int:
    """Bytes of one token's hidden state on the wire: fp8 with one float32 scale per 128 elements, or bf16.

    >>> token_bytes(7168, "fp8"), token_bytes(7168, "bf16")
    (7392, 14336)
    """
    return hidden_size + 4 * -(-hidden_size // 128) if dtype == "fp8" else 2 * hidden_size
