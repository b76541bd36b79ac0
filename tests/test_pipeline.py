"""Pipelined training steps: schedules against their published bubbles, engines against each other, laws of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import sim
from sim.cluster import build_network
from sim.cost.collectives import all_gather_s, all_reduce_s, point_to_point_s, reduce_scatter_s
from sim.engine import des, maxplus, pipeline
from sim.engine.chunks import ChunkTimes
from sim.engine.durations import Durations
from sim.engine.step import PARTS, hop_s, optimizer_s, pipelined_step, programs
from sim.engine.training import Work, build_plan
from sim.exchange import Exchange
from sim.loading import load
from sim.model import Model
from sim.pipeline import Chunk, Pass, Pipeline, alive, passes, split_layers
from sim.pipeline.blocks import block_parameters, layer_blocks, model_blocks
from sim.plugin import make, members
from sim.rollout import Task
from sim.rollout import run as roll

ROOT = Path(__file__).resolve().parents[1]
KINDS = [kind for kind in members(Pipeline) if kind != "none"]
PIPELINED = [
    "replicas=1", "steps.count=1", "steps.warmup.steps=2", "cluster.nodes=8", "parallel.pp_size=4",
    "schedule.micro_batches=16", "schedule.overlap=none", "schedule.pipeline=dualpipe",
]  # fmt: skip


def timeline(kind: str, pp_size: int, micro_batches: int, times: dict[str, int], hop: int = 0) -> tuple[int, list[int]]:
    """Return the makespan and every rank's idle time; ``times`` by kind of chunk. Both engines must agree."""
    rule = make(Pipeline, kind)
    plan = [rule.program(rank, pp_size, micro_batches) for rank in range(pp_size)]
    spent = [np.array([times[chunk.kind] for chunk in program], dtype=np.int64) for program in plan]
    found, events = pipeline.recurrence(plan, spent, hop), pipeline.simulate(plan, spent, hop)
    for a, b in zip(found.start_ps + found.end_ps, events.start_ps + events.end_ps, strict=True):
        np.testing.assert_array_equal(a, b)
    return found.makespan_ps, [found.makespan_ps - int(t.sum()) for t in spent]


def chunk_times(f: int, i: int, w: int, both: int) -> dict[str, int]:
    return {"forward": f, "backward": i + w, "input_gradients": i, "weight_gradients": w, "overlapped": both}


