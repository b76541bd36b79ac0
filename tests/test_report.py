"""The page of a run and the comparison of runs: well-formed, escaped, the summary's own numbers, the same bytes again."""

from __future__ import annotations

import hashlib
import html
import itertools
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")


import numpy as np
import pytest

from sim import store
from sim.loading import load
from sim.report import evidence, serving, steps
from sim.report import html as pages
from sim.report.__main__ import found, main
from sim.report.compare import changed_keys, compare, unpaired
from sim.report.differences import compared, text
from sim.report.drawings import SHOWN, inline
from sim.report.grids import columns, number, spread, values
from sim.report.meanings import MEANINGS
from sim.report.verdict import references, verdict
from sim.results import METRICS, SERVICE_METRICS, Result, summarise
from tests import reported

SCENARIOS = Path(__file__).resolve().parents[1] / "scenarios"
VOID = {"meta", "link", "img", "br", "hr", "input", "source"}


class Outline(HTMLParser):
    """Open tags must close in order; headings, ids, links and table cells are kept."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.handlers: list[str] = []
        self.rows: list[list[str]] = []
        self.cell: list[str] | None = None
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.tags.add(tag)
        self.handlers += [name for name in known if name.startswith("on")]
        self.ids += [known["id"] or ""] if "id" in known else []
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.cell = []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing, line {self.getpos()[0]}"
        if tag in ("th", "td") and self.cell is not None:
            self.rows[-1].append(" ".join("".join(self.cell).split()))
            self.cell = None

    def handle_data(self, data: str) -> None:
        if self.cell is not None:
            self.cell.append(data)


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


# --- comparison ---


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stored runs: a base, one with another topk_group, one with another seed."""
    out, policies = tmp_path_factory.mktemp("runs"), [{"name": "a"}, {"name": "b", "select": "group_limited"}]
    changes: dict[str, dict[str, Any]] = {
        "base": {},
        "wider": {"policies__1__select__topk_group": 2},
        "seed": {"seed": 7},
    }
    runs = {}
    for name, change in changes.items():
        result = reported.run(steps__count=1, policies=policies, **change)
        runs[name] = store.write(result, out)
    return runs


def test_differences_are_paired_where_tokens_are_the_same(three: dict[str, Path]) -> None:
    results = {name: store.read(folder) for name, folder in three.items()}
    frame = compare(results)
    wider, seed = frame[frame.run == "wider"], frame[frame.run == "seed"]
    assert wider.paired.all() and not seed.paired.any()
    same = wider[wider.policy == "a"]
    assert (same.difference == 0).all() and (same.half_width == 0).all(), "policy a is the same in both"
    (row,) = wider[(wider.policy == "b") & (wider.metric == "kept_affinity")].to_dict("records")
    mine, theirs = (
        r.summary().set_index(["policy", "metric"]).loc[("b", "kept_affinity"), "mean"]
        for r in (results["base"], results["wider"])
    )
    assert row["reference"] == mine and row["value"] == theirs and row["difference"] == pytest.approx(theirs - mine)
    assert row["value"] == 1.0, "two groups of two limit nothing"
    assert unpaired(results["base"], results["seed"]) == "seed" and not unpaired(results["base"], results["wider"])


def test_welchs_interval_of_independent_runs(three: dict[str, Path]) -> None:
    from scipy.stats import ttest_ind

    from sim.report.compare import _welch

    a, b = np.array([1.0, 2.0, 4.0]), np.array([3.0, 3.5, 9.0, 4.0])
    interval = ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    assert _welch(a, b) == pytest.approx((interval.high - interval.low) / 2)


def test_what_differs_in_the_scenarios_is_named(three: dict[str, Path]) -> None:
    results = {name: store.read(folder) for name, folder in three.items()}
    keys = dict(changed_keys(results))
    assert keys == {"seed": ["0", "0", "7"], "policies.b.select.topk_group": ["1", "2", "1"]}
    versions = [store.manifest_of(folder)["versions"] for folder in three.values()]
    said = text(compared(results, [versions[0], versions[1] | {"numpy": "0.1"}, versions[2]]), list(results))
    assert "policies.b.select.topk_group" in said and "numpy" in said and "same seed and traffic as base" in said
    assert "seed: seed is not that of base" in said


def test_unlike_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two"):
        compare({"a": reported.result("steps")})
    with pytest.raises(ValueError, match="serves requests"):
        compare({"a": reported.result("steps"), "b": reported.result("serving")})


# --- the command ---


def test_the_command_writes_a_page_into_the_run(
    three: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = three["base"]
    before = json.loads((folder / "manifest.json").read_text())
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    manifest = json.loads((folder / "manifest.json").read_text())
    page = (folder / "report.html").read_bytes()
    assert manifest["sha256"].pop("report.html") == hashlib.sha256(page).hexdigest()
    assert manifest == before and store.read(folder).n_events == before["events"]
    assert {path.name for path in folder.iterdir()} == {*before["sha256"], "manifest.json", "report.html"}
    out = tmp_path / "c.html"
    assert main(["--compare", str(folder), str(three["wider"]), "--out", str(out)]) == 0
    assert "policies.b.select.topk_group" in capsys.readouterr().out
    outline = Outline(out.read_text(encoding="utf-8"))
    assert "policies.b.select.topk_group" in [row[0] for row in outline.rows]


def test_a_scenarios_folder_stands_for_its_newest_run(
    three: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    os.utime(three["seed"] / "manifest.json", (2e9, 2e9))
    assert found(str(three["seed"].parent)) == three["seed"]
    assert "3 runs; taking the one written last" in capsys.readouterr().err
    assert found(str(three["base"])) == three["base"]


def test_bad_input_is_refused_and_nothing_written(
    three: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "tiny" / "broken"
    shutil.copytree(three["base"], broken)
    (broken / "steps.parquet").write_bytes(b"PAR1 no more")
    for argv, says in (
        ([str(tmp_path / "tinny")], "did you mean tiny?"),
        ([str(tmp_path)], "no run is stored here"),
        ([str(broken)], "steps.parquet is not the file"),
        (["--compare", str(three["base"])], "at least two"),
        (["--compare", str(three["base"]), str(three["base"])], "given twice"),
        ([str(three["base"]), str(three["wider"]), "--out", str(tmp_path / "x.html")], "names one page"),
        ([str(three["base"]), "--out", str(tmp_path / "no" / "x.html")], "there is no folder"),
    ):
        assert main(argv) == 2, argv
        err = capsys.readouterr().err
        assert says in err and "Traceback" not in err
    (broken / "manifest.json").write_text("{", encoding="utf-8")
    assert main([str(broken)]) == 2 and "damaged" in capsys.readouterr().err
    (broken / "manifest.json").write_text(json.dumps({"events": 1}), encoding="utf-8")
    assert main([str(broken)]) == 2 and "damaged" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))


def test_extras_are_part_of_the_run(tmp_path: Path) -> None:
    result = reported.result("pipelined")
    folder = store.write(result, tmp_path, extras={"report.html": b"<p>", "timeline.json.gz": b"\x1f"})
    manifest = store.manifest_of(folder)
    assert {"report.html", "timeline.json.gz"} <= set(manifest["sha256"])
    assert (folder / "report.html").read_bytes() == b"<p>"
    assert set(store.read(folder).tables) == set(result.tables)
