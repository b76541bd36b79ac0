"""Layouts of measured MoE tables, one module each: ``NAME``, ``COLUMNS`` that tell it, and ``read(table)``.

A module of this folder is registered by being here. ``read`` returns one `sim.calibration.moe.Rows` per kernel and
number format.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pandas as pd

from sim.calibration.moe import Rows


def layouts() -> dict[str, Any]:
    """Return the modules of this folder by name."""
    found = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    return {module.NAME: module for module in sorted(found, key=lambda module: str(module.NAME))}


def read(path: str) -> tuple[str, list[Rows]]:
    """Return the layout's name and the rows of the table at ``path`` (.parquet, .csv, .csv.gz).

    ValueError: not such a file, a layout that no module knows, or nothing left of it.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        table = pd.read_parquet(file) if file.suffix == ".parquet" else pd.read_csv(file)
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a parquet or CSV table ({str(error).splitlines()[0]})") from None
    for name, module in layouts().items():
        if set(table.columns) >= module.COLUMNS:
            rows = module.read(table)
            if not any(len(r.frame) for r in rows):
                reasons = sorted({reason for r in rows for reason, _ in r.dropped})
                raise ValueError(f"{path}: nothing to fit in this {name} table ({'; '.join(reasons) or 'no rows'})")
            return name, rows
    known = "; ".join(f"{name}: {', '.join(sorted(module.COLUMNS))}" for name, module in layouts().items())
    raise ValueError(f"{path}: no known layout; it has {', '.join(map(str, table.columns[:20]))}. Known: {known}")
