"""Figures carry what they claim to."""

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
from analysis import figures
from sim import store
from sim.results import Result, summarise

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "scenarios" / "tiny.yaml"


@pytest.fixture(scope="module")
def result() -> Result:
    return sim.run(TINY, overrides=["replicas=2", "steps.count=2", "steps.record_topic_experts=true"])


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def without(result: Result, table: str, column: str) -> Result:
    tables = {
        name: {key: rows for key, rows in t.items() if (name, key) != (table, column)}
        for name, t in result.tables.items()
    }
    return replace(result, tables=tables)


def blank(result: Result, table: str, policy: str | None, columns: tuple[str, ...]) -> Result:
    """The same result with ``columns`` unknown (None) for one policy, or for all."""
    rows = result.tables[table]
    hit = [policy in (None, name) for name in rows["policy"]]
    new = {
        c: [None if h and c in columns else v for h, v in zip(hit, values, strict=True)] for c, values in rows.items()
    }
    tables = result.tables | {table: new}
    return replace(result, tables=tables, summary_rows=summarise(tables, result.scenario))


def texts(figure: Figure) -> str:
    figure.draw_without_rendering()
    return " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_visible())


def mean(result: Result, metric: str) -> Any:
    summary = result.summary()
    rows = summary[summary.metric == metric].set_index("policy")
    return rows["mean"].loc[[policy.name for policy in result.scenario.policies]].to_numpy()


@pytest.mark.parametrize("name", sorted(figures.FIGURES))
def test_every_figure_draws_and_saves(result: Result, name: str, tmp_path: Path) -> None:
    figure = figures.FIGURES[name](result)
    assert isinstance(figure, Figure)
    assert 3.5 <= figure.get_figwidth() <= 7
    assert not plt.get_fignums(), "pyplot keeps nothing"
    for suffix in ("png", "pdf", "svg"):
        out = tmp_path / f"figure.{suffix}"
        figure.savefig(out)
        assert out.stat().st_size > 2000


UNITS = {
    "tradeoff": ["[share of top-k's]", "[max/mean - 1]", "[GB per step]", "[ms]"],
    "load_heatmap": ["[rank by load]", "layer [index]", "[mean of layer = 1]"],
    "topic_heatmap": ["expert of layer 2 [by the topic", "[mean of topic = 1]", "science", "literature"],
    "max_vio_over_steps": ["step [batches]", "[max/mean - 1]"],
    "step_breakdown": ["step time [ms]"],
}


@pytest.mark.parametrize("name", sorted(figures.FIGURES))
def test_every_axis_names_its_unit_and_every_policy_is_named(result: Result, name: str) -> None:
    text = texts(figures.FIGURES[name](result))
    for unit in UNITS[name]:
        assert unit in text
    for policy in result.scenario.policies:
        assert policy.name in text.replace("\n", " ")


@pytest.mark.parametrize("name", sorted(figures.FIGURES))
def test_labels_of_long_names_do_not_overlap(result: Result, name: str) -> None:
    long = {
        p.name: f"{p.name}, a policy with a rather long name, limited to 4 of 64 (V2 rule)"
        for p in result.scenario.policies
    }
    tables = {
        key: {**rows, "policy": [long[policy] for policy in rows["policy"]]}
        for key, rows in result.tables.items()
        if rows
    }
    policies = [policy.model_copy(update={"name": long[policy.name]}) for policy in result.scenario.policies]
    scenario = result.scenario.model_copy(update={"policies": policies})
    figure = figures.FIGURES[name](Result(scenario, tables, summarise(tables, scenario), 0))
    figure.draw_without_rendering()
    names = {text.replace(" ", "") for text in long.values()}
    boxes = [
        text.get_window_extent()
        for text in figure.findobj(matplotlib.text.Text)
        if text.get_visible() and text.get_text().replace("\n", "").replace(" ", "") in names
    ]
    assert len(boxes) == len(long)
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0 and box.y1 <= figure.bbox.height
        for other in boxes[:i]:
            assert not box.overlaps(other)


