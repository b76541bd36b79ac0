"""Hugging Face ``config.json`` to the canonical sizes of `sim.shape`: an alias table and the implicit rules behind it.

Plain mappings in and out. Spellings were collected from the default configs of transformers 5.23.0. A size that a
config leaves to its library and that cannot be inferred is refused, never guessed. Hybrid models (Mamba or linear
attention in some layers) are read as if every layer had the attention that the config describes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config", "talker_config")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_HIDDEN = ("hidden_size", "d_model", "n_embd")
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k_experts",
    "num_selected_experts",
)
_EXPERT_WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size")
_DENSE_WIDTH = ("intermediate_size", "ffn_hidden_size", "d_ff", "encoder_ffn_dim", "n_inner", "ffn_dim")
# Beside an intermediate_size that is the expert's width, some name the dense layers' width on its own.
_OTHER_DENSE_WIDTH = ("intermediate_size_mlp", "dense_intermediate_size")
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_SHARED_WIDTH = (
    "shared_expert_intermediate_size",
    "shared_experts_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "share_expert_dim",
    "shared_intermediate_size",
)
_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads")
_KV_HEADS = ("num_key_value_heads", "kv_n_heads", "num_kv_heads", "multi_query_group_num")
_HEAD_DIM = ("head_dim", "d_kv", "attention_head_dim", "kv_channels")
_SCALE = (
    "routed_scaling_factor",
    "route_scale",
    "moe_routed_scaling_factor",
    "moe_router_scaling_factor",
    "router_scaling_factor",
)
_NORMALISE = ("norm_topk_prob", "moe_renormalize", "moe_normalize_expert_weights", "route_norm")
_SCORE = ("scoring_func", "score_function", "score_func", "expert_selection_fn", "moe_router_activation_func")
_MTP = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
_PATTERN = ("mlp_layer_types", "layers_block_type", "hybrid_override_pattern")
_SAME_NAME = (
    "q_lora_rank",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "o_lora_rank",
    "o_groups",
    "index_topk",
    "index_n_heads",
    "index_head_dim",
)

# What a library's code fixes and its config does not say, by model_type (see _type).
_SIGMOID = (
    "deepseek_v3",
    "deepseek_v32",
    "kimi_k2",
    "glm4_moe",
    "glm4v_moe",
    "glm_moe_dsa",
    "llama4",
    "minimax_m2",
    "dots1",
    "afmoe",
    "minimax_m3_vl",
)
_NORMALISED = (
    "mixtral",
    "gpt_oss",
    "minimax",
    "granitemoe",
    "granitemoeshared",
    "granitemoehybrid",
    "nllb-moe",
    "ernie4_5_moe",
    "ernie4_5_vl_moe",
)
_TWO_MATRICES = (
    "gpt2",
    "gptj",
    "gpt_neo",
    "gpt_neox",
    "gpt_bigcode",
    "mpt",
    "opt",
    "bloom",
    "falcon",
    "phi",
    "starcoder2",
    "nemotron",
    "nllb-moe",
    "switch_transformers",
)
_FOUR_TIMES = ("gpt2", "gptj", "gpt_neo", "gpt_bigcode", "bloom", "falcon", "mpt")  # default FFN width 4 h
_ONE_SHARED = ("llama4",)
_IMPLICIT_K = {"switch_transformers": 1, "nllb-moe": 2}
_MOST_LAYERS = 10_000


def is_hf_config(data: object) -> bool:
    """True when a parsed file is a Hugging Face config rather than one of our model files (these have a ``name``)."""
    return (
        isinstance(data, Mapping)
        and "name" not in data
        and any(key in data for key in ("model_type", "architectures", "transformers_version", *_SECTIONS))
    )


def geometry(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of `sim.shape.Shape` read from ``config``; the rules between them are checked there.

    Raises ValueError when a size is not found, naming the keys looked for, or is not a whole number.
    """
    c = _flatten(config)
    hidden = _need(c, _HIDDEN, "the hidden size")
    fields = _stack(c) | {
        "hidden_size": hidden,
        "vocab_size": _need(c, ("vocab_size",), "the vocabulary size"),
        "tie_word_embeddings": c.get("tie_word_embeddings") is True,
        "gated_ffn": _gated(c),
        "num_nextn_predict_layers": _int(c, _MTP) or 0,
    }
    fields |= _attention(c, hidden, fields["num_hidden_layers"])
    experts = _int(c, _EXPERTS) or 0
    if experts and c.get("is_moe") is not False and c.get("enable_moe_block") is not False:
        return fields | _experts(c, experts, fields)
    if _int(c, _PER_TOKEN) and not experts:
        raise ValueError(f"config.json gives experts per token but not their number: looked for {', '.join(_EXPERTS)}")
    width = _int(c, (*_OTHER_DENSE_WIDTH, *_DENSE_WIDTH))
    if width is None and _type(c, _FOUR_TIMES):
        width = 4 * hidden
    return fields | {"intermediate_size": width or _need(c, _DENSE_WIDTH, "the FFN width")}


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's keys: down into ``text_config`` and its like while the level itself has no layers."""
    level = dict(config)
    for _ in range(3):
        inner = next((level[key] for key in _SECTIONS if isinstance(level.get(key), Mapping)), None)
        complete = _find(level, (*_LAYERS, "encoder_layers")) is not None and _find(level, _HIDDEN) is not None
        if inner is None or complete:
            break
        outer: dict[str, Any] = {key: level[key] for key in ("model_type", "tie_word_embeddings") if key in level}
        level = outer | dict(inner)
    for key in ("ffn_config", "attn_config"):  # DBRX
        if isinstance(level.get(key), Mapping):
            level = {k: v for k, v in level[key].items() if k != "model_type"} | level
    return level


