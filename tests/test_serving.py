"""The serving loop against plain models of it, queues by recursion, closed forms, and its own laws."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.conservation import ConservationError
from sim.deployment import Fault, Slo
from sim.engine.serving import Finished
from sim.engine.serving.decodes import Decodes
from sim.engine.serving.request import Request
from sim.engine.serving.tables import Tables
from sim.loading import load
from sim.metrics.serving import binned, meets, spread, weighted_spread
from sim.requests import Requests
from sim.rng import stream
from sim.settings import Rebalance
from sim.units import PS_PER_S, to_ps
from sim.yamlfile import ScenarioError
from tests.serving_model import (
    US,
    Clock,
    Fake,
    kiefer_wolfowitz,
    lindley,
    plain_rank,
    requests_of,
    serve,
    sizes_of,
    unit,
    world,
)

MS = 1000 * US


@st.composite
def loads(draw: st.DrawFn, most: int = 14, longest: int = 40) -> Requests:
    n = draw(st.integers(1, most))
    gaps = draw(st.lists(st.integers(0, 80 * MS), min_size=n, max_size=n))
    inputs = draw(st.lists(st.integers(1, longest), min_size=n, max_size=n))
    outputs = draw(st.lists(st.integers(1, longest), min_size=n, max_size=n))
    return requests_of(np.cumsum(gaps).tolist(), inputs, outputs)


def ends(finished: Finished) -> list[int]:
    return [request.end_ps for request in finished.requests]


# Against plain models


@given(
    loads(),
    st.integers(1, 5),
    st.integers(1, 24),
    st.integers(1, 7),
    st.integers(0, 30),
    st.booleans(),
    st.sampled_from([None, 1, 9]),
)
def test_a_rank_does_what_a_plain_loop_over_requests_does(
    requests: Requests, seats: int, budget: int, block: int, spare: int, chunked: bool, threshold: int | None
) -> None:
    """Chunks, budgets, preemption by recomputation: every time to the picosecond, through every field of `Work`."""
    one = unit(
        max_num_seqs=seats,
        max_num_batched_tokens=max(seats, budget),
        block_size=block,
        chunked_prefill=chunked,
        long_prefill_token_threshold=threshold if chunked else None,
    )
    longest = int((requests.input_tokens + requests.output_tokens - 1).max())
    capacity = -(-longest // block) + spare
    found = serve(requests, sizes_of(one, capacity), duration_s=10.0)
    plain = plain_rank(requests, one, capacity, Clock())
    assert [r.first_ps for r in found.requests] == [p.first for p in plain]
    assert ends(found) == [p.end for p in plain]
    assert [r.preemptions for r in found.requests] == [p.preemptions for p in plain]


def test_preemption_happens_at_all() -> None:
    """Negative control of the law above: with room for one and a half requests somebody is put back."""
    one = unit(block_size=1)
    found = serve(requests_of([0, 1], [10, 10], [20, 20]), sizes_of(one, 40))
    assert sum(request.preemptions for request in found.requests) > 0
    assert serve(requests_of([0, 1], [10, 10], [20, 20]), sizes_of(one, 80)).requests[1].preemptions == 0


@pytest.mark.parametrize("output", [1, 3])
def test_one_server_waits_as_lindley_says(output: int) -> None:
    draw = stream(0, "test", "lindley")
    arrival = np.cumsum(draw.integers(1, 120 * MS, 400))
    inputs = draw.integers(1, 3000, 400)
    clock = Clock()
    one = unit(max_num_seqs=1, chunked_prefill=False, max_num_batched_tokens=4096)
    found = serve(requests_of(arrival.tolist(), inputs.tolist(), [output] * 400), sizes_of(one), duration_s=100.0)
    service = np.array(
        [clock.prompt(n) + sum(clock.duration(1, 1, n + i, 0, 1) for i in range(1, output)) for n in inputs.tolist()]
    )
    waits = lindley(arrival, service)
    assert waits.max() > 0 and (waits == 0).any()
    assert [request.queued_ps for request in found.requests] == waits.tolist()
    assert ends(found) == (arrival + waits + service).tolist()


@pytest.mark.parametrize("servers", [1, 2, 5])
def test_c_servers_wait_as_kiefer_and_wolfowitz_say(servers: int) -> None:
    """Equal services: first come first served is taking turns, so groups that take turns are c servers."""
    draw = stream(0, "test", "servers", servers)
    arrival = np.cumsum(draw.integers(1, 2 * 30 * MS // servers, 500))
    clock = Clock()
    one = unit(max_num_seqs=1, count=servers, load_balance_method="round_robin")
    found = serve(requests_of(arrival.tolist(), [64] * 500, [1] * 500), sizes_of(one), duration_s=100.0)
    service = np.full(500, clock.duration(1, 64, 0, 64 * 65 / 2, 1))
    waits = kiefer_wolfowitz(arrival, service, servers)
    assert waits.max() > 0
    assert [request.queued_ps for request in found.requests] == waits.tolist()


# Laws


@st.composite
def units(draw: st.DrawFn) -> dict[str, object]:
    spec = draw(st.integers(0, 3))
    return {
        "max_num_seqs": draw(st.integers(1, 6)),
        "max_num_batched_tokens": draw(st.integers(24, 64)),
        "chunked_prefill": draw(st.booleans()),
        "block_size": draw(st.sampled_from([1, 4, 16])),
        "prefix_cache": draw(st.sampled_from(["none", "rank", "shared"])),
        "speculative_tokens": spec,
        "acceptance": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "load_balance_method": draw(st.sampled_from(["round_robin", "shortest_queue", "fewest_tokens"])),
        "max_queue": draw(st.sampled_from([None, None, 0, 3])),
        "cuda_graph_sizes": draw(st.sampled_from([(), (1, 4, 8)])),
    }


@given(loads(most=20), units(), st.integers(1, 3), st.integers(1, 2), st.integers(8, 60), st.data())
def test_laws_hold_on_every_run(
    requests: Requests, more: dict[str, object], ranks: int, count: int, tokens: int, data: st.DataObject
) -> None:
    """Little's law, tokens and blocks are checked by the run itself; here with prefixes, faults, and units that hand over."""
    n = len(requests)
    prefix = data.draw(st.lists(st.integers(-1, 2), min_size=n, max_size=n))
    lengths = [min(6 * p + 5, int(i) - 1) if p >= 0 else 0 for p, i in zip(prefix, requests.input_tokens, strict=True)]
    prefix = [p if length else -1 for p, length in zip(prefix, lengths, strict=True)]
    requests = requests_of(
        requests.arrival_ps.tolist(), requests.input_tokens.tolist(), requests.output_tokens.tolist(), prefix, lengths
    )
    apart = data.draw(st.booleans())
    names = ["p", "d"] if apart else ["u"]
    fault = st.builds(
        Fault,
        at_s=st.sampled_from([0.1, 0.2, 0.3, 0.35]),
        until_s=st.sampled_from([None, 0.4, 0.5]),
        unit=st.sampled_from(names),
        rank=st.integers(0, ranks - 1),
        kind=st.sampled_from(["slow_device", "slow_link", "dead_rank", "dead_rank"]),
        recovery_s=st.sampled_from([0.0, 0.1]),
    )
    faults = tuple(data.draw(st.lists(fault, max_size=5)))
    size = int(str(more["block_size"]))
    made = (
        (unit("p", ranks, role="prefill", count=count, **more), unit("d", ranks, role="decode", **more))
        if apart
        else (unit("u", ranks, count=count, **more),)
    )
    rebalance = Rebalance(interval_s=0.05, transfer=data.draw(st.sampled_from(["stall", "background"])))
    policy = Fake(rebalance=rebalance)
    policy.chunks_ps, policy.lost_bytes, policy.loading_bytes = (5 * MS, 7 * MS), 5e8, 4e8
    run = world(requests, tuple(sizes_of(one, max(1, tokens // size)) for one in made), policy, faults=faults)
    found = run.run()
    spec = int(str(more["speculative_tokens"]))
    for group in run.groups:
        assert (group.blocks.used == 0).all() and (group.blocks.idle >= 0).all()
        held = sum(prefix.blocks for known in group.blocks._prefixes for prefix in known.values())
        assert held == int(group.blocks.idle.sum()) <= group.blocks.capacity * ranks
    log = found.log.columns()
    if len(log["fullest"]):
        assert log["fullest"].max() <= max(1, tokens // size)
    for work in policy.clock.seen:
        if not more["cuda_graph_sizes"]:  # whole numbers of tokens by topic, where some ranks rest
            assert 0 <= int((work.prefill_tokens + work.decode_tokens).sum() - work.topic_tokens.sum()) < 3
        limit = int(str(more["max_num_batched_tokens"]))
        assert (work.decode_requests <= int(str(more["max_num_seqs"]))).all()
        if more["chunked_prefill"]:
            if not more["cuda_graph_sizes"]:
                assert (work.prefill_tokens + work.decode_tokens <= limit).all()
            assert ((work.decode_tokens <= work.decode_requests * (1 + spec)) | bool(more["cuda_graph_sizes"])).all()
        else:
            assert ((work.prefill_tokens <= limit) | (work.prefill_requests == 1)).all()
            if more["prefix_cache"] == "none" and requests.input_tokens.min() > 1 + spec:
                assert not (work.prefill_tokens.astype(bool) & work.decode_tokens.astype(bool)).any()


def test_a_lost_request_is_noticed() -> None:
    run = world(requests_of([0, 5], [4, 4], [3, 3]), (sizes_of(unit()),))
    run.running.enter(run.requests[0], 0)
    with pytest.raises(ConservationError, match="Little's law, running"):
        run.run()


def test_little_holds_to_the_picosecond_and_counts_everything() -> None:
    draw = stream(0, "test", "little")
    arrival = np.cumsum(draw.integers(1, 40 * MS, 300)).tolist()
    found = serve(
        requests_of(arrival, draw.integers(1, 50, 300).tolist(), draw.integers(1, 50, 300).tolist()),
        sizes_of(unit(ranks=2)),
        duration_s=20.0,
    )
    queue, running, handover, system = found.stages
    assert system.area_ps == sum(r.end_ps - r.arrival_ps for r in found.requests) == queue.area_ps + running.area_ps
    assert queue.area_ps == sum(r.queued_ps for r in found.requests)
    assert handover.area_ps == 0


def test_events_grow_with_iterations_and_requests_alone() -> None:
    found = serve(requests_of([0] * 200, [16] * 200, [30] * 200), sizes_of(unit(max_num_seqs=200)))
    iterations = len(found.log.imbalances())
    assert iterations < 40
    assert found.n_events <= iterations + len(found.requests) + 12


def test_a_run_does_not_depend_on_hash_seeds() -> None:
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from tests.serving_model import *\n"
        "import hashlib\n"
        "d = np.random.Generator(np.random.Philox(3))\n"
        "r = requests_of(np.cumsum(d.integers(1, 9*10**9, 60)).tolist(), d.integers(1, 50, 60).tolist(),"
        " d.integers(1, 50, 60).tolist(), [i % 3 for i in range(60)], [0] * 60)\n"
        "f = (Fault(at_s=0.1, unit='u', rank=1, kind='dead_rank', recovery_s=0.1),)\n"
        "s = serve(r, sizes_of(unit(ranks=3, block_size=4, speculative_tokens=2), 30), faults=f)\n"
        "print([(q.end_ps, q.place, q.retries) for q in s.requests])"
    )
    root = Path(__file__).resolve().parents[1]
    found = {
        subprocess.run(
            [sys.executable, "-c", code], cwd=root, env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "77")
    }
    assert len(found) == 1 and b"(" in found.pop()


# Single mechanisms


def test_speculation_brings_several_tokens_and_all_that_were_asked_for() -> None:
    clock = Clock(base=10 * MS, per_request=0, per_token=0, per_context=0, per_pair=0, per_sample=0)
    one = unit(speculative_tokens=2, acceptance=1.0)
    found = serve(requests_of([0], [5], [11]), sizes_of(one), policy=Fake(clock))
    assert ends(found) == [(1 + 4) * 10 * MS]  # the first token, then 3, 3, 3 and 1
    assert [int(work.decode_tokens[0]) for work in clock.seen] == [0, 3, 3, 3, 3]
    none = serve(requests_of([0], [5], [11]), sizes_of(unit(speculative_tokens=2, acceptance=0.0)), policy=Fake(clock))
    assert ends(none) == [11 * 10 * MS]


def test_a_chunk_of_as_few_tokens_as_a_decode_runs_as_one() -> None:
    """The prompt's end, of which the rest is cached, and one whose last token alone is left by the budget."""
    clock = Clock()
    one = unit(block_size=1, prefix_cache="rank", speculative_tokens=1)
    requests = requests_of([0, 10**11, 2 * 10**11, 3 * 10**11], [40] * 4, [1] * 4, [7] * 4, [39, 39, 38, 37])
    serve(requests, sizes_of(one), policy=Fake(clock))
    rows = [
        [int(getattr(work, f"{name}")[0]) for name in ("decode_requests", "decode_tokens", "decode_kv_tokens")]
        + [int(work.prefill_requests[0]), int(work.prefill_tokens[0]), float(work.prefill_pairs[0])]
        + [int(work.longest[0]), int(work.sampled[0]), int(work.topic_tokens.sum())]
        for work in clock.seen
    ]
    assert rows == [
        [0, 0, 0, 1, 40, 820.0, 40, 1, 40],
        [1, 1, 40, 0, 0, 0.0, 40, 1, 1],
        [1, 2, 40, 0, 0, 0.0, 40, 1, 2],
        [0, 0, 0, 1, 3, 3 * 37 + 6.0, 40, 1, 3],
    ]
    clock = Clock()
    serve(requests_of([0, 0], [9, 9], [2, 3]), sizes_of(unit(max_num_batched_tokens=9)), policy=Fake(clock))
    asked = [(int(w.decode_requests[0]), int(w.decode_kv_tokens[0]), int(w.prefill_tokens[0])) for w in clock.seen]
    assert asked == [(0, 0, 9), (1, 10, 8), (1, 9, 0), (1, 10, 0), (1, 11, 0)]


def test_proposed_tokens_count_in_the_budget_and_as_tokens_of_their_topic() -> None:
    clock = Clock()
    one = unit(speculative_tokens=2, acceptance=0.0, max_num_batched_tokens=12, max_num_seqs=4)
    serve(requests_of([0, 0, 10**11], [5, 6, 30], [40, 40, 1]), sizes_of(one), policy=Fake(clock))
    chunks = [int(work.prefill_tokens[0]) for work in clock.seen if work.prefill_tokens[0]]
    assert chunks == [11, 6, 6, 6, 6, 6]
    assert [work.topic_tokens.tolist() for work in clock.seen[:2]] == [[5, 6, 0], [3, 3, 0]]
    rests = Clock()
    two = unit(ranks=2, chunked_prefill=False, load_balance_method="round_robin", speculative_tokens=2, acceptance=0.0)
    serve(requests_of([0, 0, 10**11], [5, 6, 30], [40, 40, 1], topics=1), sizes_of(two), policy=Fake(rests))
    (work,) = [work for work in rests.seen if int(work.prefill_tokens.sum()) == 30]
    assert work.decode_tokens.tolist() == [0, 3] and work.topic_tokens.tolist() == [33, 0, 0]


def test_requests_to_be_computed_again_take_room_before_caches_handed_over() -> None:
    run = world(
        requests_of([0, 0], [4, 4], [2, 2]), (sizes_of(unit("p", role="prefill")), sizes_of(unit("d", role="decode")))
    )
    group, (waits, arrives) = run.groups[1], run.requests
    run._held[arrives] = 0
    group.waiting[0].append(waits)
    group.arriving[0].append(arrives)
    group.receive(0)
    assert list(group.arriving[0]) == [arrives] and not group.seats[0]
    group.waiting[0].clear()
    group.receive(0)
    assert not group.arriving[0] and group.seats[0] == 1


def test_decodes_are_padded_to_graph_sizes() -> None:
    clock = Clock()
    serve(requests_of([0] * 3, [5] * 3, [4, 8, 8]), sizes_of(unit(cuda_graph_sizes=(2, 4))), policy=Fake(clock))
    assert sorted({int(work.decode_tokens[0]) for work in clock.seen}) == [0, 2, 4]


def test_a_long_prompt_leaves_room_for_others() -> None:
    clock = Clock()
    one = unit(max_num_batched_tokens=50, max_num_seqs=8, long_prefill_token_threshold=20)
    found = serve(requests_of([0, 0], [60, 30], [1, 1]), sizes_of(one), policy=Fake(clock))
    assert [int(work.prefill_tokens[0]) for work in clock.seen] == [40, 30, 20]
    assert found.requests[1].end_ps < found.requests[0].end_ps


def test_rates_end_with_the_last_request() -> None:
    """Requests that are all there at the start, on a run cut at ten times what they take, and at a tenth."""
    requests = requests_of([0] * 8, [20] * 8, [30] * 8)
    rates = {}
    for name, duration_s in (("long", 100.0), ("longer", 1000.0), ("cut", 0.1)):
        run = world(requests, (sizes_of(unit(max_num_seqs=4)),), duration_s=duration_s)
        tables = Tables(run.run(), run.serving, ("a", "b", "c"), None, {}).all()
        rates[name] = tables["service"]
    end_s = max(tables["requests"]["e2e_s"])
    assert rates["long"]["output_tokens_per_s_per_gpu"][0] == pytest.approx(8 * 30 / end_s)
    same = {name: column for name, column in rates["long"].items() if not np.isnan(column[0])}
    assert same == {name: rates["longer"][name] for name in same}
    assert rates["cut"]["output_tokens_per_s_per_gpu"][0] > 0 and rates["cut"]["utilisation"][0] == pytest.approx(1.0)
    late = world(requests, (sizes_of(unit()),), duration_s=100.0, warmup_s=50.0)
    service = Tables(late.run(), late.serving, ("a", "b", "c"), None, {}).all()["service"]
    assert np.isnan([service[name][0] for name in ("output_tokens_per_s_per_gpu", "goodput_share")]).all()


def test_a_request_put_back_goes_on_with_its_own_draws() -> None:
    decodes = Decodes(1, 1, 4, 2.0, np.zeros(1, np.int64))
    request = Request(0, 0, 10, 12, 0)
    request.generated, request.accepted = 1, np.array([3, 1, 2, 3, 3], np.int64)
    decodes.join(0, request)
    assert decodes.new_tokens().tolist() == [3]
    for brought in (3, 1):
        decodes.context += brought
        assert decodes.advance(None) == []
    decodes.leave(0, request)
    assert request.generated == 5 and request.accepted.tolist() == [2, 3, 3]
    assert decodes.context.tolist() == [0] and not decodes.new_tokens().any() and not decodes._blocks.any()


@pytest.mark.parametrize(
    ("method", "places"),
    [("round_robin", [0, 1, 2, 0]), ("shortest_queue", [0, 1, 2, 0]), ("fewest_tokens", [0, 1, 2, 1])],
)
def test_the_router_looks_at_what_it_is_told_to(method: str, places: list[int]) -> None:
    one = unit(ranks=3, load_balance_method=method)
    found = serve(requests_of([0, 1, 2, 3], [90, 20, 60, 10], [50] * 4), sizes_of(one))
    assert [request.place for request in found.requests] == places


def test_a_request_that_fits_nowhere_is_refused_and_so_is_one_behind_a_full_queue() -> None:
    found = serve(requests_of([0, 1], [100, 10], [1, 5]), sizes_of(unit(block_size=10), 3))
    assert [request.refused for request in found.requests] == [True, False]
    found = serve(requests_of([0, 1, 2, 3], [10] * 4, [5] * 4), sizes_of(unit(max_num_seqs=1, max_queue=2)))
    assert [request.refused for request in found.requests] == [False, False, False, True]


@pytest.mark.parametrize(
    ("limits", "outputs", "refused"),
    [
        ({"max_num_seqs": 2}, [5, 5, 5], [False, False, True]),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 15}, [5, 5, 5], [False, False, True]),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 10}, [5, 5, 5], [False, True, True]),
        ({"max_num_seqs": 9}, [5, 5, 60], [False, False, True]),  # for lack of blocks
        ({"max_num_seqs": 1, "count": 2}, [5, 5, 5], [False, False, True]),
    ],
)
def test_without_a_queue_only_what_cannot_start_is_refused(
    limits: dict[str, int], outputs: list[int], refused: list[bool]
) -> None:
    one = unit(max_queue=0, block_size=1, **limits)
    inputs = [10, 10, 10] if outputs[-1] == 5 else [30, 30, 10]
    found = serve(requests_of([0, 0, 0], inputs, outputs), sizes_of(one, 69))
    assert [request.refused for request in found.requests] == refused
    later = serve(requests_of([0, 10**12], [10, 10], [5, 5]), sizes_of(one, 69))
    assert not any(request.refused for request in later.requests)


