"""A run as one HTML page that needs nothing else: no script, no font, no picture from anywhere.

The page is a function of the result, the command and the versions: no date, so equal runs give equal bytes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from sim.contest import yardsticks
from sim.report import evidence, serving, steps
from sim.report.about import facts
from sim.report.drawings import drawings
from sim.report.grids import LEADING, Section, Value, against_first, columns, leading, number, spread, values
from sim.report.meanings import MEANINGS
from sim.report.verdict import Verdict, unit_of, verdict
from sim.results import Metric, Result
from sim.store import named_traces, resolved_data, run_id, versions

if TYPE_CHECKING:
    import jinja2


class Cell(NamedTuple):
    """A figure as people read it. mark: ``best``, ``same`` as the winner for want of evidence, or nothing."""

    text: str
    interval: str
    best: bool


class Column(NamedTuple):
    """A column's head: words, unit, and the metric's name, meaning and better direction."""

    name: str
    words: str
    unit: str
    meaning: str
    better: str


class Grid(NamedTuple):
    """A table. rows: (head, cells)."""

    title: str
    head: str
    columns: list[Column]
    rows: list[tuple[str, list[Cell]]]


def page(result: Result, command: str = "", made_with: Mapping[str, str] | None = None) -> str:
    """Return the page of a run.

    command: what made the run, as typed; without it the page says how to repeat the run from its scenario. made_with:
    versions by name, of a stored run; by default those of this process.
    """
    from markupsafe import Markup

    from sim.yamlfile import dump

    scenario = result.scenario
    timed = scenario.serving is not None or bool(len(scenario.timed_steps()))
    kind = steps if scenario.serving is None else serving
    answer = verdict(result)
    extra = steps.by_topic(result) if scenario.serving is None else serving.units(result)
    return environment().get_template("run.html").render(
        scenario=scenario,
        run=run_id(scenario, result.traces),
        named_traces=named_traces(scenario),
        answer=answer,
        facts=facts(scenario),
        tables=[found for section in kind.sections(result) if (found := _grid(result, section, answer)).columns],
        plain=[(head[0], _plain(head, rows)) for head, rows in extra],
        notes=[kind.note(result), *answer.asides, *kind.events(result)],
        drawings=[
            drawing._replace(wide=Markup(drawing.wide), narrow=Markup(drawing.narrow)) for drawing in drawings(result)
        ],
        timed=timed,
        constants=evidence.constants(scenario) if timed else [],
        checks=evidence.checks(scenario),
        assumptions=evidence.assumptions(scenario),
        not_claimed=evidence.NOT_CLAIMED,
        command=command or "python -m sim.run scenario.yaml",
        resolved=dump(resolved_data(scenario)),
        versions=versions() if made_with is None else dict(made_with),
        n_events=result.n_events,
    )  # fmt: skip


@functools.cache
def environment() -> jinja2.Environment:
    """Return the templates of this package. Everything that is not markup of ours is escaped: names and descriptions come
    from scenario files of strangers."""
    import jinja2

    found = jinja2.Environment(
        loader=jinja2.PackageLoader("sim.report", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["bound"] = bound
    return found


def bound(text: str) -> str:
    """Keep a number, its interval and its unit on one line.

    >>> bound("1.78 ± 0.02 ms, 1.1 % less").count(" ")
    2
    """
    return re.sub(r"(?<=\d) (?=±|%|ms\b|s\b|GB\b)|(?<=±) (?=\d)", "\N{NO-BREAK SPACE}", text)


def column_of(metric: Metric) -> Column:
    """Return the head of a metric's column: its label without the unit, and the unit."""
    unit = unit_of(metric) or (" GB" if metric.label.endswith("GB /step") else "")
    words = metric.label.removesuffix(unit)
    if metric.name.endswith("_floor"):
        words = "uniform floor"
    meaning = MEANINGS.get(metric.name, ("", ""))[1]
    return Column(metric.name, words.replace(" /", "/"), unit.strip(), meaning, metric.better)


def _grid(result: Result, section: Section, answer: Verdict) -> Grid:
    shown, found = columns(result, section.names), values(result)
    names = [policy.name for policy in result.scenario.policies]
    last = leading(shown)
    heads = [column_of(metric) for metric in shown]
    if last:
        heads.append(Column("against_first", f"{LEADING[last]} against first", "", "paired over replicas", "none"))
    rows = []
    best = {metric.name: _best(result, metric, found) for metric in shown}
    for name in names:
        cells = []
        for metric in shown:
            value = found[name, metric.name]
            text = number(value.mean, metric)
            cells.append(Cell(text if text != "-" else "–", spread(value, metric), name in best[metric.name]))
        if last:
            text, _, interval = against_first(found[name, last], name == names[0]).partition(" ±")
            cells.append(Cell(text if text != "-" else "–", f"±{interval}" if interval else "", False))
        rows.append((name, cells))
    return Grid(section.title, "policy", heads, rows)


def _best(result: Result, metric: Metric, found: Mapping[tuple[str, str], Value]) -> list[str]:
    """Return the candidates whose figure, as printed, is the best; nobody where all are equal or nothing is better."""
    blind = yardsticks(result.scenario)
    shown = {p.name: found[p.name, metric.name].mean for p in result.scenario.policies if p.name not in blind}
    known = {name: mean for name, mean in shown.items() if mean == mean}
    texts = {name: number(mean, metric) for name, mean in known.items()}
    if metric.better == "none" or len(set(texts.values())) < 2:
        return []
    top = (max if metric.better == "higher" else min)(known, key=lambda name: known[name])
    return [name for name in known if texts[name] == texts[top]]


def _plain(head: list[str], rows: list[list[str]]) -> Grid:
    """A table whose cells are text already."""
    heads = [Column("", words.replace(" /", "/"), "", "", "none") for words in head[1:]]
    return Grid("", head[0], heads, [(row[0], [Cell(cell.replace("-", "–") if cell == "-" else cell, "", False) for cell in row[1:]]) for row in rows])  # fmt: skip
