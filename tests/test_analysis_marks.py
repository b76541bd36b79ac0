"""What stands on figures of many runs, against numbers written here: made-up runs, searches, answers and rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matplotlib

matplotlib.use("Agg")

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from scipy.stats import binom

import sim
from analysis import fronts, roofline, sensitivity, sweeps, topology, tradeoffs, validation
from analysis.metrics import points, value_name
from sim.optimizing.front import Front
from sim.optimizing.goals import Goal, Limit
from sim.optimizing.search import Trial
from sim.optimizing.space import Place
from sim.results import Result
from sim.statistics import half_width
from sim.validation import Figure as Row
from tests.drawings import apart, drawn
from tests.made_up import KEPT, MEMORY, METRIC, POLICIES, TIME, TINY, asked, sweep


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def empty() -> Result:
    """A result without tables."""
    return Result(sim.load(TINY), {}, {}, 0)


# Axes of sweeps

NULLS = {"traffic.latent_dof": [None, 4, 8], "cluster.nodes": [4, 16]}


def test_a_null_of_an_axis_is_a_value_like_others() -> None:
    found = sweep(NULLS)
    assert found.runs["traffic.latent_dof"].isna().any(), "as data frames have it"
    panels = sweeps.small_multiples(found, "nodes", col="latent_dof").axes
    assert [axis.get_title() for axis in panels] == ["latent_dof null", "latent_dof 4", "latent_dof 8"]
    assert all(np.isfinite(line.get_ydata()).all() and len(line.get_ydata()) == 2 for a in panels for line in a.lines)
    along = sweeps.small_multiples(found, "latent_dof", "kept_affinity").axes[0]
    assert [tick.get_text() for tick in along.get_xticklabels()] == ["null", "4", "8"]
    runs = found.runs[(found.runs["cluster.nodes"] == 4) & (found.runs.policy == POLICIES[0])]
    expected = runs.groupby("traffic.latent_dof", dropna=False, sort=False).kept_affinity.mean()
    assert along.lines[0].get_ydata() == pytest.approx(expected.to_numpy())
    hues = sweeps.small_multiples(found, "nodes", hue="latent_dof", col="policy")
    assert [text.get_text() for text in hues.legends[0].texts] == [f"latent_dof {v}" for v in ("null", 4, 8)]
    assert {len(line.get_xdata()) for line in hues.axes[0].lines} == {2}
    assert set(points(found, ["step_time_s"]).table["traffic.latent_dof"].map(value_name)) == {"null", "4", "8"}


def test_an_axis_of_numbers_and_names_keeps_the_order_of_the_sweep() -> None:
    found = sweep({"a": [8, "auto", 2]}, None)
    found.runs["a"] = (
        found.runs["a"].map(str)[::-1].reset_index(drop=True)
    )  # as the data set holds it, last point first
    assert sweeps.axes_of(found) == {"a": ["8", "auto", "2"]}


def test_an_axis_of_which_one_value_ran_names_no_points() -> None:
    found = sweep({"a": [1, 2], "b": [1, 2]})
    found.runs = found.runs[found.runs.b == 2]
    assert points(found, ["step_time_s"]).axes == ["a"]


@pytest.mark.parametrize(
    ("value", "name"),
    [(None, "null"), (float("nan"), "null"), (1048576, "1048576"), (np.int64(1048577), "1048577"), (0.1 + 0.2, "0.3"), (True, "yes"), (1e-4, "0.0001")],
)  # fmt: skip
def test_values_have_names_that_tell_them_apart(value: Any, name: str) -> None:
    assert value_name(value) == name


@pytest.mark.parametrize(
    ("key", "unit"),
    [
        ("cluster.device.price_per_hour", "USD/h"),
        ("cluster.device.power_w", "W"),
        ("cluster.device.memory_bytes", "B"),
        ("cluster.inter_node.bandwidth_bytes_per_s", "B/s"),
        ("cluster.device.peak_flops_per_s.fp8", "FLOP/s"),
        ("requests.rate_per_s", "1/s"),
        ("cluster.inter_node.latency_s", "s"),
        ("traffic.tokens_per_rank", "tokens"),
        ("cluster.nodes", "1"),
    ],
)
def test_axes_have_the_units_of_their_keys(key: str, unit: str) -> None:
    assert sweeps.small_multiples(sweep({key: [1, 2]})).axes[0].get_xlabel().endswith(f"[{unit}]")


# Fronts


@pytest.mark.parametrize(
    ("better", "y", "corners"),
    [
        (("lower", "lower"), (3, 1), [(1, 10), (1, 3), (2, 3), (2, 1), (10, 1)]),
        (("lower", "higher"), (1, 3), [(1, 0), (1, 1), (2, 1), (2, 3), (10, 3)]),
        (("higher", "lower"), (1, 3), [(2, 10), (2, 3), (1, 3), (1, 1), (0, 1)]),
        (("higher", "higher"), (3, 1), [(2, 0), (2, 1), (1, 1), (1, 3), (0, 3)]),
    ],
)
def test_the_step_line_bounds_what_was_reached(
    better: tuple[str, str], y: tuple[float, float], corners: list[tuple[float, float]]
) -> None:
    _, axis = plt.subplots()
    axis.set(xlim=(0, 10), ylim=(0, 10))
    pieces = tradeoffs.step_line(axis, np.array([1.0, 2.0]), np.array(y, dtype=float), *better)
    (line,) = axis.lines
    assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == corners
    assert pieces == [(*a, *b) for a, b in itertools.pairwise(corners)]


def front(figures: list[tuple[tuple[Any, ...], dict[str, list[float]]]], goals: tuple[Goal, ...], **more: Any) -> Front:
    """A made-up search of trials at ``values`` with the metrics of their replicas."""
    limits, axes = more.pop("limits", ()), more.pop("axes", ("select.topk_group", "cluster.nodes"))
    trials = []
    for i, (values, metrics) in enumerate(figures):
        trials.append(Trial(i, Place(values=values, policy=POLICIES[0])))
        trials[-1].judge(metrics, goals, limits)
    return Front(sim.load(TINY), axes, goals, limits, tuple(trials), **more)


FOUND = [
    ((2, None), {"step_time_s": [1e-3, 1.2e-3], "memory_bytes": [40e9, 42e9]}),
    ((4, None), {"step_time_s": [1e-3, 1.2e-3], "memory_bytes": [40e9, 42e9]}),
    ((8, 1048577), {"step_time_s": [2e-3, 2e-3], "memory_bytes": [30e9, 30e9]}),
]


def labels(figure: Any) -> list[str]:
    return sorted(text.get_text() for text in figure.axes[0].texts if text.get_text())


def test_equal_points_have_one_label_and_idle_axes_are_any() -> None:
    each = fronts.search(front(FOUND, (TIME, MEMORY)))
    assert labels(each) == ["2/4, null", "8, 1048577"]
    idle = {0: {"select.topk_group"}, 1: {"select.topk_group"}, 2: {"cluster.nodes"}}
    assert labels(fronts.search(front(FOUND, (TIME, MEMORY), idle=idle))) == ["8, any", "any, null"]
    part = {0: {"select.topk_group"}}
    assert labels(fronts.search(front(FOUND, (TIME, MEMORY), idle=part))) == ["8, 1048577", "any/4, null"]


def test_a_search_without_axes_promises_no_labels() -> None:
    figure = fronts.search(front([((), metrics) for _, metrics in FOUND], (TIME, MEMORY), axes=()))
    assert not labels(figure)
    assert not [text.get_text() for text in figure.legends[0].texts if text.get_text().startswith("labels")]


def test_a_search_shows_limits_intervals_and_its_step_line_in_the_units_of_the_axes() -> None:
    found = front(FOUND, (TIME, MEMORY), limits=(Limit(METRIC["memory_bytes"], False, 44e9), Limit(METRIC["step_time_s"], False, 2.05e-3)))  # fmt: skip
    axis = fronts.search(found).axes[0]
    dotted = [line for line in axis.lines if line.get_linestyle() == ":"]
    upright = [line.get_xdata()[0] for line in dotted if line.get_xdata()[0] == line.get_xdata()[1]]
    assert upright == pytest.approx([2.05])
    (steps,) = [line for line in axis.lines if line.get_linestyle() == "--"]
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    corners = [(1.1, top), (1.1, 41), (1.1, 41), (1.1, 41), (2, 41), (2, 30), (right, 30)]
    assert np.array(steps.get_xydata()) == pytest.approx(np.array(corners))
    half = half_width(np.array([40.0, 42.0]))
    ends = [path.vertices for lines in axis.collections if isinstance(lines, LineCollection) for path in lines.get_paths()]  # fmt: skip
    heights = [float(np.ptp(end[:, 1])) for end in ends]
    assert max(heights) == pytest.approx(2 * half)
    assert max(float(np.ptp(end[:, 0])) for end in ends) == pytest.approx(2 * half_width(np.array([1.0, 1.2])))
    assert left < 1.1 and bottom < 30


@pytest.mark.parametrize("width_in", [7.0, 3.5])
def test_a_long_label_fits_above_a_short_legend(width_in: float, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = [((1,), {"step_time_s": [t], "max_vio_batch": [v]}) for t, v in ((1e-3, 1.0), (2e-3, 0.5))]
    goals = TIME, Goal(METRIC["max_vio_batch"], False)
    figure = fronts.search(front(figures, goals, axes=("nodes",)), width_in=width_in)
    apart(figure, drawn(figure, monkeypatch))


def test_a_goal_to_raise_turns_the_step_line() -> None:
    figures = [((1, 1), {"step_time_s": [t], "kept_affinity": [k]}) for t, k in ((1e-3, 0.8), (2e-3, 0.9))]
    axis = fronts.search(front(figures, (TIME, KEPT), limits=(Limit(KEPT.metric, True, 0.85),))).axes[0]
    (limit,) = [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == ":"]
    assert limit == 0.85
    both = fronts.search(front(figures, (TIME, KEPT))).axes[0]
    (steps,) = [line.get_xydata() for line in both.lines if line.get_linestyle() == "--"]
    bottom, right = both.get_ylim()[0], both.get_xlim()[1]
    assert steps == pytest.approx(np.array([(1, bottom), (1, 0.8), (2, 0.8), (2, 0.9), (right, 0.9)]))


# Runs


def test_the_uniform_band_is_that_of_as_many_tokens(empty: Result) -> None:
    """The largest of E loads stays below the 0.975 ** (1/E) quantile of one with probability 0.975."""
    model, tokens = empty.scenario.model, 256
    n, k = model.n_routed_experts, model.num_experts_per_tok
    rows = {"policy": ["top-k"] * n, "replica": [0] * n, "layer": [1] * n, "expert": list(range(n)), "tokens": [tokens * k // n] * n}  # fmt: skip
    axis = tradeoffs.sorted_loads(Result(empty.scenario, {"experts": rows}, {}, 0)).axes[0]
    corners = axis.collections[0].get_paths()[0].vertices
    mean = tokens * k / n
    for way, q in ((max, 0.975), (min, 0.025)):
        at_first = way(corners[corners[:, 0] == 1][:, 1])
        assert at_first == pytest.approx(binom.ppf(q ** (1 / n), tokens, k / n) / mean)
    assert axis.lines[0].get_ydata() == pytest.approx(np.ones(n))


def test_a_roofline_has_intensity_along_and_rate_up(empty: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [
        ("projections", "", "top-k", "mean", "fp8", 4e12, 1e10, 0.01),
        ("experts", "", "top-k", "mean", "fp8", 1e12, 5e9, 0.005),
        ("experts", "", "top-k", "busiest", "fp8", 3e12, 6e9, 0.01),
    ]
    columns = ["operation", "where", "policy", "load", "dtype", "flops", "bytes", "seconds"]
    monkeypatch.setattr(roofline, "operations", lambda result: pd.DataFrame(made, columns=columns))
    axis = roofline.roofline(empty).axes[0]
    at = {
        (line.get_marker(), line.get_markerfacecolor() == "white"): (line.get_xdata()[0], line.get_ydata()[0])
        for line in axis.lines
        if line.get_marker() in ("s", "o")
    }
    assert at["s", False] == pytest.approx((400, 400)), "FLOP/byte, TFLOP/s"
    assert at["o", False] == pytest.approx((200, 200)), "filled: mean"
    assert at["o", True] == pytest.approx((500, 300)), "hollow: busiest"


def test_colours_of_a_topology_reach_the_load_inside_nodes(empty: Result) -> None:
    cluster = empty.scenario.cluster
    cables = list(cluster.topology.cables(cluster))
    edges = [topology._Edge(cable.a, cable.b, 1e9, 1.0) for cable in cables]
    bar = topology._draw({"top-k": (edges, {"gpu:0": 5e9, "gpu:1": float("nan")}, cluster)}, "bytes", 7.0).axes[-1]
    assert bar.get_ylim() == pytest.approx((0, 5)) and bar.get_ylabel() == "sent per step [GB]"
    unknown = [topology._Edge(edge.a, edge.b, float("nan"), 1.0) for edge in edges]
    topology._draw({"top-k": (unknown, {}, cluster)}, "bytes", 7.0).draw_without_rendering()


# Answers and rows


def test_a_tornado_keeps_what_overturns_beyond_the_fifteenth() -> None:
    found = asked(samples=False)
    n = 20
    table = pd.DataFrame({"constant": [f"c{i:02}" for i in range(n)], "effect": [0.1] * n})
    table = table.assign(low_winner=POLICIES[1], high_winner=POLICIES[1], low_ahead=0.06, changes=False)
    table["high_ahead"] = 0.06 + 0.01 * np.arange(n, 0, -1)
    table.loc[n - 1, ["high_winner", "high_ahead", "low_ahead", "changes"]] = [POLICIES[0], 0.0005, 0.0001, True]
    found.one_at_a_time = table
    axis = sensitivity.sensitivity(found).axes[0]
    shown = [label.get_text() for label in axis.get_yticklabels()]
    assert shown == [f"c{i:02}" for i in range(15)] + ["c19"]


def test_errors_stand_at_their_numbers_on_their_bars() -> None:
    found = [
        ("a", Row("relative", "s", 50.0, 52.0, 0.1)),  # + 4 % on 10 %
        ("b", Row("absolute", "s", 40.0, 38.0, 3.0, "ms", absolute=True)),  # - 2 of 40 = - 5 % on 7.5 %
        ("c", Row("kept bound", "s", 10.0, 3.0, 0.0, relation="at_most")),  # 0
        ("d", Row("broken bound", "s", 10.0, 12.0, 0.05, relation="at_most")),  # + 20 % on 5 %
        ("e", Row("an error of its own", "s", 0.0, 2.5, 4.0, "%")),  # 2.5 % on 4 %
        ("f", Row("a share of its own", "s", 0.0, 0.03, 0.06)),  # 3 % on 6 %
    ]
    strips = validation.errors(found).axes
    for axis, error, bar in zip(strips, (4, -5, 0, 20, 2.5, 3), (10, 7.5, 0, 5, 4, 6), strict=True):
        shown = np.concatenate([line.get_xdata() for line in axis.lines if line.get_linestyle() == "None"])
        assert shown == pytest.approx([error])
        (patch,) = axis.patches
        assert (patch.get_x(), patch.get_width()) == pytest.approx((-bar, 2 * bar))
    equal = validation.parity(found).axes[0]
    dots = [line.get_xydata() for line in equal.lines if line.get_marker() in ("o", "s") and len(line.get_xdata())]
    assert np.concatenate(dots).tolist() == [[50, 52], [40, 38]]
