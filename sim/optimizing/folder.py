"""The folder of a search: parts as a sweep has them, what it is (``optimize.json``) and what came out (two CSV tables).

The same search has the same bytes, broken off or not: no times, no hosts, and every part at the number of its trial.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sim.optimizing.front import Front
from sim.optimizing.search import Trial
from sim.results import Table
from sim.sweeping import dataset
from sim.sweeping.folder import SHOWN, Refused
from sim.sweeping.manifest import differences

if TYPE_CHECKING:
    import pyarrow as pa

DEFINITION = "optimize.json"


@contextmanager
def opened(folder: Path, new: dict[str, Any], *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Hold the folder of the search that ``new`` defines. Raises Refused or OSError, and leaves all as it was.

    The number of trials may differ from before: more of them go on where fewer ended.
    """
    from filelock import FileLock, Timeout

    def fill(path: Path) -> None:
        path.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise Refused(f"{folder}: another search is writing here; wait for it, or choose another --name") from None
    try:
        if (folder / DEFINITION).exists():
            if overwrite:
                shutil.rmtree(folder)
            elif resume:
                _compare(folder, new)
            else:
                raise Refused(
                    f"{folder}: holds a search already: --resume goes on with it, --overwrite starts again, --name gives "
                    "this one another folder"
                )
        elif folder.exists() and any(not path.name.startswith(dataset.STRAY) for path in folder.iterdir()):
            raise Refused(f"{folder}: exists and is no search: choose another --name")
        folder.mkdir(exist_ok=True)
        for stray in folder.glob(f"{dataset.STRAY}*"):
            stray.unlink()
        dataset.put(folder, folder / DEFINITION, fill)
        yield
    finally:
        lock.release()


def _compare(folder: Path, new: dict[str, Any]) -> None:
    path = folder / DEFINITION
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        found = differences(old | {"trials": new["trials"]}, json.loads(json.dumps(new)))
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError, KeyError) as error:
        raise Refused(f"{path}: damaged ({error}): --overwrite starts again") from None
    if found:
        lines = [f"  {line}" for line in found[:SHOWN]]
        lines += [f"  and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        raise Refused(
            "\n".join([f"{folder}: holds another search; since then, what it is has changed:", *lines])
            + "\nundo that to go on with it; --overwrite starts again, --name gives this one another folder"
        )


def keep(folder: Path, schema: pa.Schema, trial: Trial, rows: Table) -> None:
    """Write the part of a trial, marked with the identity of its run."""
    part = dataset.part(schema, trial.place.values, rows)
    dataset.write(folder, trial.index, part.replace_schema_metadata({"run": trial.run}))


def kept(folder: Path, schema: pa.Schema, trial: Trial) -> Table | None:
    """Return the rows of a trial, if its part is there, whole, and of the same run."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(dataset.place(folder, trial.index)) as file:
            found = file.read()
    except (OSError, pa.ArrowException):
        return None
    if not found.schema.equals(schema) or (found.schema.metadata or {}).get(b"run") != trial.run.encode():
        return None
    rows: Table = found.to_pydict()
    return {name: rows[name] for name in schema.names[len(trial.place.values) :]}


def write(front: Front, folder: Path) -> None:
    """Write ``trials.csv`` and ``pareto.csv``, and drop parts that are of no trial of this search."""
    ran = {trial.index for trial in front.tried if trial.rows is not None}
    for path in folder.glob("runs/point=*"):
        if int(path.name.partition("=")[2]) not in ran:
            shutil.rmtree(path)
    for name, trials in (("trials.csv", front.tried), ("pareto.csv", front.best_of_all)):
        _csv(folder, folder / name, front.rows(trials))


def _csv(folder: Path, target: Path, table: Table) -> None:
    def fill(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(table)
            for row in zip(*table.values(), strict=True):
                writer.writerow(["" if isinstance(v, float) and math.isnan(v) else v for v in row])

    dataset.put(folder, target, fill)
