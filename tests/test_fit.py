"""Statistics of recorded routing against the published tables, and generators fitted to traces."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

import sim.fit
from sim.fitting import block, counts, report, validate
from sim.fitting import statistics as stat
from sim.fitting.fit import FREE, Fitted, Free, fit, minimise, shared_prefix, shortened, synthetic_statistics
from sim.fitting.synthesis import route
from sim.loading import load
from sim.scenario import Scenario
from sim.traces import RecordedTrace, checked, read
from sim.traffic import TrafficShape
from sim.traffic.affinity import Affinity
from sim.traffic.topics import Topic

ROOT = Path(__file__).resolve().parents[1]
SCENARIOS = ROOT / "scenarios"


def generated(config: Affinity, shape: TrafficShape, n_tokens: int, layers: list[int], seed: int = 0) -> np.ndarray:
    """Return the ids [L, N, k] of a plain top-k on all ranks' tokens."""
    batch = config.start(shape, seed, 0).batch("train", 0, n_ranks=shape.ep_size, tokens_per_rank=n_tokens)
    return np.stack(
        [
            np.concatenate(
                [route(batch.tokens(layer, rank).logits, shape.num_experts_per_tok) for rank in range(shape.ep_size)]
            )
            for layer in layers
        ]
    )


def measured(ids: np.ndarray, n_experts: int, length: int) -> dict[str, float]:
    """Return statistics of ids [L, N, k] in sequences of ``length``, mean over layers."""
    where = stat.layout(np.full(ids.shape[1] // length, length))
    each = [stat.layer_statistics(layer[: len(where.order)], n_experts, where) for layer in ids]
    return {name: float(np.mean([layer[name] for layer in each])) for name in each[0]}


@pytest.fixture(scope="module", autouse=True)
def two_seeds_a_fit() -> Iterator[None]:
    """Fits look at fewer synthetic traces than usual: faster, and if anything worse."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sim.fitting.fit._MAX_SEEDS", 2)
        yield


@pytest.fixture(scope="module")
def toy() -> RecordedTrace:
    """A trace that is not the fit's own making: other parts, another rank, another scale; two domains."""
    config = Affinity(
        sequence_length=128, popularity_sd=0.3, sequence_variance=0.15, fast_variance=0.5, token_variance=0.2, latent_rank=7,
        topic_tree=(Topic(name="a", popularity_sd=0.25), Topic(name="b", popularity_sd=0.25)), layer_profile=None,
    )  # fmt: skip
    shape = TrafficShape(2, 32, 4, 1)
    batch = config.start(shape, 5, 0).batch("train", 0, n_ranks=1, tokens_per_rank=4096)
    tokens = [batch.tokens(layer, 0) for layer in range(2)]
    ids = np.stack([route(one.logits, 4) for one in tokens])
    exp = [np.exp(one.logits - one.logits.max(axis=1, keepdims=True)) for one in tokens]
    soft = [each / each.sum(axis=1, keepdims=True) for each in exp]
    weights = np.stack([np.take_along_axis(each, one.astype(int), axis=1) for each, one in zip(soft, ids, strict=True)])
    domains = ["ab"[int(topic)] for topic in tokens[0].topic[::128]]
    return checked(
        "toy", ids, topk_weights=weights, seqlens=[128] * 32, layers=[3, 9], n_routed_experts=32, domains=domains
    )


@pytest.fixture(scope="module")
def fitted(toy: RecordedTrace) -> Fitted:
    return fit(toy, jobs=1)


def test_counts_are_those_of_plain_loops() -> None:
    rng = np.random.Generator(np.random.Philox(1))
    ids = np.argsort(rng.random((300, 12)), axis=1)[:, :3].astype(np.int16)
    where = stat.layout(np.array([100, 0, 150, 50]))
    chosen = counts.incidence(ids, 12)
    both, pairs = counts.repeats(ids, chosen, where.start_of, (1, 7))
    for row, lag in enumerate((1, 7)):
        same = where.start_of[lag:] == where.start_of[:-lag]
        assert pairs[row] == same.sum() == 300 - 3 * lag
        assert np.array_equal(both[row], (chosen[lag:] & chosen[:-lag])[same].sum(axis=0))
    together = counts.together(ids, 12)
    assert np.array_equal(together, np.triu(chosen.T.astype(int) @ chosen.astype(int), 1))
    assert counts.shared(ids, chosen, np.arange(300)) == 0
    assert (
        counts.shared(ids, chosen, where.order) == (chosen & chosen[where.order])[where.order != np.arange(300)].sum()
    )


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.6])
def test_latent_kernel_gives_an_autoregressions_correlation_back(rho: float) -> None:
    rng = np.random.Generator(np.random.Philox(2))
    x = rng.standard_normal((12_000, 64)).astype(np.float32)
    for t in range(1, len(x)):
        x[t] = rho * x[t - 1] + np.sqrt(1 - rho**2) * x[t]
    found = measured(route(x, 6)[None], 64, 12_000)
    assert found["latent_lag_1"] == pytest.approx(rho, abs=0.04)
    assert found["latent_lag_4"] == pytest.approx(rho**4, abs=0.03)


