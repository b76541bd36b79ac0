"""From a file to a checked scenario: references, overrides, and all problems at once, each at its line."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sim import keys, yamlfile
from sim.checks import Rule, problems
from sim.model import Model
from sim.scenario import Scenario
from sim.yamlfile import Document, Problem, ScenarioError

REFERENCES = frozenset({"model", "cluster"})


def from_hf(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Make a model block of a JSON file: a Hugging Face config.json, or our own keys."""
    from sim.hf import is_hf_config

    if is_hf_config(data):
        return Model.from_hf(data, path.parent.name or path.stem).model_dump(mode="json", exclude_defaults=True)
    return data


def load(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    allow_outside: bool = False,
) -> Scenario:
    """Read a scenario file (or take plain data), apply ``key=value`` overrides, and check everything.

    Keys may stand for several (see `sim.keys`). Raises `sim.yamlfile.ScenarioError` with every problem found: those of
    single fields first, and when there are none those between fields.
    """
    return check(opened(source, overrides, allow_outside=allow_outside), allow_outside=allow_outside)


def opened(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    allow_outside: bool = False,
) -> Document:
    """Read a scenario file (or take plain data) and apply ``key=value`` overrides, nothing checked yet."""
    if isinstance(source, Mapping):
        document = yamlfile.document(dict(source), references=REFERENCES, convert=from_hf)
    else:
        document = yamlfile.read(source, references=REFERENCES, convert=from_hf, allow_outside=allow_outside)
    return yamlfile.apply_overrides(document, list(overrides), keys.put) if overrides else document


def check(document: Document, *, allow_outside: bool = False) -> Scenario:
    """Make a scenario of a document. Raises `sim.yamlfile.ScenarioError` with every problem; see `load`."""
    for path in (("traffic",), ("serving", "requests")):
        document = _trace_path(document, path, allow_outside)
    scenario = yamlfile.validate(Scenario, document)
    found = _located(document, problems(scenario))
    if found:
        raise ScenarioError(found)
    return scenario.resolved()


def _located(document: Document, found: Iterable[Rule]) -> list[Problem]:
    """Problems in the order of the files and of the lines in them."""
    files: dict[str, int] = {}
    for mark in document.marks.values():
        files.setdefault(mark.file, len(files))

    def place(rule: Rule) -> tuple[int, int, int]:
        path = rule[0]
        while path not in document.marks:
            path = path[:-1]
        mark = document.marks[path]
        return files[mark.file], mark.line, mark.column

    return [document.problem(path, rule) for path, rule in sorted(dict.fromkeys(found), key=place)]


def _trace_path(document: Document, keys: tuple[str, ...], allow_outside: bool) -> Document:
    """Resolve the trace that a block names as its ``path``: in a file against that file, whose folder it may not leave; by
    the user, against here."""
    block: Any = document.data
    for key in keys:
        block = block.get(key) if isinstance(block, dict) else None
    if not isinstance(block, dict) or not isinstance(block.get("path"), str):
        return document
    where = (*keys, "path")
    mark = document.marks.get(where)
    named_in_file = mark is not None and mark.line > 0
    try:
        folder = os.path.realpath(os.path.dirname(mark.file) if mark is not None and named_in_file else ".")
        target = os.path.realpath(os.path.join(folder, block["path"]))
        inside = os.path.commonpath([folder, target]) == folder
    except (OSError, ValueError):
        raise ScenarioError([document.problem(where, "is not a usable file name")]) from None
    if named_in_file and not allow_outside and not inside:
        raise ScenarioError([document.problem(where, "a trace named in a file must lie in its folder")])
    _set(document.data, where, target)
    return document


def _set(data: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set a value deep in ``data``, in copies of the blocks on the way: they may be the caller's."""
    if len(path) == 1:
        data[path[0]] = value
        return
    data[path[0]] = dict(data[path[0]])
    _set(data[path[0]], path[1:], value)
