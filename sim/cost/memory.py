"""Bytes on one device, itemised so that a refusal can print its arithmetic. Plain numbers in, plain numbers out."""

from __future__ import annotations

from sim.units import human


def training_memory_bytes(
    *,
    dense_parameters: float,
    expert_parameters: float,
    expert_optimizer_shards: int = 1,
    dense_optimizer_shards: int = 1,
    weight_bytes: float = 2.0,
    gradient_bytes: float = 4.0,
    optimizer_bytes: float = 8.0,
    tokens_in_flight: float = 0.0,
    layers: float = 0,
    hidden_size: int = 0,
    kept_bytes_per_hidden: float = 15.0,
    expert_pairs_per_token: float = 0.0,
    moe_intermediate_size: int = 0,
    pair_element_bytes: float = 2.0,
    logit_bytes: float = 0.0,
) -> dict[str, float]:
    """Return the bytes per device of a training rank by item, with ``total`` last.

    dense_parameters, expert_parameters: held by this device (after pipeline and expert splits). Gradients fp32 and
    optimiser state of ``optimizer_bytes`` per parameter (fp32 master weight and two bf16 moments, as in the
    DeepSeek-V3 report, section 3.3.1); ZeRO-1 divides the state by ``*_optimizer_shards`` (Rajbhandari et al., arXiv
    1910.02054). Activations of ``tokens_in_flight`` tokens (micro-batch size times micro-batches alive in the
    pipeline) in ``layers`` layers: ``kept_bytes_per_hidden`` x h per token for attention (11) and norms (4), scores
    not kept (Korthikanti et al., arXiv 2205.05198, eq. 1), and per (token, expert) pair, shared experts included, input
    h and gate, up and product 3m at ``pair_element_bytes``. logit_bytes: of the output head. Raises ValueError for negative
    counts or shards below 1.
    """
    _check_counts(
        dense_parameters=dense_parameters,
        expert_parameters=expert_parameters,
        tokens_in_flight=tokens_in_flight,
        expert_pairs_per_token=expert_pairs_per_token,
    )
    if min(expert_optimizer_shards, dense_optimizer_shards) < 1:
        raise ValueError("optimiser shards start at 1")
    parameters = dense_parameters + expert_parameters
    pair = pair_element_bytes * (hidden_size + 3 * moe_intermediate_size)
    shares = dense_parameters / dense_optimizer_shards + expert_parameters / expert_optimizer_shards
    return _totalled(
        {
            "weights": parameters * weight_bytes,
            "gradients": parameters * gradient_bytes,
            "optimizer": shares * optimizer_bytes,
            "activations": tokens_in_flight * layers * kept_bytes_per_hidden * hidden_size,
            "expert_activations": tokens_in_flight * layers * expert_pairs_per_token * pair,
            "logits": logit_bytes,
        }
    )


def serving_memory_bytes(
    *,
    dense_parameters: float,
    expert_parameters: float,
    dense_weight_bytes: float = 1.0,
    expert_weight_bytes: float = 1.0,
    kv_tokens: float = 0.0,
    kv_bytes_per_token: float = 0.0,
    batch_tokens: float = 0.0,
    hidden_size: int = 0,
    expert_pairs_per_token: float = 0.0,
    moe_intermediate_size: int = 0,
    runtime_bytes: float = 3.5 * 2**30,
) -> dict[str, float]:
    """Return the bytes per device of an inference rank by item, with ``total`` last.

    expert_parameters: routed experts hosted here, redundant copies included. kv_tokens: tokens in cache;
    kv_bytes_per_token over the layers held here (DeepSeek-V3, all layers, bf16: 70,272; ISCA 2025 Table 1).
    Activations live in one layer at a time: four bf16 hidden vectors per token, per pair h in, h out and 3m between.
    runtime_bytes: CUDA context, libraries, graphs; aiconfigurator's spec sheets reserve 3.5 GiB. Raises ValueError
    for negative counts.
    """
    _check_counts(
        dense_parameters=dense_parameters,
        expert_parameters=expert_parameters,
        kv_tokens=kv_tokens,
        kv_bytes_per_token=kv_bytes_per_token,
        batch_tokens=batch_tokens,
        expert_pairs_per_token=expert_pairs_per_token,
        runtime_bytes=runtime_bytes,
    )
    pair = 2 * (2 * hidden_size + 3 * moe_intermediate_size)
    return _totalled(
        {
            "weights": dense_parameters * dense_weight_bytes,
            "expert_weights": expert_parameters * expert_weight_bytes,
            "kv_cache": kv_tokens * kv_bytes_per_token,
            "activations": batch_tokens * (8 * hidden_size + expert_pairs_per_token * pair),
            "runtime": runtime_bytes,
        }
    )


def refusal(items: dict[str, float], memory_bytes: float) -> str | None:
    """Return the sum written out if ``items["total"]`` exceeds ``memory_bytes``, else None.

    >>> refusal({"weights": 9e10, "kv_cache": 1e9, "total": 9.1e10}, 8e10)
    'does not fit: weights 90 GB + kv_cache 1 GB = 91 GB, over 80 GB by 11 GB'
    """
    if items["total"] <= memory_bytes:
        return None
    parts = " + ".join(f"{name} {human(value, 'B')}" for name, value in items.items() if name != "total" and value)
    excess = human(items["total"] - memory_bytes, "B")
    return f"does not fit: {parts} = {human(items['total'], 'B')}, over {human(memory_bytes, 'B')} by {excess}"


def _check_counts(**counts: float) -> None:
    for name, value in counts.items():
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")


def _totalled(items: dict[str, float]) -> dict[str, float]:
    return items | {"total": sum(items.values())}