def test_independent_uniform_tokens_have_the_null_statistics() -> None:
    rng = np.random.Generator(np.random.Philox(3))
    found = measured(np.argsort(rng.random((1, 16_384, 32)), axis=2)[..., :4].astype(np.int16), 32, 512)
    assert found["over_dispersion_64"] == pytest.approx(1, abs=0.15)
    assert found["overlap_adjacent"] == pytest.approx(4 / 32, rel=0.05)
    assert found["load_cv_consecutive_64"] == pytest.approx(np.sqrt((1 - 4 / 32) / (64 * 4 / 32)), rel=0.05)
    assert found["coactivation_tv"] < 0.06 and found["coactivation_lift_p99"] < 1.3


def test_a_gap_counts_as_equal_near_zero_only() -> None:
    assert stat.equal("load_cv", 1.0, 1.2) and not stat.equal("load_cv", 1.0, 1.21)
    assert not stat.equal("load_cv", 0.01, 0.02)
    assert stat.equal("latent_lag_64", 0.01, 0.03) and not stat.equal("latent_lag_1", 0.4, 0.5)
    real, other = [{"latent_lag_64": 0.01, "load_cv": 1.0}], [{"latent_lag_64": 0.02, "load_cv": 1.1, "more": 1.0}]
    assert stat.share_within(real, other) == 1 and stat.share_within(real, other, plain=True) == 0.5


