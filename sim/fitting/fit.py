"""Fit the affinity generator to a recorded trace, layer by layer, by simulated moments.

What is looked for in a layer is how a token's variance is shared between the generator's parts (sequence, slow, fast,
token, independent noise), how many latent factors work and how experts gather on them, how experts differ in memory, and
how expert popularity follows from the measured loads. The
loads of few sequences hold those sequences' own preferences, so popularity is not copied but mapped: mu = b (u + c (u^2 -
mean u^2)) with u the probit of an expert's share, b and c fitted so that *synthetic* traces of the same sequences have
the measured imbalance. Moments are all of `statistics`; the minimiser is Levenberg-Marquardt on logarithms with common
random numbers, residuals beyond 20 % weighing less and less. Memory (correlations of the slow and fast parts) is common
to all layers: pilot fits of a few of them look for it too, and its medians hold for all; a shared prefix is counted.
The logit scale and its spread over tokens move no choice and follow last, from the gate weights.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from sim.fitting import statistics as stat
from sim.fitting.synthesis import Draw, draw, gate_weights, route
from sim.tokens import F64, I16
from sim.traces import RecordedTrace
from sim.traffic import TrafficShape
from sim.traffic.affinity import Affinity, rescale
from sim.traffic.layers import LayerValues
from sim.traffic.topics import Topic

MAX_RANK = 16
PARTS = ("sequence_variance", "slow_variance", "fast_variance", "token_variance")
_SHARED = 0.75  # of experts that two sequences' tokens at one position share, in a prefix common to all
_MEMORY_LAYERS = 4
_MIN_TOKENS = 512
MAX_TOKENS = 2**18
"""Tokens of a trace that are looked at; of a longer one, every second or m-th sequence."""
FIT_TOKENS = 48_000
"""Tokens that most of a fit looks at; the whole trace has the last word on popularity and topics (`_POLISHED`)."""
_POLISHED = ("popularity_slope", "popularity_curve", "topic_factor")
_SEEDS_TOKENS = 48_000  # tokens simulated per evaluation, over several seeds
_MAX_SEEDS = 6


class Free(NamedTuple):
    """A parameter that is looked for: where it starts, its bounds, and the step of its finite difference."""

    start: float
    low: float
    high: float
    step: float


# Shares of variance are logarithms of their ratio to the independent noise's.
FREE = {
    "sequence_variance": Free(-0.5, -6.0, 4.0, 0.4),
    "slow_variance": Free(-0.3, -6.0, 4.0, 0.4),
    "fast_variance": Free(1.5, -6.0, 5.0, 0.4),
    "token_variance": Free(-0.5, -6.0, 4.0, 0.4),
    "popularity_slope": Free(-0.1, -1.6, 1.2, 0.12),  # log b
    "popularity_curve": Free(0.0, -0.6, 0.6, 0.12),  # c
    "latent_rank": Free(float(np.log(8.0)), 0.4, float(np.log(MAX_RANK)), 0.2),
    "basis_tail": Free(-2.3, -4.6, 2.3, 0.5),
    "memory_spread": Free(2.0, 0.0, 6.0, 0.5),
    "topic_factor": Free(-1.2, -3.5, 0.7, 0.3),
}


FREE_WEIGHTS = {
    "logit_scale": Free(0.0, -3.0, 3.0, 0.1),  # logarithm
    "scale_spread": Free(0.2, 0.0, 0.8, 0.1),
}
FREE_MEMORY = {
    "slow": Free(2.6, 1.0, 4.6, 0.4),  # log-odds of the slow part's correlation
    "fast": Free(-0.6, -3.0, 1.5, 0.4),  # of the fast part's
    "spread": Free(2.0, 0.0, 5.0, 0.5),  # correlation_spread
}


class Memory(NamedTuple):
    """What all layers share."""

    slow_correlation: float
    fast_correlation: float
    prefix_length: int
    correlation_spread: float


class FittedLayer(NamedTuple):
    """One layer's fit: what was looked for (`FREE`), the generator's values it means, and the trace's statistics."""

    layer: int
    theta: dict[str, float]
    values: LayerValues
    statistics: dict[str, float]