def _find(c: Mapping[str, Any], keys: Iterable[str]) -> Any:
    """The first non-null value under ``keys``; of a list (ERNIE's text and vision experts) its first entry."""
    value = next((c[key] for key in keys if c.get(key) is not None), None)
    return value[0] if isinstance(value, list) and value else value


def _int(c: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    value = _find(c, keys)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31):
        raise ValueError(f"config.json: {next(k for k in keys if c.get(k) is not None)} must be a whole number")
    return value


def _need(c: Mapping[str, Any], keys: Sequence[str], what: str) -> int:
    value = _int(c, keys)
    if value is None:
        raise ValueError(f"config.json does not give {what}: looked for {', '.join(keys)}")
    return value


def _type(c: Mapping[str, Any], names: Iterable[str]) -> bool:
    """True when model_type is one of ``names`` or a part of that model (``llama4_text``)."""
    kind = str(c.get("model_type"))
    return any(kind == name or kind.startswith(name + "_") for name in names)


def _gated(c: Mapping[str, Any]) -> bool:
    projection = c.get("feed_forward_proj")
    if isinstance(projection, str):  # T5 family: "gated-gelu" or "relu"
        return projection.startswith("gated")
    return not _type(c, _TWO_MATRICES) and c.get("mlp_hidden_act") != "relu2"


def _stack(c: Mapping[str, Any]) -> dict[str, Any]:
    """Encoder and decoder layers. NLLB counts both by name, T5 calls the encoder's num_layers, most have one stack."""
    encoder, decoder = _int(c, ("encoder_layers",)), _int(c, ("decoder_layers", "num_decoder_layers"))
    if encoder is None and decoder is not None:
        encoder = _need(c, _LAYERS, "the number of layers")
    pattern = next((c[key] for key in _PATTERN if c.get(key)), None)
    if encoder and decoder:
        layers = encoder + decoder
    elif _find(c, _LAYERS) is None and isinstance(pattern, list | str):
        layers = len(pattern)
    else:
        layers = _need(c, _LAYERS, "the number of layers")
    if layers > _MOST_LAYERS:
        raise ValueError(f"config.json gives {layers} layers; at most {_MOST_LAYERS} are read")
    return {"num_hidden_layers": layers, "num_encoder_layers": encoder if encoder and decoder else 0}