TABLE: dict[str, dict[str, float]] = {
    # routing_statistics.md, means over all layers, from sections 1, 2, 3, 5 and 7.
    "law": {
        "load_cv": 0.606, "max_vio": 2.52, "load_cv_consecutive_64": 0.88, "load_cv_mixed_64": 0.72,
        "load_cv_consecutive_256": 0.69, "load_cv_mixed_256": 0.64, "load_cv_consecutive_1024": 0.63,
        "load_cv_mixed_1024": 0.62, "overlap_adjacent": 0.254, "overlap_same_sequence": 0.131, "overlap_random": 0.122,
        "ep_rank_max_vio_consecutive_8": 0.46, "ep_rank_max_vio_consecutive_16": 0.75,
        "ep_rank_max_vio_consecutive_32": 1.52, "coactivation_tv": 0.40, "latent_lag_1": 0.28, "latent_lag_2": 0.16,
        "latent_lag_4": 0.13, "latent_lag_8": 0.11, "weight_rank_1": 0.132, "weight_rank_2": 0.080,
        "weight_rank_3": 0.059, "weight_rank_4": 0.046, "weight_rank_5": 0.039, "weight_rank_6": 0.034,
    },
    "summary": {
        "load_cv": 0.737, "max_vio": 3.28, "ep_rank_max_vio_consecutive_8": 0.40, "ep_rank_max_vio_consecutive_16": 0.81,
        "ep_rank_max_vio_consecutive_32": 1.63, "coactivation_tv": 0.36,
    },
    "intent": {
        "load_cv": 0.792, "max_vio": 2.81, "ep_rank_max_vio_consecutive_8": 0.39, "ep_rank_max_vio_consecutive_16": 0.77,
        "ep_rank_max_vio_consecutive_32": 1.50, "coactivation_tv": 0.46,
    },
    "gptoss": {
        "load_cv": 0.711, "max_vio": 1.62, "load_cv_consecutive_64": 1.26, "max_vio_consecutive_64": 3.93,
        "load_cv_consecutive_256": 1.14, "max_vio_consecutive_256": 3.49, "load_cv_consecutive_1024": 0.98,
        "max_vio_consecutive_1024": 2.86, "load_cv_mixed_64": 0.75, "load_cv_mixed_256": 0.69, "load_cv_mixed_1024": 0.68,
        "max_vio_mixed_64": 1.79, "max_vio_mixed_256": 1.60, "max_vio_mixed_1024": 1.55, "overlap_adjacent": 0.414,
        "over_dispersion_64": 9.4, "over_dispersion_256": 26.7, "over_dispersion_1024": 53, "overlap_same_sequence": 0.293,
        "overlap_random": 0.194, "coactivation_tv": 0.36, "coactivation_lift_p95": 3.3, "latent_lag_1": 0.48,
        "latent_lag_2": 0.40, "latent_lag_4": 0.37, "latent_lag_8": 0.35, "latent_lag_16": 0.33, "latent_lag_32": 0.32,
        "latent_lag_64": 0.31, "weight_rank_1": 0.35, "weight_rank_2": 0.26, "weight_rank_3": 0.21, "weight_rank_4": 0.18,
    },
}  # fmt: skip


def trace_path(shared: Path, name: str) -> Path:
    if name == "gptoss":
        return shared / "data" / "gptoss20b_fingerprint" / "mmlu_test_decode.npz"
    return shared / "data" / "esft_deepseek_v2_lite" / f"{name}_layers1-16.npz"


@pytest.mark.parametrize("name", sorted(TABLE))
def test_statistics_are_those_of_the_published_tables(shared: Path, name: str) -> None:
    # The tables speak of all 26 layers (the file holds 16), and of all of gpt-oss' data sets (the file holds one):
    # the definitions are checked, not the digits.
    each = validate.measured(read(trace_path(shared, name)))
    for statistic, published in TABLE[name].items():
        mean = np.mean([layer[statistic] for layer in each])
        assert mean == pytest.approx(published, rel=0.25), statistic


@pytest.mark.parametrize("name", ["law", "summary", "gptoss"])
def test_eight_of_ten_statistics_of_a_real_layer_are_met(shared: Path, name: str) -> None:
    trace = read(trace_path(shared, name), 32 if name == "gptoss" else 64).part(layers=[11])
    if name == "gptoss":
        trace = trace.part(sequences=range(0, 114, 6))
    found = fit(trace, jobs=1)
    synthetic = synthetic_statistics(found, validate.SEEDS)
    assert stat.share_within(found.real, synthetic, plain=True) >= 0.8


def test_a_foreign_generator_is_met_and_a_wrong_one_is_not(toy: RecordedTrace, fitted: Fitted) -> None:
    synthetic = synthetic_statistics(fitted, validate.SEEDS)
    assert stat.share_within(fitted.real, synthetic, plain=True) >= 0.8
    assert {"domain_js", "weight_rank_4", "over_dispersion_256"} <= set(fitted.real[0])
    plain = fitted.layers[0].values._replace(sequence_variance=0.0, slow_variance=0.0, fast_variance=0.0)
    wrong = [layer._replace(values=plain) for layer in fitted.layers]
    broken = Fitted(fitted.trace, fitted.memory, tuple(wrong), fitted.renormalised, fitted.domains)
    assert stat.share_within(fitted.real, synthetic_statistics(broken, (1,)), plain=True) < 0.7


