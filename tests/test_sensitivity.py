"""Winners flip where they must, what cannot matter does not, and indices meet their closed forms."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sim
from sim.estimate import estimate
from sim.loading import load
from sim.results import metrics_of, per_replica
from sim.scenario import Scenario
from sim.sensitive import Sensitivity, ask
from sim.sensitive.answer import Together
from sim.sensitive.ask import _competing, _screen, _together
from sim.sensitive.constants import Constant, applied, assumptions
from sim.sensitive.evaluate import Evaluator
from sim.sensitive.indices import design, independent, indices
from sim.sensitive.oneway import BreakEven, Row, break_evens, ends, reach
from sim.sensitive.report import text, write
from sim.sensitive.standings import NOBODY, Standing, standing, winners
from sim.sensitive.vary import parse
from sim.sensitivity import main
from sim.study import route, timed, timed_rows
from sim.tokens import F64
from sim.yamlfile import ScenarioError

TINY = Path(__file__).resolve().parents[1] / "scenarios" / "tiny.yaml"
NIC = "cluster.inter_node.bandwidth_bytes_per_s"
SMALL = ["replicas=1", "steps.count=1", "steps.warmup.steps=4", "traffic.tokens_per_rank=32"]
TWO = "policies=[{name: top-k}, {name: grouped, select: group_limited}]"
# Four nodes, balanced and free against one node per token and unbalanced: the NIC decides.
RIVALS = [
    "replicas=1", "steps.count=1", "steps.warmup.steps=10", "traffic.tokens_per_rank=128", "schedule.micro_batches=1",
    "cluster.nodes=4", "parallel.ep_size=16", "model.n_group=4", "model.topk_group=1",
    "policies=[{name: balanced, balance: bias}, {name: limited, select: group_limited}]",
]  # fmt: skip


# Indices ----------------------------------------------------------------------------------------------------------


def test_ishigami_by_our_own_plumbing() -> None:
    a, b = 7.0, 0.1
    bounds = [(-math.pi, math.pi)] * 4  # the fourth is a dummy
    x = design(bounds, 2048, 0)
    y = np.sin(x[:, 0]) + a * np.sin(x[:, 1]) ** 2 + b * x[:, 2] ** 4 * np.sin(x[:, 0])
    whole = a**2 / 8 + b * math.pi**4 / 5 + b**2 * math.pi**8 / 18 + 0.5
    alone = 0.5 * (1 + b * math.pi**4 / 5) ** 2, a**2 / 8, 0.0, 0.0
    mixed = b**2 * math.pi**8 * (1 / 18 - 1 / 50)
    found = indices(bounds, y, 0)
    assert found.first == pytest.approx(np.array(alone) / whole, abs=0.02)
    assert found.total == pytest.approx(np.array([alone[0] + mixed, alone[1], mixed, 0]) / whole, abs=0.02)
    assert found.total[3] == 0 and found.first[3] == 0 and (found.total_half_width[:3] > 0).all()


def test_linear_function_and_no_variance() -> None:
    bounds = [(0.0, 1.0), (0.0, 2.0), (5.0, 6.0)]
    x = design(bounds, 1024, 1)
    assert x.shape == (1024 * 5, 3) and (x.min(axis=0) >= [0, 0, 5]).all() and (x.max(axis=0) <= [1, 2, 6]).all()
    found = indices(bounds, x @ np.array([1.0, 1.0, -1.0]), 1)
    assert found.first == pytest.approx([1 / 6, 4 / 6, 1 / 6], abs=0.02)
    assert found.total == pytest.approx([1 / 6, 4 / 6, 1 / 6], abs=0.02)
    assert not indices(bounds, np.full(len(x), 3.0), 1).total.any()
    mine = independent(x, 3)
    assert len(mine) == 2048 and len(np.unique(mine, axis=0)) == 2048
    assert np.array_equal(x, design(bounds, 1024, 1)) and not np.array_equal(x, design(bounds, 1024, 2))


@pytest.mark.parametrize("samples", [1, 3, 48])
def test_samples_are_a_power_of_two(samples: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        design([(0.0, 1.0)], samples, 0)


# One at a time, on functions whose answer is known ------------------------------------------------------------------


def constant(low: float = 0.8, high: float = 1.2) -> Constant:
    return Constant("x", ("cost.x",), (1.0,), low, high)


@given(st.floats(0.3, 3.5).filter(lambda f: abs(f - 1) > 0.01))
def test_break_even_of_two_lines(flip: float) -> None:
    """Policy 0 costs its constant's factor, policy 1 always ``flip``: the winner changes just there."""

    def values(points: list[tuple[int, float]]) -> F64:
        return np.array([[[x], [flip]] for _, x in points]).reshape(-1, 2, 1)

    stated = values([(0, 1.0)])[0]
    winner = standing(stated, 1.0).winner
    rows = ends([constant()], values, stated, 1.0)  # type: ignore[arg-type]
    found = break_evens(rows, values, winner, 1.0, reach(rows, lambda _: (0.25, 4.0)))[0]  # type: ignore[arg-type]
    assert found.nearest is not None and found.nearest.factor == pytest.approx(flip, rel=0.003)
    assert found.nearest.winner == 1 - winner and (found.below is None) != (found.above is None)
    assert found.changes(winner) == (0.8 <= flip < 1.2)
    assert found.effect == pytest.approx(0.2)


