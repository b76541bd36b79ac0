"""The folder of a search: parts as a sweep has them, what it is (``optimize.json``) and what came out (two CSV tables).

The same search has the same bytes, broken off or not: no times, no hosts, and every part at the number of its trial.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sim.optimizing.front import Front
from sim.optimizing.search import Trial
from sim.results import Table
from sim.store import write_csv
from sim.sweeping import dataset
from sim.sweeping.folder import Refused, changed, ready
from sim.sweeping.manifest import differences

if TYPE_CHECKING:
    import pyarrow as pa

DEFINITION = "optimize.json"


def opened(
    folder: Path, new: dict[str, Any], *, resume: bool, overwrite: bool
) -> AbstractContextManager[Callable[[], None]]:
    """The folder of the search that ``new`` defines; see `sim.sweeping.folder.ready`.

    The number of trials may differ from before: more of them go on where fewer ended; fewer than have run are refused.
    """

    def fill(path: Path) -> None:
        path.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")

    return ready(
        folder,
        "search",
        DEFINITION,
        resume=resume,
        overwrite=overwrite,
        compare=lambda: _compare(folder, new),
        far=lambda: "",
        write=lambda: dataset.put(folder, folder / DEFINITION, fill),
    )


def _compare(folder: Path, new: dict[str, Any]) -> None:
    path = folder / DEFINITION
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        found = differences(old | {"trials": new["trials"]}, json.loads(json.dumps(new)))
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError, KeyError) as error:
        raise Refused(f"{path}: damaged ({error}): --overwrite starts again") from None
    if found:
        raise changed(folder, "search", found)
    there = len(_parts(folder))
    if there > new["trials"]:
        raise Refused(
            f"{folder}: has {there} runs, more than --trials {new['trials']}: going on with it would delete some; ask for at "
            f"least {there}, or --overwrite starts again"
        )


def _parts(folder: Path) -> dict[int, Path]:
    """Folders of parts by the number of their trial; others are none of ours."""
    found = {path: re.fullmatch(r"point=(\d+)", path.name) for path in folder.glob("runs/point=*") if path.is_dir()}
    return {int(match[1]): path for path, match in found.items() if match}


def keep(folder: Path, schema: pa.Schema, trial: Trial, rows: Table) -> None:
    """Write the part of a trial, marked with the identity of its run."""
    part = dataset.part(schema, trial.place.values, rows)
    dataset.write(folder, trial.index, part.replace_schema_metadata({"run": trial.run}))


def kept(folder: Path, schema: pa.Schema, trial: Trial) -> Table | None:
    """Return the rows of a trial, if its part is there, whole, and of the same run."""
    import pyarrow as pa

    try:
        found = dataset.read_part(folder, trial.index)
    except (OSError, pa.ArrowException):
        return None
    if not found.schema.equals(schema) or (found.schema.metadata or {}).get(b"run") != trial.run.encode():
        return None
    rows: Table = found.to_pydict()
    return {name: rows[name] for name in schema.names[len(trial.place.values) :]}


def write(front: Front, folder: Path) -> None:
    """Write ``trials.csv`` and ``pareto.csv``, and drop parts that are of no trial of this search."""
    ran = {trial.index for trial in front.tried if trial.rows is not None}
    for index, path in _parts(folder).items():
        if index not in ran:
            shutil.rmtree(path)
    for name, trials in (("trials.csv", front.tried), ("pareto.csv", front.best_of_all)):
        _csv(folder, folder / name, front.rows(trials))


def _csv(folder: Path, target: Path, table: Table) -> None:
    dataset.put(folder, target, lambda path: write_csv(path, table))
