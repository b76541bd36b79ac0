"""Which points a design tries: all, side by side, one in each stratum, an even share of every half."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.designs import MAX_POINTS, Axis, Design, steps
from sim.designs.block import SweepBlock
from sim.located import Mark, ScenarioError, validate
from sim.plugin import make, members
from sim.sweeping.axes import from_mapping, from_texts

UNIT = (Axis("a", low=0.0, high=1.0), Axis("b", low=0.0, high=1.0), Axis("c", low=0.0, high=1.0))


def choose(kind: str, axes: Any, points: int | None = None, seed: int = 0) -> list[tuple[Any, ...]]:
    return make(Design, kind).choose(axes, points, seed)


def axis(text: str) -> Axis:
    return from_texts([text])[0].axis


# --- what designs promise ---


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_a_grid_holds_every_combination_once(sizes: list[int]) -> None:
    axes = [Axis(f"k{i}", tuple(range(size))) for i, size in enumerate(sizes)]
    found = choose("grid", axes)
    assert len(found) == len(set(found)) == np.prod(sizes)
    assert found == sorted(itertools.product(*(range(size) for size in sizes)))


@given(st.integers(1, 40), st.integers(0, 5))
def test_a_latin_hypercube_has_one_point_in_each_stratum_of_each_axis(n: int, seed: int) -> None:
    found = np.array(choose("latin_hypercube", UNIT, n, seed))
    strata = np.sort(np.floor(found * n).astype(int), axis=0)
    assert (strata == np.arange(n)[:, None]).all()


def test_independent_draws_would_miss_strata() -> None:
    """The negative control of the test above."""
    drawn = np.random.default_rng(0).random((40, 3))
    assert (np.sort(np.floor(drawn * 40), axis=0) != np.arange(40)[:, None]).any()


@given(st.integers(1, 7), st.integers(0, 5))
def test_sobol_points_fall_evenly_into_every_dyadic_part(power: int, seed: int) -> None:
    n = 2**power
    found = np.array(choose("sobol", UNIT, n, seed))
    for parts in (2**p for p in range(1, power + 1)):
        counts = [np.bincount(np.floor(found[:, i] * parts).astype(int), minlength=parts) for i in range(3)]
        assert (np.array(counts) == n // parts).all()


def test_sobol_balances_pairs_of_axes_too() -> None:
    found = np.array(choose("sobol", UNIT[:2], 64))
    cells = np.floor(found * 8).astype(int)
    assert (np.bincount(cells[:, 0] * 8 + cells[:, 1], minlength=64) == 1).all()


@pytest.mark.parametrize("kind", ["latin_hypercube", "sobol"])
def test_drawn_points_come_from_the_seed_alone(kind: str) -> None:
    assert choose(kind, UNIT, 8, 3) == choose(kind, UNIT, 8, 3) != choose(kind, UNIT, 8, 4)


@pytest.mark.parametrize("kind", ["latin_hypercube", "sobol"])
def test_values_share_the_axis_evenly_and_equal_points_are_one(kind: str) -> None:
    found = choose(kind, [Axis("a", (1, 2, 4, 8)), Axis("b", low=0.0, high=1.0)], 32)
    assert [sum(a == value for a, _ in found) for value in (1, 2, 4, 8)] == [8] * 4
    few = choose(kind, [Axis("a", (1, 2)), Axis("b", ("x", "y"))], 32)
    assert sorted(few) == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]


def test_every_design_is_tested_here_and_seeded_by_name() -> None:
    own = {kind for kind, cls in members(Design).items() if cls.__module__.startswith("sim.designs.")}
    assert own == {"grid", "list", "latin_hypercube", "sobol"}


# --- axes ---


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("k=1:4", (1, 2, 3, 4)),
        ("k=1:8:3", (1, 4, 7)),
        ("k=4,8,16", (4, 8, 16)),
        ("k=0:1:0.25", (0.0, 0.25, 0.5, 0.75, 1.0)),
        ("k=0.1:0.5:0.1", (0.1, 0.2, 0.3, 0.4, 0.5)),
        ("k=a.yaml,b/c.yaml", ("a.yaml", "b/c.yaml")),
        ("k=null,4", (None, 4)),
        ("k=true,false", (True, False)),
        ("k=50 GB/s,'1,5'", ("50 GB/s", "1,5")),
        ("k={kind: topk},{kind: group_limited, topk_group: 2}", ({"kind": "topk"}, {"kind": "group_limited", "topk_group": 2})),
        ("k=7", (7,)),
        ("k=1:1e1:3e0", (1, 4, 7, 10)),
        ("k=1:2.0:1", (1.0, 2.0)),
    ],
)  # fmt: skip
def test_what_vary_means(text: str, values: tuple[Any, ...]) -> None:
    (point,) = zip(*choose("grid", [axis(text)]), strict=True)
    assert repr(point) == repr(values)


def test_ranges_are_drawn_from_end_to_end() -> None:
    u = np.linspace(0, 1, 1001)[:-1]
    assert set(axis("k=1:8").at(u)) == set(range(1, 9))
    assert np.allclose(np.histogram(axis("k=0.5:2.5").at(u), bins=4)[0], 250, atol=1)
    decades = np.log10(axis("k=1e-4:1e-1:log").at(u))
    assert decades.min() == -4 and decades.max() < -1 and np.allclose(np.histogram(decades, bins=3)[0], 333, atol=1)
    whole = axis("k=1:64:log").at(u)
    assert set(map(type, whole)) == {int} and min(whole) == 1 and max(whole) == 64


@given(st.integers(-50, 50), st.integers(0, 50), st.sampled_from([0.1, 0.25, 0.3, 1.0]))
def test_steps_end_within_a_step_of_the_end(low: int, more: int, step: float) -> None:
    found = steps(low, low + more, step)
    assert found[0] == low and found[-1] <= low + more + 1e-9 and low + more - found[-1] < step
    assert np.allclose(np.diff(found), step)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("k", "--vary 'k': must be written key=value,value or key=low:high"),
        ("=1,2", "--vary '=1,2': must be written key=value,value or key=low:high"),
        ("k=", "--vary k: needs values, e.g. 1:8 or 4,8,16"),
        ("k=8:1", "--vary k: high must be at least low = 8"),
        ("k=0:1:log", "--vary k: low must be > 0 with log"),
        ("k=1:2:0", "--vary k: step Input should be greater than 0"),
        ("k=1,2,1", "--vary k: is there twice [got 1]"),
        ("k=[1", "--vary k: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("k..l=1", "--vary k..l: k..l: has an empty key"),
        ("k=1] # x", "--vary k: not valid YAML: "),
        ("k=1]: [2", "--vary k: keys must be text, not lists or mappings"),
        ("sweep.seed=1,2", "--vary sweep.seed: is of the sweep itself, not of its points"),
    ],
)
def test_bad_axes(text: str, complaint: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        from_texts([text])
    assert str(caught.value).startswith(complaint) and len(caught.value.problems) == 1


def test_bad_axes_of_python() -> None:
    with pytest.raises(ValueError, match=r"keys must be text such as 'cluster\.nodes' \[got 3\]"):
        from_mapping({3: [1, 2]})  # type: ignore[dict-item]
    for values in ({1, 2}, frozenset({1})):
        with pytest.raises(ScenarioError, match="--vary k: a set has no order: give a list"):
            from_mapping({"k": values})


def test_all_bad_axes_are_named_at_once() -> None:
    with pytest.raises(ScenarioError) as caught:
        from_texts(["a=", "b=8:1"])
    assert len(caught.value.problems) == 2
    with pytest.raises(ScenarioError, match="--vary a: is there twice"):
        from_texts(["a=1", "a=2"])


@pytest.mark.parametrize(
    ("kind", "axes", "points", "complaint"),
    [
        ("grid", ["a=0.1:0.9"], None, "a: 0.1 to 0.9 is a range without a step"),
        ("grid", ["a=1:4"], 8, "points = 8: grid has as many points as the axes give"),
        ("grid", ["a=1:200", "b=1:200"], None, f"40000 points exceed {MAX_POINTS}"),
        ("grid", ["a=1:1000000000"], None, f"1000000000 points exceed {MAX_POINTS}"),
        ("list", ["a=1:4", "b=1:3"], None, "one length: a has 4, b has 3"),
        ("sobol", ["a=1:4"], None, "sobol draws points: say how many"),
        ("sobol", ["a=1:4"], 100, "powers of two only: 64 or 128"),
        ("latin_hypercube", ["a=1:4"], 10**9, "points exceed"),
    ],
)
def test_designs_that_cannot_be(kind: str, axes: list[str], points: int | None, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        choose(kind, [varied.axis for varied in from_texts(axes)], points)


def test_python_values_are_what_the_command_line_says() -> None:
    written = from_texts(["a=1:4", "b=2,4", "c=0.1:0.9", "d=1:9:2", "e=x,y"])
    given = from_mapping(
        {"a": {"low": 1, "high": 4}, "b": np.array([2, 4]), "c": "0.1:0.9", "d": (1, 3, 5, 7, 9), "e": ["x", "y"]}
    )
    assert [v.axis for v in written] == [v.axis for v in given]


def test_the_block_of_a_file() -> None:
    block = SweepBlock.model_validate(
        {"vary": {"a": [1, 2], "b": {"low": 1, "high": 8}, "c": "1:3"}, "design": "sobol", "points": 8}
    )
    assert block.design.kind == "sobol" and len(block.vary) == 3
    with pytest.raises(ScenarioError) as caught:
        validate(
            SweepBlock,
            {"vary": {"a": {"lo": 1, "high": 2}, "b": [], "c": 3, "d": {"low": 2, "high": 1}}, "design": "sobl"},
            {(): Mark("x.yaml", 1, 1)},
        )
    text = str(caught.value)
    for part in ("vary.a.lo: unknown key", "did you mean low?", "vary.b: must have at least 1", "vary.c: must be a list", "vary.d.high: must be at least low = 2", "did you mean sobol?"):  # fmt: skip
        assert part in text
