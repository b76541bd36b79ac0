"""Tables of requests in files of the user, plain or gzip: bounded, checked, every problem one line with its place."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from sim.requests._lengths import MAX_TOKENS
from sim.tokens import F64, I64, Bool
from sim.traces.textfile import MAX_FILE_BYTES, MAX_LINES, parse_object

if TYPE_CHECKING:
    import pandas as pd

Column = Literal["number", "tokens", "index", "text"]
"""``number``: finite float64. ``tokens``: int64 from 1. ``index``: int64 from 0. ``text``: as it stands."""
_LEAST = {"tokens": 1, "index": 0}


def content(path: str) -> bytes:
    """Return what is in the file, unpacked if it is gzip. Raises ValueError past a limit or if it cannot be read."""
    if not os.path.isfile(path):  # before opening: a pipe or a device would block
        raise ValueError(f"{path}: expected a file, found {'something else' if os.path.exists(path) else 'none'}")
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else open(path, "rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a readable file, found {str(error)[:80]}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_FILE_BYTES} bytes, found more")
    return data


def header(path: str, data: bytes) -> list[str]:
    """Return the names in the first line of a csv file."""
    first = data[:10_000].removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)[0]
    return [name.strip() for name in first.decode("utf-8", "replace").split(",")]


def table(path: str, data: bytes, columns: Mapping[str, Column]) -> dict[str, npt.NDArray[Any]]:
    """Return the named columns [n] of a csv file with a header; others are left out.

    Raises ValueError naming the line and column that is missing or wrong.
    """
    names = header(path, data)
    missing = [name for name in columns if names.count(name) != 1]
    if missing:
        raise ValueError(
            f"{path}: line 1: expected one column each of {', '.join(columns)}, found {', '.join(names)[:120]}"
        )
    data = data.rstrip() + b"\n"
    if data.count(b",") != data.count(b"\n") * (len(names) - 1):
        for row, line in enumerate(data.split(b"\n")[:-1], start=1):
            if line.count(b",") != len(names) - 1:
                raise ValueError(
                    f"{path}: line {row}: expected {len(names)} columns, found {line.count(b',') + 1}: "
                    f"{line[:40].decode('utf-8', 'replace').strip() or 'a blank line'}"
                )
    frame = _parsed(data, names, columns)
    if not len(frame):
        raise ValueError(f"{path}: expected lines of {', '.join(columns)}, found none")
    return {name: _column(path, name, kind, frame[name]) for name, kind in columns.items()}


def _parsed(data: bytes, names: list[str], columns: Mapping[str, Column]) -> pd.DataFrame:
    import pandas as pd  # a third of a second that only recorded requests have to wait for

    def parse(numbers: type) -> pd.DataFrame:
        return pd.read_csv(
            io.BytesIO(data),
            header=0,
            names=names,
            usecols=list(columns),
            dtype={name: str if kind == "text" else numbers for name, kind in columns.items()},
            quoting=3,  # no quotes: a row is a line
            skip_blank_lines=False,
            encoding_errors="replace",
        )

    try:
        return parse(np.float64)
    except (ValueError, OverflowError):
        return parse(str)  # `_column` finds the line


def _column(path: str, name: str, kind: Column, found: pd.Series[Any]) -> npt.NDArray[Any]:
    import pandas as pd

    text = found.to_numpy()
    if kind == "text":
        refuse_first(path, name, found.isna().to_numpy(), text, "text")
        return text
    numbers: F64 = np.asarray(pd.to_numeric(found, errors="coerce"), dtype=np.float64)
    if kind == "number":
        refuse_first(path, name, ~np.isfinite(numbers), text, "a number")
        return numbers
    least = _LEAST[kind]
    with np.errstate(invalid="ignore"):
        bad = ~((numbers >= least) & (numbers <= MAX_TOKENS) & (numbers == np.rint(numbers)))
    refuse_first(path, name, bad, text, f"a whole number from {least}")
    return numbers.astype(np.int64)


def refuse_first(path: str, name: str, bad: Bool, found: npt.NDArray[Any], expected: str) -> None:
    """Raise ValueError at the first line of a table for which ``bad`` [n] holds."""
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"{path}: line {row + 2}: {name}: expected {expected}, found {_short(found[row])}")


def _short(value: Any) -> str:
    if value is None or value != value:
        return "nothing"
    return f"{value:g}" if isinstance(value, float) else str(value)[:40]


def objects(path: str, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, object) of every line of JSON that is not blank. Raises ValueError at a line that is none."""
    start = 0
    for number in range(1, MAX_LINES + 2):
        if start >= len(data):
            return
        if number > MAX_LINES:
            raise ValueError(f"{path}: expected at most {MAX_LINES} lines, found more")
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        line, start = data[start:end], end + 1
        if line.strip():
            yield f"{path}: line {number}", parse_object(f"{path}: line {number}", line)


def number(where: str, record: Mapping[str, Any], name: str) -> float:
    """Return the finite number called ``name``; raises ValueError if there is none."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e18:
        raise ValueError(f"{where}: {name}: expected a number, found {_short(value)}")
    return float(value)


def tokens(where: str, record: Mapping[str, Any], name: str) -> int:
    """Return the count called ``name``; raises ValueError if it is no whole number from 1."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_TOKENS:
        raise ValueError(f"{where}: {name}: expected a whole number from 1, found {_short(value)}")
    return value


def renumbered(ids: I64) -> I64:
    """Return ``ids`` [n] with its distinct numbers replaced by 0, 1, ... in order of appearance."""
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    place = np.argsort(np.argsort(first, kind="stable"), kind="stable")
    return place[inverse].astype(np.int64)
