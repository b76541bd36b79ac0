"""Load balancers against what their users published: EPLB's own example, balance on DeepSeek-R1's skew, and which option
wins where. Plans are made on one window of traffic and judged on a later one, by `sim.advice`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from sim.advice import Serving, Setup
from sim.advice.batches import cut
from sim.advice.bench import Bench, Times
from sim.advice.guess import cost_of, load
from sim.advice.options import BASELINE, Option, options
from sim.cluster import Cluster
from sim.kernels.choose import choose
from sim.model import Model
from sim.placement.eplb import rebalance_experts
from sim.rng import stream
from sim.tokens import F64
from sim.traces import RecordedTrace, checked
from sim.traffic import Batch, TrafficShape
from sim.traffic.affinity import Affinity
from sim.validation import Figure, Inputs

LAYERS = 16
SKEW, TAIL = 0.305, 5.3
"""Spread and degrees of freedom of Student-t popularities, set on the two slot figures of DeepSeek-R1: log-normal loads of
that CV have no expert as hot as the hottest there."""
NARROW = 0.195
"""Spread on GPQA, set on the share of the 32 hottest experts."""

SEEDS = 5
"""Of popularities and tokens, where an order of two options may be one of chance."""
_T = 2.776
"""97.5 % quantile of Student's t with SEEDS - 1 = 4 degrees of freedom."""

_README = "deepseek-ai/EPLB README.md, example"
_LOADS = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
_MAPS = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]
_R1 = "TensorRT-LLM tech blog 4, Table 1 (DeepSeek-R1, EP32, machine translation, 8 slots per rank)"
_GPQA = "johanna-rock/moe-balance notebook, commit 700358b5350e (DeepSeek-V3 on GPQA), mean of 58 layers"
_ATOM = "ROCm/ATOM pull request 1210 (DeepSeek-V4-Pro, prefill, EP8, 8 x MI355X)"
_ATOM_STEP_S = 8 * 8192 / (6.48 * 8192)
"""8 ranks of 8,192 tokens at 6.48 requests of 8,192 tokens per second."""
_TABLES = "aiconfigurator-core fused-MoE tables, power law over balanced"


def figures(inputs: Inputs) -> Iterator[Figure]:
    """Yield the example, DeepSeek-R1 and -V3's skew, ATOM's four configurations, and where skew and replicas cost."""
    found = rebalance_experts(_LOADS, 16, 4, 2, 8)[0]
    yield Figure(
        "EPLB's example: slots that differ", _README, 0, float((found != np.array(_MAPS)).sum()), 0, absolute=True
    )
    yield from _r1(inputs)
    yield from _gpqa()
    yield from _atom(inputs)
    yield from _sizes(inputs)


def made(
    n_experts: int,
    k: int,
    n_tokens: int,
    *,
    layers: int,
    skew: float,
    sequence_length: int = 1,
    random_text: bool = False,
    seed: int = 0,
) -> RecordedTrace:
    """Return choices of a plain top-k under Student-t popularities. random_text: tokens of a sequence share nothing."""
    popularity = skew * np.clip(stream(seed, "validation", "popularity").standard_t(TAIL, (layers, n_experts)), -30, 30)
    traffic = Affinity(
        popularity=tuple(map(tuple, popularity.tolist())), sequence_length=sequence_length, layer_profile=None
    )
    if random_text:
        traffic = traffic.model_copy(
            update={"sequence_variance": 0.0, "slow_variance": 0.0, "fast_variance": 0.9, "fast_correlation": 0.0}
        )
    source = traffic.start(TrafficShape(layers, n_experts, k, 1), seed, 0)
    return _routed(source.batch("train", 0, n_ranks=1, tokens_per_rank=n_tokens), n_experts, k, layers)


def _routed(batch: Batch, n_experts: int, k: int, layers: int) -> RecordedTrace:
    one, zero = np.ones(n_experts, np.float32), np.zeros(n_experts, np.float32)
    logits = (batch.tokens(layer, 0).logits for layer in range(layers))
    topk = choose(10**9).topk
    ids = np.stack([topk(each, one, zero, k) for each in logits if each is not None])
    return checked("made", ids, n_routed_experts=n_experts)


