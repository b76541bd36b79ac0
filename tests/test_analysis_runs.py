"""Figures of trade-offs, topology, roofline and dynamics carry what they claim to, at a page's and a column's width."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure

import sim
from analysis import dynamics, figures, roofline, topology, tradeoffs
from analysis.labels import label_points
from analysis.layout import contracted, places
from analysis.metrics import axis_label, front
from analysis.operations import operations
from sim.cluster import Cluster
from sim.metrics.balance import uniform_max_vio
from sim.metrics.dynamics import settling_step
from sim.results import METRICS, SERVICE_METRICS, Result
from sim.rng import stream
from tests.drawings import apart, drawn, named

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "scenarios" / "tiny.yaml"
WIDTHS = (7.0, 3.5)
FIGURES = tradeoffs.FIGURES | topology.FIGURES | roofline.FIGURES | dynamics.FIGURES


@pytest.fixture(scope="module")
def result() -> Result:
    changes = {
        "schedule.engine": "max_plus",
        "replicas": 2,
        "traffic.tokens_per_rank": 64,
        "traffic.sequence_length": 32,
        "steps": {"count": 48, "timed": "last", "record_traffic": True, "warmup": {"steps": 0}},
        "policies": [
            {"name": "top-k"},
            {"name": "bias", "balance": {"kind": "bias", "bias_update_rate": 0.02, "stop_after_step": 40}},
            {"name": "group-limited", "select": "group_limited"},
            {"name": "random", "select": "random"},
        ],
    }
    return sim.run(TINY, overrides=changes)


@pytest.fixture(scope="module")
def served() -> Result:
    unit = {"parallel": {"ep_size": 4}, "kv_cache_tokens": 20000}
    serving = {
        "duration_s": 2,
        "sampled_layers": 1,
        "draws": 1,
        "pool_tokens": 512,
        "requests": {"kind": "poisson", "rate_per_s": 40, "input_tokens": 512, "output_tokens": 32},
        "units": [{"name": "in", "role": "prefill", **unit}, {"name": "out", "role": "decode", **unit}],
    }
    changes = {"schedule.phase": "forward", "replicas": 1, "policies": [{"name": "top-k"}], "serving": serving}
    return sim.run(TINY, overrides=changes)


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


UNITS = {
    "pareto": ["step time [ms]", "← better", "kept affinity [share of top-k's]", "better ↑"],
    "sorted_loads": ["expert [rank by load]", "load [mean of layer = 1]", "uniform gate, 95 %"],
    "topology": ["busy, share of the step [%]", "NVLink switch", "leaf switch", "NIC"],
    "roofline": ["[FLOP/byte]", "[TFLOP/s]", "fp8 peak, ridge at 591", "bf16 peak, ridge at 295", "3.35 TB/s"],
    "settling": ["step [batches]", "[max/mean - 1]", "settled", "bias stops", "uniform gate"],
    "collapse": ["step [batches]", "[max/mean - 1]", "[mean = 1]", "[%]"],
    "scopes": ["MaxVio [max/mean - 1]", "a batch", "all steps", "uniform gate"],
}


@pytest.mark.parametrize("width_in", WIDTHS)
@pytest.mark.parametrize("name", FIGURES)
def test_figures_name_their_units_and_save_as_vectors(
    result: Result, name: str, width_in: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = FIGURES[name](result, width_in=width_in)
    assert figure.get_figwidth() == width_in and figure.get_figheight() <= 7
    assert not plt.get_fignums(), "pyplot keeps nothing"
    found = drawn(figure, monkeypatch)
    words = " ".join(text.replace("\n", " ") for text, _ in found)
    for unit in UNITS[name]:
        assert unit in words
    if name != "topology":  # which shows one
        assert all(policy.name in words for policy in result.scenario.policies)
    apart(figure, found)
    figure.savefig(tmp_path / "figure.pdf")
    assert (tmp_path / "figure.pdf").stat().st_size > 2000


@pytest.mark.parametrize("name", FIGURES)
def test_long_names_do_not_overlap_in_a_column(result: Result, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    long = named(result, lambda policy: f"{policy}, a policy with a long name"[:40])
    figure = FIGURES[name](long, width_in=3.5)
    apart(figure, drawn(figure, monkeypatch))


@pytest.mark.parametrize("name", figures.FIGURES)
def test_older_figures_fit_a_column(result: Result, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name != "topic_heatmap":  # whose loads are not recorded here
        figure = figures.FIGURES[name](result, width_in=3.5)
        assert figure.get_figwidth() == 3.5
        apart(figure, drawn(figure, monkeypatch))


# Metrics and fronts


def test_every_metric_says_which_way_is_better_and_has_a_unit() -> None:
    for metric in METRICS + SERVICE_METRICS:
        assert metric.better in ("lower", "higher", "none")
        assert axis_label(metric).endswith("]")
    ways = {metric.name: metric.better for metric in METRICS}
    assert [ways[name] for name in ("step_time_s", "mfu", "max_vio_batch_floor")] == ["lower", "higher", "none"]


values = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)
directions = st.sampled_from(["lower", "higher"])


@given(values, directions, directions)
def test_a_front_beats_what_is_not_on_it(points: list[tuple[int, int]], way_x: str, way_y: str) -> None:
    x, y = np.array(points, dtype=float).T
    on = front(x, y, (way_x, way_y))
    signs = np.array([1 if way == "lower" else -1 for way in (way_x, way_y)])
    cost = np.array(points) * signs

    def beats(a: Any, b: Any) -> bool:
        return bool((a <= b).all() and (a < b).any())

    for i, mine in enumerate(cost):
        assert on[i] != any(beats(other, mine) for other in cost)


def test_pareto_draws_the_summary_and_its_front(result: Result) -> None:
    axis = tradeoffs.pareto(result).axes[0]
    summary = result.summary().set_index(["metric", "policy"])["mean"]
    policies = [policy.name for policy in result.scenario.policies]
    expected = [[summary["step_time_s", p] * 1e3, summary["kept_affinity", p]] for p in policies]
    dots = [collection for collection in axis.collections if isinstance(collection, PathCollection)]
    assert np.array([dot.get_offsets()[0] for dot in dots]) == pytest.approx(np.array(expected))
    x, y = np.array(expected).T
    on = front(x, y, ("lower", "higher"))
    (steps,) = [line for line in axis.lines if line.get_linestyle() == "--"]
    corners = np.stack([steps.get_xdata(), steps.get_ydata()], axis=1)
    assert all(np.isclose(corners, [a, b]).all(axis=1).any() == o for a, b, o in zip(x, y, on, strict=True))
    with pytest.raises(KeyError, match="no metric 'speed'"):
        tradeoffs.pareto(result, x="speed")
    with pytest.raises(ValueError, match="both mfu and kept_affinity"):
        tradeoffs.pareto(result, x="mfu")
    plain = tradeoffs.pareto(result, x="max_vio_batch_floor", size="inter_node_bytes").axes[0]
    assert not [line for line in plain.lines if line.get_linestyle() == "--"], "no direction, no front"


def test_names_of_points_keep_apart_or_are_given_back() -> None:
    figure, axis = plt.subplots(figsize=(1.8, 1.2))
    x, y = np.zeros(16), np.linspace(0, 0.5, 16)
    axis.plot(x, y, "o")
    left_out = label_points(axis, x, y, [f"name {i:02}" for i in range(16)], (x, y))
    boxes = [text.get_window_extent() for text in axis.texts if text.get_text()]
    assert len(boxes) + len(left_out) == 16 and boxes and left_out
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert isinstance(figure, Figure)


def test_sorted_loads_are_the_tables(result: Result) -> None:
    axis = tradeoffs.sorted_loads(result, layer=2).axes[0]
    experts = result.experts
    for line, policy in zip(axis.lines, result.scenario.policies, strict=True):
        mine = experts[(experts.policy == policy.name) & (experts.layer == 2)]
        curves = [np.sort(load.to_numpy())[::-1] / load.mean() for _, load in mine.groupby("replica").tokens]
        assert line.get_ydata() == pytest.approx(np.mean(curves, axis=0))
    with pytest.raises(KeyError, match=r"no layer 9; there are layers \[1, 2, 3\]"):
        tradeoffs.sorted_loads(result, layer=9)
    with pytest.raises(ValueError, match="no policy has routed experts"):
        tradeoffs.sorted_loads(replace(result, tables=result.tables | {"experts": {}}))


@pytest.mark.parametrize(("tokens", "experts", "k"), [(256, 32, 4), (200000, 16, 2)])
def test_uniform_band_holds_what_a_uniform_gate_shows(tokens: int, experts: int, k: int) -> None:
    """Of 200 seeded draws from the binomial loads, 95 % lie inside at every rank; and the middle of the largest is near the
    floor of MaxVio."""
    rng = stream(5, "uniform band")
    loads = -np.sort(-rng.binomial(tokens, k / experts, size=(200, experts)), axis=1) / (tokens * k / experts)
    low, middle, high = tradeoffs.uniform_order_statistics(tokens, experts, k, np.array([0.025, 0.5, 0.975]))
    inside = ((loads >= low - 1e-9) & (loads <= high + 1e-9)).mean(axis=0)
    assert inside.min() > 0.95 - 4 * np.sqrt(0.95 * 0.05 / 200)
    assert inside.mean() < 0.99 or tokens < 1000  # whole numbers make bands of few tokens wider
    assert middle[0] - 1 == pytest.approx(uniform_max_vio(tokens, experts, k), rel=0.1)
    assert (tradeoffs.uniform_order_statistics(tokens, 4, 4, np.array([0.5])) == 1).all()


# Topology


def cluster(name: str, **changes: Any) -> Cluster:
    file = json.dumps({"extends": str(ROOT / "scenarios" / "clusters" / f"{name}.yaml"), **changes})
    formats = ["cost.gemm_dtype=bf16", "cost.dispatch_dtype=bf16"]  # which all devices have
    return sim.load(TINY, [f"cluster={file}", *formats]).cluster


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("h800", {"nodes": 8}),
        ("h800_2048", {"nodes": 40}),
        ("tpu_v4", {}),
        ("mi300x", {"nodes": 2}),
        ("l40s", {"nodes": 2}),
        ("cloudmatrix384", {"nodes": 4}),
        ("gb200_nvl72", {}),
    ],
)
def test_parts_of_clusters_stand_apart(name: str, changes: dict[str, Any]) -> None:
    found = cluster(name, **changes)
    at = places([(cable.a, cable.b) for cable in found.topology.cables(found)], found)
    assert len(set(at.values())) == len(at)


def test_many_devices_are_drawn_as_their_nodes() -> None:
    found = cluster("h800", nodes=32)
    cables = list(found.topology.cables(found))
    drawn_as = contracted(cables, found)
    assert drawn_as["gpu:17"] == drawn_as["nic:17"] == drawn_as["nvswitch:2"] == "node:2"
    assert drawn_as["leaf:3"] == "leaf:3" and drawn_as["spine:0"] == "spine:0"
    racks = cluster("gb200_4racks")
    assert contracted(list(racks.topology.cables(racks)), racks)["switch:0"] == "switch:0", "of several nodes"


def test_lines_carry_the_load_of_the_busier_direction(result: Result) -> None:
    links = {(p, r, link): b for p, r, link, b in zip(*(result.tables["links"][k] for k in ("policy", "replica", "link", "bytes")), strict=True)}  # fmt: skip
    edges, inside, part = topology._drawing(
        result, "top-k", {k[2]: v for k, v in links.items() if k[:2] == ("top-k", 1)}
    )
    assert not inside and part.n_devices == 8
    assert len(edges) == len(list(part.topology.cables(part)))
    for edge in edges:
        both = links["top-k", 1, f"{edge.a}->{edge.b}"], links["top-k", 1, f"{edge.b}->{edge.a}"]
        assert edge.load == max(both)
    axis = topology.topology(result, replica=1, load="bytes").axes[0]
    assert len([c for c in axis.collections if isinstance(c, LineCollection)]) == len(edges)
    with pytest.raises(KeyError, match="no recorded traffic of top-k in replica 7"):
        topology.topology(result, "top-k", replica=7)


def test_utilisation_is_the_share_of_the_step_in_percent(result: Result) -> None:
    links = [row for row in zip(*(result.tables["links"][k] for k in ("policy", "replica", "busy_s")), strict=True)]
    steps = result.steps
    step_s = steps[(steps.policy == "top-k") & (steps.replica == 0)].step_time_s.iloc[-1]
    most = max(busy_s for policy, replica, busy_s in links if (policy, replica) == ("top-k", 0))
    bar = topology.topology(result, "top-k", load="utilisation").axes[-1]
    assert bar.get_ylim() == pytest.approx((0, 100 * most / step_s)) and "[%]" in bar.get_ylabel()


def test_faults_are_dashed(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = result.scenario.cluster.model_copy(update={"faults": (sim_fault("nic:1", 0.5),)})
    faulty = replace(result, scenario=result.scenario.model_copy(update={"cluster": slow}))
    figure = topology.topology(faulty, load="busy_s", width_in=3.5)
    found = drawn(figure, monkeypatch)
    assert "failed or slowed" in [text for text, _ in found]
    lines = [c for c in figure.axes[0].collections if isinstance(c, LineCollection)]
    dashed = [line for line in lines if line.get_linestyle()[0][1] is not None]
    assert len(dashed) == 2, "both cables of the card"


def sim_fault(link: str, factor: float) -> Any:
    from sim.cluster.faults import LinkFault

    return LinkFault(link=link, factor=factor)


# Roofline


def test_operations_by_the_roofline_law_lie_on_the_roof(result: Result) -> None:
    scenario = result.scenario
    cost = scenario.cost.model_copy(update={"compute": sim_roofline()})
    table = operations(replace(result, scenario=scenario.model_copy(update={"cost": cost})))
    device = scenario.cluster.device
    roof = np.minimum(
        [device.peak(d) for d in table.dtype], table.flops / table.bytes * device.memory_bandwidth_bytes_per_s
    )
    products = table.operation != "attention"  # whose law knows no bytes
    assert (table.flops / table.seconds)[products].to_numpy() == pytest.approx(np.asarray(roof)[products])
    usual = operations(result)
    assert (usual.flops == table.flops).all() and (usual.seconds >= table.seconds * (1 - 1e-9)).all()


def test_nothing_stands_above_the_roof(result: Result) -> None:
    """Rates [TFLOP/s] stay below both the peak and the bandwidth [TB/s] times FLOP/byte; the busiest experts do more."""
    device = result.scenario.cluster.device
    axis = roofline.roofline(result).axes[0]
    marks = [line for line in axis.lines if line.get_marker() in roofline.MARKS.values()]
    assert len(marks) > 8
    for x, y in (line.get_xydata()[0] for line in marks):
        assert y <= 1e-12 * min(device.peak("fp8"), x * device.memory_bandwidth_bytes_per_s) * (1 + 1e-9)


def sim_roofline() -> Any:
    from sim.cost.roofline import Roofline

    return Roofline()


def test_operations_count_the_models_flops(result: Result) -> None:
    """Per token: two FLOPs per weight of the layer's projections and shared experts, and of the pairs' experts."""
    scenario, table = result.scenario, operations(result)
    model, tokens = scenario.model, scenario.tokens_per_rank // scenario.schedule.micro_batches
    mine = table[table.policy == "top-k"].set_index(["operation", "load"]).flops
    flops = model.layer_flops_per_token(1, scenario.schedule.sequence_length)
    assert mine["shared experts", "mean"] == pytest.approx(tokens * flops.shared_experts)
    assert mine["projections", "mean"] == pytest.approx(tokens * (flops.attention_projection + flops.router))
    assert mine["output head", "mean"] == pytest.approx(tokens * 2 * model.vocab_size * model.hidden_size)
    assert mine["experts", "mean"] == pytest.approx(tokens * model.num_experts_per_tok * model.expert_flops)
    summary = result.summary().set_index(["metric", "policy"])["mean"]
    ratio = mine["experts", "busiest"] / mine["experts", "mean"]
    assert ratio == pytest.approx(summary["device_max_over_mean", "top-k"], rel=0.02)  # whole tokens


def test_decode_is_left_of_prefill(served: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    table = operations(served)
    intensity = (table.flops / table.bytes).groupby([table["where"], table.operation]).mean()
    assert intensity["out", "decode attention"] < intensity["in", "prefill attention"] / 10
    assert ("out", "prefill attention") not in intensity and ("in", "decode attention") not in intensity
    for operation in ("projections", "experts"):
        assert intensity["out", operation] < intensity["in", operation] / 3
    figure = roofline.roofline(served, width_in=3.5)
    found = drawn(figure, monkeypatch)
    assert {"in", "out"} <= {text for text, _ in found}
    apart(figure, found)


# Dynamics


def test_settling_shows_means_and_when_they_settle(result: Result) -> None:
    axis = dynamics.settling(result).axes[0]
    steps = result.steps
    curves = {}
    for line, policy in zip([x for x in axis.lines if len(x.get_xdata()) == 48], result.scenario.policies, strict=True):
        curves[policy.name] = steps[steps.policy == policy.name].groupby("step").max_vio.mean().to_numpy()
        assert line.get_ydata() == pytest.approx(curves[policy.name])
    rings = [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "o"]
    expected = [settling_step(curve) for curve in curves.values()]
    assert rings == [at for at in expected if 0 < at < 48]
    assert [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "v"] == [40]
    two = dynamics.settling({"u = 1": result, "u = 2": result}, "bias").axes[0]
    assert len([line for line in two.lines if len(line.get_xdata()) == 48]) == 2
    with pytest.raises(KeyError, match="no policy 'nobody'"):
        dynamics.settling({"a": result}, "nobody")


def test_long_runs_are_drawn_as_means_of_blocks() -> None:
    values = np.arange(1003.0)
    x, y = dynamics._blocks(values)
    assert len(x) == dynamics.POINTS and y == pytest.approx(x)
    few = np.array([3.0, 1.0])
    assert [part.tolist() for part in dynamics._blocks(few)] == [[0.0, 1.0], [3.0, 1.0]]


def test_collapse_and_scopes_show_the_summary(result: Result) -> None:
    summary = result.summary().set_index(["metric", "policy"])["mean"]
    bars = dynamics.collapse(result).axes[2].containers
    widths = [container[0].get_width() for container in bars if hasattr(container, "patches")]
    names = [policy.name for policy in result.scenario.policies]
    expected = [100 * summary[metric, name] for name in names for metric in ("starved_10pct", "starved_1pct")]
    assert widths == pytest.approx(expected)
    axis = dynamics.scopes(result).axes[0]
    shown = [tick.get_text().replace("\n", " ") for tick in axis.get_xticklabels()]
    marks = [container.lines[0].get_ydata() for container in axis.containers]
    for mine, name in zip(marks, names, strict=True):
        assert mine[shown.index("a batch")] == pytest.approx(summary["max_vio_batch", name])
    dense = replace(result, tables=result.tables | {"layers": {}})
    with pytest.raises(ValueError, match="no policy of this result has routed experts"):
        dynamics.collapse(dense)