def test_held_out_sequences_and_other_traces_have_their_shares(toy: RecordedTrace, fitted: Fitted) -> None:
    validate.check(toy.part(layers=[0, 1]).part(layers=[0, 1, 0]))
    with pytest.raises(ValueError, match="at least 3 layers to hold some out, found 2"):
        validate.check(toy)
    found = validate.halves(toy, 0, 1, lambda done, all_: None) | validate.transfer(fitted, [fitted])
    assert set(found) == {f"{name}{rule}" for name in ("halves", "noise", "transfer") for rule in ("", "_plain")}
    assert all(found[f"{name}_plain"] <= found[name] <= 1 for name in ("halves", "noise", "transfer"))
    # Predicted from itself nothing is lost.
    itself = stat.share_within(fitted.real, synthetic_statistics(fitted, validate.SEEDS))
    assert found["transfer"] == pytest.approx(itself)
    with pytest.raises(ValueError, match="expected traces of 2 layers, found"):
        validate.transfer(fitted, [])


def test_a_fit_is_the_same_on_any_number_of_processes(toy: RecordedTrace, fitted: Fitted) -> None:
    seen: list[tuple[int, int]] = []
    again = fit(toy, jobs=2, progress=lambda done, all_: seen.append((done, all_)))
    assert again.layers == fitted.layers and again.memory == fitted.memory
    assert seen == [(i, 4) for i in range(1, 5)]


def test_what_cannot_be_fitted_is_refused(toy: RecordedTrace) -> None:
    with pytest.raises(ValueError, match="at least 512 tokens, found 128"):
        fit(toy.part(sequences=[0]), jobs=1)
    everything = checked("x", np.tile(np.arange(4), (1, 600, 1)))
    with pytest.raises(ValueError, match="fewer experts per token than experts"):
        fit(everything, jobs=1)


def test_a_long_trace_is_thinned_by_sequences(toy: RecordedTrace) -> None:
    assert shortened(toy, 10**6) is toy
    half = shortened(toy, 2500)
    assert half.seqlens.tolist() == [128] * 16
    assert np.array_equal(half.topk_ids[:, :128], toy.topk_ids[:, :128])
    assert np.array_equal(half.topk_ids[:, 128:256], toy.topk_ids[:, 256:384])
    one = checked("x", toy.topk_ids, topk_weights=toy.topk_weights)
    cut = shortened(one, 1000)
    assert cut.topk_weights is not None and cut.topk_weights.shape[1] == cut.n_tokens == 1000 == int(cut.seqlens.sum())


