"""Lines and JSON of files that may be hostile: bounded in bytes, lines and nesting before they are parsed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from sim.tokens import I64

MAX_FILE_BYTES = 2 * 2**30
MAX_LINE_BYTES = 256 * 2**20
MAX_LINES = 2_000_000
MAX_DEPTH = 16


def lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line) of every line that is not blank. Raises ValueError past a limit."""
    try:
        size = os.path.getsize(path)
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{path}: expected at most {MAX_FILE_BYTES} bytes, found {size}")
        with open(path, "rb") as file:
            for number in range(1, MAX_LINES + 2):
                line = file.readline(MAX_LINE_BYTES + 1)
                if not line:
                    return
                if number > MAX_LINES:
                    raise ValueError(f"{path}: expected at most {MAX_LINES} lines, found more")
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"{path}: line {number}: expected at most {MAX_LINE_BYTES} bytes, found more")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise ValueError(f"{path}: expected a readable file, found {error.strerror or error}") from None


def parse_object(where: str, text: bytes) -> dict[str, Any]:
    """Return the JSON object in ``text``; raises ValueError for anything else. ``where`` begins the message."""
    depth = deepest = 0
    for byte in text.translate(None, _NOT_BRACKETS):  # brackets in strings only make the bound stricter
        depth += 1 if byte in b"[{" else -1
        deepest = max(deepest, depth)
        if deepest > MAX_DEPTH:
            raise ValueError(f"{where}: expected at most {MAX_DEPTH} levels of nesting, found more")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected JSON, found {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


def integers(where: str, value: Any, ndim: int) -> I64:
    """Return nested lists of integers as an array of ``ndim`` dimensions; raises ValueError for anything else."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{where}: expected {ndim}-dimensional lists of integers, found ragged lists") from None
    if array.ndim != ndim or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"{where}: expected {ndim}-dimensional lists of integers, found shape {array.shape} of {array.dtype}"
        )
    if array.dtype == np.uint64:
        raise ValueError(f"{where}: expected 64-bit integers, found {int(array.max())}")
    return array.astype(np.int64)


def integer(where: str, value: Any) -> int:
    """Return ``value`` if it is a whole number; raises ValueError otherwise."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{where}: expected an integer, found {str(value)[:40]!r}")
    return value
