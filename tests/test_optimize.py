"""Optimisation: the front is the true one, whoever runs the trials and however often they are interrupted."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

import sim
from sim.loading import load, opened
from sim.optimize import main
from sim.optimizing import Front, work
from sim.optimizing import folder as disk
from sim.optimizing import search as searching
from sim.optimizing.front import dominated
from sim.optimizing.goals import DEFAULTS
from sim.optimizing.space import Space
from sim.report.fronts import table
from sim.results import METRICS, Table
from sim.store import resolved_data
from sim.sweeping import dataset
from sim.sweeping.axes import from_mapping
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
]
VARY = {"gating.select.topk_group": [1, 2], "cluster.nodes": [2, 4, 8]}
FLAGS = [f"--vary={key}={','.join(map(str, values))}" for key, values in VARY.items()]
POLICIES = ["top-k", "top-k + bias", "group-limited", "group-limited + bias"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A scenario of a few milliseconds, with four policies."""
    path = tmp_path_factory.mktemp("scenario") / "small.yaml"
    data = resolved_data(load(TINY, [*SMALL, "name=small"]))
    path.write_text(dump(data | {"policies": data["policies"][:4]}), encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


Figures = Callable[[dict[str, Any]], dict[str, list[float]]]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Figures], list[dict[str, Any]]]:
    """``pretend(figures)``: runs take no time and have the figures of a function of the scenario; returns those made."""

    def put(figures: Figures) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []

        def evaluate(data: dict[str, Any], run: str = "") -> Table:
            made.append(data)
            replicas = data["replicas"]
            rows: Table = {metric.name: [math.nan] * replicas for metric in METRICS} | figures(data)
            return {"policy": [data["policies"][0]["name"]] * replicas, "replica": list(range(replicas))} | rows

        monkeypatch.setattr(work, "evaluate", evaluate)
        return made

    return put


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- the front ---


@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), max_size=12))
def test_dominance_is_what_its_definition_says(points: list[tuple[int, ...]]) -> None:
    found = dominated(np.array(points, float).reshape(len(points), 3)).tolist()
    for point, beaten in zip(points, found, strict=True):
        others = [other for other in points if other != point]
        assert beaten == any(all(a <= b for a, b in zip(other, point, strict=True)) for other in others)


def _hashed(*what: Any) -> float:
    """A figure that depends on ``what`` without any order."""
    return int(hashlib.sha256(repr(what).encode()).hexdigest()[:6], 16) % 50 + 1.0


def _figures(data: dict[str, Any]) -> dict[str, list[float]]:
    policy = data["policies"][0]
    knobs = (policy["name"], policy["select"].get("topk_group"), data["cluster"]["nodes"], data["seed"])
    return {
        name: [_hashed(name, *knobs) + 0.001 * r for r in range(data["replicas"])]
        for name in ("step_time_s", "max_vio_batch", "kept_affinity")
    }


@pytest.mark.parametrize("seed", range(2))
def test_once_all_was_tried_the_front_is_the_true_one(
    seed: int, small: str, pretend: Callable[[Figures], list[dict[str, Any]]]
) -> None:
    made = pretend(_figures)
    front = sim.optimize(
        small, VARY, minimize=["step_time_s", "max_vio_batch"], maximize=["kept_affinity"], trials=200, batch=4,
        seed=seed, overrides=[f"seed={seed}"],
    )  # fmt: skip
    points = {
        (policy, group if "group" in policy else None, nodes)
        for policy, group, nodes in itertools.product(POLICIES, *VARY.values())
    }
    assert len(made) == len(points) == 18, "axes without effect cost no runs"
    figures = {
        point: [sign * _hashed(name, *point, seed) for name, sign in (("step_time_s", 1), ("max_vio_batch", 1), ("kept_affinity", -1))]
        for point in points
    }  # fmt: skip
    true = {
        point
        for point, mine in figures.items()
        if not any(
            other != mine and all(a <= b for a, b in zip(other, mine, strict=True)) for other in figures.values()
        )
    }
    pareto = front.pareto
    found = {
        (row["policy"], row["gating.select.topk_group"] if "group" in row["policy"] else None, row["cluster.nodes"])
        for _, row in pareto.iterrows()
    }
    assert found == true and len(pareto) == len(true) < len(points)
    assert pareto["step_time_s"].is_monotonic_increasing
    for trial in front.best_of_all:
        assert front.idle[trial.index] == (set() if "group" in trial.place.policy else {"gating.select.topk_group"})