def test_tradeoff_has_one_dot_per_policy_with_its_interval(result: Result) -> None:
    figure = figures.tradeoff(result)
    for axis, (metric, scale) in zip(
        figure.axes,
        [("kept_affinity", 1), ("max_vio_batch", 1), ("inter_node_bytes", 1e-9), ("step_time_s", 1e3)],
        strict=True,
    ):
        dots = [float(container.lines[0].get_xdata()[0]) for container in axis.containers]
        assert dots == pytest.approx(mean(result, metric) * scale, rel=1e-12)
        assert all(container.has_xerr for container in axis.containers)
    one = figures.tradeoff(sim.run(TINY, overrides=["replicas=1", "steps.count=1", "steps.warmup.steps=0"]))
    assert not any(container.has_xerr for axis in one.axes for container in axis.containers)


def test_breakdown_adds_up_to_the_step(result: Result) -> None:
    axis = figures.step_breakdown(result).axes[0]
    bars = [c for c in axis.containers if isinstance(c, matplotlib.container.BarContainer)]
    assert [len(container) for container in bars] == [len(result.scenario.policies)] * len(figures.PARTS)
    widths = sum(np.array([bar.get_width() for bar in container]) for container in bars)
    assert widths == pytest.approx(mean(result, "step_time_s") * 1e3, rel=1e-9)


def test_steps_figure_shows_the_means_and_the_floor(result: Result) -> None:
    axis = figures.max_vio_over_steps(result).axes[0]
    lines = {line.get_label(): np.asarray(line.get_ydata(), dtype=float) for line in axis.lines}
    steps = result.steps
    for policy in (p.name for p in result.scenario.policies):
        assert lines[policy] == pytest.approx(steps[steps.policy == policy].groupby("step").max_vio.mean().to_numpy())
    assert lines["uniform floor"][0] == pytest.approx(steps.max_vio_floor.iloc[0])


def test_single_axis_figures_draw_into_a_given_axis(result: Result) -> None:
    figure, axes = plt.subplots(1, 2)
    assert figures.step_breakdown(result, axes[0]) is figure
    assert figures.max_vio_over_steps(result, axes[1]) is figure
    assert plt.fignum_exists(figure.number), "the caller's figure stays open"
    assert axes[0].patches and axes[1].lines


def test_heatmap_rows_average_to_one_and_are_sorted_on_request(result: Result) -> None:
    experts = result.scenario.model.n_routed_experts
    for by_load in (True, False):
        figure = figures.load_heatmap(result, "top-k", by_load=by_load)
        image = np.exp(np.asarray(figure.axes[0].images[0].get_array()))
        assert image.shape == (result.scenario.model.n_moe_layers, experts)
        assert image.mean(axis=1) == pytest.approx(1, abs=2e-3)  # unused experts are drawn as a thousandth
        assert (np.diff(image, axis=1) <= 1e-12).all() == by_load


def test_heatmap_has_a_panel_per_policy_and_refuses_strangers(result: Result) -> None:
    assert len(figures.load_heatmap(result, ["top-k", "random"]).axes) == 3  # two panels and the colour bar
    with pytest.raises(KeyError, match="no policy 'nobody'"):
        figures.load_heatmap(result, ["nobody"])
    with pytest.raises(KeyError, match="no replica 2"):
        figures.load_heatmap(result, replica=2)


