"""Every notebook runs as committed, and its texts and tables come out with the same numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest

import sim
from analysis import notebooks, stories, validated
from sim.results import Result
from sim.validation import Figure

FOLDER = Path(notebooks.__file__).parent
NAMES = notebooks.notebooks()
LARGEST_BYTES = 1_500_000


@pytest.fixture(scope="module")
def executed() -> dict[str, notebooks.Execution]:
    """All of them at once, a kernel for each core."""
    return {run.name: run for run in notebooks.executed(NAMES)}


def test_the_seven_stories_are_there() -> None:
    assert set(NAMES) == {
        "balance_dynamics",
        "placement_and_replication",
        "policy_tradeoffs",
        "serving",
        "specialisation",
        "validation",
        "your_own_policy",
    }


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_as_committed(executed: dict[str, notebooks.Execution], name: str) -> None:
    run = executed[name]
    assert not run.error
    assert not list(notebooks.differences(run.committed, run.fresh)), f"python -m analysis.notebooks {name}, and commit"
    for before, after in zip(run.committed.cells, run.fresh.cells, strict=True):
        assert pictures(before) == pictures(after)


def pictures(cell: Any) -> int:
    return sum("image/png" in out.get("data", {}) for out in cell.get("outputs", []))


@pytest.mark.parametrize("name", NAMES)
def test_committed_notebook_is_clean(name: str) -> None:
    """Executed from top to bottom, small, valid, and free of times, paths, warnings and what else differs by machine."""
    path, notebook = FOLDER / f"{name}.ipynb", notebooks.read(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert path.stat().st_size < LARGEST_BYTES
    assert nbformat.writes(notebooks.normalised(notebooks.read(name))) == nbformat.writes(notebook)
    assert sum(map(pictures, code)) >= 2
    words = " ".join(text for cell in notebooks.texts(notebook) for text in cell)
    words += " ".join(cell.source for cell in notebook.cells)
    assert not re.search(r"/(work|tmp|home|root|Users)/", words)
    assert not [out for cell in code for out in cell.outputs if out.output_type == "stream" and out.name == "stderr"]


@pytest.mark.parametrize("name", NAMES)
def test_prose_claims_no_measured_number(name: str) -> None:
    """Decimals and percentages that a run could change belong to sentences that code makes; a source may be quoted."""
    claims = []
    for cell in notebooks.read(name).cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"arXiv \d+\.\d+|`[^`]*`", "", cell.source)
            claims += re.findall(r"\d+(?:\.\d+)? ?%|\d+\.\d+ (?:ms|s|GB)\b", text)
    assert not claims


def test_check_finds_a_changed_number_and_a_failing_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in ("print('found', 6 * 7)", "undefined")]
    one, two = (nbformat.v4.new_notebook(cells=part) for part in (cells[:1], cells))
    one.cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text="found 41\n")]
    for name, notebook in (("one", one), ("two", two)):
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    before = (tmp_path / "one.ipynb").read_bytes()
    assert notebooks.main(["--check"]) == 1
    err = capsys.readouterr().err
    assert "one: code cell 1: 41 is committed, 42 comes out" in err and "two: NameError" in err
    assert (tmp_path / "one.ipynb").read_bytes() == before
    assert notebooks.main(["one"]) == 0
    assert notebooks.numbers(notebooks.read("one")) == [[42.0]]
    assert notebooks.main(["three"]) == 2
    assert "NAME must be one of one, two [got 'three']" in capsys.readouterr().err


def test_check_finds_another_winner_with_the_same_numbers() -> None:
    def shown(text: str) -> Any:
        cell = nbformat.v4.new_code_cell("x", outputs=[nbformat.v4.new_output("stream", name="stdout", text=text)])
        return nbformat.v4.new_notebook(cells=[cell])

    old = shown("best: *eplb* by 3 % of 12 ms\n")
    assert list(notebooks.differences(old, shown("best: *linear* by 3 % of 12 ms\n"))) == [
        "code cell 1: *eplb* is committed, *linear* comes out"
    ]
    assert list(notebooks.differences(old, shown("best: *eplb* by 3 % of 12 ms now"))) == [
        "code cell 1: 8 words became 9"
    ]
    assert not list(notebooks.differences(old, shown("best:  *eplb* by 3.0 % of 12 ms"))), (
        "room and zeros are no matter"
    )
    assert notebooks.parser().parse_args(["serving", "--check"]).names == ["serving"]


@pytest.fixture(scope="module")
def result() -> Iterator[Result]:
    yield stories.run("tiny.yaml", {"replicas": 2, "steps.count": 2, "steps.warmup.steps": 4})


def test_a_table_has_the_summary_in_the_units_of_its_columns(result: Result) -> None:
    table = stories.table(result, ["step_time_s", "kept_affinity"])
    assert list(table.index) == [policy.name for policy in result.scenario.policies]
    assert table["step time [ms]"]["top-k"] == pytest.approx(
        1e3 * stories.value(result, "step_time_s", "top-k"), rel=1e-3
    )
    with pytest.raises(KeyError, match="no metric 'nothing'"):
        stories.table(result, ["nothing"])


def test_a_ranking_says_who_is_ahead_and_what_it_cannot_tell(result: Result) -> None:
    text = stories.ranking(result, "kept_affinity", leave_out=["random"]).data
    assert text.startswith("Best in kept affinity: **top-k** with 1.") and "random" not in text
    assert re.search(r"Behind it: .*\*group-limited \+ bias\* by \d", text)
    same = stories.ranking(result, "memory_bytes").data
    assert "cannot tell it from *top-k + bias*, *group-limited*, *group-limited + bias*, *random*" in same
    with pytest.raises(ValueError, match="has no better direction"):
        stories.ranking(result, "max_vio_batch_floor")
    with pytest.raises(ValueError, match="no policy of this result has mfu"):
        stories.ranking(result, "mfu")


def test_a_ranking_tells_apart_what_intervals_of_paired_differences_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-widths over three replicas: 4.303 s / sqrt(3); of b - a 0.1 +- 0.5, of c - a 1.03 +- 0.14."""
    values = {"a": [1.0, 2.0, 3.0], "b": [1.1, 2.3, 2.9], "c": [2.0, 3.0, 4.1]}
    monkeypatch.setattr(stories, "_replicas", lambda *_: {name: np.array(mine) for name, mine in values.items()})
    scenario = sim.load(stories.SCENARIOS / "tiny.yaml", ["replicas=3"])
    text = stories.ranking(Result(scenario, {}, {}, 0), "step_time_s").data
    assert "Best in step time: **a** with 2000 ms. This run cannot tell it from *b*." in text
    assert "Behind it: *c* by 52 % ± 7.2." in text