@pytest.mark.parametrize("f, i, w", [(10, 10, 10), (10, 12, 8), (58, 60, 42)])
@pytest.mark.parametrize("pp_size", [2, 4, 8, 16])
def test_published_bubbles(pp_size: int, f: int, i: int, w: int) -> None:
    b = i + w
    both = (f + b) * 5 // 6
    times = chunk_times(f, i, w, both)
    n = 4 * pp_size
    assert timeline("1f1b", pp_size, n, times)[1] == [(pp_size - 1) * (f + b)] * pp_size
    assert timeline("zb1p", pp_size, n, times)[1] == [(pp_size - 1) * (f + b - 2 * w)] * pp_size
    # DualPipe's README: (PP/2 - 1)(F&B + B - 3W). It is reached where F = I = W, and an upper bound elsewhere.
    bubbles = timeline("dualpipe", pp_size, n, times)[1]
    bound = (pp_size // 2 - 1) * (both + b - 3 * w)
    assert max(bubbles) <= bound
    if f == i == w:
        assert max(bubbles) == bound


@given(st.sampled_from(KINDS), st.integers(1, 5), st.integers(0, 20), st.tuples(*[st.integers(1, 60)] * 4), st.integers(0, 40))
def test_every_schedule_finishes_and_serves_everybody_once(
    kind: str, half: int, more: int, t: tuple[int, int, int, int], hop: int
) -> None:
    pp_size, n = 2 * half, 4 * half + 2 * more
    rule = make(Pipeline, kind)
    assert not list(rule.problems(pp_size, n))
    timeline(kind, pp_size, n, chunk_times(*t), hop)
    forward: list[Pass] = []
    inputs: list[Pass] = []
    weights: list[Pass] = []
    for rank in range(pp_size):
        for chunk in rule.program(rank, pp_size, n):
            forward += [p for p, backward in passes(chunk) if not backward]
            inputs += [p for p, backward in passes(chunk) if backward]
            if chunk.backward and chunk.kind != "input_gradients":
                weights.append(chunk.backward)
            assert {p.stage for p, _ in passes(chunk)} <= set(rule.stages(rank, pp_size))
    everything = sorted(Pass(m, s) for m in range(n) for s in range(pp_size))
    assert sorted(forward) == sorted(inputs) == sorted(weights) == everything


def test_a_pipeline_that_waits_for_ever_is_named() -> None:
    plan = [[Chunk("backward", backward=Pass(0, 0))], [Chunk("forward", forward=Pass(0, 1))]]
    times = [np.ones(1, dtype=np.int64)] * 2
    for engine in (pipeline.recurrence, pipeline.simulate):
        with pytest.raises(ValueError, match="stands still"):
            engine(plan, times, 0)


def test_activations_alive() -> None:
    def most(kind: str, pp_size: int) -> list[float]:
        rule = make(Pipeline, kind)
        return [alive(rule.program(rank, pp_size, 4 * pp_size), [1.0] * pp_size) for rank in range(pp_size)]

    assert most("1f1b", 8) == [8, 7, 6, 5, 4, 3, 2, 1]
    assert max(most("zb1p", 8)) == 8  # as 1F1B
    assert max(most("dualpipe", 8)) == 9  # DualPipe's README: PP + 1


@given(st.lists(st.integers(1, 20), min_size=1, max_size=9), st.integers(1, 9))
def test_layers_are_split_as_evenly_as_can_be(cost: list[int], stages: int) -> None:
    from itertools import combinations

    n = len(cost)
    if stages > n:
        with pytest.raises(ValueError, match="cannot fill"):
            split_layers(tuple(map(float, cost)), stages)
        return
    cuts = split_layers(tuple(map(float, cost)), stages)
    assert [i for cut in cuts for i in cut] == list(range(n)) and all(len(cut) for cut in cuts)

    def value(bounds: Sequence[int]) -> tuple[int, int]:
        sums = [sum(cost[a:b]) for a, b in zip([0, *bounds], [*bounds, n], strict=True)]
        return max(sums), sum(s * s for s in sums)

    best = min(value(bounds) for bounds in combinations(range(1, n), stages - 1))
    assert value([cut.start for cut in cuts[1:]]) == best


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "dense_37b", "mixtral_8x7b", "switch_base_128"])
@pytest.mark.parametrize("mtp", [False, True])
def test_blocks_hold_all_parameters(name: str, mtp: bool) -> None:
    from ruamel.yaml import YAML

    model = Model.model_validate(YAML(typ="safe", pure=True).load(ROOT / "scenarios" / "models" / f"{name}.yaml"))
    blocks = model_blocks(model, mtp)
    dense, experts = map(sum, zip(*(block_parameters(model, block) for block in blocks), strict=True))
    assert dense + experts == model.total_parameters + (model.mtp_parameters if mtp else 0)
    assert experts >= model.parameters.routed_experts


def rows(overrides: Sequence[str] = (), jobs: int = 1) -> dict[str, dict[str, float]]:
    steps = sim.run(ROOT / "scenarios" / "tiny.yaml", overrides=[*PIPELINED, *overrides], jobs=jobs).tables["steps"]
    return {name: {k: v[i] for k, v in steps.items()} for i, name in enumerate(steps["policy"])}


@pytest.fixture(scope="module")
def base() -> dict[str, dict[str, float]]:
    return rows()


def test_parts_of_a_pipelined_step_sum_to_it(base: dict[str, dict[str, float]]) -> None:
    for row in base.values():
        assert sum(row[f"{part}_s"] for part in PARTS) == pytest.approx(row["step_time_s"], rel=1e-12)
        assert min(row[f"{part}_s"] for part in PARTS) > 0
        tokens = 256 * 8
        assert row["tokens_per_day"] == pytest.approx(tokens / row["step_time_s"] * 86400)
        assert row["gpu_hours_per_trillion"] == pytest.approx(4 * 8 * row["step_time_s"] / tokens * 1e12 / 3600)
        assert row["usd_per_trillion"] == pytest.approx(2 * row["gpu_hours_per_trillion"])


def test_both_engines_and_two_processes_give_the_same_step(base: dict[str, dict[str, float]]) -> None:
    assert rows(["schedule.engine=max_plus"]) == base
    assert rows(jobs=2) == base


def test_a_straggler_holds_up_the_pipeline_and_costs_more_the_slower_it_is(base: dict[str, dict[str, float]]) -> None:
    slow = [rows([f"stragglers=[{{device: 9, slowdown: {factor}}}]"]) for factor in (1.5, 3.0)]
    for policy, row in base.items():
        times = [row["step_time_s"], slow[0][policy]["step_time_s"], slow[1][policy]["step_time_s"]]
        assert times[0] < times[1] < times[2]
        # Its own stage works longer, the others wait.
        assert slow[1][policy]["bubble_s"] > row["bubble_s"]
    one = rows(["stragglers=[{device: 9, slowdown: 1}]"])
    assert one == base


