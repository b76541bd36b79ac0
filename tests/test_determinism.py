"""Same scenario and seed, same bytes: in one process, in fresh ones, on any number of them, with any kernels.

And what a row says does not depend on what else runs: other policies, more replicas, later steps.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import sim
from sim.digest import digest
from sim.estimate import estimate
from sim.run import main
from sim.store import run_id
from sim.study import route, separable, timed

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "scenarios" / "tiny.yaml"
SHORT = ["replicas=1", "steps.count=2", "steps.warmup.steps=5"]
SMALL = [word for value in SHORT for word in ("--set", value)]
TABLES = {
    "steps.parquet", "layers.parquet", "totals.parquet", "topics.parquet", "devices.parquet", "experts.parquet",
    "summary.csv", "scenario.yaml",
}  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file but the manifest (it holds the wall time) of the one run below ``folder``."""
    (run,) = [path.parent for path in folder.rglob("manifest.json")]
    files = [path for path in sorted(run.iterdir()) if path.name != "manifest.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def in_process(out: Path, *extra: str) -> dict[str, str]:
    assert main([str(TINY), *SMALL, "--quiet", "--out", str(out), *extra]) == 0
    return digests(out)


def fresh(out: Path, *extra: str, **environment: str) -> dict[str, str]:
    command = [sys.executable, "-m", "sim.run", "scenarios/tiny.yaml", *SMALL, "--quiet", "--out", str(out), *extra]
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONHASHSEED", "GATESIM_KERNELS")} | environment
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, timeout=120)
    return digests(out)


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = in_process(tmp_path_factory.mktemp("golden"))
    assert set(found) == TABLES
    return found


def test_ten_repeats_in_one_process(golden: dict[str, str], tmp_path: Path) -> None:
    for i in range(10):
        if i == 5:  # another scenario in between leaves no trace
            in_process(tmp_path / "other", "--seed", "7")
        assert in_process(tmp_path / str(i)) == golden


def test_another_seed_is_another_run(golden: dict[str, str], tmp_path: Path) -> None:
    other = in_process(tmp_path, "--seed", "1")
    assert all(other[name] != golden[name] for name in golden)


@pytest.mark.parametrize("hash_seed", ["0", "1", "2"])
def test_fresh_process_and_hash_seed(golden: dict[str, str], tmp_path: Path, hash_seed: str) -> None:
    assert fresh(tmp_path, PYTHONHASHSEED=hash_seed) == golden


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_number_of_processes(golden: dict[str, str], tmp_path: Path, jobs: str) -> None:
    assert fresh(tmp_path, "--jobs", jobs) == golden


@pytest.mark.parametrize("kernels", ["numpy", "numba"])
def test_either_kernels(golden: dict[str, str], tmp_path: Path, kernels: str) -> None:
    assert fresh(tmp_path, GATESIM_KERNELS=kernels) == golden


