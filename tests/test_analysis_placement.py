"""Figures of placement and serving carry what they claim to, at a page's and a column's width."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

import sim
from analysis import figures, placement, serving
from analysis.style import prefixed
from sim.results import Result, summarise
from sim.rng import stream
from tests.drawings import apart, drawn, named

TINY = Path(__file__).resolve().parents[1] / "scenarios" / "tiny.yaml"
WIDTHS = (7.0, 3.4)
REPLICATED: dict[str, Any] = {"placement": {"kind": "eplb", "num_redundant_experts": 8}, "replicas": "round_robin"}
POLICIES: list[dict[str, Any]] = [
    {"name": "linear"},
    {"name": "eplb", "placement": "eplb"},
    {"name": "eplb + 8", **REPLICATED},
    {"name": "eplb + 8, moving", **REPLICATED, "rebalance": {"interval_steps": 2}},
]
SERVING: dict[str, Any] = {
    "duration_s": 20,
    "sampled_layers": 1,
    "draws": 1,
    "pool_tokens": 1024,
    "requests": {"kind": "poisson", "rate_per_s": 6, "input_tokens": 256, "output_tokens": 16},
    "slo": {"ttft_s": 0.1, "tpot_s": 0.5},
    "faults": [{"at_s": 8, "until_s": 12, "unit": "mixed", "rank": 1, "kind": "slow_device", "factor": 100}],
    "units": [
        {
            "name": "mixed",
            "parallel": {"ep_size": 8},
            "max_num_batched_tokens": 512,
            "host_overhead_s": 0.05,
            "max_num_seqs": 4,
            "kv_cache_tokens": 1600,
        }
    ],
}


@pytest.fixture(scope="module")
def steps() -> Result:
    changes = {
        "schedule.phase": "forward",
        "schedule.engine": "max_plus",
        "replicas": 2,
        "traffic.tokens_per_rank": 64,
        "traffic.sequence_length": 32,
        "steps.timed": "all",
        "steps.record_traffic": True,
        "policies": POLICIES,
    }
    return sim.run(TINY, overrides=changes)


@pytest.fixture(scope="module")
def served() -> Result:
    policies = [POLICIES[0], POLICIES[2] | {"rebalance": {"interval_s": 6.0}}]
    changes = {"schedule.phase": "forward", "replicas": 2, "policies": policies, "serving": SERVING}
    return sim.run(TINY, overrides=changes)


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


NAMES = [*placement.FIGURES, *serving.FIGURES]


def draw(name: str, steps: Result, served: Result, **options: Any) -> Figure:
    figure = (placement.FIGURES | serving.FIGURES)[name]
    return figure(served if name in serving.FIGURES else steps, **options)


UNITS = {
    "device_matrix": ["sending device [index]", "receiving device [index]", "[kB]"],
    "node_matrix": ["sending node [index]", "receiving node [index]", "[MB]"],
    "link_load": ["busy per step [µs]", "[rank by load]", "nvlink links", "nic links"],
    "rank_loads": ["rank [by load]", "[mean = 1]", "uniform gate"],
    "redundancy": ["[max/mean]", "step time [ms]", "[GB/device]", "[slots]"],
    "rebalancing": ["step [batches]", "[max/mean]", "mean step with moves [µs]", "experts moved"],
    "latency_cdf": ["share of requests [%]", "time to first token [ms]", "time per output token [ms]", "SLO 100 ms"],
    "over_time": ["[requests]", "[% full]", "[k tokens/s]", "[max/mean]", "time [s]", "fault", "experts moved"],
    "throughput_against_latency": ["[tokens/s]", "[tokens/s/GPU]"],
}


@pytest.mark.parametrize("width_in", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_figures_name_their_units_and_save_as_vectors(
    steps: Result, served: Result, name: str, width_in: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = draw(name, steps, served, width_in=width_in)
    assert figure.get_figwidth() == width_in and figure.get_figheight() <= 7
    assert not plt.get_fignums(), "pyplot keeps nothing"
    found = drawn(figure, monkeypatch)
    words = " ".join(text.replace("\n", " ") for text, _ in found)
    for unit in UNITS[name]:
        assert unit in words
    result = served if name in serving.FIGURES else steps
    if name != "redundancy":  # whose lines are series of policies
        assert all(policy.name in words for policy in result.scenario.policies)
    apart(figure, found)
    figure.savefig(tmp_path / "figure.pdf")
    assert (tmp_path / "figure.pdf").stat().st_size > 2000


@pytest.mark.parametrize("width_in", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_long_names_do_not_overlap(
    steps: Result, served: Result, name: str, width_in: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def longer(policy: str) -> str:
        return f"{policy}, a policy with a long name"[:40]

    figure = draw(name, named(steps, longer), named(served, longer), width_in=width_in)
    apart(figure, drawn(figure, monkeypatch))


def test_overlaps_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the tests above."""
    figure = Figure()
    figure.text(0.5, 0.5, "one")
    figure.text(0.5, 0.5, "other")
    with pytest.raises(AssertionError, match="'other' covers 'one'"):
        apart(figure, drawn(figure, monkeypatch))