def test_a_prefill_unit_has_room_for_the_prompt_alone() -> None:
    prefill, decode = unit("p", role="prefill", block_size=1), unit("d", role="decode", block_size=1)
    for blocks, refused in ((100, False), (99, True)):
        (request,) = serve(requests_of([0], [100], [50]), sizes_of(prefill, blocks), sizes_of(decode, 149)).requests
        assert request.refused == refused
    (request,) = serve(requests_of([0], [100], [50]), sizes_of(prefill, 100), sizes_of(decode, 148)).requests
    assert request.refused


def test_cache_is_handed_over_at_the_ports_rate_one_after_the_other() -> None:
    """Two prompts end together; 1,000 bytes a token at 1 GB/s and 3 us of latency, and the receiver takes one at a time."""
    clock = Clock()
    prefill, decode = unit("p", 2, role="prefill"), unit("d", 1, role="decode")
    found = serve(requests_of([0, 0], [50, 80], [3, 1]), sizes_of(prefill), sizes_of(decode), policy=Fake(clock))
    first = clock.duration(2, 130, 0, 50 * 51 / 2 + 80 * 81 / 2, 2)
    assert [request.first_ps for request in found.requests] == [first, first]
    handed = first + int(to_ps(50 * 1000 / 1e9)) + 3 * US
    steps = clock.duration(1, 1, 51, 0, 1) + clock.duration(1, 1, 52, 0, 1)
    assert ends(found) == [handed + steps, first]
    slow = sizes_of(prefill, rate=1e6), sizes_of(decode, rate=1e6)
    early, late = serve(requests_of([0, 0], [50, 80], [2, 2]), *slow).requests
    step = clock.duration(1, 1, 51, 0, 1)
    assert early.end_ps == first + 50 * MS + 3 * US + step
    assert late.end_ps == first + (50 + 80) * MS + 3 * US + clock.duration(1, 1, 81, 0, 1)


