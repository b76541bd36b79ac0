"""What TrunkTimes counts, by cost laws that answer with parameters, bytes or requests; and memory of the same weights."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from sim.cost.attention import attention_shape
from sim.deployment import Unit
from sim.engine.serving_durations import TrunkTimes
from sim.engine.serving_program import program
from sim.loading import load
from sim.model import Model
from sim.scenario import Scenario
from sim.tokens import F64
from sim.unitmemory import dense_parameters, unit_memory
from tests.iteration_model import SCENARIOS


class Products:
    """Every product takes tokens x parameters, everything else nothing."""

    def gemm_s(self, device: object, *, tokens: F64, in_features: float, out_features: float, **_: Any) -> F64:
        return np.asarray(tokens * in_features * out_features, dtype=np.float64)

    def elementwise_s(self, device: object, *, bytes: F64, kernels: int = 0) -> F64:
        return np.zeros_like(bytes)

    def attention_s(self, device: object, *, query_tokens: F64, **_: Any) -> F64:
        return np.zeros(query_tokens.shape[:-1])


class Bytes(Products):
    """Only elementwise kernels take time, 1 s per byte."""

    def gemm_s(self, device: object, *, tokens: F64, **_: Any) -> F64:
        return np.zeros_like(tokens)

    def elementwise_s(self, device: object, *, bytes: F64, kernels: int = 0) -> F64:
        return bytes


class Asked(Products):
    """Keeps what attention is asked for; it takes as many seconds as the window, or the longest context."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int]] = []

    def attention_s(self, device: object, *, query_tokens: F64, **asked: Any) -> F64:
        self.phases.append((asked["phase"], int((query_tokens > 0).sum())))
        self.query_tokens, kv_tokens, window = query_tokens, asked["kv_tokens"], asked["window"]
        self.kv_tokens = kv_tokens
        longest: F64 = kv_tokens.max(axis=-1)
        return longest if window is None else np.minimum(longest, window)


MOE = {
    "num_hidden_layers": 5,
    "first_k_dense_replace": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 320,
    "num_attention_heads": 8,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "num_nextn_predict_layers": 1,
}
MLA = Model(name="mla", **MOE, **LATENT)  # type: ignore[arg-type]
GQA = Model(name="gqa", **MOE, num_key_value_heads=2, head_dim=16, num_nextn_predict_layers=1)  # type: ignore[arg-type]
DENSE = Model(
    name="dense", num_hidden_layers=3, hidden_size=64, intermediate_size=96, vocab_size=320, num_attention_heads=8
)


def _trunk(cost: object, model: Model, tp_size: int = 1, choice_s: float = 0.0) -> TrunkTimes:
    return TrunkTimes(
        model,
        cast(Any, None),
        cast(Any, cost),
        dtype="bf16",
        tp_size=tp_size,
        sm_fraction=1.0,
        cache_bytes_per_element=2.0,
        choice_s=choice_s,
    )


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("model", [MLA, GQA, DENSE], ids=lambda m: m.name)
def test_a_device_holds_the_weights_that_its_products_read(model: Model, tp_size: int) -> None:
    """Split or whole alike; the embedding is held and takes no product."""
    trunk = _trunk(Products(), model, tp_size)
    attention = trunk.layer.at(1) - trunk.gate.at(1) - trunk.shared.at(1) + trunk.absorbed.at(1)
    in_moe, in_dense = attention + trunk.gate.at(1) + trunk.shared.at(1), attention + trunk.dense.at(1)
    n_dense = model.num_hidden_layers - model.n_moe_layers
    read = model.n_moe_layers * in_moe + n_dense * in_dense + trunk.head.at(1)
    held = dense_parameters(model, model.parameters, tp_size)
    assert held - model.parameters.embedding / tp_size == pytest.approx(read, rel=1e-12)
    if tp_size == 1:
        assert held == model.total_parameters - model.parameters.routed_experts
    if model.num_nextn_predict_layers:
        module = dense_parameters(model, model.layer_parameters(4), tp_size) + 2 * 64 * 64
        assert module == pytest.approx(in_moe + trunk.merge.at(1), rel=1e-12)


def test_products_of_an_mla_layer() -> None:
    trunk = _trunk(Products(), MLA, 2)
    assert trunk.before.at(3) == 3 * (64 * (48 + 32 + 4) + 48 * 4 * (12 + 4))
    assert trunk.absorbed.at(3) == 3 * 4 * 32 * (12 + 10) == trunk.expanded.at(3)
    direct = _trunk(Products(), MLA.model_copy(update={"q_lora_rank": None}), 2)
    assert direct.before.at(3) == 3 * 64 * (4 * 16 + 32 + 4)


