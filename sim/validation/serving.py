"""Serving iterations of DeepSeek-V3: the published inference profile (absolutely balanced routing), and the online decode
unit with skewed routing under EPLB.

Nothing here is set on these figures: kernels are those of H100 tables and of DeepSeek's training trace, communication is
DeepEP's first release, which the profile (February and March 2025) and the service ran on.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sim.deployment import Unit
from sim.engine.iteration import Timed, Work
from sim.engine.served import Served
from sim.loading import load
from sim.placement import Observed
from sim.pool import Pool
from sim.rng import stream
from sim.scenario import Scenario
from sim.validation import Figure, Inputs

PROFILE = "deepseek-ai/profile-data README; throughput as quoted by InferSim's README"
ONLINE = "DeepSeek open-infra-index, day 6: inference system overview"
SKEW = (
    "routing statistics of DeepSeek-V3 on GPQA (traffic/experts_256.yaml) stand in for the service's own; planned on the "
    "expected loads"
)


def figures(inputs: Inputs) -> Iterator[Figure]:
    yield from _profile(inputs)
    yield from _online(inputs)


def _scenario(inputs: Inputs, ep_size: int, policy: str, *more: str) -> Scenario:
    """DeepSeek-V3 on ``ep_size`` H800 under one policy; 24 SMs for normal kernels (open-infra-index, day 6)."""
    return load(
        inputs.scenarios / "v3.yaml",
        [
            f"cluster.nodes={ep_size // 8}",
            f"parallel={{ep_size: {ep_size}}}",
            "schedule={phase: forward}",
            "steps.warmup.steps=0",
            "cost.communication={kind: port, release: v1_first, num_sms: 24}",
            f"policies=[{policy}]",
            *more,
        ],
    )


def _served(scenario: Scenario, role: str) -> Served:
    policy, parallel = scenario.policies[0], scenario.parallel
    unit = Unit.model_validate({"name": role, "role": role, "parallel": parallel.model_dump(), "micro_batches": 2})
    pool = Pool.of(scenario, policy, 0, sampled_layers=8, pool_tokens=8192)
    shelf = pool.decode if role == "decode" else pool.prefill
    experts = pool.n_routed_experts
    loads = np.array([np.bincount(ids.ravel(), minlength=experts) for ids in shelf.ids], dtype=np.float64)
    rng = stream(scenario.seed, "placement", 0)
    maps = policy.placement.place(scenario.slots(policy, parallel), Observed(loads[None]), rng)
    return Served(scenario, policy, unit, pool, maps)


def _decode(ranks: int, requests: int, context: int) -> Work:
    each, none = np.full(ranks, requests), np.zeros(ranks, dtype=np.int64)
    return Work(
        decode_requests=each,
        decode_tokens=each,
        decode_kv_tokens=each * context,
        prefill_requests=none,
        prefill_tokens=none,
        prefill_pairs=np.zeros(ranks),
        longest=np.full(ranks, context),
        sampled=each,
        topic_tokens=np.array([ranks * requests]),
    )


def _prefill(ranks: int, prompts: int, length: int) -> Work:
    each, none = np.full(ranks, prompts), np.zeros(ranks, dtype=np.int64)
    return Work(
        decode_requests=none,
        decode_tokens=none,
        decode_kv_tokens=none,
        prefill_requests=each,
        prefill_tokens=each * length,
        prefill_pairs=np.full(ranks, prompts * length * (length + 1) / 2),
        longest=np.full(ranks, length),
        sampled=each,
        topic_tokens=np.array([ranks * prompts * length]),
    )


def _per_second(tokens: int, timed: list[Timed]) -> float:
    return tokens * len(timed) / (sum(one.duration_ps for one in timed) / 1e12)


def _profile(inputs: Inputs) -> Iterator[Figure]:
    balanced = "{name: balanced, select: balanced}"
    prefill = _served(_scenario(inputs, 32, balanced), "prefill").time(_prefill(32, 4, 4096), 0)
    decode = _served(_scenario(inputs, 128, balanced), "decode").time(_decode(128, 128, 4096), 0)
    unit = "tokens/s/GPU"
    yield Figure(
        "V3 prefill, EP32, balanced",
        PROFILE,
        7839,
        _per_second(16_384, [prefill]),
        0.15,
        unit,
        reason="a token's experts lie in 4 of 8 groups, as V3's gate has it: on 4 nodes it meets 3.15; the profile does "
        "not say which it took",
    )
    yield Figure(
        "V3 decode, EP128, balanced",
        PROFILE,
        2324,
        _per_second(128, [decode]),
        0.15,
        unit,
        reason="contexts of 4,096 tokens, the prompt's length; how far the profiled step was from the prompt is not said",
    )


def _online(inputs: Inputs) -> Iterator[Figure]:
    policy = (
        "{name: V3, select: {kind: group_limited, topk_group: 4}, placement: {kind: eplb, num_redundant_experts: 32}}"
    )
    file = (inputs.scenarios / "traffic" / "experts_256.yaml").resolve()
    traffic = f"traffic={{extends: {file}, tokens_per_rank: 64}}"
    served = _served(_scenario(inputs, 144, policy, traffic), "decode")
    work = _decode(144, 88, 4989)
    timed = [served.time(work, number) for number in range(served.draws)]
    ours = _per_second(88, timed)
    name = "V3 decode, EP144, 32 redundant, online"
    yield Figure(name, ONLINE, 14_800 / 8, ours, 0.15, "tokens/s/GPU", reason=f"88 requests per GPU; {SKEW}")
    yield Figure(f"{name}: per user", ONLINE, 21, ours / 88, 0.15, "tokens/s", kind="derived")
