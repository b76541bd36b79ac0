"""Same scenario and seed, same bytes: in one process, in fresh ones, on any number of them, with any kernels."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sim.run import main

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--set", "replicas=1", "--set", "steps.count=2", "--set", "steps.warmup.steps=5"]


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every table of the one run below ``folder``."""
    (run,) = [path.parent for path in folder.rglob("manifest.json")]
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.iterdir())
        if path.name != "manifest.json"
    }


def in_process(out: Path, *extra: str) -> dict[str, str]:
    assert main([str(ROOT / "scenarios" / "tiny.yaml"), *SMALL, "--quiet", "--out", str(out), *extra]) == 0
    return digests(out)


def fresh(out: Path, *extra: str, **environment: str) -> dict[str, str]:
    command = [sys.executable, "-m", "sim.run", "scenarios/tiny.yaml", *SMALL, "--quiet", "--out", str(out), *extra]
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONHASHSEED", "GATESIM_KERNELS")} | environment
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, timeout=120)
    return digests(out)


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return in_process(tmp_path_factory.mktemp("golden"))


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


def test_two_processes(golden: dict[str, str], tmp_path: Path) -> None:
    assert fresh(tmp_path, "--jobs", "2") == golden


@pytest.mark.parametrize("kernels", ["numpy", "numba"])
def test_either_kernels(golden: dict[str, str], tmp_path: Path, kernels: str) -> None:
    assert fresh(tmp_path, GATESIM_KERNELS=kernels) == golden


def test_without_cpu_features(golden: dict[str, str], tmp_path: Path) -> None:
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    features = [name for name in __cpu_dispatch__ if __cpu_features__.get(name)]
    if not features:
        pytest.skip("NumPy dispatches no CPU features on this machine")
    found = fresh(tmp_path, NPY_DISABLE_CPU_FEATURES=" ".join(features), GATESIM_KERNELS="numpy")
    assert {name: found[name] for name in ("experts.parquet",)} == {name: golden[name] for name in ("experts.parquet",)}
    assert np.__version__