class Case:
    """Traffic on a shipped model and cluster, cut into windows."""

    def __init__(
        self,
        inputs: Inputs,
        trace: RecordedTrace,
        *,
        model: str,
        cluster: str,
        ep_size: int,
        tokens: int,
        phase: Serving,
    ) -> None:
        machine = load(Cluster, cluster, inputs.scenarios / "clusters", "cluster")
        sizes = load(Model, model, inputs.scenarios / "models", "model")
        self.batches = cut(
            trace, ep_size=ep_size, tokens_per_rank=tokens, phase=phase, layers=len(trace.layers), shuffle=False, seed=0
        )
        self.bench = Bench(Setup(sizes, machine, cost_of(machine.device), ep_size, other_s=0.0), self.batches, phase)

    def times(self, option: Option = BASELINE) -> Times:
        """Return the times of window B under the plan of window A."""
        planned = self.batches.n_planned
        plan = self.bench.plan(option, range(planned))
        return self.bench.times(option, plan, range(planned, self.batches.n_windows))

    def step_s(self, option: Option = BASELINE) -> float:
        return float(self.times(option).step_s.mean())

    def experts_s(self) -> float:
        """Return seconds of the busiest rank's experts per step, without a balancer."""
        found = self.times()
        return float((found.step_s * (1 - found.communication)).mean())


def _r1(inputs: Inputs) -> Iterator[Figure]:
    trace = made(256, 8, 18 * 4096, layers=LAYERS, skew=SKEW)
    case = Case(inputs, trace, model="deepseek_v3", cluster="gb200_nvl72", ep_size=32, tokens=128, phase="decode")
    slots: F64 = np.stack(
        [np.bincount(ids.ravel(), minlength=256) for b in range(18) for ids in case.batches.batch(b)]
    ).astype(np.float64)
    mean = slots.mean(axis=1)
    cv, peak = float((slots.std(axis=1) / mean).mean()), float((slots.max(axis=1) / mean - 1).mean())
    yield Figure("R1: std / mean over slots", _R1, 164.1 / 128, cv, 0.05, kind="calibration")
    yield Figure("R1: (max - mean) / mean over slots", _R1, 10.948, peak, 0.05, kind="calibration")
    yield Figure("R1: (max - mean) / mean over ranks", _R1, 1.564, float(case.times().imbalance.mean()), 0.2)
    plan = {option.redundant: option for option in options([0, 32])[:2]}
    best, order = (
        float(case.times(plan[32]).imbalance.mean()),
        "the same, with EPLB: order of 0.1, read as a factor of 2",
    )
    yield Figure("R1: the same over ranks, EPLB, 32 redundant", order, 0.05, best, 0, relation="at_least")
    yield Figure("R1: the same, at most", order, 0.2, best, 0, relation="at_most")
    alone = float(case.times(plan[0]).imbalance.mean())
    reason = "an expert hotter than a rank's mean stays where it is: only replicas split it"
    yield Figure(
        "R1: EPLB without redundant experts helps less",
        "vllm-ascend RFC 16795",
        1,
        alone / best,
        0,
        relation="at_least",
        reason=reason,
    )


def _gpqa() -> Iterator[Figure]:
    """The tail set on R1, another spread: what that says of the hottest expert is a prediction."""
    trace = made(256, 8, 65_536, layers=LAYERS, skew=NARROW)
    counts = np.stack([np.bincount(ids.ravel(), minlength=256) for ids in trace.topk_ids]) / trace.topk_ids[0].size
    share = 100 * np.sort(counts, axis=1)
    top, hottest = float(share[:, -32:].sum(axis=1).mean()), float(share[:, -1].mean())
    yield Figure("V3 on GPQA: share of the 32 hottest experts", _GPQA, 31.33, top, 0.03, "%", kind="calibration")
    yield Figure("V3 on GPQA: share of the hottest expert", _GPQA, 2.657, hottest, 0.25, "%")


