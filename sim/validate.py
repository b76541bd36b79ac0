"""``python -m sim.validate``: every figure the project claims to reproduce, beside ours, with the error.

Argument parsing and messages; the rows are in `sim.validation`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from sim.console import guarded


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m sim.validate",
        description="Recompute published and measured figures and print the errors.",
        epilog="exit status: 0 done (misses included: they are in the table), 1 internal error, 2 bad input, 130 interrupted",
    )
    p.add_argument("--group", action="append", metavar="NAME", help="only this group (repeatable); see --list")
    p.add_argument("--data", metavar="DIR", help="folder of recorded traces; rows that need it are left out without it")
    p.add_argument("--json", action="store_true", help="print the rows as JSON instead of the table")
    p.add_argument("--list", action="store_true", help="print the names of the groups and stop")
    p.add_argument("--quiet", action="store_true", help="no progress")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return guarded("python -m sim.validate", lambda: _main(args), "interrupted")


def _main(args: argparse.Namespace) -> int:
    from pathlib import Path

    from sim.validation import Inputs, groups

    known = groups()
    if args.list:
        print("\n".join(known))
        return 0
    unknown = [name for name in args.group or () if name not in known]
    if unknown:
        raise ValueError(f"--group must be one of {', '.join(known)} [got {unknown[0]!r}]")
    scenarios = Path(__file__).resolve().parents[1] / "scenarios"
    if not scenarios.is_dir():
        raise ValueError("the scenarios folder is not beside the sim package: run this in a checkout of the project")
    data = None if args.data is None else Path(args.data)
    if data is not None and not data.is_dir():
        raise ValueError(f"--data: {args.data} is no folder")
    inputs, rows = Inputs(scenarios, data), []
    chosen = [name for name in known if not args.group or name in args.group]
    for name in chosen:
        if not args.quiet and sys.stderr.isatty():
            print(f"{name} ...", file=sys.stderr)
        rows += [(name, figure) for figure in known[name](inputs)]
    if args.json:
        print(json.dumps([_data(name, figure) for name, figure in rows], indent=1))
    else:
        print(_table(rows))
    return 0


def _data(group: str, figure: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {"group": group} | asdict(figure) | {"error": figure.error, "passed": figure.passed}


def _table(rows: Sequence[tuple[str, Any]]) -> str:
    from sim.aligned import grid

    lines = []
    for group, figure in rows:
        unit = f" {figure.unit}" if figure.unit else ""
        # The bound of an error is its bar; there is no published value.
        bound = figure.bar if figure.relation == "at_most" and figure.published == 0 else figure.published
        sign = {"equal": "", "at_most": "<= ", "at_least": ">= "}[figure.relation]
        error = f"{figure.error:+.3g}" if figure.absolute else f"{100 * figure.error:+.2f} %"
        bar = f"{figure.bar:g}" if figure.absolute else f"{100 * figure.bar:g} %"
        lines.append(
            [
                f"{group}: {figure.name}",
                f"{sign}{bound:.6g}{unit}",
                f"{figure.ours:.6g}",
                error if figure.relation == "equal" and not math.isnan(figure.ours) else "-",
                bar if figure.relation == "equal" or figure.bar else "-",
                "ok" if figure.passed and figure.kind == "prediction" else figure.kind if figure.passed else "MISS",
            ]
        )
    text = grid(["figure", "published", "ours", "error", "bar", ""], lines)
    notes = [f"{group}: {figure.name}: {figure.reason}" for group, figure in rows if figure.reason]
    predictions = [figure for _, figure in rows if figure.kind == "prediction"]
    met = sum(figure.passed for figure in predictions)
    text += ["", *notes] if notes else []
    fitted = sum(figure.kind == "calibration" for _, figure in rows)
    derived = sum(figure.kind == "derived" for _, figure in rows)
    summary = f"{met} of {len(predictions)} predictions within their bars; {fitted} calibration rows"
    return "\n".join([*text, "", summary + (f"; {derived} derived" if derived else "")])


if __name__ == "__main__":
    sys.exit(main())