# Placement


def test_matrices_hold_the_bytes_of_the_tables(steps: Result) -> None:
    """What a device receives is dispatched by the row's device, or combined back by it."""
    pairs = steps.tables["pairs"]
    rows = [i for i, key in enumerate(zip(pairs["policy"], pairs["replica"], strict=True)) if key == ("eplb", 1)]
    figure = placement.device_matrix(steps, "eplb", replica=1)
    axis = figure.axes[0]
    shown = np.asarray(axis.images[0].get_array()) * 1e3
    expected = np.zeros((8, 8))
    for i in rows:
        expected[pairs["source"][i], pairs["destination"][i]] += pairs["dispatch_bytes"][i]
        expected[pairs["destination"][i], pairs["source"][i]] += pairs["combine_bytes"][i]
    assert shown == pytest.approx(expected)
    assert [line.get_xdata()[0] for line in axis.lines if line.get_xdata()[0] == line.get_xdata()[1]] == [3.5]
    nodes = placement.node_matrix(steps, ["linear", "eplb"])
    for axis in nodes.axes[:2]:
        values = np.asarray(axis.images[0].get_array())
        assert [float(text.get_text()) for text in axis.texts] == pytest.approx(values.ravel(), abs=0.006)
    with pytest.raises(KeyError, match="no policy 'nobody'"):
        placement.device_matrix(steps, "nobody")
    with pytest.raises(KeyError, match="in replica 2"):
        placement.node_matrix(steps, replica=2)


def test_links_are_sorted_by_class(steps: Result) -> None:
    figure = placement.link_load(steps)
    links = steps.tables["links"]
    panels = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in panels] == ["nvlink links", "pcie links", "nic links"]
    for axis in panels:
        kind = axis.get_title().split()[0]
        for line, policy in zip(axis.lines, POLICIES, strict=True):
            y = np.asarray(line.get_ydata(), dtype=float)
            assert (np.diff(y) <= 1e-12).all()
            head = zip(links["policy"], links["link_kind"], links["busy_s"], strict=True)
            busy = [seconds for name, of, seconds in head if (name, of) == (policy["name"], kind)]
            assert y.sum() == pytest.approx(sum(busy) / 2 * 1e6)


def test_rank_loads_average_to_one_beside_their_floor(steps: Result) -> None:
    axis = placement.rank_loads(steps).axes[0]
    curves = [np.asarray(line.get_ydata(), dtype=float) for line in axis.lines if len(line.get_ydata()) == 8]
    assert len(curves) == 5 and all(curve.mean() == pytest.approx(1) for curve in curves)
    devices = steps.devices
    by_step = devices[devices.policy == "linear"].groupby(["replica", "step"]).expert_tokens
    assert curves[0][0] == pytest.approx((by_step.max() / by_step.mean()).mean())
    assert curves[-1] == pytest.approx(placement.uniform_rank_loads(3 * 4 * 8 * 64, 8, 4, 32))
    assert np.ptp(curves[-1]) < np.ptp(curves[0])


