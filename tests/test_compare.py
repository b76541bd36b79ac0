"""Stored runs: their pages by command, and how they differ."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")


import numpy as np
import pytest

from sim import store
from sim.estimate import estimate
from sim.report.__main__ import distinct, found, main
from sim.report.compare import changed_keys, compare, unpaired
from sim.report.differences import compared, text
from sim.results import Result, summarise
from sim.study import simulate
from tests import reported
from tests.reported import Outline

# --- comparison ---


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stored runs: a base, one with another topk_group, one with another seed."""
    out, policies = tmp_path_factory.mktemp("runs"), [{"name": "a"}, {"name": "b", "select": "group_limited"}]
    changes: dict[str, dict[str, Any]] = {
        "base": {},
        "wider": {"policies__1__select__topk_group": 2},
        "seed": {"seed": 7},
    }
    runs = {}
    for name, change in changes.items():
        result = reported.run(steps__count=1, policies=policies, **change)
        runs[name] = store.write(result, out)
    return runs


def test_differences_are_paired_where_tokens_are_the_same(three: dict[str, Path]) -> None:
    results = {name: store.read(folder) for name, folder in three.items()}
    frame = compare(results)
    wider, seed = frame[frame.run == "wider"], frame[frame.run == "seed"]
    assert wider.paired.all() and not seed.paired.any()
    same = wider[wider.policy == "a"]
    assert (same.difference == 0).all() and (same.half_width == 0).all(), "policy a is the same in both"
    (row,) = wider[(wider.policy == "b") & (wider.metric == "kept_affinity")].to_dict("records")
    mine, theirs = (
        r.summary().set_index(["policy", "metric"]).loc[("b", "kept_affinity"), "mean"]
        for r in (results["base"], results["wider"])
    )
    assert row["reference"] == mine and row["value"] == theirs and row["difference"] == pytest.approx(theirs - mine)
    assert row["value"] == 1.0, "two groups of two limit nothing"
    assert unpaired(results["base"], results["seed"]) == "seed" and not unpaired(results["base"], results["wider"])


def test_welchs_interval_of_independent_runs(three: dict[str, Path]) -> None:
    from scipy.stats import ttest_ind

    from sim.report.compare import _welch

    a, b = np.array([1.0, 2.0, 4.0]), np.array([3.0, 3.5, 9.0, 4.0])
    interval = ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    assert _welch(a, b) == pytest.approx((interval.high - interval.low) / 2)


def test_what_differs_in_the_scenarios_is_named(three: dict[str, Path]) -> None:
    results = {name: store.read(folder) for name, folder in three.items()}
    keys = dict(changed_keys(results))
    assert keys == {"seed": ["0", "0", "7"], "policies.b.select.topk_group": ["1", "2", "1"]}
    versions = [store.manifest_of(folder)["versions"] for folder in three.values()]
    said = text(compared(results, [versions[0], versions[1] | {"numpy": "0.1"}, versions[2]]), list(results))
    assert "policies.b.select.topk_group" in said and "numpy" in said and "same seed and traffic as base" in said
    assert "seed: seed is not that of base" in said


def test_signs_and_intervals_of_the_text() -> None:
    """By hand: kept affinity 0.9 to 0.45 and back, each a difference of 0.45 with an interval of t(0.975, 1) x 0.01."""

    def made(values: list[float], **changes: Any) -> Result:
        base = reported.result("pipelined").scenario
        policy = base.policies[0].model_copy(update={"name": "p"})
        scenario = base.model_copy(update={"policies": (policy,), "replicas": len(values)} | changes)
        table = {
            "policy": ["p"] * 2,
            "replica": [0, 1],
            "step": [0, 0],
            "kept_affinity": values,
            "step_time_s": [1.0, 1.0],
        }
        tables = {"steps": table}
        return Result(scenario, tables, summarise(tables, scenario), 0)

    low, high = made([0.45, 0.44]), made([0.9, 0.91])
    for runs, cell in (
        ({"x": low, "y": high}, "0.9050 (+103 % ±29)"),
        ({"x": high, "y": low}, "0.4450 (-51 % ±14)"),
    ):
        ((title, head, lines),) = compared(runs, [{}, {}]).grids
        assert title == "kept affinity" and head == ["policy", "x", "y"] and lines[0][2] == cell
        assert cell in text(compared(runs, [{}, {}]), ["x", "y"])
    frame = compare({"x": low, "y": high}).set_index("metric")
    assert frame.loc["kept_affinity", "difference"] == pytest.approx(0.46)
    assert frame.loc["kept_affinity", "half_width"] == pytest.approx(12.7062 * 0.01, rel=1e-5) and frame.paired.all()
    independent = compare({"x": low, "y": made([0.9, 0.91], seed=5)}).set_index("metric")
    assert not independent.paired.any() and independent.loc["kept_affinity", "half_width"] < 0.1


