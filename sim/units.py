"""Units at the edges: text such as ``"50 GB/s"`` becomes a plain SI number; inside, names carry the unit.

Knows nothing about models or devices. Decimal prefixes are powers of 1000, ``Ki/Mi/Gi/Ti`` powers of 1024.
Simulated time is integer picoseconds (int64 holds about 106 days), so that equal times are exactly equal.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field

PS_PER_S = 10**12

_PREFIX = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15} | {
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
    "Ti": 2.0**40,
}
_TIME = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "ps": 1e-12}
_QUANTITY = re.compile(r"^\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([^\s\d].*?)\s*$")


def _scale(unit: str, dimension: str) -> float | None:
    if dimension == "s":
        return _TIME.get(unit)
    base = {"B": "B", "B/s": "B/s", "FLOP/s": "FLOP/s"}[dimension]
    spellings = (base, "FLOPS") if base == "FLOP/s" else (base,)
    for spelling in spellings:
        if unit.endswith(spelling):
            return _PREFIX.get(unit[: -len(spelling)])
    return None


def parse(value: Any, dimension: str) -> Any:
    """Return ``value`` as an SI float if it is text with a unit of ``dimension``; other values pass unchanged.

    ``dimension`` is one of ``"s"``, ``"B"``, ``"B/s"``, ``"FLOP/s"``. Raises ValueError naming the accepted units.

    >>> parse("50 GB/s", "B/s"), parse("80 GiB", "B"), parse("2.8 us", "s")
    (50000000000.0, 85899345920.0, 2.8e-06)
    """
    if not isinstance(value, str):
        return value
    match = _QUANTITY.match(value)
    scale = _scale(match[2], dimension) if match else None
    if match is None or scale is None:
        example = {"s": "2.8 us", "B": "80 GB", "B/s": "50 GB/s", "FLOP/s": "989 TFLOP/s"}[dimension]
        raise ValueError(f"not a quantity in {dimension}: write a number (SI) or text such as '{example}'")
    return float(match[1]) * scale


def _quantity(dimension: str) -> BeforeValidator:
    return BeforeValidator(lambda value: parse(value, dimension), json_schema_input_type=float | str)


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False), _quantity("s")]
Span = Annotated[Seconds, Field(le=9e6)]
"""Seconds of simulated time: int64 picoseconds end at 106 days."""
Bytes = Annotated[float, Field(gt=0, allow_inf_nan=False), _quantity("B")]
BytesPerSecond = Annotated[float, Field(gt=0, allow_inf_nan=False), _quantity("B/s")]
FlopsPerSecond = Annotated[float, Field(gt=0, allow_inf_nan=False), _quantity("FLOP/s")]


def to_ps(seconds: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Round seconds (any shape) to integer picoseconds (int64), halves to even."""
    return np.rint(np.asarray(seconds, dtype=np.float64) * PS_PER_S).astype(np.int64)


def human(value: float, unit: str) -> str:
    """Short text for people: ``human(5.3e10, "B/s") == "53.0 GB/s"``."""
    if not math.isfinite(value):
        return f"{value} {unit}"
    if unit == "s":
        for name, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)):
            if abs(value) >= scale:
                return f"{value / scale:.3g} {name}"
        return f"{value:.3g} s"
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
