"""Figures of sweeps, searches, sensitivity and validation carry what they claim to, at a page's and a column's width."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import sim
from analysis import figures, fronts, sensitivity, sweeps, tradeoffs, validation
from analysis.metrics import front
from sim.optimizing.front import Front
from sim.optimizing.goals import Goal, Limit
from sim.optimizing.search import Trial
from sim.optimizing.space import Place
from sim.results import METRICS
from sim.rng import stream
from sim.statistics import half_width
from sim.validation import Figure as Row
from tests.drawings import apart, drawn

TINY = Path(__file__).resolve().parents[1] / "scenarios" / "tiny.yaml"
WIDTHS = (7.0, 3.5)
POLICIES = ("top-k", "DeepSeek-V3 (node-limited + bias)", "random")
METRIC = {metric.name: metric for metric in METRICS}


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def sweep(axes: dict[str, list[Any]], points: list[tuple[Any, ...]] | None = None, replicas: int = 3) -> Any:
    """Made-up runs of a sweep over ``axes``: a grid, or ``points``."""
    rng, rows = stream(1, "made-up sweep"), []
    for point, values in enumerate(points or itertools.product(*axes.values())):
        for (i, policy), replica in itertools.product(enumerate(POLICIES), range(replicas)):
            row = {"point": point} | dict(zip(axes, values, strict=True)) | {"policy": policy, "replica": replica}
            row |= dict.fromkeys(METRIC, float("nan"))
            row["step_time_s"] = 1e-3 * (3 + i + point % 5 + 0.1 * rng.random())
            row["kept_affinity"] = 1 - 0.05 * i - 0.01 * (point % 3) + 0.01 * rng.random()
            rows.append(row)
    return SimpleNamespace(axes=axes, runs=pd.DataFrame(rows), policies=list(POLICIES), metrics=METRICS)


GRID = {"gating.select.topk_group": [1, 2, 4, 8], "cluster.nodes": [4, 16]}
KINDS = {"placement.kind": ["linear", "annealed", "a kind with a long name"], "policies.*.balance.bias_update_rate": [1e-4, 1e-3, 1e-2]}  # fmt: skip
DRAWN = [(float(a), float(b)) for a, b in np.exp(stream(2, "design").uniform(0, 4, (20, 2))).round(2)]


def rows() -> list[tuple[str, Row]]:
    """Made-up rows of nine groups, as many as the real ones."""
    rng, found = stream(3, "made-up rows"), []
    for group, n in enumerate((44, 18, 95, 49, 17, 12, 9, 20, 8)):
        for i in range(n):
            kind: Any = ("prediction", "calibration", "derived")[0 if i % 4 else i // 4 % 3]
            published = float(10 ** rng.uniform(-2, 4))
            row = Row(
                f"figure {i} of a group", "made up", published, published * float(rng.normal(1, 0.04)), 0.1, kind=kind
            )
            found.append((f"group_{group}", row))
    found.append(("group_2", Row("the worst of all figures, with a long name", "made up", 10.0, 31.0, 0.1)))
    found.append(("group_2", Row("a bound that is kept", "made up", 10.0, 3.0, 0.0, relation="at_most")))
    found.append(("group_8", Row("never answered", "made up", 10.0, float("nan"), 0.1)))
    return found


def asked(*, samples: bool = True) -> Any:
    """A made-up answer: the lead of the second policy is 6 %, and one constant overturns it."""
    names = ["NIC bandwidth", "memory bandwidth", "grouped GEMM rate", "popularity of the topics", "nothing"]
    table = pd.DataFrame({"constant": names, "effect": [0.1, 0.1, 0.1, 0.1, 0.0]})
    for end, leads in (("low", [-2, 3, 5, 5.5, 6]), ("high", [14, 9, 7, 6.5, 6])):
        table[f"{end}_winner"] = [POLICIES[1] if lead > 0 else POLICIES[0] for lead in leads]
        table[f"{end}_ahead"] = np.abs(leads) / 100
    table["changes"] = table.low_winner != POLICIES[1]
    index = np.array([0.6, 0.3, 0.1, 0.02, 0.0])
    found = {"first": index, "total": index + 0.02, "first_half_width": 0.03, "total_half_width": 0.04}
    indices = pd.DataFrame({"constant": names, **found} if samples else {})
    stated = SimpleNamespace(winner=1, ahead=0.06)
    return SimpleNamespace(policies=POLICIES, stated=stated, metric=METRIC["step_time_s"], one_at_a_time=table, indices=indices)  # fmt: skip


def searched(*goals: Goal) -> Front:
    """A made-up search of 40 trials under a limit."""
    rng, limit = stream(4, "made-up search"), Limit(METRIC["kept_affinity"], True, 0.95)
    trials = []
    for i in range(40):
        nodes, copies = int(rng.integers(1, 9)), int(rng.choice([0, 8, 16]))
        trial = Trial(i, Place(values=(nodes, copies), policy=POLICIES[i % 2]))
        time, kept = 3e-3 + 2e-4 * nodes + 1e-4 * rng.random(), 1 - 0.06 / nodes - 0.01 * (i % 2)
        each = {"step_time_s": time, "kept_affinity": kept, "memory_bytes": 30e9 + 3e8 * copies}
        trial.judge({name: [value, value * 1.01] for name, value in each.items()}, goals, [limit])
        trials.append(trial)
    keys = ("gating.select.topk_group", "placement.num_redundant_experts")
    return Front(sim.load(TINY), keys, goals, (limit,), tuple(trials))


TIME, KEPT, MEMORY = Goal(METRIC["step_time_s"], False), Goal(METRIC["kept_affinity"], True), Goal(METRIC["memory_bytes"], False)  # fmt: skip
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
