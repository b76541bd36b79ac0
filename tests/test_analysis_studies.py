"""Figures of sweeps, searches, sensitivity and validation carry what they claim to, at a page's and a column's width."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

from analysis import figures, fronts, sensitivity, sweeps, tradeoffs, validation
from analysis.metrics import front
from sim.optimizing.front import Front
from sim.statistics import half_width
from tests.drawings import apart, drawn
from tests.made_up import DRAWN, GRID, KEPT, KINDS, MEMORY, POLICIES, TIME, VIO, asked, rows, searched, sweep

TINY = Path(__file__).resolve().parents[1] / "scenarios" / "tiny.yaml"
WIDTHS = (7.0, 3.5)


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


NULLS = {"traffic.latent_dof": [None, 4, 8], "cluster.nodes": [4, 16]}
DRAW: dict[str, tuple[Any, list[str]]] = {
    "grid": (
        lambda w: sweeps.small_multiples(sweep(GRID), width_in=w),
        ["step time [ms]", "topk_group [1]", "nodes 16"],
    ),
    "kinds": (lambda w: sweeps.small_multiples(sweep(KINDS), width_in=w), ["kind [setting]", "linear"]),
    "design": (
        lambda w: sweeps.small_multiples(
            sweep({key: [] for key in ("x.tokens_per_rank", "y.load_s")}, DRAWN), width_in=w
        ),
        ["tokens_per_rank [tokens]"],
    ),
    "pareto": (lambda w: tradeoffs.pareto(sweep(GRID), width_in=w), ["labels: topk_group, nodes", "better ↑"]),
    "search": (
        lambda w: fronts.search(searched(TIME, KEPT), width_in=w),
        ["step time [ms]", "compromise", "not feasible"],
    ),
    "pareto of MaxVio": (
        lambda w: tradeoffs.pareto(sweep(GRID), x="max_vio_batch", width_in=w),
        ["MaxVio of a batch [max/mean - 1]", "← better"],
    ),
    "pareto up MaxVio": (
        lambda w: tradeoffs.pareto(sweep(GRID), y="max_vio_batch", width_in=w),
        ["MaxVio of a batch [max/mean - 1]", "↓ better"],
    ),
    "search of MaxVio": (
        lambda w: fronts.search(searched(TIME, VIO), width_in=w),
        ["MaxVio of a batch [max/mean - 1]", "↓ better"],
    ),
    "search of MaxVio and more": (
        lambda w: fronts.search(searched(TIME, VIO, KEPT), width_in=w),
        ["MaxVio of a batch [max/mean - 1]", "↓ better"],
    ),
    "search along MaxVio": (
        lambda w: fronts.search(searched(VIO, KEPT, MEMORY), width_in=w),
        ["MaxVio of a batch [max/mean - 1]", "← better"],
    ),
    "nulls": (
        lambda w: sweeps.small_multiples(sweep(NULLS), width_in=w),
        ["latent_dof [setting]", "null", "nodes 16"],
    ),
    "three goals": (lambda w: fronts.search(searched(TIME, KEPT, MEMORY), width_in=w), ["memory of a device [GB]"]),
    "one goal": (lambda w: fronts.search(searched(TIME), width_in=w), ["trial [number]"]),
    "sensitivity": (
        lambda w: sensitivity.sensitivity(asked(), width_in=w),
        ["lead of DeepSeek-V3 (node-limited + bias) [%]", "another wins", "Sobol index [share of variance]"],
    ),
    "errors": (
        lambda w: validation.errors(rows(), width_in=w),
        ["ours against published [%]", "misses its bar", "the worst of all figures"],
    ),
    "parity": (
        lambda w: validation.parity(rows(), width_in=w),
        ["published [unit of the row]", "ours [unit of the row]"],
    ),
}


@pytest.mark.parametrize("width_in", WIDTHS)
@pytest.mark.parametrize("name", DRAW)
def test_figures_name_their_units_and_save_as_vectors(
    name: str, width_in: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, units = DRAW[name]
    figure = draw(width_in)
    assert figure.get_figwidth() == width_in and figure.get_figheight() <= 9.5
    assert not plt.get_fignums(), "pyplot keeps nothing"
    found = drawn(figure, monkeypatch)
    words = " ".join(text.replace("\n", " ").replace("_ ", "_") for text, _ in found)
    for unit in units:
        assert unit in words
    apart(figure, found)
    figure.savefig(tmp_path / "figure.pdf")
    assert (tmp_path / "figure.pdf").stat().st_size > 2000


def test_small_multiples_hold_means_and_intervals() -> None:
    found = sweep(GRID)
    figure = sweeps.small_multiples(found, "nodes", "kept_affinity", col="topk_group", hue="policy")
    assert [axis.get_title() for axis in figure.axes] == [f"topk_group {value}" for value in (1, 2, 4, 8)]
    runs = found.runs
    for axis, group in zip(figure.axes, (1, 2, 4, 8), strict=True):
        for line, band, policy in zip(axis.lines, axis.collections, POLICIES, strict=True):
            mine = runs[(runs.policy == policy) & (runs["gating.select.topk_group"] == group)].groupby("cluster.nodes")
            mean = mine.kept_affinity.mean().to_numpy()
            half = mine.kept_affinity.apply(lambda v: half_width(v.to_numpy())).to_numpy()
            assert line.get_ydata() == pytest.approx(mean)
            corners = band.get_paths()[0].vertices[:, 1]
            assert [corners.min(), corners.max()] == pytest.approx([(mean - half).min(), (mean + half).max()])
    assert len(sweeps.small_multiples(found, "topk_group", hue="nodes").axes) == len(POLICIES)


def test_an_axis_over_decades_is_logarithmic_and_one_without_order_is_not() -> None:
    wide = sweeps.small_multiples(sweep({"u": [1e-4, 1e-3, 1e-2]}))
    assert wide.axes[0].get_xscale() == "log"
    kinds = sweeps.small_multiples(sweep({"placement": ['{"kind": "eplb"}', "linear"]}))
    assert [tick.get_text() for tick in kinds.axes[0].get_xticklabels()] == ["eplb", "linear"]
    assert sweeps.small_multiples(sweep({"m": [1, 2, 3]})).axes[0].get_xscale() == "linear"


def test_sweeps_refuse_strangers() -> None:
    with pytest.raises(KeyError, match=r"no axis 'speed'; there are gating\.select\.topk_group, cluster\.nodes"):
        sweeps.small_multiples(sweep(GRID), "speed")
    with pytest.raises(KeyError, match="no metric 'speed'"):
        sweeps.small_multiples(sweep(GRID), metric="speed")
    with pytest.raises(ValueError, match="no axis of this sweep takes several values"):
        sweeps.small_multiples(sweep({"a": [1]}))
    with pytest.raises(ValueError, match="no point of this sweep has mfu"):
        sweeps.small_multiples(sweep(GRID), metric="mfu")
    with pytest.raises(ValueError, match="too many axes for one figure; keep one value of d"):
        sweeps.small_multiples(sweep({key: [1, 2] for key in "abcd"}, replicas=1))


def test_a_searchs_front_is_its_own() -> None:
    found = searched(TIME, KEPT)
    table = found.trials
    on = front(*(np.where(table.feasible, table[name], np.nan) for name in ("step_time_s", "kept_affinity")), ("lower", "higher"))  # type: ignore[arg-type]  # fmt: skip
    assert set(table.trial[on]) == {trial.index for trial in found.best_of_all}
    axis = fronts.search(found).axes[0]
    best = [line for line in axis.lines if line.get_markersize() == 6.5]
    assert sum(len(line.get_xdata()) for line in best) == on.sum()
    crosses = [line for line in axis.lines if line.get_marker() == "x"]
    assert sum(len(line.get_xdata()) for line in crosses) == (~table.feasible).sum()
    untried = Front(found.scenario, found.axes, found.goals, found.limits, ())
    with pytest.raises(ValueError, match="no trial of this search has run"):
        fronts.search(untried)


def test_a_tornado_shows_leads_and_who_overturns_them(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = sensitivity.sensitivity(asked())
    tornado, sobol = figure.axes
    ends = sorted(bar.get_x() + bar.get_width() for bar in tornado.patches)
    assert ends == pytest.approx(sorted([-2, 3, 5, 5.5, 14, 9, 7, 6.5]))
    assert [text.get_text() for text in tornado.texts] == ["top-k"]
    assert next(label.get_text() for label in tornado.get_yticklabels()) == "NIC bandwidth"
    assert max(bar.get_width() for bar in sobol.patches) == pytest.approx(0.62)
    assert len(sensitivity.sensitivity(asked(samples=False)).axes) == 1
    idle = asked()
    idle.one_at_a_time["effect"] = 0.0
    with pytest.raises(ValueError, match="no constant that was varied has any effect on step_time_s"):
        sensitivity.sensitivity(idle)


def test_validation_shows_every_row_and_names_the_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rows()
    figure = validation.errors(found)
    shown = np.concatenate(
        [line.get_xdata() for axis in figure.axes for line in axis.lines if line.get_linestyle() == "None"]
    )
    assert len(shown) == len(found)
    table = validation._frame(found)
    assert np.sort(shown[np.isfinite(shown)]) == pytest.approx(np.sort(table.error.dropna()))
    assert table.error.max() == pytest.approx(210)
    crosses = [line for axis in figure.axes for line in axis.lines if line.get_marker() == "X"]
    assert sum(len(line.get_xdata()) for line in crosses) == sum(not row.passed for _, row in found)
    equal = validation.parity(found).axes[0]
    dots = [line for line in equal.lines if line.get_linestyle() == "None" and line.get_marker() != "x"]
    positive = [row for _, row in found if row.relation == "equal" and row.ours > 0]
    assert sum(len(line.get_xdata()) for line in dots) == len(positive)
    with pytest.raises(ValueError, match="no rows to draw"):
        validation.errors([])
    with pytest.raises(KeyError, match="no group 'nobody'"):
        validation.rows(Path(), None, ["nobody"])


def test_rows_of_a_real_group_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    found = validation.rows(TINY.parent, None, ["geometry"])
    assert len(found) >= 40
    figure = validation.errors(found, width_in=3.5)
    apart(figure, drawn(figure, monkeypatch))


def test_the_command_line_lists_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert figures.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert figures.main(["--figure", "list"]) == 0 and capsys.readouterr().out == listed
    for name in figures.ALL | figures.SWEEPS:
        (line,) = {line for line in listed.splitlines() if line.split()[:1] == [name]}
        assert 30 < len(line) <= 140 and "`" not in line
    for options, said in (
        ([str(TINY), "out.png", "--figure", "paretto"], "did you mean pareto?"),
        ([str(TINY), "out.png", "--width", "300"], "between 3 and 20 inches"),
        ([str(TINY)], "SOURCE, OUT"),
    ):
        with pytest.raises(SystemExit) as ended:
            figures.main(options)
        assert ended.value.code == 2 and said in capsys.readouterr().err
