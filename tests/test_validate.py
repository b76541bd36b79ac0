"""``python -m sim.validate``: what a row means, that misses stay visible, and that the quick groups hold."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sim import validate, validation
from sim.validation import Figure, Inputs, balance, groups, training

ROOT = Path(__file__).resolve().parents[1]
INPUTS = Inputs(ROOT / "scenarios")
QUICK = ("gating", "geometry")


def figure(published: float, ours: float, bar: float, **more: object) -> Figure:
    return Figure(**({"name": "x", "source": "y", "published": published, "ours": ours, "bar": bar} | more))  # type: ignore[arg-type]


def test_a_row_passes_within_its_bar_only() -> None:
    assert figure(100, 104, 0.05).passed and not figure(100, 106, 0.05).passed and not figure(100, 94, 0.05).passed
    assert figure(100, 104, 0.05).error == pytest.approx(0.04)
    assert figure(0.5, 0.52, 0.03, absolute=True).passed and not figure(0.5, 0.54, 0.03, absolute=True).passed
    assert figure(0.01, 0.001, 0, relation="at_most").passed and not figure(0.01, 0.011, 0, relation="at_most").passed
    assert figure(50, 51, 0, relation="at_least").passed and not figure(50, 49, 0, relation="at_least").passed
    assert not figure(1, math.nan, 10).passed


@pytest.mark.parametrize("group", QUICK)
def test_every_figure_of_the_quick_groups_is_met(group: str) -> None:
    rows = list(groups()[group](INPUTS))
    assert len(rows) > 10 and len({row.name for row in rows if not row.name.startswith("the same")}) > 10
    assert [row.name for row in rows if not row.passed] == []
    assert all(row.source and 0 <= row.bar <= 0.25 for row in rows)


def test_balance_rows_on_shortened_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole group takes minutes; its levels are those of tests/test_published_balance.py and tests/test_feedback.py.
    Here: every row is there, one is calibrated on a paper and marked so, and ours comes from the runs."""
    few = ["steps.count=44", "traffic.tokens_per_rank=512"]
    monkeypatch.setattr(balance, "OVERRIDES", {"loss_free": few, "aux_loss": [*few, "replicas=1", "traffic.sequence_length=512"], "stability": ["steps.count=22", "model.num_hidden_layers=2"]})  # fmt: skip
    rows = {row.name: row for row in balance.figures(INPUTS)}
    assert len(rows) == 16 and all(math.isfinite(row.ours) and row.source for row in rows.values())
    fitted = [name for name, row in rows.items() if row.kind == "calibration"]
    assert "auxiliary loss, alpha = 0.001: MaxVio" in fitted and sum("collapse" in name for name in fitted) == 5
    assert len(fitted) == 6
    assert rows["u = 0.0001 is slow: MaxVio against u = 0.001"].passed
    assert not rows["loss-free, sign, u = 0.001: MaxVio"].passed, "44 steps are too few: the row can fail"


def test_training_steps_are_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """ISCA'25 Table 4 and the V2 report, with smaller pilots than the scenarios have; the split's misses stay misses."""
    few = ["steps.warmup.steps=20", "schedule.engine=max_plus"]
    monkeypatch.setattr(training, "OVERRIDES", {"v3_training": [*few, "steps.pilot_ranks=32"], "v2_training": [*few, "steps.pilot_ranks=8"], "dense_training": few})  # fmt: skip
    rows = {row.name: row for row in training.figures(INPUTS)}
    assert len(rows) == 19 and sum(row.kind == "prediction" for row in rows.values()) == 13
    held = ["step time", "1F1B", "tokens per day", "causal TFLOP/s", "causal MFU", "GPU hours per trillion tokens"]
    assert [name for name in held if not rows[f"V3 training: {name}"].passed] == []
    hours = ["V2 training: GPU hours per trillion tokens", "dense 67B training: GPU hours per trillion tokens"]
    assert all(row.passed for name, row in rows.items() if "bubble of" in name or name in hours)


def test_a_miss_stays_in_the_table_and_in_the_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        figure(1, 1.01, 0.05, name="good"),
        figure(1, 2, 0.05, name="bad", reason="the model knows no weather"),
        figure(1, 1, 0.05, name="fitted", kind="calibration"),
    ]
    monkeypatch.setattr(validation, "groups", lambda: {"demo": lambda inputs: iter(rows)})
    assert validate.main([]) == 0
    text = capsys.readouterr().out
    assert "MISS" in text and "+100.00 %" in text and "demo: bad: the model knows no weather" in text
    assert text.splitlines()[-1] == "1 of 2 predictions within their bars; 1 calibration rows"
    assert validate.main(["--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["passed"] for row in data] == [True, False, True] and data[1]["group"] == "demo"


def test_bad_calls_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, words in ((["--group", "geometri"], "must be one of"), (["--data", str(tmp_path / "no")], "is no folder")):
        assert validate.main(args) == 2
        captured = capsys.readouterr()
        assert words in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert validate.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == list(groups())
