"""Sweeps: what is varied, what is refused, what a kill leaves, and the same bytes however they came about."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sim
import sim.study
import sim.sweep
from sim import backends
from sim.backends import TRIES, Lost
from sim.loading import load
from sim.report import sweeps as report_of_sweeps
from sim.report.sweeps import plain, table
from sim.results import compared, metrics_of, per_replica
from sim.scenario import Scenario
from sim.store import resolved_data, run_id
from sim.study import run
from sim.sweep import main
from sim.sweeping import Sweep, dataset, evaluate, read
from sim.sweeping import work as work_of_sweeps
from sim.sweeping.evaluate import attempt
from sim.yamlfile import ScenarioError, dump

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "scenarios" / "tiny.yaml")
SMALL = [
    "replicas=2",
    "steps.count=1",
    "steps.warmup.steps=0",
    "traffic.tokens_per_rank=32",
    "traffic.sequence_length=32",
    "schedule.micro_batches=1",
    "model.num_hidden_layers=2",
    "model.n_routed_experts=8",
    "parallel.ep_size=4",
    "cluster.devices_per_node=2",
    "schedule.engine=max_plus",
]
VARY = {"gating.select.topk_group": [1, 2], "cluster.nodes": [2, 4]}
FLAGS = [f"--vary={key}={','.join(map(str, values))}" for key, values in VARY.items()]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A scenario of a few hundredths of a second, with three policies."""
    path = tmp_path_factory.mktemp("scenario") / "small.yaml"
    data = resolved_data(load(TINY, [*SMALL, "name=small"]))
    path.write_text(dump(data | {"policies": data["policies"][:3]}), encoding="utf-8")
    return str(path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was run once is not run again, for tests of what is written and when."""
    monkeypatch.setattr(work_of_sweeps, "attempt", remembered)


_REMEMBERED: dict[str, Any] = {}


def remembered(item: tuple[int, dict[str, Any]]) -> Any:
    key = json.dumps(item[1])
    if key not in _REMEMBERED:
        _REMEMBERED[key] = evaluate(item[1])
    return _REMEMBERED[key]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(small: str, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """An unbroken sweep of four points on this process."""
    return sim.sweep(small, VARY, out=tmp_path_factory.mktemp("whole"))


def go(small: str, *arguments: str) -> int:
    return main([small, *FLAGS, "--quiet", *arguments])


# --- what comes out ---


def test_rows_are_those_of_single_runs(whole: Sweep, small: str) -> None:
    runs = whole.runs
    assert list(runs.columns[:5]) == ["point", *VARY, "policy", "replica"]
    assert len(runs) == 4 * 3 * 2 and whole.axes == VARY and not whole.missing
    for point, (group, nodes) in enumerate([(1, 2), (1, 4), (2, 2), (2, 4)]):
        result = run(small, overrides={"gating.select.topk_group": group, "cluster.nodes": nodes})
        rows = per_replica(result.tables, result.scenario)
        mine = runs[runs["point"] == point]
        assert mine["cluster.nodes"].tolist() == [nodes] * 6
        for name, values in rows.items():
            np.testing.assert_array_equal(np.array(mine[name].tolist()), np.array(values))
        assert repr(compared(rows, metrics_of(result.scenario))) == repr(result.summary_rows)
        summary = whole.summary(["step_time_s"])
        steps = result.summary()[lambda frame: frame["metric"] == "step_time_s"]
        assert summary[summary["point"] == point]["difference"].tolist() == steps["difference"].tolist()


def test_memory_and_money_are_metrics(whole: Sweep) -> None:
    memory = {policy.name: whole.scenario.memory(policy)["total"] for policy in whole.scenario.policies}
    assert whole.runs["memory_bytes"].tolist() == [memory[name] for name in whole.runs["policy"]]
    price = {"cluster.device.price_per_hour": [None, 2.0, 3.0]}
    runs = sim.sweep(whole.scenario, price).runs.set_index("cluster.device.price_per_hour")
    expected = runs.index / 3600 / runs["tokens_per_s_per_gpu"] * 1e6
    np.testing.assert_allclose(runs["usd_per_million_tokens"], expected)
    assert np.isnan(expected).sum() == 6


def test_all_points_and_policies_of_a_replica_see_the_same_tokens(whole: Sweep) -> None:
    """Of the top-k gate, the same figures at every point; of the two replicas, different ones."""
    top_k = whole.runs[whole.runs["policy"] == "top-k"].pivot(index="point", columns="replica", values="max_vio_batch")
    assert top_k[0].nunique() == 1 and top_k[1].nunique() == 1 and top_k[0][0] != top_k[1][0]
    seen = sim.sweep(resolved_data(whole.scenario), {"traffic.tokens_per_rank": [32, 64]}).runs
    assert seen[seen["policy"] == "top-k"].groupby("replica")["max_vio_batch"].nunique().tolist() == [2, 2]


def test_points_that_are_the_same_scenario_share_a_run(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []

    def counted(item: Any) -> Any:
        ran.append(item)
        return evaluate(item[1])

    monkeypatch.setattr(work_of_sweeps, "attempt", counted)
    found = sim.sweep(small, {"gating.select.n_group": [2, None], "gating.select.topk_group": [1, 2]})
    assert len(ran) == 2 and len(found.runs) == 4 * 6
    assert found.axes["gating.select.n_group"] == [2, None]


def test_one_line_reads_the_data_set(whole: Sweep) -> None:
    import duckdb
    import pandas as pd
    import polars as pl

    folder = whole.folder
    assert folder is not None
    by_pandas = pd.read_parquet(folder / "runs")
    by_duckdb = duckdb.sql(f"from read_parquet('{folder}/runs/*/*.parquet', hive_partitioning=true)").df()
    by_polars = pl.read_parquet(folder / "runs", hive_partitioning=True)
    for frame in (by_pandas, by_duckdb, by_polars.to_pandas()):
        frame = frame.assign(point=frame["point"].astype(int))[list(whole.runs.columns)]
        frame = frame.sort_values(["point", "policy", "replica"], ignore_index=True)
        expected = whole.runs.sort_values(["point", "policy", "replica"], ignore_index=True)
        pd.testing.assert_frame_equal(frame, expected, check_dtype=False)


def test_columns_have_one_type_in_all_parts(small: str, place: Path) -> None:
    vary = {"gating.select": ["topk", {"kind": "group_limited", "topk_group": 1}, "topk"][:2], "stragglers": [[], [{"device": 0, "slowdown": 2}]]}  # fmt: skip
    found = sim.sweep(small, vary, out=place)
    assert set(found.runs["gating.select"]) == {"topk", '{"kind": "group_limited", "topk_group": 1}'}
    assert set(found.runs["stragglers"]) == {"[]", '[{"device": 0, "slowdown": 2}]'}
    mixed = sim.sweep(small, {"stragglers.0.slowdown": [1, 1.5]}, overrides=["stragglers=[{device: 0, slowdown: 2}]"])
    assert mixed.runs["stragglers.0.slowdown"].dtype == float


def test_the_sweep_block_of_a_file(small: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = Path(small).read_text()
    file = place / "block.yaml"
    file.write_text(
        text + "sweep:\n  vary:\n    cluster.nodes: [2, 4]\n    gating.select.topk_group: 1:2\n  design: list\n"
    )
    assert load(str(file)).sweep is not None and load(small).sweep is None
    assert run_id(load(str(file))) == run_id(load(small))
    assert resolved_data(load(str(file))) == resolved_data(load(small))
    found = sim.sweep(str(file))
    assert found.runs[["point", "cluster.nodes", "gating.select.topk_group"]].drop_duplicates().values.tolist() == [
        [0, 2, 1],
        [1, 4, 2],
    ]
    assert main([str(file), "--vary", "cluster.nodes=2", "--design", "grid", "--dry-run"]) == 0
    assert "would run: 1 point," in capsys.readouterr().out
    file.write_text(text + "sweep:\n  vary:\n    cluster.node: [2, 4]\n    seed: [1, x]\n")
    assert main([str(file)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"block.yaml:\d+:5: cluster.node: unknown key \[got 2, 4\] \(did you mean nodes\?\)", lines[0])
    assert re.fullmatch(
        r"block.yaml:\d+:5: seed: must be an integer \[got 'x'\] \(in 2 of 4 points, first cluster.node = 2, seed = x\)",
        lines[1],
    )


def test_files_named_in_a_block_are_relative_to_it(small: str, place: Path) -> None:
    """And those of the command line to the current folder."""
    data = resolved_data(load(small))
    (place / "sub").mkdir()
    for name, hidden in (("narrow", 512), ("wide", 2048)):
        (place / "sub" / f"{name}.yaml").write_text(dump(data["model"] | {"name": name, "hidden_size": hidden}))
    (place / "sub" / "s.yaml").write_text(dump(data | {"sweep": {"vary": {"model": ["narrow.yaml", "wide.yaml"]}}}))
    found = sim.sweep("sub/s.yaml").runs
    assert found.groupby("model")["memory_bytes"].first().is_monotonic_increasing
    there = sim.sweep("sub/s.yaml", {"model": ["sub/narrow.yaml", "sub/wide.yaml"]}).runs
    assert there["memory_bytes"].tolist() == found["memory_bytes"].tolist()


def test_drawn_points(small: str) -> None:
    sets = ["stragglers=[{device: 0, slowdown: 2}]"]
    vary = {"stragglers.0.slowdown": {"low": 1.0, "high": 8.0, "log": True}, "gating.select.topk_group": "1:2"}
    found = sim.sweep(small, vary, overrides=sets, design="sobol", points=4, replicas=1)
    slow = found.axes["stragglers.0.slowdown"]
    assert [int(np.log(x) / np.log(8) * 4) for x in slow] == [0, 1, 2, 3] and len(found.runs) == 12
    assert found.runs.groupby("stragglers.0.slowdown")["step_time_s"].mean().is_monotonic_increasing


# --- what is refused, before anything runs ---


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ["--vary=gating.select.topk_grp=1,2"],
            "--vary gating.select.topk_grp: unknown key (did you mean topk_group?)",
        ),
        (["--vary=gating.selct.topk_group=1"], "--vary gating.selct.topk_group: unknown key (did you mean select?)"),
        (["--vary=policies.*.placment=linear"], "--vary policies.*.placment: unknown key (did you mean placement?)"),
        (["--vary=gating.select.p=0.5"], "--vary gating.select.p: no policy has it; where select is top_p, one would"),
        (["--vary=cluster.node=2,4"], "--vary cluster.node: unknown key [got 2, 4] (did you mean nodes?)"),
        (
            ["--vary=gating.select.topk_group=1:4"],
            "--vary gating.select.topk_group: policies.2.select.topk_group: must be <= n_group = 2 [got 3, 4] "
            "(in 2 of 4 points, first gating.select.topk_group = 3)",
        ),
        (
            ["--vary=seed=1,x", "--vary=cluster.nodes=2,4"],
            "--vary seed: must be an integer [got 'x'] (in 2 of 4 points, first seed = x, cluster.nodes = 2)",
        ),
        (["--vary=model=none.yaml"], "--vary model: no such file [got 'none.yaml']"),
        (["--vary=seed=1,2", "--set=seed=3"], "--vary seed: is set by --set too"),
        ([], "sweep: nothing to vary: --vary KEY=VALUES, or a sweep: block in the file"),
        (["--vary=seed=0.5:0.6"], "sweep: seed: 0.5 to 0.6 is a range without a step"),
        (
            ["--vary=seed=1,2", "--design=sobl"],
            "sweep: design: must be one of grid, latin_hypercube, list, sobol [got 'sobl'] (did you mean sobol?)",
        ),
        (["--vary=seed=1,2", "--backend=loca"], "python -m sim.sweep: --backend loca: must be one of "),
        (["--vary=seed=1,2", "--name=../x"], "python -m sim.sweep: --name ../x: must be letters"),
        (["--vary=seed=1,2", "--address=here"], "python -m sim.sweep: --address"),
        (["--vary=seed=1,2", "--jobs=0"], "--jobs must be at least 1 [got 0]"),
    ],
)
def test_bad_axes(arguments: list[str], complaint: str, small: str, place: Path, capsys: Any) -> None:
    assert main([small, *arguments]) == 2
    printed = capsys.readouterr()
    assert [line for line in printed.err.splitlines() if line.startswith(complaint)], printed.err
    assert not printed.out and not [path for path in place.rglob("*") if path.name in ("sweep.json", "runs")]


@pytest.mark.usefixtures("quick")
def test_skipped_points_are_listed(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([small, "--vary=gating.select.topk_group=1:3", "--skip-invalid", "--quiet"]) == 0
    assert "Skipped points (see skipped.csv): 1." in capsys.readouterr().out
    folder = Path("results/small/sweep")
    assert "n_group = 2" in (folder / "skipped.csv").read_text().splitlines()[1]
    assert list(read(folder).skipped) == [2] and read(folder).missing == ()
    assert main([small, "--vary=gating.select.topk_group=3:4", "--skip-invalid", "--quiet"]) == 2


@pytest.mark.usefixtures("quick")
def test_sweeps_beyond_the_limits(small: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, place: Path) -> None:
    big = ["--set=steps.count=1000000", "--set=replicas=1000", "--quiet"]
    assert go(small, *big) == 2
    err = capsys.readouterr().err
    assert "point 0 (gating.select.topk_group = 1, cluster.nodes = 2): too big: " in err and "lower steps.count" in err
    with monkeypatch.context() as patch:
        patch.setattr(work_of_sweeps, "free_memory_bytes", lambda: 4e8)
        assert go(small, "--jobs=2") == 2
        assert "2 processes take about 52" in capsys.readouterr().err
    assert not list(place.rglob("sweep.json"))
    monkeypatch.setattr(work_of_sweeps, "MAX_SECONDS", 1e-3)
    assert go(small) == 2
    err = capsys.readouterr().err
    assert "lower gating.select.topk_group (2 values) or cluster.nodes (2 values) or replicas = 2" in err
    assert go(small, "--force") == 0


# --- the folder ---


@pytest.mark.usefixtures("quick")
def test_a_folder_is_taken_over_only_on_request(small: str, whole: Sweep, capsys: Any) -> None:
    assert whole.folder is not None
    shutil.copytree(whole.folder, "results/small/sweep")
    assert go(small) == 2
    assert "4 of 4 points done): --resume goes on with it, --overwrite starts again, --name" in capsys.readouterr().err
    assert go(small, "--resume") == 0 and "kept" in capsys.readouterr().out
    assert main([small, "--vary=seed=1", "--quiet", "--overwrite"]) == 0
    assert len(read("results/small/sweep").runs) == 6 and len(list(Path("results/small").glob(".sweep.old*"))) == 0
    Path("results/small/other").mkdir()
    Path("results/small/other/file").touch()
    assert go(small, "--name=other", "--overwrite") == 2
    assert "exists and is no sweep" in capsys.readouterr().err and Path("results/small/other/file").exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (["--set=policies.2.capacity={kind: expert_capacity, capacity_factor: 2}"], "policies.2.capacity.kind: 'none' -> 'expert_capacity'"),
        (["--set=policies.1.balance.0.bias_update_rate=0.01"], "policies.1.balance.0.bias_update_rate: 0.001 -> 0.01"),
        (["--replicas=3"], "replicas: 2 -> 3"),
        (["--vary=gating.select.topk_group=1,2", "--vary=cluster.nodes=2,3"], "axes.cluster.nodes.values: [2, 4] -> [2, 3]"),
        (["--design=list"], "design.kind: 'grid' -> 'list'"),
    ],
)  # fmt: skip
def test_another_sweep_is_not_resumed(
    arguments: list[str], difference: str, small: str, whole: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    assert whole.folder is not None
    shutil.copytree(whole.folder, "results/small/sweep")
    before = hashes(Path("results"))
    vary = [] if any(text.startswith("--vary") for text in arguments) else FLAGS
    assert main([small, *vary, *arguments, "--resume", "--quiet"]) == 2
    assert f"  {difference}" in capsys.readouterr().err.splitlines()
    assert {k: v for k, v in hashes(Path("results")).items() if "lock" not in k} == before


@pytest.mark.usefixtures("quick")
def test_values_of_another_type_are_another_sweep(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [small, "--set=stragglers=[{device: 0, slowdown: 2}]", "--quiet", "--vary"]
    assert main([*arguments, "stragglers.0.slowdown=1,2"]) == 0
    before = hashes(Path("results/small/sweep"))
    assert main([*arguments, "stragglers.0.slowdown=1.0,2.0", "--resume"]) == 2
    assert "  axes.stragglers.0.slowdown.values: [1, 2] -> [1.0, 2.0]" in capsys.readouterr().err.splitlines()
    assert hashes(Path("results/small/sweep")) == before


@pytest.mark.usefixtures("quick")
def test_versions_are_part_of_a_sweep(small: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert go(small) == 0
    monkeypatch.setattr(sim, "__version__", "9.9.9")
    assert go(small, "--resume") == 2
    assert "  versions.gatesim: '0.1.0' -> '9.9.9'" in capsys.readouterr().err


def test_of_a_recorded_trace_the_content_counts(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the scenario's own, and of those that an axis names; where they lie does not count."""
    trace = "t_s,input_tokens,output_tokens\n0,64,4\n0.5,32,4\n1,64,8\n"
    for name in ("a.csv", "b.csv"):
        (place / name).write_text(trace)
    serves = [
        str(ROOT / "scenarios" / "llama_8b.yaml"),
        "--set=serving.duration_s=2",
        "--set=serving.warmup_s=0",
        "--quiet",
    ]
    own = [*serves, "--set=serving.requests={kind: table, path: a.csv}", "--vary=seed=1", "--resume"]
    axis = [*serves, "--set=serving.requests={kind: table, path: a.csv}", "--resume", "--name=axis"]
    axis += ["--vary=serving.requests.path=a.csv,b.csv"]
    assert main(own) == 0 and main(axis) == 0, capsys.readouterr().err
    assert len(read("results/llama_8b/axis").runs["point"].unique()) == 2
    Path("a.csv").rename("moved.csv")
    assert main([text.replace("a.csv", "moved.csv") for text in own]) == 0
    (place / "b.csv").write_text(trace.replace("64,8", "64,9"))
    Path("moved.csv").rename("a.csv")
    assert main(axis) == 2
    assert "point 1 (serving.requests.path = 'b.csv'): its scenario, or a file that it names, has changed" in (
        capsys.readouterr().err
    )
    (place / "a.csv").write_text(trace.replace("64,8", "64,9"))
    assert main(own) == 2
    assert "  traces.serving.requests.path: " in capsys.readouterr().err


def test_a_trace_that_changes_while_a_sweep_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a run and during it: its rows would be of another trace than those of the points before."""
    trace = place / "a.csv"
    trace.write_text("t_s,input_tokens,output_tokens\n0,64,4\n0.5,32,4\n")
    arguments = [str(ROOT / "scenarios" / "llama_8b.yaml"), "--set=serving.duration_s=1", "--set=serving.warmup_s=0"]
    arguments += ["--set=serving.requests={kind: table, path: a.csv}", "--vary=seed=1,2", "--jobs=1", "--quiet"]
    real, calls = attempt, []

    def changing(item: Any) -> Any:
        calls.append(item)
        if len(calls) == 2:
            trace.write_text(trace.read_text() + "1,64,8\n")
        return real(item)

    monkeypatch.setattr(work_of_sweeps, "attempt", changing)
    assert main(arguments) == 2
    assert f"point 1 (seed = 2): {trace}: has changed since this began" in capsys.readouterr().err
    assert read("results/llama_8b/sweep").missing == (1,)
    _, data, run_then = calls[1]
    assert len(evaluate(data)["policy"]) == 1, "as a run of its own it is one of the new trace"
    simulate, now = sim.study.simulate, run_id(load(data))
    assert now != run_then and len(evaluate(data, now)["policy"]) == 1

    def slow(*arguments: Any) -> Any:
        trace.write_text(trace.read_text() + "1.5,64,8\n")
        return simulate(*arguments)

    monkeypatch.setattr(sim.study, "simulate", slow)
    with pytest.raises(OSError, match=r"a\.csv: has changed since this began"):
        evaluate(data, now)


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_same_bytes_on_any_number_of_processes(jobs: int, small: str, whole: Sweep) -> None:
    assert go(small, f"--jobs={jobs}") == 0
    assert whole.folder is not None
    assert hashes(Path("results/small/sweep")) == hashes(whole.folder)


@pytest.mark.usefixtures("quick")
def test_a_second_sweep_on_the_same_folder_waits_for_nobody(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    from filelock import FileLock

    Path("results/small").mkdir(parents=True)
    with FileLock("results/small/.sweep.lock"):
        assert go(small) == 2
        assert "another sweep is writing here" in capsys.readouterr().err
        assert go(small, "--name=other") == 0
    assert go(small) == 0


# --- death at any moment ---


def killed_at(moment: int, job: Callable[[], object]) -> bool:
    """Run ``job`` in a child that kills itself at its n-th call of a file operation; say whether it came to that."""
    child = os.fork()
    if child:
        return bool(os.WIFSIGNALED(os.waitpid(child, 0)[1]))
    left = moment
    try:
        for name in ("fsync", "replace", "mkdir"):
            real = getattr(os, name)

            def guarded(*arguments: Any, real: Any = real, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            setattr(os, name, guarded)
        job()
    finally:
        os._exit(0)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("moment", [0, 1, 2, 3, 4, 6, 8, 11, 13, 15])
def test_after_kill_9_a_resumed_sweep_has_the_bytes_of_an_unbroken_one(moment: int, small: str, whole: Sweep) -> None:
    assert killed_at(moment, lambda: sim.sweep(small, VARY, out="results"))
    folder = Path("results/small/sweep")
    if (folder / "sweep.json").exists():
        assert set(read(folder).runs["point"]) <= {0, 1, 2, 3}
    sim.sweep(small, VARY, out="results", resume=True)
    assert whole.folder is not None
    assert hashes(folder) == hashes(whole.folder)
    assert not [path for path in Path("results/small").rglob(".*") if path.name != ".sweep.lock"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("moment", [2, 3, 4, 5])
def test_after_kill_9_skipped_points_are_listed_all_the_same(moment: int, small: str) -> None:
    vary = {"gating.select.topk_group": [1, 2, 3]}
    assert killed_at(moment, lambda: sim.sweep(small, vary, out="results", skip_invalid=True))
    sim.sweep(small, vary, out="results", skip_invalid=True, resume=True)
    sim.sweep(small, vary, out="results", skip_invalid=True, name="whole")
    assert hashes(Path("results/small/sweep")) == hashes(Path("results/small/whole"))
    assert "skipped.csv" in hashes(Path("results/small/sweep"))


@pytest.mark.usefixtures("quick")
def test_the_moments_above_cover_a_sweep(small: str) -> None:
    """The negative control: after so many file operations it is over."""
    assert not killed_at(40, lambda: sim.sweep(small, VARY, out="results"))


@pytest.mark.usefixtures("quick")
def test_damaged_parts_run_again(small: str, whole: Sweep) -> None:
    assert whole.folder is not None
    folder = Path("results/small/sweep")
    shutil.copytree(whole.folder, folder)
    part = folder / "runs" / "point=00002" / "part.parquet"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"point=00002/part.parquet: damaged"):
        read(folder)
    assert go(small, "--resume") == 0
    assert hashes(folder) == hashes(whole.folder)


@pytest.mark.usefixtures("quick")
def test_parts_with_damaged_pages_run_again(small: str, whole: Sweep) -> None:
    """The end of the file, where its rows are counted and its columns described, is whole."""
    assert whole.folder is not None
    folder = Path("results/small/sweep")
    shutil.copytree(whole.folder, folder)
    part = folder / "runs" / "point=00002" / "part.parquet"
    content = bytearray(part.read_bytes())
    end = int.from_bytes(content[-8:-4], "little") + 8
    content[(len(content) - end) // 2] ^= 0xFF
    part.write_bytes(content)
    with pytest.raises(ValueError, match=r"point=00002/part.parquet: damaged"):
        read(folder)
    assert go(small, "--resume") == 0
    assert hashes(folder) == hashes(whole.folder)


def test_a_part_of_other_rows_or_columns_is_not_done(whole: Sweep, place: Path) -> None:
    assert whole.folder is not None
    part = dataset.read_part(whole.folder, 1)
    for table_of, done in ((part, True), (part.slice(1), False), (part.drop_columns(["replica"]), False)):
        place.mkdir(exist_ok=True)
        dataset.write(place, 1, table_of)
        assert dataset.done(place, 1, part.schema, len(part)) == done


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("change", ["[]", '{"runs": 3}', "scenario", "axes", "metrics", "policies", "values", "model"])
def test_damaged_definitions(change: str, small: str, whole: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    assert whole.folder is not None
    shutil.copytree(whole.folder, "results/small/sweep")
    file = Path("results/small/sweep/sweep.json")
    data = json.loads(file.read_text())
    if change == "values":
        del data["runs"][1]["values"]
    elif change == "model":
        data["scenario"]["model"]["hidden_size"] = "wide"
    else:
        data.pop(change, None)
    file.write_text(change if change[0] in "[{" else json.dumps(data))
    with pytest.raises(ValueError, match=r"sweep.json: (is no sweep|damaged: )") as caught:
        read("results/small/sweep")
    assert "\n" not in str(caught.value)
    for flags in ([], ["--resume"]):
        assert go(small, *flags) == 2
        assert "Traceback" not in capsys.readouterr().err
    assert go(small, "--overwrite") == 0
    assert hashes(Path("results/small/sweep")) == hashes(whole.folder)


@pytest.mark.usefixtures("quick")
def test_why_a_point_is_skipped_does_not_depend_on_lines(small: str, place: Path) -> None:
    (place / "s.yaml").write_text(Path(small).read_text())
    assert main(["s.yaml", "--vary=cluster.nodes=1,2", "--skip-invalid", "--quiet"]) == 0
    reason = read("results/small/sweep").skipped[0]
    assert reason == "parallel.ep_size: 4 ranks need as many devices; the cluster has 1 nodes x 2 = 2 [got 4]"
    before = hashes(Path("results/small/sweep"))
    (place / "s.yaml").write_text("# a comment\n" + Path(small).read_text())
    (place / "sub").mkdir()
    os.chdir("sub")
    arguments = ["../s.yaml", "--vary=cluster.nodes=1,2", "--skip-invalid", "--quiet", "--out=../results"]
    assert main([*arguments, "--resume"]) == 0 and main([*arguments, "--name=again"]) == 0
    assert hashes(place / "results/small/sweep") == before == hashes(place / "results/small/again")


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_sweep_on_two_processes_that_is_killed(small: str) -> None:
    """Its workers go with it, and what was done is kept; one process then ends it with the bytes that it would have had."""
    arguments = [small, "--vary=seed=1:16", "--quiet"]
    child = os.fork()
    if not child:
        try:
            main([*arguments, "--jobs=2"])
        finally:
            os._exit(0)
    parts = Path("results/small/sweep/runs")
    until(lambda: len(list(parts.glob("*/part.parquet"))) >= 2)
    workers = Path(f"/proc/{child}/task/{child}/children").read_text().split()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    until(lambda: not any(map(running, workers)))
    done = read("results/small/sweep")
    points = set(done.runs["point"])
    assert 2 <= len(points) < 16 and set(done.missing) == set(range(16)) - points
    assert len(workers) >= 2
    assert main([*arguments, "--resume", "--jobs=1"]) == 0
    assert main([*arguments, "--name=again", "--jobs=1"]) == 0
    assert hashes(Path("results/small/sweep")) == hashes(Path("results/small/again"))


@pytest.mark.usefixtures("quick")
def test_ctrl_c_keeps_what_is_done(small: str, whole: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def attempt(item: Any) -> Any:
        if item[0] == 2:
            signal.raise_signal(signal.SIGINT)
        return remembered(item)

    with monkeypatch.context() as patch:
        patch.setattr(work_of_sweeps, "attempt", attempt)
        assert go(small) == 130
    assert "interrupted; the points that are done are kept: --resume goes on" in capsys.readouterr().err
    assert len(read("results/small/sweep").missing) == 2
    assert go(small, "--resume") == 0
    assert whole.folder is not None
    assert hashes(Path("results/small/sweep")) == hashes(whole.folder)


def running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- backends ---


def double(item: int) -> int:
    return 2 * item


def dies_once(item: tuple[str, int]) -> int:
    """Kill the process that has item 1, the first time."""
    marker, number = item
    if number == 1 and not os.path.exists(marker):
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def dies(marker: str) -> str:
    """Leave a mark and kill the process, every time."""
    with open(marker, "a") as file:
        file.write("x")
    os.kill(os.getpid(), signal.SIGKILL)
    return marker


def fails(item: int) -> int:
    raise ValueError(f"no {item}")


def test_local_processes_replace_one_that_is_killed(place: Path) -> None:
    with backends.get("local")(2, None) as engine:
        assert engine.workers == 2
        items = [(str(place / "marker"), number) for number in range(4)]
        assert sorted(engine.run(dies_once, items)) == [(i, i) for i in range(4)]
        with pytest.raises(Lost) as caught:
            list(engine.run(dies, [str(place / "deaths")]))
        assert len((place / "deaths").read_text()) == TRIES
        assert caught.value.index == 0 and str(TRIES) in str(caught.value)
        with pytest.raises(ValueError, match="no 7"):
            list(engine.run(fails, [7]))
        assert list(engine.run(double, [])) == []
    with backends.get("local")(None, None) as engine:
        assert list(engine.run(double, [1, 2])) == [(0, 2), (1, 4)]


def test_a_point_that_fails_is_named(small: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def attempt(item: Any) -> Any:
        if item[0] == 1:
            raise work_of_sweeps.PointFailed(1, "ran out of luck")
        return evaluate(item[1])

    monkeypatch.setattr(work_of_sweeps, "attempt", attempt)
    assert go(small) == 2
    err = capsys.readouterr().err
    assert re.search(
        r"python -m sim.sweep: point \d \(gating.select.topk_group = \d, cluster.nodes = \d\): ran out of luck", err
    )
    assert len(set(read("results/small/sweep").runs["point"])) == 1


# --- the table ---


def test_tables_of_few_points_show_policies_and_of_many_the_best(whole: Sweep) -> None:
    text = table(whole)
    assert text.count("group-limited") == 4 and "cluster.nodes changes no figure." in text
    assert "±" in text and "%" in text and "kept" in text
    beside = table(whole, rows=8)
    assert beside.count("*") == 4 + 1 + 2 and "step ms of every policy" in beside
    few = table(whole, rows=2)
    assert "The 2 points of 4 with the best step ms" in few and few.count(" *") >= 2


def test_where_more_is_better_the_best_points_have_most(whole: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_of_sweeps, "LEADING", {"kept_affinity": "kept affinity"})
    text = table(whole, rows=8)
    assert len(re.findall(r"1\.0000 \*", text)) == 4, "top-k keeps all of it"
    kept = whole.summary(["kept_affinity"]).set_index(["point", "policy"])["mean"]
    assert (kept.unstack()["top-k"] == 1).all() and kept.min() < 1


def test_of_points_of_one_replica_no_interval_is_claimed(small: str, whole: Sweep) -> None:
    assert "± 95 % over 2 replicas." in table(whole)
    text = table(sim.sweep(small, {"replicas": [1, 2]}))
    assert "Means, ± 95 % over the point's replicas (1 to 2; points of one replica have no ±)." in text
    assert "95 %" not in table(sim.sweep(small, {"seed": [1]}, replicas=1))


def test_neighbours_are_told_apart() -> None:
    assert [plain(value) for value in (1048576, 1048577.0, 1e18, 0.1 + 0.2, True, None)] == [
        "1048576", "1048577", "1e+18", "0.3", "true", "null",
    ]  # fmt: skip


# --- keys that stand for several, in any run ---


def test_patterns_of_keys_are_overrides_like_others(small: str) -> None:
    def policies(*sets: str) -> Scenario:
        return load(small, list(sets))

    scenario = policies("gating.select.topk_group=2")
    assert [getattr(p.select, "topk_group", None) for p in scenario.policies] == [None, None, 2]
    scenario = policies("policies.*.num_experts_per_tok=2", "policies.1.num_experts_per_tok=3")
    assert [p.num_experts_per_tok for p in scenario.policies] == [2, 3, 2]
    scenario = policies("gating.balance.bias_update_rate=0.5")
    assert [getattr(p.balance[0], "bias_update_rate", None) for p in scenario.policies] == [None, 0.5, None]
    scenario = policies("policies.0.select=group_limited", "gating.select.topk_group=1")
    assert [getattr(p.select, "topk_group", None) for p in scenario.policies] == [1, None, 1]
    with pytest.raises(
        ScenarioError, match=r"--set gating.topk=1: gating.topk: unknown key; known here: score, select"
    ):
        policies("gating.topk=1")
    with pytest.raises(ScenarioError, match="nam is not a list"):
        policies("nam.*.x=1")
    dense = json.loads(json.dumps(resolved_data(load(str(ROOT / "scenarios" / "llama_8b.yaml")))))
    with pytest.raises(ScenarioError, match="no policy has a gate"):
        load(dense, ["gating.select.topk_group=1"])