def test_more_groups_are_more_tokens_in_about_the_same_time(base: dict[str, dict[str, float]]) -> None:
    two = rows(["parallel.dp_size=16", "cluster.nodes=16"])
    for policy, row in two.items():
        assert row["tokens_per_day"] / base[policy]["tokens_per_day"] == pytest.approx(2, rel=0.2)
        assert row["step_time_s"] >= base[policy]["step_time_s"] * 0.95


def test_recomputing_everything_costs_a_forward(base: dict[str, dict[str, float]]) -> None:
    again = rows(["schedule.recompute=full", "schedule.pipeline=1f1b"])
    once = rows(["schedule.pipeline=1f1b"])
    for policy, row in again.items():
        extra = row["backward_s"] - once[policy]["backward_s"]
        assert extra == pytest.approx(once[policy]["forward_s"], rel=0.02)


def test_mtp_modules_are_run_when_wanted() -> None:
    mtp = ["model.num_nextn_predict_layers=1"]
    without, with_ = rows([*mtp, "schedule.mtp=false"]), rows(mtp)
    for policy, row in without.items():
        assert with_[policy]["step_time_s"] > row["step_time_s"]
        assert with_[policy]["max_vio"] == row["max_vio"]  # its routing is the last layer's, counted once


@pytest.fixture(scope="module")
def overlapped() -> tuple[Work, ChunkTimes]:
    """Sixteen micro-batches of one EP group, and the chunks of a stage that is the whole model."""
    scenario = load(ROOT / "scenarios" / "tiny.yaml", [*PIPELINED, "schedule.overlap=forward_backward"])
    policy, network = scenario.policies[0], build_network(scenario.cluster, 8)
    counts = [c for c in roll(Task(scenario, (0,), 0, range(3))) if c.policy == 0]
    exchanges = {c.layer: Exchange.stack(c.exchanges[0]) for c in counts}
    chunks = ChunkTimes(scenario, policy, network, {0: layer_blocks(scenario.model)}, exchanges)
    return Work(scenario, policy, network, [c.exchanges[0] for c in counts]), chunks


def test_a_chunk_is_a_plan(overlapped: tuple[Work, ChunkTimes]) -> None:
    """The array recurrence over many chunks gives each the makespan of its own plan, to the picosecond."""
    work, chunks = overlapped
    one = work.scenario.model_copy(
        update={
            "schedule": work.scenario.schedule.model_copy(update={"micro_batches": 1}),
            "traffic": work.scenario.traffic.model_copy(update={"tokens_per_rank": 16}),
        }
    )
    found = chunks.times_ps([Chunk("overlapped", Pass(m, 0), Pass(m, 0)) for m in range(16)], 0, np.ones(8))
    for m in range(16):
        plan = build_plan(Work(one, work.policy, work.network, [[layer[m]] for layer in work.exchanges]))
        assert des.simulate(plan).makespan_ps == found[m]
    assert len(set(found.tolist())) > 8


def test_ranks_that_run_in_step_between_chunks_err_by_little(overlapped: tuple[Work, ChunkTimes]) -> None:
    work, chunks = overlapped
    exact = maxplus.simulate(build_plan(work)).makespan_ps
    pairs = [Chunk("overlapped", Pass((m + 1) % 16, 0), Pass(m, 0)) for m in range(16)]
    in_step = int(chunks.times_ps(pairs, 0, np.ones(8)).sum())
    assert exact <= in_step <= 1.03 * exact


def test_every_group_has_its_own_exchanges(overlapped: tuple[Work, ChunkTimes]) -> None:
    work, chunks = overlapped
    scenario = work.scenario.model_copy(
        update={
            "schedule": work.scenario.schedule.model_copy(update={"micro_batches": 8}),
            "traffic": work.scenario.traffic.model_copy(update={"tokens_per_rank": 128}),
        }
    )
    pairs = [Chunk("overlapped", Pass(m, 0), Pass(m, 0)) for m in range(8)]
    both = ChunkTimes(scenario, work.policy, work.network, chunks.stages, chunks.exchanges)
    found = [both.times_ps(pairs, group, np.ones(8)) for group in range(2)]
    assert found[0].tolist() != found[1].tolist()
    for group in range(2):
        part = slice(8 * group, 8 * group + 8)
        own = {i: Exchange.stack([e for e in layer[part]]) for i, layer in enumerate(work.exchanges)}
        alone = ChunkTimes(scenario, work.policy, work.network, chunks.stages, own)
        np.testing.assert_array_equal(alone.times_ps(pairs, 0, np.ones(8)), found[group])


