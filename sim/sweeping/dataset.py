"""The data set of a sweep: one parquet file for each point, hive-partitioned, all of one schema.

``runs/point=00007/part.parquet`` holds a row per policy and replica of point 7: the values of the axes in columns named
by their keys, then ``policy``, ``replica`` and the metrics in SI units.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sim.results import Table

if TYPE_CHECKING:
    import pyarrow as pa


def schema(axes: Mapping[str, Sequence[Any]], metrics: Sequence[str]) -> pa.Schema:
    """Return the schema of every part. axes: all values of each."""
    import pyarrow as pa

    fields = [(key, _type(values)) for key, values in axes.items()]
    fields += [("policy", pa.string()), ("replica", pa.int64())]
    return pa.schema(fields + [(name, pa.float64()) for name in metrics])


def _type(values: Sequence[Any]) -> Any:
    import pyarrow as pa

    known = [value for value in values if value is not None]
    if known and all(isinstance(value, bool) for value in known):
        return pa.bool_()
    if known and all(isinstance(value, int) and not isinstance(value, bool) for value in known):
        return pa.int64() if all(value < 2**63 for value in known) else pa.float64()
    if known and all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        return pa.float64()
    return pa.string()


def part(schema: pa.Schema, values: Sequence[Any], rows: Table) -> pa.Table:
    """Return the table of one point. Values that are no numbers and no text are JSON."""
    import pyarrow as pa

    columns: dict[str, Any] = {}
    for field, value in zip(schema, values, strict=False):
        if pa.types.is_string(field.type) and value is not None and not isinstance(value, str):
            value = json.dumps(value)
        columns[field.name] = [value] * len(rows["policy"])
    return pa.table(columns | {name: rows[name] for name in schema.names[len(values) :]}, schema=schema)


def place(folder: Path, point: int) -> Path:
    return folder / "runs" / f"point={point:05d}" / "part.parquet"


def write(folder: Path, point: int, table: pa.Table) -> None:
    """Write a part whole or not at all."""
    import pyarrow.parquet as pq

    def fill(path: Path) -> None:
        pq.write_table(table, path, compression="zstd", write_page_checksum=True)

    put(folder, place(folder, point), fill)


def put(folder: Path, target: Path, fill: Callable[[Path], None]) -> None:
    """Give ``fill`` a file in ``folder`` to write, and then the name ``target``."""
    work = folder / f"{STRAY}{os.getpid()}"
    fill(work)
    with work.open("rb+") as file:
        os.fsync(file.fileno())
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(work, target)


STRAY = ".part."
"""How files begin that were being written."""


def done(folder: Path, point: int, schema: pa.Schema, rows: int) -> bool:
    """Whether the point's part is there, whole, and what it should be."""
    import pyarrow as pa

    try:
        found = read_part(folder, point)
    except (OSError, pa.ArrowException):
        return False
    return len(found) == rows and bool(found.schema.equals(schema))


def read_part(folder: Path, point: int) -> pa.Table:
    """Return a part, all pages of it checked. Raises OSError and ArrowException."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(place(folder, point), page_checksum_verification=True) as file:
        return file.read()


def read(folder: Path, points: Sequence[int], schema: pa.Schema) -> pa.Table:
    """Return the parts of ``points`` that are there; see `joined`. Raises ValueError for a damaged one."""
    import pyarrow as pa

    found: dict[int, pa.Table] = {}
    for point in points:
        path = place(folder, point)
        try:
            found[point] = read_part(folder, point)
        except FileNotFoundError:
            continue
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{path}: damaged: {error}") from None
        if not found[point].schema.equals(schema):
            raise ValueError(f"{path}: is no part of this sweep")
    return joined(schema, found)


def joined(schema: pa.Schema, parts: dict[int, pa.Table]) -> pa.Table:
    """Return parts one below the other, with a leading column ``point``."""
    import pyarrow as pa

    whole: pa.Table = pa.concat_tables([schema.empty_table(), *parts.values()])
    numbers = [point for point, table in parts.items() for _ in range(len(table))]
    return whole.add_column(0, "point", pa.array(numbers, pa.int64()))
