"""From what a user wrote (``--vary``, a ``sweep`` block, Python) to axes: what is varied, and where that is said."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from sim.designs import Axis, limited, steps
from sim.designs.block import Range
from sim.located import Mark, Problem, ScenarioError, short
from sim.syntax import Node, from_plain, parse_yaml, to_plain
from sim.yamlfile import Document, Override, parse_key

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"\s*({_NUMBER}):({_NUMBER})(?::(log|{_NUMBER}))?\s*")


class Varied(NamedTuple):
    """An axis and the place that names it: files among its values are relative to that."""

    axis: Axis
    path: tuple[str, ...]
    mark: Mark

    def override(self, value: Any) -> Override:
        return Override(str(self.mark), self.path, from_plain(value, self.mark))


def from_texts(texts: Sequence[str]) -> list[Varied]:
    """Read ``key=values`` texts: ``1:8`` (integers), ``0:1:0.1`` (with a step), ``0.1:0.9`` (everything between),
    ``1e-4:1e-1:log``, or YAML values with commas between. Raises ScenarioError with every problem."""
    found: dict[str, Any] = {}
    problems: list[Problem] = []
    for text in texts:
        key, equals, values = text.partition("=")
        key = key.strip()
        if not equals or not key:
            problems.append(Problem(f"--vary {short(text)}", "", "must be written key=value,value or key=low:high"))
        elif key in found:
            problems.append(Problem(f"--vary {key}", "", "is there twice"))
        else:
            found[key] = values
    if problems:
        raise ScenarioError(problems)
    return from_mapping(found)


def from_mapping(vary: Mapping[str, Any]) -> list[Varied]:
    """Read values by key: a sequence, ``{"low":, "high":}`` with ``"step":`` or ``"log":``, or text as in `from_texts`."""
    found: list[Varied] = []
    problems: list[Problem] = []
    for key, values in vary.items():
        try:
            found.append(_varied(key, values, Mark(f"--vary {key}")))
        except ScenarioError as error:
            problems += error.problems
    if problems:
        raise ScenarioError(problems)
    return found


def from_block(document: Document, vary: Mapping[str, Any]) -> list[Varied]:
    """Read the ``sweep.vary`` of a document, each axis at its line."""
    found: list[Varied] = []
    problems: list[Problem] = []
    plain = document.data["sweep"]["vary"] if vary else {}
    for key in vary:
        try:
            found.append(_varied(key, plain[key], document.marks[("sweep", "vary", key)]))
        except ScenarioError as error:
            problems += error.problems
    if problems:
        raise ScenarioError(problems)
    return found


def _varied(key: str, values: Any, mark: Mark) -> Varied:
    if not isinstance(key, str):
        raise ValueError(f"vary: keys must be text such as 'cluster.nodes' [got {short(key)}]")
    path = parse_key(key, str(mark))
    name = "" if mark.line == 0 else f"sweep.vary.{key}"

    def refuse(rule: str, got: str = "") -> ScenarioError:
        return ScenarioError([Problem(str(mark), name, rule, got)])

    if path[0] == "sweep":
        raise refuse("is of the sweep itself, not of its points")
    if isinstance(values, set | frozenset):
        raise refuse("a set has no order: give a list", short(values))
    try:
        if isinstance(values, str):
            values = _parsed(values, mark)
        if isinstance(values, Mapping):
            values = Range.model_validate(values)
        if isinstance(values, Range):
            return Varied(_range(key, values), path, mark)
    except ValidationError as error:
        rules = [f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors(include_url=False)]
        raise refuse("; ".join(rules).replace("Value error, ", "")) from None
    except ValueError as error:
        raise refuse(str(error)) from None
    kept = _plain(list(values)) if isinstance(values, Iterable) else []
    if not kept:
        raise refuse("needs values, e.g. 1:8 or 4,8,16")
    texts = [repr(value) for value in kept]
    twice = [value for i, value in enumerate(kept) if texts[i] in texts[:i]]
    if twice:
        raise refuse("is there twice", short(twice[0]))
    try:
        limited(len(kept))
    except ValueError as error:
        raise refuse(str(error)) from None
    return Varied(Axis(key, tuple(kept)), path, mark)


def _parsed(text: str, mark: Mark) -> Any:
    if found := _RANGE.fullmatch(text):
        low, high, third = found.groups()
        start = _number(low)
        whole = isinstance(start, int)
        step = None if third in (None, "log") else _number(third, whole)
        return {"low": start, "high": _number(high, whole), "step": step, "log": third == "log"}
    if not text.strip():
        return ()
    tree = parse_yaml(f"[{text}]", mark) or Node([], mark)
    parse_yaml(f"[{text}\n]", mark)  # fails where the text closes the bracket itself and a comment hides the other
    return to_plain(tree)


def _number(text: str, whole: bool = False) -> int | float:
    """Read a number. whole: that of a range which begins with a whole number: 1e9 is one too, and 1.0 is none."""
    if re.fullmatch(r"[-+]?\d+", text):
        return int(text)
    value = float(text)
    return int(value) if whole and "." not in text and value.is_integer() else value


def _range(key: str, values: Range) -> Axis:
    low, high = values.low, values.high
    whole = isinstance(low, int) and isinstance(high, int)
    if values.step is not None:
        found = steps(low, high, values.step)
        return Axis(key, tuple(int(v) for v in found) if whole and isinstance(values.step, int) else found)
    return Axis(key, low=low, high=high, log=values.log, whole=whole)


def _plain(value: Any) -> Any:
    """A NumPy number or a tuple as YAML would have it."""
    item = getattr(value, "item", None)
    if item is not None and not isinstance(value, str | bytes | dict):
        return item()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def not_set_too(varied: Sequence[Varied], overrides: Sequence[str]) -> None:
    """Raise ScenarioError for axes whose key ``--set`` gives a value."""
    twice = {text.partition("=")[0].strip() for text in overrides} & {axis.axis.key for axis in varied}
    if twice:
        raise ScenarioError([Problem(f"--vary {key}", "", "is set by --set too") for key in sorted(twice)])
