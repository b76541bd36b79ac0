"""Requests: every source against one law, arrivals against closed forms, files of all formats, and what real traces show."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from scipy.special import gamma

from sim.deployment import Serving
from sim.plugin import members
from sim.requests import PrefixTree, Requests, RequestSource
from sim.requests._lengths import Lengths, TokenCount
from sim.requests._prefixes import block_tree
from sim.rng import stream
from sim.tokens import F64
from tests.strategies import seeds

TOPICS = np.array([0.5, 0.0, 0.3, 0.2])
CONTRACT = {
    "arrival_ps": np.int64,
    "input_tokens": np.int64,
    "output_tokens": np.int64,
    "topic": np.int32,
    "prefix": np.int32,
    "prefix_tokens": np.int64,
    "client": np.int32,
}
LENGTHS = {
    "input_tokens": {"kind": "lognormal", "median": 300, "sigma": 1.0, "min": 2, "max": 4000},
    "output_tokens": {"kind": "uniform", "min": 3, "max": 9},
}
ONE = {"input_tokens": 1, "output_tokens": 1}
GENERATED: dict[str, dict[str, Any]] = {
    "poisson": {"rate_per_s": 40},
    "gamma": {"rate_per_s": 40, "cv": 3},
    "bursty": {"rate_per_s": 40, "burst_length_s": 0.5},
    "daily": {"rate_per_s": 40, "peak_to_mean": 1.8, "period_s": 5},
    "saturated": {"count": 300},
}
CLIENTS = (
    "client,t_s,rate_rps,iat_cv,family,arg1,arg2\n0,0,30,1,Gamma,1,0.03\n7,0,9,3,Gamma,0.1,1\n"
    "7,5,20,2,Weibull,0.6,0.03\n3,5,0,1,Gamma,1,1\n"
)


def source(kind: str, **settings: Any) -> Any:
    return members(RequestSource)[kind].model_validate({"kind": kind} | settings)


def lengths(value: Any) -> Lengths:
    found: Lengths = TypeAdapter(TokenCount).validate_python(value)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("requests")


def written(folder: Path, text: str | bytes, name: str = "requests.csv") -> str:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def block(time: int, ids: list[int], inputs: int | None = None) -> str:
    record = {"timestamp": time, "input_length": inputs or 512 * len(ids), "output_length": 5, "hash_ids": ids}
    return json.dumps(record) + "\n"


def gaps_of(requests: Requests) -> F64:
    return np.diff(requests.arrival_ps) / 1e12


def same(a: Requests, b: Requests) -> bool:
    return all(getattr(a, name).tobytes() == getattr(b, name).tobytes() for name in CONTRACT)


def holds(requests: Requests, duration_s: float) -> None:
    """The law of every source."""
    for name, dtype in CONTRACT.items():
        assert getattr(requests, name).dtype == dtype and getattr(requests, name).shape == (len(requests),), name
    assert (np.diff(requests.arrival_ps) >= 0).all()
    assert len(requests) == 0 or 0 <= requests.arrival_ps[0] <= requests.arrival_ps[-1] < duration_s * 1e12
    assert (requests.input_tokens >= 1).all() and (requests.output_tokens >= 1).all()
    assert np.isin(requests.topic, np.flatnonzero(TOPICS)).all()
    assert (requests.prefix_tokens < requests.input_tokens).all() and (requests.prefix_tokens >= 0).all()
    assert ((requests.prefix >= 0) | (requests.prefix_tokens == 0)).all() and (requests.prefix >= -1).all()
    reused = requests.reusable_tokens()
    assert ((reused >= 0) & (reused <= requests.prefix_tokens)).all()


def every_source(folder: Path) -> dict[str, Any]:
    plain = "t_s,input_tokens,output_tokens\n" + "".join(f"{i / 7},{i + 1},{i % 5 + 1}\n" for i in range(60))
    run = "".join(json.dumps({"input_toks": 9, "output_toks": 2, "queued_ts": 100 + i / 9}) + "\n" for i in range(60))
    blocks = "".join(block(3000 * (i // 4), [0, i % 3, 100 + i]) for i in range(16))
    table = written(folder, plain)
    found = {kind: source(kind, **settings, **LENGTHS) for kind, settings in GENERATED.items()}
    found["servegen"] = source("servegen", path=written(folder, CLIENTS, "clients.csv"), window_s=5, **LENGTHS)
    found |= {kind: source(kind, path=table) for kind in ("azure", "table")}
    found["mooncake"] = source("mooncake", path=written(folder, blocks, "blocks.jsonl"))
    found["vllm_run"] = source("vllm_run", path=written(folder, run, "run.jsonl"))
    return found


def test_every_source_keeps_the_law(tmp_path: Path) -> None:
    sources = every_source(tmp_path)
    known = {kind for kind, cls in members(RequestSource).items() if cls.__module__.startswith("sim.")}
    assert set(sources) == known
    for kind, made in sources.items():
        long, short = made.draw(9.0, TOPICS, 5, 0), made.draw(4.0, TOPICS, 5, 0)
        for requests, duration_s in ((long, 9.0), (short, 4.0)):
            holds(requests, duration_s)
        assert len(long) > 5, kind
        assert same(long, made.draw(9.0, TOPICS, 5, 0)), kind
        assert not same(long, made.draw(9.0, TOPICS, 5, 1)) and not same(long, made.draw(9.0, TOPICS, 6, 0)), kind
        first = Requests(*(getattr(long, name)[: len(short)] for name in CONTRACT))
        assert same(first, short), f"{kind}: a longer run begins differently"
        assert len(made.fingerprint()) == (64 if hasattr(made, "path") else 0)


@given(seed=seeds, kind=st.sampled_from(sorted(GENERATED)), duration_s=st.floats(0.01, 20), share=st.floats(0.05, 0.6))
def test_generated_requests_keep_the_law(seed: int, kind: str, duration_s: float, share: float) -> None:
    prefix = {"share": share, "tokens": {"kind": "uniform", "min": 1500, "max": 2500}, "prefixes": 5}
    holds(source(kind, **GENERATED[kind], **LENGTHS, prefix=prefix).draw(duration_s, TOPICS, seed, 0), duration_s)


def test_a_source_that_breaks_the_law_is_caught() -> None:
    good = source("poisson", rate_per_s=40, **LENGTHS).draw(3.0, TOPICS, 0, 0)
    for name, wrong in (
        ("arrival_ps", good.arrival_ps[::-1]),
        ("arrival_ps", good.arrival_ps + 3 * 10**12),
        ("topic", np.ones(len(good), dtype=np.int32)),
        ("output_tokens", good.output_tokens.astype(np.int32)),
        ("prefix_tokens", good.input_tokens),
    ):
        with pytest.raises(AssertionError):
            holds(Requests(**{key: getattr(good, key) for key in CONTRACT} | {name: wrong}), 3.0)


def test_a_scenario_names_a_source_by_its_kind() -> None:
    block_ = {"duration_s": 10, "units": [{"name": "u"}]}
    made = Serving.model_validate(block_ | {"requests": {"kind": "poisson", "rate_per_s": 2, **LENGTHS}})
    assert made.requests.kind == "poisson" and Serving.model_validate(made.model_dump(mode="json")) == made
    with pytest.raises(ValidationError, match="did you mean poisson"):
        Serving.model_validate(block_ | {"requests": {"kind": "poison"}})


# --- arrivals against closed forms ---


@given(seed=seeds, rate=st.floats(5, 500))
def test_poisson_counts_and_gaps(seed: int, rate: float) -> None:
    requests = source("poisson", rate_per_s=rate, **LENGTHS).draw(1000 / rate * 4, TOPICS, seed, 0)
    assert abs(len(requests) - 4000) < 5 * 4000**0.5
    gaps = np.sort(gaps_of(requests)) * rate
    grid = (np.arange(len(gaps)) + 0.5) / len(gaps)
    assert np.abs(1 - np.exp(-gaps) - grid).max() < 2.5 / len(gaps) ** 0.5  # Kolmogorov-Smirnov, 1 in 100,000


@pytest.mark.parametrize("cv", [0.2, 1.0, 3.0])
def test_gamma_gaps_have_the_cv_asked_for(cv: float) -> None:
    gaps = gaps_of(source("gamma", rate_per_s=100, cv=cv, **LENGTHS).draw(2000, TOPICS, 1, 0))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)
    assert gaps.mean() == pytest.approx(0.01, rel=0.03)


def test_gamma_arrivals_are_stationary_from_the_start() -> None:
    """Ten requests on average in ten mean gaps, whatever the cv; a process that began with an arrival or a whole gap
    would miss that by (cv^2 - 1) / 2 = 7.5."""
    made = source("gamma", rate_per_s=1, cv=4, **ONE)
    counts = [len(made.draw(10, TOPICS, 0, replica)) for replica in range(1500)]
    assert np.mean(counts) == pytest.approx(10, abs=4 * np.std(counts) / len(counts) ** 0.5)
    assert 4 * np.std(counts) / len(counts) ** 0.5 < 2.5


def test_bursts_have_the_mean_rate_and_the_dispersion_of_their_law() -> None:
    rate, factor, share, length_s = 50.0, 6.0, 0.2, 2.0
    made = source("bursty", rate_per_s=rate, burst_factor=factor, burst_share=share, burst_length_s=length_s, **ONE)
    window_s, n = 200, 400
    requests = made.draw(window_s * n, TOPICS, 3, 0)
    counts = np.bincount(requests.arrival_ps // (window_s * 10**12), minlength=n)
    law = 1 + 2 * rate * share * (1 - share) ** 2 * length_s * (factor - 1) ** 2 / (1 - share + share * factor) ** 2
    assert counts.mean() == pytest.approx(rate * window_s, abs=4 * counts.std() / n**0.5)
    assert counts.var() / counts.mean() == pytest.approx(law, rel=0.25)  # four standard errors, and 2 % of end effects
    assert law > 100  # Poisson would have 1
    calm = source("bursty", rate_per_s=rate, burst_factor=1, burst_share=share, **ONE)
    steady = np.bincount(calm.draw(window_s * n, TOPICS, 3, 0).arrival_ps // (window_s * 10**12))
    assert steady.var() / steady.mean() == pytest.approx(1, rel=0.3)


def test_a_day_has_its_curve() -> None:
    made = source("daily", rate_per_s=5, peak_to_mean=1.6, peak_hour=15, **LENGTHS)
    requests = made.draw(86_400, TOPICS, 0, 0)
    found = np.bincount(requests.arrival_ps // (3600 * 10**12), minlength=24)
    edges = np.arange(25) / 24
    turns = np.sin(2 * np.pi * (edges - 15 / 24)) / (2 * np.pi)
    expected = 5 * 86_400 * (np.diff(edges) + 0.6 * np.diff(turns))  # the integral of the rate over each hour
    assert (np.abs(found - expected) < 5 * expected**0.5).all()
    assert expected.sum() == pytest.approx(5 * 86_400) and abs(len(requests) - 432_000) < 4 * 432_000**0.5
    assert found.argmax() in (14, 15) and found.argmin() in (2, 3)


def test_saturated_requests_are_all_there_at_once() -> None:
    requests = source("saturated", count=7, input_tokens=5, output_tokens=2).draw(1e6, TOPICS, 0, 0)
    assert requests.arrival_ps.tolist() == [0] * 7 and set(requests.input_tokens) == {5}


def test_too_many_requests_are_refused_before_they_are_drawn() -> None:
    for kind, settings in GENERATED.items():
        if kind != "saturated":
            with pytest.raises(ValueError, match="at most 67,108,864"):
                source(kind, **settings | {"rate_per_s": 1e6}, **LENGTHS).draw(1e6, TOPICS, 0, 0)


# --- lengths ---

LAWS = st.one_of(
    st.integers(1, 10**6),
    st.tuples(st.integers(1, 100), st.integers(0, 10**5)).map(
        lambda pair: {"kind": "uniform", "min": pair[0], "max": sum(pair)}
    ),
    st.builds(
        lambda centre, value, sigma, low, width: {
            "kind": "lognormal", centre: value, "sigma": sigma, "min": low, "max": low + width
        },
        st.sampled_from(["median", "mean"]), st.floats(1, 1e5), st.floats(0, 10), st.integers(1, 50), st.integers(0, 10**6),
    ),
    st.lists(st.integers(1, 10**6), min_size=2, max_size=6).map(
        lambda tokens: {"kind": "quantiles", "points": list(zip(np.linspace(0.1, 0.9, len(tokens)), sorted(tokens), strict=True))}
    ),
)  # fmt: skip


@given(value=LAWS, seed=seeds)
def test_lengths_stay_within_their_law(value: Any, seed: int) -> None:
    law = lengths(value)
    drawn, grid = law.draw(500, stream(seed, "lengths")), law.grid()
    low, high = {
        "fixed": lambda v: (v, v),
        "quantiles": lambda v: (v["points"][0][1], v["points"][-1][1]),
    }.get(law.kind, lambda v: (v["min"], v["max"]))(value)
    for found in (drawn, grid):
        assert found.dtype == np.int64 and low <= found.min() and found.max() <= high
    assert (np.diff(grid) >= 0).all()


def test_lengths_have_the_quantiles_of_their_law() -> None:
    def quantiles(value: Any) -> list[float]:
        return [float(q) for q in np.quantile(lengths(value).draw(40_000, stream(0, "q")), [0.1, 0.5, 0.9])]

    assert quantiles({"kind": "uniform", "min": 1, "max": 1000}) == pytest.approx([100, 500, 900], abs=12)
    spread = np.exp(1.2815515655 * 0.8)
    assert quantiles({"kind": "lognormal", "median": 1000, "sigma": 0.8}) == pytest.approx(
        [1000 / spread, 1000, 1000 * spread], rel=0.03
    )
    mean = lengths({"kind": "lognormal", "mean": 1000, "sigma": 0.8}).draw(40_000, stream(0, "q")).mean()
    assert mean == pytest.approx(1000, rel=0.03)
    points = [[0.1, 54], [0.5, 129], [0.9, 424], [0.99, 601]]
    assert quantiles({"kind": "quantiles", "points": points}) == pytest.approx([54, 129, 424], rel=0.03)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "greater than or equal to 1"),
        (1.5, "mapping with a kind"),
        (True, "mapping with a kind"),
        ({"kind": "normal"}, "unknown lengths kind"),
        ({"kind": "uniform", "min": 5, "max": 4}, "min = 5 must be <= max = 4"),
        ({"kind": "lognormal", "sigma": 1}, "either median or mean"),
        ({"kind": "lognormal", "sigma": 1, "mean": 3, "median": 3}, "either median or mean"),
        ({"kind": "quantiles", "points": [[0.5, 9], [0.2, 10]]}, "points must ascend"),
        ({"kind": "quantiles", "points": [[0.2, 9], [0.5, 8]]}, "points must ascend"),
    ],
)
def test_lengths_that_make_no_law_are_refused(value: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        lengths(value)


# --- prefixes ---


@pytest.mark.parametrize("zipf", [0.0, 1.2])
def test_prefixes_give_the_share_asked_for(zipf: float) -> None:
    prefix = {"share": 0.56, "tokens": {"kind": "uniform", "min": 1000, "max": 4000}, "prefixes": 20, "zipf": zipf}
    inputs = {"kind": "lognormal", "median": 2000, "sigma": 0.7, "max": 20_000}
    made = source("poisson", rate_per_s=100, input_tokens=inputs, output_tokens=1, prefix=prefix)
    requests = made.draw(400, TOPICS, 2, 0)
    total = requests.input_tokens.sum()
    assert requests.prefix_tokens.sum() / total == pytest.approx(0.56, abs=0.01)
    assert requests.reusable_tokens().sum() / total == pytest.approx(0.56, abs=0.012)
    used = np.bincount(requests.prefix[requests.prefix >= 0], minlength=20) / (requests.prefix >= 0).sum()
    weights = np.arange(1, 21.0) ** -zipf
    assert used == pytest.approx(weights / weights.sum(), abs=0.012)


def test_prefixes_too_short_for_the_share_are_refused() -> None:
    made = source("saturated", count=9, input_tokens=1000, output_tokens=1, prefix={"share": 0.5, "tokens": 400})
    with pytest.raises(ValueError, match=r"prefix.tokens: expected .* share of 0.5 .*, found at most 0.4"):
        made.draw(1, TOPICS, 0, 0)


def plain_requests(prefix: list[int], tokens: list[int], tree: PrefixTree | None = None) -> Requests:
    n, ones = len(prefix), np.ones(len(prefix), dtype=np.int64)
    return Requests(
        np.arange(n), ones * 10**6, ones, ones.astype(np.int32), np.array(prefix, np.int32), np.array(tokens, np.int64),
        ones.astype(np.int32), tree,
    )  # fmt: skip


@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 9)), max_size=30))
def test_reused_tokens_by_comparing_all_pairs(pairs: list[tuple[int, int]]) -> None:
    prefix, tokens = [p for p, _ in pairs], [t if p >= 0 else 0 for p, t in pairs]
    expected = [
        max((min(tokens[i], tokens[j]) for j in range(i) if prefix[i] == prefix[j] >= 0), default=0)
        for i in range(len(pairs))
    ]
    assert plain_requests(prefix, tokens).reusable_tokens().tolist() == expected
    alone = PrefixTree(np.full(4, -1, dtype=np.int32), np.full(4, 9, dtype=np.int64))
    assert plain_requests(prefix, tokens, alone).reusable_tokens().tolist() == expected


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=25))
def test_trees_of_blocks_by_comparing_all_pairs(blocks: list[list[int]]) -> None:
    prefix, tree = block_tree(blocks, 10)
    assert prefix.dtype == tree.parent.dtype == np.int32 and tree.tokens.dtype == np.int64
    assert (tree.parent < np.arange(len(tree.parent))).all()
    inner = tree.parent >= 0
    assert (tree.tokens[inner] > tree.tokens[tree.parent[inner]]).all()
    # Runs of blocks that always come together are one prefix: each ends a request, or several continue it.
    assert all((tree.parent == node).sum() > 1 or node in prefix for node in range(len(tree.parent)))
    held = [int(tree.tokens[p]) if p >= 0 else 0 for p in prefix]
    shared = [max((common(a, b) * 10 for j, b in enumerate(blocks) if j != i), default=0) for i, a in enumerate(blocks)]
    assert held == shared
    # The contract's words: the lesser of both, at most the longest prefix that both continue.
    for i, a in enumerate(blocks):
        for j in range(i):
            paths = tree.path(int(prefix[i])), tree.path(int(prefix[j]))
            meet = [node for node in paths[0] if node in paths[1]]
            assert min(held[i], held[j], int(tree.tokens[meet[-1]]) if meet else 0) == common(a, blocks[j]) * 10
    earlier = [max((common(a, b) * 10 for b in blocks[:i]), default=0) for i, a in enumerate(blocks)]
    assert plain_requests(prefix.tolist(), held, tree).reusable_tokens().tolist() == earlier


# --- files ---

PLAIN = "t_s,input_tokens,output_tokens\n10,100,7\n14,300,9\n12.5,200,8\n20,400,1\n"


def test_a_table_is_sorted_shifted_and_cut(tmp_path: Path) -> None:
    path = written(tmp_path, PLAIN)
    requests = source("table", path=path).draw(10, TOPICS, 0, 0)
    assert requests.arrival_ps.tolist() == [0, 2_500_000_000_000, 4_000_000_000_000]
    assert requests.input_tokens.tolist() == [100, 200, 300] and requests.output_tokens.tolist() == [7, 8, 9]
    later = source("table", path=path, start_s=2.5, rate_scale=2).draw(3.76, TOPICS, 0, 0)
    assert later.arrival_ps.tolist() == [0, 750_000_000_000, 3_750_000_000_000]
    assert later.input_tokens.tolist() == [200, 300, 400]
    packed = source("table", path=written(tmp_path, gzip.compress(PLAIN.encode()), "requests.gz"))
    assert same(packed.draw(10, TOPICS, 0, 0), requests)


def test_a_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    made = source("table", path=written(tmp_path, PLAIN))
    assert len(made.draw(99, TOPICS, 0, 0)) == 4
    written(tmp_path, PLAIN + "21,1,1\n")
    assert len(made.draw(99, TOPICS, 0, 0)) == 5


def test_topics_of_a_table(tmp_path: Path) -> None:
    text = "topic,t_s,input_tokens,output_tokens\n2,0,5,5\n0,1,5,5\n"
    made = source("table", path=written(tmp_path, text))
    assert made.draw(9, TOPICS, 0, 0).topic.tolist() == [2, 0]
    with pytest.raises(ValueError, match=r"line 2: topic: expected at most 1 .*, found 2"):
        made.draw(9, np.array([0.5, 0.5]), 0, 0)


def test_azure_times_as_published(tmp_path: Path) -> None:
    head = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    old = head + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951691,396,109\n"
    requests = source("azure", path=written(tmp_path, old)).draw(99, TOPICS, 0, 0)
    assert requests.arrival_ps.tolist() == pytest.approx([0, 4_314_579_100_000], abs=1000)
    assert requests.input_tokens.tolist() == [374, 396] and requests.output_tokens.tolist() == [44, 109]
    new = head + "2024-05-10 00:00:00.009930+00:00,1,2\n2024-05-10 00:00:01+00:00,3,4\n"
    later = source("azure", path=written(tmp_path, new, "new.csv")).draw(99, TOPICS, 0, 0)
    assert later.arrival_ps.tolist() == pytest.approx([0, 990_070_000_000], abs=1000)


def test_mooncake_lines_become_a_tree(tmp_path: Path) -> None:
    lines = (
        block(0, [1, 2, 3])
        + block(0, [1, 2, 4])
        + block(3000, [1, 2, 3, 5])
        + block(3000, [9], 300)
        + block(6000, [1], 40)
    )
    requests = source("mooncake", path=written(tmp_path, lines)).draw(99, TOPICS, 0, 0)
    assert requests.prefix_tokens.tolist() == [1535, 1024, 1536, 0, 39]
    assert requests.reusable_tokens().tolist() == [0, 1024, 1535, 0, 39]
    assert requests.tree is not None and requests.tree.tokens.tolist() == [512, 1024, 1536]


def test_mooncake_ticks_are_spread_in_order(tmp_path: Path) -> None:
    lines = "".join(block(3000 * (i // 50), [i]) for i in range(300)) + block(60_000, [0])
    path = written(tmp_path, lines)
    requests = source("mooncake", path=path).draw(99, TOPICS, 0, 0)
    seconds = requests.arrival_ps / 1e12
    assert (seconds // 3 == np.append(np.arange(300) // 50, 20)).all() and len(set(seconds)) == 301
    assert (seconds[:300] % 3).mean() == pytest.approx(1.5, abs=0.2)
    as_is = source("mooncake", path=path, tick_s=0).draw(99, TOPICS, 0, 0)
    assert set(as_is.arrival_ps // 10**12) == {0, 3, 6, 9, 12, 15, 60} and same(
        as_is, source("mooncake", path=path, tick_s=0).draw(99, TOPICS, 0, 0)
    )


def test_clients_have_their_rates_and_their_gaps(tmp_path: Path) -> None:
    rows = ["client,t_s,rate_rps,iat_cv,family,arg1,arg2"]
    rows += [
        f"{c},{600 * w},{c + 1},1,{'Gamma,0.25,9' if c % 2 else 'Weibull,0.6,9'}" for c in range(4) for w in range(60)
    ]
    path = written(tmp_path, "\n".join(rows) + "\n")
    made = source("servegen", path=path, **ONE)
    requests = made.draw(36_000, TOPICS, 0, 0)
    law = {0: gamma(13 / 3) / gamma(8 / 3) ** 2 - 1, 1: 1 / 0.25}  # squared cv of Weibull and gamma gaps
    for client in range(4):
        times = requests.arrival_ps[requests.client == client] / 1e12
        n = 36_000 * (client + 1)
        assert abs(len(times) - n) < 4 * (law[client % 2] * n) ** 0.5
        gaps = np.diff(times)[np.diff(times // 600) == 0]
        assert gaps.std() ** 2 / gaps.mean() ** 2 == pytest.approx(law[client % 2], rel=0.12)
    counts = np.bincount((requests.arrival_ps // (600 * 10**12))[requests.client == 3], minlength=60)
    assert counts.mean() == pytest.approx(2400, rel=0.02) and counts[:30].mean() == pytest.approx(2400, rel=0.03)
    fast = source("servegen", path=path, **ONE, rate_scale=10, start_s=600)
    assert len(fast.draw(60, TOPICS, 0, 0)) == (requests.arrival_ps // (600 * 10**12) == 1).sum()


def test_clients_windows_are_stationary(tmp_path: Path) -> None:
    """The mean count of many short windows is the rate's, however irregular the gaps (see the gamma source)."""
    rows = ["client,t_s,rate_rps,iat_cv,family,arg1,arg2"]
    rows += [
        f"{f == 'Weibull':d},{10 * w},1,1,{f},{s},1" for w in range(3000) for f, s in (("Gamma", 0.1), ("Weibull", 0.5))
    ]
    made = source("servegen", path=written(tmp_path, "\n".join(rows)), window_s=10, **ONE)
    requests = made.draw(30_000, TOPICS, 0, 0)
    for client in (0, 1):
        counts = np.bincount((requests.arrival_ps // 10**13)[requests.client == client], minlength=3000)
        assert counts.mean() == pytest.approx(10, abs=4 * counts.std() / 3000**0.5)
    weibull = requests.arrival_ps[requests.client == 1]
    assert len(set(weibull)) == len(weibull)  # none counted twice where a window took several rounds to fill


def test_a_run_starts_with_its_first_request(tmp_path: Path) -> None:
    lines = "".join(
        json.dumps({"request_id": f"r{i}", "input_toks": 5 + i, "output_toks": 3, "queued_ts": t}) + "\n\n"
        for i, t in enumerate((50.5, 50.25, 51.0))
    )
    requests = source("vllm_run", path=written(tmp_path, lines)).draw(99, TOPICS, 0, 0)
    assert requests.arrival_ps.tolist() == [0, 250_000_000_000, 750_000_000_000]
    assert requests.input_tokens.tolist() == [6, 5, 7]


HEAD, CLIENT = "t_s,input_tokens,output_tokens\n", "client,t_s,rate_rps,iat_cv,family,arg1,arg2\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
MISTAKES: list[tuple[str, str | bytes, str]] = [
    ("table", "", "line 1: expected one column each of t_s"),
    ("table", "a,b\n1,2\n", "line 1: expected one column each of t_s"),
    ("table", "t_s,t_s,input_tokens,output_tokens\n1,1,1,1\n", "line 1: expected one column each"),
    ("table", HEAD, "expected lines of t_s, input_tokens, output_tokens, found none"),
    ("table", HEAD + "0,1,2\n0,5\n", "line 3: expected 3 columns, found 2: 0,5"),
    ("table", HEAD + "0,1,2\n0,5,6,7\n", "line 3: expected 3 columns, found 4"),
    ("table", HEAD + "0,1,2\n\n0,5,6\n", "line 3: expected 3 columns, found 1: a blank line"),
    ("table", HEAD + "0,1,2\n0,x,6\n", "line 3: input_tokens: expected a whole number from 1, found x"),
    ("table", HEAD + "0,1.5,6\n", "line 2: input_tokens: expected a whole number from 1, found 1.5"),
    ("table", HEAD + "0,0,6\n", "line 2: input_tokens: expected a whole number from 1, found 0"),
    ("table", HEAD + "0,1,9999999999\n", "line 2: output_tokens: expected a whole number"),
    ("table", HEAD + "nan,1,2\n", "line 2: t_s: expected a number, found nothing"),
    ("table", HEAD + "inf,1,2\n", "line 2: t_s: expected a number, found inf"),
    ("table", HEAD + '"0",1,2\n', "line 2: t_s: expected a number"),
    ("table", HEAD + "0,1,2\n1e9,1,2\n", r"expected at most 9e\+06 s at this rate_scale"),
    ("table", HEAD.encode() + b"\xff,1,2\n", "line 2: t_s: expected a number"),
    ("table", b"\x1f\x8b no gzip", "expected a readable file"),
    ("table", gzip.compress(HEAD.encode(), mtime=0)[:-6], "expected a readable file, found Compressed file ended"),
    ("azure", AZURE + "2024-05-10,1,1\nyesterday,1,1\n", "line 3: TIMESTAMP: expected an ISO 8601 time, found yesterday"),
    ("azure", AZURE + ",1,1\n", "line 2: TIMESTAMP: expected text, found nothing"),
    ("mooncake", HEAD + "0,1,2\n", "first_block"),
    ("mooncake", "{\n", "line 1: expected JSON"),
    ("mooncake", block(0, [1]) + "[1]\n", "line 2: expected a JSON object, found list"),
    ("mooncake", "{}\n", "line 1: timestamp: expected a number, found nothing"),
    ("mooncake", block(0, [1], -4), "line 1: input_length: expected a whole number from 1, found -4"),
    ("mooncake", '{"timestamp": 0, "input_length": 1, "output_length": 1}', "line 1: hash_ids: expected a list"),
    ("mooncake", block(0, [True]), "line 1: hash_ids: expected a list of whole numbers"),
    ("mooncake", '{"a":' + "[" * 99, "at most 16 levels of nesting"),
    ("vllm_run", "", "expected lines of requests, found none"),
    ("vllm_run", '{"queued_ts": true}', "line 1: queued_ts: expected a number, found True"),
    ("servegen", CLIENT + "0,0,1,1,Pareto,1,1\n", "line 2: family: expected Gamma or Weibull, found Pareto"),
    ("servegen", CLIENT + "0,0,-1,1,Gamma,1,1\n", "line 2: rate_rps: expected at least 0, found -1"),
    ("servegen", CLIENT + "0,0,1,1,Gamma,1,1\n0,0,1,1,Gamma,0,1\n", "line 3: arg1: expected a shape from 0.001"),
    ("servegen", CLIENT + "-1,0,1,1,Gamma,1,1\n", "line 2: client: expected a whole number from 0, found -1"),
    ("servegen", CLIENT + "0,0,1e9,1,Gamma,1,1\n", "at most 67,108,864"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "words"), MISTAKES)
def test_mistakes_in_files_are_one_line_with_their_place(
    tmp_path: Path, kind: str, text: str | bytes, words: str
) -> None:
    more = {"input_tokens": 1, "output_tokens": 1} if kind == "servegen" else {}
    with pytest.raises(ValueError, match=words) as caught:
        source(kind, path=written(tmp_path, text), **more).draw(1e7, TOPICS, 0, 0)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_and_what_holds_nothing_more(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a file, found none"):
        source("table", path=str(tmp_path / "nothing")).draw(9, TOPICS, 0, 0)
    with pytest.raises(ValueError, match="expected a file, found something else"):
        source("azure", path=str(tmp_path)).draw(9, TOPICS, 0, 0)
    with pytest.raises(ValueError, match=r"expected requests after start_s = 11, found none in 10 s"):
        source("table", path=written(tmp_path, PLAIN), start_s=11).draw(9, TOPICS, 0, 0)


@given(
    st.one_of(st.binary(max_size=60), st.text('0123456789.,-e\n xT:{}[]"', max_size=60).map(str.encode)),
    st.sampled_from(["table", "azure", "mooncake", "vllm_run"]),
    st.booleans(),
)
def test_no_bytes_make_anything_but_a_message(folder: Path, data: bytes, kind: str, headed: bool) -> None:
    path = folder / "fuzz"
    path.write_bytes((HEAD.encode() if headed else b"") + data)
    try:
        holds(source(kind, path=str(path)).draw(100, TOPICS, 0, 0), 100)
    except ValueError as error:
        assert "\n" not in str(error)


# --- what real traces show: the figures of the published traces' first half hour, by the readers ---


def shape_of(requests: Requests) -> tuple[float, float]:
    gaps = gaps_of(requests)
    return 1 / float(gaps.mean()), float(gaps.std() / gaps.mean())


def dispersion(requests: Requests, window_s: int, duration_s: int) -> float:
    """Variance over mean of the counts in windows: 1 for Poisson."""
    counts = np.bincount(requests.arrival_ps // (window_s * 10**12), minlength=duration_s // window_s)
    return float(counts.var() / counts.mean())


def quantiles_of(tokens: Any) -> list[float]:
    return [float(q) for q in np.quantile(tokens, [0.1, 0.5, 0.9, 0.99])]


def test_azure_conversations_arrive_almost_as_poisson_and_code_in_bursts(shared: Path) -> None:
    """Whole traces: 5.5 and 2.6 requests/s, cv 1.09 and 13.2; medians 1020 / 129 and 1469 / 13 tokens."""
    folder = shared / "data" / "request_traces"
    chat, code = (
        source("azure", path=str(folder / f"azure2023_{name}_first30min.csv.gz")).draw(1800, TOPICS, 0, 0)
        for name in ("conv", "code")
    )
    assert (len(chat), len(code)) == (10_108, 5_740)
    assert shape_of(chat) == pytest.approx((5.5, 1.09), rel=0.03)
    assert shape_of(code) == pytest.approx((3.21, 13.2), rel=0.03)  # 2.6 in the whole hour
    assert quantiles_of(chat.input_tokens)[1:2] + quantiles_of(chat.output_tokens)[1:] == pytest.approx(
        [1020, 129, 424, 601], rel=0.05
    )
    assert quantiles_of(code.input_tokens) == pytest.approx([147, 1469, 5187, 7436], rel=0.04)
    assert quantiles_of(code.output_tokens) == pytest.approx([7, 13, 55, 251], rel=0.04)


def test_bursts_resemble_code_completions_better_than_gamma_gaps_of_the_same_cv(shared: Path) -> None:
    """The cv of 13 is that of a few long silences: a gamma law of cv 13 makes clusters within a millisecond instead."""
    path = shared / "data" / "request_traces" / "azure2023_code_first30min.csv.gz"
    code = source("azure", path=str(path)).draw(1800, TOPICS, 0, 0)
    found = [dispersion(code, window_s, 1800) for window_s in (1, 10, 60)]
    assert found == pytest.approx([13.9, 74.4, 178], rel=0.01)
    bursts = source("bursty", rate_per_s=3.2, burst_factor=20, burst_share=0.1, burst_length_s=10, **ONE)
    clusters = source("gamma", rate_per_s=3.2, cv=13.2, **ONE)
    made = [bursts.draw(20_000, TOPICS, 0, 0), clusters.draw(20_000, TOPICS, 0, 0)]
    ratios = [[dispersion(m, w, 20_000) / f for w, f in zip((1, 10, 60), found, strict=True)] for m in made]
    assert all(0.5 < ratio < 2 for ratio in ratios[0]) and ratios[1][0] > 4
    tiny = [float((gaps_of(requests) < 1e-3).mean()) for requests in (code, *made)]
    assert tiny[0] < 0.2 and tiny[1] < 0.05 and tiny[2] > 0.9


def test_mooncake_conversations(shared: Path) -> None:
    """3.4 requests/s and Poisson once 3 s ticks are spread; all begin with one block, which is all the excerpt knows."""
    path = shared / "data" / "request_traces" / "mooncake_conversation_trace.csv.gz"
    requests = source("mooncake", path=str(path)).draw(3600, TOPICS, 0, 0)
    assert len(requests) == 12_031 and shape_of(requests) == pytest.approx((3.4, 1.0), rel=0.02)
    assert quantiles_of(requests.input_tokens) == pytest.approx([964, 6909, 27_367, 85_400], rel=1e-3)
    assert quantiles_of(requests.output_tokens) == pytest.approx([24, 350, 597, 1118], rel=1e-3)
    assert set(requests.prefix) == {0}
    assert requests.reusable_tokens().sum() / requests.input_tokens.sum() == pytest.approx(0.0425, abs=5e-4)


def test_servegen_clients(shared: Path) -> None:
    """Half a day of deepseek-r1: 5.1 to 33 requests/s, one client with half of them, gaps of cv 1.7 all together."""
    path = shared / "data" / "request_traces" / "servegen_deepseek_r1_client_rates_half1.csv.gz"
    made = source("servegen", path=str(path), input_tokens=1000, output_tokens=1000)
    windows = made.windows()
    by_window = np.bincount((windows.start_s // 600).astype(int), weights=windows.rate_per_s)
    assert (by_window.min(), by_window.max()) == pytest.approx((5.14, 33.25), abs=0.01)
    requests = made.draw(43_200, TOPICS, 0, 0)
    counts = np.bincount(requests.arrival_ps // (600 * 10**12), minlength=72)
    assert np.abs(counts / 600 / by_window - 1).max() < 0.35  # bursts of cv 6 in single windows
    assert len(requests) / 43_200 == pytest.approx(by_window.mean(), rel=0.02)
    assert np.bincount(requests.client).max() / len(requests) == pytest.approx(0.517, abs=0.01)
    assert 1.3 < shape_of(requests)[1] < 2.1


def test_a_vllm_run(shared: Path) -> None:
    path = shared / "data" / "llmservingsim_vllm_runs" / "rtxpro6000_Llama-3.1-8B_requests.jsonl"
    requests = source("vllm_run", path=str(path)).draw(600, TOPICS, 0, 0)
    assert len(requests) == 300 and shape_of(requests) == pytest.approx((10.3, 0.96), rel=0.02)  # asked for: 10 per s
    assert requests.arrival_ps[0] == 0 and requests.input_tokens[0] == 2358 and requests.output_tokens[0] == 531
