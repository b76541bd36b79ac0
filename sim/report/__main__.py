"""``python -m sim.report RUN``: the page of a stored run, or the differences between several.

Argument parsing and messages; the pages are made in `sim.report.html` and `sim.report.differences`.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sim.console import guarded


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m sim.report",
        description="Write a stored run as one self-contained HTML page, or compare stored runs.",
        epilog="exit status: 0 done, 1 internal error, 2 bad input, 130 interrupted",
    )
    p.add_argument(
        "runs", nargs="+", metavar="RUN", help="results/<scenario>/<run>, or results/<scenario> for its newest run"
    )
    p.add_argument(
        "--compare",
        action="store_true",
        help="print how the other runs differ from the first, and write a page of it with --out",
    )
    p.add_argument(
        "--out",
        metavar="FILE.html",
        help="the page to write (default: report.html in the run's folder; with --compare none)",
    )
    return p  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from sim.yamlfile import ScenarioError

    bad = (OSError, ValueError, ScenarioError)
    return guarded("python -m sim.report", lambda: _main(args), "interrupted; no page was left half-written", bad)


def _main(args: argparse.Namespace) -> int:
    from sim.store import check_target

    if args.compare and len(args.runs) < 2:
        raise ValueError("--compare needs at least two runs")
    if args.out and len(args.runs) > 1 and not args.compare:
        raise ValueError(
            f"--out names one page, and there are {len(args.runs)} runs; without it each page goes to its run"
        )
    if args.out:
        if not Path(args.out).absolute().parent.is_dir():
            raise ValueError(f"--out {args.out}: there is no folder {Path(args.out).parent}")
        check_target(Path(args.out))
    folders = [found(run) for run in args.runs]
    return _compare(folders, args.out) if args.compare else _pages(folders, args.out)


def found(run: str) -> Path:
    """Return the folder of a run. Of the runs of a scenario it is the one written last, and says so on stderr. Raises
    FileNotFoundError where there is none."""
    path = Path(run)
    if (path / "manifest.json").is_file():
        return path
    if not path.is_dir():
        siblings = [p.name for p in path.absolute().parent.iterdir()] if path.absolute().parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, 1)
        raise FileNotFoundError(f"{run}: no such folder" + (f" (did you mean {near[0]}?)" if near else ""))
    inside = [p.parent for p in path.glob("*/manifest.json") if not p.parent.name.startswith(".")]
    if not inside:
        raise FileNotFoundError(f"{run}: no run is stored here (neither {run}/manifest.json nor {run}/*/manifest.json)")
    newest = max(inside, key=lambda folder: ((folder / "manifest.json").stat().st_mtime_ns, folder.name))
    if len(inside) > 1:
        print(f"{run}: {len(inside)} runs; taking the one written last, {newest.name}", file=sys.stderr)
    return newest


def _read(folder: Path) -> tuple[Any, dict[str, str]]:
    from sim.store import gone, manifest_of, read

    result = read(folder)
    for line in gone(result):
        print(f"{folder}: {line}; what is stored of it still is", file=sys.stderr)
    return result, manifest_of(folder)["versions"]


def _pages(folders: Sequence[Path], out: str | None) -> int:
    from sim.report.html import page
    from sim.store import add, replace

    for folder in folders:
        result, versions = _read(folder)
        content = page(result, made_with=versions).encode()
        if out:
            replace(Path(out), content)
        else:
            add(folder, {"report.html": content})
        print(out or folder / "report.html")
    return 0


def distinct(folders: Sequence[Path]) -> list[str]:
    """Return a name for each run: the last two parts of its path, or as many more as it takes to tell runs of the same name
    apart. Raises ValueError for a run that is there twice."""
    paths = [folder.resolve() for folder in folders]
    if twice := next((path for i, path in enumerate(paths) if path in paths[:i]), None):
        raise ValueError(f"{'/'.join(twice.parts[-2:])} is given twice: a run does not differ from itself")

    def name(path: Path) -> str:
        alike = [other.parts for other in paths if other.parts[-2:] == path.parts[-2:]]
        n = next(
            n for n in range(2, len(path.parts) + 1) if [parts[-n:] for parts in alike].count(path.parts[-n:]) == 1
        )
        return "/".join(path.parts[-n:])

    return [name(path) for path in paths]


def _compare(folders: Sequence[Path], out: str | None) -> int:
    from sim.report.differences import compared, page, text
    from sim.store import replace

    names = distinct(folders)
    read = [_read(folder) for folder in folders]
    difference = compared({name: result for name, (result, _) in zip(names, read, strict=True)}, [v for _, v in read])
    if out:
        replace(Path(out), page(difference, names).encode())
    print(text(difference, names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