def test_at_a_decode_unit_alone_prompts_come_with_their_cache() -> None:
    clock = Clock()
    (request,) = serve(requests_of([0], [50], [3]), sizes_of(unit("d", role="decode")), policy=Fake(clock)).requests
    first = clock.duration(1, 1, 50, 0, 1)
    assert (request.first_ps, request.cached_tokens) == (first, 49)
    assert request.end_ps == first + clock.duration(1, 1, 51, 0, 1) + clock.duration(1, 1, 52, 0, 1)
    run = world(requests_of([0], [50], [3]), (sizes_of(unit("d", role="decode")),), slo=Slo(e2e_s=9.0))
    tables = Tables(run.run(), run.serving, ("a", "b", "c"), None, {}).all()
    assert np.isnan([tables["requests"]["ttft_s"][0], tables["service"]["ttft_p50_s"][0]]).all()
    assert np.isnan([tables["service"][f"{name}_tokens_per_s_per_gpu"][0] for name in ("input", "cached")]).all()
    assert np.isnan(tables["service"]["usd_per_million_input"][0])
    assert tables["service"]["goodput_share"] == [1.0] and tables["requests"]["tpot_s"][0] > 0


def test_without_room_at_the_decode_unit_the_cache_waits_where_it_is() -> None:
    prefill, decode = unit("p", role="prefill"), unit("d", role="decode", max_num_seqs=1)
    found = serve(requests_of([0, 0], [50, 50], [30, 30]), sizes_of(prefill), sizes_of(decode))
    early, late = found.requests
    assert late.end_ps - early.end_ps > 28 * 20 * MS
    assert found.stages[2].area_ps > 28 * 20 * MS