@dataclass(frozen=True)
class Fitted:
    """A generator fitted to a trace."""

    trace: RecordedTrace
    memory: Memory
    layers: tuple[FittedLayer, ...]
    renormalised: bool
    domains: tuple[str, ...]

    @property
    def real(self) -> list[dict[str, float]]:
        return [layer.statistics for layer in self.layers]


def fit(
    trace: RecordedTrace,
    *,
    seed: int = 0,
    jobs: int | None = None,
    progress: Callable[[int, int], None] = lambda done, all_: None,
) -> Fitted:
    """Return the generator fitted to ``trace``; ``progress(done, all)`` is called after each layer.

    Raises ValueError for a trace of fewer than 512 tokens, or whose experts are all or nothing.
    """
    if trace.n_tokens < _MIN_TOKENS:
        raise ValueError(f"trace: expected at least {_MIN_TOKENS} tokens, found {trace.n_tokens}")
    if trace.topk_ids.shape[2] >= trace.n_routed_experts:
        raise ValueError(f"trace: expected fewer experts per token than experts, found {trace.topk_ids.shape[2]}")
    trace = shortened(trace, MAX_TOKENS)
    where = stat.layout(trace.seqlens, trace.domain_of_sequence)
    real = [statistics_of(trace, row, where) for row in range(len(trace.layers))]
    domains = _domains(trace)
    renormalised = trace.topk_weights is not None and bool(np.median(trace.topk_weights.sum(axis=2)) > 0.97)
    whole = _Job(trace, where, Memory(0.93, 0.35, shared_prefix(trace), 2.0), domains, renormalised, seed)
    part = shortened(trace, FIT_TOKENS)
    job, wanted = whole, real
    if part is not trace:
        where = stat.layout(part.seqlens, part.domain_of_sequence)
        job = whole._replace(trace=part, where=where)
        wanted = [statistics_of(part, row, where) for row in range(len(part.layers))]
    rows = sorted({round(x) for x in np.linspace(0, len(real) - 1, 2 * _MEMORY_LAYERS + 1)[1::2]})
    n_steps = len(rows) + len(real)
    with _workers(jobs, n_steps, (job, whole)) as run:
        pilots = []
        for theta in run(_fit_memory, [(row, wanted[row]) for row in rows]):
            pilots.append(theta)
            progress(len(pilots), n_steps)
        memory = _median_memory(pilots, job.memory)
        nearest = [pilots[int(np.abs(np.array(rows) - row).argmin())] for row in range(len(real))]
        tasks = [(row, memory, wanted[row], real[row], nearest[row]) for row in range(len(real))]
        found: list[FittedLayer] = []
        for layer in run(_fit_layer, tasks):
            found.append(layer)
            progress(len(pilots) + len(found), n_steps)
    return Fitted(trace, memory, tuple(found), renormalised, domains)


_SHARED_JOBS: list[tuple[_Job, _Job]] = []
"""What the tasks of this process are about: the part of a trace that is fitted, and the whole."""


def _share(jobs: tuple[_Job, _Job]) -> None:
    _SHARED_JOBS[:] = [jobs]