def test_sentences_carry_both_values_and_the_change(result: Result) -> None:
    text = stories.moved(result, "step_time_s", "random", "top-k")
    old, new, change = (float(number) for number in re.findall(r"[-+]?\d+\.\d+", text))
    assert text.startswith("step time from ") and " ms (" in text
    assert change == pytest.approx(100 * (new / old - 1), abs=0.2)


def test_without_leaves_a_policy_out_everywhere(result: Result) -> None:
    fewer = stories.without(result, "random")
    assert "random" not in [policy.name for policy in fewer.scenario.policies]
    assert "random" not in set(fewer.steps.policy) | set(fewer.summary().policy)
    assert stories.value(fewer, "step_time_s", "top-k") == stories.value(result, "step_time_s", "top-k")


def test_models_are_as_the_scenario_has_them() -> None:
    dense = sim.load(stories.SCENARIOS / "dense.yaml")
    table = stories.models(Result(dense, {}, {}, 0))
    assert table["parameters [1e9]"].tolist() == pytest.approx([671, 37, 671], rel=0.02)
    assert table["active [%]"].iloc[0] == pytest.approx(100 * 37.55 / 671.03, abs=0.05)


def test_levels_over_steps(result: Result) -> None:
    steps = result.steps
    mine = steps[steps.policy == "top-k"].groupby("step").max_vio.mean()
    assert stories.last_steps(result, 1)["top-k"] == pytest.approx(mine.iloc[-1])
    assert stories.highest(result)["top-k"] == pytest.approx(mine.max())
    assert stories.most_max_vio(result) == 32 / 4 - 1


def test_stored_validation_rows_read_back(tmp_path: Path) -> None:
    row = Figure("a | b", "source", 2.0, 2.2, 0.05, "ms", reason="known")
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"group": "g", "name": row.name, "error": 0.1, "passed": False} | {
        key: getattr(row, key) for key in ("source", "published", "ours", "bar", "unit", "absolute", "relation", "kind", "reason")
    }]))  # fmt: skip
    assert validated.stored_rows(path) == [("g", row)]
    assert (
        "| g: a / b | 2 ms | 2.2 | +10.00 % | 5 % | prediction, missed | source | known |"
        in validated.rows_table([("g", row)]).data
    )
    assert "0 of 1 predictions" in validated.coverage([("g", row)]).data
    table = validated.by_group([("g", row)])
    assert table.loc["g"].tolist() == pytest.approx([1, 0, 10, 10]) and not np.isnan(table.to_numpy(float)).any()
    path.write_text("[{}]")
    with pytest.raises(ValueError, match="prints"):
        validated.stored_rows(path)
