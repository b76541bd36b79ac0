"""The page of a run and the comparison of runs: well-formed, escaped, the summary's own numbers, the same bytes again."""

from __future__ import annotations

import html
import itertools
import math
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")


import pytest

from sim import store
from sim.loading import load
from sim.report import evidence, serving, steps
from sim.report import html as pages
from sim.report.drawings import SHOWN, inline
from sim.report.grids import columns, number, spread, values
from sim.report.meanings import MEANINGS
from sim.report.verdict import references, verdict
from sim.results import METRICS, SERVICE_METRICS, Result, summarise
from tests import reported
from tests.reported import Outline

SCENARIOS = Path(__file__).resolve().parents[1] / "scenarios"


@pytest.fixture(scope="module", params=reported.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- the page ---


def test_the_page_is_well_formed_and_needs_nothing_else(kind: str) -> None:
    page = reported.page_of(kind)
    outline = Outline(page)
    assert not outline.tags & {"script", "iframe", "object", "form", "base", "style!"}
    assert len(outline.ids) == len(set(outline.ids)), "an id is there once, figures included"
    for link in outline.links:
        assert link.startswith(("#", "data:")), f"{link} would be fetched"
        assert not link.startswith("#") or link[1:] in outline.ids, f"{link} leads nowhere"
    for reference in re.findall(r"url\(([^)]*)\)", page):
        assert reference.startswith("#") and reference[1:] in outline.ids
    assert "@import" not in page and "default-src 'none'" in page
    assert len(page.encode()) < 1_500_000


def test_headings_are_in_order(kind: str) -> None:
    headings = Outline(reported.page_of(kind)).headings
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(headings))


def test_what_strangers_wrote_is_text(kind: str) -> None:
    page = reported.page_of(kind)
    outline = Outline(page)
    assert not outline.handlers and "script" not in outline.tags and "img" not in outline.tags
    assert reported.EVIL in [row[0] for row in outline.rows if row] and reported.QUESTION in html.unescape(page)
    assert "<script" not in page.lower() and "onerror=alert(1)>" not in page
    assert "--set name=&lt;x&gt;" in page


def test_every_number_of_the_tables_is_the_summarys(kind: str) -> None:
    result = reported.result(kind)
    rows = Outline(reported.page_of(kind)).rows
    summary, module = values(result), serving if kind == "serving" else steps
    checked = 0
    for section in module.sections(result):
        shown = columns(result, section.names)
        if not shown:
            continue
        width = next(len(row) for row in rows if len(row) > len(shown) and row[0] == "policy")
        start = next(
            i for i, row in enumerate(rows) if row and row[0] == "policy" and pages.column_of(shown[0]).words in row[1]
        )
        for i, policy in enumerate(result.scenario.policies, start + 1):
            assert rows[i][0] == policy.name and width
            for metric, cell in zip(shown, rows[i][1:], strict=False):
                value = summary[policy.name, metric.name]
                text = number(value.mean, metric)
                said = " ".join(filter(None, ("–" if text == "-" else text, spread(value, metric))))
                assert cell.removesuffix("(best)").strip() == said
                checked += 1
    assert checked > 20


def test_the_best_is_marked_among_candidates_only() -> None:
    result = reported.result("steps")
    rows = {row[0]: row for row in Outline(reported.page_of("steps")).rows if row}
    assert references(result.scenario) == ["random"]
    assert not any(
        "(best)" in cell
        for row in Outline(reported.page_of("steps")).rows
        if row and row[0] == "random"
        for cell in row
    )
    assert "random" in rows and "(best)" in reported.page_of("steps")


def test_every_metric_has_a_meaning() -> None:
    for metric in (*METRICS, *SERVICE_METRICS):
        assert MEANINGS[metric.name][1], metric.name


def test_equal_runs_give_equal_pages(tmp_path: Path, kind: str) -> None:
    result = reported.result(kind)
    if kind == "pipelined":  # one kind is enough: a page takes seconds
        folder = store.write(result, tmp_path)
        again = pages.page(store.read(folder), command="python -m sim.run 'a b.yaml' --set name=<x>")
        assert again == reported.page_of(kind), "from the stored run, byte for byte"
    assert not re.search(r"20\d\d-\d\d-\d\dT|object at 0x", reported.page_of(kind))


def test_figures_take_the_pages_colours() -> None:
    page = reported.page_of("steps")
    assert page.count("<svg") >= 6 and page.count('role="img"') == page.count("<svg")
    assert "#010203" not in page and "currentColor" in page and "DejaVu" not in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert re.match(r'<svg role="img" aria-label="[^"]{20,}" viewBox=', svg)
    drawn = [title for title, _ in SHOWN.values() if f"<h3>{title}</h3>" in page]
    assert {
        "What each policy gives and takes",
        "Where the time of a step goes",
        "What moving experts costs and brings",
    } <= set(drawn)
    assert "How long requests wait" in reported.page_of("serving")