# Tables and metrics


def test_tables_say_what_happened() -> None:
    requests = requests_of([0, 2 * 10**11, 5 * 10**11], [100, 100, 100], [11, 1, 11])
    run = world(requests, (sizes_of(unit(ranks=2)),), slo=Slo(ttft_s=0.05), warmup_s=0.1)
    found = run.run()
    tables = Tables(found, run.serving, ("a", "b", "c"), 3.6, {"policy": "x", "replica": 0}).all()
    rows = tables["requests"]
    assert rows["topic"] == ["a", "b", "c"] and rows["policy"] == ["x"] * 3
    assert rows["e2e_s"][2] == (found.requests[2].end_ps - 5 * 10**11) / PS_PER_S
    assert np.isnan(rows["tpot_s"][1])
    service = {name: column[0] for name, column in tables["service"].items()}
    assert service["requests"] == 2 and service["goodput_share"] == 1.0
    assert service["ttft_mean_s"] == np.mean(rows["ttft_s"][1:])
    log = found.log.columns()
    window_s = 0.5 + rows["e2e_s"][2] - 0.1  # until the last request ends, before duration_s
    given_ = log["output_tokens"][log["end_ps"] > 10**11].sum()
    assert service["output_tokens_per_s_per_gpu"] == pytest.approx(given_ / window_s / 2)
    assert service["usd_per_million_output"] == pytest.approx(2 * window_s / 3600 * 3.6 / given_ * 1e6)
    assert sum(tables["timeline"]["output_tokens_per_s"]) / 100 == pytest.approx(23)
    assert tables["units"]["unit"] == ["u"]