@pytest.mark.parametrize(("ep_size", "k", "experts"), [(8, 4, 32), (4, 1, 4), (32, 8, 256)])
def test_uniform_ranks_against_draws(ep_size: int, k: int, experts: int) -> None:
    """Mean of 100 sorted draws, against four standard errors."""
    rng = stream(3, "uniform ranks")
    tokens = 512
    drawn = []
    for _ in range(100):
        chosen = np.argsort(rng.random((tokens, experts)), axis=1, kind="stable")[:, :k]
        loads = np.bincount(chosen.ravel() // (experts // ep_size), minlength=ep_size)
        drawn.append(np.sort(loads)[::-1] / loads.mean())
    found = placement.uniform_rank_loads(tokens * k, ep_size, k, experts)
    error = np.std(drawn, axis=0).max() / 10
    assert found == pytest.approx(np.mean(drawn, axis=0), abs=4 * error)
    assert abs(found - 1).max() > 10 * error


def test_redundancy_has_a_line_per_placement(steps: Result) -> None:
    figure = placement.redundancy(steps)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["eplb, round_robin replicas", "eplb + 8, moving", "linear"]
    imbalance, time, memory = figure.axes
    summary = steps.summary()
    for axis, metric, scale in ((imbalance, "device_max_over_mean", 1.0), (time, "step_time_s", 1e3)):
        rows = summary[summary.metric == metric].set_index("policy")["mean"] * scale
        lines = [container.lines[0].get_ydata() for container in axis.containers]
        assert [len(line) for line in lines] == [2, 1, 1]
        assert lines[0] == pytest.approx(rows.loc[["eplb", "eplb + 8"]].to_numpy())
        assert lines[2] == pytest.approx(rows.loc[["linear"]].to_numpy())
    held = memory.containers[0].lines[0].get_ydata()
    model = steps.scenario.model
    layer = model.expert_parameters * model.n_moe_layers  # fp8: a byte each
    assert (held[1] - held[0]) * 1e9 == pytest.approx(8 / 8 * layer)


def test_rebalancing_shows_moves_and_what_they_cost(steps: Result) -> None:
    over, below = placement.rebalancing(steps).axes
    marks = [line for line in over.lines if line.get_marker() == "v" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in marks] == [[2]]
    widths = np.array([[bar.get_width() for bar in container] for container in below.containers if len(container) == 1])
    step, moves = widths.reshape(len(POLICIES), 2).T
    assert (moves[:3] == 0).all() and moves[3] > 0
    summary = steps.summary()
    mean = summary[summary.metric == "step_and_moves_s"].set_index("policy")["mean"]
    assert step[3] + moves[3] == pytest.approx(mean["eplb + 8, moving"] * 1e6)


def test_figures_say_what_their_run_lacks(steps: Result, served: Result) -> None:
    plain = sim.run(TINY, overrides=["replicas=1", "steps.count=1", "steps.timed=none", "steps.warmup.steps=0"])
    for name, said in {
        "device_matrix": "steps.record_traffic: true",
        "node_matrix": "steps.record_traffic: true",
        "link_load": "steps.record_traffic: true",
        "rank_loads": "steps.timed: last or all",
        "redundancy": "do not differ in placement.num_redundant_experts",
        "rebalancing": r"no policy of this result moves experts \(rebalance.interval_steps\)",
        "latency_cdf": "a scenario with a serving block",
        "over_time": "a scenario with a serving block",
        "throughput_against_latency": "a scenario with a serving block",
    }.items():
        with pytest.raises(ValueError, match=said):
            figures.ALL[name](plain)
    some = {**steps.tables["steps"], "step_time_s": [None, *steps.tables["steps"]["step_time_s"][1:]]}
    with pytest.raises(ValueError, match=r"not every step was timed: run with steps.timed: all"):
        placement.rebalancing(replace(steps, tables=steps.tables | {"steps": some}))
    with pytest.raises(ValueError, match="no table 'devices'"):
        placement.rank_loads(served)
    short = {key: rows for key, rows in served.tables["timeline"].items() if key != "kv"}
    with pytest.raises(KeyError, match="table 'timeline' has no column 'kv'"):
        serving.over_time(replace(served, tables=served.tables | {"timeline": short}))


# Serving


def test_latencies_are_the_requests(served: Result) -> None:
    first, later = serving.latency_cdf(served).axes
    requests = served.requests
    for axis, column in ((first, "ttft_s"), (later, "tpot_s")):
        for line, policy in zip(axis.lines, served.scenario.policies, strict=False):
            times = requests[requests.policy == policy.name][column].to_numpy() * 1e3
            assert line.get_xdata() == pytest.approx(np.quantile(times, np.asarray(line.get_ydata()) / 100))
    assert first.lines[-1].get_xdata() == pytest.approx([100, 100])  # the SLO's; that of TPOT lies beyond the axis
    assert [text.get_text() for text in (*first.texts, *later.texts)] == ["SLO 100 ms", "SLO 500 ms →"]
    assert first.get_xscale() == "linear"


def test_an_axis_over_decades_is_logarithmic_and_one_without_times_says_so(served: Result) -> None:
    requests = served.tables["requests"]
    spread = [seconds * 10 ** (i % 3) for i, seconds in enumerate(requests["ttft_s"])]
    changed = {**requests, "ttft_s": spread, "tpot_s": [float("nan")] * len(spread)}
    first, later = serving.latency_cdf(replace(served, tables=served.tables | {"requests": changed})).axes
    assert first.get_xscale() == "log"
    assert [text.get_text() for text in later.texts] == ["no request has one"]


def test_time_runs_over_the_timeline(served: Result) -> None:
    figure = serving.over_time(served)
    queue, *_, imbalance = figure.axes
    timeline = served.timeline
    mean = timeline[timeline.policy == "linear"].groupby("time_s").queue.mean()
    assert queue.lines[0].get_ydata() == pytest.approx(mean.to_numpy())
    moved = served.rebalances
    times = moved[moved.done & (moved.effective_s <= 20)].effective_s.unique()
    marks = [line for line in imbalance.lines if line.get_marker() == "v"]
    assert len(marks) == 1 and marks[0].get_xdata() == pytest.approx(sorted(times)) and len(times) >= 3
    assert queue.patches[0].get_x() == 8 and queue.patches[0].get_width() == 4


def test_throughput_has_a_point_per_policy_with_intervals(served: Result) -> None:
    axis = serving.throughput_against_latency(served).axes[0]
    summary = served.summary().set_index(["metric", "policy"])["mean"]
    for container, policy in zip(axis.containers, served.scenario.policies, strict=True):
        assert container.has_xerr and container.has_yerr
        assert container.lines[0].get_xdata()[0] == summary["user_tokens_per_s", policy.name]
        assert container.lines[0].get_ydata()[0] == summary["output_tokens_per_s_per_gpu", policy.name]
    prefill = {**served.tables["service"], "user_tokens_per_s": [float("nan")] * 4}
    tables = served.tables | {"service": prefill}
    with pytest.raises(ValueError, match="no request has a second token"):
        serving.throughput_against_latency(
            replace(served, tables=tables, summary_rows=summarise(tables, served.scenario))
        )


def test_redundancy_of_a_serving_run_shows_rates_and_cache(served: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    words = " ".join(text for text, _ in drawn(placement.redundancy(served), monkeypatch))
    assert "output [tokens/s/GPU]" in words and "[k tokens]" in words


def test_command_line_draws_stored_runs_and_refuses_strangers(
    served: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sim.store import write

    folder, out = write(served, tmp_path), tmp_path / "figure.pdf"
    for name in serving.FIGURES:
        assert figures.main([str(folder), str(out), "--figure", name]) == 0
    assert out.stat().st_size > 2000
    for name, said in (("tradeoff", "this run has no tradeoff: no metric"), ("rank_loads", "no table 'devices'")):
        assert figures.main([str(folder), str(out), "--figure", name]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("most", "unit", "expected"),
    [(0.0032, "s", (1e3, "ms")), (5.1e9, "B", (1e-9, "GB")), (7.0, "s", (1.0, "s")), (0.0, "B", (1.0, "B"))],
)
def test_units_get_the_prefix_that_reads_best(most: float, unit: str, expected: tuple[float, str]) -> None:
    scale, name = prefixed(most, unit)
    assert (pytest.approx(scale), name) == expected
