"""Rows of published against ours in words and tables, computed here or read from what ``python -m sim.validate`` printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
from IPython.display import Markdown

from sim.validation import Figure, groups

Rows = Sequence[tuple[str, Figure]]


def stored_rows(path: str | Path) -> list[tuple[str, Figure]]:
    """Return the (group, row) pairs of a file that ``python -m sim.validate --json`` printed.

    Raises FileNotFoundError, and ValueError for a file of something else.
    """
    names = [field.name for field in fields(Figure)]
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        return [(row["group"], Figure(**{name: row[name] for name in names})) for row in found]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not what `python -m sim.validate --json` prints ({error!r})") from None


def coverage(rows: Rows) -> Markdown:
    """Say how many rows of which groups there are, how many predictions are met, and which groups are not here."""
    here = list(dict.fromkeys(group for group, _ in rows))
    absent = [name for name in groups() if name not in here]
    predictions = [row for _, row in rows if row.kind == "prediction"]
    text = (
        f"{len(rows)} rows of {len(here)} groups: {sum(row.passed for row in predictions)} of {len(predictions)} "
        f"predictions are within their bars; {sum(row.kind == 'calibration' for _, row in rows)} calibration rows, "
        f"{sum(row.kind == 'derived' for _, row in rows)} derived."
    )
    return Markdown(text + (f" Not here: {', '.join(absent)}." if absent else ""))


def by_group(rows: Rows) -> pd.DataFrame:
    """Return a row per group: how many predictions it has, how many are met, and their median and largest errors [%] where
    they are relative."""
    table = {}
    for group in dict.fromkeys(group for group, _ in rows):
        mine = [row for name, row in rows if name == group and row.kind == "prediction"]
        errors = [
            100 * abs(row.error) for row in mine if row.relation == "equal" and not row.absolute and row.published
        ]
        table[group] = {
            "predictions": len(mine),
            "met": sum(row.passed for row in mine),
            "median error [%]": round(float(np.median(errors)), 2) if errors else np.nan,
            "largest error [%]": round(max(errors), 2) if errors else np.nan,
        }
    return pd.DataFrame.from_dict(table, orient="index")


def rows_table(rows: Rows) -> Markdown:
    """Show the rows as a table, errors and bars in percent or, for absolute ones, in the row's unit; bounds have no error."""
    sign = {"equal": "", "at_most": "at most ", "at_least": "at least "}
    lines = ["| figure | published | ours | error | bar | kind | source | note |", "|---|---|---|---|---|---|---|---|"]
    for group, row in rows:
        percent = not row.absolute and row.published
        cells = (
            f"{group}: {row.name}",
            f"{sign[row.relation]}{row.published:.6g} {row.unit}".rstrip(),
            f"{row.ours:.6g}",
            "-" if row.relation != "equal" else f"{100 * row.error:+.2f} %" if percent else f"{row.error:+.2g}",
            f"{100 * row.bar:g} %" if percent else f"{row.bar:g}",
            row.kind if row.passed else f"{row.kind}, missed",
            row.source,
            row.reason,
        )
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return Markdown("\n".join(lines))
