"""Figures carry what they claim to, and the notebook runs as committed."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import pytest  # noqa: E402

import sim  # noqa: E402
from analysis import figures  # noqa: E402
from sim.results import Result  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def result() -> Result:
    return sim.run(ROOT / "scenarios" / "tiny.yaml", overrides=["replicas=2", "steps.count=2"])


@pytest.fixture(autouse=True)
def close_figures() -> object:
    yield
    plt.close("all")


@pytest.mark.parametrize("name", sorted(figures.FIGURES))
def test_every_figure_draws_and_saves(result: Result, name: str, tmp_path: Path) -> None:
    figure = figures.FIGURES[name](result)
    for suffix in ("png", "pdf", "svg"):
        out = tmp_path / f"figure.{suffix}"
        figure.savefig(out)
        assert out.stat().st_size > 2000
    labels = [axis.get_xlabel() + axis.get_ylabel() for axis in figure.axes]
    assert any(labels)


def test_tradeoff_has_one_dot_per_policy_and_units(result: Result) -> None:
    figure = figures.tradeoff(result)
    policies = len(result.scenario.policies)
    for axis in figure.axes:
        assert len(axis.containers) == policies
    text = " ".join(axis.get_xlabel() for axis in figure.axes)
    assert "[ms]" in text and "[GB per step]" in text


def test_breakdown_adds_up_to_the_step(result: Result) -> None:
    axis = figures.step_breakdown(result).axes[0]
    widths = sum(bar.get_width() for container in axis.containers for bar in container)
    mean = result.summary()
    total = mean[mean.metric == "step_time_s"]["mean"].sum() * 1e3
    assert widths == pytest.approx(total, rel=1e-9)
    assert "[ms]" in axis.get_xlabel()


def test_heatmap_has_a_panel_per_policy_and_refuses_strangers(result: Result) -> None:
    assert len(figures.load_heatmap(result, ["top-k", "random"]).axes) == 3  # two panels and the colour bar
    with pytest.raises(KeyError, match="no policy 'nobody'"):
        figures.load_heatmap(result, ["nobody"])


def test_untimed_and_dense_results_say_so() -> None:
    untimed = sim.run(
        ROOT / "scenarios" / "tiny.yaml", overrides=["replicas=1", "steps.count=1", "steps.timed=none", "steps.warmup.steps=0"]
    )
    with pytest.raises(ValueError, match="no step of this result was timed"):
        figures.step_breakdown(untimed)
    figures.tradeoff(untimed)


def test_notebook_runs_on_tiny() -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    path = ROOT / "analysis" / "policy_tradeoffs.ipynb"
    notebook = nbformat.read(path, as_version=4)
    assert any(cell.get("outputs") for cell in notebook.cells), "committed executed"
    assert str(ROOT.parent) + "/" not in path.read_text(encoding="utf-8")
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    pictures = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(pictures) == 4
