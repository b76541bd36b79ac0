"""A comparison of stored runs as people read it: a text for the terminal, and a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sim.aligned import grid
from sim.report import serving, steps
from sim.report.compare import ABSENT, changed_keys, rows, unpaired
from sim.report.grids import number, two_digits
from sim.report.verdict import unit_of
from sim.results import Metric, Result, metrics_of


@dataclass(frozen=True, slots=True)
class Compared:
    """A comparison as people read it. grids: (title, head, rows) of the text; notes: what to know."""

    keys: list[tuple[str, list[str]]]
    versions: list[tuple[str, list[str]]]
    grids: list[tuple[str, list[str], list[list[str]]]]
    notes: list[str]


def compared(results: Mapping[str, Result], versions: Sequence[Mapping[str, str]]) -> Compared:
    """Return everything that a text or a page of the comparison says. Raises ValueError as `compare`."""
    table, names = rows(results), list(results)
    first = results[names[0]]
    metrics = {metric.name: metric for metric in metrics_of(first.scenario)}
    kind = steps if first.scenario.serving is None else serving
    by_key = {(policy, metric, run): tuple(row) for policy, metric, run, *row in zip(*table.values(), strict=True)}
    grids = []
    for section in kind.sections(first):
        shown = [n for n in section.names if not n.endswith("_floor") and any(key[1] == n for key in by_key)]
        for name in shown:
            lines = _lines(metrics[name], name, by_key, first, names)
            if any(cell != "=" for line in lines for cell in line[2:]):
                label = metrics[name].label.removesuffix(unit_of(metrics[name])).replace(" /", "/")
                unit = unit_of(metrics[name]).strip()
                grids.append((f"{label} [{unit}]" if unit else label, ["policy", *names], lines))
    notes = []
    for name in names[1:]:
        why = unpaired(first, results[name])
        if why:
            notes.append(
                f"{name}: {why} is not that of {names[0]}, so replicas are not paired and intervals are wider."
            )
        else:
            notes.append(f"{name}: same seed and traffic as {names[0]}, so differences are paired over replicas.")
        mine, theirs = ({p.name for p in r.scenario.policies} for r in (first, results[name]))
        for whose, only in ((names[0], mine - theirs), (name, theirs - mine)):
            if only:
                notes.append(f"only in {whose}: {', '.join(sorted(only))}")
        if min(first.scenario.replicas, results[name].scenario.replicas) == 1:
            notes.append(f"{name}: a single replica on a side, so no interval.")
    everything = dict.fromkeys(key for one in versions for key in one)
    moved = [(key, [one.get(key, ABSENT) for one in versions]) for key in everything]
    return Compared(changed_keys(results), [v for v in moved if len(set(v[1])) > 1], grids, notes)


def _lines(
    metric: Metric, name: str, by_key: Mapping[Any, Any], first: Result, names: Sequence[str]
) -> list[list[str]]:
    """A row per policy: the reference's value, then value and difference of every other run; ``=`` where it is the same."""
    lines = []
    for policy in (p.name for p in first.scenario.policies):
        known = [by_key.get((policy, name, run)) for run in names[1:]]
        reference = next((row[0] for row in known if row), None)
        if reference is None:
            continue
        line = [policy, number(reference, metric)]
        for row in known:
            if row is None:
                line.append("-")
                continue
            _, value, difference, half, _ = row
            if difference == 0 and not half > 0:
                line.append("=")
                continue
            change = (
                f"{'-+'[difference > 0]}{two_digits(abs(100 * difference / reference))} %"
                if reference
                else f"{difference * metric.scale:+.3g}"
            )
            interval = (
                ""
                if math.isnan(half)
                else f" ±{two_digits(100 * half / abs(reference) if reference else half * metric.scale)}"
            )
            line.append(f"{number(value, metric)} ({change}{interval})")
        lines.append(line)
    return lines


def text(found: Compared, names: Sequence[str]) -> str:
    """Return the comparison for a terminal."""
    parts = []
    for title, what in (("scenario", found.keys), ("versions", found.versions)):
        if what:
            parts += [*grid([title, *names], [[key, *map(_short, values)] for key, values in what]), ""]
    if not found.keys:
        parts += ["the scenarios are the same", ""]
    for title, head, lines in found.grids:
        parts += [title, *grid(head, lines), ""]
    if not found.grids:
        parts += ["every figure of policies with the same name is the same", ""]
    return "\n".join([*parts, *found.notes])


def _short(value: str) -> str:
    return value if len(value) <= 40 else value[:37] + "..."


def page(found: Compared, names: Sequence[str]) -> str:
    """Return the comparison as a page that needs nothing else."""
    from sim.report.html import environment

    return (
        environment()
        .get_template("compare.html")
        .render(
            names=list(names),
            keys=[[key, *values] for key, values in found.keys],
            versions=[[key, *values] for key, values in found.versions],
            grids=found.grids,
            notes=found.notes,
        )
    )