def test_a_search_of_few_trials_repeats_none_and_depends_on_its_seed_alone(
    small: str, pretend: Callable[[Figures], list[dict[str, Any]]]
) -> None:
    made = pretend(_figures)
    vary = {"cluster.nodes": list(range(2, 20)), "gating.select.topk_group": [1, 2]}
    goals = {"minimize": ["step_time_s"], "maximize": ["kept_affinity"]}
    first = sim.optimize(small, vary, trials=18, batch=6, seed=1, **goals)
    assert len(made) == 18 == len({json.dumps(data) for data in made}) == first.trials["run"].nunique()
    again = sim.optimize(small, vary, trials=18, batch=6, seed=1, **goals)
    assert again.trials.equals(first.trials)
    other = sim.optimize(small, vary, trials=18, batch=6, seed=2, **goals)
    assert not other.trials["run"].equals(first.trials["run"])


@pytest.mark.parametrize("goals", [["step_time_s"], ["step_time_s", "max_vio_batch"]])
def test_a_valley_is_found_within_its_limits(
    goals: list[str], small: str, pretend: Callable[[Figures], list[dict[str, Any]]]
) -> None:
    """The least of (x - 0.3)^2 with x >= 0.4 lies at 0.4, where a draw at random would hardly ever be."""

    def figures(data: dict[str, Any]) -> dict[str, list[float]]:
        x = data["traffic"]["slow_correlation"]
        return {"step_time_s": [(x - 0.3) ** 2] * 2, "max_vio_batch": [(x - 0.3) ** 2] * 2, "kept_affinity": [x] * 2}

    pretend(figures)
    front = sim.optimize(
        small, {"traffic.slow_correlation": "0.0:0.99"}, minimize=goals, subject_to=["kept_affinity>=0.4"],
        policies=["top-k"], trials=80,
    )  # fmt: skip
    best = front.best
    assert best is not None and 0.4 <= best.place.values[0] < 0.42
    assert front.reasons == {"not kept_affinity >= 0.4": len(front.tried) - len(front.feasible)}


def test_a_last_batch_is_no_larger_than_what_is_left(
    small: str, pretend: Callable[[Figures], list[dict[str, Any]]]
) -> None:
    made = pretend(_figures)
    front = sim.optimize(small, {"cluster.nodes": "2:400"}, minimize=["step_time_s"], trials=8, batch=5)
    assert len(made) == len(front.tried) == 8


