"""The run folder: complete or absent, equal for equal scenarios, and enough to repeat the run."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim import store
from sim.estimate import estimate
from sim.loading import load
from sim.results import Result
from sim.scenario import Scenario
from sim.store import check_writable, resolved_data, run_id, write
from sim.study import simulate
from sim.yamlfile import ScenarioError, dump

TINY = Path(__file__).resolve().parents[1] / "scenarios" / "tiny.yaml"
SMALL = ["replicas=2", "steps.count=2", "steps.warmup.steps=2", "traffic.tokens_per_rank=32"]


@pytest.fixture(scope="module")
def result() -> Result:
    scenario = load(TINY, SMALL)
    return simulate(scenario, 1, estimate(scenario))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def same_run(a: Path, b: Path) -> bool:
    """Whether two run folders hold the same bytes, but for the wall time in the manifest."""
    left, right = bytes_of(a), bytes_of(b)
    manifests = [json.loads(files.pop("manifest.json")) | {"wall_s": None} for files in (left, right)]
    return left == right and manifests[0] == manifests[1]


# --- contents ---


def test_manifest_hashes_are_those_of_the_files(result: Result, tmp_path: Path) -> None:
    folder = write(result, tmp_path, 1.5)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    files = {path.name for path in folder.iterdir()}
    assert set(manifest["sha256"]) == files - {"manifest.json"} and len(files) == 9
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert manifest["events"] == result.n_events and manifest["wall_s"] == 1.5
    assert manifest["scenario"] == resolved_data(result.scenario)
    assert set(manifest["versions"]) >= {"python", "gatesim", "numpy", "simpy"}
    assert folder == tmp_path / "tiny" / run_id(result.scenario)


def test_tables_read_back_as_they_were(result: Result, tmp_path: Path) -> None:
    folder = write(result, tmp_path)
    for name, table in result.tables.items():
        assert equal(pq.read_table(folder / f"{name}.parquet").to_pydict(), table)
    with (folder / "summary.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(result.summary_rows)
    for name, column in result.summary_rows.items():
        for row, value in zip(rows, column, strict=True):
            missing = isinstance(value, float) and math.isnan(value)
            assert row[name] == ("" if missing else str(value)), "floats are written so that they read back exactly"


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)))


def test_a_run_without_times_or_experts_is_written_too(tmp_path: Path) -> None:
    for overrides in (["steps.timed=none"], ["model=" + str(TINY.parent / "models" / "dense_37b.yaml"),
                      "policies=[{name: dense, select: dense}]", "schedule.phase=forward"]):  # fmt: skip
        scenario = load(TINY, [*SMALL, *overrides])
        folder = write(simulate(scenario, 1, estimate(scenario)), tmp_path)
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        assert "steps.parquet" in manifest["sha256"] and "summary.csv" in manifest["sha256"]
        assert load(folder / "scenario.yaml") == scenario


def test_a_file_is_replaced_whole(result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the new bytes are all on the disk the old ones are there, and a failure leaves no stray."""
    target = tmp_path / "page[1].html"
    target.write_bytes(b"old")
    for function, error in (("fsync", FULL), ("replace", CTRL_C)):
        with monkeypatch.context() as patch:
            seen: list[bytes] = []

            def fails(*arguments: Any, error: BaseException = error, seen: list[bytes] = seen) -> None:
                seen.append(target.read_bytes())
                raise error

            patch.setattr(os, function, fails)
            with pytest.raises(type(error)):
                store.replace(target, b"new")
        assert seen == [b"old"] and bytes_of(tmp_path) == {target.name: b"old"}
    (tmp_path / f".{target.name}.999999999.01234567").write_bytes(b"of a killed process")
    (tmp_path / f".{target.name}.{os.getppid()}.01234567").write_bytes(b"of a living one")
    store.replace(target, b"new")
    assert set(bytes_of(tmp_path)) == {target.name, f".{target.name}.{os.getppid()}.01234567"}
    assert target.read_bytes() == b"new"
    for odd in (Path("/dev/null"), tmp_path):
        with pytest.raises(FileExistsError, match="no regular file"):
            store.replace(odd, b"new")


