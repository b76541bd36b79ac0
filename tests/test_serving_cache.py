"""Cache blocks and prefixes of ranks, and the store that they share."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sim.engine.serving import Finished
from sim.engine.serving.cache import Blocks
from sim.engine.serving.request import Request
from sim.engine.serving.store import Store
from sim.requests import PrefixTree
from sim.rng import stream
from tests.serving_model import US, Clock, Fake, requests_of, serve, sizes_of, unit, world

MS = 1000 * US


def ends(finished: Finished) -> list[int]:
    return [request.end_ps for request in finished.requests]


def test_a_cached_prefix_is_not_computed_again() -> None:
    one = unit(block_size=4, prefix_cache="rank")
    requests = requests_of([0, 10**11, 2 * 10**11], [40, 40, 40], [2, 2, 2], [7, 7, 8], [30, 20, 30])
    clock = Clock()
    found = serve(requests, sizes_of(one), policy=Fake(clock))
    assert [request.cached_tokens for request in found.requests] == [0, 20, 0]
    assert [int(work.prefill_tokens[0]) for work in clock.seen if work.prefill_tokens[0]] == [40, 20, 40]
    # 20 blocks: the prefix of request 0 (7 blocks) has to make room for request 2 (11 blocks and 7 that it keeps)
    small = serve(requests_of([0, 10**11, 2 * 10**11], [40] * 3, [2] * 3, [7, 8, 7], [30] * 3), sizes_of(one, 11))
    assert [request.cached_tokens for request in small.requests] == [0, 0, 0]


def test_prefixes_that_continue_each_other_share_their_beginning() -> None:
    one = unit(block_size=4, prefix_cache="rank")
    tree = PrefixTree(np.array([-1, 0, 0], np.int32), np.array([8, 16, 20], np.int64))
    requests = requests_of([0, 10**11, 2 * 10**11], [30] * 3, [1] * 3, [1, 2, 2], [16, 20, 18], tree)
    found = serve(requests, sizes_of(one))
    assert [request.cached_tokens for request in found.requests] == [0, 8, 16]
    assert requests.reusable_tokens().tolist() == [0, 8, 18]  # whole blocks only


def test_what_was_cached_is_what_was_cached_at_first() -> None:
    """A request put back finds its own prefix, which it has computed itself."""
    one = unit(block_size=1, prefix_cache="rank")
    requests = requests_of([0, 1], [10, 10], [20, 20], [1, 2], [9, 9])
    found = serve(requests, sizes_of(one, 30)).requests
    assert sum(request.preemptions for request in found) > 0
    assert [request.cached_tokens for request in found] == [0, 0]


@given(st.integers(4, 14), st.lists(st.tuples(st.integers(0, 5), st.integers(1, 20), st.integers(0, 4)), max_size=40))
def test_blocks_are_neither_lost_nor_given_twice(capacity: int, moves: list[tuple[int, int, int]]) -> None:
    """Requests come, have their prompt computed and leave in any order, beginning with one of three chains of prefixes."""
    blocks = Blocks(1, capacity, 2, caching=True)
    inside: list[Request] = []
    for number, (what, tokens, prefix) in enumerate(moves):
        if what < 3:
            spans = [
                (key, 6 * i, min(6 * i + 6, tokens - 1)) for i, key in enumerate((9, prefix)) if tokens > 6 * i + 1
            ]
            request = Request(number, 0, tokens, 1, 0, tuple(spans) if prefix < 3 else ())
            if blocks.admit(0, request):
                inside.append(request)
                assert request.computed < request.prompt
                assert request.own + request.computed // 2 == blocks.of(tokens)
        elif inside and what < 5:
            blocks.keep(0, inside[tokens % len(inside)])
        elif inside:
            blocks.release(0, inside.pop(tokens % len(inside)))
        known = blocks._prefixes[0].values()
        assert int(blocks.used[0]) == sum(r.own for r in inside) + sum(p.pinned for p in known)
        assert int(blocks.idle[0]) == sum(p.blocks - p.pinned for p in known)
        assert (
            blocks.used[0] + blocks.idle[0] <= capacity and min(r.own for r in [*inside, Request(0, 0, 1, 1, 0)]) >= 0
        )
        assert all(p.blocks >= p.pinned == max(p.users.values(), default=0) for p in known)


def test_eviction_spares_what_requests_stand_on_and_ends_before_beginnings() -> None:
    def visit(blocks: Blocks, number: int, *spans: tuple[int, int, int], leave: bool = True) -> Request:
        request = Request(number, 0, spans[-1][2] + 1, 1, 0, spans)
        assert blocks.admit(0, request)
        blocks.keep(0, request)
        if leave:
            blocks.release(0, request)
        return request

    blocks = Blocks(1, 14, 2, caching=True)
    stays = visit(blocks, 0, (1, 0, 8), leave=False)  # 4 blocks of prefix 1, and one of its own
    visit(blocks, 1, (2, 0, 4), (3, 4, 8))  # 2 blocks of prefix 2 and 2 that continue it, now idle
    assert (int(blocks.used[0]), int(blocks.idle[0])) == (5, 4)
    assert blocks.take(0, 7)  # two more than are free
    known = {key: prefix.blocks for key, prefix in blocks._prefixes[0].items()}
    assert known == {1: 4, 2: 2}
    blocks.release(0, stays)
    assert blocks.take(0, 7) and int(blocks.idle[0]) == 0  # least recently used first: prefix 2, then prefix 1
    assert not blocks.take(0, 1)


def test_a_hit_ends_where_the_prefix_does() -> None:
    """Two compute the same prefix at a time; the second one's copy of its beginning is nobody's, and goes."""
    blocks = Blocks(1, 24, 1, caching=True)
    path = (1, 0, 4), (2, 4, 8)
    early, late, third = Request(0, 0, 5, 1, 0, path[:1]), Request(1, 0, 9, 1, 0, path), Request(2, 0, 9, 1, 0, path)
    for request in (early, late):
        assert blocks.admit(0, request)
    for request in (early, late):
        blocks.keep(0, request)
    blocks.release(0, early)
    assert (int(blocks.used[0]), int(blocks.idle[0])) == (9, 4)
    assert blocks.take(0, 13)  # evicts two of the four
    assert {key: prefix.blocks for key, prefix in blocks._prefixes[0].items()} == {1: 2, 2: 4}
    blocks.used[0] -= 13
    assert blocks.admit(0, third) and third.computed == 2


def test_idle_blocks_that_a_hit_takes_up_need_room_too() -> None:
    blocks = Blocks(1, 10, 1, caching=True)
    first, second = (Request(number, 0, 9, 1, 0, ((1, 0, 8),)) for number in range(2))
    assert blocks.admit(0, first)
    blocks.keep(0, first)
    blocks.release(0, first)
    assert blocks.take(0, 2) and (int(blocks.used[0]), int(blocks.idle[0])) == (2, 8)
    assert not blocks.admit(0, second)
    assert (int(blocks.used[0]), int(blocks.idle[0]), second.own) == (2, 8, 0)


def test_a_request_stands_on_no_more_of_a_prefix_than_it_uses() -> None:
    """Else one that is alone might find no room to grow, and wait for ever."""
    blocks = Blocks(1, 14, 1, caching=True)
    long, short = Request(0, 0, 11, 1, 0, ((1, 0, 10),)), Request(1, 0, 5, 1, 0, ((1, 0, 3),))
    for request in (long, short):
        assert blocks.admit(0, request)
        blocks.keep(0, request)
    assert int(blocks.used[0]) == 10 + 1 + 2
    blocks.release(0, long)
    assert (int(blocks.used[0]), int(blocks.idle[0])) == (3 + 2, 7)
    assert blocks.take(0, 9) and not blocks.take(0, 1)


def test_what_any_rank_has_computed_all_ranks_load_from_a_shared_cache() -> None:
    """One after the other, hits are those of the cache that forgets nothing; on ranks of their own they are fewer."""
    draw = stream(0, "test", "shared")
    n = 60
    tree = PrefixTree(np.array([-1, 0, 1, -1, 3], np.int32), np.array([8, 20, 31, 12, 40], np.int64))
    prefix = draw.integers(-1, 5, n)
    inputs = draw.integers(2, 60, n)
    tokens = np.where(prefix < 0, 0, np.minimum(tree.tokens[prefix], inputs - 1))
    spread = [i * 10**12 for i in range(n)], inputs.tolist(), [2] * n, prefix.tolist(), tokens.tolist(), tree
    requests = requests_of(*spread)
    more = {"block_size": 1, "load_balance_method": "round_robin", "count": 2}
    run = world(requests, (sizes_of(unit(ranks=3, prefix_cache="shared", **more)),), duration_s=100.0)
    hits = [request.cached_tokens for request in run.run().requests]
    assert hits == requests.reusable_tokens().tolist()
    (store,) = run.stores
    assert store is not None and store.blocks == sum(end - first for first, end in store.held.values())
    assert int(np.sum([group.topic_tokens.sum() for group in run.groups])) == int(inputs.sum()) - sum(hits) + n
    alone = serve(requests, sizes_of(unit(ranks=3, prefix_cache="rank", **more)), duration_s=100.0).requests
    assert sum(request.cached_tokens for request in alone) < 0.8 * sum(hits)


def test_a_shared_cache_forgets_what_was_used_longest_ago_ends_first() -> None:
    store = Store(2, 6)
    first = Request(0, 0, 30, 1, 0, ((1, 0, 4), (2, 4, 8)))
    store.keep(first)
    store.keep(Request(1, 0, 30, 1, 0, ((3, 0, 5),)))
    assert (store.blocks, store.find(first)) == (6, 8)
    store.keep(Request(2, 0, 30, 1, 0, ((4, 0, 6),)))  # 3 goes, and a block of the prefix that continues 1
    assert (store.blocks, store.find(first), dict(store.held)[4]) == (6, 6, (0, 3))


def test_loading_hits_holds_up_the_iteration_in_which_they_start() -> None:
    """30 tokens of 1,000 bytes at 1 MB/s."""
    requests = requests_of([0, 10**12], [40, 40], [1, 1], [7, 7], [30, 30])
    ends_of = {}
    for rate in (None, 1e6):
        one = unit(block_size=1, prefix_cache="shared", cache_load_bytes_per_s=rate)
        ends_of[rate] = ends(serve(requests, sizes_of(one)))
    assert [late - early for early, late in zip(ends_of[None], ends_of[1e6], strict=True)] == [0, 30 * MS]