def test_nothing_found_is_said_with_where_it_was_sought() -> None:
    def values(points: object) -> F64:
        return np.tile(np.array([[1.0], [2.0]]), (len(points), 1, 1))  # type: ignore[arg-type]

    rows = ends([constant(1.0, 1.2)], values, values([0])[0], 1.0)
    found = break_evens(rows, values, 0, 1.0, reach(rows, lambda _: (1.0, 4.0)))[0]
    assert found.nearest is None and found.sought == (1.0, 4.0) and found.effect == 0 and not found.changes(0)


def test_standings() -> None:
    values = np.array([[3.0, 5.0], [1.0, 2.0], [1.0, 2.0]])
    one = standing(values, 1.0)
    assert (one.winner, one.runner_up, one.margin, one.half_width) == (1, 2, 0.0, 0.0)  # ties to the lower number
    more = standing(values, -1.0)
    assert (more.winner, more.runner_up, more.margin) == (0, 1, 2.5) and more.ahead == 2.5 / 4
    assert winners(values[None], -1.0).tolist() == [0]


def searched(one: Constant, values: Any, sought: tuple[float, float] = (0.25, 4.0)) -> Row:
    """The row of one constant on a function of its factor that returns what each policy costs."""

    def ask_(points: Sequence[tuple[int, float]]) -> F64:
        return np.array([[[cost] for cost in values(x)] for _, x in points])

    stated = ask_([(0, 1.0)])[0]
    rows = ends([one], ask_, stated, 1.0)
    return break_evens(rows, ask_, standing(stated, 1.0).winner, 1.0, reach(rows, lambda _: sought))[0]


def test_a_range_that_begins_at_zero() -> None:
    row = searched(constant(0.0, 2.0), lambda x: (2 - x, 1.6))
    assert row.below is not None and row.below.factor == pytest.approx(0.4, rel=0.003) and row.within == row.below
    row = searched(constant(0.0, 2.0), lambda x: (1.0 if x else 3.0, 2.0))
    assert row.below == BreakEven(0.0, 1) and row.nearest == row.below and row.changes(0)
    row = searched(constant(-1.0, 1.5), lambda x: (1.0 if x > 0 else 3.0, 2.0))
    assert row.below == BreakEven(-1.0, 1)


def test_the_nearest_change_is_found_first() -> None:
    """Another wins between 0.7 and 0.9 only, and the first one again further off."""
    row = searched(constant(), lambda x: (2.0 if 0.7 < x < 0.9 else 1.0, 1.5))
    assert row.below is not None and row.below.factor == pytest.approx(0.9, rel=0.003)


def test_counts_change_at_whole_numbers() -> None:
    count = Constant("n", ("cost.n",), (8,), 0.5, 2.0)
    row = searched(count, lambda x: (max(1.0, round(8 * x) / 8), 1.3))
    assert row.above == BreakEven(11 / 8, 1) and row.below is None
    assert searched(Constant("n", ("steps.count",), (8,), 0.5, 2.0), lambda x: (1.0, 2.0)).sought == (0.5, 2.0)


