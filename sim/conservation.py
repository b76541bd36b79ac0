"""Laws that every run checks on itself: tokens, bytes, FLOPs and time are neither lost nor made.

A violation is a bug of gatesim, never of the scenario; it stops the run with the law's name and both sides.
"""

from __future__ import annotations

import numpy as np

from sim.exchange import Exchange
from sim.tokens import I32, I64


class ConservationError(AssertionError):
    """A conservation law does not hold."""


def _equal(law: str, left: object, right: object) -> None:
    if left != right:
        raise ConservationError(f"{law}: {left} != {right}")


def check_exchange(exchange: Exchange, tokens_per_rank: int, pairs: I64 | int) -> None:
    """Check one layer and micro-batch: each source's expert loads sum to the pairs it kept, and the copies that follow.

    pairs: [P] kept (token, expert) pairs per source rank, counted on the way (tokens x k - dropped), or one number for all.

    A rank receives at most one copy of a token and at least ceil(pairs / experts there); a node likewise. Within these
    bounds, the copies that each source sends must be as many as ``exchange.copies`` counted on the way.
    """
    n_ranks, n_experts = exchange.expert_tokens.shape
    loads = exchange.expert_tokens.sum(axis=1)
    expected = np.broadcast_to(pairs, loads.shape)
    if (loads != expected).any():
        raise ConservationError(
            f"C1 each source's expert loads = tokens x k - dropped: {loads.tolist()} != {expected.tolist()}"
        )
    if exchange.computed_tokens is not None and (exchange.computed_tokens < exchange.expert_tokens).any():
        raise ConservationError("C1 padding only adds rows")
    if min(int(a.min(initial=0)) for a in (exchange.expert_tokens, exchange.rank_tokens, exchange.node_tokens)) < 0:
        raise ConservationError("C1 counts are not negative")
    if exchange.expert_tokens.max(initial=0) > tokens_per_rank:
        raise ConservationError(
            f"C1 a token's experts are distinct: {exchange.expert_tokens.max()} > {tokens_per_rank}"
        )
    per_rank = max(1, n_experts // n_ranks)
    ranks_per_node = -(-n_ranks // exchange.node_tokens.shape[1])
    sent = exchange.pairs
    _between("C2 copies to a rank", exchange.rank_tokens, -(-sent // per_rank), np.minimum(sent, tokens_per_rank))
    starts = np.arange(0, n_ranks, ranks_per_node)
    copies = np.add.reduceat(exchange.rank_tokens, starts, axis=1)
    _between(
        "C2 copies to a node",
        exchange.node_tokens,
        np.maximum.reduceat(exchange.rank_tokens, starts, axis=1),
        np.minimum(copies, tokens_per_rank),
    )
    if exchange.copies is not None:
        for column, (name, counts) in enumerate((("ranks", exchange.rank_tokens), ("nodes", exchange.node_tokens))):
            found, known = counts.sum(axis=1).tolist(), exchange.copies[:, column].tolist()
            _equal(f"C2 copies that each source sends to {name}", found, known)


def _between(law: str, value: I64, low: I64, high: I64) -> None:
    if (value < low).any() or (value > high).any():
        where = np.argwhere((value < low) | (value > high))[0].tolist()
        raise ConservationError(
            f"{law} out of bounds at {where}: {low[tuple(where)]} <= {value[tuple(where)]} <= {high[tuple(where)]}"
        )


def check_replicas(slot_tokens: I64, physical_to_logical_map: I32, expert_tokens: I64) -> None:
    """Check that of every source the slots of an expert got exactly its tokens: slot_tokens [P, S], expert_tokens [P, E]."""
    found = np.zeros_like(expert_tokens)
    np.add.at(found.T, physical_to_logical_map, slot_tokens.T)
    if not np.array_equal(found, expert_tokens) or slot_tokens.min(initial=0) < 0:
        rank, expert = np.argwhere(found != expert_tokens)[0] if (found != expert_tokens).any() else (-1, -1)
        raise ConservationError(f"C5 an expert's slots get its tokens: source {rank}, expert {expert}")


def check_time(parts: dict[str, I64], makespan_ps: int) -> None:
    """Check that, on every rank, the parts of the step's time sum to its makespan exactly (integer picoseconds)."""
    total = sum(parts.values())
    if not np.array_equal(np.asarray(total), np.full_like(np.asarray(total), makespan_ps)):
        raise ConservationError(
            f"C7 parts of the time sum to the makespan: {np.asarray(total).tolist()} != {makespan_ps}"
        )


def check_flops(billed: int, kept_pairs: int, flops_per_pair: int) -> None:
    """Check that the expert FLOPs billed are those of the kept (token, expert) pairs."""
    _equal("C4 FLOPs billed = kept pairs x FLOPs per pair", billed, kept_pairs * flops_per_pair)