def test_without_cpu_features(golden: dict[str, str], tmp_path: Path) -> None:
    """NumPy's plain code paths choose the same experts and give the same tables."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    features = [name for name in __cpu_dispatch__ if __cpu_features__.get(name)]
    if not features:
        pytest.skip("NumPy dispatches no CPU features on this machine")
    assert fresh(tmp_path, NPY_DISABLE_CPU_FEATURES=" ".join(features), GATESIM_KERNELS="numpy") == golden


def test_locale_and_time_zone(golden: dict[str, str], tmp_path: Path) -> None:
    assert fresh(tmp_path, LC_ALL="C", TZ="Pacific/Kiritimati", COLUMNS="20") == golden


def test_resolved_scenario_repeats_the_run(golden: dict[str, str], tmp_path: Path) -> None:
    """The `scenario.yaml` beside the tables is enough to get them again."""
    in_process(tmp_path / "first")
    (file,) = (tmp_path / "first").rglob("scenario.yaml")
    assert main([str(file), "--quiet", "--out", str(tmp_path / "second")]) == 0
    assert digests(tmp_path / "second") == golden


def trace_in_its_folder(folder: Path) -> Path:
    """Write `replay.yaml` made small, its models and a recorded trace that it names; return the file."""
    for name in ("models", "clusters"):
        shutil.copytree(ROOT / "scenarios" / name, folder / name)
    first = np.random.default_rng(0).integers(64, size=(17, 1024, 1), dtype=np.int16)
    np.savez(folder / "trace.npz", topk_ids=(first + 7 * np.arange(6, dtype=np.int16)) % 64)
    text = (ROOT / "scenarios" / "replay.yaml").read_text(encoding="utf-8")
    text = text.replace("{kind: replay, tokens_per_rank: 512}", "{kind: replay, tokens_per_rank: 64, path: trace.npz}")
    (folder / "replay.yaml").write_text(text, encoding="utf-8")
    return folder / "replay.yaml"


def test_replay_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = trace_in_its_folder(tmp_path / "scenarios")
    found = []
    for name in ("here", "there/below"):
        (tmp_path / name).mkdir(parents=True)
        monkeypatch.chdir(tmp_path / name)
        assert main([str(file), "--quiet", "--out", str(tmp_path / f"{name}_out")]) == 0
        found.append(digests(tmp_path / f"{name}_out"))
    assert found[0] == found[1]


def test_resolved_replay_repeats_the_run(tmp_path: Path) -> None:
    file = trace_in_its_folder(tmp_path / "scenarios")
    assert main([str(file), "--quiet", "--out", str(tmp_path / "first")]) == 0
    (resolved,) = (tmp_path / "first").rglob("scenario.yaml")
    assert main([str(resolved), "--allow-outside", "--quiet", "--out", str(tmp_path / "second")]) == 0
    assert digests(tmp_path / "second") == digests(tmp_path / "first")


def test_a_trace_is_known_by_its_content(tmp_path: Path) -> None:
    file = trace_in_its_folder(tmp_path / "scenarios")
    trace = file.parent / "trace.npz"
    first = run_id(sim.load(file))
    (file.parent / "copy.npz").write_bytes(trace.read_bytes())
    assert run_id(sim.load(file, [f"traffic.path={file.parent / 'copy.npz'}"])) == first
    ids = np.load(trace)["topk_ids"]
    np.savez(trace, topk_ids=ids[:, ::-1])
    assert run_id(sim.load(file)) != first
    folder = tmp_path / "esft"
    folder.mkdir()
    (folder / "expert_weights_1.txt").write_text("1\t2\t0.5\t0.5\n", encoding="utf-8")
    whole = digest(str(folder))
    (folder / "expert_weights_1.txt").write_text("2\t1\t0.5\t0.5\n", encoding="utf-8")
    assert len(whole) == 64 and digest(str(folder)) != whole and digest(str(tmp_path / "none")) == ""


# What a row does not depend on -----------------------------------------------------------------------------------


def frames(overrides: Sequence[str]) -> dict[str, pd.DataFrame]:
    result = sim.run(TINY, overrides=[*SHORT, *overrides])
    return {"steps": result.steps, "layers": result.layers, "devices": result.devices, "experts": result.experts}


@pytest.fixture(scope="module")
def alone() -> dict[str, pd.DataFrame]:
    return frames(["steps.timed=all"])


def test_a_policy_does_not_depend_on_the_others(alone: dict[str, pd.DataFrame]) -> None:
    """Reversed and fewer: each policy keeps its rows, the random one and the ones that learn included."""
    chosen = [
        "{name: random, select: random}",
        "{name: group-limited + bias, select: group_limited, balance: bias}",
        "{name: top-k + bias, balance: bias}",
    ]
    fewer = frames(["steps.timed=all", f"policies=[{', '.join(chosen)}]"])
    for name, table in fewer.items():
        for policy, rows in table.groupby("policy"):
            expected = alone[name][alone[name].policy == policy]
            pd.testing.assert_frame_equal(
                rows.reset_index(drop=True), expected.reset_index(drop=True), check_exact=True
            )


def test_a_replica_does_not_depend_on_how_many_follow(alone: dict[str, pd.DataFrame]) -> None:
    more = frames(["steps.timed=all", "replicas=3"])
    for name, table in more.items():
        first = table[table.replica == 0].reset_index(drop=True)
        pd.testing.assert_frame_equal(first, alone[name], check_exact=True)
    tokens = more["experts"].groupby("replica").tokens.apply(tuple)
    assert len(set(tokens)) == 3


def test_a_step_does_not_depend_on_how_many_follow(alone: dict[str, pd.DataFrame]) -> None:
    longer = frames(["steps.timed=all", "steps.count=4"])
    for name in ("steps", "layers", "devices"):
        first = longer[name][longer[name].step < 2].reset_index(drop=True)
        pd.testing.assert_frame_equal(first, alone[name], check_exact=True)


def test_one_routing_serves_every_price() -> None:
    base = sim.load(TINY, SHORT)
    routed = route(base, 1, estimate(base))
    for changes in ((), ("cost.communication=alpha_beta", "cluster.device.memory_bandwidth_bytes_per_s=1e12")):
        scenario = sim.load(TINY, [*SHORT, *changes])
        whole, again = sim.run(scenario), timed(routed, scenario)
        for name in whole.tables:
            pd.testing.assert_frame_equal(pd.DataFrame(whole.tables[name]), pd.DataFrame(again.tables[name]))
    for change, what in (
        ("traffic.tokens_per_rank=64", "traffic"),
        ("cluster.nodes=4", "cluster"),  # more devices, as many in each NVLink domain
        ("schedule={phase: forward, micro_batches: 2, overlap: micro_batches}", "schedule.phase"),
    ):
        with pytest.raises(ValueError, match=f"{what} differs"):
            timed(routed, sim.load(TINY, [*SHORT, change]))


def test_routing_that_asks_for_costs_is_not_shared() -> None:
    annealed = "policies=[{name: a}, {name: b, placement: annealed}]"
    assert separable(sim.load(TINY, SHORT)) and not separable(sim.load(TINY, [*SHORT, annealed]))
