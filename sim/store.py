"""The run folder: written whole or not at all.

``<out>/<scenario>/<run>/`` holds ``manifest.json``, ``scenario.yaml`` (fully resolved: it runs by itself), the tidy
tables as parquet and ``summary.csv``, and what else was asked for. The run's name is a hash of the resolved scenario, so
the same scenario lands in the same folder with the same bytes. `read` gives back the result.
"""

from __future__ import annotations

import csv
import errno
import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from sim.results import Result, Table, summarise
from sim.scenario import Scenario

_MANIFEST, _SCENARIO = "manifest.json", "scenario.yaml"
# Tables that a result has even where they are empty, and so are no file.
_STEPS = ("steps", "layers", "totals", "devices", "experts", "topics")
_SERVING = ("requests", "service", "units", "timeline", "rebalances", "faults")


def resolved_data(scenario: Scenario) -> dict[str, Any]:
    """Return the scenario as plain data from which the same run can be repeated."""
    data: dict[str, Any] = scenario.model_dump(mode="json", exclude_none=True)
    return data


def run_id(scenario: Scenario, traces: tuple[str, str] | None = None) -> str:
    """Return 12 hex digits of the SHA-256 of the resolved scenario; of a recorded trace the content counts, not the path.

    traces: as in `Result.traces`."""
    data = resolved_data(scenario)
    traffic, requests = traces or fingerprints(scenario)
    if traffic:
        data["traffic"] = data["traffic"] | {"path": traffic}
    if requests:
        data["serving"]["requests"] |= {"path": requests}
    text = json.dumps(data, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fingerprints(scenario: Scenario) -> tuple[str, str]:
    """Return SHA-256 of the recorded traffic and requests as the files are now; empty for none, or one that cannot be read."""
    serving = scenario.serving
    return scenario.traffic.fingerprint(), "" if serving is None else serving.requests.fingerprint()


def named_traces(scenario: Scenario) -> tuple[str, str]:
    """Return the files (or folders) that traffic and requests were recorded in; empty for synthetic ones."""
    requests = None if scenario.serving is None else scenario.serving.requests
    return getattr(scenario.traffic, "path", ""), getattr(requests, "path", "")


def gone(result: Result) -> list[str]:
    """Return a line for each recorded trace of a stored run that is not there any more as it was. Only a new run needs it."""
    if result.traces is None:
        return []
    rows = zip(named_traces(result.scenario), result.traces, fingerprints(result.scenario), strict=True)
    return [
        f"{path} {'has changed' if now else 'is gone'} since the run was made"
        for path, then, now in rows
        if then != now
    ]


def write(
    result: Result,
    out: str | os.PathLike[str],
    wall_s: float | None = None,
) -> Path:
    """Write the run's folder and return its path. An older run of the same scenario is replaced when the new one is
    complete; OSError leaves everything as it was."""
    from sim.yamlfile import dump

    traces = result.traces or fingerprints(result.scenario)
    folder = Path(out) / result.scenario.name / run_id(result.scenario, traces)
    with atomic_folder(folder) as work:
        for name, table in result.tables.items():
            if table:
                write_parquet(work / f"{name}.parquet", table)
        write_csv(work / "summary.csv", result.summary_rows)
        (work / _SCENARIO).write_text(dump(resolved_data(result.scenario)), encoding="utf-8")
        manifest = {
            "scenario": resolved_data(result.scenario),
            "seed": result.scenario.seed,
            "engine": result.scenario.schedule.engine,
            "resolution": result.scenario.steps.resolution,
            "trace_sha256": traces[0] or None,
            "requests_sha256": traces[1] or None,
            "events": result.n_events,
            "versions": versions(),
            "sha256": {path.name: _sha256(path) for path in sorted(work.iterdir())},
            "wall_s": wall_s,
        }
        (work / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return folder


def manifest_of(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what ``manifest.json`` says. Raises FileNotFoundError if ``folder`` holds no run, ValueError if that file is
    damaged."""
    path = Path(folder) / _MANIFEST
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, f"not a run's folder (no {_MANIFEST})", str(folder))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found["events"], int) or not {**found["sha256"], **found["versions"]}:
            raise ValueError("no hashes")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return dict(found)


def read(folder: str | os.PathLike[str]) -> Result:
    """Return the result that `write` stored. Recorded traces may lie anywhere and need not be there any more (`gone`); files
    that were added later are not looked at. Raises FileNotFoundError if ``folder`` is no run's, ScenarioError if its
    scenario no longer reads, and ValueError if a file is missing or is not what the manifest lists."""
    import pyarrow.parquet as pq

    from sim import yamlfile
    from sim.loading import opened

    folder = Path(folder)
    manifest = manifest_of(folder)
    tables: dict[str, Table] = {}
    for name, digest in sorted(manifest["sha256"].items()):
        path = folder / name
        if path.suffix != ".parquet" and name != _SCENARIO:
            continue
        if not path.is_file():
            raise ValueError(f"{folder} is damaged: {name} is missing")
        if _sha256(path) != digest:
            raise ValueError(f"{folder} is damaged: {name} is not the file that {_MANIFEST} lists")
        if path.suffix == ".parquet":
            tables[path.stem] = pq.read_table(path).to_pydict()
    # No rules between its parts: they were kept when the run was made, and some would read its traces.
    scenario = yamlfile.validate(Scenario, opened(folder / _SCENARIO, allow_outside=True)).resolved()
    for name in _STEPS if scenario.serving is None else _SERVING:
        tables.setdefault(name, {})
    traces = manifest.get("trace_sha256") or "", manifest.get("requests_sha256") or ""
    return Result(scenario, tables, summarise(tables, scenario), manifest["events"], traces=traces)


def add(folder: str | os.PathLike[str], extras: Mapping[str, bytes]) -> None:
    """Put more files, by name, into a stored run and its manifest; each is replaced whole. Raises as `manifest_of`.

    Whenever it is killed, the manifest lists no hash that is not the file's: files that change are not listed meanwhile."""
    folder = Path(folder)
    manifest = manifest_of(folder)
    if [name for name in extras if manifest["sha256"].pop(name, None)]:
        _write_manifest(folder, manifest)
    for name, content in extras.items():
        replace(folder / name, content)
        manifest["sha256"][name] = hashlib.sha256(content).hexdigest()
    manifest["sha256"] = dict(sorted(manifest["sha256"].items()))
    _write_manifest(folder, manifest)


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    replace(folder / _MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, readable as the umask allows. Raises OSError, also for what `check_target` refuses."""
    check_target(path)
    for stray in path.parent.glob(f".{glob.escape(path.name)}.*.{8 * '?'}"):  # left by a killed process
        if not _alive(stray.name):
            with suppress(OSError):
                stray.unlink()
    work = _temporary(path)
    try:
        with open(os.open(work, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(work, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(work)
        raise


def check_target(path: Path) -> None:
    """Raise FileExistsError if ``path`` is there and no regular file: a folder, or a device such as /dev/null."""
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is there and is no regular file")


def _temporary(path: Path) -> Path:
    """Return a name beside ``path`` that nobody has and that says which process it belongs to."""
    return path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")


def check_writable(out: str | os.PathLike[str]) -> None:
    """Raise OSError if ``out`` can not become a folder of results; makes nothing."""
    place = Path(out).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"--out {out}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {out}: {place} cannot be written to")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary sibling to fill; on success it takes the folder's name, on failure it is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for stray in folder.parent.glob(f".{glob.escape(folder.name)}.*"):  # left by a killed run
        if not _alive(stray.name):
            shutil.rmtree(stray, ignore_errors=True)
    work = _temporary(folder)
    work.mkdir()
    try:
        yield work
        for path in work.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        _swap(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _swap(work: Path, folder: Path) -> None:
    """Give ``work`` the name ``folder``. An older folder goes once that is done, and keeps its name if it fails."""
    for attempts_left in reversed(range(10)):
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.{os.getpid()}.", dir=folder.parent))
        old = aside / "old"
        try:
            with suppress(FileNotFoundError):
                os.replace(folder, old)
            os.replace(work, folder)
            return
        except BaseException as error:
            if old.exists():
                with suppress(OSError):
                    os.replace(old, folder)
            # Another process may have finished the same scenario in between.
            occupied = isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST)
            if not (occupied and attempts_left):
                raise
        finally:
            if folder.exists() or not old.exists():
                shutil.rmtree(aside, ignore_errors=True)


def _alive(name: str) -> bool:
    """Say whether the process that made a temporary folder still runs."""
    pid = name.rsplit(".", 2)[1]
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, OSError):
        return True
    return int(pid) != os.getpid()


def write_parquet(path: Path, table: Table) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(table), path, compression="zstd")


def write_csv(path: Path, table: Table) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table)
        for row in zip(*table.values(), strict=True):
            writer.writerow(["" if isinstance(v, float) and math.isnan(v) else v for v in row])


def versions() -> dict[str, str]:
    """Return the versions, by name, of what a run's figures come from."""
    import platform

    found = {"python": platform.python_version()}
    for name in ("gatesim", "numpy", "simpy", "pydantic", "networkx", "pyarrow", "numba"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
