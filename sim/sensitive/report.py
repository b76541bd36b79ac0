"""The answer as text for a terminal, and as files."""

from __future__ import annotations

import json
import math
import os
import textwrap
from pathlib import Path
from typing import Any

from sim.aligned import grid
from sim.sensitive.answer import Sensitivity
from sim.sensitive.constants import SPREAD, Constant
from sim.sensitive.oneway import BreakEven, Row
from sim.sensitive.standings import NOBODY, Standing
from sim.store import atomic_folder, resolved_data, versions, write_csv, write_parquet
from sim.units import human

_ROUGH = 0.2  # half-width of an index above which it is called so
_MOST = 12  # rows of a table on the terminal; the files hold all


def text(found: Sensitivity) -> str:
    """Return the whole text."""
    stated = found.stated
    winner, runner_up = found.policies[stated.winner], found.policies[stated.runner_up]
    head = f"{found.scenario.name}: {winner} wins by {found.metric.name}, {_percent(stated)} ahead of {runner_up}"
    lines = [head + f" ({found.evaluations} evaluations)"]
    if stated.half_width >= stated.margin:
        lines.append("that lead is within its own interval: more replicas before more constants")
    elif math.isnan(stated.half_width):
        lines.append("one replica, so leads have no intervals (--replicas N)")
    if found.left_out:
        lines.append(f"left out, since nobody would deploy it: {', '.join(found.left_out)}")
    parts = [part for line in lines for part in _wrapped(line)]
    if found.rows:
        parts += ["", *_ends(found)]
    if killing := _killing(found):
        parts += ["", *_wrapped(f"kills {found.metric.name}: {'; '.join(killing)}")]
    if found.without_effect:
        quiet = f"no effect at either end: {', '.join(row.constant.label for row in found.without_effect)}"
        parts += ["", *_wrapped(quiet)]
    if found.together is not None:
        parts += ["", *_together(found)]
    return "\n".join([*parts, "", *_wrapped(found.conclusion)])


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, 120, subsequent_indent="  ", break_on_hyphens=False)


def _killing(found: Sensitivity) -> list[str]:
    """Constants that leave policies without the metric, with the end and the policies."""
    told = []
    for row in found.rows:
        for end, killed in zip(("low", "high"), row.killed, strict=True):
            if killed:
                told.append(f"{row.constant.label} at its {end} end, of {', '.join(found.policies[i] for i in killed)}")
    return told


def _percent(one: Standing) -> str:
    if one.winner == NOBODY:
        return "nobody has one"
    if math.isinf(one.ahead):
        return "alone"
    text = f"{100 * one.ahead:.2g} %"
    return text if math.isnan(one.half_width) else f"{text} ±{100 * one.ahead_half_width:.2g}"


def _ends(found: Sensitivity) -> list[str]:
    winner = found.stated.winner
    rows = sorted(found.rows, key=lambda row: not row.changes(winner))
    shown = rows[: max(_MOST, sum(row.changes(winner) for row in rows))]
    cells = []
    for row in shown:
        ends = [
            _percent(end) if end.winner in (winner, NOBODY) else f"{found.policies[end.winner]} {_percent(end)}"
            for end in (row.low, row.high)
        ]
        cells.append(
            [
                row.constant.label, _value(row.constant, row.constant.stated), _range(row.constant), *ends,
                "yes" if row.changes(winner) else "", _factors(row, found.policies),
            ]
        )  # fmt: skip
    head = ["constant", "stated", "range", "low: ahead", "high: ahead", "changes", "another wins from"]
    lines = [
        f"one at a time: what {found.policies[winner]} is ahead by at the low and at the high end",
        *grid(head, cells),
    ]
    if len(shown) < len(rows):
        lines.append(
            f"and {len(rows) - len(shown)} with less effect, none of which changes the winner (one_at_a_time.csv)"
        )
    return lines


