"""Counters against DeepEP's definitions, spelt out token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.exchange import Exchange, dispatch_layout, is_token_in_rank, token_bytes
from sim.tokens import I16, I32
from tests.strategies import KERNELS, seeds


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Random choices of P ranks in N nodes with E experts, placed at random, some choices dropped."""
    ranks_per_node, nodes = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (4, 2), (3, 3), (8, 9)]))
    ep_size = ranks_per_node * nodes
    n_experts = ep_size * draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(seeds))
    n_tokens, k = draw(st.integers(0, 12)), draw(st.integers(1, min(n_experts, 6)))
    ids = np.array(
        [[rng.permutation(n_experts)[:k] for _ in range(n_tokens)] for _ in range(ep_size)], np.int16
    ).reshape(ep_size, n_tokens, k)
    ids[rng.random(ids.shape) < draw(st.sampled_from([0.0, 0.3]))] = -1
    expert_rank = rng.permutation(np.arange(n_experts, dtype=np.int32) // (n_experts // ep_size))
    return {
        "ids": ids, "expert_rank": expert_rank, "ep_size": ep_size, "ranks_per_node": ranks_per_node,
        "nodes": nodes, "n_experts": n_experts,
    }  # fmt: skip


def _token_ranks(ids: I16, expert_rank: I32) -> list[set[int]]:
    return [{int(expert_rank[e]) for e in row if e >= 0} for row in ids.tolist()]


def exchange_of(case: dict[str, Any], kernels: Any) -> Exchange:
    layouts = [
        dispatch_layout(ids, case["expert_rank"], case["ep_size"], case["ranks_per_node"], case["n_experts"], kernels)
        for ids in case["ids"]
    ]
    return Exchange(
        np.array([layout.num_tokens_per_rank for layout in layouts]),
        np.array([layout.num_tokens_per_rdma_rank for layout in layouts]),
        np.array([layout.num_tokens_per_expert for layout in layouts]),
        case["expert_rank"],
        np.array([layout.copies for layout in layouts]),
    )


@given(cases())
def test_layout_is_deepeps(case: dict[str, Any]) -> None:
    ids, width = case["ids"][0], case["ranks_per_node"]
    ranks = _token_ranks(ids, case["expert_rank"])
    per_rank = [sum(r in mine for mine in ranks) for r in range(case["ep_size"])]
    per_node = [sum(n in {r // width for r in mine} for mine in ranks) for n in range(case["nodes"])]
    per_expert = [int((ids == e).sum()) for e in range(case["n_experts"])]
    for kernels in KERNELS.values():
        layout = dispatch_layout(ids, case["expert_rank"], case["ep_size"], width, case["n_experts"], kernels)
        assert layout.num_tokens_per_rank.tolist() == per_rank
        assert layout.num_tokens_per_rdma_rank.tolist() == per_node
        assert layout.num_tokens_per_expert.tolist() == per_expert
        assert layout.copies.tolist() == [sum(per_rank), sum(per_node)]
        for counts in (layout.num_tokens_per_rank, layout.num_tokens_per_rdma_rank, layout.num_tokens_per_expert):
            assert counts.dtype == np.int64
    inside = is_token_in_rank(ids, case["expert_rank"], case["ep_size"])
    assert inside.shape == (len(ids), case["ep_size"])
    assert [set(np.flatnonzero(row).tolist()) for row in inside] == ranks
    assert inside.sum(axis=0).tolist() == per_rank


@given(cases())
def test_pairs_and_inter_node_copies(case: dict[str, Any]) -> None:
    width, expert_rank = case["ranks_per_node"], case["expert_rank"]
    pairs = np.zeros((case["ep_size"], case["ep_size"]), dtype=int)
    normal = low_latency = 0
    for source, ids in enumerate(case["ids"]):
        for row in ids.tolist():
            hosts = [int(expert_rank[e]) for e in row if e >= 0]
            for host in hosts:
                pairs[source, host] += 1
                low_latency += host // width != source // width
            normal += len({host // width for host in hosts} - {source // width})
    for kernels in KERNELS.values():
        exchange = exchange_of(case, kernels)
        np.testing.assert_array_equal(exchange.pairs, pairs)
        assert exchange.sent("low_latency") is not exchange.rank_tokens
        assert exchange.sent("normal") is exchange.rank_tokens
        np.testing.assert_array_equal(exchange.sent("low_latency"), pairs)
        assert exchange.inter_node_copies(width, "normal") == normal
        assert exchange.inter_node_copies(width, "low_latency") == low_latency
        assert normal <= low_latency
        if case["nodes"] == 1:
            assert normal == low_latency == 0


@given(cases())
def test_one_node_sends_nothing_between_nodes(case: dict[str, Any]) -> None:
    whole = case | {"ranks_per_node": case["ep_size"], "nodes": 1}
    exchange = exchange_of(whole, KERNELS["numpy"])
    assert exchange.inter_node_copies(case["ep_size"], "normal") == 0
    assert exchange.inter_node_copies(case["ep_size"], "low_latency") == 0


@given(cases())
def test_order_of_tokens_does_not_matter_and_a_second_batch_doubles(case: dict[str, Any]) -> None:
    exchange = exchange_of(case, KERNELS["numpy"])
    backwards = exchange_of(case | {"ids": case["ids"][:, ::-1].copy()}, KERNELS["numpy"])
    twice = exchange_of(case | {"ids": np.concatenate([case["ids"], case["ids"]], axis=1)}, KERNELS["numpy"])
    for name in ("rank_tokens", "node_tokens", "expert_tokens"):
        np.testing.assert_array_equal(getattr(backwards, name), getattr(exchange, name))
        np.testing.assert_array_equal(getattr(twice, name), 2 * getattr(exchange, name))


def test_example_by_hand() -> None:
    """Four ranks in two nodes, two experts each; the token of rank 0 goes to experts 1, 2, 3 and 6."""
    case = {
        "ids": np.array([[[1, 2, 3, 6]]] + [[[-1, -1, -1, -1]]] * 3, np.int16),
        "expert_rank": np.repeat(np.arange(4, dtype=np.int32), 2), "ep_size": 4, "ranks_per_node": 2, "nodes": 2,
        "n_experts": 8,
    }  # fmt: skip
    exchange = exchange_of(case, KERNELS["numpy"])
    assert exchange.rank_tokens[0].tolist() == [1, 1, 0, 1]
    assert exchange.node_tokens[0].tolist() == [1, 1]
    assert exchange.pairs[0].tolist() == [1, 2, 0, 1]
    assert exchange.inter_node_copies(2, "normal") == exchange.inter_node_copies(2, "low_latency") == 1


@pytest.mark.parametrize(
    ("hidden_size", "fp8", "bf16"),
    [(7168, 7392, 14336), (128, 132, 256), (129, 137, 258), (5120, 5280, 10240), (1, 5, 2)],
)
def test_token_bytes(hidden_size: int, fp8: int, bf16: int) -> None:
    """DeepEP counts 7168 + 224 bytes per dispatched DeepSeek-V3 token: one float32 scale per 128 elements."""
    assert (token_bytes(hidden_size, "fp8"), token_bytes(hidden_size, "bf16")) == (fp8, bf16)