def test_hops_count_once_per_stage() -> None:
    # One micro-batch down two stages and back: F 1, hop 10, F 1, B 2, hop 10, B 2.
    rule = make(Pipeline, "1f1b")
    plan = [rule.program(rank, 2, 1) for rank in range(2)]
    times = [np.array([1, 2], dtype=np.int64)] * 2
    assert pipeline.recurrence(plan, times, 10).makespan_ps == 26
    assert pipeline.recurrence(plan, times, 0).makespan_ps == 6


def test_optimizer_and_hops_by_hand() -> None:
    """Two groups on each of four stages, nodes of four devices: DualPipe keeps every stage twice, in other nodes."""
    scenario = load(ROOT / "scenarios" / "tiny.yaml", [*PIPELINED, "parallel.dp_size=16", "cluster.nodes=16"])
    policy, model, cluster = scenario.policies[0], scenario.model, scenario.cluster
    assert hop_s(scenario, policy) == pytest.approx(float(point_to_point_s(cluster, 16 * 1024 * 2)))
    # What the ranks (r, 3 - r) hold; the heaviest pair counts. 16 ranks per stage x 2 copies share dense parameters.
    stages = scenario.stages(policy)
    slowest = 0.0
    for mine in ((0, 3), (1, 2)):
        held = [block_parameters(model, block) for stage in mine for block in stages[stage]]
        dense, experts = sum(d for d, _ in held), sum(e for _, e in held) / 8
        bandwidth = cluster.device.memory_bandwidth_bytes_per_s
        seconds = sum(
            float(reduce_scatter_s(cluster, n, 4 * size, beside)) + float(all_gather_s(cluster, n, 2 * size, beside))
            for size, n, beside in ((dense, 32, 4), (experts, 4, 1))
        )
        moved = 22 * (dense / 32 + experts / 4)
        slowest = max(slowest, seconds)
        assert optimizer_s(scenario, policy) >= seconds + moved / bandwidth * 0.9
    assert optimizer_s(scenario, policy) == pytest.approx(slowest, rel=0.01)


def test_a_step_waits_for_its_slowest_group() -> None:
    scenario = load(ROOT / "scenarios" / "tiny.yaml", [*PIPELINED, "parallel.dp_size=16", "cluster.nodes=16"])
    policy = scenario.policies[0]
    plan = programs(scenario, policy)

    def step(*per_chunk_ps: int) -> dict[str, Any]:
        times = {
            (rank, group): np.full(len(program), spent, dtype=np.int64)
            for rank, program in enumerate(plan)
            for group, spent in enumerate(per_chunk_ps)
        }
        return pipelined_step(scenario, policy, times)

    slow = step(10**9, 3 * 10**9)
    assert slow["makespan_ps"] == step(3 * 10**9, 3 * 10**9)["makespan_ps"] > step(10**9, 10**9)["makespan_ps"]
    assert (slow["parts"]["bubble"].reshape(4, 2)[:, 0] > slow["parts"]["bubble"].reshape(4, 2)[:, 1]).all()


def test_tensor_parallelism_is_two_all_reduces_and_heads_move_their_logits() -> None:
    scenario = load(ROOT / "scenarios" / "tiny.yaml", ["parallel.tp_size=4", "schedule.overlap=none"])
    d = Durations(scenario, scenario.policies[0], build_network(scenario.cluster, 8), overlapped=False)
    layer, head = model_blocks(scenario.model, False)[0], model_blocks(scenario.model, False)[-1]
    one = float(all_reduce_s(scenario.cluster, 4, 128 * 4 * 1024 * 2.0, 4))
    assert d.even_ps(layer, "tensor_parallel", "forward") == pytest.approx(2 * one * 1e12)
    product = d.gemm_s(2 * 32000 * 1024, 32000 * 1024, 1024, "forward", "bf16")
    logits = float(scenario.cost.compute.elementwise_s(scenario.cluster.device, bytes=128 * 32000 * 4.0))
    assert d.even_ps(head, "head", "forward") == pytest.approx((product + logits) * 1e12)