def _value(constant: Constant, x: float) -> str:
    if len({round(value, 12) for value in constant.values}) > 1 and len(constant.keys) > 1:
        units = {key.rsplit("_per_s", 1)[0].rsplit(".", 1)[-1] for key in constant.keys}
        if not units & {"bandwidth_bytes", "latency_s"} and len(units) > 1:
            return "as stated"
    value, key = constant.at(x)[0], constant.keys[0]
    for ending, unit in (("flops_per_s", "FLOP/s"), ("bytes_per_s", "B/s"), ("_s", "s")):
        if key.endswith(ending) or f"{ending}." in key:
            return human(value, unit)
    return f"{value:.4g}"


def _range(constant: Constant) -> str:
    if constant.absolute:
        return f"{constant.low:.3g}, {constant.high:.3g}"
    plain = math.isclose(constant.low, 1 - SPREAD) and math.isclose(constant.high, 1 + SPREAD)
    return f"±{100 * SPREAD:g} %" if plain else f"x{constant.low:.3g}, x{constant.high:.3g}"


def _factors(row: Row, policies: tuple[str, ...]) -> str:
    if row.constant.absolute:
        return "-"
    found: list[BreakEven] = [one for one in (row.below, row.above) if one is not None]
    if not found:
        return f"not in x{row.sought[0]:.3g}..{row.sought[1]:.3g}"
    return ", ".join(f"x{one.factor:.3g} {policies[one.winner]}" for one in found)


def _together(found: Sensitivity) -> list[str]:
    together, names = found.together, found.policies
    assert together is not None
    pair = f"{names[found.stated.winner]} and {names[found.stated.runner_up]}"
    table = together.indices
    if table is None:
        n = len(together.table["gap"])
        why = f"no Sobol indices: at {together.without} of {n} points {pair} do not both have a {found.metric.name}"
        return ["all at once", *_wrapped(why)]
    order = sorted(range(len(together.constants)), key=lambda i: (-table.total[i], i))
    rows = [
        [
            together.constants[i].label,
            f"{table.first[i]:.2f} ±{table.first_half_width[i]:.2f}",
            f"{table.total[i]:.2f} ±{table.total_half_width[i]:.2f}",
        ]
        for i in order[:_MOST]
    ]
    lines = ["all at once", *grid(["constant", "first-order index", "total index"], rows)]
    note = (
        f"Sobol indices of the gap between {pair}: shares of its variance over {together.samples} independent samples (and "
        f"the points between), uniform within the ranges; ± 95 % by bootstrap"
    )
    if max(table.total_half_width) > _ROUGH:
        note += "; rough, as their intervals say: more --samples narrow them"
    return [*lines, *_wrapped(note)]


def write(found: Sensitivity, folder: str | os.PathLike[str], asked: dict[str, Any]) -> Path:
    """Write the answer's folder, whole or not at all, and return its path: one_at_a_time.csv, indices.csv, samples.parquet and
    sensitivity.json. asked: what is needed to ask again. Raises OSError."""
    path = Path(folder)
    with atomic_folder(path) as work:
        write_csv(work / "one_at_a_time.csv", found.one_at_a_time_table())
        if found.together is not None:
            if found.together.indices is not None:
                write_csv(work / "indices.csv", found.indices_table())
            write_parquet(work / "samples.parquet", found.together.table)
        definition = asked | {
            "metric": found.metric.name,
            "winner": found.policies[found.stated.winner],
            "runner_up": found.policies[found.stated.runner_up],
            "left_out": found.left_out,
            "share": None if found.together is None else found.share,
            "conclusion": found.conclusion,
            "evaluations": found.evaluations,
            "constants": [
                {
                    "label": c.label,
                    "keys": c.keys,
                    "values": c.values,
                    "low": c.low,
                    "high": c.high,
                    "absolute": c.absolute,
                }
                for c in (row.constant for row in (*found.rows, *found.without_effect))
            ],
            "scenario": resolved_data(found.scenario),
            "versions": versions(),
        }
        (work / "sensitivity.json").write_text(json.dumps(definition, indent=1) + "\n", encoding="utf-8")
    return path
