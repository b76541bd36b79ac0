"""What the devices of a serving unit hold, and how many tokens of cache that leaves room for."""

from __future__ import annotations

from sim.cost.memory import serving_memory_bytes
from sim.deployment import Unit
from sim.hardware import BYTES_PER_ELEMENT
from sim.model import Model, Parts
from sim.scenario import Scenario
from sim.settings import Policy


def unit_memory(scenario: Scenario, policy: Policy, unit: Unit, kv_tokens: float) -> dict[str, float]:
    """Return the bytes per device by item, ``total`` last, with ``kv_tokens`` of cache on each data-parallel rank.

    Dense weights are split over tp_size devices as far as `dense_parameters` says, and so are the cache's heads (MLA's
    latent is not: every one of them holds it); experts and their replicas over ep_size. MTP modules, and the layer of
    cache that each has, count where the unit speculates.
    """
    model, parallel = scenario.model_of(policy), unit.parallel
    redundant = policy.placement.num_redundant_experts if model.is_moe else 0
    experts = model.parameters.routed_experts
    copies = 1 + redundant / max(1, model.n_routed_experts)
    dense = dense_parameters(model, model.parameters, parallel.tp_size)
    cached_layers = _cached_layers(model)
    if unit.speculative_tokens:
        modules, module = model.num_nextn_predict_layers, model.layer_parameters(model.num_hidden_layers - 1)
        # Its projection of hidden state and embedding is whole on every device.
        dense += modules * (dense_parameters(model, module, parallel.tp_size) + 2 * model.hidden_size**2)
        experts += modules * module.routed_experts
        cached_layers += modules
    weight_bytes = BYTES_PER_ELEMENT[scenario.cost.gemm_dtype]
    cache = model.kv_cache_bytes_per_token(unit.kv_cache_bytes_per_element) * cached_layers / _cached_layers(model)
    return serving_memory_bytes(
        dense_parameters=dense / parallel.pp_size,
        expert_parameters=experts * copies / parallel.ep_size / parallel.pp_size,
        dense_weight_bytes=weight_bytes,
        expert_weight_bytes=weight_bytes,
        kv_tokens=kv_tokens,
        kv_bytes_per_token=cache / _cache_shards(model, parallel.tp_size) / parallel.pp_size,
        batch_tokens=float(unit.max_num_batched_tokens),
        hidden_size=model.hidden_size,
        expert_pairs_per_token=model.num_experts_per_tok + model.n_shared_experts if model.is_moe else 1.0,
        moe_intermediate_size=(model.moe_intermediate_size if model.is_moe else model.intermediate_size) or 0,
    )


def dense_parameters(model: Model, parts: Parts, tp_size: int) -> float:
    """Return those of ``parts`` but routed experts that one of ``tp_size`` devices holds.

    Heads, dense FFNs and vocabulary are split. Whole on every device are what makes the latents of MLA and an indexer's
    keys, the router, and shared experts, whose tokens are split instead (SGLang with DeepEP); a key-value head is as soon
    as there are more devices than heads.
    """
    hidden, attention = model.hidden_size, model.attention_parameters
    index = (model.index_head_dim or 0) if model.index_topk else 0
    whole = hidden * (model.q_lora_rank or 0)
    if index:
        heads = model.index_n_heads or 0
        whole += (model.q_lora_rank or hidden) * heads * index + hidden * (index + heads)
    cached = hidden * (model.kv_cache_bytes_per_token(1) / _cached_layers(model) - index)
    held = whole + cached / _cache_shards(model, tp_size) + (attention - whole - cached) / tp_size
    split = (parts.dense_ffn + parts.head + parts.embedding) / tp_size
    return parts.attention_projection * held / attention + split + parts.shared_experts + parts.router


def _cached_layers(model: Model) -> int:
    return model.num_hidden_layers - model.num_encoder_layers


def _cache_shards(model: Model, tp_size: int) -> int:
    """Return the devices over which the cache is split."""
    return 1 if model.kv_lora_rank else min(tp_size, model.num_key_value_heads or model.num_attention_heads)


def kv_cache_tokens(scenario: Scenario, policy: Policy, unit: Unit) -> int:
    """Return the tokens of cache of one data-parallel rank: ``unit.kv_cache_tokens``, else what memory leaves; 0 if none."""
    if unit.kv_cache_tokens is not None:
        return unit.kv_cache_tokens
    without = unit_memory(scenario, policy, unit, 0.0)["total"]
    each = unit_memory(scenario, policy, unit, 1.0)["total"] - without
    left = unit.gpu_memory_utilization * scenario.cluster.device.memory_bytes - without
    return max(0, int(left // each)) // unit.block_size * unit.block_size
