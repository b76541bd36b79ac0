"""Intervals cover what they promise, refuse what they cannot, and know the closed forms of autoregressions."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import lfilter

from sim.loading import load
from sim.report.over_time import over_time
from sim.results import Result
from sim.scenario import Scenario
from sim.statistics import (
    MIN_TIMES,
    NotEnough,
    autocorrelation_time,
    batch_means,
    half_width,
    intervals,
    paired,
    steady,
    variance,
    warm_up,
)
from sim.tokens import F64

SCENARIOS = Path(__file__).resolve().parents[1] / "scenarios"


def autoregression(a: float, n: int, rng: np.random.Generator) -> F64:
    """AR(1) in steady state, of mean 0 and innovations of variance 1."""
    found: F64 = lfilter([1.0], [1.0, -a], rng.standard_normal(n + 500))[500:]
    return found


def tau_of(a: float) -> float:
    return (1 + a) / (1 - a)


# Over replicas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 5, 30])
def test_t_interval_covers_in_95_of_100(n: int) -> None:
    rng = np.random.Generator(np.random.Philox(n))
    hits = sum(abs(x.mean() - 7.0) <= half_width(x) for x in 7.0 + rng.standard_normal((1000, n)))
    assert 930 <= hits <= 970


def test_half_width_of_few_equal_and_missing_values() -> None:
    assert half_width([3.0, 3.0, 3.0]) == 0.0
    assert all(math.isnan(half_width(x)) for x in ([], [1.0], [1.0, math.nan, 2.0]))
    assert half_width([0.0, 1.0]) == pytest.approx(12.7062047 * 0.5)  # t of one degree of freedom


@given(
    st.lists(st.floats(-1.0, 1.0, width=32), min_size=2, max_size=30),
    st.sampled_from([0.0, 1.0, 1e6, 1e9]),
    st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_variance_against_fractions(values: list[float], offset: float, scale: float) -> None:
    x = offset + scale * np.array(values)
    exact = [Fraction(v) for v in x.tolist()]
    mean = sum(exact, Fraction()) / len(exact)
    truth = sum(((v - mean) ** 2 for v in exact), Fraction()) / (len(exact) - 1)
    assert abs(Fraction(variance(x)) - truth) <= Fraction(1, 10**14) * truth + Fraction(1, 10**300)


def test_paired_differences_cancel_what_is_common() -> None:
    rng = np.random.Generator(np.random.Philox(2))
    common = 100 * rng.standard_normal(20)
    one, other = common + rng.standard_normal(20), common + 5 + rng.standard_normal(20)
    found = paired(one, other)
    assert abs(found.mean + 5) <= 2 * found.half_width < 3 and half_width(one) > 20


# Over time --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [-0.5, 0.0, 0.5, 0.9, 0.95])
def test_autocorrelation_time_of_an_autoregression(a: float) -> None:
    rng = np.random.Generator(np.random.Philox(1))
    found = [autocorrelation_time(autoregression(a, int(500 * max(1.0, tau_of(a))), rng)) for _ in range(40)]
    assert np.mean(found) == pytest.approx(max(1.0, tau_of(a)), rel=0.1)  # less than one sample is not told apart


def test_autocorrelation_time_within_20_percent_in_one_long_run() -> None:
    x = autoregression(0.9, 50_000, np.random.Generator(np.random.Philox(3)))
    assert autocorrelation_time(x) == pytest.approx(19, rel=0.1)
    assert autocorrelation_time(1e9 + 1e-3 * x) == pytest.approx(autocorrelation_time(x), rel=1e-3)
    assert autocorrelation_time(np.full(100, 0.1)) == 1.0 and autocorrelation_time(np.ones(1)) == 1.0


@pytest.mark.parametrize("a", [0.0, 0.5, 0.9, 0.95])
def test_batch_means_cover_where_they_do_not_refuse(a: float) -> None:
    rng = np.random.Generator(np.random.Philox(4))
    hits = []
    for _ in range(200):
        try:
            found = steady(autoregression(a, int(200 * tau_of(a)), rng))
        except NotEnough:
            continue
        hits.append(abs(found.mean) <= found.half_width)
    assert len(hits) > 170 and 0.91 <= np.mean(hits) <= 0.995


def test_autocorrelation_time_is_corrected_for_the_series_own_mean() -> None:
    """Over twenty times only, where every rho is too small: without the correction it comes out at 0.7."""
    rng = np.random.Generator(np.random.Philox(11))
    found = [autocorrelation_time(autoregression(0.9, 380, rng)) for _ in range(400)]
    assert np.mean(found) == pytest.approx(19, rel=0.12)


def test_batch_means_count_the_larger_of_two_errors() -> None:
    """Batches of whole periods agree to the last bit; the samples do not."""
    found = batch_means(np.tile([1.0, -1.0], 1500))
    assert found.half_width == pytest.approx(intervals.t_quantile(29) / math.sqrt(2999), rel=1e-12)


def test_batches_last_five_autocorrelation_times() -> None:
    x = autoregression(0.9, 1500, np.random.Generator(np.random.Philox(12)))
    tau = autocorrelation_time(x)
    batches = int(1500 / (5 * tau))
    assert 10 < batches < 20
    means = x[1500 % batches :].reshape(batches, -1).mean(axis=1)
    error = math.sqrt(max(variance(means) / batches, variance(x) * tau / 1500))
    assert batch_means(x).half_width == pytest.approx(intervals.t_quantile(batches - 1) * error, rel=1e-12)


def test_short_series_are_refused_with_the_number() -> None:
    x = autoregression(0.9, 400, np.random.Generator(np.random.Philox(5)))
    with pytest.raises(
        NotEnough, match=rf"autocorrelation times in 400 steps, {MIN_TIMES} needed: about \d+ steps"
    ) as e:
        batch_means(x, "steps")
    assert e.value.times == pytest.approx(400 / autocorrelation_time(x)) and e.value.samples == 400
    assert 500 < e.value.needed < 2000 and e.value.needed >= MIN_TIMES * autocorrelation_time(x)
    with pytest.raises(NotEnough):
        batch_means(np.ones(MIN_TIMES - 1))
    assert batch_means(np.ones(MIN_TIMES)) == (1.0, 0.0, MIN_TIMES, 0, MIN_TIMES)


def test_warm_up_is_cut_and_its_bias_with_it() -> None:
    rng = np.random.Generator(np.random.Philox(6))
    transient = 20 * np.exp(-np.arange(6000) / 60)
    kept = []
    for _ in range(20):
        x = autoregression(0.5, 6000, rng) + transient
        cut = warm_up(x)
        assert 100 <= cut <= 600
        kept.append(x[cut:].mean())
    assert transient.mean() > 0.19 and abs(np.mean(kept)) < 0.02
    assert warm_up(autoregression(0.5, 40, rng)) == 0  # too short to tell


def test_a_run_that_never_settles_is_refused() -> None:
    rng = np.random.Generator(np.random.Philox(7))
    with pytest.raises(NotEnough, match="still settling") as error:
        steady(np.linspace(0, 100, 2000) + rng.standard_normal(2000))
    assert error.value.needed == 0


@given(st.integers(0, 2**32), st.floats(-1e6, 1e6), st.sampled_from([1e-6, 1.0, 1e6]))
def test_steady_moves_and_scales_with_its_series(seed: int, offset: float, scale: float) -> None:
    x = autoregression(0.3, 1000, np.random.Generator(np.random.Philox(seed)))
    try:
        plain = steady(x)
    except NotEnough:
        return
    moved = steady(offset + scale * x)
    assert moved.samples == plain.samples
    assert moved.half_width == pytest.approx(scale * plain.half_width, rel=1e-6 + 1e-9 * abs(offset) / scale)


# Of results -------------------------------------------------------------------------------------------------------


def result_of(scenario: Scenario, tables: dict[str, Any]) -> Result:
    return Result(scenario, tables, {}, 0)


def columns(policies: list[str], series: dict[str, list[F64]]) -> dict[str, list[Any]]:
    """One replica of each policy, then a second one that nobody should look at."""
    n = len(next(iter(series.values()))[0])
    out: dict[str, list[Any]] = {"policy": [], "replica": [], **{name: [] for name in series}}
    for replica in (0, 1):
        for i, policy in enumerate(policies):
            out["policy"] += [policy] * n
            out["replica"] += [replica] * n
            for name, values in series.items():
                out[name] += (values[i] if replica == 0 else values[i] + 1000).tolist()
    return out


@pytest.fixture(scope="module")
def stepped() -> Result:
    scenario = load(SCENARIOS / "tiny.yaml", ["replicas=1"])
    rng = np.random.Generator(np.random.Philox(8))
    names = [policy.name for policy in scenario.policies]
    times = [0.01 + 1e-4 * autoregression(0.9 if i == 1 else 0.0, 600, rng) for i in range(len(names))]
    balance = [1 + 0.1 * rng.standard_normal(600) for _ in names]
    return result_of(scenario, {"steps": columns(names, {"max_vio": balance, "step_time_s": times})})


def test_steady_of_steps(stepped: Result) -> None:
    found = stepped.steady("step_time_s").set_index("policy")
    assert list(found.index) == [policy.name for policy in stepped.scenario.policies]
    sure = found[found.refusal == ""]
    assert len(sure) == 4 and ((sure["mean"] - 0.01).abs() < 2 * sure.half_width).all()
    refused = found.loc["top-k + bias"]
    assert math.isnan(refused.half_width) and "needed: about" in refused.refusal and refused.refusal.endswith(" s")
    one = stepped.steady("max_vio_batch", "random")
    assert one.policy.tolist() == ["random"] and one.unit.tolist() == ["steps"] and abs(one["mean"][0] - 1) < 0.05


def test_steady_refuses_names(stepped: Result) -> None:
    with pytest.raises(ValueError, match=r"no series of 'step_time' in time \(did you mean step_time_s\?\)"):
        stepped.steady("step_time")
    with pytest.raises(ValueError, match=r"no policy 'randon' \(did you mean random\?\)"):
        stepped.steady("step_time_s", "randon")


def test_one_step_is_refused(stepped: Result) -> None:
    names = [policy.name for policy in stepped.scenario.policies]
    one = result_of(stepped.scenario, {"steps": columns(names, {"step_time_s": [np.array([0.5])] * 5})})
    found = one.steady("step_time_s")
    assert found.refusal.str.contains(
        "1 autocorrelation times in 1 timed steps, 50 needed: about 50 timed steps, 25 s"
    ).all()
    assert found["mean"].tolist() == [0.5] * 5 and over_time(one) == []


def test_report_names_what_one_replica_knows(stepped: Result) -> None:
    lines = over_time(stepped)
    assert [line.split(" in steady state")[0] for line in lines] == ["MaxVio batch", "step ms"]
    assert "top-k + bias" in lines[0] and "top-k + bias" not in lines[1] and "random 10.0" in lines[1]
    scenario = stepped.scenario.model_copy(update={"replicas": 2})
    assert over_time(result_of(scenario, stepped.tables)) == []


def test_steady_of_requests_leaves_the_warm_up_out() -> None:
    scenario = load(SCENARIOS / "llama_8b.yaml", ["replicas=1", "serving.warmup_s=20"])
    assert scenario.serving is not None
    warmup_s = scenario.serving.warmup_s
    assert warmup_s == 20
    n, rng = 3000, np.random.Generator(np.random.Philox(9))
    arrival = np.linspace(0, warmup_s + 100, n)
    ttft = np.where(arrival < warmup_s, 99.0, 0.2 + 0.01 * rng.standard_normal(n))
    ttft[-1] = np.nan  # a refused one
    names = [policy.name for policy in scenario.policies]
    requests = columns(names, {"arrival_s": [arrival] * len(names), "ttft_s": [ttft] * len(names)})
    found = result_of(scenario, {"requests": requests}).steady("ttft_mean_s")
    assert isinstance(found, pd.DataFrame) and found.unit.tolist() == ["requests"] * len(names)
    assert found["mean"][0] == pytest.approx(0.2, abs=0.01) and 0 < found.half_width[0] < 0.002


def test_steady_of_the_timeline_leaves_the_warm_up_and_the_rest_out() -> None:
    """Samples lie in [warmup_s, duration_s): what came before, and what drained afterwards, do not count."""
    scenario = load(SCENARIOS / "llama_8b.yaml", ["replicas=1", "serving.warmup_s=3"])
    assert scenario.serving is not None and scenario.serving.duration_s == 30
    rng = np.random.Generator(np.random.Philox(10))
    time_s = np.arange(110) * 0.3
    queue = np.where((time_s < 3) | (time_s >= 30), 1000.0, 5 + 0.1 * rng.standard_normal(110))
    table = columns([policy.name for policy in scenario.policies], {"time_s": [time_s], "queue": [queue]})
    table["time_s"] = time_s.tolist() * 2  # columns sets the second replica apart by its values
    found = result_of(scenario, {"timeline": table}).steady("queue_mean")
    assert found["mean"][0] == pytest.approx(5, abs=0.05) and found.samples[0] + found.warm_up[0] == 90
