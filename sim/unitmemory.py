"""What the devices of a serving unit hold, and how many tokens of cache that leaves room for."""

from __future__ import annotations

from sim.cost.memory import serving_memory_bytes
from sim.deployment import Unit
from sim.hardware import BYTES_PER_ELEMENT
from sim.scenario import Scenario
from sim.settings import Policy


def unit_memory(scenario: Scenario, policy: Policy, unit: Unit, kv_tokens: float) -> dict[str, float]:
    """Return the bytes per device by item, ``total`` last, with ``kv_tokens`` of cache on each data-parallel rank.

    Dense weights and the cache's heads are split over tp_size devices (MLA's latent is not: every one of them holds it);
    experts and their replicas over ep_size. MTP modules count where the unit speculates.
    """
    model, parallel = scenario.model_of(policy), unit.parallel
    redundant = policy.placement.num_redundant_experts if model.is_moe else 0
    experts = model.parameters.routed_experts
    copies = 1 + redundant / max(1, model.n_routed_experts)
    dense = model.total_parameters - experts
    speculating = unit.speculative_tokens > 0 and model.num_nextn_predict_layers > 0
    mtp_experts = model.num_nextn_predict_layers * model.n_routed_experts * model.expert_parameters
    if speculating:
        dense, experts = dense + model.mtp_parameters - mtp_experts, experts + mtp_experts
    weight_bytes = BYTES_PER_ELEMENT[scenario.cost.gemm_dtype]
    shards = 1 if model.kv_lora_rank else min(parallel.tp_size, model.num_key_value_heads or model.num_attention_heads)
    return serving_memory_bytes(
        dense_parameters=dense / parallel.tp_size / parallel.pp_size,
        expert_parameters=experts * copies / parallel.ep_size / parallel.pp_size,
        dense_weight_bytes=weight_bytes,
        expert_weight_bytes=weight_bytes,
        kv_tokens=kv_tokens,
        kv_bytes_per_token=model.kv_cache_bytes_per_token(unit.kv_cache_bytes_per_element) / shards / parallel.pp_size,
        batch_tokens=float(unit.max_num_batched_tokens),
        hidden_size=model.hidden_size,
        expert_pairs_per_token=model.num_experts_per_tok + model.n_shared_experts if model.is_moe else 1.0,
        moe_intermediate_size=(model.moe_intermediate_size if model.is_moe else model.intermediate_size) or 0,
    )


def kv_cache_tokens(scenario: Scenario, policy: Policy, unit: Unit) -> int:
    """Return the tokens of cache of one data-parallel rank: ``unit.kv_cache_tokens``, else what memory leaves; 0 if none."""
    if unit.kv_cache_tokens is not None:
        return unit.kv_cache_tokens
    without = unit_memory(scenario, policy, unit, 0.0)["total"]
    each = unit_memory(scenario, policy, unit, 1.0)["total"] - without
    left = unit.gpu_memory_utilization * scenario.cluster.device.memory_bytes - without
    return max(0, int(left // each)) // unit.block_size * unit.block_size