def test_warm_up_is_in_no_figure() -> None:
    """Slow and full at first: one prompt of 800 tokens until 0.8 s, then one of 10."""
    requests = requests_of([0, 9 * 10**11], [800, 10], [8, 20])
    slow = Fault(at_s=0.0, until_s=0.8, unit="u", rank=0, kind="slow_device", factor=5)
    rows = []
    for warmup_s in (0.0, 0.85):
        one = sizes_of(unit(ranks=2, block_size=1))
        run = world(requests, (one,), duration_s=2.0, warmup_s=warmup_s, faults=(slow,))
        found = run.run()
        assert found.requests[0].end_ps < 85 * 10**10
        service = Tables(found, run.serving, ("a", "b", "c"), None, {}).all()["service"]
        rows.append({name: column[0] for name, column in service.items()})
    whole, after = rows
    assert after["itl_mean_s"] == pytest.approx(after["tpot_mean_s"]) and after["itl_p99_s"] < 0.03
    assert whole["itl_p99_s"] > 0.09
    assert whole["kv_max"] == (800 + 7) / 1000 and after["kv_max"] == (10 + 19) / 1000  # of one rank of two


def test_what_a_group_holds_counts_while_it_does_not_iterate() -> None:
    """Caches that wait for the only seat of the decode unit, where the prefill unit has nothing to do."""
    prefill = sizes_of(unit("p", role="prefill", block_size=4), 400)
    decode = sizes_of(unit("d", role="decode", block_size=4, max_num_seqs=1), 400)
    run = world(requests_of([0] * 20, [40] * 20, [3] * 20), (prefill, decode), duration_s=1.0)
    found = run.run()
    tables = Tables(found, run.serving, ("a", "b", "c"), None, {}).all()
    log, until_s = found.log.columns(), min(1.0, found.end_ps / PS_PER_S)
    held_s = min(found.requests[0].first_ps / PS_PER_S, 1.0) * 20  # while prompts are computed, and until handed over
    waits = found.stages[2].mean_between(0, int(until_s * PS_PER_S)) * until_s
    share = (held_s + waits) * 10 / 400 / until_s
    assert tables["units"]["kv_mean"][0] == pytest.approx(share, rel=1e-6)
    assert float(np.mean(tables["timeline"]["kv"][:100])) * 1.0 == pytest.approx(share * until_s, rel=1e-6)
    assert int((log["group"] == 0).sum()) == 1  # nothing of this in iterations


