"""Model geometry: published totals, exact arithmetic of the DeepSeek reports, laws of counting, rules, HF configs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from ruamel.yaml import YAML

from sim.hf import is_hf_config
from sim.model import Model, Parts, mean_positions

FOLDER = Path(__file__).resolve().parents[1] / "scenarios" / "models"
FILES = sorted(FOLDER.glob("*.yaml"))
MODELS = {path.stem: Model.model_validate(YAML(typ="safe", pure=True).load(path)) for path in FILES}
V3 = MODELS["deepseek_v3"]

# total, active, active without the input embedding (1e9 parameters), to the digits of the reference table, whose column
# was computed independently of this code.
COMPUTED = {
    "deepseek_moe_16b": (16.38, 2.83, 2.62),
    "deepseek_v2": (235.7, 21.4, 20.9),
    "deepseek_v2_lite": (15.71, 2.66, 2.45),
    "deepseek_v3": (671.025, 37.551, 36.625),
    "mixtral_8x7b": (46.7, 12.9, 12.8),  # 12.749 without the embedding; the table rounds 12.75
    "mixtral_8x22b": (140.6, 39.2, 39.0),
    "qwen3_30b_a3b": (30.5, 3.35, 3.04),
    "qwen3_235b_a22b": (235.1, 22.2, 21.6),
    "kimi_k2": (1026, 32.9, 31.7),
    "glm_4_5": (352.8, 33.6, 32.9),
    "gpt_oss_120b": (116.8, 5.7, 5.1),
    "llama4_maverick": (400.7, 17.2, 16.2),
    "llama3_1_405b": (405.9, None, None),
    "llama3_1_8b": (8.03, None, None),
    "gpt3_175b": (174.6, None, None),
}
MOE_LAYERS = {
    "deepseek_moe_16b": (28, 27),
    "deepseek_v2": (60, 59),
    "deepseek_v2_lite": (27, 26),
    "deepseek_v3": (61, 58),
    "deepseek_v3_2": (61, 58),
    "deepseek_v4_flash": (43, 43),
    "deepseek_v4_pro": (61, 61),
    "switch_base_128": (24, 12),
    "switch_c": (30, 30),
    "switch_xxl": (48, 24),
    "gshard_600b": (36, 18),
    "mixtral_8x7b": (32, 32),
    "mixtral_8x22b": (56, 56),
    "qwen3_30b_a3b": (48, 48),
    "qwen3_235b_a22b": (94, 94),
    "kimi_k2": (61, 60),
    "kimi_k3": (93, 92),
    "glm_4_5": (92, 89),
    "glm_4_5_air": (46, 45),
    "gpt_oss_120b": (36, 36),
    "llama4_maverick": (48, 24),
    "llama3_1_405b": (126, 0),
    "llama3_1_8b": (32, 0),
    "gpt3_175b": (96, 0),
    "deepseek_67b": (95, 0),
    "dense_37b": (61, 0),
    "dense_671b": (61, 0),
}


def problems(**fields: Any) -> dict[str, str]:
    """``{field: message}`` of a model that must be refused."""
    base = {"name": "x", "num_hidden_layers": 4, "hidden_size": 64, "vocab_size": 100, "num_attention_heads": 4}
    with pytest.raises(ValidationError) as caught:
        Model.model_validate(base | fields)
    return {".".join(map(str, e["loc"])): e["msg"] for e in caught.value.errors()}


def changed(model: Model, **fields: Any) -> Model:
    return Model.model_validate(model.model_dump() | fields)


# -- files and published figures ------------------------------------------------------------------------------------


def test_every_model_ships_under_its_own_name_with_a_source() -> None:
    assert set(MODELS) == set(MOE_LAYERS)
    for path in FILES:
        assert MODELS[path.stem].name == path.stem
        assert MODELS[path.stem].source
        assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("name", sorted(MOE_LAYERS))
def test_number_of_layers_with_experts(name: str) -> None:
    assert (MODELS[name].num_hidden_layers, MODELS[name].n_moe_layers) == MOE_LAYERS[name]


@pytest.mark.parametrize("name", [n for n, m in MODELS.items() if m.published])
def test_published_totals(name: str) -> None:
    model, published = MODELS[name], MODELS[name].published
    assert published is not None
    active = {
        "nothing": model.active_parameters,
        "input_embedding": model.active_parameters_without_input_embedding,
        "embeddings": model.active_parameters_without_embeddings,
    }[published.active_excludes]
    wide = {"switch_base_128", "switch_c", "switch_xxl", "gshard_600b"}
    rounded = {"deepseek_v2_lite", "qwen3_30b_a3b", "kimi_k2", "kimi_k3", "glm_4_5_air"}  # one or two digits printed
    assert published.tolerance <= (0.04 if name in wide else 0.03 if name in rounded else 0.015)
    if published.total_b is not None:
        assert model.total_parameters / 1e9 == pytest.approx(published.total_b, rel=published.tolerance)
    if published.active_b is not None:
        assert active / 1e9 == pytest.approx(published.active_b, rel=published.tolerance)


@pytest.mark.parametrize("name", sorted(COMPUTED))
def test_computed_column_to_its_last_digit(name: str) -> None:
    model = MODELS[name]
    ours = (model.total_parameters, model.active_parameters, model.active_parameters_without_input_embedding)
    for value, expected in zip(ours, COMPUTED[name], strict=True):
        if expected is not None:
            digits = len(str(expected).partition(".")[2])
            assert abs(value / 1e9 - expected) <= 0.52 * 10.0**-digits


def test_negative_control_a_wrong_size_misses_the_published_total() -> None:
    """Switch-XXL with the 64 experts its table prints is half of 395 B; one expert too many in V3 shows in 0.1 %."""
    assert 200 < changed(MODELS["switch_xxl"], n_routed_experts=64).total_parameters / 1e9 < 202
    assert abs(changed(V3, n_routed_experts=264).total_parameters / 671.025e9 - 1) > 0.001
    assert abs(changed(V3, first_k_dense_replace=2).total_parameters / 671.025e9 - 1) > 0.001


def test_dense_baselines_match_v3() -> None:
    assert MODELS["dense_671b"].total_parameters == pytest.approx(V3.total_parameters, rel=0.005)
    assert MODELS["dense_37b"].total_parameters == pytest.approx(V3.active_parameters, rel=0.005)
    for name in ("dense_671b", "dense_37b"):
        assert MODELS[name].published is None
        assert MODELS[name].num_hidden_layers == V3.num_hidden_layers


# -- exact arithmetic ------------------------------------------------------------------------------------------------


def test_training_flops_per_token_of_deepseek() -> None:
    """arXiv 2505.09343 Table 2 prints 250 and 155 GFLOP; 432 / 385 TFLOPS non-causal / causal in its Table 4."""
    causal, full = V3.training_flops_per_token(4096), V3.training_flops_per_token(4096, causal=False)
    assert causal / 1e9 == pytest.approx(250.45, abs=0.005)
    assert full / 1e9 == pytest.approx(281.15, abs=0.05)
    assert full / causal == pytest.approx(1.1226, abs=5e-5)
    assert full / causal == pytest.approx(432 / 385, rel=0.001)
    assert MODELS["deepseek_v2"].training_flops_per_token(4096) / 1e9 == pytest.approx(155.30, abs=0.005)


def test_v3_moe_layer_forward() -> None:
    layer = V3.layer_flops_per_token(10, 4096)
    assert layer.total / 1e9 == pytest.approx(1.338, abs=5e-4)
    assert layer.routed_experts == 8 * V3.expert_flops == 8 * 6 * 7168 * 2048
    assert layer.router == 2 * 7168 * 256
    assert layer.dense_ffn == 0
    assert V3.layer_flops_per_token(2, 4096).dense_ffn == 6 * 7168 * 18432


def test_kv_cache_per_token() -> None:
    """arXiv 2505.09343 Table 1, BF16, KB = 1000."""
    assert V3.kv_cache_bytes_per_token() == 70_272
    assert MODELS["llama3_1_405b"].kv_cache_bytes_per_token() == 516_096
    assert MODELS["llama3_1_405b"].kv_cache_bytes_per_token(bytes_per_element=1) == 516_096 / 2
    assert MODELS["switch_c"].kv_cache_bytes_per_token() == 15 * 2 * 32 * 64 * 2  # decoder only


def test_v3_active_share_and_mtp() -> None:
    assert V3.active_parameters / V3.total_parameters == pytest.approx(0.056, abs=5e-4)
    assert V3.mtp_parameters / 1e9 == pytest.approx(11.5, rel=0.015)  # README_WEIGHTS: 11.5 B unique
    assert V3.mtp_parameters == V3.layer_parameters(60).total + 2 * 7168 * 7168


def test_mla_sizes_by_hand() -> None:
    query = 7168 * 1536 + 1536 * 128 * 192
    key_value = 7168 * (512 + 64) + 512 * 128 * (128 + 128)
    assert V3.attention_parameters == query + key_value + 128 * 128 * 7168
    assert V3.attention_core_flops(1) == 2 * 128 * (192 + 128)
    assert V3.attention_core_flops(1, absorbed=True) == 2 * 128 * (2 * 512 + 64)
    gqa = MODELS["llama3_1_405b"]
    assert gqa.attention_parameters == 16384 * 128 * (2 * 128 + 2 * 8)
    assert gqa.attention_core_flops(7, absorbed=True) == gqa.attention_core_flops(7)  # MLA only


def test_sparse_and_windowed_attention_cost_less() -> None:
    sparse = MODELS["deepseek_v3_2"]
    indexer = 1536 * 64 * 128 + 7168 * (128 + 64)
    assert sparse.attention_parameters - V3.attention_parameters == indexer
    far = 65536
    scores = 2 * 64 * 128 * far / 2
    kept = sparse.attention_core_flops(2048 - 2048**2 / (2 * far))
    assert sparse.layer_flops_per_token(9, far).attention_core == scores + kept
    assert scores + kept < V3.layer_flops_per_token(9, far).attention_core / 3
    oss = MODELS["gpt_oss_120b"]
    windowed, full = (oss.layer_flops_per_token(layer, 4096).attention_core for layer in (0, 1))
    assert full == oss.attention_core_flops(2048)
    assert windowed == oss.attention_core_flops(mean_positions(4096, True, 128)) == oss.attention_core_flops(126)


def test_grouped_output_and_one_vector_for_key_and_value() -> None:
    """DeepSeek-V4-Flash: 8 groups of 64 x 512 / 8 inputs to rank 1024 each, then 8 x 1024 to the hidden size."""
    flash = MODELS["deepseek_v4_flash"]
    query, key_value = 4096 * 1024 + 1024 * 64 * 512, 4096 * 512
    output = 8 * (64 * 512 // 8) * 1024 + 8 * 1024 * 4096
    indexer = 1024 * 64 * 128 + 4096 * (128 + 64)
    assert flash.attention_parameters == query + key_value + output + indexer
    assert flash.kv_cache_bytes_per_token() == 43 * (512 + 128) * 2


def test_encoder_decoder_counts_cross_attention_and_sees_both_sides() -> None:
    switch = MODELS["switch_base_128"]
    encoder, decoder = switch.layer_parameters(0), switch.layer_parameters(12)
    assert decoder.attention_projection == 2 * encoder.attention_projection == 8 * 768 * 768
    assert switch.layer_flops_per_token(0, 512).attention_core == switch.attention_core_flops(512)
    assert switch.layer_flops_per_token(12, 512).attention_core == switch.attention_core_flops(256 + 512)
    assert switch.moe_layers == tuple(range(1, 24, 2))


def test_latent_experts_send_the_narrow_vector() -> None:
    k3 = MODELS["kimi_k3"]
    assert (k3.dispatch_hidden_size, V3.dispatch_hidden_size) == (3584, 7168)
    assert k3.expert_parameters == 3 * 3584 * 3072
    assert k3.shared_expert_parameters == 2 * 3 * 7168 * 3072 + 2 * 7168 * 3584


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_mean_positions_is_the_mean_of_the_clipped_ramp(length: int, limit: int) -> None:
    """The continuous convention lies half a position below the mean of min(t, limit) over t = 1..S, or less."""
    discrete = sum(min(t, limit) for t in range(1, length + 1)) / length
    assert 0 <= discrete - mean_positions(length, True, limit) <= 0.5 + 1e-9
    assert mean_positions(length, False, limit) == min(length, limit)


# -- laws --------------------------------------------------------------------------------------------------------------


@st.composite
def shapes(draw: st.DrawFn) -> Model:
    layers, group, per_group = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    experts = group * per_group if draw(st.booleans()) else 0
    topk_group = draw(st.integers(1, group)) if experts else 1
    heads = draw(st.sampled_from((1, 2, 4)))
    fields: dict[str, Any] = {
        "name": "drawn",
        "num_hidden_layers": layers,
        "num_encoder_layers": draw(st.integers(0, layers - 1)),
        "hidden_size": 4 * draw(st.integers(1, 32)),
        "vocab_size": draw(st.integers(0, 500)),
        "tie_word_embeddings": draw(st.booleans()),
        "gated_ffn": draw(st.booleans()),
        "intermediate_size": draw(st.integers(1, 99)),
        "num_attention_heads": heads,
    }
    if experts:
        fields |= {
            "n_routed_experts": experts,
            "num_experts_per_tok": draw(st.integers(1, topk_group * per_group)),
            "moe_intermediate_size": draw(st.integers(1, 50)),
            "n_shared_experts": draw(st.integers(0, 2)),
            "moe_latent_size": draw(st.none() | st.integers(1, 9)),
            "n_group": group,
            "topk_group": topk_group,
            "mlp_only_layers": draw(st.lists(st.integers(0, layers - 1), max_size=layers - 1, unique=True)),
        }
    if draw(st.booleans()):
        fields |= {"kv_lora_rank": 8, "qk_rope_head_dim": 2, "qk_nope_head_dim": 4, "v_head_dim": 6}
        fields |= {"q_lora_rank": draw(st.none() | st.just(12))}
    if draw(st.booleans()):
        fields |= {"index_topk": 3, "index_n_heads": 2, "index_head_dim": 4}
    return Model.model_validate(fields)


@given(shapes())
def test_active_is_part_of_total_and_parts_add_up(model: Model) -> None:
    ends = (
        model.active_parameters_without_embeddings,
        model.active_parameters_without_input_embedding,
        model.active_parameters,
        model.total_parameters,
    )
    assert list(ends) == sorted(ends)
    parts = sum((model.layer_parameters(i) for i in range(model.num_hidden_layers)), Parts())
    assert parts.total + model.parameters.head + model.parameters.embedding == model.total_parameters
    assert parts.attention_core == 0
    assert model.n_moe_layers == sum(model.layer_parameters(i).router > 0 for i in range(model.num_hidden_layers))


@given(shapes())
def test_forward_flops_are_two_per_active_parameter_and_the_core(model: Model) -> None:
    flops = model.forward_flops_parts(32)
    matrices = model.active_parameters_without_input_embedding
    assert replace(flops, attention_core=0).total == 2 * matrices
    assert flops.embedding == 0
    assert model.training_flops_per_token(32) == pytest.approx(3 * model.forward_flops_per_token(32))
    assert model.forward_flops_per_token(32) <= model.forward_flops_per_token(32, causal=False)


@given(shapes())
def test_one_more_expert_adds_exactly_its_matrices_and_router_column(model: Model) -> None:
    if not model.is_moe:
        return
    plain = changed(model, n_group=1, topk_group=1)
    more = changed(plain, n_routed_experts=plain.n_routed_experts + 1)
    column = model.hidden_size * model.n_moe_layers
    assert more.total_parameters - plain.total_parameters == model.n_moe_layers * model.expert_parameters + column
    assert more.active_parameters - plain.active_parameters == column


@given(shapes())
def test_every_expert_chosen_means_all_parameters_active(model: Model) -> None:
    full = changed(model, n_group=1, topk_group=1, num_experts_per_tok=model.n_routed_experts)
    assert full.active_parameters == full.total_parameters


@given(
    shapes(), st.sampled_from(("hidden_size", "vocab_size", "intermediate_size", "moe_intermediate_size", "head_dim"))
)
def test_wider_is_never_smaller(model: Model, field: str) -> None:
    width = getattr(model, field)
    if width is None:
        return
    wider = changed(model, **{field: width + 4})
    assert wider.total_parameters >= model.total_parameters
    assert wider.active_parameters >= model.active_parameters
    assert wider.forward_flops_per_token(8) >= model.forward_flops_per_token(8)


@given(shapes(), st.integers(1, 500))
def test_longer_sequences_cost_only_attention(model: Model, length: int) -> None:
    short, long = model.forward_flops_parts(length), model.forward_flops_parts(2 * length)
    assert long.attention_core > short.attention_core
    assert replace(long, attention_core=0) == replace(short, attention_core=0)


def test_layer_out_of_range_and_empty_sequence_are_refused() -> None:
    for layer in (-1, 61):
        with pytest.raises(IndexError, match=r"not in 0\.\.60"):
            V3.layer_parameters(layer)
    with pytest.raises(ValueError, match=r"at least 1 \[got 0\]"):
        V3.forward_flops_per_token(0)


def test_a_model_survives_json_and_is_frozen() -> None:
    assert Model.model_validate_json(V3.model_dump_json()) == V3
    with pytest.raises(ValidationError):
        V3.hidden_size = 1


# -- rules -------------------------------------------------------------------------------------------------------------

MOE = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        (MOE | {"num_experts_per_tok": 9}, "num_experts_per_tok", "must be at most n_routed_experts (8)"),
        (MOE | {"num_experts_per_tok": 0}, "num_experts_per_tok", "must be at least 1 when n_routed_experts is 8"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok", "must be 0 in a dense model (n_routed_experts is 0)"),
        (MOE | {"n_group": 3}, "n_group", "must divide n_routed_experts (8)"),
        (MOE | {"n_group": 4, "topk_group": 5}, "topk_group", "must be at most n_group (4)"),
        (
            MOE | {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3},
            "topk_group",
            "leaves 2 experts to choose from, fewer than num_experts_per_tok (3)",
        ),
        (MOE | {"moe_intermediate_size": None}, "moe_intermediate_size", "is needed: the width of a routed expert"),
        (MOE | {"moe_layer_freq": 2, "moe_layer_offset": 2}, "moe_layer_offset", "must be below moe_layer_freq (2)"),
        (
            MOE | {"first_k_dense_replace": 4},
            "mlp_only_layers",
            "and the layer pattern leave no layer with experts",
        ),
        (
            MOE | {"mlp_only_layers": [4]},
            "mlp_only_layers",
            "lists a layer that is not below num_hidden_layers (4)",
        ),
        (
            MOE | {"first_k_dense_replace": 1},
            "intermediate_size",
            "is needed: the FFN width of 1 dense layers",
        ),
        (
            {"intermediate_size": 9, "n_shared_experts": 1},
            "n_shared_experts",
            "needs routed experts (n_routed_experts is 0)",
        ),
        (
            {"intermediate_size": 9, "num_key_value_heads": 3},
            "num_key_value_heads",
            "must divide num_attention_heads (4)",
        ),
        (
            {"intermediate_size": 9, "num_attention_heads": 5},
            "head_dim",
            "is needed: hidden_size (64) is not a multiple of num_attention_heads (5)",
        ),
        (
            {"intermediate_size": 9, "num_encoder_layers": 4},
            "num_encoder_layers",
            "must be below num_hidden_layers (4)",
        ),
        ({"intermediate_size": 9, "o_groups": 3}, "o_groups", "must divide num_attention_heads (4)"),
        ({"intermediate_size": 9, "topk_grp": 4}, "topk_grp", "Extra inputs are not permitted"),
    ],
)
def test_a_broken_rule_is_reported_at_its_field(fields: dict[str, Any], field: str, message: str) -> None:
    assert problems(**fields)[field] == message


def test_all_problems_at_once_and_only_real_ones() -> None:
    found = problems(n_routed_experts=8, num_experts_per_tok=9, n_group=0, topk_group=3, kv_lora_rank=8, vocab_size=-1)
    assert set(found) == {
        "num_experts_per_tok",
        "moe_intermediate_size",
        "n_group",
        "vocab_size",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
        "v_head_dim",
    }
    assert set(problems(intermediate_size=8, index_topk=4)) == {"index_n_heads", "index_head_dim"}


def test_null_group_means_one() -> None:
    base = {"name": "x", "num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 9, "num_attention_heads": 1}
    model = Model.model_validate(base | MOE | {"n_group": None, "topk_group": None})
    assert (model.n_group, model.topk_group) == (1, 1)


ANY = (
    st.none()
    | st.booleans()
    | st.integers(-3, 40)
    | st.floats()
    | st.sampled_from(("", "x", "4", "1e9"))
    | st.lists(st.integers(-2, 9))
)


@given(st.dictionaries(st.sampled_from(sorted(Model.model_fields)), ANY))
def test_any_mapping_is_a_model_or_a_validation_error(fields: dict[str, Any]) -> None:
    base = {"name": "x", "num_hidden_layers": 4, "hidden_size": 64, "vocab_size": 100, "num_attention_heads": 4}
    try:
        model = Model.model_validate(base | fields)
    except ValidationError:
        return
    assert 0 <= model.active_parameters <= model.total_parameters
    assert model.forward_flops_per_token(16) >= 0
    assert model.kv_cache_bytes_per_token() > 0


# -- Hugging Face configs: the facts of each config.json that matter ---------------------------------------------------

HF: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 61,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
        "vocab_size": 129280,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "num_nextn_predict_layers": 1,
    },
    "mixtral_8x7b": {
        "model_type": "mixtral",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen3_30b_a3b": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
    "gpt_oss_120b": {
        "model_type": "gpt_oss",
        "num_hidden_layers": 36,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 18,
    },
    "llama4_maverick": {
        "model_type": "llama4",
        "vision_config": {"num_hidden_layers": 34, "hidden_size": 1408},
        "text_config": {
            "model_type": "llama4_text",
            "num_hidden_layers": 48,
            "hidden_size": 5120,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
            "num_local_experts": 128,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "vocab_size": 202048,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    },
    "glm_4_5": {
        "model_type": "glm4_moe",
        "num_hidden_layers": 92,
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "n_routed_experts": 160,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "vocab_size": 151552,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_nextn_predict_layers": 1,
    },
    "llama3_1_405b": {
        "model_type": "llama",
        "num_hidden_layers": 126,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "vocab_size": 128256,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
    },
    "gpt3_175b": {
        "model_type": "gpt2",
        "n_layer": 96,
        "n_embd": 12288,
        "n_inner": None,
        "n_head": 96,
        "vocab_size": 50257,
        "tie_word_embeddings": True,
    },
    "switch_base_128": {
        "model_type": "switch_transformers",
        "d_model": 768,
        "d_ff": 2048,
        "d_kv": 64,
        "num_layers": 12,
        "num_decoder_layers": 12,
        "num_heads": 12,
        "num_experts": 128,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "feed_forward_proj": "gated-gelu",
        "vocab_size": 32128,
        "tie_word_embeddings": True,
    },
}


def counts(model: Model) -> tuple[Any, ...]:
    return (
        model.total_parameters,
        model.active_parameters,
        model.moe_layers,
        model.scoring_func,
        model.norm_topk_prob,
        model.routed_scaling_factor,
        model.n_group,
        model.topk_group,
        model.mtp_parameters,
        model.kv_cache_bytes_per_token(),
        model.forward_flops_per_token(4096),
    )


@pytest.mark.parametrize("name", sorted(HF))
def test_hf_config_gives_the_shipped_model(name: str) -> None:
    assert is_hf_config(HF[name])
    imported = Model.from_hf(HF[name], name)
    assert counts(imported) == counts(MODELS[name])


@pytest.mark.parametrize("name", sorted(HF))
def test_our_own_files_are_not_hf_configs(name: str) -> None:
    assert not is_hf_config(MODELS[name].model_dump())
    assert not is_hf_config([HF[name]])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("n_routed_experts", "num_experts"),
        ("n_routed_experts", "moe_num_experts"),
        ("num_experts_per_tok", "moe_topk"),
        ("num_experts_per_tok", "moe_k"),
        ("num_experts_per_tok", "num_experts_per_token"),
        ("moe_intermediate_size", "expert_ffn_hidden_size"),
        ("n_shared_experts", "moe_num_shared_experts"),
        ("routed_scaling_factor", "route_scale"),
        ("norm_topk_prob", "moe_renormalize"),
        ("scoring_func", "score_function"),
        ("num_hidden_layers", "num_layers"),
        ("hidden_size", "n_embd"),
        ("num_attention_heads", "n_heads"),
        ("n_group", "num_expert_group"),
    ],
)
def test_hf_spellings(old: str, new: str) -> None:
    config = {new if key == old else key: value for key, value in HF["deepseek_v3"].items()}
    assert counts(Model.from_hf(config, "x")) == counts(V3)


def test_hf_nested_text_config_and_implicit_gate() -> None:
    """Kimi: the language model sits below the top level; transformers' own V3 config does not state its sigmoid."""
    inner = {key: value for key, value in HF["deepseek_v3"].items() if key != "scoring_func"}
    assert counts(Model.from_hf({"model_type": "kimi_vl", "llm_config": inner}, "x")) == counts(V3)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ({"mlp_layer_types": ["dense", "sparse", "sparse", "sparse", "sparse", "sparse"]}, (1, 2, 3, 4, 5)),
        ({"mlp_layer_types": ["sparse", "dense", "sparse", "sparse", "dense", "sparse"]}, (0, 2, 3, 5)),
        ({"mlp_only_layers": [0, 4]}, (1, 2, 3, 5)),
        ({"decoder_sparse_step": 3}, (2, 5)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, (3, 5)),
        ({"interleave_moe_layer_step": 3}, (2, 5)),
        ({"moe_layers": [1, 3, 5]}, (1, 3, 5)),
        ({"moe_layer_freq": [0, 0, 1, 1, 1, 1]}, (2, 3, 4, 5)),
        ({"moe_layer_freq": 2, "first_k_dense_replace": 1}, (2, 4)),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, (1, 3, 5)),
        ({"moe_layer_start_index": 2, "moe_layer_end_index": -1, "moe_layer_interval": 1}, (2, 3, 4, 5)),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 4, "moe_layer_interval": 2}, (1, 3)),
        ({"num_dense_layers": 2}, (2, 3, 4, 5)),
    ],
)
def test_hf_layer_patterns(pattern: dict[str, Any], expected: tuple[int, ...]) -> None:
    config = HF["qwen3_30b_a3b"] | {"num_hidden_layers": 6} | pattern
    assert Model.from_hf(config, "x").moe_layers == expected


