"""Replicas, first plans and rebalancing in runs of steps; arenas; traffic matrices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sim
from sim.cluster import build_network
from sim.conservation import ConservationError, check_replicas
from sim.engine.moves import transfer
from sim.hosting import Hosting, balancedness, coactivation, forecast
from sim.placement import Observed, Placement, moved_slots, moves
from sim.placement.eplb import Eplb
from sim.plugin import members
from sim.replicas import ReplicaChoice
from sim.report import terminal
from sim.report.repaid import repaid
from sim.settings import Rebalance
from sim.slots import Slots
from sim.units import human
from tests.strategies import seeds

TINY = str(Path(__file__).resolve().parents[1] / "scenarios" / "tiny.yaml")
FORWARD = {"schedule.phase": "forward", "replicas": 1, "steps.count": 3, "traffic.topic_tree.0.popularity_sd": 1.0}


def run(policies: list[dict[str, Any]], **changes: Any) -> Any:
    return sim.run(TINY, overrides=FORWARD | {"policies": policies} | changes)


def eplb(name: str = "eplb", redundant: int = 8, **more: Any) -> dict[str, Any]:
    return {"name": name, "placement": {"kind": "eplb", "num_redundant_experts": redundant}, **more}


@pytest.mark.parametrize("rule", sorted(members(ReplicaChoice)))
def test_every_replica_choice_serves_every_pair(rule: str) -> None:
    result = run([{"name": "linear"}, eplb(replicas=rule)])
    received = result.devices.groupby("policy").expert_tokens.sum()
    assert received["linear"] == received["eplb"] == 8 * 256 * 4 * 3
    assert (result.experts[result.experts.policy == "eplb"].groupby("layer").replicas.sum() == 40).all()


@pytest.mark.parametrize("kind", sorted(members(Placement)))
def test_every_placement_runs_with_the_same_tokens(kind: str) -> None:
    result = run([{"name": "first"}, {"name": kind, "placement": {"kind": kind, "num_redundant_experts": 16}}])
    tokens = result.experts.groupby(["layer", "expert"]).tokens
    assert (tokens.nunique() == 1).all()


def test_a_plan_from_history_balances_devices_and_only_them() -> None:
    result = run([{"name": "linear"}, eplb(redundant=0, name="moved"), eplb(replicas="least_loaded")])
    steps = result.steps.groupby("policy")
    assert steps.max_vio.mean().round(12).nunique() == 1
    spread = steps.device_max_over_mean.mean()
    assert spread["eplb"] < spread["moved"] < spread["linear"]
    assert spread["eplb"] < 1 + 0.35 * (spread["linear"] - 1)


def test_experts_move_at_their_interval_and_their_bytes_are_counted() -> None:
    late = eplb(rebalance={"interval_steps": 2, "history_steps": 0})
    result = run([late], **{"steps.count": 5, "steps.timed": "all"})
    steps = result.steps
    assert (steps.moved_bytes > 0).tolist() == [False, False, True, False, True]
    weights = 3 * 1024 * 512  # of one expert, fp8
    assert (steps.moved_bytes % weights == 0).all()
    assert np.allclose(steps.step_and_moves_s - steps.step_time_s, steps.move_s)
    hidden = run([late | {"rebalance": late["rebalance"] | {"transfer": "background"}}], **{"steps.timed": "all"}).steps
    assert 0 < hidden.step_and_moves_s[2] - hidden.step_time_s[2] < hidden.move_s[2]


def test_a_balanced_layer_keeps_its_map() -> None:
    calm = eplb(rebalance={"interval_steps": 1, "threshold": 0.3})
    assert (run([calm], **{"steps.timed": "all"}).steps.moved_bytes == 0).all()


@given(seeds, st.sampled_from([(1, 4), (2, 4), (4, 2), (8, 8)]), st.integers(1, 3))
def test_moves_come_from_a_rank_that_held_the_expert(seed: int, size: tuple[int, int], per_rank: int) -> None:
    ranks, per_node = size
    rng = np.random.default_rng(seed)
    slots = Slots(ranks * per_rank, ranks, ranks_per_node=per_node)
    before, after = (rng.permutation(slots.n_slots).astype(np.int32) for _ in range(2))
    sent = moves(before, after, slots)
    assert sent.sum() == moved_slots(before, after, slots) and (np.diag(sent) == 0).all()
    arrived = [
        len(set(new) - set(old))
        for old, new in zip(before.reshape(ranks, -1).tolist(), after.reshape(ranks, -1).tolist(), strict=True)
    ]
    assert sent.sum(axis=0).tolist() == arrived
    assert moves(before, before, slots).sum() == 0


def test_moves_prefer_the_node() -> None:
    slots = Slots(2, 4, 2, ranks_per_node=2)
    sent = moves(np.array([0, 1, 0, 1], np.int32), np.array([1, 1, 1, 1], np.int32), slots)
    assert np.argwhere(sent).tolist() == [[1, 0], [3, 2]]


def test_forecasts() -> None:
    ages = np.arange(7.0, -1, -1)

    def ask(**rule: Any) -> list[float]:
        known = Rebalance(interval_steps=2, **rule)
        return forecast(ages, known, interval=2, window=2, period=6).tolist()

    assert ask() == [0] * 6 + [1, 1]
    assert ask(forecast="periodic") == [0, 0, 1, 1, 0, 0, 0, 0]  # now is step 8; 2 and 3 lie one period before 8 and 9
    assert ask(forecast="ema", ema_decay=0.25) == [0.5 ** (7 - i) for i in range(8)]


def test_balancedness_is_mean_over_max() -> None:
    slots = Slots(4, 2)
    load = np.array([3.0, 1.0, 2.0, 0.0])
    assert balancedness(load, np.arange(4, dtype=np.int32), slots) == pytest.approx(3 / 4)
    assert balancedness(load, np.array([0, 3, 1, 2], np.int32), slots) == pytest.approx(1.0)


@given(seeds)
def test_coactivation_counts_tokens_with_both(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = np.array([rng.permutation(6)[:3] for _ in range(20)], np.int16)
    ids[rng.random(ids.shape) < 0.2] = -1
    found = coactivation(ids, 6)
    for a in range(6):
        for b in range(6):
            assert found[a, b] == sum(a in row and b in row for row in ids.tolist())


def test_a_lost_token_is_noticed() -> None:
    where, kept = np.array([0, 1, 0], np.int32), np.array([[3, 2]], np.int64)
    check_replicas(np.array([[1, 2, 2]], np.int64), where, kept)
    with pytest.raises(ConservationError, match="C5"):
        check_replicas(np.array([[1, 2, 1]], np.int64), where, kept)


def test_an_arena_is_the_scenario_of_its_policies() -> None:
    own = {"name": "own", "parallel": {"ep_size": 4}}
    both = run([{"name": "first"}, own])
    alone = run([{"name": "own"}], **{"parallel.ep_size": 4, "steps.warmup.ranks": 4})
    for table in ("steps", "layers", "devices", "experts"):
        mine = getattr(both, table)
        mine = mine[mine.policy == "own"].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, getattr(alone, table))


def test_refusals_name_the_policy() -> None:
    bad = [eplb(redundant=9), {"name": "b", "parallel": {"ep_size": 64}}, {"name": "c", "rebalance": {"interval_s": 1}}]
    with pytest.raises(sim.ScenarioError) as error:
        run(bad)
    text = str(error.value)
    assert "policies.0.placement.num_redundant_experts: 32 + 9 slots must be a multiple of ep_size = 8" in text
    assert "policies.1.parallel.ep_size: 64 ranks need as many devices" in text
    assert "policies.2.rebalance.interval_s" in text
    with pytest.raises(sim.ScenarioError, match=r"needs steps\.timed: all"):
        run([eplb(rebalance={"interval_steps": 1})])
    with pytest.raises(sim.ScenarioError, match="replicas are for phase: forward"):
        run([eplb()], **{"schedule.phase": "training"})


@pytest.mark.parametrize("mode", ["normal", "low_latency"])
def test_matrices_hold_the_bytes_of_the_step(mode: str) -> None:
    result = run([{"name": "a"}, eplb()], **{"steps.record_traffic": True, "cost.mode": mode})
    last = result.steps[result.steps.step == 2].set_index("policy")
    pairs, nodes, links = (pd.DataFrame(result.tables[name]) for name in ("pairs", "node_pairs", "links"))
    crossing = nodes[nodes.source_node != nodes.destination_node].groupby("policy")
    between = crossing.dispatch_bytes.sum() + crossing.combine_bytes.sum()
    assert between.to_dict() == last.inter_node_bytes.to_dict()
    out = links[links.link.str.match(r"gpu:\d+->nic")].groupby("policy")["bytes"].sum()
    assert out.to_dict() == last.inter_node_bytes.to_dict()
    tokens = 3 * 8 * 256
    per_token = pairs.groupby("policy").dispatch_bytes.sum() / (tokens * (1024 + 4 * 8))
    wanted = last.devices_per_token if mode == "normal" else last.experts_per_token
    assert np.allclose(per_token[["a", "eplb"]], wanted[["a", "eplb"]])


def test_moves_are_repaid_after_cost_over_gain() -> None:
    still = eplb("still", rebalance={"history_steps": 0})
    moving = eplb("moving", rebalance={"history_steps": 0, "interval_steps": 2})
    result = run([{"name": "linear"}, still, moving], **{"steps.count": 6, "steps.timed": "all"})
    (row,) = repaid(result)
    steps = result.steps.set_index(["policy", "step"])
    here, there = steps.loc["moving"].loc[2:], steps.loc["still"].loc[2:]
    assert (row.policy, row.against, row.moves) == ("moving", "still", 2)
    assert row.cost_s == pytest.approx(here.move_s[here.moved_bytes > 0].mean())
    assert row.gain_s == pytest.approx(there.step_time_s.mean() - here.step_time_s.mean()) and row.gain_s > 0
    assert row.steps == pytest.approx(row.cost_s / row.gain_s)
    assert f"shortens later steps by {human(row.gain_s, 's')} against still (mean of 2): repaid in" in terminal(
        result
    ).replace("\n  ", " ")
    assert repaid(run([still])) == []


def hosting(policy: dict[str, Any], **changes: Any) -> Hosting:
    scenario = sim.load(TINY, [f"{k}={json.dumps(v)}" for k, v in (FORWARD | {"policies": [policy]} | changes).items()])
    return Hosting(scenario, scenario.policies[0], 0, 0)


def loads(seed: int) -> Any:
    return np.random.default_rng(seed).integers(1, 1000, 32)


def test_a_first_plan_is_free_and_whole() -> None:
    """Few moves at a time are for later plans."""
    few = {"name": "few", "placement": {"kind": "incremental", "num_redundant_experts": 8, "max_moves": 0}}
    found = hosting(few)
    found.observe(loads(1), None)
    found.first_plan()
    fresh = Eplb(num_redundant_experts=8).place(found.slots, Observed(loads(1).astype(float)[None, None]), None)  # type: ignore[arg-type]
    assert found.map.tolist() == fresh[0].tolist()


def test_plans_see_their_window_and_moves_go_from_old_to_new() -> None:
    rule = {"interval_steps": 2, "window_steps": 3, "history_steps": 0}
    found = hosting(eplb(rebalance=rule), **{"steps.timed": "all"})
    for step in range(4):
        found.observe(loads(step), None)
    before = found.map
    found.begin(4)
    seen = Observed(np.stack([loads(step).astype(float)[None] for step in (1, 2, 3)]))
    assert found.map.tolist() == Eplb(num_redundant_experts=8).place(found.slots, seen, None)[0].tolist()  # type: ignore[arg-type]
    assert found.moved is not None and found.moved.tolist() == moves(before, found.map, found.slots).tolist()
    assert found.moved.tolist() != moves(found.map, before, found.slots).tolist()
    found.begin(5)
    assert found.moved is None


@pytest.mark.parametrize(("above", "moved"), [(-1e-9, False), (1e-9, True)])
def test_the_threshold_is_the_balance_below_which_experts_move(above: float, moved: bool) -> None:
    tokens = loads(3)
    still = hosting(eplb(rebalance={"history_steps": 0}))
    at = float(balancedness(tokens.astype(float), still.map, still.slots))
    rule = {"interval_steps": 1, "history_steps": 0, "threshold": at + above}
    found = hosting(eplb(rebalance=rule), **{"steps.timed": "all"})
    found.observe(tokens, None)
    found.begin(1)
    assert (found.moved is not None) == moved


def test_coactivation_is_counted_in_the_same_window_as_loads() -> None:
    rule = {"interval_steps": 1, "history_steps": 0, "forecast": "periodic", "period_steps": 3}
    found = hosting({"name": "c", "placement": "coactivation", "rebalance": rule}, **{"steps.timed": "all"})
    for step in range(4):
        found.observe(loads(step), np.full((32, 32), float(step)))
    weights = forecast(np.arange(2.0, -1, -1), found.rule, interval=1, window=1, period=3)
    seen = found._observed(weights)
    assert weights.tolist() == [1, 0, 0] and seen.coactivation is not None
    assert seen.expert_tokens[0, 0].tolist() == loads(1).tolist() and (seen.coactivation == 1).all()


def test_nothing_is_remembered_that_no_plan_will_see() -> None:
    found = hosting({"name": "c", "placement": "coactivation", "rebalance": {"history_steps": 0}})
    for step in range(5):
        found.observe(loads(step), np.zeros((32, 32)))
    assert not found.loads and not found.pairs


def test_the_nearer_holder_sends_though_it_is_busier() -> None:
    slots = Slots(4, 4, 4, ranks_per_node=2)
    before = np.array([0, 1, 2, 3, 0, 1, 2, 3], np.int32)  # ranks 0 and 2 hold 0 and 1, ranks 1 and 3 hold 2 and 3
    after = np.array([0, 1, 0, 1, 0, 1, 2, 3], np.int32)  # rank 1 takes 0 and 1: both from rank 0, its neighbour
    assert np.argwhere(moves(before, after, slots)).tolist() == [[0, 1]] and moves(before, after, slots)[0, 1] == 2
    twice = np.array([0, 1, 0, 0, 0, 1, 2, 3], np.int32)
    assert moves(before, twice, slots).sum() == 1 and moved_slots(before, twice, slots) == 2
    apart = Slots(4, 4, 4, ranks_per_node=4)
    sent = moves(before, np.array([0, 1, 0, 1, 0, 1, 0, 1], np.int32), apart)
    assert sent[[0, 2]].sum(axis=1).tolist() == [2, 2], "two holders share what they send"


def test_layers_move_chunk_after_chunk() -> None:
    scenario = sim.load(TINY, [f"{k}={json.dumps(v)}" for k, v in FORWARD.items()])
    network = build_network(scenario.cluster, 8)
    sent = [np.zeros((8, 8), np.int64) for _ in range(3)]
    sent[0][0, 4], sent[1][1, 5], sent[2][0, 4] = 1, 2, 3

    def seconds(chunk: int, layers: Any = sent) -> float:
        rule = {"layers_per_chunk": chunk}
        policy = scenario.policies[0].model_copy(update={"rebalance": Rebalance(**rule)})
        return transfer(scenario, policy, network, layers).transfer_s

    alone = [seconds(1, [layer]) for layer in sent]
    assert seconds(1) == pytest.approx(sum(alone))
    assert seconds(2) == pytest.approx(seconds(1, [sent[0] + sent[1]]) + alone[2])
    assert seconds(3) == pytest.approx(seconds(1, [sent[0] + sent[1] + sent[2]]))


def test_tables_of_arenas_keep_the_order_of_policies() -> None:
    own = {"name": "own", "parallel": {"ep_size": 4}}
    result = run([own, {"name": "second"}, {"name": "third", "parallel": {"ep_size": 4}}])
    assert list(dict.fromkeys(result.steps.policy)) == ["own", "second", "third"]
    assert list(dict.fromkeys(result.layers.policy)) == ["own", "second", "third"]


def test_combines_take_the_links_back_and_training_passes_twice() -> None:
    """All tokens want the same experts, so nodes do not send as much as they get."""
    skew = {"name": "a", "select": {"kind": "hash"}}
    changes = {"steps.record_traffic": True, "steps.count": 1, "traffic.vocabulary": {"size": 1}}
    changes["model.num_experts_per_tok"] = 1
    forward = run([skew], **changes)
    links, nodes = (pd.DataFrame(forward.tables[name]) for name in ("links", "node_pairs"))
    out = (
        links[links.link.str.match(r"gpu:\d+->nic")].set_index("link")["bytes"].groupby(lambda n: int(n[4]) // 4).sum()
    )
    away = nodes[nodes.source_node != nodes.destination_node]
    sent = away.set_index("source_node").dispatch_bytes + away.set_index("destination_node").combine_bytes
    assert out.to_dict() == sent.to_dict() and out[0] != out[1]
    training = run([skew], **changes, **{"schedule.phase": "training"})
    assert pd.DataFrame(training.tables["links"])["bytes"].sum() == 2 * links["bytes"].sum()


def test_recorded_traffic_without_a_history_is_refused_at_the_policy(tmp_path: Path) -> None:
    ids = np.argsort(np.random.default_rng(0).random((4, 64, 32)), axis=2)[:, :, :4].astype(np.int16)
    np.savez(tmp_path / "t.npz", topk_ids=ids)
    replay = {"kind": "replay", "path": str(tmp_path / "t.npz"), "tokens_per_rank": 2}
    policy = eplb(select="recorded")
    changes = {"schedule.phase": "forward", "steps.count": 1, "replicas": 1, "traffic": replay}
    changes |= {"steps.warmup.steps": 0, "schedule.micro_batches": 1}
    with pytest.raises(sim.ScenarioError, match=r"policies.0.rebalance.history_steps: .*warmup_steps"):
        sim.run(TINY, overrides=changes | {"policies": [policy]})
    started = [policy | {"rebalance": {"history_steps": 0}}]
    assert len(sim.run(TINY, overrides=changes | {"policies": started}).steps) == 1
    replay["warmup_steps"] = 1
    assert len(sim.run(TINY, overrides=changes | {"policies": [policy]}).steps) == 1
