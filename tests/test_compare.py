"""Stored runs: their pages by command, and how they differ."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")


import numpy as np
import pytest

from sim import store
from sim.report.__main__ import found, main
from sim.report.compare import changed_keys, compare, unpaired
from sim.report.differences import compared, text
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
    folder = store.write(result, tmp_path, extras={"report.html": b"<p>", "timeline.json.gz": b"\x1f"})
    manifest = store.manifest_of(folder)
    assert {"report.html", "timeline.json.gz"} <= set(manifest["sha256"])
    assert (folder / "report.html").read_bytes() == b"<p>"
    assert set(store.read(folder).tables) == set(result.tables)