def _start_worker(jobs: tuple[_Job, _Job]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a traceback
    _share(jobs)


@contextlib.contextmanager
def _workers(
    n_workers: int | None, n_tasks: int, jobs: tuple[_Job, _Job]
) -> Iterator[Callable[[Callable[..., Any], list[Any]], Iterable[Any]]]:
    """Yield a map over argument tuples, in order, on ``n_workers`` processes (one: this one)."""
    n = min(n_workers or os.cpu_count() or 1, n_tasks)
    if n == 1:
        _share(jobs)
        try:
            yield lambda function, tasks: (function(*task) for task in tasks)
        finally:
            _SHARED_JOBS.clear()
            _DRAWN.clear()
        return
    with ProcessPoolExecutor(n, initializer=_start_worker, initargs=(jobs,)) as pool:
        try:
            yield lambda function, tasks: pool.map(function, *zip(*tasks, strict=True))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def shortened(trace: RecordedTrace, n_tokens: int) -> RecordedTrace:
    """Return about ``n_tokens`` tokens of ``trace`` at most: every m-th sequence, the last one cut if it must be."""
    if trace.n_tokens <= n_tokens:
        return trace
    every = -(-trace.n_tokens // n_tokens)
    used = trace.part(sequences=range(0, len(trace.seqlens), every))
    if used.n_tokens <= n_tokens:
        return used
    ends = np.cumsum(used.seqlens)
    n_sequences = int(np.searchsorted(ends, n_tokens)) + 1
    lengths = used.seqlens[:n_sequences].copy()
    lengths[-1] -= int(ends[n_sequences - 1]) - n_tokens
    names = used.domain_of_sequence
    return replace(
        used,
        topk_ids=used.topk_ids[:, :n_tokens],
        topk_weights=None if used.topk_weights is None else used.topk_weights[:, :n_tokens],
        scores=None if used.scores is None else used.scores[:, :n_tokens],
        seqlens=lengths,
        domain_of_sequence=None if names is None else names[:n_sequences],
    )


def statistics_of(trace: RecordedTrace, row: int, where: stat.Layout) -> dict[str, float]:
    """Return the statistics of layer position ``row`` of ``trace``."""
    weights = None if trace.topk_weights is None else trace.topk_weights[row]
    return stat.layer_statistics(trace.topk_ids[row], trace.n_routed_experts, where, weights)


def _median_memory(pilots: Sequence[dict[str, float]], start: Memory) -> Memory:
    """Return the memory between those of a few layers."""
    slow, fast, spread = (float(np.median([theta[name] for theta in pilots])) for name in FREE_MEMORY)
    return start._replace(
        slow_correlation=round(_logistic(slow), 3),
        fast_correlation=round(_logistic(fast), 3),
        correlation_spread=round(spread, 2),
    )


def _logistic(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))


def _fit_memory(row: int, real: dict[str, float]) -> dict[str, float]:
    """Return the parameters of a fit of one layer that looks for the memory too."""
    job, _ = _SHARED_JOBS[0]
    free = {name: FREE[name] for name in _free(job)}
    if "latent_lag_1" in real:
        free |= FREE_MEMORY
    probits = probits_of(job.trace, row, job.memory.prefix_length)
    real = _choices(real)

    def function(theta: F64) -> F64:
        now = dict(zip(free, theta.tolist(), strict=True))
        memory = _memory(job.memory, now)
        return residuals(real, _simulated(job, memory, 2000, row, values_of(now, probits), real))

    theta = minimise(function, list(free.values()), n_rounds=6)
    return {name: each.start for name, each in FREE_MEMORY.items()} | dict(zip(free, theta.tolist(), strict=True))


def _memory(start: Memory, theta: dict[str, float]) -> Memory:
    if "slow" not in theta:
        return start
    return start._replace(
        slow_correlation=_logistic(theta["slow"]),
        fast_correlation=_logistic(theta["fast"]),
        correlation_spread=theta["spread"],
    )


def _choices(real: dict[str, float]) -> dict[str, float]:
    """Return the statistics that the choices decide, without the gate weights."""
    return {name: value for name, value in real.items() if not name.startswith("weight_rank")}


def shared_prefix(trace: RecordedTrace) -> int:
    """Return how many leading tokens all sequences route (almost) alike: a shared prompt's length, 0 without one."""
    lengths = trace.seqlens
    starts = np.cumsum(lengths) - lengths
    if len(lengths) < 4:
        return 0
    k, n_experts = trace.topk_ids.shape[2], trace.n_routed_experts
    for position in range(int(lengths.max())):
        there = starts[lengths > position] + position
        n = len(there)
        if n < max(4, 0.9 * len(lengths)):
            return position
        pairs = 0.0
        for layer in trace.topk_ids[:, there]:
            count = np.bincount(layer.ravel(), minlength=n_experts)
            pairs += float((count * (count - 1)).sum()) / (n * (n - 1) * k)
        if pairs / len(trace.layers) < _SHARED:
            return position
    return 0


def _domains(trace: RecordedTrace) -> tuple[str, ...]:
    names = sorted(set(trace.domain_of_sequence or ()))
    return tuple(names) if len(names) > 1 else ()


class _Job(NamedTuple):
    trace: RecordedTrace
    where: stat.Layout
    memory: Memory
    domains: tuple[str, ...]
    renormalised: bool
    seed: int


def generator(trace: RecordedTrace, memory: Memory, domains: Sequence[str]) -> tuple[Affinity, TrafficShape]:
    """Return a config that draws every part, and the shape, for synthetic traces of the sequences of ``trace``."""
    n_layers, _, k = trace.topk_ids.shape
    config = Affinity(
        tokens_per_rank=1,
        sequence_length=max(1, int(trace.seqlens.max())),
        topic_tree=tuple(Topic(name=name, popularity_sd=1.0) for name in domains)
        or (Topic(name="all", popularity_sd=0.0),),
        latent_rank=MAX_RANK,
        sequence_variance=0.2,
        slow_variance=0.2,
        slow_correlation=memory.slow_correlation,
        fast_variance=0.2,
        fast_correlation=memory.fast_correlation,
        correlation_spread=memory.correlation_spread,
        token_variance=0.2,
        scale_spread=0.2,
        prefix_length=memory.prefix_length,
        layer_profile=None,
    )
    return config, TrafficShape(n_layers, trace.n_routed_experts, k, 1)


def draws(job: _Job, seeds: Sequence[int]) -> list[Draw]:
    """Return the latents of the job's sequences, one `Draw` per seed."""
    config, shape = generator(job.trace, job.memory, job.domains)
    names = job.trace.domain_of_sequence or ()
    topics = [job.domains.index(name) for name in names] if job.domains else None
    return [draw(config, shape, job.trace.seqlens, seed, topics) for seed in seeds]


_DRAWN: dict[tuple[Any, ...], list[Draw]] = {}
"""The last draws of this process: they serve all layers."""


def _fitting_draws(job: _Job, memory: Memory, first_seed: int) -> list[Draw]:
    n_seeds = int(np.clip(_SEEDS_TOKENS // job.trace.n_tokens, 1, _MAX_SEEDS))
    trace = job.trace
    key: tuple[Any, ...] = (
        memory,
        first_seed,
        job.seed,
        job.domains,
        trace.domain_of_sequence,
        trace.seqlens.tobytes(),
    )
    key = (*key, trace.topk_ids.shape, trace.n_routed_experts)
    if key not in _DRAWN:
        _DRAWN.clear()
        _DRAWN[key] = draws(job._replace(memory=memory), [job.seed + first_seed + i for i in range(n_seeds)])
    return _DRAWN[key]


def _simulated(
    job: _Job, memory: Memory, first_seed: int, row: int, values: LayerValues, real: dict[str, float]
) -> dict[str, float]:
    """Return the mean of the statistics in ``real`` over synthetic traces of a layer with ``values``."""
    k, n_experts = job.trace.topk_ids.shape[2], job.trace.n_routed_experts
    found = [
        stat.layer_statistics(route(one.logits(row, values), k), n_experts, job.where)
        for one in _fitting_draws(job, memory, first_seed)
    ]
    return {name: float(np.mean([each[name] for each in found])) for name in real}


def _fit_layer(
    row: int, memory: Memory, wanted: dict[str, float], real: dict[str, float], near: dict[str, float]
) -> FittedLayer:
    """Fit a layer to the part's statistics ``wanted`` from the parameters ``near``, then to the whole trace's ``real``."""
    job, whole = (one._replace(memory=memory) for one in _SHARED_JOBS[0])
    names = _free(job)
    theta = {name: near[name] for name in names}
    theta = _fit_choices(job, row, wanted, theta, names)
    if whole.trace is not job.trace:
        theta = _fit_choices(whole, row, real, theta, [name for name in names if name in _POLISHED])
    probits = probits_of(whole.trace, row, whole.memory.prefix_length)
    if "weight_rank_1" in real:
        theta |= _fit_weights(job, row, wanted, values_of(theta, probits))
    return FittedLayer(whole.trace.layers[row], theta, values_of(theta, probits), real)


def _fit_choices(
    job: _Job, row: int, real: dict[str, float], start: dict[str, float], names: Sequence[str]
) -> dict[str, float]:
    """Return ``start`` with the parameters ``names`` changed to fit."""
    real = _choices(real)
    probits = probits_of(job.trace, row, job.memory.prefix_length)

    def function(theta: F64) -> F64:
        values = values_of(start | dict(zip(names, theta.tolist(), strict=True)), probits)
        return residuals(real, _simulated(job, job.memory, 1000, row, values, real))

    theta = minimise(function, [FREE[name] for name in names], [start[name] for name in names])
    return start | dict(zip(names, theta.tolist(), strict=True))


def _fit_weights(job: _Job, row: int, real: dict[str, float], values: LayerValues) -> dict[str, float]:
    """Return the logit scale and its spread over tokens that give the gate weights of ``real``; choices stay."""
    k = job.trace.topk_ids.shape[2]
    profile = {name: value for name, value in real.items() if name.startswith("weight_rank")}
    routed = []
    for one in _fitting_draws(job, job.memory, 1000):
        logits = one.logits(row, values._replace(logit_scale=1.0, scale_spread=0.0))
        routed.append((logits, route(logits, k), one.sureness))

    def function(theta: F64) -> F64:
        mean = np.zeros(k)
        for logits, ids, sureness in routed:
            scaled = logits * np.float32(np.exp(theta[0]))
            rescale(scaled, sureness, float(theta[1]), 0.0)
            mean += stat.weight_profile(gate_weights(scaled, ids, job.renormalised)) / len(routed)
        return residuals(profile, {f"weight_rank_{rank + 1}": float(value) for rank, value in enumerate(mean)})

    theta = minimise(function, list(FREE_WEIGHTS.values()), n_rounds=12)
    return dict(zip(FREE_WEIGHTS, theta.tolist(), strict=True))


def _free(job: _Job) -> list[str]:
    """Return the parameters of the choices that the trace says something about."""
    return [name for name in FREE if name != "topic_factor" or job.domains]


def synthetic_layer(
    one: Draw, row: int, values: LayerValues, k: int, n_experts: int, where: stat.Layout, renormalised: bool
) -> dict[str, float]:
    """Return the statistics of MoE layer ``row`` of a synthetic trace, gate weights included."""
    logits = one.logits(row, values)
    ids = route(logits, k)
    return stat.layer_statistics(ids, n_experts, where, gate_weights(logits, ids, renormalised))


def probits_of(trace: RecordedTrace, row: int, prefix_length: int) -> F64:
    """Return probit of each expert's share of the tokens behind the shared prefix, centred."""
    from scipy.stats import norm

    starts = np.repeat(np.cumsum(trace.seqlens) - trace.seqlens, trace.seqlens)
    body = np.arange(trace.n_tokens) - starts >= prefix_length
    if int(body.sum()) < _MIN_TOKENS:
        body[:] = True
    ids: I16 = trace.topk_ids[row][body]
    share = np.bincount(ids.ravel(), minlength=trace.n_routed_experts) / len(ids)
    probit = norm.ppf(np.clip(share, 0.5 / len(ids), 1 - 0.5 / len(ids)))
    centred: F64 = probit - probit.mean()
    return centred


def values_of(theta: dict[str, float], probits: F64) -> LayerValues:
    """Return the generator's values for parameters ``theta`` (`FREE`) and an expert popularity of shape ``probits``."""
    ratio = {name: float(np.exp(theta[name])) if name in theta else 0.0 for name in PARTS}
    whole = 1.0 + sum(ratio.values())
    curved = probits + theta["popularity_curve"] * (probits**2 - (probits**2).mean())
    popularity = np.exp(theta["popularity_slope"]) * curved
    return LayerValues(
        logit_scale=float(np.exp(theta.get("logit_scale", 0.0))),
        popularity=tuple(float(value) for value in popularity),
        popularity_sd=float(popularity.std()),
        topic_factor=float(np.exp(theta["topic_factor"])) if "topic_factor" in theta else 0.0,
        latent_rank=float(np.exp(theta["latent_rank"])),
        basis_tail=float(np.exp(theta["basis_tail"])),
        memory_spread=theta["memory_spread"],
        scale_spread=theta.get("scale_spread", 0.0),
        iid_variance=1.0 / whole,
        **{name: value / whole for name, value in ratio.items()},
    )


def residuals(real: dict[str, float], synthetic: dict[str, float]) -> F64:
    """Return one number per statistic, 0.2 where it is 20 % off: log ratios, or differences for those near 0."""
    found = []
    for name, value in real.items():
        near = next((gap for prefix, gap in stat.NEAR_ZERO.items() if name.startswith(prefix)), None)
        if near is not None:
            found.append((synthetic[name] - value) * stat.TOLERANCE / max(near, stat.TOLERANCE * abs(value)))
        else:
            tiny = 1e-6
            found.append(float(np.log(max(synthetic[name], tiny) / max(value, tiny))))
    return np.array(found)


def minimise(
    function: Callable[[F64], F64], free: Sequence[Free], start: Sequence[float] | None = None, n_rounds: int = 7
) -> F64:
    """Return the parameters with the least soft-L1 loss found by Levenberg-Marquardt, within bounds, from ``start``."""
    usual, low, high, step = np.array(free).T
    n_free = len(free)

    def loss(r: F64) -> float:
        return float((np.sqrt(1 + (r / 0.15) ** 2) - 1).sum())

    theta: F64 = usual.copy() if start is None else np.clip(np.array(start), low, high)
    now = function(theta)
    damping = 0.1
    jacobian = np.zeros((len(now), n_free))
    fresh = False
    for _ in range(n_rounds):
        if not fresh:
            for i in range(n_free):
                h = step[i] if theta[i] + step[i] <= high[i] else -step[i]
                moved = theta.copy()
                moved[i] += h
                jacobian[:, i] = (function(moved) - now) / h
            fresh = True
        weight = 1 / np.sqrt(1 + (now / 0.15) ** 2)
        normal = (jacobian * weight[:, None]).T @ jacobian
        gradient = (jacobian * weight[:, None]).T @ now + 0.02 * (theta - usual)
        for _ in range(3):
            system = normal + np.diag(damping * (np.diag(normal) + 0.05)) + 0.02 * np.eye(n_free)
            move = np.clip(np.linalg.solve(system, -gradient), -3 * step, 3 * step)
            tried = np.clip(theta + move, low, high)
            then = function(tried)
            if loss(then) < loss(now):
                gain = loss(now) - loss(then)
                theta, now, damping, fresh = tried, then, damping / 4, False
                break
            damping *= 5
        else:
            break
        if gain < 0.02:
            break
    return theta


def synthetic_statistics(
    fitted: Fitted, seeds: Sequence[int], trace: RecordedTrace | None = None
) -> list[dict[str, float]]:
    """Return each layer's statistics of synthetic traces, averaged over ``seeds``.

    trace: whose sequences to imitate (default: the fitted one's).
    """
    target = trace or fitted.trace
    where = stat.layout(target.seqlens, target.domain_of_sequence)
    job = _Job(target, where, fitted.memory, fitted.domains, fitted.renormalised, 0)
    k, n_experts = target.topk_ids.shape[2], target.n_routed_experts
    total: list[list[dict[str, float]]] = [[] for _ in fitted.layers]
    for seed in seeds:
        (one,) = draws(job, [seed])
        for row, layer in enumerate(fitted.layers):
            total[row].append(synthetic_layer(one, row, layer.values, k, n_experts, where, fitted.renormalised))
    return [{name: float(np.mean([each[name] for each in seen])) for name in seen[0]} for seen in total]
