"""Metrics and tables as a page: what every figure of a summary means, in which unit, and which way is better."""

from __future__ import annotations

import inspect

from sim.reference.words import cell, markdown
from sim.report.meanings import MEANINGS
from sim.results import METRICS, SERVICE_METRICS, Metric, Result


def page() -> str:
    """Return the page of metrics and tables. Raises KeyError for a metric without a meaning."""
    return "\n\n".join(
        [
            "# Metrics and tables",
            "Files and frames hold SI units; the terminal shows the label's. *Better* is the direction in which a figure "
            "improves while all else is equal; nothing where it depends on what is asked. A summary has, for each policy "
            "and metric, the mean over replicas, the half-width of its 95 % interval, and the paired difference against the "
            "first policy with its own half-width (all policies see the same tokens). Every definition is worked out in "
            "[the theory](../theory.md).",
            "## Of a run of steps",
            _rows(METRICS),
            "## Of a run that serves requests",
            _rows(SERVICE_METRICS),
            "## Tables",
            "Frames of a `Result`, and with the same names parquet files of a run's folder; a table without rows is left out.",
            _tables(),
        ]
    )


def _rows(metrics: tuple[Metric, ...]) -> str:
    rows = ["| metric | in the terminal | unit | better | meaning |", "|---|---|---|---|---|"]
    for metric in metrics:
        unit, meaning = MEANINGS[metric.name]
        better = "" if metric.better == "none" else metric.better
        rows.append(f"| `{metric.name}` | {cell(metric.label)} | {unit} | {better} | {cell(meaning)} |")
    return "\n".join(rows)


def _tables() -> str:
    rows = ["| frame | rows |", "|---|---|"]
    frames = {name: value for name, value in vars(Result).items() if isinstance(value, property) and value.__doc__}
    rows += [f"| `result.{name}` | {cell(inspect.cleandoc(value.__doc__ or ''))} |" for name, value in frames.items()]
    return "\n".join(rows) + f"\n\n`result.summary()`: {markdown(inspect.getdoc(Result.summary) or '')}"