def test_shared_experts_are_whole_and_their_tokens_split() -> None:
    for tp_size in (1, 2, 4):
        assert _trunk(Products(), MLA, tp_size).shared.at(9) == -(-9 // tp_size) * 2 * 3 * 64 * 24
        assert _trunk(Products(), MLA, tp_size).dense.at(9) == 9 * 3 * 64 * 96 / tp_size


def test_bytes_beside_the_products() -> None:
    """A norm moves 8 bytes per element of its hidden state, another kernel 4 (bf16, in and out)."""
    norm = 8 * 64
    gqa, mla = _trunk(Bytes(), GQA, 2), _trunk(Bytes(), MLA, 2)
    assert gqa.before.at(5) == 5 * (norm + 4 * (4 * 16 + 2 * 16))  # queries, and what the cache gets
    assert mla.before.at(5) == 5 * (norm + 4 * (48 + 32) + 4 * (4 * 4 + 32 + 4))
    assert gqa.head.at(5) == 5 * (norm + 2 * 320 / 2)  # the sampler reads the device's logits
    assert gqa.merge.at(5) == 5 * 2 * norm


def test_the_gate_waits_for_the_choice_of_replicas_and_dense_layers_have_none() -> None:
    assert _trunk(Bytes(), GQA, choice_s=7.0).gate.at(5) == 7 + _trunk(Bytes(), GQA).gate.at(5)
    assert _trunk(Products(), GQA).gate.at(5) == 5 * 64 * 16 and _trunk(Products(), DENSE).gate.at(5) == 0
    steps = program(
        ("dense", "moe", "head"), 1, halves=1, staged=False, exchanges=True, shared=True, reduces=False
    ).steps
    assert [step.layer for step in steps if step.phase == "gate"] == [1]


def test_decodes_beside_prompts_take_the_mixed_kernel() -> None:
    cost = Asked()
    trunk = _trunk(cost, GQA)
    requests, kv = np.array([4, 5]), np.array([4 * 1024, 5 * 1024])
    trunk.decode_core(requests, 1, kv, np.array([True, False]))
    assert {phase for phase in cost.phases if phase[1]} == {("mixed", 4), ("decode", 5)}
    cost.phases.clear()
    trunk.decode_core(requests + 2, 3, kv)
    assert {phase for phase, _ in cost.phases} == {"decode"} and (cost.query_tokens == 3).all()


def test_a_prompt_sees_its_earlier_chunks_and_expands_them() -> None:
    cost = Asked()
    pairs = np.array([512 * 1000 + 512 * 513 / 2])
    seconds = _trunk(cost, GQA).prefill_core(np.array([1]), np.array([512]), pairs)
    assert cost.query_tokens.tolist() == [[512]] and cost.kv_tokens.tolist() == [[1512]] and seconds == [1512]
    assert cost.phases == [("prefill", 1)]
    expanded = _trunk(Products(), MLA, 2).prefill_core(np.array([1]), np.array([512]), pairs)
    assert expanded == [1512 * 32 * 4 * (12 + 10)]


def test_windows_of_some_layers_or_of_an_indexer() -> None:
    window = {"sliding_window": 100, "full_attention_interval": 4}
    decode: tuple[Any, ...] = (np.array([2]), 1, np.array([2 * 1024]))
    assert _trunk(Asked(), GQA).decode_core(*decode) == [1024]
    assert _trunk(Asked(), GQA.model_copy(update=window)).decode_core(*decode) == [(1024 + 3 * 100) / 4]
    assert _trunk(Asked(), MLA.model_copy(update={"index_topk": 300})).decode_core(*decode) == [300]


# --- memory ---


def _scenario(model: dict[str, Any], redundant: int = 0) -> Scenario:
    return load(
        SCENARIOS / "tiny.yaml",
        [
            f"model={{name: toy, {', '.join(f'{key}: {value}' for key, value in model.items())}}}",
            f"policies=[{{name: p, placement: {{kind: linear, num_redundant_experts: {redundant}}}}}]",
            "cost.gemm_dtype=bf16",
            "schedule={phase: forward}",
        ],
    )


def _unit(tp_size: int, speculative_tokens: int = 0) -> Unit:
    parallel = {"ep_size": 8, "tp_size": tp_size}
    return Unit.model_validate({"name": "u", "parallel": parallel, "speculative_tokens": speculative_tokens})


def _items(model: dict[str, Any], unit: Unit, redundant: int = 0) -> dict[str, float]:
    scenario = _scenario(model, redundant)
    return unit_memory(scenario, scenario.policies[0], unit, 10.0)


def test_replicas_take_the_room_of_their_experts() -> None:
    expert = 3 * 64 * 24 * 2
    assert _items(MOE, _unit(1))["expert_weights"] == 3 * 16 / 8 * expert
    assert _items(MOE, _unit(1), redundant=8)["expert_weights"] == 3 * 24 / 8 * expert


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_a_key_value_head_stays_whole_and_a_latent_is_on_every_device(tp_size: int) -> None:
    heads = MOE | {"num_key_value_heads": 2, "head_dim": 16}
    assert _items(heads, _unit(tp_size))["kv_cache"] == 10 * 5 * 2 * 2 * 16 * 2 / min(tp_size, 2)
    shape = attention_shape(GQA, "decode", tp_size)
    assert _items(heads, _unit(tp_size))["kv_cache"] == 10 * 5 * shape.cache_elements * 2
    assert _items(MOE | LATENT, _unit(tp_size))["kv_cache"] == 10 * 5 * (32 + 4) * 2
    dense = _items(heads, _unit(tp_size))["weights"]
    assert dense == 2 * dense_parameters(GQA, GQA.parameters, tp_size)


def test_a_speculating_unit_holds_its_mtp_module_and_its_cache() -> None:
    plain, more = _items(MOE | LATENT, _unit(1)), _items(MOE | LATENT, _unit(1, speculative_tokens=2))
    experts = 16 * 3 * 64 * 24
    assert more["expert_weights"] - plain["expert_weights"] == 2 * experts / 8
    assert more["weights"] - plain["weights"] == 2 * (MLA.mtp_parameters - experts)
    assert more["kv_cache"] == plain["kv_cache"] * 6 / 5
    none = {key: value for key, value in LATENT.items() if key != "num_nextn_predict_layers"}
    assert _items(MOE | none, _unit(1, speculative_tokens=2)) == _items(MOE | none, _unit(1))