def test_topic_heatmap_shows_the_loads_of_one_layer(result: Result) -> None:
    """Rows average to one and hold the recorded loads; what was not recorded is refused."""
    figure = figures.topic_heatmap(result, ["top-k", "random"], layer=3)
    specialised, floor = (np.exp(np.asarray(axis.images[0].get_array())) for axis in figure.axes[:2])
    assert specialised.shape == (3, result.scenario.model.n_routed_experts)
    assert specialised.mean(axis=1) == pytest.approx(1, abs=2e-3)
    topics = result.topics
    rows = topics[
        (topics.policy == "top-k") & (topics.replica == 0) & (topics.layer == 3) & (topics.topic == "science")
    ]
    loads = np.sum(rows.expert_tokens.to_list(), axis=0)
    assert np.sort(specialised[0]) == pytest.approx(np.sort(np.maximum(loads / loads.mean(), 1e-3)))
    assert specialised.std() > 3 * floor.std()
    with pytest.raises(KeyError, match=r"no layer 9 of replica 0; there are layers \[1, 2, 3\]"):
        figures.topic_heatmap(result, layer=9)
    with pytest.raises(ValueError, match="record_topic_experts: true"):
        figures.topic_heatmap(without(result, "topics", "expert_tokens"))


@pytest.mark.parametrize(
    ("name", "table", "column"),
    [
        ("load_heatmap", "experts", "tokens"),
        ("max_vio_over_steps", "steps", "max_vio_floor"),
        ("step_breakdown", "steps", "waiting_s"),
    ],
)
def test_a_missing_column_is_named(result: Result, name: str, table: str, column: str) -> None:
    with pytest.raises(KeyError, match=f"table '{table}' has no column '{column}'"):
        figures.FIGURES[name](without(result, table, column))


def test_a_missing_metric_is_named(result: Result) -> None:
    rows = result.summary()
    rows = rows[rows.metric != "kept_affinity"]
    with pytest.raises(KeyError, match="no metric 'kept_affinity'; there are"):
        figures.tradeoff(replace(result, summary_rows={str(c): rows[c].tolist() for c in rows}))


def test_untimed_results_say_so() -> None:
    untimed = sim.run(TINY, overrides=["replicas=1", "steps.count=1", "steps.timed=none", "steps.warmup.steps=0"])
    with pytest.raises(ValueError, match="no step of this result was timed"):
        figures.step_breakdown(untimed)
    figure = figures.tradeoff(untimed)
    assert [len(axis.containers) for axis in figure.axes] == [5, 5, 5, 0]
    assert "not measured" in texts(figure)


def test_a_first_policy_without_experts_leaves_the_others_drawn(result: Result) -> None:
    gate = ("max_vio", "max_vio_floor", "kept_affinity", "inter_node_bytes")
    mixed = blank(result, "steps", "top-k", gate)
    assert [len(axis.containers) for axis in figures.tradeoff(mixed).axes] == [4, 4, 4, 5]
    figure = figures.max_vio_over_steps(mixed)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert "top-k" not in labels and "top-k + bias" in labels and "uniform floor" in labels
    dense = blank(result, "steps", None, gate)
    with pytest.raises(ValueError, match="no policy of this result has routed experts"):
        figures.max_vio_over_steps(dense)
    with pytest.raises(ValueError, match="no policy of this result has routed experts"):
        figures.load_heatmap(replace(result, tables=result.tables | {"experts": {}}))


def test_a_stored_run_gives_the_same_figures(
    result: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = store.write(result, tmp_path)
    again = store.read(folder)
    assert again.summary().equals(result.summary())
    assert again.steps.equals(result.steps) and again.experts.equals(result.experts)
    out = tmp_path / "figure.png"
    assert figures.main([str(folder), str(out), "--figure", "step_breakdown"]) == 0
    assert out.stat().st_size > 2000
    assert figures.main([str(tmp_path), str(out)]) == 2  # a folder, but not a run's
    assert "manifest.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        figures.main([str(folder), str(out), "--set", "seed=3"])


def test_command_line_runs_a_scenario(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figure.svg"
    assert figures.main([str(TINY), str(out), "--set", "replicas=1", "--set", "steps.count=1"]) == 0
    assert out.stat().st_size > 2000
    assert figures.main([str(TINY), str(out), "--set", "steps.count=-1"]) == 2
    assert "steps.count" in capsys.readouterr().err


def test_readme_picture_is_small() -> None:
    assert 10_000 < (ROOT / "analysis" / "v3_tradeoff.png").stat().st_size <= 150_000
