"""A sweep as one reads it: tidy rows, and their summary point by point."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from sim.results import Metric, Table, compared, metrics_of
from sim.scenario import Scenario
from sim.sweeping import dataset
from sim.sweeping.folder import read_definition
from sim.sweeping.points import Plan, column

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


@dataclass(frozen=True)
class Sweep:
    """Points of a scenario, as far as they have run.

    axes: the values of each key, in order. table: one row per point, policy and replica. skipped: reasons by point.
    missing: points that have not run yet. folder: where it lies, if anywhere.
    """

    scenario: Scenario
    axes: dict[str, list[Any]]
    policies: list[str]
    metrics: tuple[Metric, ...]
    table: pa.Table = field(repr=False)
    skipped: dict[int, str] = field(default_factory=dict)
    missing: tuple[int, ...] = ()
    folder: Path | None = None

    @property
    def runs(self) -> pd.DataFrame:
        """Columns ``point``, the axes by key, ``policy``, ``replica`` and the metrics, in SI units; NaN where there is
        none."""
        frame: pd.DataFrame = self.table.to_pandas()
        return frame

    def summary(self, metrics: Sequence[str] | None = None) -> pd.DataFrame:
        """One row per point, policy and metric: the axes' values, mean over replicas, 95 % half-width, paired difference
        to the point's first policy with its half-width. metrics: names; all by default."""
        import pandas as pd

        return pd.DataFrame(self.summary_rows(metrics))

    def summary_rows(self, metrics: Sequence[str] | None = None) -> Table:
        """`summary` as plain columns."""
        wanted = [metric for metric in self.metrics if metrics is None or metric.name in metrics]
        columns = ["point", *self.axes, "policy", "replica", *(metric.name for metric in wanted)]
        table: Table = self.table.select(columns).to_pydict()
        out: Table = {}
        points = table["point"]
        start = 0
        while start < len(points):
            end = start
            while end < len(points) and points[end] == points[start]:
                end += 1
            rows = {name: column[start:end] for name, column in table.items()}
            found = compared(rows, wanted)
            n = len(found["policy"])
            head = {name: [rows[name][0]] * n for name in ("point", *self.axes)}
            for name, values in (head | found).items():
                out.setdefault(name, []).extend(values)
            start = end
        return out


def read(folder: str | os.PathLike[str]) -> Sweep:
    """Read the folder of a sweep, finished or not. Raises FileNotFoundError, and ValueError for a damaged one."""
    place = Path(folder)
    data = read_definition(place)
    try:
        scenario = Scenario.model_validate(data["scenario"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, ("scenario", *first["loc"])))
        raise ValueError(f"{place / 'sweep.json'}: damaged: {where}: {first['msg']}") from None
    rows = [run for run in data["runs"] if "run" in run]
    axes = {key: column(run["values"][key] for run in data["runs"]) for key in data["axes"]}
    table = dataset.read(place, [run["point"] for run in rows], dataset.schema(axes, data["metrics"]))
    there = set(table.column("point").to_pylist())
    return Sweep(
        scenario=scenario,
        axes=axes,
        policies=list(data["policies"]),
        metrics=tuple(metric for metric in metrics_of(scenario) if metric.name in data["metrics"]),
        table=table,
        skipped={run["point"]: run["skipped"] for run in data["runs"] if "skipped" in run},
        missing=tuple(run["point"] for run in rows if run["point"] not in there),
        folder=place,
    )


def in_memory(plan: Plan, schema: pa.Schema, tables: dict[int, pa.Table]) -> Sweep:
    """The sweep of a plan whose parts were not written."""
    return Sweep(
        scenario=plan.scenario,
        axes=plan.values,
        policies=list(dict.fromkeys(name for point in plan.running for name in point.policies)),
        metrics=plan.metrics,
        table=dataset.joined(schema, dict(sorted(tables.items()))),
        skipped={point.index: point.skipped for point in plan.points if point.skipped},
    )
