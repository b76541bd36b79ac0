"""The folder of a sweep: who may write it, and what is already there."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from sim.store import check_writable
from sim.sweeping import dataset
from sim.sweeping.manifest import FORMAT, definition, differences
from sim.sweeping.points import Plan

SHOWN = 20  # differences


class Refused(Exception):
    """A folder that is in use, or holds another sweep; the text says what to do."""


def named(out: str | os.PathLike[str], scenario: str, name: str) -> Path:
    """Return the folder that ``--name`` stands for. Raises ValueError for a name that is none, and OSError where ``out`` can
    not be a folder of results."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,59}", name):
        raise ValueError(f"--name {name}: must be letters, digits, '_', '-' and '.', and start with a letter or digit")
    check_writable(out)
    return Path(out) / scenario / name


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Keep others from the folder of a ``what``, sweep or search. Raises Refused where it is in use."""
    from filelock import FileLock, Timeout

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise Refused(f"{folder}: another {what} is writing here; wait for it, or choose another --name") from None
    try:
        for stray in folder.parent.glob(f".{folder.name}.old.*"):  # of an --overwrite that was killed
            shutil.rmtree(stray, ignore_errors=True)
        yield
    finally:
        lock.release()


def remove(folder: Path) -> None:
    """Remove a folder, whole from the first moment on."""
    aside = folder.parent / f".{folder.name}.old.{os.getpid()}"
    os.replace(folder, aside)
    shutil.rmtree(aside)


def changed(folder: Path, what: str, found: Sequence[str]) -> Refused:
    """Return the refusal to go on with a ``what`` whose definition differs in ``found``."""
    lines = [f"  {line}" for line in found[:SHOWN]]
    lines += [f"  and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return Refused(
        "\n".join([f"{folder}: holds another {what}; since then, what it is has changed:", *lines])
        + "\nundo that to go on with it; --overwrite starts again, --name gives this one another folder"
    )


@contextmanager
def ready(
    folder: Path,
    what: str,
    definition: str,
    *,
    resume: bool,
    overwrite: bool,
    compare: Callable[[], None],
    far: Callable[[], str],
    write: Callable[[], None],
) -> Iterator[Callable[[], None]]:
    """Hold the folder of a ``what``, and give a function that makes it ready for its parts: until then it is as it was.
    Raises Refused or OSError.

    definition: the file that says what the folder holds. compare: refuses to go on with another one. far: how far the one
    that is there has come. write: writes ``definition``.
    """
    with held(folder, what):
        if (folder / definition).exists():
            if resume:
                compare()
            elif not overwrite:
                raise Refused(
                    f"{folder}: holds a {what} already{far()}: --resume goes on with it, --overwrite starts again, --name "
                    "gives this one another folder"
                )
        elif folder.exists() and any(not path.name.startswith(dataset.STRAY) for path in folder.iterdir()):
            raise Refused(f"{folder}: exists and is no {what}: choose another --name")

        def begin() -> None:
            if overwrite and folder.exists():
                remove(folder)
            folder.mkdir(exist_ok=True)
            for stray in folder.glob(f"{dataset.STRAY}*"):
                stray.unlink()
            write()

        yield begin


def opened(plan: Plan, folder: Path, *, resume: bool, overwrite: bool) -> AbstractContextManager[Callable[[], None]]:
    """The folder of a sweep; see `ready`."""
    new = definition(plan)

    def far() -> str:
        parts = sum(1 for _ in folder.glob("runs/*/part.parquet"))
        return f" ({parts} of {len(read_definition(folder)['runs'])} points done)"

    return ready(
        folder,
        "sweep",
        "sweep.json",
        resume=resume,
        overwrite=overwrite,
        compare=lambda: _compare(folder, new),
        far=far,
        write=lambda: _write(plan, folder, new),
    )


def _write(plan: Plan, folder: Path, new: dict[str, Any]) -> None:
    """Write what is not there yet of the definition and the list of skipped points."""
    skipped = [point for point in plan.points if point.skipped]

    def fill_skipped(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["point", *(axis.key for axis in plan.axes), "reason"])
            writer.writerows([point.index, *point.values, point.skipped] for point in skipped)

    def fill(path: Path) -> None:
        path.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")

    # The definition first: it makes the folder a sweep's, whatever else a kill leaves out.
    if not (folder / "sweep.json").exists():
        dataset.put(folder, folder / "sweep.json", fill)
    if skipped and not (folder / "skipped.csv").exists():
        dataset.put(folder, folder / "skipped.csv", fill_skipped)


def _compare(folder: Path, new: dict[str, Any]) -> None:
    found = differences(read_definition(folder), json.loads(json.dumps(new)))
    if found:
        raise changed(folder, "sweep", found)


def read_definition(folder: Path) -> dict[str, Any]:
    """Return what ``sweep.json`` says. Raises FileNotFoundError, and ValueError for a damaged one or that of another
    version."""
    path = folder / "sweep.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: damaged: {error}") from None
    if not isinstance(data, dict) or "runs" not in data:
        raise ValueError(f"{path}: is no sweep")
    if data.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{folder}: was written by another version of gatesim: choose another --name")
    if wrong := [key for key in _KINDS if not _sound(data, key)]:
        raise ValueError(f"{path}: damaged: {', '.join(wrong)}: missing or not what it should be")
    return data


_KINDS = {"scenario": dict, "traces": dict, "axes": dict, "metrics": list, "policies": list, "runs": list}


def _sound(data: dict[str, Any], key: str) -> bool:
    """Whether a part of a definition has the form that it should have."""
    value = data.get(key)
    if key != "runs":
        return isinstance(value, _KINDS[key])
    axes = data["axes"] if isinstance(data.get("axes"), dict) else {}
    return isinstance(value, list) and all(
        isinstance(run, dict)
        and isinstance(run.get("point"), int)
        and isinstance(run.get("values"), dict)
        and run["values"].keys() == axes.keys()
        for run in value
    )