@pytest.mark.parametrize("at", range(1, 4))
def test_a_manifest_never_lists_what_a_file_is_not(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Killed anywhere while a page is replaced: the run reads, and every hash in its manifest is the file's."""
    folder = write(result, tmp_path)
    store.add(folder, {"report.html": b"old"})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", Fault(os.replace, at, CTRL_C))
        with pytest.raises(KeyboardInterrupt):
            store.add(folder, {"report.html": b"new"})
    for name, digest in store.manifest_of(folder)["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert store.read(folder).tables.keys() == result.tables.keys()
    store.add(folder, {"report.html": b"new"})
    assert store.manifest_of(folder)["sha256"]["report.html"] == hashlib.sha256(b"new").hexdigest()


def test_what_nobody_else_may_read_stays_so(result: Result, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        folder = write(result, tmp_path)
        store.add(folder, {"report.html": b"mine"})
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_everybody_may_read_what_the_umask_allows(result: Result, tmp_path: Path) -> None:
    folder = write(result, tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o755, "not the 0700 of a temporary folder"


# --- repeating a run ---


def test_the_written_scenario_repeats_the_run(result: Result, tmp_path: Path) -> None:
    first = write(result, tmp_path / "a", 1.0)
    again = load(first / "scenario.yaml")
    assert again == result.scenario and run_id(again) == first.name
    second = write(simulate(again, 1, estimate(again)), tmp_path / "b", 2.0)
    assert second.relative_to(tmp_path / "b") == first.relative_to(tmp_path / "a") and same_run(first, second)


def test_the_same_scenario_lands_in_the_same_folder(result: Result, tmp_path: Path) -> None:
    first = write(result, tmp_path)
    before = bytes_of(tmp_path)
    assert write(result, tmp_path) == first and bytes_of(tmp_path) == before
    other = load(TINY, [*SMALL, "seed=1"])
    assert run_id(other) != first.name
    moved = write(replace(result, scenario=other), tmp_path)
    assert moved != first and sorted(p.name for p in (tmp_path / "tiny").iterdir()) == sorted([first.name, moved.name])


def test_an_older_folder_is_replaced_whole(result: Result, tmp_path: Path) -> None:
    folder = write(result, tmp_path)
    (folder / "left.over").write_text("from an older version", encoding="utf-8")
    (folder / "manifest.json").unlink()
    write(result, tmp_path)
    assert not (folder / "left.over").exists() and len(list(folder.iterdir())) == 9


PLAIN = st.one_of(
    st.text(min_size=1, max_size=12),
    st.sampled_from(
        ["null", "~", "yes", "1", "1e3", "- a", "a: b", "#c", " x ", "'", '"', "µs ±", "&a", "*a", "!t", "=", "\\"]
    ),
)
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "description": PLAIN,
        "replicas": st.integers(1, 10_000),
        "traffic": st.fixed_dictionaries(
            {"kind": st.just("affinity"), "tokens_per_rank": st.sampled_from([2, 64])},
            optional={
                "latent_dof": st.none() | st.floats(3, 1e6),
                "layer_profile": st.none(),
                "popularity_sd": st.floats(0, 2),
                "logit_mean": st.floats(-5, 5),
                "topic_tree": st.lists(st.fixed_dictionaries({"name": st.sampled_from("abc")}), min_size=1, max_size=1),
            },
        ),
        "policies": st.lists(
            st.fixed_dictionaries(
                {"name": PLAIN},
                optional={
                    "select": st.sampled_from(["topk", "random", {"kind": "group_limited", "n_group": 4}]),
                    "balance": st.sampled_from(["none", "bias", [{"kind": "bias", "stop_after_step": None}]]),
                    "placement": st.sampled_from(["linear", "random"]),
                    "norm_topk_prob": st.none() | st.booleans(),
                    "routed_scaling_factor": st.none() | st.floats(0.1, 10),
                    "score": st.none() | st.sampled_from(["softmax", {"kind": "sigmoid"}]),
                },
            ),
            min_size=1,
            max_size=3,
            unique_by=lambda policy: str(policy["name"]),
        ),
    },
)


@given(CHANGES)
def test_the_resolved_scenario_says_everything(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    base = json.loads(json.dumps(resolved_data(load(TINY))))
    try:
        scenario = load(base | changes)
    except ScenarioError as error:  # a lone surrogate in a text
        assert all("Unicode" in problem.rule for problem in error.problems)
        return
    file = tmp_path_factory.mktemp("resolved") / "scenario.yaml"
    file.write_text(dump(resolved_data(scenario)), encoding="utf-8")
    again = load(file)
    assert again == scenario and run_id(again) == run_id(scenario) and again.resolved() == again
    for name, value in changes.items():
        if name in ("seed", "description", "replicas"):
            assert getattr(again, name) == value


def test_no_setting_is_lost_because_it_is_null() -> None:
    """``exclude_none`` is safe only where null is the default."""

    def walk(cls: Any, seen: set[Any]) -> Iterator[tuple[str, Any]]:
        if cls in seen:
            return
        seen.add(cls)
        for name, field in cls.model_fields.items():
            accepts_null = type(None) in getattr(field.annotation, "__args__", ())
            if accepts_null and not field.is_required() and field.default is not None:
                yield f"{cls.__name__}.{name}", field
            for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if hasattr(part, "model_fields"):
                    yield from walk(part, seen)

    seen: set[Any] = set()
    lost = list(walk(Scenario, seen))
    assert {cls.__name__ for cls in seen} >= {"Scenario", "Model", "Cluster", "Device", "Policy", "Warmup"}
    assert lost == []


# --- faults ---


class Fault:
    """Calls of ``function`` go through until number ``at``, which raises."""

    def __init__(self, function: Callable[..., Any], at: int, error: BaseException) -> None:
        self.function, self.at, self.error, self.calls = function, at, error, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.function(*arguments, **options)


FULL, CTRL_C = OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()
FAULTS: list[tuple[str, Callable[..., Any], int, BaseException]] = [
    *(("pyarrow.parquet.write_table", pq.write_table, at, FULL) for at in (1, 4)),
    ("sim.store.write_csv", store.write_csv, 1, FULL),
    *(("sim.store._sha256", store._sha256, at, error) for at, error in ((1, CTRL_C), (6, FULL))),
    *(("os.fsync", os.fsync, at, FULL) for at in (1, 7)),
    *(("os.replace", os.replace, at, error) for at in (1, 2) for error in (FULL, CTRL_C)),
]


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(("target", "function", "at", "error"), FAULTS)
def test_a_fault_leaves_everything_as_it_was(
    result: Result,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    function: Callable[..., Any],
    at: int,
    error: BaseException,
    older: bool,
) -> None:
    if older:
        (write(result, tmp_path) / "note").write_text("mine", encoding="utf-8")
    (tmp_path / "neighbour").write_text("untouched", encoding="utf-8")
    before = bytes_of(tmp_path)
    fault = Fault(function, at, error)
    with monkeypatch.context() as patch:
        patch.setattr(target, fault)
        with pytest.raises(type(error)):
            write(result, tmp_path)
    assert fault.calls >= at
    assert bytes_of(tmp_path) == before
    assert [p.name for p in (tmp_path / "tiny").iterdir()] == ([run_id(result.scenario)] if older else [])
    folder = write(result, tmp_path)
    assert (folder / "manifest.json").is_file() and not (folder / "note").exists()


def test_a_disk_that_never_lets_go_keeps_the_old_results(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If even putting the old folder back fails, it is not deleted."""
    before = bytes_of(write(result, tmp_path))
    through = os.replace

    def once(source: Path, target: Path, calls: list[int] = []) -> None:  # noqa: B006
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.EIO, "Input/output error")
        through(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", once)
        with pytest.raises(OSError, match="Input/output error"):
            write(result, tmp_path)
    (kept,) = (tmp_path / "tiny").glob(".*/old")
    assert bytes_of(kept) == before


def test_two_processes_may_finish_the_same_scenario(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(write(result, tmp_path / "other"), theirs)
    through, renamed = os.replace, []

    def overtaken(source: Path, target: Path) -> None:
        renamed.append(target)
        if len(renamed) in (2, 4):  # the other process gets its folder in just before ours, twice
            shutil.copytree(theirs, target)
        through(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", overtaken)
        folder = write(result, tmp_path)
    assert len(renamed) > 4 and same_run(folder, theirs)
    assert [p.name for p in (tmp_path / "tiny").iterdir()] == [folder.name]


def test_strays_of_dead_processes_are_swept(result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, parent = run_id(result.scenario), tmp_path / "tiny"
    dead, alive, own, odd, other = (
        parent / text for text in (f".{name}.111.x", f".{name}.222.x", f".{name}.{os.getpid()}.x", f".{name}.abc.x", ".aaaa.111.x")
    )  # fmt: skip
    for stray in (dead, alive, own, odd, other):
        (stray / "old").mkdir(parents=True)

    def kill(pid: int, number: int) -> None:
        assert number == 0
        if pid == 111:
            raise ProcessLookupError
        if pid == 222:
            raise PermissionError("of another user")

    monkeypatch.setattr(os, "kill", kill)
    write(result, tmp_path)
    assert sorted(p.name for p in parent.iterdir()) == sorted([name, alive.name, odd.name, other.name])


def test_places_that_cannot_hold_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    check_writable(tmp_path)
    check_writable(tmp_path / "new" / "below")
    monkeypatch.chdir(tmp_path)
    check_writable("results")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    for out in ("file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match=r"--out .*file is not a folder"):
            check_writable(out)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="cannot be written to"):
        check_writable("results")