def _atom(inputs: Inputs) -> Iterator[Figure]:
    """Prompts of random tokens, as in the run; the skew is DeepSeek-R1's, since V4-Pro's is not published."""
    steps = np.array([_atom_steps(inputs, seed) for seed in range(SEEDS)])
    names = ("rearranged only", "64 replicas (its naive)", "64 biased replicas")
    for i, name in enumerate(names):
        ratios = steps[:, i] / steps[:, i + 1]
        last = names[i - 1] if i else "no balancer"
        low = float(ratios.mean() - _T * ratios.std(ddof=1) / math.sqrt(SEEDS))
        apart = "" if low >= 1 else "; not separated: this order is not predicted"
        yield Figure(
            f"V4-Pro prefill, {name}: time of {last} over its, low end of 95 %",
            _ATOM,
            1,
            low,
            0,
            relation="at_least",
            reason=f"mean {ratios.mean():.3f} of {SEEDS} seeds, {ratios.min():.3f} to {ratios.max():.3f}{apart}",
        )
    reason = (
        "V4-Pro's skew is not published, and MI355X stands in as MI300X; the rest of the step is what the run without a "
        "balancer leaves"
    )
    gains = 100 * (_ATOM_STEP_S / (_ATOM_STEP_S - steps[:, :1] + steps[:, 1:]) - 1)
    for name, published, gain in zip(names, (16.7, 24.4, 34.0), gains.T, strict=True):
        spread = f"mean of {SEEDS} seeds, {gain.min():.1f} to {gain.max():.1f}; {reason}"
        yield Figure(
            f"V4-Pro prefill, {name}: throughput gained", _ATOM, published, float(gain.mean()), 0.3, "%", reason=spread
        )


def _atom_steps(inputs: Inputs, seed: int) -> list[float]:
    """Return seconds of the experts' part of a step without a balancer, rearranged, and with 64 replicas of either kind."""
    trace = made(
        384, 6, 3 * 8 * 8192, layers=max(1, LAYERS // 2), skew=SKEW, sequence_length=8192, random_text=True, seed=seed
    )
    case = Case(inputs, trace, model="deepseek_v4_pro", cluster="mi300x", ep_size=8, tokens=8192, phase="prefill")
    rearranged, replicated, _, biased = options([0, 64])
    return [case.step_s(option) for option in (BASELINE, rearranged, replicated, biased)]


def _sizes(inputs: Inputs) -> Iterator[Figure]:
    few = {skew: _v3(inputs, skew, tokens=2, phase="decode", ep_size=32) for skew in (0.0, SKEW)}
    ratio = few[SKEW].step_s() / few[0.0].step_s()
    yield Figure(
        "skew is free at 2 tokens per device: time against uniform",
        f"{_TABLES}: 0.88 to 1.13 up to 256 tokens",
        1,
        ratio,
        0.02,
        relation="at_most",
    )
    many = {skew: _v3(inputs, skew, tokens=2048, phase="prefill", ep_size=64) for skew in (0.0, SKEW)}
    ratio = many[SKEW].experts_s() / many[0.0].experts_s()
    measured = f"{_TABLES}: 1.6 to 2.4 on EP8 to EP64 of H100, 3 to 6 on EP128"
    yield Figure(
        "skew at 2,048 tokens, EP64: experts' time against uniform", measured, 2, ratio, 0.1, relation="at_least"
    )
    yield Figure("the same, at most", measured, 4, ratio, 0.1, relation="at_most")
    rearranged, replicated = options([0, 64])[:2]
    mild = _v3(inputs, SKEW / 3, tokens=16, phase="decode", ep_size=32)
    ratio = mild.step_s(replicated) / mild.step_s(rearranged)
    yield Figure(
        "mild skew, 16 tokens: replicas take longer than rearranging",
        "vLLM 30075: gains not guaranteed",
        1,
        ratio,
        0,
        relation="at_least",
    )
    ratio = many[SKEW].step_s(rearranged) / many[SKEW].step_s(replicated)
    yield Figure(
        "strong skew, 2,048 tokens: rearranging takes longer than replicas", _ATOM, 1, ratio, 0, relation="at_least"
    )


def _v3(inputs: Inputs, skew: float, *, tokens: int, phase: Serving, ep_size: int) -> Case:
    batches, layers = (18, LAYERS // 2) if phase == "decode" else (3, LAYERS // 8)
    trace = made(256, 8, batches * ep_size * tokens, layers=max(1, layers), skew=skew)
    return Case(inputs, trace, model="deepseek_v3", cluster="h800", ep_size=ep_size, tokens=tokens, phase=phase)
