"""Execute the notebooks of this folder anew, so that what is committed is what the code says.

    python -m analysis.notebooks [NAME ...] [--check]

Outputs are stored without times, paths and versions. ``--check`` writes nothing and compares the numbers and the words of
all texts and tables with the committed ones. Needs the ``notebook`` extra.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim.console import guarded

FOLDER = Path(__file__).resolve().parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
LANGUAGE = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python", "pygments_lexer": "ipython3"}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
TIMEOUT_S = 600


def notebooks() -> list[str]:
    """Return the names of the notebooks, without suffix."""
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(name: str) -> Any:
    """Return a notebook as committed. Raises FileNotFoundError."""
    import nbformat

    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def execute(notebook: Any) -> Any:
    """Return a copy of ``notebook`` with fresh outputs, normalised. Raises nbclient's CellExecutionError.

    It runs from the checkout's root, so that the project need not be installed.
    """
    import nbclient
    import nbformat

    fresh = nbformat.from_dict(notebook)
    where = {"metadata": {"path": str(FOLDER.parent)}}
    client = nbclient.NotebookClient(
        fresh, timeout=TIMEOUT_S, kernel_name="python3", resources=where, extra_arguments=["--log-level=ERROR"]
    )
    client.execute()
    return normalised(fresh)


def normalised(notebook: Any) -> Any:
    """Take out of ``notebook`` what differs from one execution or machine to the next, and number its cells."""
    notebook.metadata.clear()
    notebook.metadata.update(kernelspec=KERNEL, language_info=LANGUAGE)
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i:02d}", {}
        for out in cell.get("outputs", []):
            if "metadata" in out:
                out.metadata = {}
            for data in [out.get("data", {})]:
                data.pop("application/vnd.jupyter.widget-view+json", None)
    return notebook


def texts(notebook: Any) -> list[list[str]]:
    """Return what every code cell shows in words: streams, tables and sentences; pictures are left out."""
    shown = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            found = []
            for out in cell.outputs:
                data = out.get("data", {})
                found.append(out.get("text", "") if "text" in out else _words(data))
            shown.append(found)
    return shown


def _words(data: Any) -> str:
    """Return the one text among the forms of an output that carries its numbers."""
    if "image/png" in data or "image/svg+xml" in data:
        return ""
    return str(data.get("text/markdown") or data.get("text/plain", ""))


def numbers(notebook: Any) -> list[list[float]]:
    """Return the numbers of every code cell's texts, in order."""
    return [[float(number) for text in cell for number in NUMBER.findall(text)] for cell in texts(notebook)]


def words(notebook: Any) -> list[list[str]]:
    """Return the words of every code cell's texts, in order, with all numbers alike."""
    return [[word for text in cell for word in NUMBER.sub("#", text).split()] for cell in texts(notebook)]


def differences(committed: Any, fresh: Any) -> Iterator[str]:
    """Yield the cells whose numbers, or else words, differ between two executions."""
    both = zip(numbers(committed), numbers(fresh), words(committed), words(fresh), strict=True)
    for i, (old, new, old_words, new_words) in enumerate(both, start=1):
        if old != new:
            what = _first(old, new, "numbers")
        elif old_words != new_words:
            what = _first(old_words, new_words, "words")
        else:
            continue
        yield f"code cell {i}: {what}"


def _first(old: Sequence[Any], new: Sequence[Any], what: str) -> str:
    """Say where two lists first differ."""
    for a, b in zip(old, new, strict=False):
        if a != b:
            return f"{a if what == 'words' else f'{a:g}'} is committed, {b if what == 'words' else f'{b:g}'} comes out"
    return f"{len(old)} {what} became {len(new)}"


@dataclass(frozen=True, slots=True)
class Execution:
    """A notebook as committed and as executed now; ``fresh`` is None if a cell failed, which ``error`` names."""

    name: str
    committed: Any
    fresh: Any
    error: str
    seconds: float


def executed(names: Sequence[str], jobs: int | None = None) -> Iterator[Execution]:
    """Execute notebooks side by side, a kernel each, ``jobs`` at a time (default: one for each core), and yield them in
    the order of ``names``."""
    from nbclient.exceptions import CellExecutionError

    def one(name: str) -> Execution:
        start, committed, error, fresh = time.perf_counter(), read(name), "", None
        try:
            fresh = execute(committed)
        except CellExecutionError as failed:
            error = f"{failed.ename}: {failed.evalue}"
        return Execution(name, committed, fresh, error, time.perf_counter() - start)

    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        yield from pool.map(one, names)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m analysis.notebooks",
        description="Execute the notebooks of analysis/ in place.",
        epilog="exit status: 0 done, 1 a cell failed or --check found other numbers or words, 2 bad input, 130 interrupted",
    )
    p.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(notebooks())}; default: all")
    p.add_argument("--check", action="store_true", help="write nothing; compare with what is committed")
    p.add_argument("--jobs", type=int, help="kernels at a time (default: one for each core)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return guarded("python -m analysis.notebooks", lambda: _main(args), "interrupted")


def _main(args: argparse.Namespace) -> int:
    unknown = [name for name in args.names if name not in notebooks()]
    if unknown:
        raise ValueError(f"NAME must be one of {', '.join(notebooks())} [got {unknown[0]!r}]")
    status = 0
    for run in executed(args.names or notebooks(), args.jobs):
        problems = [run.error] if run.error else list(differences(run.committed, run.fresh)) if args.check else []
        print(f"{run.name}: {run.seconds:.1f} s")
        for problem in problems:
            print(f"{run.name}: {problem}", file=sys.stderr)
            status = 1
        if not (problems or args.check):
            _write(run.name, run.fresh)
    return status


def _write(name: str, notebook: Any) -> None:
    import nbformat

    path = FOLDER / f"{name}.ipynb"
    part = path.with_suffix(".part")
    part.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