def test_hf_group_and_shared_expert_rules() -> None:
    v3 = HF["deepseek_v3"]
    assert Model.from_hf(v3 | {"n_group": None, "topk_group": None}, "x").n_group == 1
    assert Model.from_hf(v3 | {"topk_method": "greedy"}, "x").topk_group == 1
    shared = Model.from_hf(HF["qwen3_30b_a3b"] | {"shared_expert_intermediate_size": 5632}, "x")
    assert shared.shared_expert_parameters == 3 * 2048 * 5632
    assert Model.from_hf(HF["mixtral_8x7b"], "x").n_shared_experts == 0
    sparser = Model.from_hf(HF["switch_base_128"] | {"encoder_sparse_step": 4, "decoder_sparse_step": 4}, "x")
    assert sparser.moe_layers == (1, 5, 9, 13, 17, 21)  # Switch: i % step == 1 in each stack


def test_hf_multi_query_attention() -> None:
    config = HF["gpt3_175b"] | {"model_type": "falcon", "multi_query": True}
    assert Model.from_hf(config, "x").num_key_value_heads == 1
    assert Model.from_hf(config | {"multi_query": False}, "x").num_key_value_heads is None


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        (
            "deepseek_v3",
            "num_experts_per_tok",
            "256 experts (n_routed_experts) but not how many a token uses: looked for num_exp",
        ),
        (
            "deepseek_v3",
            "n_routed_experts",
            "experts per token but not their number: looked for n_routed_experts, num_experts",
        ),
        (
            "deepseek_v3",
            "num_hidden_layers",
            "does not give the number of layers: looked for num_hidden_layers, num_layers",
        ),
        ("deepseek_v3", "hidden_size", "does not give the hidden size: looked for hidden_size, d_model, n_embd"),
        ("mixtral_8x7b", "intermediate_size", "does not give the expert width: looked for moe_intermediate_size"),
        ("llama3_1_405b", "intermediate_size", "does not give the FFN width: looked for intermediate_size"),
        ("llama3_1_405b", "num_attention_heads", "does not give the number of attention heads: looked for"),
        ("llama3_1_405b", "vocab_size", "does not give the vocabulary size: looked for vocab_size"),
    ],
)
def test_hf_refusals_name_the_keys_looked_for(name: str, missing: str, message: str) -> None:
    config = {key: value for key, value in HF[name].items() if key != missing}
    with pytest.raises(ValueError) as caught:
        Model.from_hf(config, "x")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.data())
def test_a_damaged_hf_config_is_read_or_refused(data: st.DataObject) -> None:
    config = dict(HF[data.draw(st.sampled_from(sorted(HF)))])
    config = dict(config.get("text_config", config))
    extra = ("mlp_layer_types", "moe_layers", "moe_layer_start_index", "text_config", "ffn_config", "layer_types")
    keys = st.sampled_from(sorted(config) + list(extra))
    nasty = ANY | st.sampled_from((10**30, -(10**30), {}, {"hidden_size": "x"}, ["sparse"] * 48, [None], "M-E*"))
    config |= data.draw(st.dictionaries(keys, nasty, min_size=1, max_size=3))
    try:
        model = Model.from_hf(config, "x")
    except ValueError:  # pydantic.ValidationError is one
        return
    assert 0 < model.active_parameters <= model.total_parameters