@pytest.mark.parametrize("what", ["seed", "replicas", "traffic", "requests", "model", "parallel"])
def test_replicas_are_paired_only_where_everything_that_is_drawn_is_the_same(what: str) -> None:
    result = reported.result("serving")
    scenario, serving = result.scenario, result.scenario.serving
    assert serving is not None and unpaired(result, result) == ""
    change: dict[str, Any] = {
        "seed": {"seed": 99},
        "replicas": {"replicas": 7},
        "traffic": {"traffic": scenario.traffic.model_copy(update={"tokens_per_rank": 16})},
        "requests": {"serving": serving.model_copy(update={"duration_s": 9.0})},
        "model": {"model": scenario.model.model_copy(update={"name": "another"})},
        "parallel": {"parallel": scenario.parallel.model_copy(update={"ep_size": 4})},
    }[what]
    other = replace(result, scenario=scenario.model_copy(update=change))
    assert unpaired(result, other) == unpaired(other, result) == what
    if what in ("traffic", "requests"):  # recorded: the content counts, at any path
        traces = [
            replace(result, traces=("", "")),
            replace(result, traces=("a", "") if what == "traffic" else ("", "a")),
        ]
        assert unpaired(*traces) == what and unpaired(traces[1], traces[1]) == ""


def test_unlike_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two"):
        compare({"a": reported.result("steps")})
    with pytest.raises(ValueError, match="serves requests"):
        compare({"a": reported.result("steps"), "b": reported.result("serving")})


# --- the command ---


