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
from sim.contest import leading_metric, yardsticks
from sim.gating.select import Select
from sim.loading import load
from sim.plugin import make
from sim.report import drawings as drawn
from sim.report import evidence, serving, steps
from sim.report import html as pages
from sim.report.drawings import SHOWN, inline
from sim.report.grids import against_first, columns, number, spread, values
from sim.report.meanings import MEANINGS
from sim.report.verdict import verdict
from sim.requests.saturated import Saturated
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
    assert yardsticks(result.scenario) == {"random"}
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


NAMES = ("gamma=0.0012 #333333", "font: 9px mine; #010203", r"a$\frac$b", "$x^2$", 'id="m" href="#m" url(#m)')


def figure_of_names(result: Any, *, width_in: float = 7.0) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width_in, 3))
    axes.plot([0.0, 0.005], [0.0, 1.518], color="#333333")
    axes.set_xticks([0.0, 0.0025, 0.005])
    axes.set_yticks([0.0, 1.518])
    for i, name in enumerate(NAMES):
        axes.text(0.001 * i, 0.1 + 0.2 * i, name)
    return figure


def test_a_figures_text_is_as_it_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and ticks say what Matplotlib wrote; only the tags around them are shortened and recoloured."""
    from analysis import figures

    raw: list[str] = []
    monkeypatch.setattr(drawn, "inline", lambda svg, *rest: raw.append(svg) or inline(svg, *rest))
    monkeypatch.setattr(drawn, "SHOWN", {"tradeoff": SHOWN["tradeoff"]})
    monkeypatch.setitem(figures.ALL, "tradeoff", figure_of_names)
    (made,) = drawn.drawings(reported.result("pipelined"))
    for before, after in zip(raw, (made.wide, made.narrow), strict=True):
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", after)
        assert texts == re.findall(r"<text[^>]*>([^<]*)</text>", before)
        said = [html.unescape(text) for text in texts]
        assert said[-len(NAMES) :] == list(NAMES) and {"0.0025", "0.0050", "1.518"} <= set(said)
        tags = "".join(re.findall(r"<[^>]*>", after))
        assert not re.search(r"\.\d{3}", tags) and "#333333" not in tags and "currentColor" in tags


def test_only_a_figure_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from analysis import figures
    from analysis.style import Unfit

    def fails(error: Exception) -> Any:
        def draw(result: Any, *, width_in: float = 7.0) -> Any:
            raise error

        return draw

    monkeypatch.setattr(drawn, "SHOWN", {"tradeoff": SHOWN["tradeoff"]})
    monkeypatch.setitem(figures.ALL, "tradeoff", fails(Unfit("no dot to draw")))
    assert drawn.drawings(reported.result("pipelined")) == []
    for error in (ValueError("a bug"), KeyError("a bug")):
        monkeypatch.setitem(figures.ALL, "tradeoff", fails(error))
        with pytest.raises(type(error), match="a bug"):
            drawn.drawings(reported.result("pipelined"))


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


def with_figures(kind: str, metric: str, figures: dict[str, list[float]], **more: list[float]) -> Result:
    """A result of a kind with ``figures`` of the metric, by policy and replica, and ``more`` metrics by policy."""
    base = reported.result("pipelined" if kind == "steps" else kind)
    policies = tuple(base.scenario.policies[0].model_copy(update={"name": name}) for name in figures)
    scenario = base.scenario.model_copy(update={"policies": policies, "replicas": len(next(iter(figures.values())))})
    table: dict[str, list[Any]] = {name: [] for name in ("policy", "replica", "step", metric, *more)}
    for i, (name, found) in enumerate(figures.items()):
        for replica, value in enumerate(found):
            row = (name, replica, 0, value, *(other[i] for other in more.values()))
            for column, one in zip(table.values(), row, strict=True):
                column.append(one)
    return retold(Result(scenario, {"steps" if kind == "steps" else "service": table}, {}, 0))


def retold(result: Result, **changes: Any) -> Result:
    """The result with changes of its scenario, summarised."""
    scenario = result.scenario.model_copy(update=changes)
    return Result(scenario, result.tables, summarise(result.tables, scenario), 0)


def test_more_is_better_where_it_is() -> None:
    answer = verdict(with_figures("serving", "goodput_share", {"few": [0.5, 0.51, 0.52], "many": [0.8, 0.81, 0.82]}))
    assert answer.metric == "goodput_share" and answer.winners == ("many",)
    assert "most requests within the SLO" in answer.sentences[0] and "59 % more than “few”" in answer.sentences[0]


def test_every_kind_of_run_has_its_contest() -> None:
    result = with_figures("serving", "tpot_mean_s", {"quick": [1.0, 1.1], "slow": [2.0, 2.1]})
    serving = result.scenario.serving
    assert serving is not None and leading_metric(result.scenario) == "goodput_share"
    free = retold(result, serving=serving.model_copy(update={"slo": type(serving.slo)()}))
    assert verdict(free).metric == leading_metric(free.scenario) == "tpot_mean_s" and verdict(free).winners == (
        "quick",
    )
    prefill = serving.model_copy(update={"units": (serving.units[0].model_copy(update={"role": "prefill"}),)})
    assert (
        leading_metric(retold(result, serving=prefill.model_copy(update={"slo": type(serving.slo)()})).scenario)
        == "ttft_mean_s"
    )

    yields = with_figures("serving", "output_tokens_per_s_per_gpu", {"low": [1.0, 1.1], "high": [2.0, 2.1]})
    full = Saturated(count=8, input_tokens=8, output_tokens=8)
    filled = retold(yields, serving=serving.model_copy(update={"requests": full}))
    assert verdict(filled).metric == leading_metric(filled.scenario) == "output_tokens_per_s_per_gpu"
    assert verdict(filled).winners == ("high",)
    assert (
        leading_metric(retold(yields, serving=prefill.model_copy(update={"requests": full})).scenario)
        == "input_tokens_per_s_per_gpu"
    )

    rates = with_figures("steps", "tokens_per_s_per_gpu", {"low": [1.0, 1.1], "high": [2.0, 2.1]})
    own = tuple(p.model_copy(update={"parallel": rates.scenario.parallel}) for p in rates.scenario.policies)
    assert verdict(retold(rates, policies=own)).winners == ("high",)
    untimed = rates.scenario.steps.model_copy(update={"timed": "none"})
    assert leading_metric(rates.scenario.model_copy(update={"steps": untimed})) == "max_vio_batch"


def test_moves_count_and_who_moves_nothing_takes_a_steps_time() -> None:
    result = with_figures(
        "steps", "step_time_s", {"stays": [1.0, 1.0], "moves": [0.9, 0.9]}, step_and_moves_s=[math.nan, 1.5]
    )
    assert leading_metric(result.scenario) == "step_time_s" and verdict(result).winners == ("moves",)
    rule = result.scenario.policies[1].rebalance.model_copy(update={"interval_steps": 2})
    moving = (result.scenario.policies[0], result.scenario.policies[1].model_copy(update={"rebalance": rule}))
    answer = verdict(retold(result, policies=moving))
    assert answer.metric == "step_and_moves_s" and answer.winners == ("stays",)


def test_yardsticks_are_gates_that_nobody_would_deploy() -> None:
    base = reported.result("pipelined").scenario
    chosen = ("random", "balanced", "hash", "recorded", "topk")
    found = tuple(base.policies[0].model_copy(update={"name": k, "select": make(Select, k)}) for k in chosen)
    assert yardsticks(base.model_copy(update={"policies": found})) == {"random", "balanced"}


def test_a_policy_without_the_figure_is_named() -> None:
    answer = verdict(with_times({"a": [1.0, 1.1], "lost": [math.nan, 1.0]}))
    assert answer.winners == ("a",) and "no other policy" not in " ".join(answer.sentences)
    assert "No other candidate has one" in answer.sentences[0]
    assert answer.asides == ("lost: not compared, for lack of a value of “step” in every replica.",)
    three = verdict(with_times({"lost": [math.nan, 1.0], "c": [3.0, 3.1], "a": [1.0, 1.1], "b": [2.0, 2.1]}))
    assert three.winners == ("a",) and "first policy" not in " ".join(three.sentences)


def test_equal_is_said_of_equals_only() -> None:
    answer = verdict(with_times({"a": [1.0, 1.5, 1.2], "b": [1.0, 1.5, 1.2], "c": [1.3, 1.25, 1.2]}))
    assert set(answer.winners) == {"a", "b", "c"} and "are equal" not in answer.sentences[0]
    assert answer.sentences[0].startswith("This run cannot tell “a” from “b” or “c”")
    assert "against “c” is" in answer.sentences[0]


def test_the_first_policy_is_the_reference_where_it_competes() -> None:
    answer = verdict(with_times({"first": [3.0, 3.1], "a": [1.0, 1.1], "b": [2.0, 2.1]}))
    assert answer.sentences[1].startswith("Against the first policy it is 66 % less than “first”")


def test_many_rivals_take_more_evidence() -> None:
    """A difference that 95 % leave out alone, but not beside 19 rivals (Bonferroni: 2.78 and 6.58 standard errors)."""
    noise = [-0.3, -0.1, 0.0, 0.1, 0.3]
    best, close = [1.0] * 5, [1.0 + 0.4 + x for x in noise]  # 4 standard errors apart
    two = verdict(with_times({"best": best, "close": close}))
    assert two.winners == ("best",) and two.method.endswith("leaves out 0.")
    many = verdict(with_times({"best": best, "close": close} | {f"far {i}": [9.0] * 5 for i in range(18)}))
    assert many.winners == ("best", "close")
    assert "all 19 rivals" in many.method and "Bonferroni: 99.74 % each" in many.method
    assert verdict(with_times({"a": [1.0], "b": [2.0]})).method == ""


def test_a_hundred_equals_are_counted() -> None:
    answer = verdict(with_times({f"p{i}": [1.0, 1.5] for i in range(100)}))
    assert "and 97 others are equal" in answer.sentences[0] and len(answer.sentences[0]) < 200


@pytest.mark.parametrize(("metric", "best"), [("kept_affinity", "0.9000"), ("memory_bytes", "1.000 GB")])
def test_prices_know_which_way_is_better(metric: str, best: str) -> None:
    more = {"kept_affinity": [0.5, 0.9, 0.7], "memory_bytes": [2e9, 1e9, 3e9]}
    answer = verdict(with_figures("steps", "step_time_s", {n: [float(i)] * 2 for i, n in enumerate("abc", 1)}, **more))
    (price,) = (price for price in answer.prices if price.metric == metric)
    assert answer.winners == ("a",) and price.others == f"best: {best}, b"


def test_the_best_of_a_column_is_the_best() -> None:
    more = {"kept_affinity": [0.5, 0.9, 0.7], "memory_bytes": [2e9, 1e9, 3e9]}
    result = with_figures("steps", "step_time_s", {n: [float(i)] * 2 for i, n in enumerate("abc", 1)}, **more)
    metrics = {metric.name: metric for metric in METRICS}
    found = values(result)
    marked = {name: pages._best(result, metrics[name], found) for name in (*more, "step_time_s", "max_vio_batch_floor")}
    assert marked == {"kept_affinity": ["b"], "memory_bytes": ["b"], "step_time_s": ["a"], "max_vio_batch_floor": []}


def test_the_difference_is_a_share_of_the_first_policy() -> None:
    result = with_figures("steps", "step_time_s", {"first": [2.0, 2.0], "other": [3.0, 3.2]})
    found = values(result)
    assert against_first(found["other", "step_time_s"], False) == "+55.0 % ±63.5"
    assert against_first(found["first", "step_time_s"], True) == "-"


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
    assert "random" not in verdict(result).winners and "random" in verdict(result).asides[0]
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