def _attention(c: Mapping[str, Any], hidden: int, layers: int) -> dict[str, Any]:
    heads = _need(c, _HEADS, "the number of attention heads")
    fields: dict[str, Any] = {name: value for name in _SAME_NAME if (value := _int(c, (name,))) is not None}
    fields |= {
        "num_attention_heads": heads,
        "attention_k_eq_v": c.get("attention_k_eq_v") is True or _type(c, ("deepseek_v4",)),
    }
    if "kv_lora_rank" not in fields:
        kv_heads = _int(c, _KV_HEADS)
        if kv_heads is None and c.get("multi_query") is True and c.get("new_decoder_architecture") is not True:
            kv_heads = 1
        # An absent head_dim is the quotient rounded down, as in the libraries.
        fields |= {"num_key_value_heads": kv_heads, "head_dim": _int(c, _HEAD_DIM) or hidden // max(heads, 1)}
    kinds, window = c.get("layer_types"), _int(c, ("sliding_window",))
    if window and isinstance(kinds, list) and len(kinds) == layers and "sliding_attention" in kinds:
        full = [i for i, kind in enumerate(kinds) if kind != "sliding_attention"]
        interval = full[0] + 1 if full else layers + 1
        if full == list(range(interval - 1, layers, interval)):  # else every layer counts as full
            fields |= {"sliding_window": window, "full_attention_interval": interval}
    return fields


def _experts(c: Mapping[str, Any], experts: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    k = _int(c, _PER_TOKEN)
    if k is None:
        k = next((value for name, value in _IMPLICIT_K.items() if _type(c, (name,))), None)
    if k is None:
        found = next(key for key in _EXPERTS if c.get(key) is not None)
        looked = ", ".join(_PER_TOKEN)
        raise ValueError(
            f"config.json gives {experts} experts ({found}) but not how many a token uses: looked for {looked}"
        )
    width = _need(c, (*_EXPERT_WIDTH, *_DENSE_WIDTH), "the expert width")
    shared, shared_width = _int(c, _SHARED), _int(c, _SHARED_WIDTH)
    if shared is None:
        shared = 1 if shared_width or _type(c, _ONE_SHARED) else 0
    groups = _int(c, ("n_group", "num_expert_group")) or 1
    if c.get("topk_method") == "greedy":
        groups = 1  # DeepSeek-V2's code ignores the groups then
    normalise = _find(c, _NORMALISE)
    return _layer_pattern(c, fields) | {
        "n_routed_experts": experts,
        "num_experts_per_tok": k,
        "moe_intermediate_size": width,
        "moe_latent_size": _int(c, ("moe_latent_size",)),
        "intermediate_size": _int(c, (*_OTHER_DENSE_WIDTH, *_DENSE_WIDTH)) or width,
        "n_shared_experts": shared,
        "shared_expert_intermediate_size": shared_width or None,
        "n_group": groups,
        "topk_group": (_int(c, ("topk_group",)) or 1) if groups > 1 else 1,
        "scoring_func": _find(c, _SCORE) or ("sigmoid" if _type(c, _SIGMOID) else "softmax"),
        "norm_topk_prob": _type(c, _NORMALISED) if normalise is None else bool(normalise),
        "routed_scaling_factor": _find(c, _SCALE) or 1.0,
    }


def _layer_pattern(c: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers hold experts, from whichever of the many ways the config uses."""
    layers = int(fields["num_hidden_layers"])
    kinds = next((c[key] for key in _PATTERN if c.get(key)), None)
    if isinstance(kinds, list | str) and len(kinds) == layers:
        return _listed([i for i, kind in enumerate(kinds) if "moe" in str(kind) or kind in ("sparse", "E")], layers)
    for key, flags in (("moe_layers", False), ("moe_layer_freq", True)):  # Llama 4: indices; others: 0 or 1 per layer
        if isinstance(c.get(key), list):
            listed = [i for i, flag in enumerate(c[key]) if flag] if flags else c[key]
            if not all(isinstance(i, int) and 0 <= i < layers for i in listed):
                raise ValueError(f"config.json: {key} does not list layers below {layers}")
            return _listed(listed, layers)
    for key, offset in (("interleave_moe_layer_step", None), ("expert_layer_period", "expert_layer_offset")):
        if step := _int(c, (key,)):
            return {"moe_layer_freq": step, "moe_layer_offset": (_int(c, (offset,)) or 0) if offset else step - 1}
    if (start := _int(c, ("moe_layer_start_index",))) is not None:  # ERNIE; an end of -1 or null is the last layer
        end, step = c.get("moe_layer_end_index"), _int(c, ("moe_layer_interval",)) or 1
        last = end if isinstance(end, int) and 0 <= end < layers else layers - 1
        return _listed([i for i in range(start, last + 1) if (i + 1) % step == 0], layers)
    step = _int(c, ("decoder_sparse_step",)) or 1
    if step > 1:  # (i + 1) % step == 0, but i % step == 1 in Switch
        pattern = {"moe_layer_freq": step, "moe_layer_offset": 1 if _type(c, ("switch_transformers",)) else step - 1}
    else:
        pattern = {"moe_layer_freq": _int(c, ("moe_layer_freq",)) or 1}
    first = _int(c, ("first_k_dense_replace", "num_dense_layers")) or 0
    return pattern | {"first_k_dense_replace": first, "mlp_only_layers": c.get("mlp_only_layers") or ()}


def _listed(sparse: Sequence[int], layers: int) -> dict[str, Any]:
    """A list of expert layers as the shortest rule that gives it."""
    chosen = frozenset(sparse)
    sparse = sorted(chosen)
    first = sparse[0] if sparse else layers
    if sparse == list(range(first, layers)):
        return {"first_k_dense_replace": first}
    step = sparse[1] - sparse[0] if len(sparse) > 1 else layers
    if first < step and sparse == list(range(first, layers, step)):
        return {"moe_layer_freq": step, "moe_layer_offset": first}
    return {"mlp_only_layers": tuple(i for i in range(layers) if i not in chosen)}