def test_a_figures_ids_and_rules_stay_its_own() -> None:
    svg = (
        '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="1pt" height="2pt" viewBox="0 0 1 2" version="1.1">'
        '<style type="text/css">*{stroke: red}</style><g id="unused"><path id="m" d="M 1.23456 2" style="fill: #ffffff"/>'
        '<use xlink:href="#m" clip-path="url(#m)" style="stroke: #010203"/><text style="fill: #ffffff">a</text></g></svg>'
    )
    made = inline(svg, "x", 'a "label"')
    assert made == (
        '<svg role="img" aria-label="a &quot;label&quot;" viewBox="0 0 1 2"><g><path id="x-m" d="M 1.23 2" '
        'style="fill: var(--paper)"/><use href="#x-m" clip-path="url(#x-m)" style="stroke: currentColor"/>'
        '<text style="fill: #ffffff">a</text></g></svg>'
    )


# --- the verdict ---


def with_times(times: dict[str, list[float]]) -> Result:
    """A result of the steps kind whose policies took ``times`` (one per replica) in every step."""
    base = reported.result("pipelined")
    policies = tuple(base.scenario.policies[0].model_copy(update={"name": name}) for name in times)
    scenario = base.scenario.model_copy(update={"policies": policies, "replicas": len(next(iter(times.values())))})
    table: dict[str, list[Any]] = {"policy": [], "replica": [], "step": [], "step_time_s": [], "kept_affinity": []}
    for name, values_s in times.items():
        for i, time_s in enumerate(values_s):
            for column, value in zip(table.values(), (name, i, 0, time_s, 1.0 if name == "slow" else 0.9), strict=True):
                column.append(value)
    tables = {"steps": table}
    return Result(scenario, tables, summarise(tables, scenario), 0)


def test_a_clear_winner_is_named_with_its_margin() -> None:
    answer = verdict(with_times({"slow": [2.0, 2.1, 2.2], "quick": [1.0, 1.1, 1.2]}))
    assert answer.winners == ("quick",) and answer.metric == "step_time_s"
    assert "“quick” has the shortest step" in answer.sentences[0]
    assert "48 % less than “slow”" in answer.sentences[0] and "1000 ms in every replica" in answer.sentences[0]
    (kept,) = (price for price in answer.prices if price.metric == "kept_affinity")
    assert kept.value == "0.9000" and kept.others == "best: 1.0000, slow"


def test_what_an_interval_covers_is_not_told_apart() -> None:
    answer = verdict(with_times({"a": [1.0, 1.2, 1.1], "b": [1.1, 1.1, 1.08], "far": [9.0, 9.1, 9.2]}))
    assert set(answer.winners) == {"a", "b"}
    assert answer.sentences[0].startswith("This run cannot tell") and "“far”" in answer.sentences[1]
    paired = verdict(with_times({"a": [1.0, 2.0, 3.0], "b": [1.1, 2.1, 3.1]}))
    assert paired.winners == ("a",), "common random numbers: the difference is sharp though the means are not"


def test_one_replica_and_one_policy_claim_no_interval() -> None:
    answer = verdict(with_times({"slow": [2.0], "quick": [1.0]}))
    assert answer.winners == ("quick",) and "±" not in " ".join(answer.sentences)
    assert answer.sentences[-1].startswith("One replica: no interval")
    assert "no other policy" in verdict(with_times({"only": [1.0, 1.1]})).sentences[0]
    assert "are equal" in verdict(with_times({"a": [1.0, 1.5], "b": [1.0, 1.5]})).sentences[0]
    assert verdict(with_times({"a": [math.nan]})).winners == ()


def test_a_yardstick_does_not_win() -> None:
    result = reported.result("steps")
    assert "random" not in verdict(result).winners and "random" in verdict(result).aside
    alone = result.scenario.model_copy(update={"policies": result.scenario.policies[-1:]})
    tables = {
        "steps": {
            k: [x for x, n in zip(v, result.tables["steps"]["policy"], strict=True) if n == "random"]
            for k, v in result.tables["steps"].items()
        }
    }
    assert verdict(Result(alone, tables, summarise(tables, alone), 0)).winners == ("random",), (
        "unless there is nobody else"
    )


# --- how far it can be trusted ---


@pytest.mark.parametrize("name", ["v3", "hardware", "v3_day", "qwen3_30b_ep2", "aux_loss", "dense"])
def test_constants_have_a_status_and_a_source(name: str) -> None:
    scenario = load(SCENARIOS / f"{name}.yaml")
    statuses = {row.status for _, rows in evidence.constants(scenario) for row in rows}
    assert statuses <= {"measured", "derived", "transferred", "calibrated", "data sheet", "stated"}
    assert all(row.source and row.used_for for _, rows in evidence.constants(scenario) for row in rows)
    assert evidence.assumptions(scenario) and evidence.checks(scenario)
    if name == "aux_loss":
        assert any("pull-back" in line for line in evidence.assumptions(scenario))


def test_checks_are_groups_of_the_validation() -> None:
    from sim.validation import groups

    known = set(groups())
    for path in SCENARIOS.glob("*.yaml"):
        if path.stem != "replay":
            assert {check.group for check in evidence.checks(load(path))} <= known