def test_the_whole_of_a_long_trace_has_the_last_word(toy: RecordedTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.fitting.fit.FIT_TOKENS", 2048)
    found = fit(toy.part(layers=[0]), jobs=1)
    assert found.trace.n_tokens == 4096 and found.real == validate.measured(toy.part(layers=[0]))
    (synthetic,) = synthetic_statistics(found, validate.SEEDS)
    for name in ("load_cv", "load_cv_mixed_256", "max_vio", "domain_js"):
        assert synthetic[name] == pytest.approx(found.real[0][name], rel=0.2), name


def test_a_shared_prefix_is_counted() -> None:
    config = Affinity(sequence_length=64, prefix_length=9, layer_profile=None)
    ids = generated(config, TrafficShape(2, 32, 4, 1), 64 * 20, [0, 1])
    assert shared_prefix(checked("x", ids, seqlens=[64] * 20)) == 9
    ids = generated(config.model_copy(update={"prefix_length": 0}), TrafficShape(2, 32, 4, 1), 64 * 20, [0, 1])
    assert shared_prefix(checked("x", ids, seqlens=[64] * 20)) == 0


def test_the_minimiser_finds_a_minimum_within_bounds() -> None:
    free = [Free(0.0, -2.0, 2.0, 0.3), Free(0.0, -1.0, 0.5, 0.3)]
    found = minimise(lambda x: np.array([x[0] - 0.7, 2 * (x[1] - 3.0)]), free, n_rounds=20)
    assert found[0] == pytest.approx(0.7, abs=0.05) and found[1] == 0.5


def scenario_with(tmp_path: Path, traffic: str, model: str) -> Scenario:
    """Load a scenario in a copy of the shipped ones."""
    folder = tmp_path / "scenarios"
    if not folder.exists():
        shutil.copytree(SCENARIOS, folder)
    (folder / "mine.yaml").write_text(
        f"name: mine\nmodel: {model}\ncluster: {{extends: clusters/h800.yaml, nodes: 1}}\nparallel: {{ep_size: 8}}\n"
        f"traffic: {traffic}\nreplicas: 2\nsteps: {{count: 1}}\nschedule: {{phase: forward}}\n"
        "policies: [{name: top-k, select: topk}]\n"
    )
    return load(folder / "mine.yaml")


TOY_MODEL = (
    "{name: toy, source: made up, num_hidden_layers: 2, first_k_dense_replace: 0, hidden_size: 512, vocab_size: 1000, "
    "num_attention_heads: 8, n_routed_experts: 32, num_experts_per_tok: 4, moe_intermediate_size: 256}"
)


@pytest.mark.parametrize("portable", [False, True])
def test_the_written_block_runs_and_has_the_fitted_statistics(tmp_path: Path, fitted: Fitted, portable: bool) -> None:
    data = block.portable_block(fitted) if portable else block.traffic_block(fitted)
    text = report.heading(fitted, fitted.real, "toy.npz") + block.to_yaml(data)
    assert YAML(typ="safe").load(text) == data
    shutil.copytree(SCENARIOS, tmp_path / "scenarios")
    (tmp_path / "scenarios" / "block.yaml").write_text(text)
    scenario = scenario_with(tmp_path, "{extends: block.yaml, tokens_per_rank: 768}", TOY_MODEL)
    assert isinstance(scenario.traffic, Affinity)
    result = sim.run(scenario)
    assert len(result.layers) > 0
    names = ["load_cv", "load_cv_consecutive_64", "load_cv_mixed_64", "overlap_adjacent", "coactivation_tv"]
    seen = [
        measured(generated(scenario.traffic, TrafficShape(2, 32, 4, 8), 768, [0, 1], seed), 32, 128)
        for seed in (range(1, 9) if portable else (1, 2))
    ]
    for name in names:
        real = np.mean([layer[name] for layer in fitted.real])
        assert np.mean([one[name] for one in seen]) == pytest.approx(real, rel=0.2), name


# E, k, MoE layers looked at, and the headline figures: of the traces fitted to, or published (routing_statistics.md).
V2_LITE = ("models/deepseek_v2_lite.yaml", 64, 6, list(range(0, 16, 3)))
PROFILES: dict[str, tuple[tuple[str, int, int, list[int]], dict[str, float]]] = {
    "law": (V2_LITE, {"load_cv": 0.556, "overlap_adjacent": 0.286, "load_cv_consecutive_64": 0.832}),
    "summarisation": (V2_LITE, {"load_cv": 0.681, "overlap_adjacent": 0.278, "load_cv_consecutive_64": 0.916}),
    "intent": (V2_LITE, {"load_cv": 0.792, "overlap_adjacent": 0.263, "load_cv_consecutive_64": 0.863}),
    "chat": (V2_LITE, {"load_cv": 0.232, "overlap_adjacent": 0.234, "load_cv_consecutive_64": 0.87, "load_cv_mixed_64": 0.46}),
    "reasoning_decode": (
        ("{extends: models/gpt_oss_120b.yaml, n_routed_experts: 32}", 32, 4, list(range(0, 24, 3))),
        {"load_cv": 0.768, "overlap_adjacent": 0.422, "load_cv_consecutive_64": 1.25},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_a_shipped_profile_has_its_headline_statistics(tmp_path: Path, name: str) -> None:
    (model, n_experts, k, layers), figures = PROFILES[name]
    scenario = scenario_with(tmp_path, f"{{extends: traffic/{name}.yaml, tokens_per_rank: 2048}}", model)
    config = scenario.traffic
    assert isinstance(config, Affinity) and config.tokens_per_rank == 2048
    shape = TrafficShape(26 if n_experts == 64 else 24, n_experts, k, 4)
    length = config.sequence_length
    ids = [generated(config, shape, 8192 // length * length, layers, seed) for seed in range(3)]
    seen = [measured(one, n_experts, length) for one in ids]
    for statistic, figure in figures.items():
        assert np.mean([one[statistic] for one in seen]) == pytest.approx(figure, rel=0.2), statistic


def test_the_profile_of_256_experts_has_deepseek_v3s_skew(tmp_path: Path) -> None:
    scenario = scenario_with(
        tmp_path,
        "{extends: traffic/experts_256.yaml, tokens_per_rank: 512}",
        "{extends: models/deepseek_v3.yaml, num_hidden_layers: 5}",
    )
    config = scenario.traffic
    assert isinstance(config, Affinity)
    cv, share = [], []
    for seed in (0, 1):
        for ids in generated(config, TrafficShape(58, 256, 8, 8), 8192, [0, 20, 40], seed):
            load_ = np.bincount(ids.ravel(), minlength=256)
            cv.append(load_.std() / load_.mean())
            share.append(np.sort(load_)[-32:].sum() / load_.sum())
    assert np.mean(cv) == pytest.approx(0.78, abs=0.05) and np.mean(share) == pytest.approx(0.31, abs=0.02)


# ---------------------------------------------------------------- command line


@pytest.fixture
def toy_file(tmp_path: Path, toy: RecordedTrace, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "toy.npz"
    part = toy.part(sequences=range(0, 32, 3), layers=[1])
    np.savez(
        path, topk_ids=part.topk_ids, topk_weights=part.topk_weights, seqlens=part.seqlens, layers=np.array(part.layers),
        domain=np.array(part.domain_of_sequence), n_routed_experts=np.array(32),
    )  # fmt: skip
    return str(path)


def test_the_table_and_the_block_are_written(toy_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sim.fit.main([toy_file, "--jobs", "1"]) == 0
    out, err = capsys.readouterr()
    assert "1408 tokens in 11 sequences, 1 layers, top-4 of 32" in out and "without such gaps" in out
    assert "load_cv_mixed_64" in out and "toy_traffic.yaml" in err
    written = YAML(typ="safe").load((tmp_path / "toy_traffic.yaml").read_text())
    assert Affinity.model_validate(written).kind == "affinity"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.npz", "toy_traffic.yaml"]


def test_json_holds_every_layer_of_both_sides(toy_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sim.fit.main([toy_file, "--json", "--jobs", "1", "--quiet", "--out", "-", "--validate"]) == 2  # one layer
    assert "at least 3 layers to hold some out, found 1" in capsys.readouterr().err
    assert sim.fit.main([toy_file, "--json", "--jobs", "1", "--quiet", "--out", "-"]) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    (layer,) = data["layers"]
    assert err == "" and layer["layer"] == 9 and set(layer["trace"]) <= set(layer["generator"])
    recount = np.mean([abs(layer["generator"][n] - x) <= 0.2 * abs(x) for n, x in layer["trace"].items()])
    assert data["within_plain"] == pytest.approx(recount)
    Affinity.model_validate(data["traffic"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.npz"], "expected a trace file, found none"),
        (["toy.npz", "--jobs", "0"], "--jobs must be at least 1"),
        (["toy.npz", "--moe-layers", "3"], "add --portable"),
        (["toy.npz", "--layers", "1"], r"--layers must be different ones of \[9\]"),
        (["toy.npz", "--layers", "x"], "numbers separated by commas"),
        (["toy.npz", "--experts", "8"], "expected 8 experts, found 32"),
        (["trace.pt"], "expected a trace file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    toy_file: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sim.fit.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert re.search(said, err)


def test_an_interrupt_leaves_nothing(
    toy_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sim.fitting.fit.minimise", interrupted)
    assert sim.fit.main([toy_file, "--jobs", "1"]) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["toy.npz"]


def test_every_free_parameter_starts_within_its_bounds() -> None:
    assert all(free.low <= free.start <= free.high and free.step > 0 for free in FREE.values())
