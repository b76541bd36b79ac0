"""Replicas, first plans and rebalancing in runs of steps; arenas; traffic matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sim
from sim.conservation import ConservationError, check_replicas
from sim.hosting import balancedness, coactivation, forecast
from sim.placement import Placement, moved_slots, moves
from sim.plugin import members
from sim.repaid import repaid
from sim.replicas import ReplicaChoice
from sim.settings import Rebalance
from sim.slots import Slots
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
    assert (run([calm]).steps.moved_bytes == 0).all()


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
    history, ages = np.arange(1.0, 9.0).reshape(8, 1, 1), np.arange(7.0, -1, -1)

    def ask(**rule: Any) -> list[float]:
        known = Rebalance(interval_steps=2, **rule)
        return forecast(history, ages, known, interval=2, window=2, period=6).ravel().tolist()

    assert ask() == [7, 8]
    assert ask(forecast="periodic") == [3, 4]  # now is step 8; steps 2 and 3 lie one period before 8 and 9
    assert ask(forecast="ema", ema_decay=0.25) == [(i + 1) * 0.5 ** (7 - i) for i in range(8)]


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
    assert repaid(run([still])) == []
