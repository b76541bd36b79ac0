"""Keys that stand for several: ``policies.*.KEY`` (every item) and ``gating.KEY`` (every policy whose gate has that key)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from sim import yamlfile
from sim.gating import Gating
from sim.gating.balance import Balance
from sim.gating.capacity import Capacity
from sim.gating.score import Score
from sim.gating.select import Select
from sim.located import Mark, nearest
from sim.plugin import Plugin, members
from sim.scenario import Scenario
from sim.settings import Policy
from sim.syntax import Node
from sim.yamlfile import Document, Override, Problem, ScenarioError, dotted

_FAMILIES: dict[str, type[Plugin]] = {"score": Score, "select": Select, "balance": Balance, "capacity": Capacity}


def put(document: Document, overrides: Sequence[Override]) -> Document:
    """As `sim.yamlfile.put`, for keys with ``*`` or that start with ``gating`` too: these mean what the document is when
    their turn comes."""
    problems: list[Problem] = []
    plain: list[Override] = []
    for override in overrides:
        try:
            if "*" in override.path or override.path[0] == "gating":
                due, plain = plain, []
                document = yamlfile.put(document, due)
                plain = _gates(document, override) if override.path[0] == "gating" else _items(document, override)
            elif nearest(override.path[0], [*Scenario.model_fields, "extends", "gating"]) == "gating":
                raise _unknown(override, 0, ["gating"])
            else:
                plain.append(override)
        except ScenarioError as error:
            problems += error.problems
    try:
        document = yamlfile.put(document, plain)
    except ScenarioError as error:
        problems += error.problems
    if problems:
        raise ScenarioError(problems)
    return document


def _refused(override: Override, rule: str, hint: str = "") -> ScenarioError:
    return ScenarioError([Problem(override.shown, dotted(override.path), rule, hint=hint)])


def _unknown(override: Override, depth: int, known: Iterable[str]) -> ScenarioError:
    names = list(dict.fromkeys(known))
    hint = nearest(override.path[depth], names)
    few = 0 < len(names) <= 12 and not hint
    return _refused(override, f"unknown key; known here: {', '.join(names)}" if few else "unknown key", hint)


def _items(document: Document, override: Override) -> list[Override]:
    """``a.*.b`` as ``a.0.b``, ``a.1.b``, ..."""
    found: list[tuple[tuple[str, ...], Any]] = [((), document.data)]
    for depth, part in enumerate(override.path):
        deeper: list[tuple[tuple[str, ...], Any]] = []
        for path, value in found:
            if part == "*":
                if not isinstance(value, list):
                    raise _refused(override, f"{dotted(path) or 'the document'} is not a list")
                deeper += [((*path, str(i)), item) for i, item in enumerate(value)]
            else:
                deeper.append(((*path, part), _at(value, part)))
        found = deeper
        if depth == 1 and override.path[:2] == ("policies", "*") and len(override.path) > 2:
            key = override.path[2]
            if key not in Policy.model_fields:
                raise _unknown(override, 2, Policy.model_fields)
    return [override._replace(path=path) for path, _ in found]


def _gates(document: Document, override: Override) -> list[Override]:
    """``gating.select.topk_group`` as ``policies.N.select.topk_group`` of every policy whose ``select`` has it."""
    scenario = yamlfile.validate(Scenario, document).resolved()
    parts = override.path[1:]
    if not parts:
        raise _refused(override, "names no part of the gate: " + ", ".join(Gating.model_fields))
    if parts[0] not in Gating.model_fields:
        raise _unknown(override, 1, Gating.model_fields)
    found: list[Override] = []
    known: dict[int, list[str]] = {}
    for i, policy in enumerate(scenario.policies):
        if scenario.model_of(policy).is_moe:
            written = _at(_at(document.data.get("policies"), str(i)), parts[0])
            for path, kind in _places(policy, parts, written, known):
                at = ("policies", str(i), *path)
                if kind:  # the gate has this part by default: a key below it needs its kind beside it
                    node = Node(kind, Mark(override.shown))
                    found.append(Override(override.shown, ("policies", str(i), parts[0], "kind"), node))
                found.append(override._replace(path=at))
    if found:
        return found
    if not any(scenario.model_of(policy).is_moe for policy in scenario.policies):
        raise _refused(override, "no policy has a gate: the model is dense")
    depth = max(known, default=1)
    family = _FAMILIES.get(parts[0])
    kinds = [k for k, cls in members(family).items() if parts[-1] in cls.model_fields] if family else []
    if kinds and not nearest(parts[depth], known.get(depth, [])):
        raise _refused(override, f"no policy has it; where {parts[0]} is {' or '.join(kinds)}, one would")
    somewhere = [name for cls in members(family).values() for name in cls.model_fields] if family else []
    raise _unknown(override, depth + 1, known.get(depth) or somewhere)


def _places(
    policy: Policy, parts: tuple[str, ...], written: Any, known: dict[int, list[str]]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the paths in ``policy`` that ``parts`` name, and the kind that has to be written beside it, if any.

    written: what the document says of ``parts[0]``. known: gathers the keys that there are at each depth, as far as the
    parts exist.
    """
    piece = getattr(policy, parts[0])
    if len(parts) == 1:
        yield parts, ""
        return
    rules = piece if isinstance(piece, tuple) else (piece,)
    indexed = isinstance(piece, tuple) and parts[1].isdecimal()
    for j, rule in enumerate(rules):
        rest = parts[2:] if indexed else parts[1:]
        if (indexed and j != int(parts[1])) or not rest or not _has(rule, rest, len(parts) - len(rest), known):
            continue
        missing = rule.kind if written is None and isinstance(rule, Plugin) else ""
        middle = (str(j),) if isinstance(written, list) else ()
        yield (parts[0], *middle, *rest), missing


def _has(value: Any, rest: tuple[str, ...], depth: int, known: dict[int, list[str]]) -> bool:
    for i, part in enumerate(rest):
        if isinstance(value, tuple) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
            continue
        fields = list(type(value).model_fields) if isinstance(value, BaseModel) else []
        known.setdefault(depth + i, []).extend(name for name in fields if name != "kind" or part == "kind")
        if part not in fields:
            return False
        value = getattr(value, part)
    return True


def _at(value: Any, part: str) -> Any:
    if isinstance(value, dict):
        return value.get(part)
    return value[int(part)] if isinstance(value, list) and part.isdecimal() and int(part) < len(value) else None