def test_policies_without_the_metric_lose_and_that_is_said(tmp_path: Path, scenario: Scenario) -> None:
    nan = math.nan
    values = np.array([[nan, 1.0], [2.0, 3.0]])
    one = standing(values, 1.0)
    assert (one.winner, one.runner_up, one.margin, one.ahead) == (1, 0, math.inf, math.inf)
    assert standing(values, -1.0).winner == 1 and standing(np.full((2, 2), nan), 1.0).winner == NOBODY
    assert winners(np.array([values, np.full((2, 2), nan)]), -1.0).tolist() == [1, NOBODY]

    dead = searched(constant(), lambda x: (nan if x > 1.1 else 1.0, 2.0))
    assert dead.effect == math.inf and dead.killed == ((), (0,)) and dead.changes(0)
    assert dead.above is not None and dead.above.factor == pytest.approx(1.1, rel=0.003)
    all_dead = searched(constant(), lambda x: (nan, nan) if x > 1.1 else (1.0, 2.0), (1.0, 1.0))
    assert all_dead.effect == math.inf and not all_dead.changes(0) and all_dead.above is None

    def values_of(_: object, points: Sequence[tuple[float, ...]], label: str) -> F64:
        return np.array([[[nan if x > 1.1 else 1.0], [nan if x > 1.15 else 2.0]] for (x,) in points])

    together = _together([dead], values_of, 0, 1, 1.0, 8, 0, ["a", "b"])
    assert together.indices is None and 0 < together.without < 24 and sum(together.wins) < together.samples == 16
    found = told(scenario, [dead, all_dead], together)
    shown = " ".join(text(found).split())
    assert "kills step_time_s: x at its high end, of a; x at its high end, of a, b" in shown
    assert f"no Sobol indices: at {together.without} of 24 points a and b do not both have a step_time_s" in shown
    assert "no policy has a step_time_s" in found.conclusion and "b alone" in shown and found.indices.empty
    write(found, tmp_path / "out", {})
    table = pd.read_csv(tmp_path / "out" / "one_at_a_time.csv")
    assert table.high_kills.tolist() == ["a", "a, b"] and not (tmp_path / "out" / "indices.csv").exists()


def told(scenario: Scenario, rows: Sequence[Row], together: Together | None = None) -> Sensitivity:
    metric = next(one for one in metrics_of(scenario) if one.name == "step_time_s")
    start = standing(np.array([[1.0], [2.0]]), 1.0)
    return Sensitivity(scenario, metric, ("a", "b"), (), start, tuple(rows), (), together, 1)


def test_the_conclusion_cites_break_evens_of_the_range_and_where_it_was_sought(scenario: Scenario) -> None:
    first, other = (Standing(i, 1 - i, 1.0, 0.0, 1.0, 0.0) for i in (0, 1))
    row = Row(constant(0.5, 1.05), other, first, 0.1, BreakEven(0.6, 1), BreakEven(1.1, 1), (0.25, 4.0))
    assert told(scenario, [row]).conclusion == "Alone within its range, x (from x0.6: b) overturns a."
    zero = Constant("zero", ("traffic.y",), (0.0,), 0.0, 0.3, absolute=True)
    quiet = Row(zero, first, first, 0.1, None, None, (0.0, 0.3))
    assert told(scenario, [quiet]).conclusion == "No constant alone overturns a within its range."
    cut = Row(constant(), first, first, 0.1, None, None, (0.5, 1.2))
    assert told(scenario, [quiet, cut]).conclusion == (
        "No constant alone overturns a within its range, nor beyond it, where it was sought up to a factor of 2 (1 of 2 constants)."
    )


def test_screening_drops_the_kernels_that_nothing_calls_and_no_others() -> None:
    used, unused = (f"cluster.device.kernels.{name}.overhead_s" for name in ("elementwise", "gate"))
    three = [Constant(key, (key,), (1.0,), 0.8, 1.2) for key in (used, unused, NIC)]

    def values(chosen: Sequence[Constant], points: Sequence[tuple[float, ...]], label: str) -> F64:
        return np.array([[[point[0]], [2.0]] for point in points])

    assert _screen(three, values, np.array([[1.0], [2.0]])) == [three[0], three[2]]


