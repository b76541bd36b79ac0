"""Numbers inside a scenario: read by their path, replaced by others, and the limits that their fields set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from sim.cost import h100
from sim.hardware import Device

M = TypeVar("M")
Path = tuple[str, ...]


def at(value: Any, path: Path) -> Any:
    """Return what ``path`` names in a model. Raises KeyError where there is no such thing."""
    for part in path:
        if isinstance(value, tuple):
            value = value[int(part)] if part.isdecimal() and int(part) < len(value) else _none(path)
        elif isinstance(value, BaseModel) and part in type(value).model_fields:
            value = getattr(value, part)
        else:
            _none(path)
    return value


def _none(path: Path) -> Any:
    raise KeyError(".".join(path))


def replaced(value: M, changes: Mapping[Path, Any]) -> M:
    """Return ``value`` with other values at the paths, each block checked again once all of its changes are in. Raises
    pydantic.ValidationError."""
    if () in changes:
        return changes[()]  # type: ignore[no-any-return]
    inner: dict[str, dict[Path, Any]] = {}
    for path, new in changes.items():
        inner.setdefault(path[0], {})[path[1:]] = new
    if isinstance(value, tuple):
        items = [replaced(item, inner[str(i)]) if str(i) in inner else item for i, item in enumerate(value)]
        return tuple(items)  # type: ignore[return-value]
    assert isinstance(value, BaseModel)
    fields = {name: getattr(value, name) for name in type(value).model_fields}
    for part, below in inner.items():
        fields[part] = replaced(fields[part], below)
    return type(value).model_validate(fields)


def limits(value: Any, path: Path) -> tuple[float, float]:
    """Return the least and the largest number that the field at ``path`` takes by itself (exclusive ones count as such:
    no number is shown that is refused only for being exactly at an open end)."""
    model = at(value, path[:-1])
    low, high = -math.inf, math.inf
    if isinstance(model, BaseModel) and path[-1] in type(model).model_fields:
        for rule in type(model).model_fields[path[-1]].metadata:
            least = [getattr(rule, name) for name in ("ge", "gt") if getattr(rule, name, None) is not None]
            most = [getattr(rule, name) for name in ("le", "lt") if getattr(rule, name, None) is not None]
            low, high = max([low, *least]), min([high, *most])
    return low, high


def numbers(value: Any, path: Path = ()) -> Iterator[tuple[Path, float]]:
    """Yield every number inside a model with its path, in the order of fields; truth values are no numbers."""
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from numbers(getattr(value, name), (*path, name))
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from numbers(item, (*path, str(i)))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def is_transferred(scenario: Any, path: Path) -> bool:
    """Whether ``path`` names a kernel's constant that the device does not state, so that `sim.cost.h100` supplies it."""
    try:
        return len(path) > 4 and path[-4:-2] == ("device", "kernels") and at(scenario, path[:-1]) is None
    except KeyError:
        return False


def transferred(device: Device, name: str) -> Any:
    """Return the constants that the calibrated law uses for kernel ``name`` where ``device`` has none; None if no law does."""
    family, _, rest = name.partition("_")
    if name.startswith("grouped_gemm_"):
        dtype: Any = name.removeprefix("grouped_gemm_")
        return h100.grouped_gemm(device, dtype) if getattr(device.peak_flops_per_s, dtype) else None
    if name.startswith("gemm_"):
        dtype = name.removeprefix("gemm_")
        return h100.gemm(device, dtype) if getattr(device.peak_flops_per_s, dtype) else None
    if name in h100.ATTENTION:
        return h100.attention(device, family, rest)  # type: ignore[arg-type]
    return {"training_attention": h100.training_attention, "elementwise": h100.elementwise}.get(name, _nothing)(device)


def _nothing(device: Device) -> None:
    return None