def test_the_search_is_told_of_limits_and_of_what_does_not_run(
    small: str, pretend: Callable[[Figures], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(_figures)
    studies: list[Any] = []
    real = searching._study
    monkeypatch.setattr(searching, "_study", lambda *what: studies.append(real(*what)) or studies[0])
    front = sim.optimize(small, {"cluster.nodes": "1:8"}, minimize=["step_time_s"], subject_to=["kept_affinity>=20"])
    told = {
        trial.params["cluster.nodes"]: trial.constraints
        for trial in studies[0].trials
        if trial.params["policy"] == "top-k"
    }
    assert set(told) == set(range(1, 9))
    for trial in front.tried:
        if trial.place.policy != "top-k":
            continue
        (nodes,) = trial.place.values
        kept = trial.means.get("kept_affinity", 20.0)
        assert told[nodes]["runs"] == (1e6 if nodes == 1 else 0.0)
        assert told[nodes]["0 kept_affinity >= 20"] == pytest.approx((20 - kept) / 20)
    assert 0 < len(front.feasible) < len(front.tried) - 4


class Stubborn:
    """A study that suggests the same place again and again, and what it is given to try first."""

    def __init__(self) -> None:
        self.queue: list[dict[str, Any]] = []
        self.asked: list[bool] = []

    def enqueue_trial(self, params: dict[str, Any]) -> None:
        self.queue.append(params)

    def ask(self, distributions: Any) -> Any:
        self.asked.append(bool(self.queue))
        params = self.queue.pop() if self.queue else {"cluster.nodes": 0, "policy": "top-k"}
        return types.SimpleNamespace(params=params, set_constraint=lambda *what: None)

    def tell(self, *what: Any) -> None: ...


def test_after_a_fresh_place_the_search_suggests_for_itself_again(
    small: str, pretend: Callable[[Figures], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, study = pretend(_figures), Stubborn()
    monkeypatch.setattr(searching, "_study", lambda *what: study)
    sim.optimize(small, {"cluster.nodes": [2, 3, 4, 5]}, minimize=["step_time_s"], policies=["top-k"], batch=4)
    assert len(made) == 4
    helped = [i for i, queued in enumerate(study.asked) if queued]
    assert len(helped) == 3 and [b - a for a, b in itertools.pairwise(helped)] == [searching._STALLED + 1] * 2


# --- what cannot be had ---


def test_what_cannot_run_is_counted_with_its_reason(
    small: str, pretend: Callable[[Figures], list[dict[str, Any]]]
) -> None:
    def figures(data: dict[str, Any]) -> dict[str, list[float]]:
        if data["cluster"]["nodes"] == 4:
            raise ValueError("no such network")
        kept = math.nan if data["policies"][0]["name"] == "top-k" else 0.9
        return {"step_time_s": [1.0, 2.0], "kept_affinity": [kept] * 2}

    pretend(figures)
    front = sim.optimize(
        small, {"cluster.nodes": [1, 2, 4], "gating.select.topk_group": [2, 3]}, minimize=["step_time_s"],
        subject_to=["kept_affinity>=0.5", "step_time_s<=1.6"],
    )  # fmt: skip
    places = "parallel.ep_size: 8 ranks need as many devices; the cluster has 1 nodes x 4 = 4"
    assert front.reasons == {
        places: 2 * 4,
        "policies.*.select.topk_group: must be <= n_group = 2": 2 * 2,
        "no such network": 4,
        "has no kept_affinity": 1,
    }
    assert len(front.feasible) == 3 and set(front.trials[front.trials["feasible"]]["cluster.nodes"]) == {2}
    text = table(front)
    assert f"8 x {places}" in text and "17 of 20 trials are infeasible" in text
    strict = sim.optimize(small, {"cluster.nodes": [2]}, minimize=["step_time_s"], subject_to=["step_time_s<=1.4"])
    assert strict.best is None and strict.pareto.empty and "No trial is feasible." in table(strict)


def test_values_may_be_lists_mappings_and_of_any_type(
    small: str, pretend: Callable[[Figures], list[dict[str, Any]]]
) -> None:
    made = pretend(_figures)
    vary = {
        "policies.*.select": ["topk", {"kind": "group_limited", "topk_group": 1, "n_group": 2}],
        "stragglers": [[], [{"device": 0, "slowdown": 2}]],
    }
    front = sim.optimize(small, vary, minimize=["step_time_s"], policies=["top-k"], batch=2)
    assert len(made) == len(front.tried) == 4 and {len(data["stragglers"]) for data in made} == {0, 1}
    assert "stragglers" in table(front) and '{"kind": "group_limited"' in "".join(front.trials["policies.*.select"])
    space = Space(opened(small), tuple(from_mapping({"name": [True, 1, 1.0, "1", [1]]})), {"top-k": 0})
    places = [space.place({"name": i, "policy": "top-k"}) for i in range(5)]
    assert len({place.key for place in places}) == 5
    assert [space.params(place)["name"] for place in places] == [0, 1, 2, 3, 4]


def test_usual_goals_are_those_that_every_policy_has(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(data: dict[str, Any], run: str = "") -> Table:
        names = [policy["name"] for policy in data["policies"]]
        rows: Table = {metric.name: [math.nan] * len(names) for metric in METRICS}
        rows |= {"policy": names, "replica": [0] * len(names), "step_time_s": [1.0] * len(names)}
        return rows | {"kept_affinity": [math.nan if name == "top-k" else 0.5 for name in names]}

    monkeypatch.setattr(work, "evaluate", evaluate)
    front = sim.optimize(small, {"cluster.nodes": [2]}, replicas=1)
    assert list(map(str, front.goals)) == ["minimize step_time_s"] and len(front.feasible) == 4
    assert front.dropped == {"kept_affinity": ["top-k"]}
    assert "kept_affinity is no goal, for top-k has none." in table(front).splitlines()
    others = sim.optimize(small, {"cluster.nodes": [2]}, replicas=1, policies=POLICIES[1:])
    assert [goal.metric.name for goal in others.goals] == ["step_time_s", "kept_affinity"] and not others.dropped
    monkeypatch.setattr(work, "usual_goals", lambda *_: ([], {}))
    with pytest.raises(ScenarioError, match="no goal: --minimize METRIC"):
        sim.optimize(small, {"cluster.nodes": [2]})


def test_searches_beyond_the_limits(
    small: str, place: Path, pretend: Callable[[Figures], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    made = pretend(_figures)
    real = work.estimate
    with monkeypatch.context() as patch:
        patch.setattr(
            work, "estimate", lambda scenario: dataclasses.replace(real(scenario), reason="lower steps.count")
        )
        assert go(small) == 2 and not made
        err = capsys.readouterr().err
        assert "optimize: without goals the scenario runs once as it stands" in err and "lower steps.count; name" in err
        assert go(small, "--trials=1", "--jobs=1", "--force", "--out=-") == 0 and len(made) == 2
    made.clear()
    goals = ["--minimize=step_time_s", "--jobs=1"]
    assert go(small, *goals) == 0
    before = hashes(place / "results")
    monkeypatch.setattr(work, "MAX_SECONDS", 1e-3)
    made.clear()
    for flags in ([], ["--overwrite"], ["--resume"]):
        assert go(small, *goals, f"--name={'optimize' if flags else 'other'}", *flags) == 2
        assert re.search(
            r": 8 runs take about \S+ hours on 1 process, over .*: lower --trials", capsys.readouterr().err
        )
    assert not made and hashes(place / "results").items() >= before.items()
    assert go(small, *goals, "--overwrite", "--force") == 0


def test_what_a_search_takes_is_that_of_places_drawn(small: str) -> None:
    def seconds(vary: dict[str, Any], trials: int) -> float:
        asked = work.question(opened(small), from_mapping(vary), minimize=["step_time_s"], trials=trials)
        return work._expected(asked).seconds

    assert seconds({"cluster.nodes": "2:400"}, 200) == pytest.approx(2 * seconds({"cluster.nodes": "2:400"}, 100))
    assert seconds({"traffic.tokens_per_rank": [64000]}, 100) > 2 * seconds({"traffic.tokens_per_rank": [64]}, 100)
    assert seconds({"cluster.nodes": [2]}, 4) == seconds({"cluster.nodes": [2]}, 100), "there are no more"


def test_bad_questions_are_refused_all_at_once(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main([small, *FLAGS, "--minimize", "step_tme_s", "max_vio_batch", "--maximize", "max_vio_batch", "--policy", "topk", "--subject-to", "kept_affinity>0.9", "mfu<=x", "mfu>=0_97", "kept>=1"])  # fmt: skip
    assert code == 2 and capsys.readouterr().err.splitlines() == [
        "--minimize step_tme_s: unknown metric (did you mean step_time_s?)",
        "--maximize max_vio_batch: is a goal already",
        "--subject-to 'kept_affinity>0.9': must be written METRIC>=NUMBER or METRIC<=NUMBER",
        "--subject-to 'mfu<=x': needs a number after the sign [got 'x']",
        "--subject-to 'mfu>=0_97': needs a number after the sign [got '0_97']",
        "--subject-to 'kept>=1': unknown metric (did you mean kept_affinity?)",
        "--policy topk: no such policy; there are top-k, top-k + bias, group-limited, group-limited + bias "
        "(did you mean top-k?)",
    ]
    for arguments, message in [
        (["--policy", "top-k"], "optimize: nothing to choose from: --vary KEY=VALUES, a sweep: block"),
        (["--vary", "gating.select.topk_grp=1,2"], "--vary gating.select.topk_grp: unknown key (did you mean topk_group?)"),
        (["--vary", "cluster.nods=1,2"], "--vary cluster.nods: unknown key"),
        (["--vary", "cluster.nodes=2", "--set", "cluster.nodes=2"], "--vary cluster.nodes: is set by --set too"),
        (["--trials", "0"], "python -m sim.optimize: --trials must be at least 1 [got 0]"),
        (["--resume", "--overwrite"], "python -m sim.optimize: --resume and --overwrite exclude each other"),
        (["--backend", "loca"], "python -m sim.optimize: --backend loca: must be one of dask, local, ray (did you mean local?)"),
    ]:  # fmt: skip
        assert main([small, *arguments, "--minimize", "step_time_s"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and message in err and "Traceback" not in err
    assert not Path("results").exists()


def test_a_library_that_is_absent_is_named_with_its_extra(
    small: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main([small, *FLAGS]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("pip install 'gatesim[optimize]'")


# --- real runs: on disk, on several processes, broken off ---


@pytest.fixture(scope="module")
def whole(small: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Front, dict[str, str]]:
    """An unbroken search of 8 runs on this process, for the usual goals."""
    front = sim.optimize(small, VARY, trials=8, batch=4, out=tmp_path_factory.mktemp("whole"))
    return front, hashes(front.folder)


def go(small: str, *arguments: str) -> int:
    return main([small, *FLAGS, "--trials=8", "--batch=4", "--quiet", *arguments])


def test_the_usual_goals_are_those_that_the_scenario_has(whole: tuple[Front, dict[str, str]], small: str) -> None:
    summary = sim.run(small).summary()
    known = {row["metric"] for _, row in summary.iterrows() if not math.isnan(row["mean"])}
    assert [goal.metric.name for goal in whole[0].goals] == [name for name in DEFAULTS if name in known]
    assert [goal.metric.name for goal in whole[0].goals if goal.maximize] == ["kept_affinity"]
    assert {"step_time_s", "max_vio_batch", "memory_bytes"} < known and "tpot_mean_s" not in known


def test_a_trial_is_the_run_of_its_policy_among_all(whole: tuple[Front, dict[str, str]], small: str) -> None:
    front, _ = whole
    runs = front.runs
    assert runs.columns[:5].tolist() == ["point", *VARY, "policy", "replica"] and len(runs) == 16
    for trial in front.tried[:3]:
        overrides = dict(zip(VARY, trial.place.values, strict=True))
        result = sim.run(small, overrides=overrides)
        rows = result.summary()[lambda frame, policy=trial.place.policy: frame["policy"] == policy]
        means = dict(zip(rows["metric"], rows["mean"], strict=True))
        assert {name: means[name] for name in trial.means} == pytest.approx(trial.means, rel=1e-15)


def test_any_number_of_processes_gives_the_same_bytes(
    whole: tuple[Front, dict[str, str]], small: str, place: Path
) -> None:
    assert go(small, "--jobs=2") == 0
    assert hashes(place / "results" / "small" / "optimize") == whole[1]


def test_a_killed_search_goes_on_to_the_same_bytes(
    whole: tuple[Front, dict[str, str]], small: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place / "results" / "small" / "optimize"
    process = subprocess.Popen(
        [sys.executable, "-m", "sim.optimize", small, *FLAGS, "--trials=8", "--batch=4", "--jobs=1", "--quiet"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    deadline = time.monotonic() + 60
    while not [*folder.glob("runs/*/part.parquet")] and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "killed before its end"
    before = hashes(folder)
    assert 0 < len(before) < len(whole[1])
    assert go(small) == 2, "without --resume nothing is overwritten"
    assert "holds a search already: --resume goes on" in capsys.readouterr().err
    assert hashes(folder) == before
    (folder / ".part.123").touch()
    assert go(small, "--resume") == 0
    assert hashes(folder) == whole[1]


def test_a_second_search_on_the_same_folder_waits_for_nobody(
    small: str, pretend: Callable[[Figures], list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(_figures)
    Path("results/small").mkdir(parents=True)
    with FileLock("results/small/.optimize.lock"):
        assert go(small, "--jobs=1") == 2
        assert "another search is writing here" in capsys.readouterr().err
    assert go(small, "--jobs=1") == 0


def test_a_part_is_of_its_run(whole: tuple[Front, dict[str, str]]) -> None:
    front, _ = whole
    assert front.folder is not None
    trial = next(trial for trial in front.tried if trial.rows is not None)
    schema = pq.read_schema(dataset.place(front.folder, trial.index)).remove_metadata()
    assert repr(disk.kept(front.folder, schema, trial)) == repr(trial.rows)
    assert disk.kept(front.folder, schema, dataclasses.replace(trial, run="0" * 12)) is None
    assert disk.kept(front.folder, schema.remove(len(schema) - 1), trial) is None


def test_a_trace_that_changes_ends_a_search(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While a run of it is on, or between batches; a run of an old trace is not taken for one of the new."""
    trace = place / "a.csv"
    trace.write_text("t_s,input_tokens,output_tokens\n0,64,4\n0.5,32,4\n")
    old, extra = trace.read_text(), "1,64,8\n"
    (place / "b.csv").write_text(old)
    arguments = [str(ROOT / "scenarios" / "llama_8b.yaml"), "--set=serving.duration_s=1", "--set=serving.warmup_s=0"]
    arguments += ["--set=serving.requests={kind: table, path: b.csv}", "--vary=serving.requests.path=a.csv,b.csv"]
    arguments += ["--vary=seed=1,2", "--jobs=1", "--quiet", "--minimize=tpot_mean_s"]
    real, calls = work.measured, list[Any]()

    def changing(item: Any) -> Any:
        calls.append(item)
        if len(calls) == 2:
            trace.write_text(old + extra)
        found = real(item)
        if len(calls) == 4:
            trace.write_text(old)
        return found

    def forget(*moments: int) -> None:
        calls[:] = [None] * moments[0]

    monkeypatch.setattr(work, "measured", changing)
    for batch in (1, 4):
        trace.write_text(old)
        forget(0)
        assert main([*arguments, f"--batch={batch}", f"--name=b{batch}"]) == 2
        printed = capsys.readouterr()
        assert f"{trace}: has changed since" in printed.err and not printed.out
    forget(10)
    assert main([*arguments, "--batch=4", "--name=b4", "--resume"]) == 0
    assert main([*arguments, "--batch=4", "--name=new"]) == 0
    assert hashes(place / "results/llama_8b/b4") == hashes(place / "results/llama_8b/new")


def test_what_cannot_start_removes_nothing(
    small: str, place: Path, stops: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither does an interrupt at any moment of --overwrite leave a folder that no option takes."""
    goals = ["--minimize", "step_time_s", "--jobs", "1", "--trials", "3"]
    assert go(small, *goals) == 0
    folder = place / "results" / "small" / "optimize"
    before = hashes(folder)
    assert go(small, *goals, "--overwrite", "--address=here") == 2
    assert "--address is of --backend ray or dask" in capsys.readouterr().err and hashes(folder) == before
    for step in ("replace", "rmtree", "mkdir", "put"):
        owner: Any = {"replace": os, "rmtree": shutil, "mkdir": Path, "put": dataset}[step]
        with monkeypatch.context() as patch:
            patch.setattr(owner, step, _interrupt)
            if step == "mkdir":
                patch.setattr(
                    Path, "mkdir", lambda path, **options: _interrupt() if path == folder.relative_to(place) else None
                )
            assert go(small, *goals, "--overwrite") == 130
        for flag in ("--resume", "--overwrite"):
            assert go(small, *goals, flag) == 0 and hashes(folder) == before
    assert [path.name for path in folder.parent.iterdir() if path.name != ".optimize.lock"] == ["optimize"]


def _interrupt(*arguments: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


def test_finished_runs_are_never_dropped_and_what_is_of_no_trial_is(
    small: str, place: Path, stops: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    goals = ["--minimize", "step_time_s", "--jobs", "1"]
    assert go(small, *goals) == 0
    folder = place / "results" / "small" / "optimize"
    before = hashes(folder)
    assert go(small, *goals, "--trials=2", "--resume") == 2
    assert "has 8 runs, more than --trials 2" in capsys.readouterr().err and hashes(folder) == before
    shutil.rmtree(folder / "runs" / "point=00003")
    shutil.copytree(folder / "runs" / "point=00000", folder / "runs" / "point=00099")
    (folder / "runs" / "point=x").mkdir()
    assert go(small, *goals, "--resume") == 0
    assert hashes(folder) == before and (folder / "runs" / "point=x").is_dir()
    for text in ('{"runs": 3}', "[]", "{", '{"runs": [1], "traces": null}'):
        (folder / "optimize.json").write_text(text)
        assert go(small, *goals) == 2 and go(small, *goals, "--resume") == 2
        assert "Traceback" not in capsys.readouterr().err
    assert go(small, *goals, "--overwrite") == 0 and hashes(folder) == before


@pytest.fixture
def stops(pretend: Callable[[Figures], list[dict[str, Any]]]) -> Iterator[list[int]]:
    """Runs that are left before an interrupt; none if empty."""
    left: list[int] = []

    def figures(data: dict[str, Any]) -> dict[str, list[float]]:
        if left:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return _figures(data)

    pretend(figures)
    yield left


def test_more_trials_go_on_where_fewer_ended_and_a_changed_question_is_refused(
    small: str, place: Path, stops: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    goals = ["--minimize", "step_time_s", "--maximize", "kept_affinity", "--jobs", "1"]
    assert go(small, *goals, "--trials=16", "--name=long") == 0
    folder = place / "results" / "small"
    assert go(small, *goals) == 0
    for count in (2, 3):
        stops[:] = [count]
        assert go(small, *goals, "--trials=16", "--resume") == 130
        assert capsys.readouterr().err.endswith("the runs that ended are kept: --resume goes on\n")
    stops[:] = [16 - 8 - 2 - 3]
    assert go(small, *goals, "--trials=16", "--resume") == 0, "no run is made twice"
    assert hashes(folder / "optimize") == hashes(folder / "long")
    assert go(small, *goals, "--trials=16", "--resume", "--subject-to", "kept_affinity>=0", "--set", "seed=5") == 2
    err = capsys.readouterr().err
    assert "seed: 0 -> 5" in err and "limits: [] -> ['kept_affinity >= 0']" in err
    stops.clear()
    part = folder / "optimize" / "runs" / "point=00000" / "part.parquet"
    part.write_bytes(b"damaged")
    assert go(small, *goals, "--resume", "--trials=16") == 0
    assert hashes(folder / "optimize") == hashes(folder / "long")


# --- what is printed ---


def test_the_table_names_what_was_found_and_what_chance_cannot_tell(
    small: str, pretend: Callable[[Figures], list[dict[str, Any]]]
) -> None:
    def figures(data: dict[str, Any]) -> dict[str, list[float]]:
        nodes = data["cluster"]["nodes"]
        noise = 0.2 if nodes == 8 else 0.0  # 95 %: the step of 8 nodes is 1 +- 0.5, of 4 nodes 1.1, of 2 nodes 2
        step = {2: 2.0, 4: 1.1, 8: 1.0}[nodes]
        return {
            "step_time_s": [step - noise, step, step + noise][: data["replicas"]],
            "max_vio_batch": [0.1 * nodes] * data["replicas"],
        }

    pretend(figures)
    vary = {"cluster.nodes": [2, 4, 8]}
    options: dict[str, Any] = {"policies": ["top-k"], "replicas": 3}
    both = sim.optimize(small, vary, minimize=["step_time_s", "max_vio_batch"], **options)
    rows = [line.split() for line in table(both).splitlines() if line.split()[1:2] in (["2"], ["4"], ["8"])]
    assert [row[1] for row in rows] == ["8", "4", "2"]
    assert [row[-1] for row in rows[:2]] == ["differs", "differs"]
    assert both.best is not None and both.best.place.values == (4,)
    assert [goal.metric.name for goal in both.apart(both.best_of_all[0], both.best_of_all[1]) or []] == [
        "max_vio_batch"
    ]
    one = sim.optimize(small, vary, minimize=["step_time_s"], **options)
    text = table(one)
    assert "Best: trial" in text and "cluster.nodes = 8, top-k" in text
    alike = next(trial.index for trial in one.tried if trial.place.values == (4,))
    assert (
        f"1 of 2 other feasible runs do not differ from it by more than chance (95 %, paired by replica): {alike}."
        in text
    )
    for vio, said in (
        (lambda nodes: -0.1 * nodes, "One run beats all others in every goal."),
        (lambda nodes: 0.5, "No other run is better in any goal."),
    ):
        pretend(lambda data, vio=vio: figures(data) | {"max_vio_batch": [vio(data["cluster"]["nodes"])] * 3})
        assert said in table(sim.optimize(small, vary, minimize=["step_time_s", "max_vio_batch"], **options))
    pretend(figures)
    single = sim.optimize(small, vary, minimize=["step_time_s"], policies=["top-k"], replicas=1)
    assert "One replica cannot tell" in table(single)