def test_the_command_writes_a_page_into_the_run(
    three: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = three["base"]
    before = json.loads((folder / "manifest.json").read_text())
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    manifest = json.loads((folder / "manifest.json").read_text())
    page = (folder / "report.html").read_bytes()
    assert manifest["sha256"].pop("report.html") == hashlib.sha256(page).hexdigest()
    assert manifest == before and store.read(folder).n_events == before["events"]
    assert {path.name for path in folder.iterdir()} == {*before["sha256"], "manifest.json", "report.html"}
    out = tmp_path / "c.html"
    assert main(["--compare", str(folder), str(three["wider"]), "--out", str(out)]) == 0
    assert "policies.b.select.topk_group" in capsys.readouterr().out
    outline = Outline(out.read_text(encoding="utf-8"))
    assert "policies.b.select.topk_group" in [row[0] for row in outline.rows]


def test_a_scenarios_folder_stands_for_its_newest_run(
    three: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    os.utime(three["seed"] / "manifest.json", (2e9, 2e9))
    assert found(str(three["seed"].parent)) == three["seed"]
    assert "3 runs; taking the one written last" in capsys.readouterr().err
    assert found(str(three["base"])) == three["base"]


def test_the_same_run_of_two_folders_is_compared(
    three: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Say of two versions: one scenario, one name, two places."""
    base = three["base"]
    copy = tmp_path / "newer" / base.parent.name / base.name
    shutil.copytree(base, copy)
    assert main(["--compare", str(base), str(copy)]) == 0
    out = capsys.readouterr().out
    above = base.resolve().parents[1].name
    assert f"newer/tiny/{base.name}: same seed and traffic as {above}/tiny/{base.name}" in out
    assert distinct([base, three["wider"]]) == [f"tiny/{base.name}", f"tiny/{three['wider'].name}"]
    (tmp_path / "link").symlink_to(base)
    assert main(["--compare", str(base), str(tmp_path / "link")]) == 2
    assert "given twice" in capsys.readouterr().err


def test_a_run_of_a_recorded_trace_is_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trace lies elsewhere; changed or gone, the tables are still those of the run, and the page says the same."""
    from sim.loading import load
    from sim.report import html

    monkeypatch.setattr(html, "drawings", lambda result: [])
    model, trace = load(reported.TINY).model, tmp_path / "traces" / "t.npz"
    trace.parent.mkdir()

    def record(seed: int) -> None:
        order = np.random.default_rng(seed).random((model.n_moe_layers, 4096, model.n_routed_experts)).argsort(axis=2)
        np.savez(trace, topk_ids=order[:, :, : model.num_experts_per_tok].astype(np.int16))

    record(0)
    policies = [
        {"name": "linear", "select": "recorded"},
        {"name": "random", "select": "recorded", "placement": "random"},
    ]
    result = reported.run(
        traffic={"kind": "replay", "path": str(trace), "tokens_per_rank": 64}, steps={"count": 1}, policies=policies
    )
    folder = store.write(result, tmp_path / "results")
    monkeypatch.setattr(html, "versions", lambda: store.manifest_of(folder)["versions"])
    page, again = html.page(result), store.read(folder)
    assert again.scenario == result.scenario and html.page(again) == page and store.gone(again) == []
    assert f"run {folder.name}" in page and "--allow-outside" in page
    assert main([str(folder)]) == 0 and capsys.readouterr().err == ""

    record(1)
    changed = reported.run(
        traffic={"kind": "replay", "path": str(trace), "tokens_per_rank": 64}, steps={"count": 1}, policies=policies
    )
    other = store.write(changed, tmp_path / "results")
    assert other != folder and unpaired(store.read(folder), store.read(other)) == "traffic"
    assert html.page(store.read(folder)) == page
    assert main([str(folder)]) == 0
    assert (
        capsys.readouterr().err
        == f"{folder}: {trace} has changed since the run was made; what is stored of it still is\n"
    )

    trace.unlink()
    assert html.page(store.read(folder)) == page
    assert main(["--compare", str(folder), str(other)]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("is gone since the run was made") == 2 and "traffic is not that of" in captured.out
    with pytest.raises(ValueError, match=r"t\.npz"):
        simulate(store.read(folder).scenario, 1, estimate(result.scenario))


def test_bad_input_is_refused_and_nothing_written(
    three: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "tiny" / "broken"
    shutil.copytree(three["base"], broken)
    (broken / "steps.parquet").write_bytes(b"PAR1 no more")
    for argv, says in (
        ([str(tmp_path / "tinny")], "did you mean tiny?"),
        ([str(tmp_path)], "no run is stored here"),
        ([str(broken)], "steps.parquet is not the file"),
        (["--compare", str(three["base"])], "at least two"),
        (["--compare", str(three["base"]), str(three["base"])], "given twice"),
        ([str(three["base"]), str(three["wider"]), "--out", str(tmp_path / "x.html")], "names one page"),
        ([str(three["base"]), "--out", str(tmp_path / "no" / "x.html")], "there is no folder"),
        ([str(three["base"]), "--out", "/dev/null"], "no regular file"),
        ([str(three["base"]), "--out", str(tmp_path)], "no regular file"),
    ):
        assert main(argv) == 2, argv
        err = capsys.readouterr().err
        assert says in err and "Traceback" not in err
    (broken / "manifest.json").write_text("{", encoding="utf-8")
    assert main([str(broken)]) == 2 and "damaged" in capsys.readouterr().err
    (broken / "manifest.json").write_text(json.dumps({"events": 1}), encoding="utf-8")
    assert main([str(broken)]) == 2 and "damaged" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))


def test_extras_are_part_of_the_run(tmp_path: Path) -> None:
    result = reported.result("pipelined")
    folder = store.write(result, tmp_path)
    store.add(folder, {"report.html": b"<p>", "timeline.json.gz": b"\x1f"})
    manifest = store.manifest_of(folder)
    assert {"report.html", "timeline.json.gz"} <= set(manifest["sha256"])
    assert (folder / "report.html").read_bytes() == b"<p>"
    assert set(store.read(folder).tables) == set(result.tables)