def test_groups_of_one_domain_need_no_network() -> None:
    """Every device behind one switch: stages, groups and copies talk over it, and there is no NIC to need."""
    one = ["cluster.topology=single_switch", "cluster.inter_node=null", "parallel.pp_size=2", "parallel.dp_size=16"]
    row = rows([*one, "cluster.nodes=18"])
    assert all(r["optimizer_s"] > 0 for r in row.values())


def test_memory_of_a_stage_by_hand() -> None:
    scenario = load(ROOT / "scenarios" / "tiny.yaml", [*PIPELINED, "schedule.pipeline=1f1b", "parallel.pp_size=2", "schedule.recompute=selective"])
    policy, model = scenario.policies[0], scenario.model
    stages = scenario.stages(policy)
    found = scenario.memory(policy)
    candidates = []
    for rank, alive_micro in ((0, 2), (1, 1)):
        held = [block_parameters(model, block) for block in stages[rank]]
        layers = sum(block.kind in ("moe", "dense") for block in stages[rank])
        dense, experts, tokens = sum(d for d, _ in held), sum(e for _, e in held) / 8, 16
        head = any(block.kind == "head" for block in stages[rank])
        candidates.append(
            {
                "weights": 2 * (dense + experts),
                "gradients": 4 * (dense + experts),
                "optimizer": 8 * (dense / 8 + experts),
                "activations": tokens * alive_micro * layers * 4.0 * 1024,
                "expert_activations": tokens * alive_micro * layers * 5 * (1024 + 3 * 512),
                "logits": 4.0 * tokens * 32000 * head,
            }
        )
    best = max(candidates, key=lambda items: sum(items.values()))
    assert {name: found[name] for name in best} == pytest.approx(best)


def test_programs_are_the_schedules() -> None:
    scenario = load(ROOT / "scenarios" / "tiny.yaml", PIPELINED)
    plan = programs(scenario, scenario.policies[0])
    assert len(plan) == 4 and all(isinstance(chunk, Chunk) for program in plan for chunk in program)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["parallel.pp_size=3"], "parallel.pp_size: must be even for pipeline dualpipe"),
        (["schedule.micro_batches=4"], "at least 2 x pp_size = 8 for pipeline dualpipe"),
        (["parallel.pp_size=1", "schedule.pipeline=1f1b"], "must be >= 2 for pipeline 1f1b"),
        (["cluster.nodes=4"], "4 stages x 1 groups of 8 need 32 devices; the cluster has 16"),
        (["parallel.dp_size=12"], "must be a multiple of ep_size = 8"),
        (["parallel.dp_size=8", "schedule.pipeline=none"], "dp_size: needs a schedule.pipeline"),
        (["schedule.phase=forward"], "dualpipe needs phase: training"),
        (["stragglers=[{device: 32, slowdown: 2}]"], "must be < 32, the devices simulated"),
        (["stragglers=[{device: 1, slowdown: 0.5}]"], "must be >= 1"),
        (["schedule.recompute=full", "schedule.pipeline=none"], "full needs a schedule.pipeline"),
        (
            ["steps.resolution=count", "traffic.sequence_length=128", "schedule.micro_batches=8"],
            "a micro-batch of tokens_per_rank / micro_batches = 32 tokens must hold whole sequences of 128",
        ),
        (["cluster.faults=[{link: 'nic:3', factor: 0.5}]"], "times the links of one EP group for all of them"),
        (["schedule.pipeline=dualpip"], "did you mean dualpipe?"),
        (["cluster.device.memory_bytes=1 MB"], "does not fit: weights"),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused(overrides: list[str], message: str) -> None:
    from sim.yamlfile import ScenarioError

    with pytest.raises((ScenarioError, ValidationError), match=message.replace("(", r"\(").replace("?", r"\?")):
        load(ROOT / "scenarios" / "tiny.yaml", [*PIPELINED, *overrides])


def test_count_level_steps_agree_with_token_level() -> None:
    """Drawn micro-batches cost what routed ones cost, within the scatter of a pilot."""
    token = rows(["schedule.micro_batches=8", "parallel.pp_size=2", "schedule.pipeline=1f1b", "traffic.tokens_per_rank=1024"])
    count = rows(
        ["schedule.micro_batches=8", "parallel.pp_size=2", "schedule.pipeline=1f1b", "traffic.tokens_per_rank=1024",
         "steps.resolution=count", "steps.pilot_ranks=256"]
    )  # fmt: skip
    for policy, row in token.items():
        assert count[policy]["step_time_s"] == pytest.approx(row["step_time_s"], rel=0.02)
        assert count[policy]["max_vio_micro_batch"] == pytest.approx(row["max_vio_micro_batch"], rel=0.1)