def test_room_reserved_for_a_cache_on_its_way_counts() -> None:
    """50 tokens at 1 ms each, to a group that does nothing meanwhile."""
    prefill, decode = unit("p", role="prefill", block_size=1), unit("d", role="decode", block_size=1)
    rests = serve(requests_of([0], [50], [2]), sizes_of(prefill, rate=1e6), sizes_of(decode, rate=1e6)).log.rests()
    for group in range(2):
        (row,) = np.flatnonzero(rests["group"] == group)
        assert rests["used_blocks"][row] == 50 and rests["end_ps"][row] - rests["start_ps"][row] == 50 * MS + 3 * US


def test_the_queue_counts_while_a_group_recovers() -> None:
    dies = Fault(at_s=0.1, unit="u", rank=1, kind="dead_rank", recovery_s=0.5, load_bytes_per_s=1e15)
    arrivals = [i * 10 * MS for i in range(90)]
    run = world(requests_of(arrivals, [10] * 90, [1] * 90), (sizes_of(unit(ranks=2)),), duration_s=1.0, faults=(dies,))
    found = run.run()
    timeline = Tables(found, run.serving, ("a", "b", "c"), None, {}).all()["timeline"]
    begin_s = found.faults[0]["time_s"]
    assert begin_s < 0.13 and found.faults[0]["paused_s"] == pytest.approx(0.5, abs=1e-4)
    for at, queue in zip(timeline["time_s"], timeline["queue"], strict=True):
        if begin_s + 0.02 < at < 0.58:  # an arrival in every bin of 10 ms
            assert queue == pytest.approx((at - begin_s) * 100, abs=2.5)