# Constants of scenarios -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return load(TINY, [*SMALL, TWO])


def test_assumptions_are_found_and_do_nothing_as_stated(scenario: Scenario) -> None:
    found = assumptions(scenario)
    labels = [one.label for one in found]
    for name in (
        "tensor peak", "HBM bandwidth", "NVLink bandwidth", "NIC bandwidth", "NIC latency", "elementwise: launch",
        "grouped GEMM fp8: FLOP/s", "SMs that communicate", "slowdown of dispatch beside GEMMs", "popularity spread (skew)",
    ):  # fmt: skip
        assert labels.count(name) == 1, name
    assert len(labels) == len(set(labels)) and all(one.low <= 1 <= one.high for one in found)
    assert applied(scenario, found, [1.0] * len(found)) == scenario
    for one in found:
        for x in (one.low, one.high):
            assert x == 1.0 or applied(scenario, [one], [x]) != scenario
    assert {one.label for one in found if one.reroutes} == {"popularity spread (skew)"}
    contention = next(one for one in found if one.label == "slowdown of combine beside GEMMs")
    assert contention.low == pytest.approx(1 / 1.16)  # nothing is quicker for company


def test_assumptions_of_losses_dynamics_and_own_clusters() -> None:
    losses = load(
        TINY,
        [*SMALL, "policies.1.balance.kind=aux_loss", f"policies.2.cluster.extends={TINY.parent}/clusters/h20.yaml"],
    )
    labels = [one.label for one in assumptions(losses)]
    assert (
        "pull-back of auxiliary losses" in labels
        and "group-limited: HBM bandwidth" in labels
        and "HBM bandwidth" in labels
    )


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["cluster.inter_node.bandwith_bytes_per_s"], "did you mean bandwidth_bytes_per_s"),
        (["clutser.nodes=2:4"], "did you mean cluster"),
        ([f"{NIC}=±20%", "traffic.popularity_sdd", "name"], r"(?s)popularity_sd\?.*no number"),
        ([f"{NIC}=fast"], "KEY=±20% or KEY=low:high"),
        ([f"{NIC}=2e10:1e10"], "low must be below high"),
        (["cost.communication.dispatch_contention=0.5:2"], "the scenario refuses.*must be >= 1"),
        (["traffic.prefix_length"], "is 0.*KEY=low:high"),
        (["policies.7.rebalance.threshold"], "list of 2"),
        (
            ["cluster.devices_per_node=4:8"],
            "the scenario refuses cluster.devices_per_node=5",
        ),  # not only the ends have to run
        (["traffic.logit_mean=-3:-5"], "low must be below high"),
    ],
)
def test_vary_refuses_with_the_reason(scenario: Scenario, texts: list[str], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        parse(scenario, texts)


def test_vary_reads_ranges_and_keys_that_stand_for_several(scenario: Scenario) -> None:
    one, two, three, four = parse(
        scenario, [NIC, f"{NIC}=25e9:1e11", "policies.*.rebalance.ema_decay=±10%", "traffic.basis_tail=0:0.3"]
    )
    assert (one.low, one.high, one.label) == (0.8, 1.2, "NIC bandwidth")
    assert two.at(two.low) == (25e9,) and two.at(two.high) == (1e11,)
    assert three.keys == ("policies.0.rebalance.ema_decay", "policies.1.rebalance.ema_decay") and three.high == 1.1
    assert four.absolute and four.stated == 0 and four.at(0.3) == (0.3,)


def test_ranges_of_negative_numbers_and_whole_ones(scenario: Scenario) -> None:
    below = load(TINY, [*SMALL, TWO, "traffic.logit_mean=-4"])
    (one,) = parse(below, ["traffic.logit_mean=-5:-3"])
    assert (one.low, one.high) == (0.75, 1.25) and one.at(one.low) == (-3.0,) and one.at(one.high) == (-5.0,)
    nodes, depth = parse(scenario, ["cluster.nodes=2:4", "seed=0:3"])
    assert nodes.reroutes and nodes.at(1.3) == (3,) and depth.absolute and depth.at(1.7) == (2,)
    assert isinstance(nodes.at(1.3)[0], int) and not parse(scenario, ["cluster.inter_node.latency_s"])[0].reroutes


def test_labels_of_units_tell_them_apart() -> None:
    units = (
        "serving={duration_s: 1, requests: {kind: poisson, rate_per_s: 60, input_tokens: 300, output_tokens: 20}, units: ["
        "{name: p, role: prefill, parallel: {ep_size: 2}, kv_cache_tokens: 4096, host_overhead_s: 1 ms}, "
        "{name: d, role: decode, parallel: {ep_size: 4}, kv_cache_tokens: 8192, host_overhead_s: 1 ms}]}"
    )
    served = load(TINY, ["schedule={phase: forward}", units, "policies=[{name: a}]"])
    labels = [one.label for one in assumptions(served)]
    assert "scheduler's own time" in labels and len(labels) == len(set(labels))  # one assumption, of both
    asked = parse(served, [f"serving.units.{unit}.host_overhead_s" for unit in "01*"])
    assert [one.label for one in asked] == [
        "p: scheduler's own time",
        "d: scheduler's own time",
        "scheduler's own time",
    ]
    peaks = [f"cluster.device.peak_flops_per_s.{dtype}" for dtype in ("fp8", "bf16")]
    assert [one.label for one in parse(served, peaks)] == peaks


def test_who_competes_and_for_what() -> None:
    floors = "policies=[{name: a}, {name: hash, select: hash}, {name: random, select: random}, {name: even, select: balanced}]"
    assert _competing(load(TINY, [*SMALL, floors, "traffic.vocabulary={size: 4096}"])) == ([0, 1], [2, 3])
    unlike = "policies=[{name: wide}, {name: narrow, parallel: {ep_size: 4}}]"
    found = ask(TINY, overrides=[*SMALL, unlike], vary=[NIC], samples=0)
    assert found.metric.name == "tokens_per_s_per_gpu"
    rates = sim.run(TINY, overrides=[*SMALL, unlike]).summary()
    rates = rates[rates.metric == "tokens_per_s_per_gpu"].set_index("policy")["mean"]
    assert found.policies[found.stated.winner] == rates.idxmax() and found.stated.margin > 0


# Evaluation -------------------------------------------------------------------------------------------------------


def test_points_are_what_runs_of_their_own_say(scenario: Scenario) -> None:
    """One routing for all costs: every value to the last bit that of a whole run with these settings."""
    names = [NIC, "cluster.device.peak_flops_per_s.fp8", "cost.communication.num_sms", "traffic.popularity_sd"]
    constants = parse(scenario, names)
    launch = next(one for one in assumptions(scenario) if one.label == "elementwise: bandwidth")
    points = [
        (1.0, 1.0, 1.0, 1.0, 1.0),
        (0.5, 2.0, 1.2, 1.0, 1.0),
        (1.0, 1.0, 1.0, 3.0, 1.0),
        (1.0, 1.0, 1.0, 1.0, 0.5),
    ]
    with Evaluator(scenario, ("step_time_s",), 1, False) as evaluator:
        assert evaluator.rows_only
        found = evaluator.values([*constants, launch], points, "")
        assert np.array_equal(found, evaluator.values([*constants, launch], points[::-1], "")[::-1])
    whole = {"overhead_s": 1.32e-6, "bandwidth_bytes_per_s": 0.5 * 3.21e12, "source": "test"}
    for changes, values in zip(
        (
            {},
            {NIC: 25e9, names[1]: 2 * 1979e12, names[2]: 24},
            {"traffic.popularity_sd": 0.36},
            {"cluster.device.kernels.elementwise": whole},
        ),
        found,
        strict=True,
    ):
        rows = per_replica(sim.run(scenario, overrides=changes).tables, scenario)
        assert values[:, 0].tolist() == rows["step_time_s"]


def test_points_that_route_anew_do_not_mix(scenario: Scenario) -> None:
    """Two constants of the traffic at one factor, each by itself, and a size of the cluster: three routings of their own."""
    constants = parse(scenario, ["traffic.popularity_sd", "traffic.iid_variance", "cluster.nodes=2:4"])
    points = [(1.2, 1.0, 1.0), (1.0, 1.2, 1.0), (1.0, 1.0, 2.0)]
    with Evaluator(scenario, ("step_time_s",), 1, False) as evaluator:
        found = evaluator.values(constants, points, "")
    changes = ({"traffic.popularity_sd": 1.2 * 0.12}, {"traffic.iid_variance": 1.2 * 0.1}, {"cluster.nodes": 4})
    for change, values in zip(changes, found, strict=True):
        rows = per_replica(sim.run(scenario, overrides=change).tables, scenario)
        assert values[:, 0].tolist() == rows["step_time_s"]
    assert found[0].tolist() != found[1].tolist()


def test_points_that_do_not_fit_together_are_refused(scenario: Scenario) -> None:
    nodes, split = (
        Constant("n", ("cluster.nodes",), (2,), 0.5, 1.0),
        Constant("e", ("parallel.ep_size",), (8,), 0.5, 1.0),
    )
    message = r"with cluster.nodes=1: parallel.*8 ranks need as many devices"
    with Evaluator(scenario, ("step_time_s",), 1, False) as evaluator, pytest.raises(ScenarioError, match=message):
        evaluator.values([nodes, split], [(0.5, 1.0)], "")


def test_quick_rows_are_those_of_the_whole_timing(scenario: Scenario) -> None:
    routed = route(scenario, 1, estimate(scenario))
    quick, whole = timed_rows(routed, scenario), per_replica(timed(routed, scenario).tables, scenario)
    assert quick["step_time_s"] == whole["step_time_s"] and quick["waiting_s"] == whole["waiting_s"]
    for name, column in quick.items():
        assert all(a == b or (isinstance(a, float) and math.isnan(a)) for a, b in zip(column, whole[name], strict=True))
    with pytest.raises(ValueError, match="traffic differs"):
        timed_rows(routed, load(TINY, [*SMALL, TWO, "traffic.popularity_sd=0.5"]))


# The whole question -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rivals() -> Sensitivity:
    vary = ["cluster.intra_node.latency_s=±5%", "cluster.device.price_per_hour=±20%", f"{NIC}=25e9:1e11"]
    return ask(TINY, overrides=RIVALS, vary=vary, samples=8)


def test_the_nic_decides_and_where(rivals: Sensitivity) -> None:
    row = next(row for row in rivals.rows if row.constant.label == "NIC bandwidth")
    assert rivals.policies[rivals.stated.winner] == "limited" and row.changes(rivals.stated.winner)
    assert row.below is None and row.above is not None and rivals.policies[row.above.winner] == "balanced"
    for factor, winner in ((row.above.factor * 1.003, "balanced"), (row.above.factor / 1.003, "limited")):
        found = sim.run(TINY, overrides=[*RIVALS, f"{NIC}={50e9 * factor!r}"]).summary()
        times = found[found.metric == "step_time_s"].set_index("policy")["mean"]
        assert times.idxmin() == winner


def test_what_cannot_matter_has_no_part(rivals: Sensitivity) -> None:
    assert [row.constant.label for row in rivals.without_effect] == ["price of a device hour"]
    assert set(rivals.indices.constant) == {"NIC bandwidth", "NVLink latency"}
    assert [row.constant.label for row in rivals.rows] == [
        "NIC bandwidth",
        "NVLink latency",
    ]  # the largest effect first
    table = rivals.indices.set_index("constant")
    assert table.total["NIC bandwidth"] > 0.8 > 0.1 > table.total["NVLink latency"]


def test_the_conclusion_claims_what_was_sampled(rivals: Sensitivity) -> None:
    together = rivals.together
    assert together is not None and together.samples == 16 and sum(together.wins) == 16 and 0 < rivals.share < 1
    mine = rivals.samples[rivals.samples.independent]
    assert len(mine) == 16 and (mine.winner == "limited").sum() == together.wins[rivals.stated.winner]
    assert ((mine.gap > 0) == (mine.winner == "limited")).all()
    assert f"limited wins in {100 * rivals.share:.3g} % of 16 samples" in rivals.conclusion
    assert "Alone within its range, NIC bandwidth (from x1." in rivals.conclusion
    shown = text(rivals)
    assert (
        "no effect at either end: price of a device hour" in shown
        and "one replica, so leads have no intervals" in shown
    )
    assert rivals.one_at_a_time.set_index("constant").loc["NIC bandwidth", "changes"]


def test_money_breaks_even_where_prices_meet() -> None:
    """Two policies alike in all but the price of their device, 2 and 3 USD: exactly two thirds, and exactly one and a half."""
    clusters = TINY.parent / "clusters"
    other = f"{{extends: {clusters}/h800.yaml, nodes: 2, devices_per_node: 4, device: {{price_per_hour: 3.0}}}}"
    overrides = [*SMALL, TWO.replace("grouped, select: group_limited", "dear"), f"policies.1.cluster={other}"]
    prices = ["cluster.device.price_per_hour", "policies.1.cluster.device.price_per_hour"]
    found = ask(TINY, overrides=overrides, vary=prices, samples=0, metric="usd_per_million_tokens")
    rows = {row.constant.label: row for row in found.rows}
    up, down = rows["price of a device hour"], rows["dear: price of a device hour"]
    assert up.above is not None and up.above.factor == pytest.approx(1.5, rel=0.003) and up.below is None
    assert down.below is not None and down.below.factor == pytest.approx(2 / 3, rel=0.003) and down.above is None
    assert found.stated.ahead == pytest.approx(0.5) and found.together is None and math.isnan(found.share)
    assert found.conclusion.startswith("No constant alone overturns top-k within its range; nearest: ")


def test_floors_do_not_compete_and_other_questions_are_refused(scenario: Scenario) -> None:
    found = ask(TINY, overrides=SMALL, vary=[NIC], samples=0)
    assert found.left_out == ("random",) and "random" not in found.policies and len(found.policies) == 4
    for options, message in (
        ({"metric": "step_tim_s"}, "did you mean step_time_s"),
        ({"metric": "nodes_per_tokn"}, "did you mean nodes_per_token"),
        ({"metric": "experts_per_token"}, "neither more nor less"),
        ({"metric": "bubble_s"}, "top-k, grouped has none"),
        ({"samples": 6}, "power of two"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(scenario, vary=[NIC], **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="only one policy"):
        ask(TINY, overrides=[*SMALL, "policies=[{name: top-k}]"])


def test_same_bytes_on_any_number_of_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = [word for text in [*SMALL, TWO] for word in ("--set", text)]
    args = [str(TINY), *sets, "--vary", NIC, "--vary", "traffic.popularity_sd=0.1:0.2", "--samples", "2", "--seed", "5"]
    for jobs in ("1", "2"):
        assert main([*args, "--jobs", jobs, "--out", str(tmp_path / jobs)]) == 0
    folders = [tmp_path / jobs / "tiny" / "sensitivity" for jobs in ("1", "2")]
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == ["indices.csv", "one_at_a_time.csv", "samples.parquet", "sensitivity.json"]
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    told = json.loads((folders[0] / "sensitivity.json").read_text())
    assert (
        told["seed"] == 5
        and len(told["constants"]) == 2
        and told["conclusion"] in " ".join(capsys.readouterr().out.split())
    )
    assert len(pd.read_parquet(folders[0] / "samples.parquet")) == 8


def test_the_front_door_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, message in (
        ([str(TINY), "--vary", "cluster.nodez"], "did you mean nodes"),
        ([str(TINY), "--samples", "5"], "--samples must be a power of two"),
        ([str(TINY), "--jobs", "0"], "--jobs must be at least 1"),
        ([str(tmp_path / "none.yaml")], "none.yaml"),
        ([str(TINY), "--metric", "step"], "no such metric"),
    ):
        assert main([*args, "--out", str(tmp_path / "out")]) == 2
        out, err = capsys.readouterr()
        assert message in err and not out and "Traceback" not in err
    assert not (tmp_path / "out").exists()