def test_spreads_bins_and_goals() -> None:
    assert weighted_spread(np.array([1.0, 9.0]), np.ones(2))["p50"] == 1.0
    values = np.array([5.0, 1.0, 3.0])
    assert weighted_spread(values, np.array([1.0, 1.0, 2.0])) == {"mean": 3.0, "p50": 3.0, "p90": 5.0, "p99": 5.0}
    assert np.isnan(spread(values[:0])["p99"]) and np.isnan(weighted_spread(values, np.zeros(3))["mean"])
    parts = binned(np.array([0, 10]), np.array([4, 20]), np.array([2.0, 1.0]), np.array([0, 2, 15, 40]))
    assert parts.tolist() == [4.0, 9.0, 5.0]
    kept = meets(np.array([1.0, 3.0]), np.array([np.nan, 0.1]), np.array([9.0, 9.0]), (2.0, 0.2, None))
    assert kept.tolist() == [True, False]


def test_gaps_between_tokens_are_counted_for_every_token() -> None:
    """Every token but a request's first has one gap, and the gaps of a request sum to what its tokens took."""
    draw = stream(0, "test", "gaps")
    arrival = np.cumsum(draw.integers(1, 30 * MS, 80)).tolist()
    inputs, outputs = draw.integers(1, 60, 80).tolist(), draw.integers(1, 40, 80).tolist()
    for chunked in (True, False):
        one = unit(block_size=4, chunked_prefill=chunked)
        found = serve(requests_of(arrival, inputs, outputs), sizes_of(one, 40))
        gaps, weights = found.log.token_gaps()
        assert weights.sum() == sum(outputs) - 80
        assert (gaps * weights).sum() == sum(r.end_ps - r.first_ps for r in found.requests)
        assert sum(r.preemptions for r in found.requests) > 0


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ("serving.units.0.max_num_batched_tokens=127", "must be >= max_num_seqs x (1 + speculative_tokens) = 128"),
        ("serving.units.0.cache_store_tokens=9", "set prefix_cache: shared"),
        ("serving.slo.ttft_s=1", "has no meaning at decode units alone"),
    ],
)
def test_rules_of_units(change: str, rule: str) -> None:
    path = Path(__file__).resolve().parents[1] / "scenarios/v3_decode.yaml"
    assert load(path, ["serving.units.0.max_num_batched_tokens=128"]).serving is not None
    with pytest.raises(ScenarioError) as found:
        load(path, [change])
    assert rule in str(found.value)
